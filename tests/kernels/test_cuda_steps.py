"""Steps of whole models on the CUDA backend without a GPU, as test_cuda_emulated runs its operations."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cuda_emulator
import mlx.core as mx
import numpy as np
import pytest
from arrays import close, normal, same_bits
from cuda_runs import EMULATED, LAUNCH, weights_of

from kernels import cuda, reference
from kernels.cuda import fused
from kernels.cuda.launch import FOLDER, kernel, text
from kernels.ops import CACHED, AttentionShape, ChoosesTokens, Epilogue, Layer, Spans

if not EMULATED:
    pytest.skip("no g++ 12 or newer on Linux to emulate CUDA with", allow_module_level=True)

pytest_plugins = ("cuda_fixtures",)
pytestmark = pytest.mark.usefixtures("emulated")

RANDOM_ORDERS = (1, 2)


class Model:
    """A small model with random weights, as `kernels.cuda` and as `kernels.reference` run it."""

    def __init__(
        self,
        kind: str,
        head: str,
        layers: int = 2,
        capacity: int = 80,
        hidden: int = 96,
        ffn: int = 144,
        heads: tuple[int, int, int] = (4, 2, 32),
    ) -> None:
        self.hidden, self.ffn, self.vocab, self.capacity, self.eps = hidden, ffn, 75, capacity, 1e-5
        count, self.kv_heads, self.dim = heads
        self.shape = AttentionShape(*heads, mx.array(0.5 ** np.arange(self.dim // 2, dtype=np.float32)))
        self.epilogue: Epilogue = "relu2_mul" if kind == "ternary" else "silu_mul"
        sub_norms = kind == "ternary"
        self.embedding = normal(self.vocab, self.hidden, seed=4).astype(mx.bfloat16)
        self.final_norm = normal(self.hidden, seed=5)
        self.head, self.reference_head = weights_of(head, self.vocab, self.hidden)
        q, kv = count * self.dim, self.kv_heads * self.dim
        sizes = [(q + 2 * kv, self.hidden), (self.hidden, q), (2 * self.ffn, self.hidden), (self.hidden, self.ffn)]
        self.layers, self.reference_layers = [], []
        for i in range(layers):
            norms = [1 + normal(k, seed=10 + i) / 9 for k in (self.hidden, q, self.hidden, self.ffn)]
            if not sub_norms:
                norms[1] = norms[3] = None
            pairs = [weights_of(kind, n, k) for n, k in sizes]
            self.layers.append(Layer(*[ours for ours, _ in pairs], *norms))
            self.reference_layers.append(Layer(*[theirs for _, theirs in pairs], *norms))
        step = cuda.fused_step(
            layers=self.layers,
            embedding=self.embedding,
            final_norm=self.final_norm,
            head=self.head,
            shape=self.shape,
            epilogue=self.epilogue,
            eps=self.eps,
        )
        assert step is not None
        self.step = step

    def caches(self, filled: int) -> tuple[list[mx.array], list[mx.array]]:
        """Random keys and values below `filled`, NaN behind them."""
        out = []
        for seed in (0, 1):
            size = (self.kv_heads, self.capacity, self.dim)
            rows = [np.array(normal(*size, seed=seed + 2 * i)) for i in range(len(self.layers))]
            for array in rows:
                array[:, filled:] = np.nan
            out.append([mx.array(array[None]).astype(CACHED) for array in rows])
        mx.eval(out)
        return out[0], out[1]

    def defined(self, tokens: list[int], offset: int) -> tuple[mx.array, list[mx.array]]:
        """What `kernels.reference` gives: logits, and what leaves each layer."""
        states = []
        keys, values = self.caches(offset)
        x = self.embedding[mx.array(tokens)].astype(mx.float32)
        for layer, k, v in zip(self.reference_layers, keys, values, strict=True):
            qkv = reference.linear(x, layer.qkv, norm=layer.input_norm, eps=self.eps)
            a = reference.attention(qkv, k, v, Spans((offset,), (len(tokens),)), self.shape)[0]
            x = reference.linear(a, layer.o, norm=layer.attention_sub_norm, eps=self.eps, residual=x)
            h = reference.linear(x, layer.gate_up, norm=layer.post_norm, eps=self.eps, epilogue=self.epilogue)
            x = reference.linear(h, layer.down, norm=layer.ffn_sub_norm, eps=self.eps, residual=x)
            states.append(x)
        return reference.linear(x, self.reference_head, norm=self.final_norm, eps=self.eps), states

    def chosen_one_by_one(
        self, tokens: list[int], offset: int, count: int, d2t: np.ndarray
    ) -> tuple[list[int], list[mx.array], list[mx.array]]:
        """Greedy choices, each from a step over the one before, and the caches behind them."""
        keys, values = self.caches(offset)
        fed, chosen = list(tokens), []
        for i in range(len(tokens) + count - 1):
            best = int(np.array(mx.argmax(self.step([fed[i]], keys, values, offset + i)[0][0])))
            if i >= len(tokens) - 1:
                chosen.append(int(d2t[best]))
                fed.append(chosen[-1])
        return chosen, keys, values

    def one_by_one(self, tokens: list[int], offset: int) -> tuple[mx.array, list[mx.array], list[mx.array]]:
        keys, values = self.caches(offset)
        rows = [self.step([token], keys, values, offset + i)[0] for i, token in enumerate(tokens)]
        return mx.concatenate(rows), keys, values


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "rows"), [("ternary", "bfloat16", (3, 8)), ("int8", "int8", (2,))])
def test_the_fused_step_equals_its_rows_alone_by_bits_and_the_reference_nearly(
    kind: str, head: str, rows: tuple[int, ...], emulated: cuda_emulator.Emulator
) -> None:
    model = Model(kind, head)
    tokens = np.random.default_rng(0).integers(0, model.vocab, 8).tolist()
    for m in rows:
        for offset in (0, 29, 64) if m < 8 else (25,):
            alone, *caches_alone = model.one_by_one(tokens[:m], offset)
            assert close(alone, model.defined(tokens[:m], offset)[0], 0.05)
            for seed in (0, *RANDOM_ORDERS):
                emulated.seed = seed
                caches = model.caches(offset)
                # Twice: the second launch meets the packets that the first left.
                for _ in range(2):
                    assert same_bits(model.step(tokens[:m], *caches, offset)[0], alone), (m, offset, seed)
                for ours, theirs in zip((*caches[0], *caches[1]), (*caches_alone[0], *caches_alone[1]), strict=True):
                    assert same_bits(ours, theirs)
            emulated.seed = 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "m"), [("ternary", "bfloat16", 3), ("int8", "int8", 1)])
def test_states_of_layers_are_handed_out(kind: str, head: str, m: int, emulated: cuda_emulator.Emulator) -> None:
    """Nearly the reference's, with the bits of each row alone, and beside logits and caches of the same bits."""
    model = Model(kind, head)
    tokens, last = np.random.default_rng(0).integers(0, model.vocab, m).tolist(), len(model.layers) - 1
    plain, *caches_plain = model.one_by_one(tokens, 29)
    defined = model.defined(tokens, 29)[1]
    for taps in ((last,), (0, last)):
        for emulated.seed in (0, *RANDOM_ORDERS):
            caches = model.caches(29)
            logits, states = model.step(tokens, *caches, 29, taps)
            assert list(states) == list(taps) and same_bits(logits, plain)
            for ours, theirs in zip((*caches[0], *caches[1]), (*caches_plain[0], *caches_plain[1]), strict=True):
                assert same_bits(ours, theirs)
            keys, values = model.caches(29)
            for i, token in enumerate(tokens):
                alone = model.step([token], keys, values, 29 + i, taps)[1]
                assert all(same_bits(alone[tap], states[tap][i : i + 1]) for tap in taps)
            assert all(close(states[tap], defined[tap], 0.05) for tap in taps)
        emulated.seed = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "head", "cases"), [("ternary", "int8", [(3, 2080), (8, 30)]), ("int8", "bfloat16", [(5, 509)])]
)
def test_long_rows_and_long_contexts(
    kind: str, head: str, cases: list[tuple[int, int]], emulated: cuda_emulator.Emulator
) -> None:
    """More than 256 tiles of a row share packets of statistics, more than 16 chunks are combined in turns."""
    emulated.multiprocessors = 7
    model = Model(kind, head, layers=1, capacity=2112, hidden=128, ffn=4128, heads=(2, 1, 64))
    for m, offset in cases:
        tokens = list(range(m))
        alone, *_ = model.one_by_one(tokens, offset)
        assert close(alone, model.defined(tokens, offset)[0], 0.05)
        for emulated.seed in (0, *RANDOM_ORDERS):
            assert same_bits(model.step(tokens, *model.caches(offset), offset)[0], alone), (m, offset, emulated.seed)
        emulated.seed = 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "multiprocessors"), [("int8", "int8", 12), ("ternary", "bfloat16", 3)])
