"""Float products on CPUs: the OpenBLAS of the wheel `scipy-openblas32`, and numpy's where that is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np


def find_openblas() -> Path | None:
    """The wheel's library, or None when the wheel is not installed."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    if not library.exists():
        return None
    return library


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """np.matmul of float32 matrices, on the threads of our own operations where those are there.

    a: [m, k], b: [k, n]; out: [m, n] with contiguous rows, no part of the others. Beside other programs numpy's own
    threads lose time waiting for one another (kernels/cpu/native/blas.cpp).
    """
    out = np.empty((a.shape[0], b.shape[1]), np.float32) if out is None else out
    _product()(a, b, out)
    return out


@cache
def _product() -> Callable[[np.ndarray, np.ndarray, np.ndarray], object]:
    try:
        from kernels import cpu
    except ImportError:
        return np.matmul
    return cpu.matmul if cpu.use_fast_blas() else np.matmul
