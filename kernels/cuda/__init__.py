"""The CUDA backend: the operations of `kernels.reference` as kernels of our own, through MLX's CUDA build.

Products use the int8 tensor cores; those of 1..8 rows read the weights once for all rows;
BitLinear equals the reference bit for bit. Attention works in chunks of keys that are combined in order,
for any number of rows and sequences, so that no library plans anew for every length of context. `fused` runs a
decoding step of a whole model as one launch of the same functions.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.cuda.fused import CudaFusedStep
from kernels.cuda.launch import Constants, float_bits, launch
from kernels.errors import UserError
from kernels.ops import (
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
_ROW_THREADS = 256  # of the kernels that take a row a block
_TILE, _SPAN = 16, 128  # outputs and inputs, as in products.cuh
_CHUNK = 32  # keys, as in attention.cuh
_HEAD_DIMS = (32, 64, 128, 256)  # what attention is written for
_PARTS_BYTES = 64 << 20  # of attention's parts at a time: a long prompt's of a whole prefill would take gigabytes
_ROUNDED_AT_ONCE = 8192  # rows of a weight, whole tiles: float32 copies of a whole head would take gigabytes
_SLOTS = 4  # pieces of weights on their way to each warp of a small product


def set_tuning(values: dict[str, int]) -> None:
    """Block shapes of the small product: tiles of 16 outputs a block, threads a block."""
    _tuning.update(values)


def _spans(k: int) -> int:
    return -(-k // _SPAN)


def _on_device(array: np.ndarray) -> mx.array:
    """A copy in the GPU's own memory: what comes from NumPy stays in memory that both sides share."""
    moved = mx.contiguous(mx.array(array) + 0)
    mx.eval(moved)
    return moved


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
    mx.eval(data)
    return TernaryWeight(data, _on_device(scale.astype(np.float32)), n, k)


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
    return xq[:, : x.shape[1]], s


def _quantize_padded(x: mx.array, norm: mx.array | None, eps: float) -> tuple[mx.array, mx.array]:
    """int8 rows filled up with zeros to whole spans, and their factors."""
    m, k = x.shape
    padded = _SPAN * _spans(k)
    xq, s = launch(
        "quantize_rows",
        {"x": x, "norm": x if norm is None else norm.astype(mx.float32), "sizes": _sizes(k, padded)},
        {"xq": ((m, padded), mx.int8), "s": ((m,), mx.float32)},
        (m, 1, 1),
        _ROW_THREADS,
        {"NORM": norm is not None, "EPS": float_bits(eps), "THREADS": _ROW_THREADS},
    )
    return xq, s


def _padded(xq: mx.array) -> mx.array:
    k = xq.shape[1]
    return mx.pad(xq, [(0, 0), (0, _SPAN * _spans(k) - k)]) if k % _SPAN else xq


