"""A reader's chain of proposals on the CUDA backend without a GPU, beside its definition (decode.models.reader)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import cuda_emulator
import mlx.core as mx
import numpy as np
import pytest
from arrays import close, floats, normal, same_bits
from cuda_runs import EMULATED, weights_of

from kernels import cuda, reference
from kernels.cuda import fused
from kernels.ops import CACHED, AttentionShape, Layer, Spans, stacked

if not EMULATED:
    pytest.skip("no g++ 12 or newer on Linux to emulate CUDA with", allow_module_level=True)

pytest_plugins = ("cuda_fixtures",)
pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-5
MARGIN = 0.02  # of choices that rounding an activation to its neighbour does not change
ROUNDS = ((1, 30, 3, False), (3, 0, 2, False), (8, 27, 2, True))  # rows, the first one's place, choices, trimmed head
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("ternary", "bfloat16", {"seed": 5}),
    ("ternary", "int8", {"layers": 2, "taps": 1, "seed": 2}),
    ("ternary", "float32", {"hidden": 64, "read": 112, "heads": (2, 1, 32)}),
    ("int8", "int8", {"hidden": 112, "read": 64}),
]
Caches = tuple[list[mx.array], list[mx.array]]


class Small:
    """A small reader with random weights, as `kernels.cuda` and as `kernels.reference` run it."""

    def __init__(
        self,
        kind: str,
        head: str,
        hidden: int = 96,
        read: int = 96,
        layers: int = 1,
        taps: int = 3,
        heads: tuple[int, int, int] = (4, 2, 32),
        capacity: int = 80,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        ffn, self.vocab, self.read, self.taps, self.capacity = 144, 75, read, taps, capacity
        count, self.kv_heads, self.dim = heads
        q, kv = count * self.dim, self.kv_heads * self.dim
        self.shape = AttentionShape(*heads, mx.array(0.5 ** np.arange(self.dim // 2, dtype=np.float32)))

        def norm(size: int, seed: int) -> mx.array:
            return 1 + normal(size, seed=seed) / 9

        ours, theirs = [], []
        for i in range(layers):
            norms = [norm(k, 10 + i) for k in (hidden, q, hidden, ffn)]
            if kind != "ternary":
                norms[1] = norms[3] = None
            sizes = [(q + 2 * kv, hidden), (hidden, q), (2 * ffn, hidden), (hidden, ffn)]
            pairs = [weights_of(kind, n, k) for n, k in sizes]
            ours.append(Layer(*[mine for mine, _ in pairs], *norms))
            theirs.append(Layer(*[defined for _, defined in pairs], *norms))
        around = {"fusion": (hidden, taps * read), "input": (hidden, read + hidden)}
        if hidden != read:
            around["output"] = (read, hidden)
        named = {name: weights_of(kind, n, k) for name, (n, k) in around.items()}
        named |= {"output": named.get("output", (None, None)), "head": weights_of(head, self.vocab, read)}
        self.rest = {
            "feature_norms": [norm(read, 20 + i) for i in range(taps)],
            "embedding_norm": norm(read, 30),
            "state_norm": norm(hidden, 31),
            "final_norm": norm(hidden, 32),
            "embedding": normal(self.vocab, read, seed=4).astype(mx.bfloat16),
        }
        self.theirs = {name: pair[1] for name, pair in named.items()} | {"layers": theirs}
        self.ours: dict[str, Any] = {name: pair[0] for name, pair in named.items()} | self.rest
        self.ours |= {"layers": ours, "shape": self.shape, "epilogue": "silu_mul", "eps": EPS}
        reader = cuda.fused_reader(**self.ours)
        assert reader is not None
        self.reader = reader

    def caches(self, filled: int) -> Caches:
        """Random keys and values below `filled`, NaN behind them."""
        out = []
        for seed in (0, 1):
            size = (self.kv_heads, self.capacity, self.dim)
            rows = [np.array(normal(*size, seed=seed + 2 * i)) for i in range(len(self.theirs["layers"]))]
            for array in rows:
                array[:, filled:] = np.nan
            out.append([mx.array(array[None]).astype(CACHED) for array in rows])
        mx.eval(out)
        return out[0], out[1]

    def ids(self, trimmed: bool) -> np.ndarray:
        """What the head's rows stand for."""
        return np.random.default_rng(1).permutation(self.vocab) if trimmed else np.arange(self.vocab)

    def proposed(
        self, given: tuple[list[int], list[mx.array]], caches: Caches, offset: int, count: int, trimmed: bool
    ) -> list[int]:
        ids = mx.array(self.ids(trimmed), mx.uint32) if trimmed else None
        tokens = self.reader.greedy_tokens(*given, *caches, offset, count, ids)
        assert tokens.dtype == mx.uint32
        return np.array(tokens).tolist()

    def given(self, m: int) -> tuple[list[int], list[mx.array]]:
        """Tokens, and the teacher's states of the positions in front of them."""
        tokens = np.random.default_rng([self.seed, m]).integers(0, self.vocab, m).tolist()
        return tokens, [(1 + 5 * i) * normal(m, self.read, seed=40 + 10 * self.seed + i) for i in range(self.taps)]

    def defined(self, m: int, offset: int, count: int, trimmed: bool) -> tuple[list[int], list[float], Caches]:
        """What the single operations of `kernels.reference` propose, the margins of the choices in parts of the largest
        logit, and the caches."""
        fed, states = self.given(m)
        d2t = self.ids(trimmed)
        keys, values = self.caches(offset)

        def linear(x: mx.array, name: str, norm: mx.array | None = None) -> mx.array:
            return reference.linear(x, self.theirs[name], norm=norm, eps=EPS)

        def attend(i: int, qkv: mx.array) -> mx.array:
            spans = Spans((offset,), (len(fed),))
            out, keys[i], values[i] = reference.attention(qkv, keys[i], values[i], spans, self.shape)
            return out

        def normed(x: mx.array, norm: mx.array) -> mx.array:
            return reference.rms_norm(x, norm, EPS)

        rest, chosen, margins = self.rest, list[int](), list[float]()
        read = [normed(x, norm) for x, norm in zip(states, rest["feature_norms"], strict=True)]
        state = linear(mx.concatenate(read, axis=-1), "fusion")
        while len(chosen) < count:
            embedded = normed(rest["embedding"][mx.array(fed)].astype(mx.float32), rest["embedding_norm"])
            x = linear(mx.concatenate([embedded, normed(state, rest["state_norm"])], axis=-1), "input")
            for i, layer in enumerate(self.theirs["layers"]):
                x = layer.run(x, reference.linear, partial(attend, i), "silu_mul", EPS)
            offset, state = offset + len(fed), x[-1:]
            if self.theirs["output"] is None:
                logits = linear(state, "head", rest["final_norm"])
            else:
                logits = linear(linear(state, "output", rest["final_norm"]), "head")
            ordered = np.sort(np.array(logits[0]))
            margins.append((ordered[-1] - ordered[-2]) / np.abs(ordered).max())
            fed = [int(d2t[int(np.array(logits[0]).argmax())])]
            chosen += fed
        return chosen, margins, (keys, values)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "options"), CASES)
