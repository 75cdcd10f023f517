"""The Metal backend: the operations of `kernels.reference` as kernels of our own, through `mx.fast.metal_kernel`.

These kernels were never timed, nor run, on a Mac by those who wrote them: their text is executed as C++ in the
tests (tests/kernels/metal_emulator), and the self-test of `kernels.backends` protects the first who uses them.

Products decode a weight once for eight rows; BitLinear equals the reference bit for bit. Every row's bits are its
own, however many rows a call has. Kernel bodies are the `.metal` files of this folder.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kernels import reference
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

NAME = "metal"
# Of the small products: outputs a simdgroup (for more than 4 rows at most 4) and simdgroups a threadgroup.
TUNABLE = {"outputs": (2, 4, 8), "simdgroups": (1, 2, 4, 8)}
ROUNDED_AT_ONCE = 8192  # outputs of an int8 weight

_tuning = {"outputs": 4, "simdgroups": 4}
_FOLDER = Path(__file__).parent
_GATES: dict[str | None, int] = {None: 0, "relu2_mul": 1, "silu_mul": 2}
_BLOCK = 16  # inputs, to which rows and weights are filled up
_SIMDGROUP = 32
_ROW_THREADS = 256  # of the kernels that take a row a threadgroup
_LARGE = (32, 64)  # rows and outputs a threadgroup of ternary_large.metal
_KEYS = 32  # of a chunk of attend.metal
_LINES = 4  # queries a simdgroup there
_HEAD_DIMS = range(32, 257, 32)
_CHOICE_THREADS = 512  # of choose.metal and top_k.metal, which take a row a threadgroup
_MOST_IDS = 1 << 24  # that choose.metal tells apart as floats
_MOST_TOP = 128  # logits for which top_k.metal is made

Inputs = dict[str, mx.array]
Outputs = dict[str, tuple[tuple[int, ...], mx.Dtype]]
Template = dict[str, int | mx.Dtype]


def set_tuning(values: dict[str, int]) -> None:
    """Values for the parameters in TUNABLE."""
    _tuning.update(values)


@cache
def source(name: str) -> str:
    """The text of a file of this folder, without its suffix."""
    return (_FOLDER / f"{name}.metal").read_text(encoding="ascii")


@cache
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    return mx.fast.metal_kernel(
        name=f"bitdraft_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=source(name),
        header=source("common"),
        compile_options={"math_mode": "safe"},
    )


def launch(
    name: str,
    inputs: Inputs,
    outputs: Outputs,
    grid: tuple[int, int, int],
    threads: int,
    template: Template,
) -> list[mx.array]:
    """Run NAME.metal on `grid` threadgroups of `threads` threads; returns its outputs in order."""
    result: list[mx.array] = _kernel(name, tuple(inputs), tuple(outputs))(
        inputs=list(inputs.values()),
        template=list(template.items()),
        grid=(grid[0] * threads, grid[1], grid[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
    return result


@lru_cache(maxsize=1024)
def _dims(*values: int) -> mx.array:
    """Sizes that a kernel reads: as an array, so that no size needs a compilation of its own."""
    return mx.array(values, mx.int32)


def _float_bits(value: float) -> int:
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def _up(value: int, to: int) -> int:
    return -(-value // to)


# Weights


def prepare_ternary(ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight:
    """ternary: int8 [n, k] in {-1, 0, 1}; scale: float32 [n]. Sixteen codes of two bits a word (common.metal)."""
    n, k = ternary.shape
    blocks = _up(k, _BLOCK)
    codes = np.ones((_rows_kept(n), blocks * _BLOCK), np.uint8)
    codes[:n, :k] = ternary + 1
    words = np.zeros((len(codes), blocks), np.uint32)
    for i in range(_BLOCK):
        words |= codes[:, i::_BLOCK].astype(np.uint32) << np.uint32(2 * i)
    return TernaryWeight(mx.array(words), mx.array(np.ascontiguousarray(scale, np.float32)), n, k)


def _rows_kept(n: int) -> int:
    """At least eight, so that MLX passes every weight in the same address space."""
    return max(n, 8)


def prepare_int8(weight: mx.array) -> Int8Weight:
    """weight: bfloat16 or float32 [n, k]. Four bytes a word (common.metal)."""
    n, k = weight.shape
    data = np.full((_rows_kept(n), _up(k, _BLOCK) * _BLOCK), 128, np.uint8)
    scales = []
    for start in range(0, n, ROUNDED_AT_ONCE):  # float32 copies of a whole head would take gigabytes
        rounded, scale = reference.round_int8(weight[start : start + ROUNDED_AT_ONCE])
        data[start : start + len(scale), :k] = np.array(rounded).view(np.uint8) ^ 128  # adds 128
        scales.append(scale)
    scale = mx.contiguous(mx.concatenate(scales))
    mx.eval(scale)
    return Int8Weight(mx.array(data.view(np.uint32)), scale, n, k)


def prepare_dense(weight: mx.array) -> DenseWeight:
    """weight: bfloat16 or float32 [n, k]."""
    n, k = weight.shape
    data = mx.contiguous(weight)
    mx.eval(data)
    return DenseWeight(data, n, k)


# Products


def quantize_rows(x: mx.array, norm: mx.array | None = None, eps: float = 0.0) -> tuple[mx.array, mx.array]:
    """As `reference.quantize_rows`; without a norm, the same bits."""
    q, s, _ = _quantize(x, norm, eps, x.shape[1], mx.int8)
    return q, s


def _quantize(
    x: mx.array, norm: mx.array | None, eps: float, stride: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """Rows of whole numbers as `dtype`, filled up with zeros to `stride`; their factors and their sums."""
    x = x.astype(mx.float32)
    m, k = x.shape
    q, s, sums = launch(
        "quantize_rows",
        {
            "x": x,
            "norm": x if norm is None else norm.astype(mx.float32),
            "dims": _dims(k, stride, norm is not None, _float_bits(eps)),
        },
        {"q": ((m, stride), dtype), "s": ((m,), mx.float32), "sums": ((m,), mx.int32)},
        (m, 1, 1),
        _ROW_THREADS,
        {"T": dtype},
    )
    return q, s, sums


def bitlinear(xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array:
    """As `reference.bitlinear`, the same bits."""
    check_product(xq, weight)
    return _product(*_widened(xq, s), weight)


def int8_linear(xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array:
    """As `reference.int8_linear`, the same bits."""
    check_product(xq, weight)
    return _product(*_widened(xq, s), weight)


def _widened(xq: mx.array, s: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """int8 rows as `_quantize` gives them to products: half floats, which the GPU multiplies as they are."""
    fill = -xq.shape[1] % _BLOCK
    return mx.pad(xq.astype(mx.float16), [(0, 0), (0, fill)]), s, xq.astype(mx.int32).sum(axis=1)


def _product(
    q: mx.array,
    s: mx.array,
    sums: mx.array,
    weight: TernaryWeight | Int8Weight,
    epilogue: Epilogue | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """q: float16 [m, k filled up]; s: float32 [m]; sums: int32 [m]; the rest as `linear`."""
    m, gate = q.shape[0], _GATES[epilogue]
    width = weight.n // 2 if gate else weight.n
    inputs: Inputs = {
        "q": q,
        "s": s,
        "sums": sums,
        "weight": weight.data,
        "scale": weight.scale,
        "residual": s if residual is None else residual.astype(mx.float32),
        "dims": _dims(m, weight.n, _up(weight.k, _BLOCK), gate, residual is not None),
    }
    outputs: Outputs = {"out": ((m, width), mx.float32)}
    ternary = isinstance(weight, TernaryWeight)
    if ternary and m > SMALL_ROWS:
        rows, columns = _LARGE
        del inputs["sums"]
        grid = (_up(width, columns // 2 if gate else columns), _up(m, rows), 1)
        return launch("ternary_large", inputs, outputs, grid, 128, {})[0]
    rows = min(m, SMALL_ROWS)
    groups, each = _output_groups(width, gate, rows)
    template: Template = {"BITS": 2 if ternary else 8, "M": rows, "OUTPUTS": each}
    grid = (_up(m, rows), groups, 1)
    return launch("product_small", inputs, outputs, grid, _SIMDGROUP * _tuning["simdgroups"], template)[0]


def _output_groups(width: int, gate: int, rows: int) -> tuple[int, int]:
    """Threadgroups of a small product and outputs a simdgroup: so few that its lanes can finish all rows of them."""
    each = min(_tuning["outputs"], 8 if rows <= 4 else 4)
    return _up(width, _tuning["simdgroups"] * (each // 2 if gate else each)), each


def linear(
    x: mx.array,
    weight: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 0.0,
    epilogue: Epilogue | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """As `reference.linear`, in two launches."""
    check_product(x, weight, epilogue, residual)
    x = x.astype(mx.float32)
    if not isinstance(weight, DenseWeight):
        quantized = _quantize(x, norm, eps, _up(weight.k, _BLOCK) * _BLOCK, mx.float16)
        return _product(*quantized, weight, epilogue, residual)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    m, gate = x.shape[0], _GATES[epilogue]
    width = weight.n // 2 if gate else weight.n
    rows = min(m, SMALL_ROWS)
    groups, each = _output_groups(width, gate, rows)
    return launch(
        "dense_small",
        {
            "x": x,
            "weight": weight.data,
            "residual": x if residual is None else residual.astype(mx.float32),
            "dims": _dims(m, weight.n, weight.k, gate, residual is not None),
        },
        {"out": ((m, width), mx.float32)},
        (_up(m, rows), groups, 1),
        _SIMDGROUP * _tuning["simdgroups"],
        {
            "T": weight.data.dtype,
            "M": rows,
            "OUTPUTS": each,
            "VECTOR": 4 if weight.k % 4 == 0 else 1,
        },
    )[0]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """As `reference.rms_norm` for float32 [m, k]; a row's bits do not depend on the others."""
    m, k = x.shape
    return launch(
        "rms_norm",
        {"x": x.astype(mx.float32), "norm": weight.astype(mx.float32), "dims": _dims(k, _float_bits(eps))},
        {"y": ((m, k), mx.float32)},
        (m, 1, 1),
        _ROW_THREADS,
        {},
    )[0]


