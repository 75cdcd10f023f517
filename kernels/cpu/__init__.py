"""The native CPU backend: the operations of `kernels.reference` as C++ primitives of MLX.

BitLinear equals the reference bit for bit; every row's bits are its own, however many rows a call
has. Importing raises ImportError where the extension was not built, or was built for another MLX.
The environment variables BITDRAFT_ISA (amx, avx512vnni, avx2, neondot, portable) and BITDRAFT_THREADS
override what the processor offers.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.device import processors
from kernels.errors import UserError
from kernels.openblas import find_openblas
from kernels.ops import (
    CACHED,
    AttentionShape,
    DenseWeight,
    Epilogue,
    Int8Weight,
    Layer,
    Spans,
    TernaryWeight,
    Weight,
)

_RUNNING: str = mx.__version__  # type: ignore[attr-defined]
_REBUILD = "build it, in bitdraft's folder, with: pip install --force-reinstall --no-deps --editable ."

if importlib.util.find_spec("kernels.cpu._native") is None:
    raise ImportError(f"the extension was not built, for want of a C++ compiler perhaps; {_REBUILD}")
try:
    from kernels.cpu import _native
except ImportError as error:
    raise ImportError(f"the extension was built for another MLX than {_RUNNING}: {error}; {_REBUILD}") from error
# A nearby version may have all the symbols and yet other data structures.
if _RUNNING.split("+")[0].split(".dev")[0] != _native.mlx_version:
    raise ImportError(f"the extension was built for MLX {_native.mlx_version}, not {_RUNNING}; {_REBUILD}")
# Sources that changed since, as after `git pull`, may ask more of it than it has.
_sources = sorted(
    file for file in (Path(__file__).parent / "native").glob("*") if file.suffix in (".cpp", ".h", ".inl")
)
_digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in _sources)
if _sources and hashlib.sha256(_digests.encode()).hexdigest() != getattr(_native, "sources", None):
    raise ImportError(f"the extension was built from other sources than those beside it; {_REBUILD}")
if (_isa := os.environ.get("BITDRAFT_ISA")) and _isa not in _native.available_isas():
    raise UserError(f"BITDRAFT_ISA={_isa}: this processor has {', '.join(_native.available_isas())}")


def default_threads() -> int:
    """Threads of a loop: BITDRAFT_THREADS, or the processors that this process may use."""
    wanted, most = os.environ.get("BITDRAFT_THREADS"), _native.max_threads
    if not wanted:
        return min(processors(), most)
    if not (wanted.isdecimal() and 0 < int(wanted) <= most):
        raise UserError(f"BITDRAFT_THREADS={wanted}: must be a number from 1 to {most}")
    return int(wanted)


_native.set_threads(default_threads())
_native.take_short_slices()
_native.keep_freed_memory()

NAME = "cpu"
_OPENBLAS_THREADS = "OPENBLAS_NUM_THREADS"
ROUNDED_AT_ONCE = 512  # outputs of an int8 weight: so many float copies stay in cache, a head's would take gigabytes

_EPILOGUES: dict[str | None, int] = {None: 0, "relu2_mul": 1, "silu_mul": 2}


def prepare_ternary(ternary: np.ndarray, scale: np.ndarray) -> TernaryWeight:
    """ternary: int8 [n, k] in {-1, 0, 1}; scale: float32 [n]. Two bits a weight (native/kernels.h)."""
    n, k = ternary.shape
    tiles = _native.pack_ternary(np.ascontiguousarray(ternary, dtype=np.int8))
    return TernaryWeight(tiles, mx.array(np.ascontiguousarray(scale, dtype=np.float32)), n, k)


def prepare_dense(weight: mx.array) -> DenseWeight:
    """weight: bfloat16 or float32 [n, k]."""
    n, k = weight.shape
    data = mx.contiguous(weight)
    mx.eval(data)
    return DenseWeight(data, n, k)


def prepare_int8(weight: mx.array) -> Int8Weight:
    """weight: bfloat16 or float32 [n, k]. A byte a weight (native/kernels.h)."""
    n, k = weight.shape
    rounded, scales = np.empty((n, k), np.int8), []
    for start in range(0, n, ROUNDED_AT_ONCE):
        data, scale = reference.round_int8(weight[start : start + ROUNDED_AT_ONCE])
        rounded[start : start + ROUNDED_AT_ONCE] = np.array(data)
        scales.append(scale)
    return Int8Weight(_native.pack_int8(rounded), mx.contiguous(mx.concatenate(scales)), n, k)


def quantize_rows(x: mx.array, norm: mx.array | None = None, eps: float = 0.0) -> tuple[mx.array, mx.array]:
    """As `reference.quantize_rows`; without a norm, the same bits."""
    xq, s = _native.quantize_rows(x, norm, eps)
    return xq, s


def bitlinear(xq: mx.array, s: mx.array, weight: TernaryWeight) -> mx.array:
    """As `reference.bitlinear`, the same bits."""
    return _native.bitlinear(xq, s, weight.data, weight.scale, weight.k)


def int8_linear(xq: mx.array, s: mx.array, weight: Int8Weight) -> mx.array:
    """As `reference.int8_linear`, the same bits."""
    return _native.int8_product(xq, s, weight.data, weight.scale, weight.k)


def linear(
    x: mx.array,
    weight: Weight,
    *,
    norm: mx.array | None = None,
    eps: float = 0.0,
    epilogue: Epilogue | None = None,
    residual: mx.array | None = None,
) -> mx.array:
    """As `reference.linear`, in one operation."""
    if isinstance(weight, TernaryWeight):
        return _native.ternary_linear(x, weight.data, weight.scale, weight.k, norm, eps, _EPILOGUES[epilogue], residual)
    if isinstance(weight, Int8Weight):
        return _native.int8_linear(x, weight.data, weight.scale, weight.k, norm, eps, _EPILOGUES[epilogue], residual)
    return _native.dense_linear(x, weight.data, norm, eps, _EPILOGUES[epilogue], residual)


def attention(
    qkv: mx.array, k_cache: mx.array, v_cache: mx.array, spans: Spans, shape: AttentionShape
) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.attention`, and rows' bits are their own however many there are. The caches are updated in place
    when the caller keeps no other reference to them, and copied otherwise."""
    out, k_new, v_new = _native.attention(
        qkv,
        k_cache,
        v_cache,
        spans.offsets,
        spans.counts,
        shape.heads,
        shape.kv_heads,
        shape.inverse_frequency,
        shape.scale,
    )
    return out, k_new, v_new


