"""What the attention of every backend is tested for: rows' bits over sequences x rows, and a plain definition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
from arrays import floats, normal, same_bits

from kernels.ops import CACHED, AttentionShape, Spans

Attention = Callable[[mx.array, mx.array, mx.array, Spans, AttentionShape], tuple[mx.array, mx.array, mx.array]]

# Sequences at uneven places, each with another number of rows: keys on both sides of every block of 16 and 32.
SEVERAL = Spans((0, 1, 15, 9, 30, 62, 31, 26, 63), (8, 7, 1, 0, 6, 5, 3, 8, 2))
LONG = Spans((2042, 3, 999, 2049), (8, 4, 5, 1))
FEW = Spans((37, 0, 4, 62), (3, 1, 0, 8))


def attention_shape(heads: int = 6, kv_heads: int = 2, d: int = 32) -> AttentionShape:
    frequency = (1e4 ** (-np.arange(0, d, 2) / d)).astype(np.float32)
    return AttentionShape(heads, kv_heads, d, mx.array(frequency))


def caches(shape: AttentionShape, offsets: tuple[int, ...], capacity: int, first: int = 0) -> tuple[mx.array, mx.array]:
    """Caches of sequences `first`, `first` + 1, ...: each has random rows of its own below its offset and NaN from
    there on."""
    out = np.full((2, len(offsets), shape.kv_heads, capacity, shape.head_dim), np.nan, np.float32)
    for i, offset in enumerate(offsets):
        rows = np.random.default_rng([11, first + i]).standard_normal((2, offset, *out.shape[2::2]), np.float32)
        out[:, i, :, :offset] = rows.transpose(0, 2, 1, 3)
    return mx.array(out[0]).astype(CACHED), mx.array(out[1]).astype(CACHED)


def qkv_rows(shape: AttentionShape, rows: int, seed: int = 0) -> mx.array:
    return normal(rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, seed=seed)


def check_rows_alone(attention: Attention, shape: AttentionShape, spans: Spans) -> None:
    """Rows of several sequences in one call have the bits of each in a call of its own, over its own sequence in a
    cache of another capacity; and nothing but their keys and values is written."""
    qkv = qkv_rows(shape, spans.rows)
    out, keys, values = attention(qkv, *caches(shape, spans.offsets, spans.end + 37), spans, shape)
    assert np.isfinite(np.array(out)).all()
    row = 0
    for sequence, (offset, count) in enumerate(zip(spans.offsets, spans.counts, strict=True)):
        end = offset + count
        k, v = caches(shape, (offset,), end + 1, sequence)
        for i in range(count):
            alone, k, v = attention(qkv[row : row + 1], k, v, Spans((offset + i,), (1,)), shape)
            assert same_bits(out[row : row + 1], alone), (sequence, i)
            row += 1
        for together, single in ((keys, k), (values, v)):
            assert same_bits(together[sequence, :, :end], single[0, :, :end]), sequence
            assert np.isnan(floats(together[sequence, :, end:])).all(), "spare room was written to"


def check_definition(attention: Attention, shape: AttentionShape, spans: Spans, tolerance: float = 2e-6) -> None:
    """New keys and values are those in double precision, rounded, and outputs within a tolerance of what follows in
    double precision from the caches as they are then."""
    qkv = qkv_rows(shape, spans.rows, seed=1)
    out, *found = attention(qkv, *caches(shape, spans.offsets, spans.end + 3), spans, shape)
    mx.eval(out, found)  # before caches are read that were written to in place
    held = [floats(cache) for cache in found]
    exact = definition(np.array(qkv), *held, spans, shape, written=True)
    for cache, right in zip(held, exact[1:], strict=True):
        error = 1e-5 * np.abs(right) + tolerance  # after which a value may lie beyond the middle of two
        low, high = (floats(mx.array(right + side, mx.float32).astype(CACHED)) for side in (-error, error))
        assert (((low <= cache) & (cache <= high)) | np.isnan(right)).all()
    np.testing.assert_allclose(
        np.array(out), definition(np.array(qkv), *held, spans, shape)[0], rtol=1e-5, atol=tolerance
    )


def check_rounding(attention: Attention, shape: AttentionShape) -> None:
    """Keys and values are cached as the nearest bfloat16, of two as near as the even one; NaN and infinity stay."""
    still = replace(shape, inverse_frequency=mx.zeros(shape.head_dim // 2))  # keys that are not turned
    ties = 1 + np.arange(1, 16, 2) / 256
    edges = np.concatenate([ties, np.nextafter(np.float32(ties), np.float32(0)), np.nextafter(np.float32(ties), 2)])
    edges = np.concatenate([edges, -edges, [0.0, 3.4e38, 1e-30]]).astype(np.float32)
    qkv = np.resize(edges, (3, (shape.heads + 2 * shape.kv_heads) * shape.head_dim))
    qkv[:, -3:] = np.inf, -np.inf, np.nan  # of values, since a turn would make NaN of infinity
    _, *found = attention(mx.array(qkv), *caches(shape, (2,), 9), Spans((2,), (3,)), still)
    mx.eval(found)
    rows = qkv.reshape(3, -1, shape.head_dim)[:, shape.heads :].reshape(3, 2, shape.kv_heads, -1)
    for cache, right in zip(found, rows.transpose(1, 2, 0, 3), strict=True):
        np.testing.assert_array_equal(floats(cache[0, :, 2:5]), nearest(right))


def nearest(x: np.ndarray) -> np.ndarray:
    """float32 rounded to eight bits of mantissa, the definition of bfloat16's, by whole numbers."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype(np.float32)


def definition(
    qkv: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    spans: Spans,
    shape: AttentionShape,
    written: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`kernels.reference.attention` row by row, in double precision and without rounding; written: new keys and values
    take the place of those in the caches, which else hold them already."""
    d, group = shape.head_dim, shape.heads // shape.kv_heads
    frequency = np.array(shape.inverse_frequency, np.float64)
    keys, values = keys.astype(np.float64), values.astype(np.float64)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        angle = (np.float32(position) * frequency.astype(np.float32)).astype(np.float64)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)

    outputs = np.zeros((0, shape.heads * d))
    rows = iter(qkv.astype(np.float64).reshape(len(qkv), -1, d))
    for sequence, (offset, count) in enumerate(zip(spans.offsets, spans.counts, strict=True)):
        for position in range(offset, offset + count):
            q, k, v = np.split(next(rows), [shape.heads, shape.heads + shape.kv_heads])
            if written:
                keys[sequence, :, position], values[sequence, :, position] = rotated(k, position), v
            seen, weighed = (np.repeat(a[sequence, :, : position + 1], group, axis=0) for a in (keys, values))
            scores = np.einsum("hd,hjd->hj", rotated(q, position), seen) / np.sqrt(d)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            outputs = np.concatenate([outputs, np.einsum("hj,hjd->hd", weights, weighed).reshape(1, -1)])
    return outputs, keys, values
