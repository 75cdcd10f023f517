"""One forward pass for few rows, prompts, several sequences and packed rows: the same bits, whatever stands beside."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from decode.models.cache import KVCache, NewRows, Packed
from decode.models.checkpoint import find_model, find_teacher
from decode.models.transformer import PREFILL_CHUNK, Transformer

LENGTHS = [1, 20, 7, 40]


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Transformer:
    return find_teacher(str(small_teacher)).load("int8")


@pytest.fixture(scope="module", params=["teacher", "draft"])
def model(request: pytest.FixtureRequest, teacher: Transformer, weak_draft: Path) -> Transformer:
    """Everything of them is ternary or int8, so that no library multiplies a row differently among others."""
    return teacher if request.param == "teacher" else find_model(str(weak_draft), "--draft").load("int8", "int8")


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, count]).integers(3, 16000, count).tolist()


def bits(array: mx.array) -> np.ndarray:
    return np.array(array).view(np.uint32)


def after(model: Transformer, prompts: list[list[int]]) -> KVCache:
    """A cache of several sequences that hold these prompts, put there together and padded."""
    padded = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    cache = model.new_cache(len(prompts))
    model.forward(padded, cache)
    cache.offsets = [len(prompt) for prompt in prompts]
    return cache


def states(model: Transformer, tokens: list[int], taps: list[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Logits and tapped states of tokens that are put into a cache one by one."""
    cache = model.new_cache()
    steps = [model.forward([token], cache, taps) for token in tokens]
    hidden = {tap: bits(mx.concatenate([step.hidden[tap] for step in steps])) for tap in taps}
    return bits(mx.concatenate([step.logits for step in steps])), hidden


def all_taps(model: Transformer) -> list[int]:
    return sorted({0, len(model.layers) // 2, len(model.layers) - 1})


def test_taps_change_nothing_and_are_what_leaves_their_layers(model: Transformer) -> None:
    """The last one's leads to the logits; the first one's is the whole of a model that ends there."""
    tokens, taps = ids(8), all_taps(model)
    tapped = model.forward(tokens, model.new_cache(), taps)
    assert np.array_equal(bits(tapped.logits), bits(model.forward(tokens, model.new_cache()).logits))
    assert sorted(tapped.hidden) == taps
    last = len(model.layers) - 1
    logits = model.logits(model.normed(tapped.hidden[last]))
    assert np.allclose(np.array(logits), np.array(tapped.logits), rtol=0, atol=0.02 * np.abs(np.array(logits)).max())
    layers, model.layers = model.layers, model.layers[:1]
    try:
        cache = KVCache(1, model.shape.kv_heads, model.shape.head_dim)
        alone = model.forward(tokens, cache, [0]).hidden[0]
    finally:
        model.layers = layers
    assert np.array_equal(bits(alone), bits(tapped.hidden[0]))


def test_states_of_few_rows_of_a_prompt_and_of_packed_rows_are_those_of_single_tokens(model: Transformer) -> None:
    tokens, taps = ids(60), all_taps(model)
    logits, hidden = states(model, tokens, taps)
    stepped = model.step(tokens, model.new_cache(), taps)
    assert np.array_equal(bits(stepped.logits), logits)
    packed = np.array([[*tokens[:60], *tokens[:4]], [*tokens[:9], *tokens[:55]]])
    segments = np.array([[1] * 60 + [2] * 4, [4] * 9 + [9] * 55])
    found = model.forward(packed, Packed(segments), taps)
    for tap in taps:
        assert np.array_equal(bits(stepped.hidden[tap]), hidden[tap])
        assert np.array_equal(bits(model.prefill(tokens, model.new_cache(), taps)[tap]), hidden[tap])
        expected = np.concatenate([hidden[tap][: len(part)] for part in (range(60), range(4), range(9), range(55))])
        assert np.array_equal(bits(found.hidden[tap]), expected)
    assert np.array_equal(bits(found.logits)[:60], logits)


def test_a_prompt_is_put_into_the_cache_in_chunks_counted_from_its_start(
    teacher: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    forward = Transformer.forward

    def noted(model: Transformer, tokens: list[int], *rest: object) -> object:
        chunks.append(len(tokens))
        return forward(model, tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Transformer, "forward", noted)
    cache = teacher.new_cache()
    taps = teacher.prefill(ids(PREFILL_CHUNK + 40), cache, [3])
    assert chunks == [PREFILL_CHUNK, 40] and taps[3].shape == (PREFILL_CHUNK + 40, teacher.embedding.shape[1])
    teacher.prefill(ids(PREFILL_CHUNK), cache)
    assert chunks[2:] == [PREFILL_CHUNK - 40, 40] and cache.offset == 2 * PREFILL_CHUNK + 40
    assert teacher.prefill([], cache, [3])[3].shape == (0, teacher.embedding.shape[1]) and len(chunks) == 4


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_of_several_sequences_have_the_bits_of_each_sequence_alone(model: Transformer, rows: int) -> None:
    prompts, taps = [ids(length) for length in LENGTHS], all_taps(model)
    cache = after(model, prompts)
    tokens = np.array([ids(2 * rows, seed=length) for length in LENGTHS])
    found = [model.forward(tokens[:, :rows], cache, taps)]
    assert cache.offsets == [length + rows for length in LENGTHS]
    some = NewRows(cache, [rows if i in (0, 2) else 0 for i in range(len(LENGTHS))])
    found.append(model.forward(tokens[[0, 2], rows:].reshape(-1), some))
    assert cache.offsets == [length + rows * (2 if i in (0, 2) else 1) for i, length in enumerate(LENGTHS)]
    for i, prompt in enumerate(prompts):
        single = model.new_cache()
        model.prefill(prompt, single)
        alone = model.step(tokens[i, :rows].tolist(), single, taps)
        places = slice(i * rows, (i + 1) * rows)
        assert np.array_equal(bits(found[0].logits[places]), bits(alone.logits)), i
        for tap in taps:
            assert np.array_equal(bits(found[0].hidden[tap][places]), bits(alone.hidden[tap])), (i, tap)
        if i in (0, 2):
            places = slice(rows) if i == 0 else slice(rows, 2 * rows)
            again = model.step(tokens[i, rows:].tolist(), single)
            assert np.array_equal(bits(found[1].logits[places]), bits(again.logits)), i


def test_an_offset_belongs_to_a_cache_of_one_sequence(teacher: Transformer) -> None:
    with pytest.raises(ValueError):
        _ = teacher.new_cache(2).offset
    with pytest.raises(ValueError):
        teacher.new_cache(2).offset = 3


def test_a_batch_writes_to_one_cache(teacher: Transformer) -> None:
    """Copies of it would take longer than the steps, and memory."""
    cache = teacher.new_cache(4)
    cache.reserve(2048)
    mx.eval(cache.keys, cache.values)
    whole = sum(array.nbytes for array in (*cache.keys, *cache.values))
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    tokens = mx.array([5, 6, 7, 8])
    for _ in range(3):
        tokens = teacher.best_tokens(teacher.forward(tokens[:, None], cache).logits)
        mx.eval(tokens, cache.keys, cache.values)  # a step queued behind another would copy what that one still holds
    assert mx.get_peak_memory() - base < whole / 8
