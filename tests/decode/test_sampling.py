"""Sampling keeps the teacher's distribution, and the test for it can tell."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from decode.sampling import Sampling, accept, draw
from kernels import UserError

VOCAB = 6
DRAWS = 20_000
Accept = Callable[[list[int], np.ndarray | None, np.ndarray, np.random.Generator], tuple[int, int]]


def distributions(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(VOCAB), rows)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations Pearson's statistic lies above its mean (Wilson and Hilferty)."""
    free = len(counts) - 1
    ratio = float(((counts - expected) ** 2 / expected).sum()) / free
    return (ratio ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))


def surprise(accept_round: Accept, k: int = 2) -> float:
    """How far two emitted tokens are from the teacher's joint distribution, in standard deviations.

    The models' second distribution depends on the first token, as in a real round.
    """
    rng = np.random.default_rng(7)
    p = [distributions(1, 1)[0], distributions(2, VOCAB), distributions(3, 1)[0]]
    q = [distributions(4, 1)[0], distributions(5, VOCAB)]
    counts = np.zeros((VOCAB, VOCAB))
    for _ in range(DRAWS):
        first = draw(q[0], rng)
        drafted = [first, draw(q[1][first], rng)]
        teacher = np.stack([p[0], p[1][first], p[2]])
        n, own = accept_round(drafted[:k], np.stack([q[0], q[1][first]])[:k], teacher[: k + 1], rng)
        emitted = [*drafted[:n], own]
        if len(emitted) == 1:  # the next round begins: plain sampling after this token
            emitted.append(draw(p[1][own], rng))
        counts[emitted[0], emitted[1]] += 1
    expected = DRAWS * p[0][:, None] * p[1]
    return chi_square(counts.ravel(), expected.ravel())


def surprise_of_lookup(accept_round: Accept) -> float:
    """The same for one token where the proposal, always the likeliest, was chosen without chance."""
    rng = np.random.default_rng(7)
    p = distributions(1, 2)
    proposed = int(p[0].argmax())
    counts = np.zeros(VOCAB)
    for _ in range(DRAWS):
        n, own = accept_round([proposed], None, p, rng)
        counts[proposed if n else own] += 1
    return chi_square(counts, DRAWS * p[0])


def without_residual(
    drafted: list[int], q: np.ndarray | None, p: np.ndarray, rng: np.random.Generator
) -> tuple[int, int]:
    for i, token in enumerate(drafted):
        if rng.random() * (1.0 if q is None else q[i, token]) >= p[i, token]:
            return i, draw(p[i], rng)
    return len(drafted), draw(p[len(drafted)], rng)


def without_ratio(drafted: list[int], q: np.ndarray | None, p: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    for i, token in enumerate(drafted):
        if rng.random() >= p[i, token]:
            return i, draw(np.maximum(p[i] - q[i], 0), rng)
    return len(drafted), draw(p[len(drafted)], rng)


def credulous(drafted: list[int], q: np.ndarray | None, p: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    return len(drafted), draw(p[len(drafted)], rng)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_output_has_the_teachers_distribution(k: int) -> None:
    assert surprise(accept, k) < 4


def test_a_proposal_chosen_without_chance_keeps_the_distribution_too() -> None:
    assert surprise_of_lookup(accept) < 4
    assert surprise_of_lookup(without_residual) > 20
    assert surprise_of_lookup(credulous) > 20


@pytest.mark.slow
@pytest.mark.parametrize("broken", [without_residual, without_ratio, credulous])
def test_a_broken_sampler_is_found_out(broken: Accept) -> None:
    assert surprise(broken) > 20


def test_equal_distributions_always_accept() -> None:
    rng = np.random.default_rng(0)
    p = distributions(0, 4)
    for _ in range(500):
        drafted = [draw(p[i], rng) for i in range(3)]
        assert accept(drafted, p[:3], p, rng)[0] == 3


def test_what_the_teacher_rules_out_is_never_said() -> None:
    rng = np.random.default_rng(0)
    p = np.array([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    q = np.array([[0.9, 0.1, 0.0]])
    for _ in range(500):
        n, own = accept([0], q, p, rng)
        assert n == 0 and own in (1, 2)


def test_draw_follows_the_distribution() -> None:
    p = distributions(9, 1)[0]
    rng = np.random.default_rng(1)
    counts = np.bincount([draw(p, rng) for _ in range(DRAWS)], minlength=VOCAB)
    assert chi_square(counts, DRAWS * p) < 4
    assert chi_square(counts, DRAWS * p[::-1]) > 20
    assert {draw(np.array([0.0, 1.0, 0.0]), rng) for _ in range(100)} == {1}


def test_temperature() -> None:
    logits = np.array([[0.0, 1.0, 2.0]], np.float32)
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits[0] / temperature) / np.exp(logits[0] / temperature).sum()
        np.testing.assert_allclose(Sampling(temperature).probabilities(logits)[0], expected, rtol=1e-6)
    # None is so low or so high that it overflows: the highest alone is left, or all alike.
    for tiny in (1e-300, 1e-320, 5e-324):
        for options in ({}, {"top_p": 1e-320}, {"top_k": 2}):
            found = Sampling(tiny, **options).probabilities(100 * logits)  # type: ignore[arg-type]
            np.testing.assert_array_equal(found, [[0, 0, 1]])
    np.testing.assert_allclose(Sampling(1.7e308).probabilities(100 * logits), 1 / 3 * np.ones((1, 3)))


def test_top_k_and_top_p() -> None:
    p = np.array([[0.1, 0.4, 0.2, 0.3]])
    logits = np.log(p).astype(np.float32)

    def kept(**options: float) -> list[int]:
        found = Sampling(1.0, **options).probabilities(logits)[0]  # type: ignore[arg-type]
        assert found.sum() == pytest.approx(1)
        left = np.flatnonzero(found)
        np.testing.assert_allclose(found[left], p[0, left] / p[0, left].sum(), rtol=1e-5)
        return left.tolist()

    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_k=0) == kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=1e-9) == [1]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == kept(top_p=0.69) == [1, 3]
    assert kept(top_p=0.71) == [1, 2, 3]
    assert kept(top_p=0.95) == [0, 1, 2, 3]
    assert kept(top_k=3, top_p=0.5) == [1, 3]


def test_temperature_zero_is_greedy() -> None:
    assert Sampling().greedy and not Sampling(0.1).greedy


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "--temperature -0.1"),
        ({"temperature": math.nan}, "--temperature nan"),
        ({"temperature": math.inf}, "--temperature inf"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.1}, "--top-p 1.1"),
        ({"top_k": -1}, "--top-k -1"),
    ],
)
def test_impossible_settings(options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**options)  # type: ignore[arg-type]
