"""The figures mean what their names say."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from decode.metrics import Metrics, Round, is_looping


@dataclass(frozen=True)
class At:
    """When proposals had been computed."""

    seconds: float


def rounds() -> list[tuple[Round, float, float]]:
    """Rounds, when each was asked for and when it came."""
    return [
        (Round([1, 2, 3, 4], 3, 3, At(10.1)), 10.0, 10.3),  # type: ignore[arg-type]
        (Round([5], 3, 0, At(11.1)), 11.0, 11.3),  # type: ignore[arg-type]
        (Round([6, 7], 2, 1, At(12.1)), 12.0, 12.3),  # type: ignore[arg-type]
        (Round([8]), 13.0, 13.1),
    ]


def test_figures() -> None:
    metrics = Metrics(prefill_seconds=5.0)
    for step in rounds():
        metrics.add(*step)
    assert (metrics.tokens, metrics.rounds, metrics.drafted, metrics.accepted) == (
        8,
        3,
        8,
        4,
    )  # the last drafts nothing
    assert metrics.acceptance_rate == 0.5
    assert metrics.mean_acceptance_length == 1 + 4 / 3
    assert metrics.acceptance_per_position == [2 / 3, 1 / 3, 1 / 3]
    assert metrics.times() == pytest.approx(
        {"prefill_seconds": 5.0, "decode_seconds": 1.0, "draft_seconds": 0.3, "verify_seconds": 0.7}
    )
    assert metrics.tok_per_s == pytest.approx(8.0)  # the prefill is not in it


def test_merging_equals_adding() -> None:
    whole, first, second = Metrics(), Metrics(), Metrics()
    for i, step in enumerate(rounds()):
        whole.add(*step)
        (second if i < 2 else first).add(*step)
    first.merge(second)
    assert first.acceptance() == whole.acceptance()
    assert first.times() == pytest.approx(whole.times())
    assert first.tokens == whole.tokens


def test_nothing_done() -> None:
    metrics = Metrics()
    assert metrics.tok_per_s == 0.0
    metrics.add(Round([8]), 0.0, 0.5)
    assert metrics.acceptance_rate is metrics.mean_acceptance_length is None
    assert metrics.acceptance_per_position == [] and metrics.tok_per_s == 2.0


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([], False),
        ([7, 7, 7], False),
        ([7, 7, 7, 7], True),
        ([1, 2, 3] + [7] * 4, True),
        ([7] * 4 + [1], False),
        ([9] + [1, 2, 3] * 4, True),
        ([1, 2, 3] * 3 + [1, 2], False),
        (list(range(16)) * 4, True),
        ([7] + list(range(16)) * 3, False),
        ([7] + list(range(17)) * 3, True),
        (list(range(17)) * 3, True),
        (list(range(1, 17)) + list(range(17)) * 2, False),
        ([7] * 9 + list(range(200)) * 3, True),
        ([7] * 9 + list(range(200)) * 2 + list(range(199)), False),
        (list(range(40)) * 2 + [1] + list(range(40)), False),
        (list(range(60)) * 3 + [7], False),
        (list(range(100)), False),
    ],
)
def test_loops(tokens: list[int], looping: bool) -> None:
    assert is_looping(tokens) is looping


def test_loops_up_to_a_length() -> None:
    for n in (1, 15, 16, 17, 18):
        assert is_looping(list(range(n)) * 4, longest=16) is (n <= 16)
