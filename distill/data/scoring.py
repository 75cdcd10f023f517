"""The third pass of a collection: rows are scored by the teacher into its top k logits and its log-sum-exps.

Which rows are scored together follows from the settings, so that bits do too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from decode.models.cache import Packed
from decode.models.transformer import Transformer
from distill.data.codec import Block
from distill.data.packing import Row

LOGIT_ROWS = 512
SORTED_BYTES = 32 << 20  # of logits that numpy works on at a time: its copies of them stay this small


@dataclass(frozen=True)
class Scorer:
    """A teacher, and what is kept of its logits. batch: rows scored at a time; advance: told of tokens scored."""

    model: Transformer
    top_k: int
    temperatures: tuple[float, ...]
    batch: int
    advance: Callable[[int], None] = lambda tokens: None

    def score(self, rows: list[Row]) -> Block:
        """What the teacher predicts at every position of rows."""
        parts = []
        for i in range(0, len(rows), self.batch):
            tokens, mask, segments = (np.stack(column) for column in zip(*rows[i : i + self.batch], strict=True))
            parts.append(self._score_batch(tokens, mask, segments))
            self.advance(int(np.count_nonzero(segments)))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return Block(*columns)

    def _score_batch(self, tokens: np.ndarray, mask: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, ...]:
        last = len(self.model.layers) - 1
        flat = self.model.normed(self.model.forward(tokens, Packed(segments), taps=[last]).hidden[last])
        ids, logprobs, lses = [], [], []
        for start in range(0, flat.shape[0], LOGIT_ROWS):
            top_ids, top, lse = top_of(
                self.model.logits(flat[start : start + LOGIT_ROWS]), self.top_k, self.temperatures
            )
            ids.append(top_ids)
            logprobs.append(top - lse[:, :1])
            lses.append(lse)
        shape = tokens.shape
        return (
            tokens,
            mask,
            segments,
            np.concatenate(ids).reshape(*shape, -1),
            np.concatenate(logprobs).reshape(*shape, -1),
            np.concatenate(lses).reshape(*shape, -1),
        )


def bytes_per_token(vocab_size: int, top_k: int, temperatures: int) -> int:
    """Stored bytes a position, rounded up (docs/shards.md)."""
    bits = top_k * ((vocab_size - 1).bit_length() + 12)
    return -(-bits // 8) + (2 if vocab_size <= 1 << 16 else 4) + 4 * temperatures + 2


def top_of(logits: mx.array, k: int, temperatures: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k highest logits, by falling logit and then by id, and log-sum-exps over all of them.

    logits: float32 [n, vocab]. Returns int32 [n, k], float32 [n, k], float32 [n, temperatures].
    """
    if mx.default_device() == mx.cpu:
        # numpy's partition and exp are several times faster than MLX's on a CPU.
        whole = np.asarray(logits)
        rows = max(1, SORTED_BYTES // whole[:1].nbytes)
        parts = [_numpy_top_of(whole[i : i + rows], k, temperatures) for i in range(0, len(whole), rows)]
        ids, top, lse = (np.concatenate(column) for column in zip(*parts, strict=True))
    else:
        picked = mx.argpartition(-logits, k - 1, axis=-1)[:, :k]
        lse = np.array(mx.stack([mx.logsumexp(logits / t, axis=-1) for t in temperatures], axis=-1))
        ids, top = np.array(picked).astype(np.int32), np.array(mx.take_along_axis(logits, picked, axis=-1))
    order = np.lexsort((ids, -top), axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(top, order, -1), lse


def _numpy_top_of(
    logits: np.ndarray, k: int, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`top_of` with the k in no order."""
    ids = np.argpartition(logits, logits.shape[1] - k, axis=-1)[:, -k:].astype(np.int32)
    top = np.take_along_axis(logits, ids, -1)
    highest = top.max(axis=-1, keepdims=True)
    sums = [np.exp((logits - highest) / np.float32(t)).sum(axis=-1) for t in temperatures]
    scaled = [highest[:, 0] / np.float32(t) for t in temperatures]
    lse = np.stack([peak + np.log(total) for peak, total in zip(scaled, sums, strict=True)], axis=-1)
    return ids, top, lse
