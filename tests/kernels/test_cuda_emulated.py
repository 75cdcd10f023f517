"""The CUDA backend without a GPU: the very text of its kernels run by cuda_emulator."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_emulator
import emulation
import mlx.core as mx
import numpy as np
import pytest
from arrays import close, normal, random_ternary, same_bits
from attention_checks import (
    FEW,
    SEVERAL,
    attention_shape,
    caches,
    check_definition,
    check_rounding,
    check_rows_alone,
    qkv_rows,
)
from choice_checks import (
    SIZES,
    SOFTMAXES,
    TOPS,
    check_choice,
    check_greedy_choice,
    check_temperatures_of_rows,
    check_top,
)

from kernels import cuda, reference
from kernels.cuda import attend, fused, products
from kernels.cuda.launch import FOLDER, kernel, text
from kernels.ops import CACHED, AttentionShape, ChoosesTokens, Epilogue, Layer, Spans
from kernels.self_test import CHECKS, operation_faults

if platform.system() != "Linux" or emulation.compiler() is None:
    pytest.skip("no g++ 12 or newer on Linux to emulate CUDA with", allow_module_level=True)

RANDOM_ORDERS = (1, 2)
LAUNCH = sys.modules["kernels.cuda.launch"]  # in the package, its name stands for the function


@pytest.fixture(scope="session")
def session_emulator(tmp_path_factory: pytest.TempPathFactory) -> cuda_emulator.Emulator:
    return cuda_emulator.Emulator(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(autouse=True)
def emulator(
    session_emulator: cuda_emulator.Emulator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[cuda_emulator.Emulator]:
    """All launches go to the emulator: in a fixed order on four multiprocessors, until a test says otherwise."""
    session_emulator.seed, session_emulator.multiprocessors, session_emulator.resident = 0, 4, None
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", session_emulator.precompiled_cuda_kernel)
    monkeypatch.setattr(LAUNCH, "machine_code", session_emulator.machine_code)
    for module in (products, fused):
        monkeypatch.setattr(module, "device_attribute", lambda name: cuda_emulator.attribute(session_emulator, name))
    monkeypatch.setattr(LAUNCH, "_prepared", {})
    # Views would hide where buffers end, and what MLX compiles holds nothing to compute with.
    monkeypatch.setattr(attend, "beginning", lambda cache: cache)
    monkeypatch.setattr(mx, "compile", lambda step: step)
    products._large_block.cache_clear()
    kernel.cache_clear()
    with mx.stream(mx.cpu):
        yield session_emulator
    kernel.cache_clear()


def weights_of(kind: str, n: int, k: int) -> tuple[Any, Any]:
    """Ours and the reference's."""
    if kind == "ternary":
        pair = random_ternary(n, k)
        return cuda.prepare_ternary(*pair), reference.prepare_ternary(*pair)
    data = normal(n, k, seed=3)
    if kind == "int8":
        return cuda.prepare_int8(data), reference.prepare_int8(data)
    data = data.astype(getattr(mx, kind))
    return cuda.prepare_dense(data), reference.prepare_dense(data)


# Single operations


