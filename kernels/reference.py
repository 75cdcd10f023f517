"""The definition of every operation, in plain MLX: short enough to be obviously right.

Every backend is tested against this file: `bitlinear` bit for bit, the float operations within
a tolerance. The float operations work row by row wherever more rows could change how a library
reduces, so a row's bits never depend on its neighbours, and speculative decoding stays lossless
on this path too.

Shapes: `m` rows (token positions), `k` inputs, `n` outputs, `d` head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kernels.ops import (
    CACHED,
    SMALL_ROWS,
    AttentionShape,
    DenseWeight,
    Epilogue,
    Int8Weight,
    Layer,
    Spans,
    TernaryWeight,
    Weight,
)

NAME = "reference"


def prepare_ternary(ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight:
    """ternary: int8 [n, k] in {-1, 0, 1}; scale: float32 [n]."""
    n, k = ternary.shape
    return TernaryWeight(mx.array(ternary.astype(np.float32)), mx.array(scale.astype(np.float32)), n, k)


def prepare_dense(weight: mx.array) -> DenseWeight:
    """weight: bfloat16 or float32 [n, k]."""
    n, k = weight.shape
    return DenseWeight(weight, n, k)


def round_int8(weight: mx.array) -> tuple[mx.array, mx.array]:
    """Round a matrix to 8 bits by each output's largest magnitude; what every backend starts from.

    weight: float [n, k]. Returns int8 [n, k] within -127..127 and float32 [n], with
    weight ~ int8 * scale.
    """
    weight = weight.astype(mx.float32)
    scale = mx.maximum(mx.max(mx.abs(weight), axis=-1), 1e-12) / 127.0
    return mx.round(weight / scale[:, None]).astype(mx.int8), scale


def prepare_int8(weight: mx.array) -> Int8Weight:
    """weight: bfloat16 or float32 [n, k]."""
    n, k = weight.shape
    return Int8Weight(*round_int8(weight), n, k)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x: float32 [..., k]; weight: [k]. Returns float32 [..., k]."""
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(mx.float32)


def quantize_rows(x: mx.array, norm: mx.array | None = None, eps: float = 0.0) -> tuple[mx.array, mx.array]:
    """Rows to int8, each by its own largest magnitude (BitNet b1.58, arXiv:2402.17764).

    x: float32 [m, k]; norm: the weight of an RMSNorm applied first. Returns int8 [m, k] and the
    factor s = 127 / max(max|x|, 1e-5) of each row, float32 [m].
    """
    if norm is not None:
        x = rms_norm(x, norm, eps)
    s = 127.0 / mx.maximum(mx.max(mx.abs(x), axis=-1), 1e-5)
    return mx.clip(mx.round(x * s[:, None]), -128, 127).astype(mx.int8), s