def test_a_chain_of_steps_equals_single_ones_by_bits(
    kind: str, head: str, multiprocessors: int, emulated: cuda_emulator.Emulator
) -> None:
    """Three blocks have tiles of everything; of twelve, half have none of the rows, and most none of the head."""
    emulated.multiprocessors = multiprocessors
    model = Model(kind, head)
    all_ids, shuffled = np.arange(model.vocab), np.random.default_rng(1).permutation(model.vocab)
    for tokens, offset, count, d2t in (([5], 30, 3, all_ids), ([7, 1, 2], 0, 2, shuffled), ([4, 9], 31, 2, all_ids)):
        expected, *caches_expected = model.chosen_one_by_one(tokens, offset, count, d2t)
        ids = None if d2t is all_ids else mx.array(d2t, mx.uint32)
        for emulated.seed in RANDOM_ORDERS:
            caches = model.caches(offset)
            assert np.array(model.step.greedy_tokens(tokens, *caches, offset, count, ids)).tolist() == expected
            for ours, theirs in zip((*caches[0], *caches[1]), (*caches_expected[0], *caches_expected[1]), strict=True):
                assert same_bits(ours, theirs)
        emulated.seed = 0


@pytest.mark.slow
def test_of_equal_logits_a_chain_chooses_the_lowest_id(emulated: cuda_emulator.Emulator) -> None:
    for emulated.multiprocessors in (1, 4):
        model = Model("ternary", "bfloat16", layers=1)
        zeros = cuda.prepare_dense(mx.zeros((model.vocab, model.hidden), mx.bfloat16))
        model.step.head = zeros
        model.step.fixed[4] = zeros.data
        assert np.array(model.step.greedy_tokens([9], *model.caches(3), 3, 2, None)).tolist() == [0, 0]


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_multiprocessors_nor_on_where_tokens_come_from(
    emulated: cuda_emulator.Emulator,
) -> None:
    model = Model("ternary", "bfloat16")
    expected = model.step([3, 1, 2], *model.caches(33), 33)[0]
    for emulated.multiprocessors in (1, 3, 40):
        again = Model("ternary", "bfloat16")
        assert same_bits(again.step(mx.array([3, 1, 2], mx.uint32), *again.caches(33), 33)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["bfloat16", "int8"])
