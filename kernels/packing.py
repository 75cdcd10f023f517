"""The packing of ternary weights in BitNet checkpoints (two bits a weight, four rows a byte).

Bits 2i..2i+1 of byte (r, c) hold W[i * n/4 + r, c] + 1. The code 3 means nothing and is refused.
"""

from __future__ import annotations

import numpy as np

from kernels.errors import UserError


def pack_ternary(ternary: np.ndarray) -> np.ndarray:
    """int8 [n, k] in {-1, 0, 1}, n a multiple of 4 -> uint8 [n / 4, k]."""
    n, k = ternary.shape
    if n % 4:
        raise UserError(f"ternary weights need a number of rows that is a multiple of 4, not {n}")
    if ternary.min(initial=0) < -1 or ternary.max(initial=0) > 1:
        raise UserError("ternary weights must be -1, 0 or 1")
    codes = (ternary + 1).astype(np.uint8).reshape(4, n // 4, k)
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def quantize_ternary(weight: np.ndarray, name: str = "weights") -> tuple[np.ndarray, np.float32]:
    """Float weights to ternary ones by their mean magnitude (BitNet b1.58, arXiv:2402.17764).

    weight: float32 [n, k]. Returns int8 [n, k] in {-1, 0, 1} and the scale, with weight ~ ternary * scale. The steps
    are those of the published models, round(weight * s) / s with s = 1 / max(mean|weight|, 1e-5), in float32; but the
    mean is summed in float64, so that no order of summation matters.
    """
    mean = np.abs(weight).mean(dtype=np.float64)
    if not np.isfinite(mean):
        raise UserError(f"{name}: holds a value that is not finite")
    s = np.float32(1) / np.float32(max(mean, 1e-5))
    return np.clip(np.rint(weight * s), -1, 1).astype(np.int8), np.float32(1) / s


def check_codes(packed: np.ndarray, name: str = "packed weights") -> None:
    """Raises UserError with `name` if packed weights, uint8, hold the code 3."""
    if np.any(packed & packed >> 1 & 0b01010101):
        raise UserError(f"{name}: holds the code 3, which is no ternary weight (file damaged?)")


def unpack_ternary(packed: np.ndarray, name: str = "packed weights") -> np.ndarray:
    """uint8 [n / 4, k] -> int8 [n, k]. Raises UserError with `name` on the code 3."""
    check_codes(packed, name)
    return np.concatenate([(packed >> shift & 3).astype(np.int8) - 1 for shift in (0, 2, 4, 6)])