def test_proposals_are_those_of_single_operations(
    kind: str, head: str, options: dict[str, Any], emulated: cuda_emulator.Emulator
) -> None:
    small = Small(kind, head, **options)
    for m, offset, count, trimmed in ROUNDS:
        expected, margins, defined = small.defined(m, offset, count, trimmed)
        assert min(margins) > MARGIN, "a near tie"
        end, first = offset + m + count - 1, small.caches(offset)
        for emulated.seed in (0, 1):
            caches = small.caches(offset)
            # Twice: the second launch meets the packets that the first left.
            for _ in range(2):
                assert small.proposed(small.given(m), caches, offset, count, trimmed) == expected, (m, emulated.seed)
            for i, (ours, theirs) in enumerate(zip((*caches[0], *caches[1]), (*defined[0], *defined[1]), strict=True)):
                assert close(floats(ours[:, :, :end]), floats(theirs[:, :, :end]), 0.05)
                assert same_bits(ours[:, :, end:], (*first[0], *first[1])[i][:, :, end:])
        emulated.seed = 0


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [3, 12])
def test_given_rows_have_the_bits_that_they_have_alone(multiprocessors: int, emulated: cuda_emulator.Emulator) -> None:
    """Three blocks have tiles of everything; of twelve, half have none of the rows, and most none of the head."""
    emulated.multiprocessors = multiprocessors
    small, (tokens, states) = Small("ternary", "int8", seed=3), Small("ternary", "int8", seed=3).given(3)
    together, alone = small.caches(30), small.caches(30)
    said = small.proposed((tokens, states), together, 30, 3, False)
    for i in range(3):
        row = tokens[i : i + 1], [x[i : i + 1] for x in states]
        emulated.seed = i
        last = small.proposed(row, alone, 30 + i, 3 if i == 2 else 1, False)
    assert said == last and all(map(same_bits, (*together[0], *together[1]), (*alone[0], *alone[1])))


