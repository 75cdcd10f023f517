"""Datasets of what a teacher predicts, logits or draws: writing and reading them.

A dataset is a folder with `manifest.json` and `shard-00000.safetensors` onwards; `dataset` says how files come to
exist, `codec` what is in them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from decode.models.checkpoint import RUNS, Checkpoint
from distill.data import codec
from distill.data.codec import Block, SampledBlock, TokenRows
from distill.data.dataset import Coded, Reader, Writer
from distill.data.manifest import MANIFEST, DatasetSettings, Entry, ScoredFrom
from kernels.errors import UserError


def counts_of(block: TokenRows) -> dict[str, int]:
    """What a manifest line says of a block."""
    last = block.segments.max(axis=1) if block.segments.size else np.zeros(0)
    return {
        "rows": block.rows,
        "tokens": int(np.count_nonzero(block.segments)),
        "trained_tokens": int(np.count_nonzero(block.loss_mask)),
        "documents": int(last.sum(dtype=np.int64)),
    }


def coded(block: Block | SampledBlock, settings: DatasetSettings, device: str = "") -> Coded:
    """A block as a shard. Raises ValueError if it is not what its class promises."""
    if wrong := codec.faults(block, settings, coded=False):
        raise ValueError(wrong[0])
    return Coded.of(codec.encode(block, settings), counts_of(block), device)


class ShardWriter(Writer):
    """Writes shards of logits."""

    kind = "shards"

    def write(self, block: Block | SampledBlock, index: int | None = None) -> Entry:
        """Writes a block as shard `index`, by default the first that is missing.

        Raises ValueError if the block is not what its class promises, UserError if it cannot be written.
        """
        return self.add(coded(block, self.settings), index)

    def score_from(self, replies: ScoredFrom) -> None:
        """Record the reply dataset that all shards are scored from. UserError where there are some of another."""
        if self.manifest.entries and self.manifest.scored_from not in ((), (replies,)):
            was = self.manifest.scored_from[0]
            raise UserError(
                f"{self.folder}: was begun from other replies ({was.name}, {was.sha256[:12]}), not from {replies.name},"
                f" {replies.sha256[:12]}; begin anew in another folder, or delete this one"
            )
        if self.manifest.scored_from != (replies,):
            self._write(replace(self.manifest, scored_from=(replies,)))


class Dataset(Reader):
    """Shards of logits opened for reading."""

    kind = "shards"

    def read(self, i: int, verify: bool = True) -> Block | SampledBlock:
        """The i-th listed shard. Without `verify` its hash is taken on trust, its shapes are not."""
        tensors = self._tensors(i, verify)
        self._expect(i, tensors, codec.layout(self.shards[i].rows, self.settings, tensors))
        try:
            return codec.decode(tensors, self.settings)
        except ValueError as error:
            raise UserError(f"{self.folder / self.shards[i].file}: {error}") from None

    def read_text(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, which positions are trained on, and segment ids of the i-th shard, its hash taken on trust:
        int32, bool and uint8 [rows, seq_len]."""
        tensors = self._tensors(i, verify=False)
        self._expect(i, tensors, codec.layout(self.shards[i].rows, self.settings, tensors))
        return codec.decode_text(tensors)

    def __iter__(self) -> Iterator[Block | SampledBlock]:
        return (self.read(i) for i in range(len(self.shards)))


def dataset_to_train_on(teacher: Checkpoint) -> Path:
    """The newest complete dataset of a teacher under runs/; UserError where there is none."""
    newest = newest_dataset(RUNS, teacher.weights_hash)
    if newest is None:
        raise UserError(f"no complete dataset for {teacher.name} under {RUNS}/; run `distill collect` or give --data")
    return newest


def newest_dataset(runs: Path, teacher_hash: str) -> Path | None:
    """The complete dataset of this teacher under `runs`, up to three folders down, written last."""
    found = []
    for depth in ("*", "*/*", "*/*/*"):
        for path in runs.glob(f"{depth}/{MANIFEST}"):
            try:
                dataset = Dataset.open(path.parent)
            except UserError:
                continue  # something else of the user's, or a dataset that nobody asked for
            if dataset.complete and dataset.settings.teacher_hash == teacher_hash:
                found.append((path.stat().st_mtime_ns, path.parent))
    return max(found)[1] if found else None
