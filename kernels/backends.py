"""Which backend runs here, and why: chosen once, self-tested at first use."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from functools import cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.errors import UserError
from kernels.reference import AttentionShape, DenseWeight, Epilogue, TernaryWeight, Weight

CHOICES = ("reference", "cpu")
TOLERANCE = 1e-5  # of the largest value: float32 sums in another order


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

    def attention_packed(self, qkv: mx.array, document: np.ndarray, shape: AttentionShape) -> mx.array: ...

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
    """Compare BitLinear by bits with the reference, the float operations within TOLERANCE of it, and
    by bits the rows of a call with the same rows alone.

    Returns None, or which operation differs. Costs a few milliseconds.
    """
    rng = np.random.default_rng(0)

    def floats(*shape: int) -> mx.array:
        return mx.array(rng.normal(0, 1, shape).astype(np.float32))

    ternary = rng.integers(-1, 2, (24, 68)).astype(np.int8)
    scale = rng.uniform(0.1, 1, 24).astype(np.float32)
    x, norm, residual = floats(8, 68), floats(68), floats(8, 24)
    ours, defined = candidate.prepare_ternary(ternary, scale), reference.prepare_ternary(ternary, scale)
    xq, s = reference.quantize_rows(x)
    if not _equal(candidate.bitlinear(xq, s, ours), reference.bitlinear(xq, s, defined)):
        return "bitlinear differs from the reference"
    if not _equal(candidate.linear(x, ours), reference.linear(x, defined)):
        return "linear over ternary weights differs from the reference"
    dense = floats(24, 68).astype(mx.bfloat16)
    for weight in (ours, candidate.prepare_dense(dense)):
        kind = "ternary" if weight is ours else "float"
        together = candidate.linear(x, weight, norm=norm, eps=1e-5, residual=residual)
        alone = [
            candidate.linear(x[i : i + 1], weight, norm=norm, eps=1e-5, residual=residual[i : i + 1]) for i in range(8)
        ]
        if not _equal(together, mx.concatenate(alone)):
            return f"linear over {kind} weights gives a row other bits among others than alone"
    if not _close(
        together, reference.linear(x, reference.prepare_dense(dense), norm=norm, eps=1e-5, residual=residual)
    ):
        return "linear over float weights differs from the reference"
    return _test_attention(candidate, floats)


def _test_attention(candidate: Backend, floats: Callable[..., mx.array]) -> str | None:
    m, offset, shape = 8, 5, AttentionShape(4, 2, 32, mx.array(0.5 ** np.arange(16, dtype=np.float32)))
    qkv, keys, values = floats(m, 8 * 32), floats(2, 16, 32), floats(2, 16, 32)
    expected = reference.attention(qkv, mx.array(keys), mx.array(values), offset, shape)[0]
    together = candidate.attention(qkv, mx.array(keys), mx.array(values), offset, shape)[0]
    alone = []
    for i in range(m):
        out, keys, values = candidate.attention(qkv[i : i + 1], keys, values, offset + i, shape)
        alone.append(out)
    if not _equal(together, mx.concatenate(alone)):
        return "attention gives a row other bits among others than alone"
    return None if _close(together, expected) else "attention differs from the reference"


def _equal(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b).item())


def _close(a: mx.array, b: mx.array) -> bool:
    return bool((mx.abs(a - b).max() <= TOLERANCE * mx.abs(b).max()).item())