@pytest.mark.slow
def test_rows_that_are_exchanged_whole_have_the_bits_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (fused.WHOLE, 0):
        monkeypatch.setattr(fused, "WHOLE", most)
        small = Small("ternary", "int8", hidden=64, read=112)
        caches = small.caches(5)
        found.append((small.proposed(small.given(2), caches, 5, 2, False), caches))
    (whole, caches), (in_turns, others) = found
    assert whole == in_turns and all(map(same_bits, (*caches[0], *caches[1]), (*others[0], *others[1])))


@pytest.mark.parametrize("head", ["int8", "bfloat16"])
def test_another_head_takes_the_place_of_the_first(head: str) -> None:
    """Of one size code is shared; the exchange's numbers are each reader's own."""
    small = Small("ternary", head)
    rows = normal(80, 96, seed=77).astype(mx.bfloat16)
    prepare = cuda.prepare_int8 if head == "int8" else cuda.prepare_dense
    first, more = prepare(rows[:64]), prepare(rows[64:])
    whole = cuda.fused_reader(**small.ours | {"head": prepare(rows)})
    assert whole is not None
    put = [small.reader.with_head(stacked(first, more)) for _ in range(2)]
    launches = [one.step._prepared(2, chain=True) for one in (*put, small.reader)]
    assert launches[0] is launches[1] is not launches[2]
    ids = mx.array(np.random.default_rng(1).permutation(80) % small.vocab, mx.uint32)
    for m in (2, 3):
        given = small.given(m)
        said = [one.greedy_tokens(*given, *small.caches(9), 9, 4, ids).tolist() for one in (*put, whole)]
        assert said[0] == said[1] == said[2]
        small.proposed(given, small.caches(9), 9, 2, False)
    other = cuda.prepare_dense if head == "int8" else cuda.prepare_int8
    with pytest.raises(ValueError, match="of 96 inputs instead"):
        small.reader.with_head(other(rows))


def test_what_it_is_not_written_for_is_left_to_single_operations() -> None:
    small = Small("ternary", "int8")
    dense, (layer,) = cuda.prepare_dense(mx.zeros((96, 144))), small.ours["layers"]
    for changed in ({"layers": [dataclasses.replace(layer, down=dense)]}, {"input": dense}, {"head": layer.o}):
        assert cuda.fused_reader(**small.ours | changed) is None


def test_what_does_not_fit_is_refused() -> None:
    small, states = Small("ternary", "int8"), [mx.zeros((2, 96))] * 3
    for tokens, read, offset, count, complaint in (
        ([1, 2], states, 77, 3, "do not fit"),
        ([1, 2], states, -1, 1, "do not fit"),
        ([1] * 9, [mx.zeros((9, 96))] * 3, 0, 1, "9 tokens"),
        ([], [mx.zeros((0, 96))] * 3, 0, 1, "0 tokens"),
        ([1, 2], states, 0, 0, "0 choices"),
        ([1, 2], states[:2], 0, 1, "are not float32"),
        ([1, 2], [*states[:2], mx.zeros((3, 96))], 0, 1, "are not float32"),
        ([1, 2], [*states[:2], mx.zeros((2, 95))], 0, 1, "are not float32"),
        ([1, 2], [*states[:2], mx.zeros((2, 96), mx.bfloat16)], 0, 1, "are not float32"),
    ):
        with pytest.raises(ValueError, match=complaint):
            small.reader.greedy_tokens(tokens, read, *small.caches(0), offset, count, None)
