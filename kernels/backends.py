"""Which backend runs here, and why: chosen once, self-tested at first use."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from kernels import reference, tuning
from kernels.errors import UserError
from kernels.reference import AttentionShape, DenseWeight, Epilogue, Int8Weight, TernaryWeight, Weight
from kernels.self_test import self_test

CHOICES = ("reference", "cpu", "metal", "cuda")


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

    One that cannot be loaded, or that fails its self-test, is replaced by the reference with one warning, unless it was
    asked for. What `python -m kernels tune` found here is applied.
    """
    chosen, reason = choose()
    if chosen is reference:
        if reason:
            warnings.warn(f"{reason}; using the slow reference", stacklevel=2)
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
    """The backend, and why it is the reference where nobody asked for that (else None).

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
        fault = self_test(candidate)
        reason = None if fault is None else f"the {device} kernels fail their self-test ({fault})"
    except ImportError as error:
        reason = f"the native {device} kernels cannot be loaded ({error})"
    if reason is None:
        return candidate, None
    if wanted:
        raise UserError(f"BITDRAFT_KERNELS={wanted}: {reason}")
    return reference, reason


def _use_fast_blas() -> None:
    """Large products on Linux CPUs deserve a fast BLAS, whichever backend runs."""
    try:
        from kernels.cpu import use_fast_blas

        use_fast_blas()
    except ImportError:
        pass
