"""Whether a backend computes what `kernels.reference` defines, found out at first use.

Every kernel runs: few rows and many, each kind of weight with its norm and epilogues, attention at several widths, a
whole step. Shapes are tiny and fill no tile evenly; those of int8 products, float rows and batched attention are just
large enough that a CPU shares them among its threads. BitLinear and int8 products are compared by bits;
float operations within TOLERANCE; and the rows of a call, by bits, with the same rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.reference import SMALL_ROWS, AttentionShape, Epilogue, Weight

if TYPE_CHECKING:
    from kernels.backends import Backend

TOLERANCE = 1e-5  # of the largest value: float32 sums in another order
ROUNDED = 0.02  # the same where another order may have rounded an int8 to its neighbour
EPS = 0.5  # as large as the squares it is added to, so that it cannot be left out unseen
MANY = 40  # rows: more than the kernels for a few take
EPILOGUES: tuple[Epilogue | None, ...] = (None, "relu2_mul", "silu_mul")


def self_test(candidate: Backend) -> str | None:
    """None, or what is wrong with the first operation that fails.

    Costs some milliseconds on a CPU, and seconds where a GPU's kernels are compiled for it.
    """
    return next((fault for _, fault in operation_faults(candidate) if fault is not None), None)


def operation_faults(candidate: Backend) -> Iterator[tuple[str, str | None]]:
    """The self-test operation by operation: its name, and None or what is wrong with it."""
    for name, check in CHECKS.items():
        try:
            what = check(candidate, np.random.default_rng(0))
            fault = None if what is None else f"{name} {what}"
        except Exception as error:  # a compiler's complaint about a kernel has no type of its own
            fault = f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"
        yield name, fault


DIFFERS = "differs from the reference"
OTHER_ROWS = "gives a row other bits among others than alone"


def _bitlinear(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = _ternary(rng)
    ours, defined = candidate.prepare_ternary(*weight), reference.prepare_ternary(*weight)
    for m in (1, 4, SMALL_ROWS, MANY):
        xq, s = reference.quantize_rows(_floats(rng, m, 68))
        if not _equal(candidate.bitlinear(xq, s, ours), reference.bitlinear(xq, s, defined)):
            return DIFFERS
    return None


def _int8_linear(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = _floats(rng, 56, 100).astype(mx.bfloat16)
    ours, defined = candidate.prepare_int8(weight), reference.prepare_int8(weight)
    for m in (1, 4, SMALL_ROWS, MANY):
        xq, s = reference.quantize_rows(_floats(rng, m, 100))
        if not _equal(candidate.int8_linear(xq, s, ours), reference.int8_linear(xq, s, defined)):
            return DIFFERS
    return None


def _linear_ternary(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight, x = _ternary(rng), _floats(rng, SMALL_ROWS, 68)
    ours, defined = candidate.prepare_ternary(*weight), reference.prepare_ternary(*weight)
    if not _equal(candidate.linear(x, ours), reference.linear(x, defined)):
        return DIFFERS
    return _linear(candidate, ours, defined, rng, ROUNDED)


def _linear_int8(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = _floats(rng, 24, 68).astype(mx.bfloat16)
    return _linear(candidate, candidate.prepare_int8(weight), reference.prepare_int8(weight), rng, ROUNDED)


def _linear_float(candidate: Backend, rng: np.random.Generator) -> str | None:
    weight = _floats(rng, 40, 132).astype(mx.bfloat16)
    return _linear(candidate, candidate.prepare_dense(weight), reference.prepare_dense(weight), rng, TOLERANCE)


def _linear(
    candidate: Backend, ours: Weight, defined: Weight, rng: np.random.Generator, tolerance: float
) -> str | None:
    """With a norm, each epilogue or a residual, a few rows and many."""
    norm, most, residuals = _floats(rng, defined.k), _floats(rng, MANY, defined.k), _floats(rng, MANY, defined.n)
    cases: list[tuple[int, Epilogue | None]] = [(1, None), (4, None)]
    cases += [(m, epilogue) for m in (SMALL_ROWS, MANY) for epilogue in EPILOGUES]
    for m, epilogue in cases:

        def rows(ops: Backend, weight: Weight, first: int, last: int, gate: Epilogue | None = epilogue) -> mx.array:
            residual = residuals[first:last] if gate is None else None
            return ops.linear(most[first:last], weight, norm=norm, eps=EPS, epilogue=gate, residual=residual)

        y = rows(candidate, ours, 0, m)
        # Many rows of floats are left to a library, which may multiply with fewer bits than float32 has.
        if not _close(y, rows(reference, defined, 0, m), tolerance if m <= SMALL_ROWS else ROUNDED):
            return DIFFERS
        if m <= SMALL_ROWS and not _equal(y, mx.concatenate([rows(candidate, ours, i, i + 1) for i in range(m)])):
            return OTHER_ROWS
    return None


def _attention(candidate: Backend, rng: np.random.Generator) -> str | None:
    for dim, offset in ((32, 5), (64, 70), (128, 0)):
        shape = AttentionShape(4, 2, dim, mx.array(0.5 ** np.arange(dim // 2, dtype=np.float32)))
        qkv = _floats(rng, SMALL_ROWS, 8 * dim)
        keys, values = _floats(rng, 2, 96, dim), _floats(rng, 2, 96, dim)
        with mx.stream(mx.cpu):  # a GPU's library may multiply with fewer bits than float32 has
            expected = reference.attention(qkv, mx.array(keys), mx.array(values), offset, shape)
            mx.eval(expected)
        together = candidate.attention(qkv, mx.array(keys), mx.array(values), offset, shape)
        alone = []
        for i in range(SMALL_ROWS):
            out, keys, values = candidate.attention(qkv[i : i + 1], keys, values, offset + i, shape)
            alone.append(out)
        if not _equal(together[0], mx.concatenate(alone)):
            return OTHER_ROWS
        if not all(_close(ours, defined, TOLERANCE) for ours, defined in zip(together, expected, strict=True)):
            return DIFFERS
    return None


def _attention_batch(candidate: Backend, rng: np.random.Generator) -> str | None:
    if candidate.attention_batch == reference.attention_batch:
        return None  # MLX's own, which a GPU would take seconds to compile
    shape = AttentionShape(4, 2, 32, mx.array(0.5 ** np.arange(16, dtype=np.float32)))
    qkv, keys, values = _floats(rng, 4, 8 * 32), _floats(rng, 4, 2, 96, 32), _floats(rng, 4, 2, 96, 32)
    positions = mx.array([95, 0, 90, 88], mx.int32)
    with mx.stream(mx.cpu):
        expected = reference.attention_batch(qkv, keys, values, positions, shape)[0]
        mx.eval(expected)
    found = candidate.attention_batch(qkv, mx.array(keys), mx.array(values), positions, shape)[0]
    return None if _close(found, expected, TOLERANCE) else DIFFERS


def _argmax(candidate: Backend, rng: np.random.Generator) -> str | None:
    for x in (_floats(rng, 4, 68), mx.round(_floats(rng, 4, 68))):
        if candidate.argmax(x).tolist() != reference.argmax(x).tolist():
            return DIFFERS
    return None


def _whole_step(candidate: Backend, rng: np.random.Generator) -> str | None:
    """Two layers of 64, by the single operations of the reference and, where the backend has that, as one."""
    shape = AttentionShape(2, 1, 32, mx.array(0.5 ** np.arange(16, dtype=np.float32)))
    sizes = {"qkv": (128, 64), "o": (64, 64), "gate_up": (128, 64), "down": (64, 64)}
    norms = ("input_norm", "attention_sub_norm", "post_norm", "ffn_sub_norm")
    layers: dict[str, list[SimpleNamespace]] = {"ours": [], "defined": []}
    for _ in range(2):
        weights = {
            name: (rng.integers(-1, 2, size).astype(np.int8), np.full(size[0], 0.1, np.float32))
            for name, size in sizes.items()
        }
        shared = {name: mx.abs(_floats(rng, 64)) + 0.5 for name in norms}
        for whose, ops in (("ours", candidate), ("defined", reference)):
            matrices = {name: ops.prepare_ternary(*weight) for name, weight in weights.items()}
            layers[whose].append(SimpleNamespace(**matrices, **shared))
    embedding, final_norm = _floats(rng, 100, 64).astype(mx.bfloat16), mx.ones((64,))
    step = candidate.whole_step(
        layers=layers["ours"],
        embedding=embedding,
        final_norm=final_norm,
        head=candidate.prepare_dense(embedding),
        shape=shape,
        epilogue="relu2_mul",
        eps=EPS,
    )
    if step is None:
        return None
    tokens = [3, 99, 0]

    def steps(groups: list[list[int]]) -> mx.array:
        keys, values = ([mx.zeros((1, 16, 32)) for _ in range(2)] for _ in range(2))
        mx.eval(keys, values)
        at, logits = 0, []
        for group in groups:
            logits.append(step(group, keys, values, at))
            mx.eval(logits)
            at += len(group)
        return mx.concatenate(logits)

    together = steps([tokens])
    if not _equal(together, steps([[token] for token in tokens])):
        return OTHER_ROWS
    x = embedding[mx.array(tokens)].astype(mx.float32)
    with mx.stream(mx.cpu):
        for layer in layers["defined"]:
            qkv = reference.linear(x, layer.qkv, norm=layer.input_norm, eps=EPS)
            a = reference.attention(qkv, mx.zeros((1, 16, 32)), mx.zeros((1, 16, 32)), 0, shape)[0]
            x = reference.linear(a, layer.o, norm=layer.attention_sub_norm, eps=EPS, residual=x)
            h = reference.linear(x, layer.gate_up, norm=layer.post_norm, eps=EPS, epilogue="relu2_mul")
            x = reference.linear(h, layer.down, norm=layer.ffn_sub_norm, eps=EPS, residual=x)
        logits = reference.linear(x, reference.prepare_dense(embedding), norm=final_norm, eps=EPS)
        mx.eval(logits)
    return None if _close(together, logits, 2 * ROUNDED) else DIFFERS


def _floats(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.normal(0, 1, shape).astype(np.float32))


def _ternary(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(-1, 2, (24, 68)).astype(np.int8), rng.uniform(0.1, 1, 24).astype(np.float32)


def _equal(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b).item())


def _close(a: mx.array, b: mx.array, tolerance: float) -> bool:
    return bool((mx.abs(a - b).max() <= tolerance * mx.abs(b).max()).item())


CHECKS: dict[str, Callable[[Backend, np.random.Generator], str | None]] = {
    "bitlinear": _bitlinear,
    "int8_linear": _int8_linear,
    "linear, ternary": _linear_ternary,
    "linear, int8": _linear_int8,
    "linear, float": _linear_float,
    "attention": _attention,
    "attention, batch": _attention_batch,
    "argmax": _argmax,
    "whole step": _whole_step,
}
