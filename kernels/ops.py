"""What all backends and their users share: weights, the rows of a call, and the protocols of a backend.

Shapes: `m` rows (token positions), `k` inputs, `n` outputs, `d` head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol, Self, runtime_checkable

import mlx.core as mx
import numpy as np

Epilogue = Literal["relu2_mul", "silu_mul"]

SMALL_ROWS = 8  # rows of a sequence up to which every operation gives each row the bits that it has alone
CACHED = mx.bfloat16  # what keys and values are rounded to before any row sees them (docs/kernels.md)


@dataclass(frozen=True)
class TernaryWeight:
    """A ternary matrix in a backend's own layout, made once at load.

    data: the layout; the reference's is float32 [n, k] holding -1, 0 and 1.
    scale: float32 [n], what an output is multiplied by (already inverted for `bitlinear`).
    """

    data: mx.array
    scale: mx.array
    n: int
    k: int


@dataclass(frozen=True)
class DenseWeight:
    """A float matrix [n, k] in bfloat16 or float32 (a draft's layers, an LM head)."""

    data: mx.array
    n: int
    k: int


@dataclass(frozen=True)
class Int8Weight:
    """A float matrix rounded to 8 bits, one scale an output, for int8 rows (an LM head, a draft).

    data: the layout; the reference's is int8 [n, k] within -127..127.
    scale: float32 [n], what an output is multiplied by.
    """

    data: mx.array
    scale: mx.array
    n: int
    k: int


Weight = TernaryWeight | DenseWeight | Int8Weight
OUTPUTS_A_BLOCK = 16  # of any backend's layout: blocks of so many outputs stand one after the other


def stacked(above: Weight, below: Weight) -> Weight:
    """Two matrices' outputs one after the other, as one matrix of the same backend, of which nothing is made anew.

    Raises ValueError unless both are of one kind, with as many inputs, and the first ends where a block ends.
    """
    if type(above) is not type(below) or above.k != below.k or above.n % OUTPUTS_A_BLOCK:
        raise ValueError(f"{above.n} and {below.n} outputs of {above.k} and {below.k} inputs cannot be stacked")
    data, n = mx.concatenate([above.data, below.data]), above.n + below.n
    mx.eval(data)
    if isinstance(above, DenseWeight) or isinstance(below, DenseWeight):
        return DenseWeight(data, n, above.k)
    scale = mx.concatenate([above.scale, below.scale])
    mx.eval(scale)
    return replace(above, data=data, scale=scale, n=n)


@dataclass(frozen=True)
class Layer:
    """Fused weights of one transformer layer; the sub-norms are None in a Llama."""

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: mx.array
    attention_sub_norm: mx.array | None
    post_norm: mx.array
    ffn_sub_norm: mx.array | None

    def run(
        self,
        x: mx.array,
        linear: Callable[..., mx.array],
        attend: Callable[[mx.array], mx.array],
        epilogue: Epilogue,
        eps: float,
    ) -> mx.array:
        """Rows through the layer, float32 [m, hidden]. linear: of a backend; attend: what the layer's attention makes
        of queries, keys and values, float32 [m, (heads + 2 kv_heads) * d] -> [m, heads * d]."""
        a = attend(linear(x, self.qkv, norm=self.input_norm, eps=eps))
        x = linear(a, self.o, norm=self.attention_sub_norm, eps=eps, residual=x)
        h = linear(x, self.gate_up, norm=self.post_norm, eps=eps, epilogue=epilogue)
        return linear(h, self.down, norm=self.ffn_sub_norm, eps=eps, residual=x)


@dataclass(frozen=True)
class AttentionShape:
    """What attention needs beside its arrays.

    inverse_frequency: float32 [d / 2], RoPE's angles a position (rotate-half layout).
    """

    heads: int
    kv_heads: int
    head_dim: int
    inverse_frequency: mx.array

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True)
class Spans:
    """The new rows of several sequences, one sequence after the other: of sequence i `counts[i]` rows (perhaps none),
    the first of which stands at position `offsets[i]`."""

    offsets: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.counts) or min((*self.offsets, *self.counts), default=0) < 0:
            raise ValueError(f"offsets {self.offsets} and counts {self.counts} are no spans")

    @cached_property
    def rows(self) -> int:
        """How many there are in all."""
        return sum(self.counts)

    @cached_property
    def longest(self) -> int:
        """The most rows that a sequence has."""
        return max(self.counts, default=0)

    @cached_property
    def end(self) -> int:
        """Positions that the furthest new row sees: what the caches must have room for."""
        return max(
            (offset + count for offset, count in zip(self.offsets, self.counts, strict=True) if count), default=0
        )

    @cached_property
    def positions(self) -> mx.array:
        """Of each row in its sequence, int32 [rows], evaluated."""
        offsets, counts, first = self._columns
        return _evaluated(np.repeat(offsets - first, counts) + np.arange(self.rows))

    @cached_property
    def sequences(self) -> mx.array:
        """Which one each row belongs to, int32 [rows], evaluated."""
        return _evaluated(np.repeat(np.arange(len(self.counts)), self.counts))

    @cached_property
    def groups(self) -> mx.array:
        """`groups_of` SMALL_ROWS."""
        return self.groups_of(SMALL_ROWS)

    def groups_of(self, most: int) -> mx.array:
        """Rows of one sequence, at most so many, that a kernel takes together, so that keys are read once for them: its
        sequence, its first row, how many rows, and the first one's position. int32 [groups, 4], evaluated."""
        offsets, counts, first = self._columns
        groups = -(-counts // most)  # of each sequence
        sequence = np.repeat(np.arange(len(counts)), groups)
        at = most * (np.arange(len(sequence)) - np.repeat(np.cumsum(groups) - groups, groups))
        rows = np.minimum(most, counts[sequence] - at)
        return _evaluated(np.stack([sequence, first[sequence] + at, rows, offsets[sequence] + at], axis=-1))

    @cached_property
    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each sequence: its offset, its count and its first row."""
        offsets, counts = np.array(self.offsets, np.int64), np.array(self.counts, np.int64)
        return offsets, counts, np.cumsum(counts) - counts


def _evaluated(values: np.ndarray) -> mx.array:
    array = mx.array(values.astype(np.int32))
    mx.eval(array)
    return array


def check_product(
    x: mx.array, weight: Weight, epilogue: Epilogue | None = None, residual: mx.array | None = None
) -> None:
    """Raise ValueError for shapes with which a kernel would read outside of its buffers."""
    if x.shape[1] != weight.k:
        raise ValueError(f"rows of {x.shape[1]} inputs do not fit the weight's k of {weight.k}")
    if epilogue is not None and weight.n % 2:
        raise ValueError(f"a gate needs an even number of outputs, not {weight.n}")
    expected = (x.shape[0], weight.n // (2 if epilogue else 1))
    if residual is not None and residual.shape != expected:
        raise ValueError(f"the residual is {residual.shape}, the result {expected}")


def check_attention(qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape) -> None:
    """Raise ValueError for types and shapes with which a kernel would read or write outside of its buffers."""
    if (k_cache.dtype, v_cache.dtype) != (CACHED, CACHED):
        raise ValueError(f"caches of {k_cache.dtype} and {v_cache.dtype}, not of {CACHED}")
    sequences, kv_heads, capacity, dim = k_cache.shape
    if k_cache.shape != v_cache.shape or (kv_heads, dim) != (shape.kv_heads, shape.head_dim):
        raise ValueError(f"caches of {k_cache.shape} and {v_cache.shape} do not fit the model's heads")
    if sequences != len(spans.counts) or spans.end > capacity:
        raise ValueError(f"caches of {k_cache.shape} have no room for rows at {spans.offsets}, {spans.counts} of them")
    width = (shape.heads + 2 * kv_heads) * dim
    if qkv.shape != (spans.rows, width):
        raise ValueError(f"queries, keys and values of {qkv.shape} are not [{spans.rows}, {width}]")


class FusedStep(Protocol):
    """A model's decoding step of 1..SMALL_ROWS tokens of one sequence as one operation."""

    # Whether its logits have the bits of the backend's single operations, not only of its own rows alone: without that
    # a drafter that reads states, which only those give, would be verified by another teacher than plain decoding's.
    EXACT: bool
    TAPS: bool  # whether it hands out states

    def __call__(
        self,
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        taps: Sequence[int] = (),
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """Logits of m new tokens, float32 [m, vocab], and what leaves the tapped layers, float32 [m, hidden] each; not
        evaluated. The lists' caches are replaced or written to.

        tokens: m ids, or an array of them; keys, values: a layer's bfloat16 [1, kv_heads, capacity, d] each, of which
        nobody else holds a part, with offset + m <= capacity; taps: layers, ascending, none without TAPS.
        """
        ...

    def greedy_tokens(
        self,
        tokens: Sequence[int],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """The `count` tokens that follow `tokens` greedily, uint32, not evaluated.

        tokens: 1..SMALL_ROWS ids; caches as in a call, with room for all tokens and all choices but the last; d2t:
        uint32, evaluated, the ids that a trimmed head's rows stand for.
        """
        ...

    def share_weights(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers that it was made of, such that memory holds their weights once."""
        ...


class FusedReader(Protocol):
    """The greedy proposals of a draft that reads its teacher's states (decode.models.reader) as one operation."""

    def greedy_tokens(
        self,
        tokens: Sequence[int],
        states: Sequence[mx.array],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """The `count` tokens that follow greedily behind m new rows, uint32, not evaluated.

        tokens: 1..SMALL_ROWS ids, each the one behind its row's position; states: the teacher's of these positions,
        float32 [m, teacher_hidden] a tap; all else as in `FusedStep.greedy_tokens`, the caches the draft's own.
        """
        ...

    def with_head(self, head: Weight) -> Self:
        """The same one with another head of as many inputs; all else is shared."""
        ...


@runtime_checkable
class ChoosesTokens(Protocol):
    """A fused step that also takes several sequences, and chooses."""

    def choose_tokens(
        self,
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        sequences: Sequence[int],
        offsets: Sequence[int],
        temperature: np.ndarray,
        uniform: np.ndarray,
    ) -> mx.array:
        """A step of several sequences, one token each, and the choice (`reference.choose`) behind each, uint32 [m].

        tokens: m ids, or an array of them; keys, values: a layer's bfloat16 [sequences, kv_heads, capacity, d] each, as
        in a call; sequences, offsets: each token's place there; temperature, uniform: float32 [m].
        """
        ...


class Backend(Protocol):
    """The operations a backend offers; `kernels.reference` defines each."""

    NAME: str

    def prepare_ternary(self, ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight: ...

    def prepare_dense(self, weight: mx.array) -> DenseWeight: ...

    def prepare_int8(self, weight: mx.array) -> Int8Weight: ...

    def quantize_rows(
        self, x: mx.array, norm: mx.array | None = None, eps: float = 0.0
    ) -> tuple[mx.array, mx.array]: ...

    def bitlinear(self, xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array: ...

    def int8_linear(self, xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array: ...

    def linear(
        self,
        x: mx.array,
        weight: Weight,
        *,
        norm: mx.array | None = None,
        eps: float = 0.0,
        epilogue: Epilogue | None = None,
        residual: mx.array | None = None,
    ) -> mx.array: ...

    def attention(
        self, qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
    ) -> tuple[mx.array, mx.array, mx.array]: ...

    def attention_packed(self, qkv: mx.array, segments: np.ndarray, shape: AttentionShape) -> mx.array: ...

    def argmax(self, x: mx.array) -> mx.array: ...

    def choose(self, logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array: ...

    def top_k(self, logits: mx.array, k: int, temperatures: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]: ...

    def clock(self, x: mx.array) -> mx.array | None: ...

    def fused_step(
        self,
        *,
        layers: Sequence[Layer],
        embedding: mx.array,
        final_norm: mx.array,
        head: Weight,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> FusedStep | None: ...

    def fused_reader(
        self,
        *,
        fusion: Weight,
        feature_norms: Sequence[mx.array],
        input: Weight,
        embedding_norm: mx.array,
        state_norm: mx.array,
        layers: Sequence[Layer],
        final_norm: mx.array,
        output: Weight | None,
        head: Weight,
        embedding: mx.array,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> FusedReader | None:
        """feature_norms: float32 [teacher_hidden] a tap; embedding: the teacher's, bfloat16 or float32 [vocab,
        teacher_hidden]; output: from the reader's width to its teacher's, where these differ."""
        ...


@runtime_checkable
class Tunable(Protocol):
    """What a backend with parameters to tune has besides: each one's choices, and a way to set them."""

    TUNABLE: dict[str, tuple[int, ...]]

    def set_tuning(self, values: dict[str, int]) -> None: ...
