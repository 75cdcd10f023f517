"""Datasets of teacher logits: writing, reading, checking and describing them.

A dataset is a folder with `manifest.json` and `shard-00000.safetensors` onwards; `store`
says how files come to exist, `bits` what is in them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill.data import codec
from distill.data.codec import Block, Settings
from distill.data.dataset import (
    MANIFEST,
    DamagedManifest,
    Entry,
    Manifest,
    Reader,
    Replies,
    ReplyWriter,
    Writer,
    reply_counts,
)
from kernels.errors import UserError

__all__ = [
    "Block",
    "Dataset",
    "Entry",
    "Problem",
    "Settings",
    "ShardWriter",
    "describe",
    "newest_dataset",
    "verify",
]


def counts_of(block: Block) -> dict[str, int]:
    """What a manifest line says of a block."""
    last = block.document.max(axis=1) if block.document.size else np.zeros(0)
    return {
        "rows": block.rows,
        "tokens": int(np.count_nonzero(block.document)),
        "trained_tokens": int(np.count_nonzero(block.loss_mask)),
        "documents": int(last.sum(dtype=np.int64)),
    }


class ShardWriter(Writer):
    """Writes shards of logits."""

    kind = "shards"

    def write(self, block: Block, index: int | None = None) -> Entry:
        """Writes a block as shard `index`, by default the first that is missing.

        Raises ValueError if the block is not what `Block` promises, UserError if it cannot be written.
        """
        if wrong := codec.faults(block, self.settings, coded=False):
            raise ValueError(wrong[0])
        return self._add(index, codec.encode(block, self.settings), counts_of(block))


class Dataset(Reader):
    """Shards of logits opened for reading."""

    kind = "shards"

    def read(self, i: int, verify: bool = True) -> Block:
        """The i-th listed shard. Without `verify` its hash is taken on trust, its shapes are not."""
        tensors = self._tensors(i, verify)
        self._expect(i, tensors, codec.layout(self.shards[i].rows, self.settings))
        return codec.decode(tensors, self.settings)

    def read_text(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, which positions are trained on, and documents of the i-th shard, its hash taken on trust:
        int32, bool and uint8 [rows, seq_len]."""
        tensors = self._tensors(i, verify=False)
        self._expect(i, tensors, codec.layout(self.shards[i].rows, self.settings))
        return codec.decode_text(tensors)

    def __iter__(self) -> Iterator[Block]:
        return (self.read(i) for i in range(len(self.shards)))


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a dataset."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify(folder: Path | str, repair: bool = False) -> list[Problem]:
    """Checks every hash, shape and value, of the shards and of the replies beside them; an empty list means that all
    is well.

    `repair` drops what is broken, so that collecting again with the same settings writes it anew, with the bytes it
    had. Raises UserError where there is no dataset to check.
    """
    folder = Path(folder)
    try:
        dataset = Dataset.open(folder)
    except DamagedManifest as error:
        return [Problem(MANIFEST, _without(folder / MANIFEST, error))]
    shards = _problems(dataset, _shard_faults)
    replies = [_reply_problems(path, dataset, repair) for path in sorted(folder.glob("replies-*"), key=_number)]
    problems = _flat(shards) + [problem for found in replies for problem in found]
    if problems and repair:
        # A dataset that lacks replies is not whole, even if it has every shard: collecting has work to do.
        with ShardWriter.open(folder, dataset.settings) as writer:
            writer.drop(shards)
    return problems


def _problems(reader: Dataset | Replies, faults: Callable[[Any, int], list[str]]) -> dict[int, list[Problem]]:
    """What is wrong with the files of one folder, by their indices."""
    problems: dict[int, list[Problem]] = {}
    for i, entry in enumerate(reader.shards):
        if found := faults(reader, i):
            problems[entry.index] = [Problem(entry.file, message) for message in found]
    total = 1 + max((entry.index for entry in reader.shards), default=-1)
    if reader.complete:
        for index in set(range(total)) - {entry.index for entry in reader.shards}:
            name = Manifest.file_of(reader.kind, index)
            problems[index] = [Problem(name, f"is not listed, though the {reader.kind} are marked complete")]
    return problems


def _flat(problems: dict[int, list[Problem]]) -> list[Problem]:
    return [problem for index in sorted(problems) for problem in problems[index]]


