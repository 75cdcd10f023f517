"""Which backend runs here, and why: chosen once, self-tested at first use."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Collection, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np

from kernels import reference, tuning
from kernels.errors import UserError
from kernels.reference import AttentionShape, DenseWeight, Epilogue, Int8Weight, TernaryWeight, Weight
from kernels.self_test import operation_faults, self_test

CHOICES = ("reference", "cpu", "metal", "cuda")

_TERNARY = ("prepare_ternary", "bitlinear", "quantize_rows")
_INT8 = ("prepare_int8", "int8_linear", "quantize_rows")
# What the reference does instead of a backend that fails a check, beside the `linear` of these weights.
STAND_INS: dict[str, tuple[str, ...]] = {
    "bitlinear": _TERNARY,
    "linear, ternary": _TERNARY,
    "int8_linear": _INT8,
    "linear, int8": _INT8,
    "linear, float": ("prepare_dense",),
    "attention": ("attention", "attention_packed"),
    "attention, batch": ("attention_batch",),
    "argmax": ("argmax",),
    "whole step": (),
}
MADE_BY = {"prepare_ternary": TernaryWeight, "prepare_int8": Int8Weight, "prepare_dense": DenseWeight}


class WholeStep(Protocol):
    """A model's decoding step of 1..8 rows as one operation (kernels.cuda.step, kernels.cpu)."""

    def __call__(
        self, tokens: Sequence[int] | mx.array, keys: list[mx.array], values: list[mx.array], offset: int
    ) -> mx.array: ...

    def continuation(
        self,
        tokens: Sequence[int],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        kept: mx.array | None,
    ) -> mx.array: ...

    def share_weights(self, layers: Sequence[Any]) -> list[Any]: ...


class Backend(Protocol):
    """The operations a backend offers; `kernels.reference` defines each."""

    NAME: str

    def prepare_ternary(self, ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight: ...

    def prepare_dense(self, weight: mx.array) -> DenseWeight: ...

    def prepare_int8(self, weight: mx.array) -> Int8Weight: ...

    def quantize_rows(
        self, x: mx.array, norm: mx.array | None = None, eps: float = 0.0
    ) -> tuple[mx.array, mx.array]: ...

    def bitlinear(self, xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array: ...

    def int8_linear(self, xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array: ...

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

    def argmax(self, x: mx.array) -> mx.array: ...

    def clock(self, x: mx.array) -> mx.array | None: ...

    def whole_step(
        self,
        *,
        layers: Sequence[Any],
        embedding: mx.array,
        final_norm: mx.array,
        head: Weight,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> WholeStep | None: ...


@cache
def backend() -> Backend:
    """The backend for this process. `BITDRAFT_KERNELS=reference|cpu|metal|cuda` forces one.

    One that cannot be loaded, or operations that fail their self-test, are replaced by the reference with one warning,
    unless it was asked for. What `python -m kernels tune` found here is applied.
    """
    chosen, reason = choose()
    if reason:
        warnings.warn(f"{reason}; using the slow reference{'' if chosen is reference else ' for these'}", stacklevel=2)
    if chosen is reference:
        _use_fast_blas()
    else:
        tuning.apply(chosen)
    return chosen


def device_backend() -> str:
    """The backend made for what MLX runs on: "cpu", "metal" or "cuda"."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def choose() -> tuple[Backend, str | None]:
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
            _use_fast_blas()
        faults = {name: fault for name, fault in operation_faults(candidate) if fault is not None}
        if not faults:
            return candidate, None
        reason = f"the {device} kernels fail their self-test ({'; '.join(faults.values())})"
    except ImportError as error:
        faults, reason = {}, f"the native {device} kernels cannot be loaded ({error})"
    if wanted:
        raise UserError(f"BITDRAFT_KERNELS={wanted}: {reason}")
    return (mended(candidate, faults) if faults else reference), reason


def mended(native: Backend, failed: Collection[str]) -> Backend:
    """`native` with the reference in place of what failed these checks; the reference where no product is left.

    Weights lie as their backend wants them, so what makes a kind of weight and all that reads it change together.
    A whole step goes with any of its parts.
    """
    replaced = {"whole_step"}.union(*(STAND_INS[check] for check in failed))
    kinds = tuple(kind for maker, kind in MADE_BY.items() if maker in replaced)
    if len(kinds) == len(MADE_BY):
        return reference

    def linear(x: mx.array, weight: Weight, **options: Any) -> mx.array:
        return (reference if isinstance(weight, kinds) else native).linear(x, weight, **options)

    operations = {name: getattr(native, name) for name in dir(native) if not name.startswith("_")}
    operations |= {name: getattr(reference, name) for name in replaced} | {"linear": linear}
    found = cast(Backend, SimpleNamespace(**operations))
    return found if self_test(found) is None else reference


def _use_fast_blas() -> None:
    """Large products on Linux CPUs deserve a fast BLAS, whichever backend runs."""
    try:
        from kernels.cpu import use_fast_blas

        use_fast_blas()
    except ImportError:
        pass
