"""Which backend runs here, and why: chosen once, self-tested at first use."""

from __future__ import annotations

import os
import platform
import warnings
from functools import cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.errors import UserError
from kernels.reference import AttentionShape, DenseWeight, Epilogue, TernaryWeight, Weight

CHOICES = ("reference", "cpu")


class Backend(Protocol):
    """The operations a backend offers; `kernels.reference` defines each."""

    NAME: str

    def prepare_ternary(self, ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight: ...

    def prepare_dense(self, weight: mx.array) -> DenseWeight: ...

    def quantize_rows(
        self, x: mx.array, norm: mx.array | None = None, eps: float = 0.0
    ) -> tuple[mx.array, mx.array]: ...

    def bitlinear(self, xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array: ...

    def linear(
        self,
        x: mx.array,
        weight: Weight,
        *,
        norm: mx.array | None = None,
        eps: float = 0.0,
        epilogue: Epilogue | None = None,
        residual: mx.array | None = None,
    ) -> mx.array: ...

    def attention(
        self, qkv: mx.array, k_cache: mx.array, v_cache: mx.array, offset: int, shape: AttentionShape
    ) -> tuple[mx.array, mx.array, mx.array]: ...

    def attention_batch(
        self, qkv: mx.array, k_cache: mx.array, v_cache: mx.array, positions: mx.array, shape: AttentionShape
    ) -> tuple[mx.array, mx.array, mx.array]: ...


@cache
def backend() -> Backend:
    """The backend for this process. `BITDRAFT_KERNELS=reference|cpu` forces one.

    A backend that cannot be loaded, or whose BitLinear differs from the reference in one bit, is
    replaced by the reference with one warning.
    """
    wanted = os.environ.get("BITDRAFT_KERNELS", "")
    if wanted and wanted not in CHOICES:
        raise UserError(f"BITDRAFT_KERNELS={wanted}: choose one of {', '.join(CHOICES)}")
    on_cpu = mx.default_device() == mx.cpu
    if wanted == "reference" or not (on_cpu or wanted):
        return _reference()
    if not on_cpu:
        raise UserError("BITDRAFT_KERNELS=cpu: MLX runs on a GPU here")
    if platform.system() != "Linux" and not wanted:
        return _reference()
    try:
        from kernels import cpu
    except ImportError as error:
        warnings.warn(
            f"the native CPU kernels cannot be loaded ({error}); using the slow reference."
            " Rebuild them with: pip install --force-reinstall --no-deps .",
            stacklevel=2,
        )
        return _reference()
    cpu.use_fast_blas()
    if (fault := self_test(cpu)) is not None:
        warnings.warn(f"the native CPU kernels fail their self-test ({fault}); using the slow reference.", stacklevel=2)
        return _reference()
    return cpu


def _reference() -> Backend:
    """The reference for small rows; its large products still deserve a fast BLAS on Linux CPUs."""
    try:
        from kernels.cpu import use_fast_blas

        use_fast_blas()
    except ImportError:
        pass
    return reference


def self_test(candidate: Backend) -> str | None:
    """Compare BitLinear by bits with the reference, and rows alone with rows together.

    Returns None, or which operation differs. Costs a few milliseconds.
    """
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (24, 68)).astype(np.int8)
    scale = rng.uniform(0.1, 1, 24).astype(np.float32)
    x = mx.array(rng.normal(0, 1, (8, 68)).astype(np.float32))
    ours = candidate.prepare_ternary(ternary, scale)
    xq, s = reference.quantize_rows(x)
    expected = reference.bitlinear(xq, s, reference.prepare_ternary(ternary, scale))
    if not mx.array_equal(candidate.bitlinear(xq, s, ours), expected).item():
        return "bitlinear differs from the reference"
    together = candidate.linear(x, ours)
    alone = mx.concatenate([candidate.linear(x[i : i + 1], ours) for i in range(8)])
    if not mx.array_equal(together, alone).item():
        return "linear gives a row other bits among others than alone"
    return None