# Attention


def attention(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.attention`, to which unusual head dimensions are left, and sequences with more than 8 rows."""
    check_attention(qkv, k_cache, v_cache, spans, shape)
    if spans.longest > SMALL_ROWS:
        return _attention_with_prefill(qkv, k_cache, v_cache, spans, shape)
    m, heads, kv_heads, dim = spans.rows, shape.heads, shape.kv_heads, shape.head_dim
    if dim not in _HEAD_DIMS or not m:
        return reference.attention(qkv, k_cache, v_cache, spans, shape)
    queries, keys, values = launch(
        "rope",
        {
            "qkv": qkv.astype(mx.float32),
            "frequency": shape.inverse_frequency,
            "positions": spans.positions,
            "dims": _dims(m, heads, kv_heads, dim, _float_bits(shape.scale)),
        },
        {
            "queries": ((m, heads, dim), mx.float32),
            "keys": ((m, kv_heads, dim), CACHED),
            "values": ((m, kv_heads, dim), CACHED),
        },
        (_up(m * (heads + 2 * kv_heads) * dim // 2, _ROW_THREADS), 1, 1),
        _ROW_THREADS,
        {},
    )
    reference.write_rows(k_cache, keys, spans)
    reference.write_rows(v_cache, values, spans)
    group = heads // kv_heads
    lines, chunks, capacity = m * group, _up(spans.end, _KEYS), k_cache.shape[2]
    simdgroups = min(8, _up(spans.longest * group, _LINES))  # of a threadgroup, as a sequence's rows need
    parts_of = _up(spans.longest * group, _LINES * simdgroups)  # threadgroups for them
    tops, totals, parts = launch(
        "attend",
        {
            "queries": queries,
            "keys": k_cache,
            "values": v_cache,
            "groups": spans.groups,
            "dims": _dims(m, kv_heads, capacity, group),
        },
        {
            "tops": ((kv_heads, chunks, lines), mx.float32),
            "totals": ((kv_heads, chunks, lines), mx.float32),
            "parts": ((kv_heads, chunks, lines, dim), mx.float32),
        },
        (chunks, kv_heads * parts_of, len(spans.groups)),
        _SIMDGROUP * simdgroups,
        {"DIM": dim, "LINES": _LINES},
    )
    out = launch(
        "combine",
        {
            "tops": tops,
            "totals": totals,
            "parts": parts,
            "positions": spans.positions,
            "dims": _dims(m, chunks, group),
        },
        {"out": ((m, heads * dim), mx.float32)},
        (heads, m, 1),
        dim,
        {"DIM": dim},
    )[0]
    return out, k_cache, v_cache


def _attention_with_prefill(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
) -> tuple[mx.array, mx.array, mx.array]:
    """Sequences with many rows by the reference, then those with few by our kernels, which keep their rows' bits."""
    many = np.repeat(np.array(spans.counts) > SMALL_ROWS, spans.counts)
    out = mx.zeros((spans.rows, shape.heads * shape.head_dim))
    for chosen, attend in ((many, reference.attention), (~many, attention)):
        counts = tuple(count if (count > SMALL_ROWS) == (chosen is many) else 0 for count in spans.counts)
        rows = mx.array(np.flatnonzero(chosen).astype(np.int32))
        out[rows], k_cache, v_cache = attend(qkv[rows], k_cache, v_cache, Spans(spans.offsets, counts), shape)
    return out, k_cache, v_cache


# Choices


def choose(logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array:
    """As `reference.choose`, with sums in another order."""
    m, n = logits.shape
    if not 0 < n < _MOST_IDS or not m:
        return reference.choose(logits, temperature, uniform)
    return launch(
        "choose",
        {"logits": logits, "temperature": temperature, "uniform": uniform, "dims": _dims(n)},
        {"out": ((m,), mx.uint32)},
        (m, 1, 1),
        _CHOICE_THREADS,
        {},
    )[0]


def top_k(logits: mx.array, k: int, temperatures: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.top_k`; more than 128 are left to it."""
    m, n = logits.shape
    if not m or not temperatures or not 0 < k <= min(n, _MOST_TOP):
        return reference.top_k(logits, k, temperatures)
    ids, values, lse = launch(
        "top_k",
        {"logits": logits, "temperatures": _floats(*temperatures), "dims": _dims(n)},
        {
            "ids": ((m, k), mx.uint32),
            "values": ((m, k), mx.float32),
            "lse": ((m, len(temperatures)), mx.float32),
        },
        (m, 1, 1),
        _CHOICE_THREADS,
        {"K": k, "THREADS": _CHOICE_THREADS, "ROOM": 2 * _CHOICE_THREADS, "TEMPERATURES": len(temperatures)},
    )
    return ids, values, lse


@lru_cache(maxsize=16)
def _floats(*values: float) -> mx.array:
    return mx.array(values, mx.float32)


attention_packed = reference.attention_packed
argmax = reference.argmax
clock = reference.clock
fused_step = reference.fused_step
fused_reader = reference.fused_reader