@pytest.mark.slow
def test_it_passes_the_self_test() -> None:
    assert dict(operation_faults(cuda)) == dict.fromkeys(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("k", [20, 576, 2560])
def test_quantised_rows_equal_the_reference_by_bits(k: int) -> None:
    halves = mx.array(np.resize(np.arange(-127, 128) + 0.5, k).astype(np.float32))
    rows = [normal(k), mx.zeros(k), mx.full((k,), 1e-9), normal(k, seed=1) * 1e30, halves]
    for ours, theirs in zip(cuda.quantize_rows(mx.stack(rows)), reference.quantize_rows(mx.stack(rows)), strict=True):
        assert same_bits(ours, theirs)


def test_quantised_rows_behind_a_norm_are_close_to_the_reference() -> None:
    x, norm = normal(3, 576), normal(576)
    (q, s), (q_defined, s_defined) = cuda.quantize_rows(x, norm, 1e-5), reference.quantize_rows(x, norm, 1e-5)
    np.testing.assert_allclose(np.array(s), np.array(s_defined), rtol=1e-6)
    assert np.abs(np.array(q).astype(int) - np.array(q_defined)).max() <= 1
    assert (np.array(q) != np.array(q_defined)).mean() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ternary", "int8"])
@pytest.mark.parametrize("m", [1, 3, 8, 70])
def test_products_with_whole_numbers_equal_the_reference_by_bits(kind: str, m: int) -> None:
    for n, k in ((960, 576), (24, 68), (40, 4), (144, 2560)):
        ours, theirs = weights_of(kind, n, k)
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        product, defined = (getattr(b, "bitlinear" if kind == "ternary" else "int8_linear") for b in (cuda, reference))
        assert same_bits(product(xq, s, ours), defined(xq, s, theirs)), (n, k)


@pytest.mark.parametrize("m", [3, 13])
@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_sums(m: int, value: int) -> None:
    n, k = 48, 8192
    xq, s = mx.full((m, k), value, mx.int8), mx.full((m,), 3.0)
    y = cuda.bitlinear(xq, s, cuda.prepare_ternary(np.full((n, k), -1, np.int8), np.ones(n, np.float32)))
    assert (np.array(y) == np.float32(-value * k) * (np.float32(1) / np.float32(3))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "epilogue"),
    [("ternary", "relu2_mul"), ("int8", "silu_mul"), ("bfloat16", None), ("bfloat16", "silu_mul"), ("float32", None)],
)
def test_linear_gives_a_row_the_same_bits_alone_and_among_others(kind: str, epilogue: Epilogue | None) -> None:
    n, k, m = 96, 160, 8
    ours, theirs = weights_of(kind, n, k)
    width = n if epilogue is None else n // 2
    x, norm, residual = normal(m, k), normal(k), normal(m, width, seed=3)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-5, "epilogue": epilogue}
    y = cuda.linear(x, ours, residual=residual, **options)
    alone = [cuda.linear(x[i : i + 1], ours, residual=residual[i : i + 1], **options) for i in range(m)]
    assert same_bits(y, mx.concatenate(alone))
    # Rounding to int8 may fall the other way after a norm that differs in its last bit.
    assert close(y, reference.linear(x, theirs, residual=residual, **options), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n", "k", "epilogue"),
    [
        ("ternary", 960, 136, "relu2_mul"),
        ("ternary", 72, 20, None),
        ("int8", 288, 260, "silu_mul"),
        ("bfloat16", 75, 592, None),
        ("bfloat16", 84, 264, "silu_mul"),
        ("bfloat16", 40, 132, "relu2_mul"),
        ("float32", 75, 132, None),
    ],
)
def test_many_rows_have_the_bits_that_they_have_alone(
    kind: str, n: int, k: int, epilogue: Epilogue | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = weights_of(kind, n, k)
    most, width = 65, n if epilogue is None else n // 2
    x, residual = normal(most, k), normal(most, width, seed=3)
    y = mx.concatenate(
        [cuda.linear(x[i : i + 1], ours, epilogue=epilogue, residual=residual[i : i + 1]) for i in range(most)]
    )
    for large, ms in ((256, (9, 64, 65)), (0, (65,))):  # in small blocks, and in large ones
        monkeypatch.setattr(products, "_BLOCKS", large)
        products._large_block.cache_clear()
        for m in ms:
            many = cuda.linear(x[:m], ours, epilogue=epilogue, residual=residual[:m])
            assert same_bits(many, y[:m]), m
    defined = reference.linear(x, theirs, epilogue=epilogue, residual=residual)
    if kind == "ternary":
        assert same_bits(y, defined)
    assert close(y, defined, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "spans"),
    [
        (4, 2, 32, SEVERAL),
        (4, 2, 32, Spans((2042, 0, 31), (8, 1, 11))),
        (3, 1, 64, FEW),
        (5, 1, 128, Spans((30, 0, 500), (4, 9, 1))),
    ],
)
def test_attention_gives_a_row_the_same_bits_alone_and_among_others(
    heads: int, kv_heads: int, d: int, spans: Spans, emulator: cuda_emulator.Emulator
) -> None:
    emulator.seed = d
    check_rows_alone(cuda.attention, attention_shape(heads, kv_heads, d), spans)


