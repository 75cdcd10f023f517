"""Which rows a training run sees, in which order, and how they reach the model.

The order is a function of (dataset, seed, batch number) alone, so a resumed run goes on exactly
where it was. Decoding happens on background threads, ahead of the training step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from distill.data.codec import Block, SampledBlock
from distill.data.joined import Datasets
from distill.data.shards import Dataset
from kernels.errors import UserError

Row = tuple[int, int]  # (shard, row in it)
WINDOW_BYTES = 128 << 20  # decoded shards that are shuffled together; two windows are held at once
IN_MEMORY_BYTES = 512 << 20  # a decoded dataset up to this size stays for the next pass
HELD_OUT_SHARDS = 16  # held-out rows are read before the first step: from few shards
PARTS = 8  # trained positions are padded to eighths of a batch: few shapes, little waste


@dataclass(frozen=True)
class Batch:
    """What one step needs. Only trained positions carry targets: m of them, padded with weight 0.

    tokens, segments: int32 [b, t]; positions: int32 [m] into b * t, None where m = b * t; weights: float32 [m];
    top_ids: int32 [m, k]; of logits: top_logprobs, float32 [m, k]; lse_one, lse, float32 [m]; of draws: counts,
    int32 [m, k], where top_ids is -1 behind the last.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray | None
    weights: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray | None = None
    lse_one: np.ndarray | None = None
    lse: np.ndarray | None = None
    counts: np.ndarray | None = None

    def arrays(self) -> dict[str, mx.array]:
        """As MLX arrays, one copy each."""
        return {name: mx.array(value) for name, value in vars(self).items() if value is not None}

    def part(self, first: int, last: int) -> Batch:
        """The rows from `first` on and before `last`, as a batch."""
        t = self.tokens.shape[1]
        n = (last - first) * t
        if self.positions is None:
            slots, positions = np.arange(first * t, last * t), None
            weights = self.weights[slots]
        else:
            here = (self.positions >= first * t) & (self.positions < last * t) & (self.weights > 0)
            slots = np.flatnonzero(here)
            count, m = len(slots), _padded(len(slots), n)
            slots = np.resize(slots if count else np.zeros(1, np.int64), m)  # padding repeats them
            weights = (np.arange(m) < count).astype(np.float32)
            positions = np.where(weights > 0, self.positions[slots] - first * t, 0).astype(np.int32)
        targets = ("top_ids", "top_logprobs", "lse_one", "lse", "counts")
        of_slots = {name: getattr(self, name)[slots] for name in targets if getattr(self, name) is not None}
        return Batch(self.tokens[first:last], self.segments[first:last], positions, weights, **of_slots)


def assemble(rows: Sequence[tuple[Block | SampledBlock, int]], temperature_index: int) -> Batch:
    """A batch of the given rows of decoded blocks, all of one kind."""
    tokens = np.stack([block.tokens[i] for block, i in rows])
    segments = np.stack([block.segments[i] for block, i in rows]).astype(np.int32)
    t = tokens.shape[1]
    trained = [np.flatnonzero(block.loss_mask[i] & (block.segments[i] > 0)) for block, i in rows]
    count, n = sum(map(len, trained)), tokens.size
    m = _padded(count, n)
    positions, weights = np.zeros(m, np.int32), np.zeros(m, np.float32)
    positions[:count] = np.concatenate([where + index * t for index, where in enumerate(trained)])
    weights[:count] = 1.0
    targets: dict[str, np.ndarray] = {}
    at = 0
    for (block, i), where in zip(rows, trained, strict=True):
        if isinstance(block, SampledBlock):
            here = _draws(block, i, where)
        else:
            here = _logits(block, i, where, temperature_index)
        for name, (values, padding) in here.items():
            if name not in targets:
                targets[name] = np.empty((m, *values.shape[1:]), values.dtype)
                targets[name][count:] = padding
            targets[name][at : at + len(where)] = values
        at += len(where)
    return Batch(tokens, segments, None if count == n else positions, weights, **targets)


