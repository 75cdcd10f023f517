"""Attention over caches and packed rows, in chunks of keys that are combined in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.cuda.fused import CudaFusedStep
from kernels.cuda.launch import Constants, Outputs, float_bits, launch, on_device, sizes_of
from kernels.ops import CACHED, SMALL_ROWS, AttentionShape, Spans, check_attention

_CHUNK = 32  # keys, as in attention.cuh
_HEAD_DIMS = (32, 64, 128, 256)  # what attention is written for
_ROPE_THREADS = 128
_FOLDING_WARPS = 128  # attention's, one for each multiprocessor of a large GPU
_MANY_THREADS = 128  # of attention of many rows
_PARTS_BYTES = 64 << 20  # the most that parts of attention may take: where they would take more, they are not needed


@dataclass(frozen=True)
class Rows:
    """Rows of several sequences on the device.

    positions, sequences: int32 [rows], where each stands in its sequence, and where that one's keys begin, in the unit
    of its stride. longest: the most rows that a sequence has; chunks: of keys, that the furthest row sees, or more.
    groups: as `Spans.groups_of`, int32 [groups, 4].
    """

    positions: mx.array
    sequences: mx.array
    longest: int
    chunks: int
    groups: Callable[[int], mx.array]

    @staticmethod
    def of(spans: Spans, starts: np.ndarray | None = None) -> Rows:
        """starts: of the sequences' keys, int [sequences]; None: sequence i's at i."""
        starts = np.arange(len(spans.counts)) if starts is None else starts

        @cache
        def groups(most: int) -> mx.array:
            found = np.array(spans.groups_of(most))
            found[:, 0] = starts[found[:, 0]]
            return on_device(found)

        sequences = np.repeat(starts, spans.counts).astype(np.int32)
        positions = on_device(np.array(spans.positions))
        return Rows(positions, on_device(sequences), spans.longest, chunks_of(spans.end), groups)

    @staticmethod
    def of_step(groups: mx.array, capacity: int) -> Rows:
        """A row of each of some sequences. groups: int32 [rows, 4], as they come with a row in each; capacity: of the
        caches."""
        groups = mx.contiguous(groups + 0)  # in the GPU's own memory
        positions, sequences = mx.contiguous(groups[:, 3]), mx.contiguous(groups[:, 0])
        return Rows(positions, sequences, 1, chunks_of(capacity), lambda most: groups)


def chunks_of(keys: int) -> int:
    return -(-keys // _CHUNK)


_latest: dict[str, tuple[object, Rows]] = {}  # what all layers of a forward pass ask for


def _rows_of(spans: Spans) -> Rows:
    if "spans" not in _latest or _latest["spans"][0] is not spans:
        _latest["spans"] = spans, Rows.of(spans)
    return _latest["spans"][1]


def _packed_rows(segments: np.ndarray) -> Rows:
    """Each segment as a sequence of its own."""
    if "segments" not in _latest or _latest["segments"][0] is not segments:
        first = np.ones(segments.shape, bool)
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = np.flatnonzero(first)
        counts = np.diff(starts, append=segments.size)
        _latest["segments"] = segments, Rows.of(Spans((0,) * len(starts), tuple(counts.tolist())), starts)
    return _latest["segments"][1]


def is_supported(shape: AttentionShape) -> bool:
    return shape.head_dim in _HEAD_DIMS and shape.heads // shape.kv_heads <= _lines(shape.head_dim)


def _lines(dim: int) -> int:
    """Queries of a block of attention of many rows."""
    return 32 if dim > 128 else 64


def attention(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.attention`, and rows' bits are their own however many there are; unusual shapes are left to it.

    New keys and values go into the caches in place, which MLX does not know of: attention and fused steps wait for each
    other, and whoever else reads or replaces the caches has to wait for them (`mx.eval` of the caches that were
    returned). They have to be contiguous, or a copy would be written to.
    """
    check_attention(qkv, k_cache, v_cache, spans, shape)
    if not is_supported(shape) or not spans.rows:
        return reference.attention(qkv, k_cache, v_cache, spans, shape)
    after = nothing() if CudaFusedStep.after is None else CudaFusedStep.after
    out, k_cache, v_cache = attend_cached(qkv, k_cache, v_cache, _rows_of(spans), shape, after)
    CudaFusedStep.after = out
    return out, k_cache, v_cache


