"""The CUDA backend: the operations of `kernels.reference` as kernels of our own, through MLX's CUDA build.

Products use the int8 tensor cores; those of 1..8 rows read the weights once for all rows; BitLinear equals the
reference bit for bit. A row's bits are its own however many there are, in float products too. Attention works in chunks
of keys that are combined in order, for any number of rows and sequences, so that no library plans anew for every length
of context. `fused` runs a decoding step of a whole model as one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.cuda.fused import CudaFusedStep
from kernels.cuda.launch import Constants, Outputs, float_bits, launch
from kernels.cuda.nvrtc import device_attribute
from kernels.errors import UserError
from kernels.ops import (
    CACHED,
    SMALL_ROWS,
    AttentionShape,
    DenseWeight,
    Epilogue,
    Int8Weight,
    Spans,
    TernaryWeight,
    Weight,
    check_attention,
    check_product,
)

NAME = "cuda"
TUNABLE = {"tiles": (1, 2, 4), "threads": (64, 128, 256, 512)}
_tuning = {"tiles": 1, "threads": 128}

_GATES: dict[str | None, int] = {None: 0, "relu2_mul": 1, "silu_mul": 2}
_ROW_THREADS = 256  # of blocks that take a few rows
_TILE, _SPAN = 16, 128  # outputs and inputs, as in products.cuh
_CHUNK = 32  # keys, as in attention.cuh
_HEAD_DIMS = (32, 64, 128, 256)  # what attention is written for
_ROPE_THREADS = 128
_CHOICE_THREADS = 512
_FOLDING_WARPS = 128  # attention's, one for each multiprocessor of a large GPU
_MANY_THREADS = 128  # of attention of many rows
_PARTS_BYTES = 64 << 20  # the most that parts of attention may take: where they would take more, they are not needed
_MOST_TOP = 128  # logits that `top_k` has room for
_ROUNDED_AT_ONCE = 8192  # rows of a weight, whole tiles: float32 copies of a whole head would take gigabytes
_PIECE_BYTES = (512, 2048)  # of ternary and int8 weights, as in products.cuh
_SLOTS = 4  # pieces of weights on their way to each warp of a small product
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_BLOCKS = 256  # large ones, two for each multiprocessor of an H100; with fewer, smaller ones are better


def set_tuning(values: dict[str, int]) -> None:
    """Block shapes of the small product: tiles of 16 outputs a block, threads a block."""
    _tuning.update(values)


def _spans(k: int) -> int:
    return -(-k // _SPAN)


def _on_device(array: np.ndarray) -> mx.array:
    """A copy in the GPU's own memory: what comes from NumPy stays in memory that both sides share.

    Not evaluated: that would wait for all that is queued.
    """
    return mx.contiguous(mx.array(array) + 0)


def _fragments(weight: mx.array, fill: int) -> mx.array:
    """int8 [n, k], filled up to whole tiles and spans, with the axes that products.cuh names:
    [tile, half of its outputs, g, span, q, step, half of its inputs, four inputs]."""
    n, k = weight.shape
    tiles, spans = -(-n // _TILE), _spans(k)
    room = [(0, _TILE * tiles - n), (0, _SPAN * spans - k)]
    padded = mx.pad(weight, room, constant_values=mx.array(fill, mx.int8))
    return padded.reshape(tiles, 2, 8, spans, 4, 4, 2, 4)


def prepare_ternary(ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight:
    """ternary: int8 [n, k] in {-1, 0, 1}; scale: float32 [n]. Laid out as products.cuh says."""
    n, k = ternary.shape
    if k % 4:
        raise UserError(f"the CUDA kernels need a number of inputs that is a multiple of 4, not {k}")
    codes = _fragments(mx.array(ternary) + 1, 1).astype(mx.uint8)
    # The step first: bits 2s..2s+1 of the bytes of a word, which is one of the operands a0..a3.
    c = codes.transpose(5, 0, 3, 2, 4, 6, 1, 7)
    data = mx.contiguous(c[0] | c[1] << 2 | c[2] << 4 | c[3] << 6).view(mx.uint32).reshape(-1)
    scales = _on_device(scale.astype(np.float32))
    mx.eval(data, scales)
    return TernaryWeight(data, scales, n, k)


def prepare_int8(weight: mx.array) -> Int8Weight:
    """weight: bfloat16 or float32 [n, k]. Laid out as products.cuh says."""
    n, k = weight.shape
    if k % 4:
        raise UserError(f"the CUDA kernels need a number of inputs that is a multiple of 4, not {k}")
    pieces, scales = [], []
    for start in range(0, n, _ROUNDED_AT_ONCE):
        rounded, scale = reference.round_int8(weight[start : start + _ROUNDED_AT_ONCE])
        fragments = _fragments(rounded, 0).transpose(0, 3, 5, 2, 4, 6, 1, 7)
        pieces.append(mx.contiguous(fragments).view(mx.uint32).reshape(-1))
        scales.append(scale)
        mx.eval(pieces[-1], scale)
    data, scale = mx.concatenate(pieces), mx.concatenate(scales)
    mx.eval(data, scale)
    return Int8Weight(data, scale, n, k)


def prepare_dense(weight: mx.array) -> DenseWeight:
    """weight: bfloat16 or float32 [n, k]."""
    n, k = weight.shape
    data = mx.contiguous(weight)
    mx.eval(data)
    return DenseWeight(data, n, k)


def quantize_rows(x: mx.array, norm: mx.array | None = None, eps: float = 0.0) -> tuple[mx.array, mx.array]:
    """As `reference.quantize_rows`; without a norm, the same bits."""
    xq, s = _quantize_padded(x.astype(mx.float32), norm, eps)
    return xq[:, : x.shape[1]], s[0]


def _quantize_padded(x: mx.array, norm: mx.array | None, eps: float) -> tuple[mx.array, mx.array]:
    """int8 rows filled up with zeros to whole spans; and their factors and the sums of their int8, float32 [2, m]."""
    m, k = x.shape
    padded = _SPAN * _spans(k)
    xq, s = launch(
        "quantize_rows",
        {"x": x, "norm": x if norm is None else norm.astype(mx.float32), "sizes": _sizes(k, padded, m)},
        {"xq": ((m, padded), mx.int8), "s": ((2, m), mx.float32)},
        (m, 1, 1),
        _threads_of_row(k),
        {"NORM": norm is not None, "EPS": float_bits(eps), "THREADS": _threads_of_row(k)},
    )
    return xq, s


def _threads_of_row(k: int) -> int:
    """Of a block that has a row of k: most of them with two or three pieces of four to do, for more blocks at once."""
    return 64 if k <= 768 else 128 if k <= 1536 else 256


def _given(xq: mx.array, s: mx.array) -> tuple[mx.array, mx.array]:
    """A caller's rows and factors as `_quantize_padded` has them."""
    k = xq.shape[1]
    padded = mx.pad(xq, [(0, 0), (0, _SPAN * _spans(k) - k)]) if k % _SPAN else xq
    return padded, mx.stack([s, xq.astype(mx.int32).sum(axis=-1).astype(mx.float32)])


