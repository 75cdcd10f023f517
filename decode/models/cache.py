"""What attention reads beside a forward pass's own rows: the keys and values of sequences, or rows packed together."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kernels.ops import CACHED, AttentionShape, Backend, Spans

CACHE_STEP = 256  # rows by which a cache grows


class KVCache:
    """Keys and values of one or several sequences, a layer's bfloat16 [sequences, kv_heads, capacity, head_dim] each.

    Rows of sequence i at and beyond `offsets[i]` are junk that is overwritten before it is read, so rewinding is
    an assignment.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, sequences: int = 1) -> None:
        self.keys = [mx.zeros((sequences, kv_heads, 0, head_dim), CACHED) for _ in range(layers)]
        self.values = [mx.zeros((sequences, kv_heads, 0, head_dim), CACHED) for _ in range(layers)]
        self.offsets = [0] * sequences
        self._spans = Spans((), ())

    @property
    def offset(self) -> int:
        """Where the next row of a cache's only sequence goes."""
        (offset,) = self.offsets
        return offset

    @offset.setter
    def offset(self, value: int) -> None:
        (_,) = self.offsets
        self.offsets = [value]

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more rows in every sequence."""
        self.reserve_upto(max(self.offsets) + rows)

    def reserve_upto(self, end: int) -> None:
        """Make room for rows at the positions below `end`. Growing waits for steps that are queued."""
        sequences, heads, capacity, dim = self.keys[0].shape
        missing = end - capacity
        if missing > 0:
            if capacity:  # kernels on GPUs write to caches in place, which MLX does not know of
                mx.eval(self.keys, self.values)
                mx.synchronize()
            room = mx.zeros((sequences, heads, -(-missing // CACHE_STEP) * CACHE_STEP, dim), CACHED)
            self.keys = [mx.concatenate([keys, room], axis=2) for keys in self.keys]
            self.values = [mx.concatenate([values, room], axis=2) for values in self.values]

    def attend(self, layer: int, qkv: mx.array, ops: Backend, shape: AttentionShape) -> mx.array:
        """Attention of a layer's new rows, equally many of each sequence, which it keeps.

        qkv: float32 [sequences * rows, (heads + 2 kv_heads) * head_dim], a sequence's rows side by side, for which
        there is room. Returns float32 [sequences * rows, heads * head_dim]; the cache does not move on.
        """
        offsets, count = tuple(self.offsets), len(qkv) // len(self.offsets)
        if (self._spans.offsets, self._spans.rows) != (offsets, len(qkv)):  # else those of the layer before
            self._spans = Spans(offsets, (count,) * len(offsets))
        return self.attend_spans(layer, qkv, ops, shape, self._spans)

    def attend_spans(self, layer: int, qkv: mx.array, ops: Backend, shape: AttentionShape, spans: Spans) -> mx.array:
        """As `attend`, of new rows as spans say."""
        out, self.keys[layer], self.values[layer] = ops.attention(
            qkv, self.keys[layer], self.values[layer], spans, shape
        )
        return out

    def advance(self, rows: int) -> None:
        """Count `rows` new rows of every sequence as seen."""
        self.offsets = [offset + rows for offset in self.offsets]


class NewRows:
    """New rows of the sequences of a cache, of each as many as `counts` says, perhaps none."""

    def __init__(self, cache: KVCache, counts: Sequence[int]) -> None:
        self.cache, self.spans = cache, Spans(tuple(cache.offsets), tuple(counts))

    def attend(self, layer: int, qkv: mx.array, ops: Backend, shape: AttentionShape) -> mx.array:
        """As KVCache.attend; qkv's rows are one sequence's after the other's."""
        return self.cache.attend_spans(layer, qkv, ops, shape, self.spans)

    def reserve(self, rows: int) -> None:
        """Make room for them."""
        self.cache.reserve_upto(self.spans.end)

    def advance(self, rows: int) -> None:
        """Count them as seen."""
        self.cache.offsets = [at + count for at, count in zip(self.cache.offsets, self.spans.counts, strict=True)]


class Packed:
    """Rows of [b, t] tokens that see those before them of their own segment, and no cache."""

    def __init__(self, segments: np.ndarray) -> None:
        """segments: int [b, t], the id of each token's segment; equal ids side by side are one."""
        self.segments = segments

    def attend(self, layer: int, qkv: mx.array, ops: Backend, shape: AttentionShape) -> mx.array:
        """qkv: float32 [b * t, (heads + 2 kv_heads) * head_dim]. Returns float32 [b * t, heads * head_dim]."""
        packed = qkv.reshape(*self.segments.shape, qkv.shape[1])
        return ops.attention_packed(packed, self.segments, shape).reshape(len(qkv), -1)

    def reserve(self, rows: int) -> None:
        """Nothing: there is no cache to grow."""

    def advance(self, rows: int) -> None:
        """Nothing: packed rows are all there is."""