def attend_cached(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, rows: Rows, shape: AttentionShape, after: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """`attention` of rows that are known to fit, behind what `after` waits for."""
    capacity = k_cache.shape[2]
    strides = (1, capacity, shape.kv_heads * capacity)
    keys, values = beginning(k_cache), beginning(v_cache)
    (queries,) = _rope(qkv, rows, strides, shape, {"keys": keys, "values": values, "after": after}, {})
    out = _attend(queries, keys, values, rows, strides, shape)
    k_cache, v_cache = mx.depends([k_cache, v_cache], [queries])
    return out, k_cache, v_cache


def beginning(cache: mx.array) -> mx.array:
    """Of a contiguous array, a view that begins where it does, for kernels that know how far they may go.

    MLX hands the GPU its work in pieces of so many elements of inputs, and waits behind ten of them: with whole caches
    of thousands of sequences each layer was a piece, and the GPU was never given a step ahead.
    """
    return cache.reshape(-1)[:8]


@lru_cache(maxsize=1)
def nothing() -> mx.array:
    return on_device(np.zeros(1, np.float32))


def attention_packed(qkv: mx.array, segments: np.ndarray, shape: AttentionShape) -> mx.array:
    """As `reference.attention_packed`."""
    if not is_supported(shape) or not segments.size:
        return reference.attention_packed(qkv, segments, shape)
    rows, kv_heads = _packed_rows(segments), shape.kv_heads
    strides = (kv_heads, 1, kv_heads)  # [rows][kv_heads][d]: a segment starts at its first row
    new = ((segments.size, kv_heads, shape.head_dim), CACHED)
    qkv = qkv.reshape(segments.size, -1)
    queries, keys, values = _rope(qkv, rows, strides, shape, {}, {"keys": new, "values": new})
    return _attend(queries, keys, values, rows, strides, shape).reshape(*segments.shape, -1)


def _rope(
    qkv: mx.array,
    rows: Rows,
    strides: tuple[int, int, int],
    shape: AttentionShape,
    inputs: dict[str, mx.array],
    outputs: Outputs,
) -> list[mx.array]:
    """Rotated queries, and keys and values where the inputs or outputs of these names are. strides: as rope.cu has
    them."""
    m, heads, dim = len(rows.positions), shape.heads, shape.head_dim
    return launch(
        "rope",
        {
            "qkv": qkv,
            "frequency": shape.inverse_frequency,
            "positions": rows.positions,
            "sequences": rows.sequences,
            "sizes": sizes_of(*strides),
            **inputs,
        },
        {"queries": ((m, heads * dim), mx.float32), **outputs},
        (m, 1, 1),
        _ROPE_THREADS,
        {
            "HEADS": heads,
            "KV_HEADS": shape.kv_heads,
            "DIM": dim,
            "SCALE": float_bits(shape.scale),
            "THREADS": _ROPE_THREADS,
        },
    )


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    rows: Rows,
    strides: tuple[int, int, int],
    shape: AttentionShape,
) -> mx.array:
    """float32 [rows, heads * d], by the kernel that is best for so many rows of a sequence: the bits are the same."""
    m, heads, kv_heads, dim = len(rows.positions), shape.heads, shape.kv_heads, shape.head_dim
    group, longest, chunks = heads // kv_heads, rows.longest, rows.chunks
    model: Constants = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim}
    inputs = {"queries": queries, "keys": keys, "values": values}
    sizes = sizes_of(m, *strides)
    whole: Outputs = {"out": ((m, heads * dim), mx.float32)}
    chunk = 2 * _CHUNK * (2 * dim + 8)  # bytes of its keys and values, as chunk_bytes has them
    part_floats = chunks * m * heads * (dim + 2)
    if longest > SMALL_ROWS or (longest > 1 and 4 * part_floats > _PARTS_BYTES):
        lines = _lines(dim)
        groups = rows.groups(lines // group)
        return launch(
            "attend_many",
            inputs | {"groups": groups, "sizes": sizes},
            whole,
            (len(groups), kv_heads, 1),
            _MANY_THREADS,
            model | {"THREADS": _MANY_THREADS},
            shared_memory=chunk + 4 * lines * (dim + 4 + _CHUNK + 4),
        )[0]
    groups = rows.groups(SMALL_ROWS)
    # One warp goes through all of a row's keys where there are enough rows, or few keys.
    fold = longest == 1 and (m * kv_heads >= _FOLDING_WARPS or chunks <= 2 or 4 * part_floats > _PARTS_BYTES)
    (out,) = launch(
        "attend_few",
        inputs | {"groups": groups, "sizes": sizes},
        whole if fold else {"out": ((chunks, m * heads, dim + 2), mx.float32)},
        (len(groups), kv_heads, 1 if fold else chunks),
        32,
        model | {"FOLD": fold},
        shared_memory=chunk + 4 * group * (dim + _CHUNK),
    )
    if fold:
        return out
    return launch(
        "combine",
        {"parts": out, "positions": rows.positions, "sizes": sizes_of(m)},
        whole,
        (m, heads, 1),
        dim,
        {"HEADS": heads, "DIM": dim},
    )[0]
