"""Whether a backend computes what `kernels.reference` defines, found out at first use.

What runs: products of each kind of weight with few rows and many, behind a norm and with each epilogue or a residual;
attention of several sequences at three head dimensions; argmax, choices of tokens and the top of logits; and, where the
backend has them, fused steps of small models: of ternary weights with sub-norms, squared ReLU and a float head, three
tokens at once and one by one; of int8 weights with SiLU and a trimmed int8 head, tokens one by one and greedy ones; and
a fused reader of ternary weights. A CPU, which has fused operations of float weights too, runs such a step with SiLU in
all three ways, and such a reader. What is not run: the shapes of a user's model, and steps of 2 or 4..8 tokens. On CUDA
each of the five fused operations is a second's compilation, of all kernels of the self-test ten seconds on a Cascade
Lake core, once: what was compiled is kept on disk.

Shapes are tiny and fill no tile evenly; those of int8 products, float rows and attention are just large enough that a
CPU shares them among its threads. BitLinear and int8 products are compared by bits; float operations within TOLERANCE;
and the rows of a call, by bits, with the same rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.errors import first_line
from kernels.ops import CACHED, SMALL_ROWS, AttentionShape, Backend, Epilogue, FusedStep, Layer, Spans, Weight

TOLERANCE = 1e-5  # of the largest value: float32 sums in another order
ROUNDED = 0.02  # the same where another order may have rounded an int8 or a key to its neighbour
EPS = 0.5  # as large as the squares it is added to, so that it cannot be left out unseen
MANY = 40  # rows: more than the kernels for a few take
EPILOGUES: tuple[Epilogue | None, ...] = (None, "relu2_mul", "silu_mul")
# Kinds of layers of the fused step's models, their activations, and whether tokens run together and greedily.
MODELS: tuple[tuple[str, Epilogue, bool, bool], ...] = (
    ("ternary", "relu2_mul", True, False),
    ("int8", "silu_mul", False, True),
    ("float", "silu_mul", True, True),
)


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
            fault = f"{name}: {first_line(error)[:200]}"
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
    """Sequences that are at different places, one of them with no row, one (of few heads' sizes) with many; once with
    keys that are not turned, which every backend rounds alike."""
    for dim, many in ((32, 0), (64, SMALL_ROWS + 3), (128, 0)):
        for turn, tolerance in ((0.0, TOLERANCE), (1.0, ROUNDED)):
            frequency = turn * 0.5 ** np.arange(dim // 2, dtype=np.float32)
            fault = _attend(candidate, rng, AttentionShape(4, 2, dim, mx.array(frequency)), many, tolerance)
            if fault is not None:
                return fault
    return None


def _attend(
    candidate: Backend, rng: np.random.Generator, shape: AttentionShape, many: int, tolerance: float
) -> str | None:
    spans = Spans((70, 5, 95, 0, 30), (SMALL_ROWS, 0, 1, 3, many))
    qkv = _floats(rng, spans.rows, 8 * shape.head_dim)
    keys, values = (_floats(rng, 5, 2, 96, shape.head_dim).astype(CACHED) for _ in range(2))
    with mx.stream(mx.cpu):  # a GPU's library may multiply with fewer bits than float32 has
        expected = reference.attention(qkv, mx.array(keys), mx.array(values), spans, shape)
        mx.eval(expected)
    together = candidate.attention(qkv, mx.array(keys), mx.array(values), spans, shape)
    row = 0
    for sequence, (offset, count) in enumerate(zip(spans.offsets, spans.counts, strict=True)):
        k, v = keys[sequence : sequence + 1], values[sequence : sequence + 1]
        for i in range(count if count <= SMALL_ROWS else 0):
            out, k, v = candidate.attention(qkv[row + i : row + i + 1], k, v, Spans((offset + i,), (1,)), shape)
            if not _equal(together[0][row + i : row + i + 1], out):
                return OTHER_ROWS
        row += count
    if not all(_close(ours, defined, tolerance) for ours, defined in zip(together, expected, strict=True)):
        return DIFFERS
    return None


def _argmax(candidate: Backend, rng: np.random.Generator) -> str | None:
    for x in (_floats(rng, 4, 68), mx.round(_floats(rng, 4, 68))):
        if candidate.argmax(x).tolist() != reference.argmax(x).tolist():
            return DIFFERS
    return None


def _choose(candidate: Backend, rng: np.random.Generator) -> str | None:
    x, temperature = _floats(rng, 6, 700), mx.array(np.resize([0.0, 1.0, 0.5], 6).astype(np.float32))
    chosen, expected = (
        ops.choose(x, temperature, mx.array(np.linspace(0.03, 0.97, 6, dtype=np.float32)))
        for ops in (candidate, reference)
    )
    return None if chosen.tolist() == expected.tolist() else DIFFERS


def _top_k(candidate: Backend, rng: np.random.Generator) -> str | None:
    many = mx.round(mx.minimum(_floats(rng, 1, 3000), 0))  # of which half are 0, or minus 0
    for x in (_floats(rng, 2, 700), mx.round(_floats(rng, 2, 700)), many):
        (ids, values, lse), defined = (ops.top_k(x, 8, (1.0, 0.5)) for ops in (candidate, reference))
        if ids.tolist() != defined[0].tolist() or not _equal(values, defined[1]):
            return DIFFERS
        if not _close(lse, defined[2], TOLERANCE):
            return DIFFERS
    return None


def _fused_step(candidate: Backend, rng: np.random.Generator) -> str | None:
    """Models of two layers of 64, by the single operations of the reference and, where the backend has that, fused."""
    for kind, epilogue, together, greedy in MODELS:
        model, defined = _models(candidate, rng, kind, epilogue)
        step = candidate.fused_step(**vars(model))
        fault = None if step is None else _compare_steps(step, defined, kind == "int8", together, greedy)
        if fault is not None:
            return fault if kind == "ternary" else f"of {kind} layers {fault}"
    return None


@dataclass(frozen=True)
class _Model:
    """What a backend's `fused_step` is made of."""

    layers: list[Layer]
    embedding: mx.array
    final_norm: mx.array
    head: Weight
    shape: AttentionShape
    epilogue: Epilogue
    eps: float


def _models(candidate: Backend, rng: np.random.Generator, kind: str, epilogue: Epilogue) -> list[_Model]:
    """The same model with the candidate's weights and with the reference's."""
    sizes = {"qkv": (128, 64), "o": (64, 64), "gate_up": (128, 64), "down": (64, 64)}
    layers: tuple[list[Layer], list[Layer]] = ([], [])
    embedding = _floats(rng, 100, 64).astype(mx.bfloat16)

    for _ in range(2):
        weights = {name: _floats(rng, *size).astype(mx.bfloat16) for name, size in sizes.items()}
        norms = [mx.abs(_floats(rng, 64)) + 0.5 for _ in range(4)]
        for own, ops in zip(layers, (candidate, reference), strict=True):
            own.append(
                Layer(
                    **{name: _prepared(ops, weight, kind) for name, weight in weights.items()},
                    input_norm=norms[0],
                    attention_sub_norm=norms[1] if kind == "ternary" else None,
                    post_norm=norms[2],
                    ffn_sub_norm=norms[3] if kind == "ternary" else None,
                )
            )
    return [
        _Model(
            layers=own,
            embedding=embedding,
            final_norm=mx.ones((64,)),
            head=_prepared(ops, embedding, "int8" if kind == "int8" else "float"),
            shape=AttentionShape(2, 1, 32, mx.array(0.5 ** np.arange(16, dtype=np.float32))),
            epilogue=epilogue,
            eps=EPS,
        )
        for own, ops in zip(layers, (candidate, reference), strict=True)
    ]


def _prepared(ops: Backend, weight: mx.array, kind: str) -> Weight:
    if kind == "ternary":
        ternary = np.array(mx.sign(mx.round(weight)).astype(mx.int8))
        return ops.prepare_ternary(ternary, np.full(len(ternary), 0.1, np.float32))
    return ops.prepare_int8(weight) if kind == "int8" else ops.prepare_dense(weight)


def _compare_steps(step: FusedStep, model: _Model, trimmed: bool, together: bool, greedy: bool) -> str | None:
    tokens = [3, 99, 0]
    d2t = mx.arange(99, -1, -1).astype(mx.uint32) if trimmed else None

    def caches() -> tuple[list[mx.array], list[mx.array]]:
        keys, values = ([mx.zeros((1, 1, 16, 32), CACHED) for _ in model.layers] for _ in range(2))
        mx.eval(keys, values)
        return keys, values

    alone: list[mx.array] = []
    choices: list[int] = []
    keys, values = caches()
    for at in range(5):  # over the tokens, then over the choices
        alone.append(step([(tokens + choices)[at]], keys, values, at)[0])
        best = reference.argmax(alone[-1])
        if at >= 2:
            choices.append(np.array(best if d2t is None else d2t[best]).item())
    if together:
        keys, values = caches()
        if not _equal(step(tokens, keys, values, 0)[0], mx.concatenate(alone[:3])):
            return OTHER_ROWS
    if greedy:
        keys, values = caches()
        if step.greedy_tokens(tokens, keys, values, 0, 2, d2t).tolist() != choices[:2]:
            return "chooses other tokens in a chain of steps than in single ones"
        if not _equal(step([choices[1]], keys, values, 4)[0], alone[4]):
            return "leaves other caches behind a chain of steps than behind single ones"

    x, shape = model.embedding[mx.array(tokens)].astype(mx.float32), model.shape
    with mx.stream(mx.cpu):
        for layer, k, v in zip(model.layers, *caches(), strict=True):
            qkv = reference.linear(x, layer.qkv, norm=layer.input_norm, eps=EPS)
            a = reference.attention(qkv, k, v, Spans((0,), (3,)), shape)[0]
            x = reference.linear(a, layer.o, norm=layer.attention_sub_norm, eps=EPS, residual=x)
            h = reference.linear(x, layer.gate_up, norm=layer.post_norm, eps=EPS, epilogue=model.epilogue)
            x = reference.linear(h, layer.down, norm=layer.ffn_sub_norm, eps=EPS, residual=x)
        logits = reference.linear(x, model.head, norm=model.final_norm, eps=EPS)
        mx.eval(logits)
    return None if _close(mx.concatenate(alone[:3]), logits, 2 * ROUNDED) else DIFFERS


def _fused_reader(candidate: Backend, rng: np.random.Generator) -> str | None:
    """Proposals of readers of two layers of 64, two taps of a teacher of 96 and a trimmed float head, by the single
    operations of the reference and, where the backend has that, as one."""
    for kind in ("float", "ternary"):
        fault = _compare_readers(candidate, rng, kind)
        if fault is not None:
            return fault if kind == "float" else f"of {kind} weights {fault}"
    return None


def _compare_readers(candidate: Backend, rng: np.random.Generator, kind: str) -> str | None:
    model, defined = _models(candidate, rng, kind, "silu_mul")
    sizes = {"fusion": (64, 2 * 96), "input": (64, 96 + 64), "output": (96, 64), "head": (100, 96)}
    floats = {name: _floats(rng, *size).astype(mx.bfloat16) for name, size in sizes.items()}
    kinds = {name: "float" if name == "head" else kind for name in floats}
    parts, weights = (
        {name: _prepared(ops, weight, kinds[name]) for name, weight in floats.items()} for ops in (candidate, reference)
    )
    embedding = _floats(rng, 100, 96).astype(mx.bfloat16)
    *feature_norms, embedding_norm = (mx.abs(_floats(rng, 96)) + 0.5 for _ in range(3))
    state_norm, final_norm = (mx.abs(_floats(rng, 64)) + 0.5 for _ in range(2))
    reader = candidate.fused_reader(
        **parts,
        feature_norms=feature_norms,
        embedding_norm=embedding_norm,
        state_norm=state_norm,
        final_norm=final_norm,
        layers=model.layers,
        embedding=embedding,
        shape=model.shape,
        epilogue=model.epilogue,
        eps=EPS,
    )
    if reader is None:
        return None
    tokens, states = [3, 99], [_floats(rng, 2, 96) for _ in range(2)]
    d2t = mx.arange(99, -1, -1).astype(mx.uint32)
    keys, values = ([mx.zeros((1, 1, 16, 32), CACHED) for _ in model.layers] for _ in range(2))
    mx.eval(keys, values, d2t)
    chosen = reader.greedy_tokens(tokens, states, keys, values, 0, 3, d2t).tolist()

    def linear(x: mx.array, name: str, norm: mx.array | None = None) -> mx.array:
        return reference.linear(x, weights[name], norm=norm, eps=EPS)

    def norm(x: mx.array, weight: mx.array) -> mx.array:
        return reference.rms_norm(x, weight, EPS)

    caches = [[mx.zeros((1, 1, 16, 32), CACHED) for _ in range(2)] for _ in defined.layers]
    expected: list[int] = []
    with mx.stream(mx.cpu):
        fed, spans = tokens, Spans((0,), (2,))
        tapped = [norm(*tap) for tap in zip(states, feature_norms, strict=True)]
        state = linear(mx.concatenate(tapped, axis=-1), "fusion")
        while len(expected) < 3:
            embedded = norm(embedding[mx.array(fed)].astype(mx.float32), embedding_norm)
            x = linear(mx.concatenate([embedded, norm(state, state_norm)], axis=-1), "input")
            for layer, cache in zip(defined.layers, caches, strict=True):
                x = layer.run(x, reference.linear, partial(_attended, cache, spans, defined.shape), "silu_mul", EPS)
            state, spans = x[-1:], Spans((spans.end,), (1,))
            best = reference.argmax(linear(linear(state, "output", final_norm), "head"))
            fed = np.array(d2t[best]).tolist()
            expected += fed
    for ours, own in zip(zip(keys, values, strict=True), caches, strict=True):
        if not all(_close(a, b, 2 * ROUNDED) for a, b in zip(ours, own, strict=True)):
            return DIFFERS
    return None if chosen == expected else "proposes other tokens than single operations"


def _attended(cache: list[mx.array], spans: Spans, shape: AttentionShape, qkv: mx.array) -> mx.array:
    """The reference's attention over a layer's keys and values, which it replaces."""
    out, *cache[:] = reference.attention(qkv, cache[0], cache[1], spans, shape)
    return out


def _floats(rng: np.random.Generator, *shape: int) -> mx.array:
    return mx.array(rng.normal(0, 1, shape).astype(np.float32))


def _ternary(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(-1, 2, (24, 68)).astype(np.int8), rng.uniform(0.1, 1, 24).astype(np.float32)


def _equal(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b).item())


def _close(a: mx.array, b: mx.array, tolerance: float) -> bool:
    x, y = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(x - y).max() <= tolerance * mx.abs(y).max()).item())


CHECKS: dict[str, Callable[[Backend, np.random.Generator], str | None]] = {
    "bitlinear": _bitlinear,
    "int8_linear": _int8_linear,
    "linear, ternary": _linear_ternary,
    "linear, int8": _linear_int8,
    "linear, float": _linear_float,
    "attention": _attention,
    "argmax": _argmax,
    "choose": _choose,
    "top_k": _top_k,
    "fused step": _fused_step,
    "fused reader": _fused_reader,
}
