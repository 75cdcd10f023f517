"""Continuous batching: many sequences share the teacher's steps, and one that ends makes room for the next at once.

Every row of a step has the bits that it has alone (`kernels`), prompts are computed in chunks counted from their own
start, and random numbers are a sequence's own: what it says does not depend on what else is in the batch. Knows token
ids only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from decode.metrics import is_looping
from decode.models.cache import KVCache, NewRows
from decode.models.transformer import PREFILL_CHUNK, Transformer

CHECK_EVERY = 16  # tokens of a reply after which it is looked at for loops
LONGEST_LOOP = 16  # tokens; another value cuts replies elsewhere
# Steps that a GPU is given before their tokens are looked at, so that it need not wait for this process; a reply begins
# with such a window and so ends, for a loop or for its length, with one.
STEPS_AT_ONCE = CHECK_EVERY
# From so many sequences on, a GPU is given them in two groups: it works on one while this process looks at the other's
# tokens. Fewer keep it busier together.
TWO_GROUPS = 6144
PREFILL_ROWS = {False: 512, True: 16_384}  # of prompts in one pass: on a CPU, and on a GPU


@dataclass(frozen=True)
class Job:
    """A sequence that the teacher continues: it replies behind each turn, as long as its replies end by themselves.

    turns: token ids that are given; the first has at least one. temperatures: of each reply, 0 is greedy; seed: of the
    random numbers of all of them; most_tokens: of the sequence, given and replied. A further turn is given only where
    behind it a reply of any length has room.
    """

    turns: list[list[int]]
    temperatures: list[float]
    seed: tuple[int, ...]
    most_tokens: int


class AsTheyCome(Iterator[Job]):
    """Jobs; where there is none now, there may be one later."""

    def __init__(self, next_job: Callable[[], Job | None]) -> None:
        self._next_job = next_job

    def __next__(self) -> Job:
        job = self._next_job()
        if job is None:
            raise StopIteration
        return job


@dataclass(frozen=True)
class Reply:
    """Token ids, the end token included, and whether it ended so, fell into a loop (and was cut there) or was cut for
    its length: "stop", "loop" or "length"."""

    tokens: list[int]
    finish: str


@dataclass
class _Slot:
    """A job at work in one sequence of the cache."""

    place: int
    job: Job
    most_tokens: int  # of the sequence
    uniform: np.ndarray | None  # float32 [turns, most tokens of a reply]; None where all is greedy
    length: int = 0  # tokens of the sequence whose keys and values are in the cache
    feed: list[int] = field(default_factory=list)  # those that are not; the last is the next step's
    replies: list[Reply] = field(default_factory=list)
    written: list[int] = field(default_factory=list)  # of the reply that is being written

    @property
    def room(self) -> int:
        """Tokens that the sequence may still have."""
        return self.most_tokens - self.length - len(self.feed)


class Batch:
    """Runs jobs, at most `slots` at a time."""

    def __init__(
        self,
        teacher: Transformer,
        slots: int,
        max_reply: int,
        end_tokens: frozenset[int],
        grows: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """max_reply: most tokens of a reply; grows: told before the cache grows, of how many rows a sequence."""
        groups = 2 if teacher.async_decode and slots >= TWO_GROUPS else 1
        self._groups = [
            _Group(teacher, len(range(i, slots, groups)), max_reply, end_tokens, grows, alone=groups == 1)
            for i in range(groups)
        ]

    @property
    def prefill_seconds(self) -> float:
        """Of the time that `run` took; of two groups it is not known."""
        return sum(group.prefill_seconds for group in self._groups)

    def run(
        self,
        jobs: Iterator[Job],
        advance: Callable[[int], None] = lambda tokens: None,
        prefilled: Callable[[int], None] = lambda tokens: None,
    ) -> Generator[tuple[int, list[Reply]], None, None]:
        """The replies to each job, with its place among the jobs, in the order in which they are done.

        A job is taken when a slot is free for it; where there is none, one is asked for again later. advance,
        prefilled: told how many tokens were written, and read.
        """
        places = enumerate(jobs)
        try:
            while True:
                for group in self._groups:
                    written, done = group.look()
                    if written:
                        advance(written)
                    if read := group.fill(places):
                        prefilled(read)
                    group.go_on()
                    for slot in done:
                        yield slot.place, slot.replies
                if not any(group.busy for group in self._groups):
                    return
        finally:  # whoever stops early leaves jobs at work
            for group in self._groups:
                group.clear()


class _Group:
    """Sequences that share steps, and their cache."""

    def __init__(
        self,
        teacher: Transformer,
        slots: int,
        max_reply: int,
        end_tokens: frozenset[int],
        grows: Callable[[int], None],
        alone: bool,
    ) -> None:
        """alone: whether the device works on nothing else meanwhile."""
        self.alone = alone
        self.teacher, self.max_reply, self.end_tokens, self.grows = teacher, max_reply, end_tokens, grows
        self.cache: KVCache = teacher.new_cache(slots)
        self.prefill_seconds = 0.0
        self._slots: list[_Slot | None] = [None] * slots
        self._steps = STEPS_AT_ONCE if teacher.async_decode else 1
        self._chosen: mx.array | None = None  # uint32 [busy slots, steps], perhaps not computed yet

    @property
    def busy(self) -> bool:
        """Whether a slot has a job."""
        return any(self._slots)

    def clear(self) -> None:
        """Forget all jobs."""
        self._slots, self._chosen = [None] * len(self._slots), None
        self.cache.offsets = [0] * len(self._slots)

    def look(self) -> tuple[int, list[_Slot]]:
        """Wait for the steps that were begun: how many tokens were written, and the slots whose jobs are done."""
        if self._chosen is None:
            return 0, []
        taken, done = 0, list[_Slot]()
        fresh = np.array(self._chosen).tolist()
        self._chosen = None
        for (i, slot), tokens in zip(self._active(), fresh, strict=True):
            taken += self._take(slot, tokens)
            self.cache.offsets[i] = slot.length
            if not slot.feed:
                self._slots[i] = None
                self.cache.offsets[i] = 0
                done.append(slot)
        return taken, done

    def fill(self, places: Iterator[tuple[int, Job]]) -> int:
        """Begin jobs in the slots that are free, and compute all but the last of the tokens that slots are given, those
        of several in one pass. Returns how many were given."""
        given = 0
        for i, slot in enumerate(self._slots):
            if slot is None:
                if (job := next(places, None)) is None:
                    break
                self._slots[i] = self._begin(*job)
                given += 1  # of a prompt; the rest are counted below, behind a reply too
        began = time.perf_counter()
        left = [(i, slot) for i, slot in self._active() if len(slot.feed) > 1]
        given += sum(len(slot.feed) - 1 for _, slot in left)
        while left:
            self._prefill(left)
            left = [(i, slot) for i, slot in left if len(slot.feed) > 1]
        if self.alone:
            self.prefill_seconds += time.perf_counter() - began
        return given

    def go_on(self) -> None:
        """Begin a step of every sequence, or some: a GPU works on them from now on."""
        active = self._active()
        if not active:
            return
        sequences = [i for i, _ in active]
        temperature = np.array([slot.job.temperatures[len(slot.replies)] for _, slot in active], np.float32)
        uniform = np.zeros((self._steps, len(active)), np.float32)
        for column, (_, slot) in enumerate(active):
            if slot.uniform is not None:
                numbers = slot.uniform[len(slot.replies), len(slot.written) :][: self._steps]
                uniform[: len(numbers), column] = numbers
        self._reserve(max(slot.length for _, slot in active) + self._steps)
        feed = mx.array([slot.feed[-1] for _, slot in active], mx.uint32)
        chosen = []
        for i in range(self._steps):
            feed = self.teacher.choose_next(feed, self.cache, sequences, temperature, uniform[i])
            # On a CPU a step queued behind one that still runs would copy the whole cache.
            (mx.async_eval if self.teacher.async_decode else mx.eval)(feed, self.cache.keys, self.cache.values)
            chosen.append(feed)
        self._chosen = mx.stack(chosen, axis=1)
        mx.async_eval(self._chosen)

    def _active(self) -> list[tuple[int, _Slot]]:
        return [(i, slot) for i, slot in enumerate(self._slots) if slot is not None]

    def _begin(self, place: int, job: Job) -> _Slot:
        uniform = None
        if any(job.temperatures):
            uniform = np.random.default_rng(job.seed).random((len(job.turns), self.max_reply), np.float32)
        return _Slot(place, job, min(job.most_tokens, self.teacher.context), uniform, feed=list(job.turns[0]))

    def _prefill(self, left: list[tuple[int, _Slot]]) -> None:
        """Compute a chunk of each of these slots, or of the first of them."""
        counts = [0] * len(self._slots)
        tokens: list[int] = []
        for i, slot in left:
            chunk = slot.feed[: min(PREFILL_CHUNK - slot.length % PREFILL_CHUNK, len(slot.feed) - 1)]
            if tokens and len(tokens) + len(chunk) > PREFILL_ROWS[self.teacher.async_decode]:
                break
            counts[i] = len(chunk)
            tokens += chunk  # those of a slot lie in the order of the slots
        self._reserve(max(slot.length + counts[i] for i, slot in left))
        self.teacher.forward(tokens, NewRows(self.cache, counts))
        (mx.eval if self.alone else mx.async_eval)(self.cache.keys, self.cache.values)
        for i, slot in left:
            slot.feed = slot.feed[counts[i] :]
            slot.length += counts[i]

    def _reserve(self, rows: int) -> None:
        """Make room for positions below `rows` in every sequence."""
        if rows > self.cache.keys[0].shape[2]:
            self.grows(rows)
            self.cache.reserve_upto(rows)

    def _take(self, slot: _Slot, fresh: list[int]) -> int:
        """Add what was chosen to a slot's reply, up to its end; how many tokens that were. Sets what it is fed next:
        nothing where all is said."""
        finish, taken = None, 0
        most = min(self.max_reply, len(slot.written) + slot.room)
        for token in fresh:
            slot.written.append(token)
            taken += 1
            if token in self.end_tokens:
                finish = "stop"
            elif len(slot.written) % CHECK_EVERY == 0 and is_looping(slot.written, LONGEST_LOOP):
                finish = "loop"
            elif len(slot.written) >= most:
                finish = "length"
            if finish:
                break
        slot.length += taken
        slot.feed = [slot.written[-1]]
        if finish:
            slot.replies.append(Reply(slot.written, finish))
            slot.written = []
            more = slot.job.turns[len(slot.replies)] if len(slot.replies) < len(slot.job.turns) else []
            goes_on = bool(more) and finish == "stop" and slot.room - len(more) >= self.max_reply
            slot.feed = slot.feed + more if goes_on else []
        return taken