@pytest.mark.slow
def test_attention_is_close_to_its_definition(emulator: cuda_emulator.Emulator) -> None:
    for heads, kv_heads, d in ((4, 2, 32), (5, 1, 128), (2, 1, 16)):
        check_definition(cuda.attention, attention_shape(heads, kv_heads, d), Spans((0, 101, 3, 24), (9, 2, 0, 20)))


def test_keys_and_values_are_rounded() -> None:
    check_rounding(cuda.attention, attention_shape())


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(8, 7, 1, 0, 6, 5, 3, 8, 2), (1, 1, 1, 0, 1, 1, 1, 1, 1)])
def test_each_way_to_attention_gives_the_same_bits(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, emulator: cuda_emulator.Emulator
) -> None:
    shape, offsets = attention_shape(9, 3, 64), (95, 70, 15, 9, 128, 62, 31, 26, 63)
    qkv, spans = qkv_rows(shape, sum(counts)), Spans(offsets, counts)
    found, ways = [], []
    for warps, parts in ((1 << 20, 1 << 20), (0, 1 << 20), (1 << 20, 0)):
        monkeypatch.setattr(attend, "_FOLDING_WARPS", warps)
        monkeypatch.setattr(attend, "_PARTS_BYTES", parts)
        emulator.launches.clear()
        found.append(cuda.attention(qkv, *caches(shape, offsets, 140), spans, shape)[0])
        ways.append(emulator.launches[1:])
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])
    split, whole = ["attend_few", "combine"], ["attend_few"]
    assert ways == ([split, whole, whole] if max(counts) == 1 else [split, split, ["attend_many"]])


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 1, 128), (2, 2, 256)])
def test_a_prefill_of_many_rows_has_the_bits_of_single_rows(
    heads: tuple[int, int, int], emulator: cuda_emulator.Emulator
) -> None:
    """Rows that fill several groups, behind keys or not, beside sequences of one row and of none."""
    emulator.seed = 1
    check_rows_alone(cuda.attention, attention_shape(*heads), Spans((33, 5, 0, 0), (35, 1, 0, 66)))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(4, 2, 32), (9, 3, 64), (4, 1, 128)])
def test_packed_rows_have_the_bits_of_sequences(heads: tuple[int, int, int]) -> None:
    shape = attention_shape(*heads)
    segments = np.zeros((3, 45), np.int32)
    segments[0, :7], segments[0, 7:40], segments[1, 44:], segments[2] = 5, 6, 6, 6
    counts = (7, 33, 5, 44, 1, 45)
    qkv = qkv_rows(shape, segments.size)
    packed = cuda.attention_packed(qkv.reshape(3, 45, -1), segments, shape)
    alone = cuda.attention(qkv, *caches(shape, (0,) * 6, 64), Spans((0,) * 6, counts), shape)[0]
    assert same_bits(packed, alone.reshape(3, 45, -1))
    defined = reference.attention_packed(qkv.reshape(3, 45, -1), segments, shape)
    assert close(packed, defined, 1e-2)  # a key may be turned to the other side of the middle of two bfloat16


# Choosing tokens


@pytest.mark.parametrize("n", SIZES)
def test_the_choice_at_temperature_zero_is_the_lowest_of_the_highest(n: int) -> None:
    check_greedy_choice(cuda, n)


@pytest.mark.parametrize(("n", "temperature"), SOFTMAXES)
def test_a_choice_inverts_the_softmax(n: int, temperature: float) -> None:
    check_choice(cuda, n, temperature)


def test_rows_of_a_choice_have_their_own_temperatures() -> None:
    check_temperatures_of_rows(cuda)


@pytest.mark.parametrize(("n", "k"), TOPS)
def test_the_top_of_logits(n: int, k: int, emulator: cuda_emulator.Emulator) -> None:
    emulator.seed = n
    check_top(cuda, n, k)


def test_rows_that_do_not_fit_the_caches_are_refused() -> None:
    shape = attention_shape()
    for spans in (Spans((8, 0), (2, 1)), Spans((0,), (3,)), Spans((0, 0), (2, 2))):
        with pytest.raises(ValueError, match=r"have no room|are not"):
            cuda.attention(qkv_rows(shape, 3), *caches(shape, (0, 0), 9), spans, shape)


