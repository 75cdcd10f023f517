"""The CUDA backend against the reference; runs where MLX runs on an NVIDIA GPU, and is skipped elsewhere."""

from __future__ import annotations

import itertools
import json
import lzma

import mlx.core as mx
import numpy as np
import pytest
from arrays import close, floats, normal, random_ternary, same_bits
from attention_checks import (
    FEW,
    LONG,
    SEVERAL,
    attention_shape,
    caches,
    check_definition,
    check_rounding,
    check_rows_alone,
    qkv_rows,
)
from choice_checks import check_choice, check_greedy_choice, check_top

from kernels import reference
from kernels.backends import device_backend
from kernels.errors import UserError
from kernels.ops import ChoosesTokens, Epilogue, Spans
from kernels.self_test import self_test

if device_backend() != "cuda":
    pytest.skip("MLX does not run on an NVIDIA GPU here", allow_module_level=True)

from decode.models.cache import KVCache, NewRows
from decode.models.checkpoint import DEFAULT_TEACHER, ROOT, find_model, find_teacher
from decode.models.reader import Reader, load_reader
from decode.models.transformer import Precision, Transformer
from decode.tokenizer import Tokenizer
from kernels import cuda

# Fused shapes of the embedded teacher and of BitNet-2B, and odd ones.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (24, 68), (12, 20), (40, 4)]
SHAPES_2B = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]
EPILOGUES: list[Epilogue | None] = [None, "relu2_mul", "silu_mul"]


def test_self_test() -> None:
    assert self_test(cuda) is None


@pytest.mark.parametrize(("n", "k"), SHAPES + SHAPES_2B)
def test_bitlinear_equals_the_reference_by_bits(n: int, k: int) -> None:
    ternary, scale = random_ternary(n, k)
    ours, theirs = cuda.prepare_ternary(ternary, scale), reference.prepare_ternary(ternary, scale)
    for m in [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 130]:
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        assert same_bits(cuda.bitlinear(xq, s, ours), reference.bitlinear(xq, s, theirs)), m


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (16384, 576), (640, 2560)])
def test_int8_linear_equals_the_reference_by_bits(n: int, k: int) -> None:
    weight = normal(n, k)
    ours, theirs = cuda.prepare_int8(weight), reference.prepare_int8(weight)
    for m in [1, 2, 3, 4, 5, 8, 9, 65]:
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        assert same_bits(cuda.int8_linear(xq, s, ours), reference.int8_linear(xq, s, theirs)), m


@pytest.mark.parametrize("m", [1, 3, 8, 13])
@pytest.mark.parametrize("value", [127, -127, -128])
def test_the_largest_sums(m: int, value: int) -> None:
    n, k = 48, 8192
    xq, s = mx.full((m, k), value, mx.int8), mx.full((m,), 3.0)
    y = cuda.bitlinear(xq, s, cuda.prepare_ternary(np.full((n, k), -1, np.int8), np.ones(n, np.float32)))
    assert (np.array(y) == np.float32(-value * k) * (np.float32(1) / np.float32(3))).all()