def bitlinear(xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array:
    """As `reference.bitlinear`, the same bits."""
    check_product(xq, weight)
    return _product(*_given(xq, s), weight, None, None)


def int8_linear(xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array:
    """As `reference.int8_linear`, the same bits."""
    check_product(xq, weight)
    return _product(*_given(xq, s), weight, None, None)


def _product(
    xq: mx.array,
    s: mx.array,
    weight: TernaryWeight | Int8Weight,
    epilogue: Epilogue | None,
    residual: mx.array | None,
) -> mx.array:
    """xq: int8 [m, k filled up to whole spans]; s: factors and sums, float32 [2, m]; the rest as `linear`."""
    if epilogue is not None and weight.n % (2 * _TILE):  # a tile would hold gates and their partners
        y = reference.gated(_product(xq, s, weight, None, None), epilogue)
        return y if residual is None else y + residual
    m, gate = xq.shape[0], _GATES[epilogue]
    width = weight.n // 2 if gate else weight.n
    inputs = {"xq": xq, "s": s, "weight": weight.data, "scale": weight.scale}
    inputs["residual"] = s if residual is None else residual
    outputs: Outputs = {"out": ((m, width), mx.float32)}
    kind = int(isinstance(weight, Int8Weight))
    constants: Constants = {"KIND": kind, "GATE": gate, "RESIDUAL": residual is not None}
    if m <= SMALL_ROWS:
        threads, tiles = _tuning["threads"], _tuning["tiles"]
        return launch(
            "small",
            inputs | {"sizes": _sizes(weight.n, _spans(weight.k))},
            outputs,
            (-(-width // (_TILE * tiles)), 1, 1),
            threads,
            constants | {"M": m, "TILES": tiles, "THREADS": threads, "SLOTS": _SLOTS},
            shared_memory=threads // 32 * _SLOTS * _PIECE_BYTES[kind],
        )[0]
    block = _large_block(kind, weight.n, m)
    return launch(
        "large",
        inputs | {"sizes": _sizes(weight.n, _spans(weight.k), m)},
        outputs,
        (-(-weight.n // block.outputs), -(-m // block.rows), 1),
        block.threads,
        constants | block.constants,
        shared_memory=block.shared_memory,
        residents=512 // block.threads,
    )[0]


@dataclass(frozen=True)
class _Block:
    """Of the large product: rows and outputs of a block, and what it is made of."""

    rows: int
    outputs: int
    threads: int
    shared_memory: int
    constants: Constants


@lru_cache(maxsize=4096)
def _large_block(kind: int, n: int, m: int) -> _Block:
    """Large blocks where they occupy a large GPU and it has the shared memory, else small ones."""
    stages, tiles = (3, 2) if kind else (4, 2)
    for groups, warps_m, warps_n, fewest in ((8, 2, 4, _BLOCKS), (4, 2, 2, 0)):
        rows, outputs = 8 * groups * warps_m, _TILE * tiles * warps_n
        shared_memory = stages * (rows * (_SPAN + 16) + outputs // _TILE * _PIECE_BYTES[kind])
        if -(-m // rows) * -(-n // outputs) >= fewest and shared_memory <= device_attribute(_SHARED_MEMORY):
            break
    constants: Constants = {"GROUPS": groups, "TILES": tiles, "WARPS_M": warps_m, "WARPS_N": warps_n, "STAGES": stages}
    return _Block(rows, outputs, 32 * warps_m * warps_n, shared_memory, constants)


@lru_cache(maxsize=4096)
def _sizes(*values: int) -> mx.array:
    """Sizes as an input: constants would make MLX compile a kernel for every one."""
    return _on_device(np.array(values, np.int32))


def linear(
    x: mx.array,
    weight: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 0.0,
    epilogue: Epilogue | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """As `reference.linear`; a row has the bits that it has alone."""
    check_product(x, weight, epilogue, residual)
    x = x.astype(mx.float32)
    if not isinstance(weight, DenseWeight):
        return _product(*_quantize_padded(x, norm, eps), weight, epilogue, residual)
    if norm is not None:
        x = _rms_norm(x, norm, eps)
    m, gate = x.shape[0], _GATES[epilogue]
    width = weight.n // 2 if gate else weight.n
    inputs = {"x": x, "weight": weight.data, "residual": x if residual is None else residual}
    outputs: Outputs = {"out": ((m, width), mx.float32)}
    constants: Constants = {"GATE": gate, "RESIDUAL": residual is not None}
    if m > SMALL_ROWS and weight.data.dtype == mx.bfloat16 and weight.k % 8 == 0:
        return launch(
            "dense_many",
            inputs | {"sizes": _sizes(weight.n, weight.k, m)},
            outputs,
            (-(-m // 32), -(-width // (16 if gate else 32)), 1),
            256,
            constants,
            shared_memory=2 * 256 * 32 * (4 + 2),
        )[0]
    rows = min(m, SMALL_ROWS)
    return launch(
        "dense",
        inputs | {"sizes": _sizes(weight.n, m)},
        outputs,
        (-(-width // (4 * _ROW_THREADS // 32)), -(-m // rows), 1),
        _ROW_THREADS,
        constants
        | {
            "T": weight.data.dtype,
            "K": weight.k,  # a constant, since MLX asks for a kernel's shared memory once
            "M": rows,
            "THREADS": _ROW_THREADS,
        },
        shared_memory=4 * rows * weight.k,
    )[0]


def _rms_norm(x: mx.array, norm: mx.array, eps: float) -> mx.array:
    m, k = x.shape
    return launch(
        "rms_norm",
        {"x": x, "norm": norm.astype(mx.float32), "sizes": _sizes(k)},
        {"y": ((m, k), mx.float32)},
        (m, 1, 1),
        _threads_of_row(k),
        {"EPS": float_bits(eps), "THREADS": _threads_of_row(k)},
    )[0]


class _Rows:
    """Rows of several sequences on the device: where each stands, and groups that a kernel takes together.

    starts: where a sequence's keys begin, in the unit of its stride; None: sequence i's at i.
    """

    def __init__(self, spans: Spans, starts: np.ndarray | None = None) -> None:
        self.spans, self.starts = spans, np.arange(len(spans.counts)) if starts is None else starts
        self.positions = _on_device(np.array(spans.positions))
        self.sequences = _on_device(np.repeat(self.starts, spans.counts).astype(np.int32))
        self.chunks = -(-spans.end // _CHUNK)
        self._groups: dict[int, mx.array] = {}

    def groups(self, most: int) -> mx.array:
        """As `Spans.groups_of`."""
        if most not in self._groups:
            groups = np.array(self.spans.groups_of(most))
            groups[:, 0] = self.starts[groups[:, 0]]
            self._groups[most] = _on_device(groups)
        return self._groups[most]


_latest: dict[str, tuple[object, _Rows]] = {}  # what all layers of a forward pass ask for


def _rows_of(spans: Spans) -> _Rows:
    if "spans" not in _latest or _latest["spans"][0] is not spans:
        _latest["spans"] = spans, _Rows(spans)
    return _latest["spans"][1]


def _packed_rows(segments: np.ndarray) -> _Rows:
    """Each segment as a sequence of its own."""
    if "segments" not in _latest or _latest["segments"][0] is not segments:
        first = np.ones(segments.shape, bool)
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = np.flatnonzero(first)
        counts = np.diff(starts, append=segments.size)
        _latest["segments"] = segments, _Rows(Spans((0,) * len(starts), tuple(counts.tolist())), starts)
    return _latest["segments"][1]


def _supported(shape: AttentionShape) -> bool:
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
    if not _supported(shape) or not spans.rows:
        return reference.attention(qkv, k_cache, v_cache, spans, shape)
    rows, capacity = _rows_of(spans), k_cache.shape[2]
    strides = (1, capacity, shape.kv_heads * capacity)
    after = _nothing() if CudaFusedStep.after is None else CudaFusedStep.after
    caches = {"keys": k_cache, "values": v_cache, "after": after}
    (queries,) = _rope(qkv, rows, strides, shape, caches, {})
    out = _attend(queries, k_cache, v_cache, rows, strides, shape)
    CudaFusedStep.after = out
    k_cache, v_cache = mx.depends([k_cache, v_cache], [queries])
    return out, k_cache, v_cache


@lru_cache(maxsize=1)
def _nothing() -> mx.array:
    return _on_device(np.zeros(1, np.float32))


def attention_packed(qkv: mx.array, segments: np.ndarray, shape: AttentionShape) -> mx.array:
    """As `reference.attention_packed`."""
    if not _supported(shape) or not segments.size:
        return reference.attention_packed(qkv, segments, shape)
    rows, kv_heads = _packed_rows(segments), shape.kv_heads
    strides = (kv_heads, 1, kv_heads)  # [rows][kv_heads][d]: a segment starts at its first row
    new = ((segments.size, kv_heads, shape.head_dim), CACHED)
    qkv = qkv.reshape(segments.size, -1)
    queries, keys, values = _rope(qkv, rows, strides, shape, {}, {"keys": new, "values": new})
    return _attend(queries, keys, values, rows, strides, shape).reshape(*segments.shape, -1)


def _rope(
    qkv: mx.array,
    rows: _Rows,
    strides: tuple[int, int, int],
    shape: AttentionShape,
    inputs: dict[str, mx.array],
    outputs: Outputs,
) -> list[mx.array]:
    """Rotated queries, and keys and values where the inputs or outputs of these names are. strides: as rope.cu has
    them."""
    m, heads, dim = rows.spans.rows, shape.heads, shape.head_dim
    return launch(
        "rope",
        {
            "qkv": qkv,
            "frequency": shape.inverse_frequency,
            "positions": rows.positions,
            "sequences": rows.sequences,
            "sizes": _sizes(*strides),
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
    rows: _Rows,
    strides: tuple[int, int, int],
    shape: AttentionShape,
) -> mx.array:
    """float32 [rows, heads * d], by the kernel that is best for so many rows of a sequence: the bits are the same."""
    m, heads, kv_heads, dim = rows.spans.rows, shape.heads, shape.kv_heads, shape.head_dim
    group, longest, chunks = heads // kv_heads, rows.spans.longest, rows.chunks
    model: Constants = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim}
    inputs = {"queries": queries, "keys": keys, "values": values}
    sizes = _sizes(m, *strides)
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
        {"parts": out, "positions": rows.positions, "sizes": _sizes(m)},
        whole,
        (m, heads, 1),
        dim,
        {"HEADS": heads, "DIM": dim},
    )[0]


def choose(logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array:
    """As `reference.choose`, with sums in another order."""
    m, n = logits.shape
    if not m:
        return reference.choose(logits, temperature, uniform)
    return launch(
        "choose",
        {"logits": logits, "temperature": temperature, "uniform": uniform, "sizes": _sizes(n)},
        {"out": ((m,), mx.uint32)},
        (m, 1, 1),
        _CHOICE_THREADS,
        {"THREADS": _CHOICE_THREADS},
        shared_memory=4 * -(-n // 32),
    )[0]


def top_k(logits: mx.array, k: int, temperatures: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.top_k`; more than 128 are left to it."""
    m, n = logits.shape
    if not m or not 0 < k <= min(n, _MOST_TOP):
        return reference.top_k(logits, k, temperatures)
    ids, values, lse = launch(
        "top_k",
        {"logits": logits, "temperatures": _floats(*temperatures), "sizes": _sizes(n)},
        {
            "ids": ((m, k), mx.uint32),
            "values": ((m, k), mx.float32),
            "lse": ((m, len(temperatures)), mx.float32),
        },
        (m, 1, 1),
        _CHOICE_THREADS,
        {
            "K": k,
            "THREADS": _CHOICE_THREADS,
            "ROOM": 2 * _CHOICE_THREADS,
            "TEMPERATURES": len(temperatures),
        },
    )
    return ids, values, lse


@lru_cache(maxsize=16)
def _floats(*values: float) -> mx.array:
    return _on_device(np.array(values, np.float32))


argmax = reference.argmax
clock = reference.clock
fused_step = CudaFusedStep.of