def bitlinear(xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array:
    """int8 rows times a ternary matrix, the same bits on every backend.

    xq: int8 [m, k]; s: float32 [m]. Returns float32 [m, n] = (xq W^T) * (scale / s). Sums stay
    below 2^24 for k up to 132,104, so float32 holds them exactly in any order.
    """
    exact = mx.matmul(xq.astype(mx.float32), weight.data.T)
    return exact * (weight.scale[None, :] / s[:, None])


def int8_linear(xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array:
    """int8 rows times an int8 matrix, the same bits on every backend.

    xq: int8 [m, k]; s: float32 [m]. Returns float32 [m, n] = (xq W^T) * (scale / s), the sum an
    int32 rounded to float32 once. Here the weights are taken as 16 * high + low, so that both
    products stay below 2^24 for k up to 8,256, where float32 holds them exactly.
    """
    high = mx.floor(weight.data.astype(mx.float32) / 16.0)
    low = weight.data.astype(mx.float32) - 16.0 * high
    x = xq.astype(mx.float32)
    exact = mx.matmul(x, high.T).astype(mx.int32) * 16 + mx.matmul(x, low.T).astype(mx.int32)
    return exact.astype(mx.float32) * (weight.scale[None, :] / s[:, None])


def linear(
    x: mx.array,
    weight: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 0.0,
    epilogue: Epilogue | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """[RMSNorm,] matrix product [, gate or residual], the unit a transformer layer is made of.

    x: float32 [m, k]; norm: [k]; residual: float32 [m, n], added to the result. With an epilogue
    the first n/2 outputs are the gate g and the others u: relu(g)^2 * u or silu(g) * u, [m, n/2].
    Returns float32.
    """
    if isinstance(weight, TernaryWeight):
        y = bitlinear(*quantize_rows(x, norm, eps), weight)
    elif isinstance(weight, Int8Weight):
        y = int8_linear(*quantize_rows(x, norm, eps), weight)
    else:
        if norm is not None:
            x = rms_norm(x, norm, eps)
        w = weight.data.astype(mx.float32).T
        # One row at a time: a library's product may round a row differently among others.
        rows = mx.split(x, x.shape[0]) if x.shape[0] <= SMALL_ROWS else [x]
        y = mx.concatenate([mx.matmul(row, w) for row in rows])
    if epilogue is not None:
        y = gated(y, epilogue)
    return y if residual is None else y + residual


def gated(y: mx.array, epilogue: Epilogue) -> mx.array:
    """float32 [m, n], gates before ups -> activation(gate) * up, float32 [m, n / 2]."""
    gate, up = mx.split(y, 2, axis=-1)
    activated = mx.square(mx.maximum(gate, 0)) if epilogue == "relu2_mul" else gate * mx.sigmoid(gate)
    return activated * up


def rope(x: mx.array, positions: mx.array, inverse_frequency: mx.array) -> mx.array:
    """Rotary embedding, rotate-half layout (arXiv:2104.09864).

    x: float32 [..., heads, d]; positions: int32 [...]. Returns the shape of x.
    """
    angle = positions.astype(mx.float32)[..., None, None] * inverse_frequency
    cos, sin = mx.cos(angle), mx.sin(angle)
    a, b = mx.split(x, 2, axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def split_heads(qkv: mx.array, positions: mx.array, shape: AttentionShape) -> tuple[mx.array, mx.array, mx.array]:
    """qkv: float32 [..., (heads + 2 kv_heads) * d]; positions: int32 [...].

    Returns rotated q [..., heads, d], rotated k and plain v [..., kv_heads, d].
    """
    q_end = shape.heads * shape.head_dim
    k_end = q_end + shape.kv_heads * shape.head_dim
    q, k, v = (part.reshape(*part.shape[:-1], -1, shape.head_dim) for part in mx.split(qkv, [q_end, k_end], axis=-1))
    freq = shape.inverse_frequency
    return rope(q, positions, freq), rope(k, positions, freq), v


def attention(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
) -> tuple[mx.array, mx.array, mx.array]:
    """Causal attention of new rows of several sequences, each over the keys and values of its own.

    qkv: float32 [spans.rows, (heads + 2 kv_heads) * d], not yet rotated; k_cache, v_cache: bfloat16 [sequences,
    kv_heads, capacity, d], of sequence i valid below spans.offsets[i], with room for its new rows. Returns the output,
    float32 [spans.rows, heads * d], and both caches with the new rows written. Every row sees keys and values as they
    are cached, rounded, its own too; all else is float32. Up to SMALL_ROWS rows of a sequence, a row's bits follow from
    its own sequence up to its own position; more of them (a prefill) are left to the library.
    """
    q, k, v = split_heads(qkv, spans.positions, shape)
    write_rows(k_cache, k, spans)
    write_rows(v_cache, v, spans)
    group = shape.heads // shape.kv_heads
    outputs, first = [mx.zeros((0, shape.heads * shape.head_dim))], 0
    for sequence, (offset, count) in enumerate(zip(spans.offsets, spans.counts, strict=True)):
        queries, first = q[first : first + count], first + count
        seen = (sequence, slice(None), slice(offset + count))
        keys, values = (cache[seen].astype(mx.float32) for cache in (k_cache, v_cache))
        if count > SMALL_ROWS:
            out = mx.fast.scaled_dot_product_attention(
                queries.transpose(1, 0, 2)[None], keys[None], values[None], scale=shape.scale, mask="causal"
            )
            outputs.append(out[0].transpose(1, 0, 2).reshape(count, -1))
            continue
        for i in range(count):  # a library may reduce a row differently among others
            end = offset + i + 1
            query = queries[i].reshape(shape.kv_heads, group, shape.head_dim) * shape.scale
            weights = mx.softmax(query @ keys[:, :end].transpose(0, 2, 1), axis=-1)
            outputs.append((weights @ values[:, :end]).reshape(1, -1))
    return mx.concatenate(outputs), k_cache, v_cache


def write_rows(cache: mx.array, rows: mx.array, spans: Spans) -> None:
    """Write rows, float32 [spans.rows, kv_heads, d], to where they stand in [sequences, kv_heads, capacity, d], as
    bfloat16: each value is rounded to the nearest, of two as near to the even one."""
    rows = rows.astype(CACHED)
    if len(spans.offsets) == 1:  # as a slice: a scatter is slower, and on a GPU compiled when first used
        cache[0, :, spans.offsets[0] : spans.end] = rows.transpose(1, 0, 2)
    else:
        cache[spans.sequences, :, spans.positions] = rows


def argmax(x: mx.array) -> mx.array:
    """The index of each row's highest value, the lowest among equals. float32 [m, n] -> uint32 [m]."""
    return mx.argmax(x, axis=-1)


def choose(logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array:
    """A token a row: softmax(logits / temperature) inverted at a uniform number; the highest logit at temperature 0.

    logits: float32 [m, n]; temperature, uniform: float32 [m], uniform in [0, 1). Returns uint32 [m].
    """
    sums = mx.cumsum(mx.softmax(logits / mx.maximum(temperature, 1e-3)[:, None], axis=-1), axis=-1)
    total = sums[:, -1:]  # 1 but for rounding; what lies behind it has no probability
    sampled = ((sums <= uniform[:, None] * total) & (sums < total)).sum(axis=-1).astype(mx.uint32)
    return mx.where(temperature == 0, argmax(logits), sampled)


def top_k(logits: mx.array, k: int, temperatures: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    """The k highest logits of each row, by falling logit and then by id, and the log-sum-exps of all of them.

    logits: float32 [m, n]. Returns ids, uint32 [m, k]; logits, float32 [m, k]; log-sum-exps of logits / temperature,
    float32 [m, temperatures].
    """
    ids = mx.argsort(-logits, axis=-1)[:, :k]  # a stable sort
    lse = mx.stack([mx.logsumexp(logits / t, axis=-1) for t in temperatures], axis=-1)
    return ids, mx.take_along_axis(logits, ids, axis=-1), lse


def clock(x: mx.array) -> mx.array | None:
    """When x had been computed, as an operation behind it, where a device's clock is the host's; here it is not."""


def fused_step(
    *,
    layers: Sequence[Layer],
    embedding: mx.array,
    final_norm: mx.array,
    head: Weight,
    shape: AttentionShape,
    epilogue: Epilogue,
    eps: float,
) -> None:
    """A decoding step as one operation (kernels.ops.FusedStep), where a backend has that; this one has not."""


def fused_reader(
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
) -> None:
    """A reader's proposals as one operation (kernels.ops.FusedReader), where a backend has that; this one has not."""


def attention_packed(qkv: mx.array, segments: np.ndarray, shape: AttentionShape) -> mx.array:
    """Causal attention within the segments of packed rows; positions restart with each segment.

    qkv: float32 [b, t, (heads + 2 kv_heads) * d], not yet rotated; segments: int [b, t], equal
    ids side by side are one segment. Returns float32 [b, t, heads * d]. Keys and values are rounded as in a cache, so
    that a text is the same when it is scored and when it is written.
    """
    t = segments.shape[1]
    first = np.ones_like(segments, dtype=bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = np.arange(t) - np.maximum.accumulate(np.where(first, np.arange(t), 0), axis=1)
    same = (segments[:, :, None] == segments[:, None, :]) & np.tri(t, dtype=bool)
    q, k, v = (part.transpose(0, 2, 1, 3) for part in split_heads(qkv, mx.array(positions), shape))
    k, v = (part.astype(CACHED).astype(mx.float32) for part in (k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=shape.scale, mask=mx.array(same[:, None]))
    return out.transpose(0, 2, 1, 3).reshape(*segments.shape, -1)
