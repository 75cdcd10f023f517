"""What the native CPU backend does for decoding beside products: choices of tokens, their time, fused steps."""

import platform
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from arrays import normal, same_bits, stored
from conftest import SHIPPED, trimmed_copy

from kernels import reference

if platform.system() != "Linux":
    pytest.skip("the native CPU backend is built on Linux only", allow_module_level=True)

from decode.models.cache import NewRows
from decode.models.checkpoint import ROOT, find_model
from decode.models.transformer import Precision, Transformer
from kernels import cpu
from kernels.cpu import _native
from kernels.ops import ChoosesTokens

pytest_plugins = ("cpu_fixtures",)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100, 16384])
def test_argmax_equals_the_reference(n: int) -> None:
    for m in (1, 2, 8):
        x = normal(m, n, seed=m)
        coarse = mx.round(x)  # many equals, of which the lowest index counts
        for rows in (x, coarse, -mx.abs(coarse), x[:, ::-1], x.T, mx.broadcast_to(x[:1], (3, n))):
            best = cpu.argmax(rows)
            assert best.dtype == mx.uint32 and best.tolist() == reference.argmax(rows).tolist()


def test_argmax_takes_the_lowest_of_infinite_values() -> None:
    x = np.full((3, 40), -np.inf, np.float32)
    x[1, [7, 30]] = np.inf
    x[2, 39] = -1e38
    assert cpu.argmax(mx.array(x)).tolist() == reference.argmax(mx.array(x)).tolist() == [0, 7, 39]


def test_argmax_refuses_what_has_no_rows_of_floats() -> None:
    for x in (mx.zeros((3,)), mx.zeros((3, 0)), mx.zeros((2, 2), mx.int32)):
        with pytest.raises(ValueError, match=r"float32 \[m, n\]"):
            cpu.argmax(x)


@pytest.mark.parametrize("n", [1, 15, 17, 256, 300, 16384])
def test_choosing_equals_the_reference(isa: str, n: int) -> None:
    rng = np.random.default_rng(n)
    logits, temperature = normal(40, n, seed=n) * 3, mx.array(rng.choice([0, 0.3, 0.8, 1.5], 40).astype(np.float32))
    uniform = mx.array(rng.random(40, np.float32))
    for rows in (logits, (normal(n, 40, seed=n) * 3).T):
        chosen = cpu.choose(rows, temperature, uniform)
        assert chosen.dtype == mx.uint32
        assert chosen.tolist() == reference.choose(rows, temperature, uniform).tolist()
        alone = [cpu.choose(rows[i : i + 1], temperature[i : i + 1], uniform[i : i + 1]).item() for i in range(40)]
        assert chosen.tolist() == alone


def test_choices_are_distributed_as_the_softmax_is() -> None:
    logits, count = np.array([0.0, 1, 2, -1, 0.5] * 100, np.float32), 40_000
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    uniform = mx.array(np.random.default_rng(0).random(count, np.float32))
    chosen = cpu.choose(mx.broadcast_to(mx.array(logits), (count, 500)), mx.full((count,), 0.7), uniform)
    found = np.bincount(np.array(chosen), minlength=500).reshape(100, 5).sum(0)
    expected = count * p.reshape(100, 5).sum(0)
    assert (np.abs(found - expected) < 5 * np.sqrt(expected)).all()


def test_nothing_without_probability_is_chosen() -> None:
    logits = np.full((2, 1000), -np.inf, np.float32)
    logits[:, [3, 700]] = 0, -60
    uniform = mx.array(np.array([0, np.nextafter(np.float32(1), np.float32(0))], np.float32))
    for backend in (cpu, reference):
        assert backend.choose(mx.array(logits), mx.ones(2), uniform).tolist() == [3, 3]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (40, 40), (300, 32), (16384, 32), (5000, 600)])
def test_the_top_equals_the_reference(isa: str, n: int, k: int) -> None:
    x = normal(9, n, seed=n) * 3
    for rows in (x, mx.round(x), -mx.abs(mx.round(x)), (normal(n, 9) * 3).T):  # with many equals
        ours, theirs = cpu.top_k(rows, k, (1.0, 2.5)), reference.top_k(rows, k, (1.0, 2.5))
        assert ours[0].tolist() == theirs[0].tolist() and same_bits(ours[1], theirs[1])
        assert mx.allclose(ours[2], theirs[2], rtol=1e-5, atol=1e-4)
        assert all(same_bits(a[3:4], b) for a, b in zip(ours, cpu.top_k(rows[3:4], k, (1.0, 2.5)), strict=True))


def test_the_top_of_what_is_no_number() -> None:
    x = np.array([[np.nan, 1, -np.inf, 2, np.nan]], np.float32)
    assert cpu.top_k(mx.array(x), 2, ())[0].tolist() == [[3, 1]]
    assert sorted(cpu.top_k(mx.array(x), 5, ())[0].tolist()[0]) == [0, 1, 2, 3, 4]


