"""Which backend runs here, and why: chosen once, self-tested at first use."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from kernels import reference, tuning
from kernels.errors import UserError
from kernels.reference import AttentionShape, DenseWeight, Epilogue, Int8Weight, TernaryWeight, Weight

CHOICES = ("reference", "cpu", "metal", "cuda")
TOLERANCE = 1e-5  # of the largest value: float32 sums in another order


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
    ) -> mx.array | None: ...

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

    A backend that cannot be loaded, or whose BitLinear differs from the reference in one bit, is
    replaced by the reference with one warning. What `python -m kernels tune` found here is applied.
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

    Raises UserError where BITDRAFT_KERNELS asks for what this device cannot run.
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
    except ImportError as error:
        return reference, f"the native {device} kernels cannot be loaded ({error})"
    if device == "cpu":
        _use_fast_blas()
    fault = self_test(candidate)
    if fault is not None:
        return reference, f"the {device} kernels fail their self-test ({fault})"
    return candidate, None


def _use_fast_blas() -> None:
    """Large products on Linux CPUs deserve a fast BLAS, whichever backend runs."""
    try:
        from kernels.cpu import use_fast_blas

        use_fast_blas()
    except ImportError:
        pass


def self_test(candidate: Backend) -> str | None:
    """Compare BitLinear by bits with the reference, the float operations within TOLERANCE of it, and
    by bits the rows of a call with the same rows alone.

    Returns None, or what is wrong with the first operation that fails. Costs a few milliseconds, and seconds where a
    GPU's kernels are compiled for it.
    """
    return next((fault for _, fault in operation_faults(candidate) if fault is not None), None)


def operation_faults(candidate: Backend) -> Iterator[tuple[str, str | None]]:
    """The self-test operation by operation: its name, and None or what is wrong with it."""
    for name, check in _CHECKS.items():
        try:
            fault = check(candidate, np.random.default_rng(0))
        except Exception as error:  # a compiler's complaint about a kernel has no type of its own
            fault = f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
        yield name, fault


def _floats(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.normal(0, 1, shape).astype(np.float32))


def _ternary(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(-1, 2, (24, 68)).astype(np.int8), rng.uniform(0.1, 1, 24).astype(np.float32)


def _test_bitlinear(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight, x = _ternary(rng), _floats(rng, 8, 68)
    ours, defined = candidate.prepare_ternary(*weight), reference.prepare_ternary(*weight)
    xq, s = reference.quantize_rows(x)
    same = _equal(candidate.bitlinear(xq, s, ours), reference.bitlinear(xq, s, defined))
    return None if same else "bitlinear differs from the reference"


def _test_int8_linear(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = _floats(rng, 24, 68).astype(mx.bfloat16)
    xq, s = reference.quantize_rows(_floats(rng, 8, 68))
    ours, defined = candidate.prepare_int8(weight), reference.prepare_int8(weight)
    same = _equal(candidate.int8_linear(xq, s, ours), reference.int8_linear(xq, s, defined))
    return None if same else "int8_linear differs from the reference"


def _test_ternary(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight, x = _ternary(rng), _floats(rng, 8, 68)
    ours = candidate.prepare_ternary(*weight)
    if not _equal(candidate.linear(x, ours), reference.linear(x, reference.prepare_ternary(*weight))):
        return "linear over ternary weights differs from the reference"
    return _test_rows(candidate, ours, "ternary", x, _floats(rng, 68), _floats(rng, 8, 24))


def _test_int8(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = candidate.prepare_int8(_floats(rng, 24, 68).astype(mx.bfloat16))
    return _test_rows(candidate, weight, "int8", _floats(rng, 8, 68), _floats(rng, 68), _floats(rng, 8, 24))


def _test_float(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = _floats(rng, 24, 68).astype(mx.bfloat16)
    x, norm, residual = _floats(rng, 8, 68), _floats(rng, 68), _floats(rng, 8, 24)
    ours, defined = candidate.prepare_dense(weight), reference.prepare_dense(weight)
    y, expected = (
        ops.linear(x, prepared, norm=norm, eps=1e-5, residual=residual)
        for ops, prepared in ((candidate, ours), (reference, defined))
    )
    if not _close(y, expected):
        return "linear over float weights differs from the reference"
    return _test_rows(candidate, ours, "float", x, norm, residual)


def _test_rows(
    candidate: Backend, weight: Weight, kind: str, x: mx.array, norm: mx.array, residual: mx.array
) -> str | None:
    together = candidate.linear(x, weight, norm=norm, eps=1e-5, residual=residual)
    alone = [
        candidate.linear(x[i : i + 1], weight, norm=norm, eps=1e-5, residual=residual[i : i + 1]) for i in range(8)
    ]
    same = _equal(together, mx.concatenate(alone))
    return None if same else f"linear over {kind} weights gives a row other bits among others than alone"


def _test_attention(candidate: Backend, rng: np.random.Generator) -> str | None:
    m, offset, shape = 8, 5, AttentionShape(4, 2, 32, mx.array(0.5 ** np.arange(16, dtype=np.float32)))
    qkv, keys, values = _floats(rng, m, 8 * 32), _floats(rng, 2, 16, 32), _floats(rng, 2, 16, 32)
    with mx.stream(mx.cpu):  # a GPU's library may multiply with fewer bits than float32 has
        expected = reference.attention(qkv, mx.array(keys), mx.array(values), offset, shape)[0]
        mx.eval(expected)
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


_CHECKS: dict[str, Callable[[Backend, np.random.Generator], str | None]] = {
    "bitlinear": _test_bitlinear,
    "int8_linear": _test_int8_linear,
    "linear, ternary": _test_ternary,
    "linear, int8": _test_int8,
    "linear, float": _test_float,
    "attention": _test_attention,
}