def test_rows_that_are_exchanged_whole_have_the_bits_of_others(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Model("ternary", head, layers=1)
    assert whole.step.whole(3)
    expected = whole.step([3, 1, 2], *whole.caches(33), 33)[0]
    monkeypatch.setattr(fused, "WHOLE", 0)
    in_turns = Model("ternary", head, layers=1)
    assert not in_turns.step.whole(3)
    assert same_bits(in_turns.step([3, 1, 2], *in_turns.caches(33), 33)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("m", [3, 9])  # of nine rows, the last is there twice
def test_a_step_of_many_sequences_is_that_of_single_operations(m: int) -> None:
    model, sequences = Model("ternary", "bfloat16"), [i for i in range(11) if i not in (2, 7)][:m]
    offsets = [5 * i % 64 for i in sequences]
    shape = (11, model.kv_heads, model.capacity, model.dim)
    tokens, zeros = mx.array(np.arange(3, 3 + m), mx.uint32), np.zeros(m, np.float32)
    counts = np.bincount(sequences, minlength=11)
    every = np.zeros(11, int)
    every[sequences] = offsets
    spans = Spans(tuple(every.tolist()), tuple(counts.tolist()))

    def new_caches() -> tuple[list[mx.array], list[mx.array]]:
        return tuple([normal(*shape, seed=2 * i + j).astype(CACHED) for i in range(2)] for j in range(2))  # type: ignore

    keys, values = new_caches()
    x = model.embedding[tokens].astype(mx.float32)
    for i, layer in enumerate(model.layers):
        qkv = cuda.linear(x, layer.qkv, norm=layer.input_norm, eps=model.eps)
        a, keys[i], values[i] = cuda.attention(qkv, keys[i], values[i], spans, model.shape)
        x = cuda.linear(a, layer.o, norm=layer.attention_sub_norm, eps=model.eps, residual=x)
        h = cuda.linear(x, layer.gate_up, norm=layer.post_norm, eps=model.eps, epilogue=model.epilogue)
        x = cuda.linear(h, layer.down, norm=layer.ffn_sub_norm, eps=model.eps, residual=x)
    expected = cuda.choose(
        cuda.linear(x, model.head, norm=model.final_norm, eps=model.eps), mx.array(zeros), mx.array(zeros)
    )
    ours = new_caches()
    assert isinstance(model.step, ChoosesTokens)
    chosen = model.step.choose_tokens(tokens, *ours, sequences, offsets, zeros, zeros)
    assert np.array(chosen).tolist() == np.array(expected).tolist()
    for mine, theirs in zip((*ours[0], *ours[1]), (*keys, *values), strict=True):
        assert same_bits(mine, theirs)


def test_a_step_of_many_sequences_refuses_what_does_not_fit() -> None:
    model, zeros = Model("ternary", "bfloat16", layers=1), np.zeros(2, np.float32)
    caches = [[mx.zeros((2, model.kv_heads, model.capacity, model.dim), CACHED)] for _ in range(2)]
    assert isinstance(model.step, ChoosesTokens)
    for sequences, offsets in (([0, 0], [0, 0]), ([0, 2], [0, 0]), ([0, 1], [0, model.capacity]), ([0, 1], [0, -1])):
        with pytest.raises(ValueError, match=r"another|do not fit"):
            model.step.choose_tokens([1, 2], *caches, sequences, offsets, zeros, zeros)


@pytest.mark.slow
def test_less_shared_memory_takes_shorter_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Model("ternary", "int8")
    there_is = fused.device_attribute
    less = {97: 99 * 1024}  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    monkeypatch.setattr(fused, "device_attribute", lambda name: less.get(name) or there_is(name))
    narrow = Model("ternary", "int8")
    assert (wide.step.slots, narrow.step.slots) == (fused.SLOTS[0], fused.SLOTS[1])
    assert same_bits(narrow.step([1, 2], *narrow.caches(33), 33)[0], wide.step([1, 2], *wide.caches(33), 33)[0])


@pytest.mark.slow
def test_launches_of_two_models_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX runs at once what does not depend on each other, and a launch needs all multiprocessors to itself."""
    seen: list[tuple[mx.array, mx.array]] = []
    launch = mx.fast.precompiled_cuda_kernel

    def noted(*, inputs: Sequence[mx.array], **options: Any) -> list[mx.array]:
        results: list[mx.array] = launch(inputs=inputs, **options)
        seen.append((inputs[2], results[0]))
        return results

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", noted)
    for model in (Model("ternary", "bfloat16", layers=1), Model("ternary", "bfloat16", layers=1)):
        model.step([1, 2], *model.caches(33), 33)
    assert seen[1][0] is seen[0][1]


@pytest.mark.slow
def test_more_blocks_than_multiprocessors_would_wait_for_ever(emulated: cuda_emulator.Emulator) -> None:
    model = Model("ternary", "bfloat16", layers=1)
    emulated.multiprocessors = 5
    emulated.resident = 4
    with pytest.raises(RuntimeError, match="1 blocks are not resident"):
        model.step([1, 2], *model.caches(3), 3)


# What the tests would notice


def faults_of_a_step(emulated: cuda_emulator.Emulator, expected: mx.array) -> str:
    """What goes wrong with two launches after each other, in some order."""
    model = Model("ternary", "bfloat16", layers=1)
    for emulated.seed in (0, *RANDOM_ORDERS):
        for _ in range(2):
            try:
                logits = model.step([1, 2], *model.caches(33), 33)[0]
            except RuntimeError as error:
                return str(error)
            if not same_bits(logits, expected):
                return "other bits"
    return "none"


@pytest.fixture
def expected(emulated: cuda_emulator.Emulator) -> mx.array:
    model = Model("ternary", "bfloat16", layers=1)
    return model.step([1, 2], *model.caches(33), 33)[0]


BROKEN = [
    ("exchange.cuh", "if (!missing) {", "if (true) {", "other bits"),
    ("exchange.cuh", "__float_as_uint(largest), number)", "__float_as_uint(largest), ~0u)", "all wait for each"),
    ("exchange.cuh", "  __syncthreads();\n  if (m < live) {", "  if (m < live) {", "other bits"),
    (
        "exchange.cuh",
        "  __syncthreads();\n  if (m < live) {",
        "  if (m < live) {\n    __syncthreads();",
        "that some threads miss",
    ),
    ("exchange.cuh", "lane < 10 && first", "lane < 9 && first", "all wait for each other"),
    ("fused_step.cu", "  __syncthreads();  // what is written", "  // what is written", "other bits"),
    ("fused_step.cu", "(which == kOutput ? 1 :", "(which == kOutput ? 0 :", "all wait for each other"),
    (
        "fused_step.cuh",
        "tile = item % rows.tiles, m = item / rows.tiles;\n    const int head",
        "m = item % M, tile = item / M;\n    const int head",
        "other bits",
    ),
    ("products.cuh", "await_copies<SLOTS - 1>();", "await_copies<SLOTS>();", "other bits"),
    ("products.cuh", "(piece < half ? 0 : jump)", "(piece < half ? 0 : 64 * jump)", "outside of all buffers"),
    ("products.cuh", "* kSpan + 16; }", "* kSpan + 8; }", "trap"),
    ("attention.cuh", "= sum_lanes(weight)", "= seen ? sum_lanes(weight) : 0.0f", "different operations"),
    ("attention.cuh", "value = values[key * DIM + d]", "value = values[(key << 20) * DIM + d]", "outside of a buffer"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "before", "after", "fault"), BROKEN)
def test_a_broken_kernel_is_noticed(
    file: str,
    before: str,
    after: str,
    fault: str,
    expected: mx.array,
    emulated: cuda_emulator.Emulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "cuda"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    whole = (folder / file).read_text()
    assert before in whole
    (folder / file).write_text(whole.replace(before, after))
    monkeypatch.setattr(LAUNCH, "FOLDER", folder)
    for cached in (text, kernel):
        cached.cache_clear()
    try:
        assert fault in faults_of_a_step(emulated, expected)
    finally:
        for cached in (text, kernel):
            cached.cache_clear()