def test_the_clock_tells_when_an_array_was_computed_and_not_what_came_after() -> None:
    """Its time is the host's, between those at which the host queued the work and saw it done."""
    x = normal(300, 300)
    before = time.perf_counter_ns()
    first = cpu.clock(x @ x)
    mx.async_eval(first)
    last = cpu.clock(x @ x @ x)
    mx.eval(last)
    after = time.perf_counter_ns()
    assert before < int(np.array(first)) < int(np.array(last)) < after


@pytest.fixture(params=[None, 100], ids=["whole", "trimmed"])
def draft(request: pytest.FixtureRequest, tmp_path: Path) -> Transformer:
    folder = SHIPPED
    if request.param:
        kept = np.random.default_rng(5).choice(16_384, request.param, replace=False)
        folder = trimmed_copy(SHIPPED, tmp_path / "trimmed", np.sort(kept).astype(np.int32))
    return find_model(str(folder), "--draft").load("int8", "int8")


@pytest.mark.parametrize("given", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_greedy_tokens_have_the_tokens_and_caches_of_single_steps(draft: Transformer, given: int, count: int) -> None:
    prompt = np.random.default_rng(353).integers(0, 16_384, 20 + given).tolist()  # does not repeat one token
    results = []
    for fused in (draft.fused_step, None):
        draft.fused_step = fused
        cache = draft.new_cache()
        draft.prefill(prompt[:20], cache)
        tokens = draft.greedy_tokens(prompt[20:], cache, count)
        assert tokens.dtype == mx.uint32 and cache.offset == 20 + given + count - 1
        results.append([tokens, *(array[:, :, : cache.offset] for array in (*cache.keys, *cache.values))])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert count < 5 or len(set(results[0][0].tolist())) > 1


def test_greedy_tokens_write_to_one_cache(draft: Transformer) -> None:
    """Copies of it take longer than the steps, and memory."""
    cache = draft.new_cache()
    cache.reserve(8192)
    draft.prefill([1, 2, 3], cache)
    whole = sum(array.nbytes for array in (*cache.keys, *cache.values))
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    for _ in range(3):
        mx.eval(draft.greedy_tokens([4], cache, 5))
    assert mx.get_peak_memory() - base < whole / 8


def test_greedy_tokens_refuse_what_does_not_fit(draft: Transformer) -> None:
    step, cache = draft.fused_step, draft.new_cache()
    assert step is not None
    cache.reserve(4)
    room = cache.keys[0].shape[2]
    step.greedy_tokens([1, 2], cache.keys, cache.values, room - 4, 3, None)
    for given, count, offset, d2t, complaint in (
        ([1, 2], 3, room - 3, None, "do not fit"),
        ([1] * 9, 1, 0, None, "1 to 8 tokens"),
        ([], 1, 0, None, "1 to 8 tokens"),
        ([1], 0, 0, None, "at least one token"),
        ([1], 1, 0, mx.zeros((5,), mx.uint32), "one id a row"),
    ):
        with pytest.raises(ValueError, match=complaint):
            step.greedy_tokens(given, cache.keys, cache.values, offset, count, d2t)


# Fused steps


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float", "int8"])
@pytest.mark.parametrize("model", ["teacher", "draft"])
def test_a_fused_step_has_the_bits_of_its_operations(
    model: str, precision: Precision, isa: str, small_teacher: Path
) -> None:
    folder = small_teacher if model == "teacher" else SHIPPED
    transformer = find_model(str(folder), "--draft").load(precision, precision)
    fused = transformer.fused_step
    assert fused is not None
    every = range(len(transformer.layers))
    cases = [(20, 3), (31, 8), (1, 1), (2, 2), (7, 4), (2038, 5), (31, 6), (32, 7)]
    for length, m in cases if isa == _native.available_isas()[0] else cases[:2]:
        rng = np.random.default_rng([length, m])
        prompt, tokens = rng.integers(0, 16000, length).tolist(), rng.integers(0, 16000, m).tolist()
        before = transformer.new_cache()
        transformer.prefill(prompt, before)
        results = []
        for step, taps in ((fused, every), (fused, ()), (None, every)):
            transformer.fused_step = step
            cache = transformer.new_cache()
            cache.keys, cache.values, cache.offset = list(before.keys), list(before.values), before.offset
            steps = [transformer.step(tokens, cache, taps), transformer.step(tokens[:1], cache, taps)]
            assert cache.offset == length + m + 1 and all(list(forward.hidden) == list(taps) for forward in steps)
            left = [forward.logits for forward in steps]
            left += [a[:, :, : cache.offset] for a in (*cache.keys, *cache.values)]
            results.append(left + [forward.hidden[tap] for tap in taps for forward in steps])
        tapped, plain, single = results
        assert all(same_bits(a, b) for a, b in zip(tapped, single, strict=True)), (length, m)
        assert all(same_bits(a, b) for a, b in zip(tapped, plain, strict=False)), (length, m)
        transformer.fused_step = fused


def test_a_fused_step_leaves_a_cache_that_others_hold_as_it_is() -> None:
    transformer = find_model(str(ROOT / "checkpoints" / "bitnet-smol-116m-draft"), "--draft").load()
    cache = transformer.new_cache()
    transformer.prefill([1, 2, 3], cache)
    held = list(cache.keys)
    before = [stored(keys) for keys in held]
    mx.eval(transformer.step([4], cache).logits)
    assert [stored(keys) for keys in held] == before
    assert stored(cache.keys[0]) != before[0]


def test_a_fused_step_refuses_what_does_not_fit() -> None:
    transformer = find_model(str(ROOT / "checkpoints" / "bitnet-smol-116m-draft"), "--draft").load()
    step, cache = transformer.fused_step, transformer.new_cache()
    assert step is not None
    cache.reserve(4)
    with pytest.raises(ValueError, match="do not fit"):
        step([1, 2], cache.keys, cache.values, cache.keys[0].shape[2] - 1)
    with pytest.raises(ValueError, match="1 to 8 tokens"):
        step([1] * 9, cache.keys, cache.values, 0)
    with pytest.raises(ValueError, match="two caches"):
        step([1], cache.keys[:1], cache.values[:1], 0)
    two = transformer.new_cache(2)
    two.reserve(4)
    with pytest.raises(ValueError, match="one sequence"):
        step([1], two.keys, two.values, 0)
    for taps in ((len(cache.keys),), (1, 0), (0, 0), (-1,)):
        with pytest.raises(ValueError, match="layers of the model, ascending"):
            step([1], cache.keys, cache.values, 0, taps)


def test_tokens_of_several_sequences_are_those_of_each_alone(small_teacher: Path, threads: int) -> None:
    """Chosen in one operation, among empty and unequal sequences, they have the bits of single operations."""
    teacher = find_model(str(small_teacher), "--teacher").load()
    step = teacher.fused_step
    assert isinstance(step, ChoosesTokens)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 16000, size).tolist() for size in (5, 40, 1, 300, 9)]
    temperature = np.array([0, 0.8, 0, 1.2, 0.8], np.float32)
    uniform = rng.random(5, np.float32)
    cache = teacher.new_cache(7)
    sequences = [0, 2, 3, 5, 6]
    counts = np.zeros(7, int)
    counts[sequences] = [len(prompt) for prompt in prompts]
    mx.eval(teacher.forward([token for prompt in prompts for token in prompt], NewRows(cache, counts.tolist())).logits)
    held = [cache.keys, cache.values, cache.offsets]
    for fused in (True, False):
        teacher.fused_step = step if fused else None
        cache.keys, cache.values, cache.offsets = list(held[0]), list(held[1]), list(held[2])
        fed = mx.array([7, 8, 9, 10, 11], mx.uint32)
        chosen = teacher.choose_next(fed, cache, sequences, temperature, uniform)
        assert cache.offsets == [6, 0, 41, 2, 0, 301, 10]
        for i, prompt in enumerate(prompts):
            alone = teacher.new_cache()
            teacher.prefill(prompt, alone)
            logits = teacher.step([7 + i], alone).logits
            expected = cpu.choose(logits, mx.array(temperature[i : i + 1]), mx.array(uniform[i : i + 1])).item()
            assert chosen[i].item() == expected
            end = alone.offset
            for ours, theirs in zip(cache.keys + cache.values, alone.keys + alone.values, strict=True):
                assert same_bits(ours[sequences[i], :, :end], theirs[0, :, :end])


def test_a_step_of_several_sequences_refuses_what_does_not_fit(small_teacher: Path) -> None:
    teacher = find_model(str(small_teacher), "--teacher").load()
    step, cache = teacher.fused_step, teacher.new_cache(2)
    assert isinstance(step, ChoosesTokens)
    cache.reserve(1)
    room, zeros = cache.keys[0].shape[2], np.zeros(2, np.float32)
    for tokens, sequences, offsets, complaint in (
        ([1, 2], [0, 0], [0, 0], "each of another"),
        ([1, 2], [0, 2], [0, 0], "each of another"),
        ([1, 2], [0, 1], [0, room], "do not fit"),
        ([1], [0, 1], [0, 0], "needs its sequence"),
        ([1, 2], [0, 1], [0, -1], "do not fit"),
    ):
        with pytest.raises(ValueError, match=complaint):
            step.choose_tokens(tokens, cache.keys, cache.values, sequences, offsets, zeros, zeros)