def _padded(count: int, n: int) -> int:
    """How many targets `count` trained positions of n are padded to."""
    unit = -(-n // PARTS)
    return min(n, max(1, -(-count // unit)) * unit)


def _logits(block: Block, i: int, where: np.ndarray, temperature_index: int) -> dict[str, tuple[np.ndarray, Any]]:
    """The targets of positions of row i, and what stands at padding: a teacher sure of ids 0..k-1 in equal parts,
    finite everywhere."""
    k = block.top_ids.shape[-1]
    return {
        "top_ids": (block.top_ids[i][where], np.arange(k)),
        "top_logprobs": (block.top_logprobs[i][where], -np.log(k)),
        "lse_one": (block.lse[i][where, 0], 0.0),
        "lse": (block.lse[i][where, temperature_index], 0.0),
    }


def _draws(block: SampledBlock, i: int, where: np.ndarray) -> dict[str, tuple[np.ndarray, Any]]:
    """The same of draws; padding has none."""
    return {"top_ids": (block.ids[i][where], -1), "counts": (block.counts[i][where].astype(np.int32), 0)}


class DataLoader:
    """A dataset split into held-out and training rows, and its batches in order."""

    def __init__(
        self, dataset: Dataset | Datasets, temperature: float, batch: int, seed: int, eval_share: float, eval_rows: int
    ) -> None:
        self.dataset, self.seed = dataset, seed
        temperatures = dataset.settings.temperatures
        if temperature not in temperatures:
            have = ", ".join(f"{t:g}" for t in temperatures)
            raise UserError(f"{dataset.folder}: temperature {temperature:g} was not collected, only {have}")
        self.temperature_index = temperatures.index(temperature)
        rows = [shard.rows for shard in dataset.shards]
        if sum(rows) < 2:
            raise UserError(f"{dataset.folder}: holds {sum(rows)} rows; training needs at least 2")
        if not any(shard.trained_tokens for shard in dataset.shards):
            raise UserError(f"{dataset.folder}: no position is marked for training")
        self.held_out = held_out_rows(rows, eval_share, eval_rows)
        apart = set(self.held_out)
        self.train = [[i for i in range(n) if (s, i) not in apart] for s, n in enumerate(rows)]
        self.rows = sum(map(len, self.train))
        self.batch = min(batch, self.rows)
        draws = dataset.settings.sampled
        kept = 8 * dataset.settings.k + 4 * len(temperatures) if draws is None else 5 * (draws + 1)
        per_row = dataset.settings.seq_len * (9 + kept)
        self.in_memory = sum(rows) * per_row <= IN_MEMORY_BYTES
        self.window = max(1, WINDOW_BYTES // (max(rows) * per_row))

    def held_out_batches(self) -> list[Batch]:
        """The held-out rows; the last batch may be smaller."""
        blocks = {shard: self.dataset.read(shard) for shard in sorted({shard for shard, _ in self.held_out})}
        rows = [(blocks[shard], i) for shard, i in self.held_out]
        batches = [assemble(rows[i : i + self.batch], self.temperature_index) for i in range(0, len(rows), self.batch)]
        if not any(batch.weights.any() for batch in batches):
            raise UserError(f"{self.dataset.folder}: no position of the held-out rows is marked for training")
        return batches

    def windows(self, epoch: int) -> list[list[Row]]:
        """One pass over the training rows: shards in random order, rows mixed among neighbours."""
        rng = np.random.default_rng([self.seed, epoch])
        order = [int(s) for s in rng.permutation(len(self.train))]
        result = []
        for start in range(0, len(order), self.window):
            rows = [(s, i) for s in order[start : start + self.window] for i in self.train[s]]
            if rows:
                result.append([rows[j] for j in rng.permutation(len(rows))])
        return result

    def batches(self, first: int) -> Generator[Batch]:
        """Batches number `first` onwards, without end, made on background threads."""
        ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=4)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for batch in self._assembled(first):
                    if not put(batch):
                        return
            except BaseException as error:  # handed to the training thread, which raises it
                put(error)

        thread = threading.Thread(target=work, name="batches", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _assembled(self, first: int) -> Iterator[Batch]:
        skip = first * self.batch
        epoch, skip = divmod(skip, self.rows)
        blocks: dict[int, Future[Block | SampledBlock]] = {}
        held: list[tuple[Block | SampledBlock, int]] = []
        reader = ThreadPoolExecutor(max_workers=1)
        try:
            upcoming = self._windows_from(epoch)
            window = next(upcoming)
            while True:
                following = next(upcoming)
                if skip >= len(window):
                    skip -= len(window)
                    window = following
                    continue
                for shard, _ in [*window[skip:], *following]:  # the next window decodes meanwhile
                    if shard not in blocks:
                        blocks[shard] = reader.submit(self.dataset.read, shard, verify=True)
                for shard, i in window[skip:]:
                    held.append((blocks[shard].result(), i))
                    if len(held) == self.batch:
                        yield assemble(held, self.temperature_index)
                        held = []
                skip = 0
                if not self.in_memory:
                    wanted = {shard for shard, _ in following}
                    blocks = {shard: block for shard, block in blocks.items() if shard in wanted}
                window = following
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _windows_from(self, epoch: int) -> Iterator[list[Row]]:
        while True:
            yield from self.windows(epoch)
            epoch += 1

    def row_counts(self) -> dict[str, Any]:
        """For logs: rows trained on and held out."""
        return {"train_rows": self.rows, "held_out_rows": len(self.held_out), "batch": self.batch}


def held_out_rows(rows: list[int], share: float, limit: int) -> list[Row]:
    """The last rows of evenly spread shards: neighbouring rows may share a document, so one border
    a shard leaks least. At least 8 rows, but at most `limit` and an eighth of all, and never none.

    rows: how many each shard has.
    """
    total = sum(rows)
    count = max(1, min(max(round(share * total), 8), limit, total // 8))
    filled = [s for s, n in enumerate(rows) if n]
    shards = [
        filled[i] for i in np.unique(np.linspace(0, len(filled) - 1, min(HELD_OUT_SHARDS, len(filled))).astype(int))
    ]
    taken = dict.fromkeys(shards, 0)
    while count and (open_shards := [s for s in shards if taken[s] < rows[s]]):
        for s in open_shards[:count]:
            taken[s] += 1
        count -= len(open_shards[:count])
    return [(s, i) for s in shards for i in range(rows[s] - taken[s], rows[s])]
