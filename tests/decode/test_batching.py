"""Continuous batching: what a sequence says does not depend on what else is in the batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from decode.batching import Batch, Job, Reply
from decode.engine import Request, generate
from decode.models.checkpoint import find_model
from decode.models.transformer import Transformer

END = frozenset(range(0, 16384, 40))  # so that a teacher of a few layers ends its replies at all lengths
MOST = 60


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Transformer:
    return find_model(str(small_teacher), "--teacher").load()


def prompts(count: int, longest: int = 90) -> list[list[int]]:
    rng = np.random.default_rng(count)
    return [rng.integers(1, 16000, rng.integers(1, longest)).tolist() for _ in range(count)]


def jobs_of(given: Iterable[list[int]], temperatures: tuple[float, ...] = (0.0, 0.8)) -> list[Job]:
    return [Job([p], [temperatures[i % len(temperatures)]], (3, i), len(p) + MOST) for i, p in enumerate(given)]


def run(teacher: Transformer, jobs: list[Job], slots: int, max_reply: int = MOST) -> list[list[Reply]]:
    found = dict(Batch(teacher, slots, max_reply, END).run(iter(jobs)))
    return [found[i] for i in range(len(jobs))]


def test_replies_do_not_depend_on_the_batch(teacher: Transformer) -> None:
    jobs = jobs_of(prompts(20))
    together = run(teacher, jobs, 6)
    assert {len(reply.tokens) for (reply,) in together} - {MOST}, "some must end early, so that others take their place"
    assert together == run(teacher, jobs, 1) == run(teacher, jobs, 20)
    assert run(teacher, jobs[::-1], 5)[::-1] == together


def test_two_groups_say_the_same(teacher: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, which works on one while the other's tokens are looked at; a window of steps at once."""
    jobs = jobs_of(prompts(20))
    alone = run(teacher, jobs, 6)
    monkeypatch.setattr("decode.batching.TWO_GROUPS", 5)
    monkeypatch.setattr(teacher, "async_decode", True)
    assert run(teacher, jobs, 5) == run(teacher, jobs, 4) == alone


def test_greedy_replies_are_those_of_plain_decoding(teacher: Transformer) -> None:
    given = [*prompts(8), list(range(1000, 2200))]  # the last is of several chunks
    for prompt, (reply,) in zip(given, run(teacher, jobs_of(given, (0.0,)), 4), strict=True):
        plain = [token for one in generate(teacher, Request(prompt, MOST, END)) for token in one.tokens]
        assert reply.tokens == plain[: len(reply.tokens)]
        assert len(reply.tokens) == len(plain) or reply.finish == "loop"


def test_a_conversation_goes_on_behind_each_reply(teacher: Transformer) -> None:
    """As if each turn had been asked with all before it as the prompt."""
    turns = [prompts(3)[0], prompts(4)[1], prompts(5)[2]]
    jobs = [Job(turns, [0.0, 0.0, 0.0], (0, 0), 10_000), *jobs_of(prompts(6))]
    replies = run(teacher, jobs, 3, 400)[0]
    sequence: list[int] = []
    for turn, reply in zip(turns, replies, strict=False):
        sequence += turn
        plain = [token for one in generate(teacher, Request(sequence, 400, END)) for token in one.tokens]
        assert reply.tokens == plain[: len(reply.tokens)]
        sequence += reply.tokens
    finished = [reply.finish == "stop" for reply in replies]
    assert len(replies) == 3 or not finished[-1], "it ends only where a reply did not end by itself"
    assert all(finished[:-1])


def test_a_sequence_stays_within_its_most_tokens(teacher: Transformer) -> None:
    (prompt,) = prompts(1)
    never: frozenset[int] = frozenset()
    for most in (1, 7, 30):
        job = Job([prompt, [5, 6]], [0.8, 0.8], (0, 0), len(prompt) + most)
        ((_, replies),) = Batch(teacher, 2, 1000, never).run(iter([job]))
        assert [(len(reply.tokens), reply.finish) for reply in replies] == [(most, "length")]


def test_jobs_are_taken_only_when_there_is_room(teacher: Transformer) -> None:
    taken = []

    def supply() -> Iterable[Job]:
        for i, job in enumerate(jobs_of(prompts(9))):
            taken.append(i)
            yield job

    batch = Batch(teacher, 2, MOST, END).run(iter(supply()))
    next(batch)
    assert len(taken) < 9
    assert len(list(batch)) == 8 and len(taken) == 9