def _reply_problems(folder: Path, dataset: Dataset, repair: bool) -> list[Problem]:
    """What is wrong with a folder of replies, dropped where `repair` says so."""
    path = folder / MANIFEST
    if not path.exists() and not dataset.complete and not any(folder.glob("reply-*")):
        return []  # begun, and killed before its manifest was written
    try:
        replies = Replies.open(folder)
    except UserError as error:
        return [Problem(f"{folder.name}/{MANIFEST}", _without(path, error))]
    if difference := replies.settings.difference(dataset.settings):
        name, was, now = difference
        message = f"has {name} = {json.dumps(was)}, and the shards {json.dumps(now)}"
        return [Problem(f"{folder.name}/{MANIFEST}", message)]
    problems = _problems(replies, _reply_faults)
    if problems and repair:
        with ReplyWriter.open(folder, replies.settings) as writer:
            writer.drop(problems)
    return [Problem(f"{folder.name}/{problem.file}", problem.message) for problem in _flat(problems)]


def _number(folder: Path) -> tuple[int, str]:
    """replies-2 stands before replies-10."""
    return len(folder.name), folder.name


def _without(path: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{path}: ")


def _shard_faults(dataset: Dataset, i: int) -> list[str]:
    entry, settings = dataset.shards[i], dataset.settings
    try:
        block = dataset.read(i)
    except UserError as error:
        return [_without(dataset.folder / entry.file, error)]
    return codec.faults(block, settings, coded=True) + _miscounted(entry, counts_of(block))


def _reply_faults(replies: Replies, i: int) -> list[str]:
    entry = replies.shards[i]
    try:
        found = replies.read(i)
    except UserError as error:
        return [_without(replies.folder / entry.file, error)]
    return _miscounted(entry, reply_counts(found))


def _miscounted(entry: Entry, counts: dict[str, int]) -> list[str]:
    wrong = [(name, count) for name, count in counts.items() if getattr(entry, name) != count]
    return [f"has {count} {name}, the manifest says {getattr(entry, name)}" for name, count in wrong]


def describe(folder: Path | str, most_shards: int = 8) -> dict[str, Any]:
    """What is in a dataset, as JSON. Means are over the trained positions of `most_shards` shards.

    Raises UserError if the folder holds no dataset or a shard that was read is at fault.
    """
    dataset = Dataset.open(folder)
    settings, shards = dataset.settings, dataset.shards
    tokens = dataset.tokens
    trained = sum(entry.trained_tokens for entry in shards)
    size = sum(entry.bytes for entry in shards) + (dataset.folder / MANIFEST).stat().st_size
    picked = sorted(set(np.linspace(0, len(shards) - 1, min(most_shards, len(shards))).astype(int).tolist()))
    sums, count = np.zeros(3), 0
    for i in picked:
        block = dataset.read(i)
        p = np.exp(block.top_logprobs[block.loss_mask].astype(np.float64))
        tail = np.clip(1 - p.sum(axis=1), 0, 1)
        # The tail as one bucket: merging outcomes never raises the entropy, so this is a lower bound.
        parts = np.concatenate([p, tail[:, None]], axis=1)
        entropy = -(parts * np.log(np.where(parts > 0, parts, 1))).sum()
        sums += p[:, 0].sum(), tail.sum(), entropy
        count += len(p)
    means = (sums / count).tolist() if count else [None] * 3
    return {
        "folder": str(dataset.folder),
        "complete": dataset.complete,
        "teacher": settings.values["teacher"],
        "vocab_size": settings.vocab_size,
        "k": settings.k,
        "temperatures": list(settings.temperatures),
        "seq_len": settings.seq_len,
        "shards": len(shards),
        "rows": sum(entry.rows for entry in shards),
        "tokens": tokens,
        "trained_tokens": trained,
        "trained_share": trained / tokens if tokens else None,
        "documents": sum(entry.documents for entry in shards),
        "bytes": size,
        "bytes_per_token": size / tokens if tokens else None,
        "sampled_shards": len(picked),
        "mean_top1_probability": means[0],
        "mean_tail_mass": means[1],
        "mean_entropy_at_least_nats": means[2],
        "sources": settings.values.get("sources", []),
        "settings": settings.values,
    }


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
