"""Decoding with a draft whose head knows only part of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import SHIPPED, TEACHER, trimmed_copy

from decode.drafters.model import ModelDrafter
from decode.engine import Request, generate
from decode.models.checkpoint import find_model, find_teacher
from decode.models.transformer import Transformer
from decode.prompts import make_prompt
from decode.sampling import Sampling
from decode.session import Session
from decode.tokenizer import Tokenizer

VOCAB = 16_384


@pytest.fixture(scope="module")
def kept() -> np.ndarray:
    """A third of the vocabulary, with most of what is often said."""
    ids = np.concatenate(
        [np.arange(4000), np.random.default_rng(0).choice(np.arange(4000, VOCAB), 1500, replace=False)]
    )
    return np.sort(ids).astype(np.int32)


@pytest.fixture(scope="module")
def folder(kept: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped draft, its head trimmed."""
    return trimmed_copy(SHIPPED, tmp_path_factory.mktemp("drafts") / "trimmed", kept)


@pytest.fixture(scope="module")
def trimmed(folder: Path) -> Transformer:
    return find_model(str(folder), "--draft").load()


@pytest.fixture(scope="module")
def teacher() -> Transformer:
    return find_teacher(None).load()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return Tokenizer(TEACHER).encode_prompt(make_prompt("Explain in two sentences why the sky is blue.", "1"))


def test_its_logits_are_those_of_the_whole_head(trimmed: Transformer, kept: np.ndarray, prompt: list[int]) -> None:
    whole = find_model(str(SHIPPED), "--draft").load()
    rows = [np.array(model.step(prompt[:8], model.new_cache()).logits) for model in (whole, trimmed)]
    assert np.allclose(rows[1], rows[0][:, kept], rtol=1e-5, atol=1e-5)


def test_greedy_speculation_changes_nothing(
    teacher: Transformer, trimmed: Transformer, kept: np.ndarray, prompt: list[int]
) -> None:
    request = Request(prompt, 60)
    plain = [t for r in generate(teacher, request) for t in r.tokens]
    rounds = list(generate(teacher, request, ModelDrafter(trimmed), 3))
    assert [t for r in rounds for t in r.tokens] == plain
    # Rows taken for ids would hardly ever be right.
    assert sum(r.accepted for r in rounds) > 0.1 * sum(r.drafted for r in rounds)


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}])
def test_what_it_samples_from_is_zero_outside_its_tokens(
    trimmed: Transformer, kept: np.ndarray, prompt: list[int], options: dict[str, float]
) -> None:
    drafter = ModelDrafter(trimmed, Sampling(temperature=1.0, **options))  # type: ignore[arg-type]
    drafter.start(prompt, {})
    proposal = drafter.propose(prompt, 8)
    drafted, q = proposal.tokens, proposal.q
    assert isinstance(drafted, list) and q is not None
    assert q.shape == (8, VOCAB) and np.allclose(q.sum(axis=1), 1)
    assert not np.delete(q, kept, axis=1).any()
    assert set(drafted) <= set(kept.tolist()) and (q[np.arange(8), drafted] > 0).all()


@pytest.mark.slow
def test_sampling_with_it_keeps_the_teachers_distribution(
    small_teacher: Path, trimmed: Transformer, kept: np.ndarray, prompt: list[int]
) -> None:
    """Tokens that the draft cannot propose come as often as the teacher alone would say them."""
    teacher = find_teacher(str(small_teacher)).load()
    sampling = Sampling(temperature=1.5)
    cache = teacher.new_cache()
    teacher.prefill(prompt[:-1], cache)
    p = sampling.probabilities(np.array(teacher.step(prompt[-1:], cache).logits))[0]
    outside = 1 - p[kept].sum()
    assert 0.02 < outside < 0.95
    n = 300
    hits = 0
    for seed in range(n):
        request = Request(prompt, 2, sampling=sampling, seed=seed)
        first = next(generate(teacher, request, ModelDrafter(trimmed, sampling, seed=seed), 1))
        hits += first.tokens[0] not in kept
    assert abs(hits - n * outside) < 4 * np.sqrt(n * outside * (1 - outside))


@pytest.mark.slow
def test_a_session_decodes_with_it(folder: Path, kept: np.ndarray) -> None:
    """Through int8 weights, where kernels are native."""
    session = Session(find_teacher(None), find_model(str(folder), "--draft"), k=3, max_tokens=24)
    prompt = make_prompt("The old man", "1")
    ids = session.encode([prompt])[0]
    outputs = [session.answer(prompt, ids, 0, speculative=turn) for turn in (True, False)]
    assert outputs[0].tokens == outputs[1].tokens
    assert session.draft is not None and session.draft.head.n == len(kept)
    assert mx.array_equal(session.draft.embedding[:5], find_model(str(folder), "--draft").load().embedding[:5])
