"""Which backend runs here, and why: chosen once, self-tested at first use."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Callable, Collection
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import numpy as np

from kernels import reference, tuning
from kernels.errors import UserError
from kernels.ops import Backend, DenseWeight, Int8Weight, TernaryWeight, Weight
from kernels.self_test import operation_faults, self_test

CHOICES = ("reference", "cpu", "metal", "cuda")

_TERNARY = ("prepare_ternary", "bitlinear", "quantize_rows")
_INT8 = ("prepare_int8", "int8_linear", "quantize_rows")
# Operations that fall back to the reference where a check fails, beside the `linear` of these weights.
FALLBACKS: dict[str, tuple[str, ...]] = {
    "bitlinear": _TERNARY,
    "linear, ternary": _TERNARY,
    "int8_linear": _INT8,
    "linear, int8": _INT8,
    "linear, float": ("prepare_dense",),
    "attention": ("attention", "attention_packed"),
    "argmax": ("argmax",),
    "choose": ("choose",),
    "top_k": ("top_k",),
    "fused step": (),
    "fused reader": (),
}
MADE_BY = {"prepare_ternary": TernaryWeight, "prepare_int8": Int8Weight, "prepare_dense": DenseWeight}


@cache
def backend() -> Backend:
    """The backend for this process. `BITDRAFT_KERNELS=reference|cpu|metal|cuda` forces one.

    One that cannot be loaded, or operations that fail their self-test, are replaced by the reference with one warning,
    unless it was asked for. What `python -m kernels tune` found here is applied.
    """
    chosen, reason = select()
    if reason:
        warnings.warn(f"{reason}; using the slow reference{'' if chosen is reference else ' for these'}", stacklevel=2)
    if chosen is reference:
        use_fast_blas()
    else:
        tuning.apply(chosen)
    return chosen


def device_backend() -> str:
    """The backend made for what MLX runs on: "cpu", "metal" or "cuda"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def select() -> tuple[Backend, str | None]:
    """The backend, and why it is, in whole or in part, the reference where nobody asked for that (else None).

    Raises UserError where BITDRAFT_KERNELS asks for what cannot run here.
    """
    wanted = os.environ.get("BITDRAFT_KERNELS", "")
    if wanted and wanted not in CHOICES:
        raise UserError(f"BITDRAFT_KERNELS={wanted}: choose one of {', '.join(CHOICES)}")
    device = device_backend()
    if wanted == "reference":
        return reference, None
    if wanted and wanted != device:
        raise UserError(f"BITDRAFT_KERNELS={wanted}: MLX runs on {device} here")
    if device == "cpu" and platform.system() != "Linux" and not wanted:
        return reference, "MLX was told to run on this Mac's CPU, for which no native kernels are built"
    try:
        candidate: Backend = importlib.import_module(f"kernels.{device}")  # type: ignore[assignment]
        if device == "cpu":
            use_fast_blas()
        faults = {name: fault for name, fault in operation_faults(candidate) if fault is not None}
        if not faults:
            return candidate, None
        reason = f"the {device} kernels fail their self-test ({'; '.join(faults.values())})"
    except ImportError as error:
        faults, reason = {}, f"the native {device} kernels cannot be loaded ({error})"
    if wanted:
        raise UserError(f"BITDRAFT_KERNELS={wanted}: {reason}")
    return (with_fallbacks(candidate, faults) if faults else reference), reason


def with_fallbacks(native: Backend, failed: Collection[str]) -> Backend:
    """`native` with the reference in place of what failed these checks; the reference where no product is left.

    Weights lie as their backend wants them, so what makes a kind of weight and all that reads it change together.
    The fused operations go with any of their parts.
    """
    replaced = {"fused_step", "fused_reader"}.union(*(FALLBACKS[check] for check in failed))
    kinds = tuple(kind for maker, kind in MADE_BY.items() if maker in replaced)
    if len(kinds) == len(MADE_BY):
        return reference

    def linear(x: mx.array, weight: Weight, **options: Any) -> mx.array:
        return (reference if isinstance(weight, kinds) else native).linear(x, weight, **options)

    operations = {name: getattr(native, name) for name in dir(native) if not name.startswith("_")}
    operations |= {name: getattr(reference, name) for name in replaced} | {"linear": linear}
    found = cast(Backend, SimpleNamespace(**operations))
    return found if self_test(found) is None else reference


def use_fast_blas() -> bool:
    """Large products on Linux CPUs deserve a fast BLAS, whichever backend runs: MLX's wheels multiply float32 matrices
    there some 50 times slower. Returns whether there is one."""
    try:
        from kernels import cpu
    except ImportError:
        return False
    return cpu.use_fast_blas()


def numpy_matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """np.matmul of float32 matrices, on the threads of our own CPU operations where those are there.

    a: [m, k], b: [k, n]; out: [m, n] with contiguous rows, no part of the others. Beside other programs numpy's own
    threads lose time waiting for one another (kernels/cpu/native/blas.cpp).
    """
    out = np.empty((a.shape[0], b.shape[1]), np.float32) if out is None else out
    _numpy_product()(a, b, out)
    return out


@cache
def _numpy_product() -> Callable[[np.ndarray, np.ndarray, np.ndarray], object]:
    if not use_fast_blas():
        return np.matmul
    from kernels import cpu

    return cpu.matmul
