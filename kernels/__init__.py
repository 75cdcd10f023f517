"""BitLinear and the other operations of a decoding step, on whatever MLX runs on.

`backend()` returns the fastest backend that passes its self-test here; `kernels.reference` is the
definition that every backend equals. Checkpoints are packed as `kernels.packing` says.
"""

import mlx.core as mx
import numpy as np

from kernels.backends import backend
from kernels.errors import UserError
from kernels.module import BitLinear, swap_bitlinear
from kernels.reference import TernaryWeight

__all__ = [
    "BitLinear",
    "TernaryWeight",
    "UserError",
    "backend",
    "bitlinear",
    "prepare_ternary",
    "quantize_rows",
    "swap_bitlinear",
]


def prepare_ternary(ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight:
    """As `reference.prepare_ternary`, in this backend's layout."""
    return backend().prepare_ternary(ternary, scale)


def quantize_rows(x: mx.array, norm: mx.array | None = None, eps: float = 0.0) -> tuple[mx.array, mx.array]:
    """As `reference.quantize_rows`, on this backend."""
    return backend().quantize_rows(x, norm, eps)


def bitlinear(xq: mx.array, row_scale: mx.array, weight: TernaryWeight) -> mx.array:
    """As `reference.bitlinear`, on this backend: the same bits on each."""
    return backend().bitlinear(xq, row_scale, weight)