# The fused step


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

    def defined(self, tokens: list[int], offset: int) -> mx.array:
        """What `kernels.reference` gives."""
        keys, values = self.caches(offset)
        x = self.embedding[mx.array(tokens)].astype(mx.float32)
        for layer, k, v in zip(self.reference_layers, keys, values, strict=True):
            qkv = reference.linear(x, layer.qkv, norm=layer.input_norm, eps=self.eps)
            a = reference.attention(qkv, k, v, Spans((offset,), (len(tokens),)), self.shape)[0]
            x = reference.linear(a, layer.o, norm=layer.attention_sub_norm, eps=self.eps, residual=x)
            h = reference.linear(x, layer.gate_up, norm=layer.post_norm, eps=self.eps, epilogue=self.epilogue)
            x = reference.linear(h, layer.down, norm=layer.ffn_sub_norm, eps=self.eps, residual=x)
        return reference.linear(x, self.reference_head, norm=self.final_norm, eps=self.eps)

    def chosen_one_by_one(
        self, tokens: list[int], offset: int, count: int, d2t: np.ndarray
    ) -> tuple[list[int], list[mx.array], list[mx.array]]:
        """Greedy choices, each from a step over the one before, and the caches behind them."""
        keys, values = self.caches(offset)
        fed, chosen = list(tokens), []
        for i in range(len(tokens) + count - 1):
            best = int(np.array(mx.argmax(self.step([fed[i]], keys, values, offset + i)[0])))
            if i >= len(tokens) - 1:
                chosen.append(int(d2t[best]))
                fed.append(chosen[-1])
        return chosen, keys, values

    def one_by_one(self, tokens: list[int], offset: int) -> tuple[mx.array, list[mx.array], list[mx.array]]:
        keys, values = self.caches(offset)
        rows = [self.step([token], keys, values, offset + i) for i, token in enumerate(tokens)]
        return mx.concatenate(rows), keys, values


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "rows"), [("ternary", "bfloat16", (3, 8)), ("int8", "int8", (2,))])
def test_the_fused_step_equals_its_rows_alone_by_bits_and_the_reference_nearly(
    kind: str, head: str, rows: tuple[int, ...], emulator: cuda_emulator.Emulator
) -> None:
    model = Model(kind, head)
    tokens = np.random.default_rng(0).integers(0, model.vocab, 8).tolist()
    for m in rows:
        for offset in (0, 29, 64) if m < 8 else (25,):
            alone, *caches_alone = model.one_by_one(tokens[:m], offset)
            assert close(alone, model.defined(tokens[:m], offset), 0.05)
            for seed in (0, *RANDOM_ORDERS):
                emulator.seed = seed
                caches = model.caches(offset)
                # Twice: the second launch meets the packets that the first left.
                for _ in range(2):
                    assert same_bits(model.step(tokens[:m], *caches, offset), alone), (m, offset, seed)
                for ours, theirs in zip((*caches[0], *caches[1]), (*caches_alone[0], *caches_alone[1]), strict=True):
                    assert same_bits(ours, theirs)
            emulator.seed = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "head", "cases"), [("ternary", "int8", [(3, 2080), (8, 30)]), ("int8", "bfloat16", [(5, 509)])]
)
def test_long_rows_and_long_contexts(
    kind: str, head: str, cases: list[tuple[int, int]], emulator: cuda_emulator.Emulator
) -> None:
    """More than 256 tiles of a row share packets of statistics, more than 16 chunks are combined in turns."""
    emulator.multiprocessors = 7
    model = Model(kind, head, layers=1, capacity=2112, hidden=128, ffn=4128, heads=(2, 1, 64))
    for m, offset in cases:
        tokens = list(range(m))
        alone, *_ = model.one_by_one(tokens, offset)
        assert close(alone, model.defined(tokens, offset), 0.05)
        for emulator.seed in (0, *RANDOM_ORDERS):
            assert same_bits(model.step(tokens, *model.caches(offset), offset), alone), (m, offset, emulator.seed)
        emulator.seed = 0


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head", "multiprocessors"), [("int8", "int8", 12), ("ternary", "bfloat16", 3)])
def test_a_chain_of_steps_equals_single_ones_by_bits(
    kind: str, head: str, multiprocessors: int, emulator: cuda_emulator.Emulator
) -> None:
    """Three blocks have tiles of everything; of twelve, half have none of the rows, and most none of the head."""
    emulator.multiprocessors = multiprocessors
    model = Model(kind, head)
    all_ids, shuffled = np.arange(model.vocab), np.random.default_rng(1).permutation(model.vocab)
    for tokens, offset, count, d2t in (([5], 30, 3, all_ids), ([7, 1, 2], 0, 2, shuffled)):
        expected, *caches_expected = model.chosen_one_by_one(tokens, offset, count, d2t)
        ids = None if d2t is all_ids else mx.array(d2t, mx.uint32)
        for emulator.seed in RANDOM_ORDERS:
            caches = model.caches(offset)
            assert np.array(model.step.greedy_tokens(tokens, *caches, offset, count, ids)).tolist() == expected
            for ours, theirs in zip((*caches[0], *caches[1]), (*caches_expected[0], *caches_expected[1]), strict=True):
                assert same_bits(ours, theirs)
        emulator.seed = 0