def attention_packed(qkv: mx.array, segments: np.ndarray, shape: AttentionShape) -> mx.array:
    """As `reference.attention_packed`: each segment is a sequence of its own."""
    b, t, width = qkv.shape
    flat = qkv.reshape(b * t, width)
    starts = np.ones((b, t), bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    borders = [*np.flatnonzero(starts).tolist(), b * t]
    outputs = []
    for start, end in itertools.pairwise(borders):
        cache = mx.zeros((2, 1, shape.kv_heads, end - start, shape.head_dim), CACHED)
        outputs.append(attention(flat[start:end], cache[0], cache[1], Spans((0,), (end - start,)), shape)[0])
    return mx.concatenate(outputs).reshape(b, t, -1)


def argmax(x: mx.array) -> mx.array:
    """As `reference.argmax`."""
    return _native.argmax(x)


def choose(logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array:
    """As `reference.choose`; sums are rounded in another order."""
    return _native.choose(logits, temperature, uniform)


def top_k(logits: mx.array, k: int, temperatures: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.top_k`."""
    ids, top, lse = _native.top_k(logits, k, list(temperatures))
    return ids, top, lse


def clock(x: mx.array) -> mx.array:
    """When x had been computed: `time.perf_counter_ns`, int64, not evaluated."""
    return _native.clock(x)


class _Fused:
    """Operations over all of a model, of which each costs Python and MLX what one over a single product costs."""

    def __init__(
        self,
        *,
        before: Sequence[tuple[Weight, mx.array]] = (),
        layers: Sequence[Layer],
        after: Sequence[tuple[Weight, mx.array | None]],
        embedding: mx.array,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> None:
        """before, after: products with their norms' weights (native/fused_step.h)."""
        embedding, frequency = mx.contiguous(embedding), mx.contiguous(shape.inverse_frequency)
        mx.eval(embedding, frequency)
        products: list[tuple[Weight, mx.array | None]] = []
        for layer in layers:
            products += [
                (layer.qkv, layer.input_norm),
                (layer.o, layer.attention_sub_norm),
                (layer.gate_up, layer.post_norm),
                (layer.down, layer.ffn_sub_norm),
            ]
        self._around = embedding, frequency, shape.heads, shape.kv_heads, shape.scale, _EPILOGUES[epilogue], eps
        self._products = [[_linear_of(weight, norm) for weight, norm in part] for part in (before, products, after)]
        self._model = _native.fused_model(*self._around, *self._products)

    def _greedy_tokens(
        self,
        tokens: Sequence[int],
        states: Sequence[mx.array],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """One operation, since MLX holds the caches of a step until it has run, so that one queued behind it would copy
        them."""
        chosen, *caches = _native.greedy_tokens(self._model, _ids(tokens), states, [*keys, *values], offset, count, d2t)
        keys[:], values[:] = caches[: len(keys)], caches[len(keys) :]
        return chosen


def _linear_of(weight: Weight, norm: mx.array | None) -> _native.Linear:
    scale = None if isinstance(weight, DenseWeight) else weight.scale
    norm = None if norm is None else mx.contiguous(norm)
    mx.eval([array for array in (scale, norm) if array is not None])
    return _native.make_linear(weight.data, scale, weight.n, weight.k, norm)


class CpuFusedStep(_Fused):
    """kernels.ops.FusedStep, with the bits of the single operations."""

    EXACT = True
    TAPS = True

    def __init__(
        self,
        *,
        layers: Sequence[Layer],
        embedding: mx.array,
        final_norm: mx.array,
        head: Weight,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> None:
        """layers: of this backend; embedding: bfloat16 or float32 [vocab, hidden]."""
        super().__init__(
            layers=layers,
            after=[(head, final_norm)],
            embedding=embedding,
            shape=shape,
            epilogue=epilogue,
            eps=eps,
        )

    def share_weights(self, layers: Sequence[Layer]) -> list[Layer]:
        """The layers as they are: the step holds the same arrays."""
        return list(layers)

    def __call__(
        self,
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        taps: Sequence[int] = (),
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """As the protocol says; the caches are updated in place when nobody else holds them, as in `attention`."""
        layers = len(keys)
        logits, *rest = _native.fused_step(self._model, _ids(tokens), [*keys, *values], offset, taps)
        keys[:], values[:] = rest[:layers], rest[layers : 2 * layers]
        return logits, dict(zip(taps, rest[2 * layers :], strict=True))

    def greedy_tokens(
        self,
        tokens: Sequence[int],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """As the protocol says."""
        return self._greedy_tokens(tokens, (), keys, values, offset, count, d2t)

    def choose_tokens(
        self,
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        sequences: Sequence[int],
        offsets: Sequence[int],
        temperature: np.ndarray,
        uniform: np.ndarray,
    ) -> mx.array:
        """As the protocol says; caches as in a call."""
        chosen, *caches = _native.choose_tokens(
            self._model, _ids(tokens), [*keys, *values], sequences, offsets, temperature.tolist(), uniform.tolist()
        )
        keys[:], values[:] = caches[: len(keys)], caches[len(keys) :]
        return chosen


def _ids(tokens: Sequence[int] | mx.array) -> mx.array:
    return tokens.astype(mx.int32) if isinstance(tokens, mx.array) else mx.array(list(tokens), mx.int32)


fused_step = CpuFusedStep


class CpuFusedReader(_Fused):
    """kernels.ops.FusedReader, with the bits of the single operations but for the norms, for which
    `kernels.reference` sums in another order."""

    def __init__(
        self,
        *,
        fusion: Weight,
        feature_norms: Sequence[mx.array],
        input: Weight,
        embedding_norm: mx.array,
        state_norm: mx.array,
        layers: Sequence[Layer],
        final_norm: mx.array,
        output: Weight | None,
        head: Weight,
        embedding: mx.array,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> None:
        """As the protocol says, the weights of this backend."""
        self._final_norm = final_norm
        super().__init__(
            before=[
                (fusion, mx.concatenate(list(feature_norms))),
                (input, mx.concatenate([embedding_norm, state_norm])),
            ],
            layers=layers,
            after=[(head, final_norm)] if output is None else [(output, final_norm), (head, None)],
            embedding=embedding,
            shape=shape,
            epilogue=epilogue,
            eps=eps,
        )

    def greedy_tokens(
        self,
        tokens: Sequence[int],
        states: Sequence[mx.array],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """As the protocol says."""
        return self._greedy_tokens(tokens, states, keys, values, offset, count, d2t)

    def with_head(self, head: Weight) -> Self:
        """As the protocol says."""
        made = copy.copy(self)
        before, layers, (*between, _) = self._products
        made._products = [before, layers, [*between, _linear_of(head, None if between else self._final_norm)]]
        made._model = _native.fused_model(*made._around, *made._products)
        return made


fused_reader = CpuFusedReader


def use_fast_blas() -> bool:
    """Let MLX's float32, float64 and complex products use the OpenBLAS of the wheel scipy-openblas32.

    Works at any time, more than once. Returns False, and changes nothing, without that wheel.
    """
    if _native.blas_installed():
        return True
    library = find_openblas()
    if library is None:
        return False
    # It would start threads of its own as it is loaded, and they spin at first.
    told = os.environ.get(_OPENBLAS_THREADS)
    os.environ[_OPENBLAS_THREADS] = "1"
    try:
        return _native.install_blas(str(library)) > 0
    except RuntimeError as error:
        warnings.warn(f"{library}: {error}; float products will be slow", stacklevel=2)
        return False
    finally:
        if told is None:
            del os.environ[_OPENBLAS_THREADS]
        else:
            os.environ[_OPENBLAS_THREADS] = told


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """out = a b, once `use_fast_blas` has returned True.

    a: float32 [m, k], b: float32 [k, n], each with its rows or its columns contiguous; out: float32 [m, n], rows
    contiguous, no part of a or b.
    """
    _native.matmul(a, b, out)
