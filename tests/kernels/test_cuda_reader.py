"""A reader's chain of proposals on the CUDA backend without a GPU, beside its definition (decode.models.reader)."""

from __future__ import annotations

from functools import partial

import cuda_emulator
import mlx.core as mx
import numpy as np
import pytest
from arrays import close, normal, same_bits
from cuda_runs import EMULATED, weights_of

from kernels import cuda, reference
from kernels.cuda.reader import CudaFusedReader
from kernels.ops import CACHED, AttentionShape, Layer, Spans

if not EMULATED:
    pytest.skip("no g++ 12 or newer on Linux to emulate CUDA with", allow_module_level=True)

pytest_plugins = ("cuda_fixtures",)
pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-5
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
    ) -> None:
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
            for own, weights in zip((ours, theirs), zip(*(weights_of(kind, n, k) for n, k in sizes)), strict=True):
                own.append(Layer(*weights, *norms))
        around = {"fusion": (hidden, taps * read), "input": (hidden, read + hidden)}
        if hidden != read:
            around["output"] = (read, hidden)
        pairs = {name: weights_of(kind, n, k) for name, (n, k) in around.items()}
        pairs |= {"output": pairs.get("output", (None, None)), "head": weights_of(head, self.vocab, read)}
        self.rest = {
            "feature_norms": [norm(read, 20 + i) for i in range(taps)],
            "embedding_norm": norm(read, 30),
            "state_norm": norm(hidden, 31),
            "final_norm": norm(hidden, 32),
            "embedding": normal(self.vocab, read, seed=4).astype(mx.bfloat16),
        }
        self.theirs = {name: pair[1] for name, pair in pairs.items()} | {"layers": theirs}
        reader = cuda.fused_reader(
            **{name: pair[0] for name, pair in pairs.items()},
            **self.rest,
            layers=ours,
            shape=self.shape,
            epilogue="silu_mul",
            eps=EPS,
        )
        assert reader is not None
        self.reader: CudaFusedReader = reader

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

    def given(self, m: int) -> tuple[list[int], list[mx.array]]:
        """Tokens, and the teacher's states of the positions in front of them."""
        tokens = np.random.default_rng(m).integers(0, self.vocab, m).tolist()
        return tokens, [(1 + 5 * i) * normal(m, self.read, seed=40 + i) for i in range(self.taps)]

    def defined(self, m: int, offset: int, count: int, d2t: np.ndarray) -> tuple[list[int], list[float], Caches]:
        """What the single operations of `kernels.reference` propose, the margins of the choices, and the caches."""
        fed, states = self.given(m)
        keys, values = self.caches(offset)

        def linear(x: mx.array, name: str, norm: mx.array | None = None) -> mx.array:
            return reference.linear(x, self.theirs[name], norm=norm, eps=EPS)

        def attend(i: int, qkv: mx.array) -> mx.array:
            spans = Spans((offset,), (len(fed),))
            out, keys[i], values[i] = reference.attention(qkv, keys[i], values[i], spans, self.shape)
            return out

        def normed(x: mx.array, norm: mx.array) -> mx.array:
            return reference.rms_norm(x, norm, EPS)

        rest, chosen, margins = self.rest, [], []
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
@pytest.mark.parametrize(
    ("kind", "head", "options"),
    [
        ("ternary", "bfloat16", {}),
        ("ternary", "int8", {"layers": 2, "taps": 1}),
        ("ternary", "float32", {"hidden": 64, "read": 112, "heads": (2, 1, 32)}),
        ("int8", "int8", {"hidden": 112, "read": 64}),
    ],
)
def test_proposals_are_those_of_single_operations(
    kind: str, head: str, options: dict[str, int], emulated: cuda_emulator.Emulator
) -> None:
    small = Small(kind, head, **options)
    all_ids, shuffled = np.arange(small.vocab), np.random.default_rng(1).permutation(small.vocab)
    for m, offset, count, d2t in ((1, 30, 3, all_ids), (3, 0, 2, shuffled), (8, 27, 2, all_ids)):
        expected, margins, defined = small.defined(m, offset, count, d2t)
        print(margins)
        ids = None if d2t is all_ids else mx.array(d2t, mx.uint32)
        alone: Caches | None = None
        for emulated.seed in (0, 1):
            keys, values = small.caches(offset)
            tokens = small.reader.greedy_tokens(*small.given(m), keys, values, offset, count, ids)
            print(np.array(tokens).tolist(), expected)
            assert np.array(tokens).tolist() == expected and tokens.dtype == mx.uint32
            end = offset + m + count - 1
            for ours, theirs in zip((*keys, *values), (*defined[0], *defined[1]), strict=True):
                assert close(ours[:, :, :end].astype(mx.float32), theirs[:, :, :end].astype(mx.float32), 0.05)
                assert np.isnan(np.array(ours[:, :, end:].astype(mx.float32))).all()
            if alone is not None:
                assert all(map(same_bits, (*keys, *values), (*alone[0], *alone[1])))
            alone = keys, values
        emulated.seed = 0