def test_quantize_rows_equals_the_reference_by_bits() -> None:
    rows = [normal(1, 2560)[0], mx.zeros(2560), mx.full((2560,), 1e-9), normal(1, 2560, seed=1)[0] * 1e30]
    halves = mx.array(np.resize(np.arange(-127, 128) + 0.5, 2560).astype(np.float32))
    x = mx.stack([*rows, halves])
    for ours, theirs in zip(cuda.quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("kind", ["ternary", "int8", "float", "float32"])
def test_linear(kind: str, epilogue: Epilogue | None) -> None:
    n, k, m = 96, 160, 8
    dense = normal(n, k).astype(mx.float32 if kind == "float32" else mx.bfloat16)
    ternary = random_ternary(n, k)
    ours, theirs = (
        backend.prepare_ternary(*ternary)
        if kind == "ternary"
        else backend.prepare_int8(dense)
        if kind == "int8"
        else backend.prepare_dense(dense)
        for backend in (cuda, reference)
    )
    width = n if epilogue is None else n // 2
    x, norm, residual = normal(m, k), normal(k), normal(m, width, seed=3)
    y = cuda.linear(x, ours, norm=norm, eps=1e-5, epilogue=epilogue, residual=residual)
    expected = reference.linear(x, theirs, norm=norm, eps=1e-5, epilogue=epilogue, residual=residual)
    assert close(y, expected, 2e-2)  # an int8 may round the other way where norms differ in the last bit
    for i in range(m):
        row = slice(i, i + 1)
        alone = cuda.linear(x[row], ours, norm=norm, eps=1e-5, epilogue=epilogue, residual=residual[row])
        assert same_bits(alone, y[row])


# Of the embedded teacher and of BitNet-2B, where all is ternary, their heads, and odd ones.
MANY_ROWS: list[tuple[str, int, int, Epilogue | None]] = [
    ("ternary", 960, 576, None),
    ("ternary", 3072, 576, "relu2_mul"),
    ("ternary", 576, 1536, None),
    ("ternary", 13824, 2560, "relu2_mul"),
    ("ternary", 2560, 6912, None),
    ("ternary", 24, 68, "relu2_mul"),
    ("int8", 3072, 576, "silu_mul"),
    ("float", 16384, 576, None),
    ("float", 4099, 2560, None),
    ("float", 1000, 264, "silu_mul"),
    ("float", 75, 132, None),
    ("float32", 75, 132, None),
]


@pytest.mark.parametrize(("kind", "n", "k", "epilogue"), MANY_ROWS)
def test_many_rows_have_the_bits_that_they_have_alone(kind: str, n: int, k: int, epilogue: Epilogue | None) -> None:
    dense = normal(n, k).astype(mx.float32 if kind == "float32" else mx.bfloat16)
    weight = (
        cuda.prepare_ternary(*random_ternary(n, k))
        if kind == "ternary"
        else cuda.prepare_int8(dense)
        if kind == "int8"
        else cuda.prepare_dense(dense)
    )
    width = n if epilogue is None else n // 2
    x, norm, residual = normal(2100, k), normal(k), normal(2100, width, seed=3)
    for m in (9, 64, 65, 300, 2100):
        y = cuda.linear(x[:m], weight, norm=norm, eps=1e-5, epilogue=epilogue, residual=residual[:m])
        for i in {0, 1, 8, m // 2, m - 2, m - 1}:
            row = slice(i, i + 1)
            alone = cuda.linear(x[row], weight, norm=norm, eps=1e-5, epilogue=epilogue, residual=residual[row])
            assert same_bits(alone, y[row]), (m, i)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = cuda.prepare_ternary(*random_ternary(24, 68))
    with pytest.raises(ValueError, match="do not fit the weight's k of 68"):
        cuda.linear(normal(1, 64), weight)


def test_a_float_product_of_any_width_gets_its_shared_memory() -> None:
    for k in (68, 2560, 6912):
        weight, x, residual = normal(24, k).astype(mx.bfloat16), normal(8, k), normal(8, 24)
        y = cuda.linear(x, cuda.prepare_dense(weight), residual=residual)
        assert close(y, reference.linear(x, reference.prepare_dense(weight), residual=residual), 1e-4)


@pytest.mark.parametrize("heads", [(4, 2, 32), (9, 3, 64), (20, 5, 128)])
@pytest.mark.parametrize("spans", [SEVERAL, LONG, FEW, Spans((40, 0, 2000), (133, 3, 50))])
def test_attention(heads: tuple[int, int, int], spans: Spans) -> None:
    check_rows_alone(cuda.attention, attention_shape(*heads), spans)
    check_definition(cuda.attention, attention_shape(*heads), spans, tolerance=1e-5)


def test_keys_and_values_are_rounded() -> None:
    check_rounding(cuda.attention, attention_shape())


@pytest.mark.parametrize("offset", [0, 24, 31, 250, 2042])
def test_any_number_of_rows_of_a_sequence_has_the_bits_of_single_ones(offset: int) -> None:
    shape = attention_shape(9, 3, 64)
    qkv = qkv_rows(shape, 8)
    together = cuda.attention(qkv, *caches(shape, (offset,), offset + 12), Spans((offset,), (8,)), shape)[0]
    for m in range(1, 8):
        few = cuda.attention(qkv[:m], *caches(shape, (offset,), offset + 40), Spans((offset,), (m,)), shape)[0]
        assert same_bits(few, together[:m]), m


@pytest.mark.parametrize("heads", [(9, 3, 64), (20, 5, 128)])
def test_rows_of_many_sequences_have_the_bits_of_single_ones(heads: tuple[int, int, int]) -> None:
    """One row of each, and prompts of many: each way to attention."""
    shape, rng = attention_shape(*heads), np.random.default_rng(0)
    for spans in (
        Spans(tuple(rng.integers(0, 300, 200).tolist()), tuple((rng.random(200) < 0.8).astype(int).tolist())),
        Spans((0, 31, 0, 200), (512, 100, 65, 9)),
    ):
        check_rows_alone(cuda.attention, shape, spans)


def test_a_generation_in_steps_has_the_bits_of_one_pass() -> None:
    """What rows leave in the caches, in place, is what those behind them read, without a wait between them."""
    shape, rows = attention_shape(9, 3, 64), 40
    qkv = qkv_rows(shape, 3 * rows)
    whole = cuda.attention(qkv, *caches(shape, (5, 0, 64), 128), Spans((5, 0, 64), (rows,) * 3), shape)[0]
    k, v = caches(shape, (5, 0, 64), 128)
    steps = []
    for i in range(rows):
        out, k, v = cuda.attention(qkv[i::rows], k, v, Spans((5 + i, i, 64 + i), (1,) * 3), shape)
        steps.append(out)
    together = mx.stack(steps, axis=1).reshape(3 * rows, -1)
    assert same_bits(together, whole)


def test_packed_rows_have_the_bits_of_sequences() -> None:
    for heads in ((4, 2, 32), (9, 3, 64), (20, 5, 128)):
        shape = attention_shape(*heads)
        segments = np.zeros((3, 145), np.int32)
        segments[0, :7], segments[0, 7:140], segments[1, 144:], segments[2] = 5, 6, 6, 6
        qkv = qkv_rows(shape, segments.size)
        packed = cuda.attention_packed(qkv.reshape(3, 145, -1), segments, shape)
        spans = Spans((0,) * 6, (7, 133, 5, 144, 1, 145))
        alone = cuda.attention(qkv, *caches(shape, spans.offsets, 160), spans, shape)[0]
        assert same_bits(packed, alone.reshape(3, 145, -1))
        with mx.stream(mx.cpu):  # a library on the GPU may multiply with fewer bits
            defined = reference.attention_packed(qkv.reshape(3, 145, -1), segments, shape)
        assert close(packed, defined, 1e-2)  # a key may be turned to the other side of the middle of two bfloat16


@pytest.mark.parametrize("n", [1, 700, 16384, 128256])
def test_choices(n: int) -> None:
    check_greedy_choice(cuda, n, rows=64)
    check_choice(cuda, n, 0.8)


@pytest.mark.parametrize(("n", "k"), [(32, 32), (5003, 64), (16384, 32), (128256, 128)])
def test_the_top_of_logits(n: int, k: int) -> None:
    check_top(cuda, n, k, rows=64)


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("head", ["float", "int8"])
def test_the_fused_step_equals_its_rows_alone_by_bits_and_the_single_operations_nearly(head: Precision, m: int) -> None:
    model = find_teacher(None).load(head)
    assert model.fused_step is not None
    rng = np.random.default_rng(m)
    prompt, tokens = rng.integers(0, 16000, 2040).tolist(), rng.integers(0, 16000, m).tolist()
    for length in (1, 20, 29, 300, 2040):
        cache = model.new_cache()
        model.prefill(prompt[:length], cache)
        together = model.step(tokens, cache).logits
        cache = model.new_cache()
        model.prefill(prompt[:length], cache)
        alone = mx.concatenate([model.step([token], cache).logits for token in tokens])
        assert same_bits(together, alone), length
    model.fused_step = None
    cache = model.new_cache()
    model.prefill(prompt, cache)
    assert divergence(model.step(tokens, cache).logits, together) < 0.05


def divergence(x: mx.array, y: mx.array) -> float:
    """The largest KL divergence of a row's distribution in y from that in x, in nats. One activation that is rounded to
    another int8 moves all that follows a little, over 30 layers by a few hundredths of the largest logit."""
    p, q = (logits - mx.logsumexp(logits, axis=-1, keepdims=True) for logits in (x, y))
    return float((mx.exp(p) * (p - q)).sum(axis=-1).max())


@pytest.mark.parametrize("head", ["float", "int8"])
def test_a_chain_of_steps_chooses_what_single_ones_do(head: Precision) -> None:
    model = find_teacher(None).load(head)
    rng = np.random.default_rng(2)
    prompt = rng.integers(0, 16000, 2030).tolist()
    for length in (1, 20, 31, 300, 2030):
        for tokens in ([7], [3, 9], [1, 2, 3, 4, 5]):
            chained, single = model.new_cache(), model.new_cache()
            for cache in (chained, single):
                model.prefill(prompt[:length], cache)
                cache.reserve(16)
            chosen = np.array(model.greedy_tokens(tokens, chained, 7)).tolist()
            feed, expected = tokens, []
            for _ in range(7):
                feed = np.array(model.best_tokens(model.step(feed, single).logits[-1:])).tolist()
                expected += feed
            assert chosen == expected, (length, tokens)
            # What a chain has left in the caches is what steps leave.
            assert same_bits(model.step([5], chained).logits, model.step([5], single).logits), (length, tokens)


class Read:
    """The shipped reader, its teacher, and a text with the teacher's states."""

    def __init__(self, head: Precision) -> None:
        teacher = find_teacher(None)
        self.model: Transformer = teacher.load(head)
        draft = find_model(f"{DEFAULT_TEACHER}-reader", "--draft")
        self.draft: Reader = load_reader(draft, teacher, self.model, head)
        with lzma.open(ROOT / "data" / "wiki.jsonl.xz", "rt") as lines:
            whole = "".join(json.loads(line)["text"] for line in itertools.islice(lines, 40))
        self.text = Tokenizer(DEFAULT_TEACHER).encode_text(whole)[:2040]
        self.hidden = self.model.prefill(self.text, self.model.new_cache(), self.draft.taps)

    def cache(self, length: int) -> KVCache:
        cache = self.draft.new_cache()
        states = {tap: rows[:length] for tap, rows in self.hidden.items()}
        self.draft.prefill(mx.array(self.text[1 : length + 1], mx.uint32), states, cache)
        cache.reserve(16)
        return cache

    def proposed(self, first: int, rows: int, cache: KVCache, count: int) -> mx.array:
        states = {tap: x[first : first + rows] for tap, x in self.hidden.items()}
        return self.draft.greedy_tokens(self.text[first + 1 : first + rows + 1], states, cache, count)


@pytest.mark.parametrize("head", ["float", "int8"])
def test_a_readers_proposals_are_mostly_those_of_single_operations(head: Precision) -> None:
    read, same = Read(head), []
    fused = read.draft.fused
    assert fused is not None
    for length in (1, 20, 31, 300, 2020):
        for rows in range(1, 9):
            found = []
            for read.draft.fused in (fused, None):
                cache = read.cache(length)
                tokens = np.array(read.proposed(length, rows, cache, 3)).tolist()
                found.append((tokens, [x[:, :, : length + rows] for x in (*cache.keys, *cache.values)]))
            (ours, rows_of_ours), (theirs, rows_of_theirs) = found
            same.append(ours == theirs)
            assert all(close(floats(a), floats(b), 0.05) for a, b in zip(rows_of_ours, rows_of_theirs, strict=True))
    assert np.mean(same) >= 0.9


@pytest.mark.parametrize("head", ["float", "int8"])
def test_a_readers_rows_have_the_bits_that_they_have_alone(head: Precision) -> None:
    """Between launches of the teacher, without a wait."""
    read = Read(head)
    assert read.draft.fused is not None
    for length in (1, 31, 300):
        for rows in range(1, 9):
            together, alone, teachers = read.cache(length), read.cache(length), read.model.new_cache()
            said = read.proposed(length, rows, together, 3)
            for i in range(rows):
                logits = read.model.step(read.text[i : i + 1], teachers).logits
                last = read.proposed(length + i, 1, alone, 3 if i == rows - 1 else 1)
            mx.eval(said, last, logits)
            assert said.tolist() == last.tolist(), (length, rows)
            for a, b in zip((*together.keys, *together.values), (*alone.keys, *alone.values), strict=True):
                assert same_bits(a[:, :, : length + rows + 2], b[:, :, : length + rows + 2])
            assert same_bits(read.model.step(read.text[:rows], read.model.new_cache()).logits[-1:], logits)


def test_steps_of_many_sequences_choose_what_single_operations_do() -> None:
    """Compiled, for full and other numbers of rows, behind prompts of many lengths, without a wait between them."""
    model = find_teacher(None).load()
    rng, slots = np.random.default_rng(3), 300
    counts = rng.integers(1, 90, slots).tolist()
    prompts = rng.integers(0, 16000, sum(counts)).tolist()
    uniform, temperature = (
        rng.random((24, slots), np.float32),
        np.where(np.arange(slots) % 2, 0.8, 0).astype(np.float32),
    )
    step, found = model.fused_step, []
    assert isinstance(step, ChoosesTokens)
    for model.fused_step in (step, None):
        cache = model.new_cache(slots)
        model.forward(prompts, NewRows(cache, counts))
        mx.eval(cache.keys, cache.values)
        said: list[mx.array] = []
        for sequences in (list(range(slots)), list(range(0, slots, 3)), [7, 150, 299]):
            feed = mx.array(sequences, mx.uint32)
            for i in range(8):
                feed = model.choose_next(feed, cache, sequences, temperature[sequences], uniform[i, sequences])
                mx.async_eval(feed, cache.keys, cache.values)
                said.append(feed)
        mx.eval(cache.keys, cache.values)
        rows = [np.array(keys[i, :, :at].view(mx.uint16)) for keys in cache.keys for i, at in enumerate(cache.offsets)]
        found.append((np.array(mx.concatenate(said)), rows))
    (chosen, rows), (expected, expected_rows) = found
    assert chosen.tolist() == expected.tolist()
    assert all((mine == theirs).all() for mine, theirs in zip(rows, expected_rows, strict=True))


def test_many_steps_wait_for_each_other() -> None:
    """More rows than a step takes go in several launches, of which MLX sees no more than that they follow."""
    model = find_teacher(None).load()
    tokens = np.random.default_rng(1).integers(0, 16000, 60).tolist()
    cache = model.new_cache()
    together = model.step(tokens, cache).logits
    cache = model.new_cache()
    assert same_bits(together, mx.concatenate([model.step([token], cache).logits for token in tokens]))


def test_unsupported_shapes_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="multiple of 4, not 70"):
        cuda.prepare_ternary(*random_ternary(12, 70))