@pytest.mark.slow
def test_of_equal_logits_a_chain_chooses_the_lowest_id(emulator: cuda_emulator.Emulator) -> None:
    for emulator.multiprocessors in (1, 4):
        model = Model("ternary", "bfloat16", layers=1)
        zeros = cuda.prepare_dense(mx.zeros((model.vocab, model.hidden), mx.bfloat16))
        model.step.head = zeros
        model.step.fixed[4] = zeros.data
        assert np.array(model.step.greedy_tokens([9], *model.caches(3), 3, 2, None)).tolist() == [0, 0]


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_multiprocessors_nor_on_where_tokens_come_from(
    emulator: cuda_emulator.Emulator,
) -> None:
    model = Model("ternary", "bfloat16")
    expected = model.step([3, 1, 2], *model.caches(33), 33)
    for emulator.multiprocessors in (1, 3, 40):
        again = Model("ternary", "bfloat16")
        assert same_bits(again.step(mx.array([3, 1, 2], mx.uint32), *again.caches(33), 33), expected)


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
    assert same_bits(narrow.step([1, 2], *narrow.caches(33), 33), wide.step([1, 2], *wide.caches(33), 33))


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
def test_more_blocks_than_multiprocessors_would_wait_for_ever(emulator: cuda_emulator.Emulator) -> None:
    model = Model("ternary", "bfloat16", layers=1)
    emulator.multiprocessors = 5
    emulator.resident = 4
    with pytest.raises(RuntimeError, match="1 blocks are not resident"):
        model.step([1, 2], *model.caches(3), 3)


# What the tests would notice


def faults_of_a_step(emulator: cuda_emulator.Emulator, expected: mx.array) -> str:
    """What goes wrong with two launches after each other, in some order."""
    model = Model("ternary", "bfloat16", layers=1)
    for emulator.seed in (0, *RANDOM_ORDERS):
        for _ in range(2):
            try:
                logits = model.step([1, 2], *model.caches(33), 33)
            except RuntimeError as error:
                return str(error)
            if not same_bits(logits, expected):
                return "other bits"
    return "none"


@pytest.fixture
def expected(emulator: cuda_emulator.Emulator) -> mx.array:
    model = Model("ternary", "bfloat16", layers=1)
    return model.step([1, 2], *model.caches(33), 33)


BROKEN = [
    ("exchange.cuh", "if (!missing) {", "if (true) {", "other bits"),
    ("exchange.cuh", "__float_as_uint(largest), 0, number)", "__float_as_uint(largest), 0, ~0u)", "all wait for each"),
    ("exchange.cuh", "  __syncthreads();\n  if (m < M) {", "  if (m < M) {", "other bits"),
    (
        "exchange.cuh",
        "  __syncthreads();\n  if (m < M) {",
        "  if (m < M) {\n    __syncthreads();",
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
    emulator: cuda_emulator.Emulator,
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
        assert fault in faults_of_a_step(emulator, expected)
    finally:
        for cached in (text, kernel):
            cached.cache_clear()
