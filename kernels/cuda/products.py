"""Products of rows with ternary, int8 and float matrices, and the rounding of rows to int8 in front of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.cuda.launch import Constants, Outputs, float_bits, launch, on_device, sizes_of
from kernels.cuda.nvrtc import device_attribute
from kernels.errors import UserError
from kernels.ops import (
    SMALL_ROWS,
    DenseWeight,
    Epilogue,
    Int8Weight,
    TernaryWeight,
    Weight,
    check_product,
)

TUNABLE = {"tiles": (1, 2, 4), "threads": (64, 128, 256, 512)}
_tuning = {"tiles": 1, "threads": 128}

_GATES: dict[str | None, int] = {None: 0, "relu2_mul": 1, "silu_mul": 2}
_ROW_THREADS = 256  # of blocks that take a few rows
_TILE, _SPAN = 16, 128  # outputs and inputs, as in products.cuh
_ROUNDED_AT_ONCE = 8192  # rows of a weight, whole tiles: float32 copies of a whole head would take gigabytes
_PIECE_BYTES = (512, 2048)  # of ternary and int8 weights, as in products.cuh
_SLOTS = 4  # pieces of weights on their way to each warp of a small product
_BLOCKS = 256  # large ones, two for each multiprocessor of an H100; with fewer, smaller ones are better
_DENSE_INPUTS = 32  # that a step of a bfloat16 product takes
_COMPUTE_CAPABILITY = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN


def set_tuning(values: dict[str, int]) -> None:
    """Block shapes of the small product: tiles of 16 outputs a block, threads a block."""
    _tuning.update(values)


def _spans(k: int) -> int:
    return -(-k // _SPAN)


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
    scales = on_device(scale.astype(np.float32))
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
        {"x": x, "norm": x if norm is None else norm.astype(mx.float32), "sizes": sizes_of(k, padded, m)},
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
            inputs | {"sizes": sizes_of(weight.n, _spans(weight.k))},
            outputs,
            (-(-width // (_TILE * tiles)), 1, 1),
            threads,
            constants | {"M": m, "TILES": tiles, "THREADS": threads, "SLOTS": _SLOTS},
            shared_memory=threads // 32 * _SLOTS * _PIECE_BYTES[kind],
        )[0]
    block = _large_block(kind, weight.n, m)
    return launch(
        "large",
        inputs | {"sizes": sizes_of(weight.n, _spans(weight.k), m)},
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
    if weight.data.dtype == mx.bfloat16 and weight.k % 8 == 0 and device_attribute(_COMPUTE_CAPABILITY) >= 8:
        return _bfloat16_product(_split(x, norm, eps), weight, epilogue, residual)
    return _dense_product(x if norm is None else _rms_norm(x, norm, eps), weight, epilogue, residual)


def _dense_product(x: mx.array, weight: DenseWeight, epilogue: Epilogue | None, residual: mx.array | None) -> mx.array:
    """On the ordinary units: of float32 matrices, odd shapes, and GPUs before compute capability 8.0."""
    m, gate = x.shape[0], _GATES[epilogue]
    width, rows = weight.n // 2 if gate else weight.n, min(m, SMALL_ROWS)
    return launch(
        "dense",
        {
            "x": x,
            "weight": weight.data,
            "residual": x if residual is None else residual,
            "sizes": sizes_of(weight.n, m),
        },
        {"out": ((m, width), mx.float32)},
        (-(-width // (4 * _ROW_THREADS // 32)), -(-m // rows), 1),
        _ROW_THREADS,
        {
            "GATE": gate,
            "RESIDUAL": residual is not None,
            "T": weight.data.dtype,
            "K": weight.k,  # a constant, since MLX asks for a kernel's shared memory once
            "M": rows,
            "THREADS": _ROW_THREADS,
        },
        shared_memory=4 * rows * weight.k,
    )[0]


def _split(x: mx.array, norm: mx.array | None, eps: float) -> mx.array:
    """Rows as three bfloat16 a value, filled up with zeros: [3, m, padded]."""
    m, k = x.shape
    padded = _DENSE_INPUTS * -(-k // _DENSE_INPUTS)
    return launch(
        "split_rows",
        {"x": x, "norm": x if norm is None else norm.astype(mx.float32), "sizes": sizes_of(k, padded, m)},
        {"parts": ((3, m, padded), mx.bfloat16)},
        (m, 1, 1),
        _threads_of_row(k),
        {"NORM": norm is not None, "EPS": float_bits(eps), "THREADS": _threads_of_row(k)},
    )[0]


def _bfloat16_product(
    parts: mx.array, weight: DenseWeight, epilogue: Epilogue | None, residual: mx.array | None
) -> mx.array:
    """parts: of rows, as `_split` has them; the rest as `linear`."""
    m, gate = parts.shape[1], _GATES[epilogue]
    width = weight.n // 2 if gate else weight.n
    groups, warps_m, warps_n, stages = (1, 1, 4, 6) if m <= SMALL_ROWS else (4, 2, 4, 4)
    tiles, threads = 2, 32 * warps_m * warps_n
    rows, outputs = 8 * groups * warps_m, _TILE * tiles * warps_n
    return launch(
        "dense_bfloat16",
        {
            "parts": parts,
            "weight": weight.data,
            "residual": parts if residual is None else residual,
            "sizes": sizes_of(weight.n, weight.k, m),
        },
        {"out": ((m, width), mx.float32)},
        (-(-width // (outputs // 2 if gate else outputs)), -(-m // rows), 1),
        threads,
        {
            **{"GATE": gate, "RESIDUAL": residual is not None, "GROUPS": groups, "TILES": tiles},
            **{"WARPS_M": warps_m, "WARPS_N": warps_n, "STAGES": stages},
        },
        shared_memory=stages * 2 * _DENSE_INPUTS * (outputs + 3 * rows),
        residents=512 // threads,
    )[0]


def _rms_norm(x: mx.array, norm: mx.array, eps: float) -> mx.array:
    m, k = x.shape
    return launch(
        "rms_norm",
        {"x": x, "norm": norm.astype(mx.float32), "sizes": sizes_of(k)},
        {"y": ((m, k), mx.float32)},
        (m, 1, 1),
        _threads_of_row(k),
        {"EPS": float_bits(eps), "THREADS": _threads_of_row(k)},
    )[0]