def bitlinear(xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array:
    """As `reference.bitlinear`, the same bits."""
    check_product(xq, weight)
    return _product(_padded(xq), s, weight, None, None)


def int8_linear(xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array:
    """As `reference.int8_linear`, the same bits."""
    check_product(xq, weight)
    return _product(_padded(xq), s, weight, None, None)


def _product(
    xq: mx.array,
    s: mx.array,
    weight: TernaryWeight | Int8Weight,
    epilogue: Epilogue | None,
    residual: mx.array | None,
) -> mx.array:
    """xq: int8 [m, k filled up to whole spans]; the rest as `linear`."""
    m, gate = xq.shape[0], _GATES[epilogue]
    inputs = {"xq": xq, "s": s, "weight": weight.data, "scale": weight.scale}
    inputs["residual"] = s if residual is None else residual
    constants: Constants = {"KIND": int(isinstance(weight, Int8Weight))}
    if m <= SMALL_ROWS and (not gate or weight.n % (2 * _TILE) == 0):
        width = weight.n // 2 if gate else weight.n
        threads, tiles = _tuning["threads"], _tuning["tiles"]
        return launch(
            "small",
            inputs | {"sizes": _sizes(weight.n, _spans(weight.k))},
            {"out": ((m, width), mx.float32)},
            (-(-width // (_TILE * tiles)), 1, 1),
            threads,
            constants
            | {
                "M": m,
                "GATE": gate,
                "RESIDUAL": residual is not None,
                "TILES": tiles,
                "THREADS": threads,
                "SLOTS": _SLOTS,
            },
            shared_memory=threads // 32 * _SLOTS * (2048 if isinstance(weight, Int8Weight) else 512),
        )[0]
    if epilogue is not None:
        y = reference.gated(_product(xq, s, weight, None, None), epilogue)
        return y if residual is None else y + residual
    return launch(
        "large",
        inputs | {"sizes": _sizes(weight.n, _spans(weight.k), m)},
        {"out": ((m, weight.n), mx.float32)},
        (-(-weight.n // 128), -(-m // 64), 1),
        128,
        constants | {"RESIDUAL": residual is not None},
    )[0]


@lru_cache(maxsize=256)
def _sizes(*values: int) -> mx.array:
    """Sizes as an input: constants would make MLX compile a kernel for every one."""
    sizes = mx.array(values, mx.int32)
    mx.eval(sizes)
    return sizes


def linear(
    x: mx.array,
    weight: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 0.0,
    epilogue: Epilogue | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """As `reference.linear`; more than 8 rows of a float weight go to the library."""
    check_product(x, weight, epilogue, residual)
    x = x.astype(mx.float32)
    if not isinstance(weight, DenseWeight):
        return _product(*_quantize_padded(x, norm, eps), weight, epilogue, residual)
    m = x.shape[0]
    if m > SMALL_ROWS:
        return reference.linear(x, weight, norm=norm, eps=eps, epilogue=epilogue, residual=residual)
    if norm is not None:
        x = _rms_norm(x, norm, eps)
    width = weight.n // 2 if epilogue else weight.n
    return launch(
        "dense",
        {
            "x": x,
            "weight": weight.data,
            "residual": x if residual is None else residual,
            "sizes": _sizes(weight.n),
        },
        {"out": ((m, width), mx.float32)},
        (-(-width // (4 * _ROW_THREADS // 32)), 1, 1),
        _ROW_THREADS,
        {
            "T": weight.data.dtype,
            "K": weight.k,  # a constant, since MLX asks for a kernel's shared memory once
            "M": m,
            "GATE": _GATES[epilogue],
            "RESIDUAL": residual is not None,
            "THREADS": _ROW_THREADS,
        },
        shared_memory=4 * m * weight.k,
    )[0]


def _rms_norm(x: mx.array, norm: mx.array, eps: float) -> mx.array:
    m, k = x.shape
    return launch(
        "rms_norm",
        {"x": x, "norm": norm.astype(mx.float32), "sizes": _sizes(k)},
        {"y": ((m, k), mx.float32)},
        (m, 1, 1),
        _ROW_THREADS,
        {"EPS": float_bits(eps), "THREADS": _ROW_THREADS},
    )[0]


def attention(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.attention`, and rows' bits are their own however many there are; unusual head dimensions are left
    to it."""
    check_attention(qkv, k_cache, v_cache, spans, shape)
    m, heads, kv_heads, dim = spans.rows, shape.heads, shape.kv_heads, shape.head_dim
    if dim not in _HEAD_DIMS or not m:
        return reference.attention(qkv, k_cache, v_cache, spans, shape)
    model: Constants = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": dim}
    queries, keys, values = launch(
        "rope",
        {"qkv": qkv, "frequency": shape.inverse_frequency, "positions": spans.positions},
        {
            "queries": ((m, heads * dim), mx.float32),
            "keys": ((m, kv_heads, dim), mx.float32),
            "values": ((m, kv_heads, dim), mx.float32),
        },
        (m, 1, 1),
        _ROW_THREADS,
        model | {"SCALE": float_bits(shape.scale), "THREADS": _ROW_THREADS},
    )
    reference.write_rows(k_cache, keys, spans)
    reference.write_rows(v_cache, values, spans)
    chunks = -(-spans.end // _CHUNK)
    most = max(SMALL_ROWS, _PARTS_BYTES // (4 * heads * (dim + 2) * chunks))  # rows
    out: list[mx.array] = []
    for groups, first, rows in _portions(spans, most):
        lines = SMALL_ROWS * heads // kv_heads
        (parts,) = launch(
            "attend",
            {
                "queries": queries,
                "keys": k_cache,
                "values": v_cache,
                "groups": groups,
                "sizes": _sizes(rows, first, k_cache.shape[2]),
            },
            {"parts": ((kv_heads, chunks, rows * heads // kv_heads, dim + 2), mx.float32)},
            (chunks, kv_heads, len(groups)),
            _ROW_THREADS,
            model | {"M": SMALL_ROWS, "THREADS": _ROW_THREADS},
            shared_memory=4 * (lines * dim + _CHUNK * (2 * dim + 4) + lines * _CHUNK),
        )
        (part,) = launch(
            "combine",
            {"parts": parts, "positions": spans.positions, "sizes": _sizes(rows, first, chunks)},
            {"out": ((rows, heads * dim), mx.float32)},
            (rows, heads, 1),
            dim,
            model,
        )
        out.append(part)
    return out[0] if len(out) == 1 else mx.concatenate(out), k_cache, v_cache


def _portions(spans: Spans, most: int) -> list[tuple[mx.array, int, int]]:
    """The groups of spans in portions of at most so many rows: each one's groups, first row and number of rows."""
    if spans.rows <= most:
        return [(spans.groups, 0, spans.rows)]
    portions, start, first, rows = [], 0, 0, 0
    counts = np.array(spans.groups)[:, 2].tolist()
    for i, count in enumerate([*counts, most]):
        if rows + count > most:
            portions.append((spans.groups[start:i], first, rows))
            start, first, rows = i, first + rows, 0
        rows += count
    return portions


attention_packed = reference.attention_packed
argmax = reference.argmax
choose = reference.choose
top_k = reference.top_k
clock = reference.clock
fused_step = CudaFusedStep.of
