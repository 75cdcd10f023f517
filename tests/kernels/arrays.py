"""Arrays that tests of several backends make and compare."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from kernels import reference


def same_bits(a: mx.array, b: mx.array) -> bool:
    """Equality by bits: unlike `==`, it tells -0 from 0 and takes a NaN for itself."""
    return a.shape == b.shape and a.dtype == b.dtype and stored(a) == stored(b)


def stored(a: mx.array) -> bytes:
    """An array's bytes; NumPy has no bfloat16."""
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a).tobytes()


def floats(a: mx.array) -> np.ndarray:
    """An array of any type of floats as float32."""
    return np.array(a.astype(mx.float32))


def close(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> bool:
    """Whether no value of a is further from b's than `tolerance` of b's largest."""
    x, y = np.array(a), np.array(b)
    return bool(np.abs(x - y).max() <= tolerance * np.abs(y).max())


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng([seed, *shape]).normal(0, 1, shape).astype(np.float32))


def random_ternary(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, int8 [n, k], and scales, float32 [n]."""
    rng = np.random.default_rng([seed, n, k])
    return rng.integers(-1, 2, (n, k)).astype(np.int8), rng.uniform(0.01, 2, n).astype(np.float32)


def weights_of(backend: Any, kind: str, n: int, k: int) -> tuple[Any, Any]:
    """A backend's weight and the reference's. kind: "ternary", "int8" or a type of floats."""
    if kind == "ternary":
        pair = random_ternary(n, k)
        return backend.prepare_ternary(*pair), reference.prepare_ternary(*pair)
    data = normal(n, k, seed=3)
    if kind == "int8":
        return backend.prepare_int8(data), reference.prepare_int8(data)
    data = data.astype(getattr(mx, kind))
    return backend.prepare_dense(data), reference.prepare_dense(data)
