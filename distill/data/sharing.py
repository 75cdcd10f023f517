"""What ranks share of a collection: jobs to answer and rows to score go from rank 0 to whichever has room, and what
becomes of them comes back.

Rank 0 reads the sources, decides what is taken, and writes all files, so that the others need the teacher and nothing
else: no source, no folder. A reply depends on its job alone and a shard on its rows, so who makes them changes no byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from decode.batching import AsTheyCome, Batch, Job, Reply
from distill.data.codec import Block, SampledBlock
from distill.data.dataset import Coded
from distill.data.manifest import DatasetSettings
from distill.data.packing import Row
from distill.data.ranks import Ranks
from distill.data.scoring import Scorer
from distill.data.shards import coded
from kernels.errors import UserError

JOBS_AT_ONCE = 256  # jobs in a message, at most: a rank begins with the first while others are read
SHARDS_AHEAD = 3  # that a rank is given: one to score, and on a GPU one to be coded beside it; one to go on with
Done = Generator[tuple[int, list[Reply]], None, None]


@dataclass(frozen=True)
class Part:
    """The rows of a shard; first: the number of the first of them in the dataset."""

    shard: int
    first: int
    rows: list[Row]


class SharedBatch:
    """A `Batch` whose jobs the other ranks answer too, or alone."""

    def __init__(self, batch: Batch | None, ranks: Ranks) -> None:
        """batch: None where a worker has it."""
        self.batch, self.ranks = batch, ranks
        self._numbers = count()  # of jobs that others are given, so that what comes too late is known as such
        self._given: dict[int, dict[int, tuple[int, Job]]] = {rank: {} for rank in ranks.connections}

    def run(self, jobs: Iterator[Job], advance: Callable[[int], None], prefilled: Callable[[int], None]) -> Done:
        """As `Batch.run`: the place of each job and its replies, in the order in which they are done."""
        places, done = enumerate(jobs), deque[tuple[int, list[Reply]]]()

        def serve(wait: bool = False) -> None:
            for rank, message, _ in self.ranks.received(wait):
                for number, said in message["replies"]:
                    if (found := self._given[rank].pop(number, None)) is not None:
                        place, job = found
                        replies = [Reply(*reply) for reply in said]
                        prefilled(sum(map(len, job.turns[: len(replies)])))
                        advance(sum(len(reply.tokens) for reply in replies))
                        done.append((place, replies))
            self._give(places)

        def written(tokens: int) -> None:
            advance(tokens)
            serve()

        mine = list[int]()

        def next_job() -> Job | None:
            """Of the jobs, one in turn for every rank that has room, and for this one."""
            self._give(places, most=1)
            place, job = next(places, (0, None))
            if job is not None:
                mine.append(place)
            return job

        try:
            while True:
                if self.batch is not None:
                    mine.clear()
                    with closing(self.batch.run(AsTheyCome(next_job), written, prefilled)) as here:
                        for at, replies in here:
                            yield mine[at], replies
                            while done:
                                yield done.popleft()
                else:
                    self._give(places)
                if not done and any(self._given.values()):
                    serve(wait=True)
                elif not done:
                    return
                while done:
                    yield done.popleft()
                    serve()  # so that nobody waits while one after the other is looked at
        finally:
            for rank, given in self._given.items():
                if given:
                    given.clear()
                    with suppress(UserError):  # it has ended, which whoever needs it next will say
                        self.ranks.send(rank, {"drop": True})

    def _give(self, places: Iterator[tuple[int, Job]], most: int = 1 << 16) -> None:
        """Give jobs, at most so many to each, to ranks that have room: for each of their slots, and some to go on with
        at once. The next is for the one that has the least to do."""
        slots, fresh = self.ranks.slots, {rank: list[list[Any]]() for rank in self._given}
        room = {rank: min(most, slots[rank] + slots[rank] // 8 + 1 - len(given)) for rank, given in self._given.items()}
        while (able := [rank for rank in room if room[rank] > 0]) and (found := next(places, None)):
            rank = min(able, key=lambda rank: len(self._given[rank]) / slots[rank])
            number, job = next(self._numbers), found[1]
            self._given[rank][number] = found
            room[rank] -= 1
            fresh[rank].append([number, job.turns, job.temperatures, job.seed, job.most_tokens])
            if len(fresh[rank]) == JOBS_AT_ONCE:
                self.ranks.send(rank, {"jobs": fresh[rank]})
                fresh[rank] = []
        for rank, jobs in fresh.items():
            if jobs:
                self.ranks.send(rank, {"jobs": jobs})


def score(
    ranks: Ranks,
    scorer: Scorer | None,
    settings: DatasetSettings,
    part_of: Callable[[int], Part],
    missing: Collection[int],
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Coded]]:
    """The missing shards, each with its index, in the order in which they are done. scorer: None where a worker has it;
    part_of: what one is made of; advance: told of tokens scored."""
    waiting, done = deque(missing), deque[tuple[int, Coded]]()
    given = dict.fromkeys(ranks.connections, 0)

    def serve(wait: bool = False) -> None:
        for rank, message, data in ranks.received(wait):
            if "shard" in message:  # and no late reply
                given[rank] -= 1
                one = Coded(data, message["counts"], ranks.devices.get(rank, ""))
                advance(one.counts["tokens"])
                done.append((message["shard"], one))
        for rank in given:  # fewer at a time towards the end, so that all ranks end together
            while waiting and given[rank] < max(1, min(SHARDS_AHEAD, len(waiting) // ranks.size)):
                given[rank] += 1
                part = part_of(waiting.popleft())
                ranks.send(rank, {"shard": part.shard, "first": part.first}, _packed(part.rows))

    def own() -> Iterator[Part]:
        serve()
        while waiting:
            yield part_of(waiting.popleft())
            serve()

    def scored(tokens: int) -> None:
        advance(tokens)
        serve()

    while True:
        if scorer is not None:
            for index, block in blocks(replace(scorer, advance=scored), own()):
                yield index, coded(block, settings, ranks.devices.get(0, ""))
                while done:
                    yield done.popleft()
        else:
            serve()
        while done:  # what came when nothing was left to score here
            yield done.popleft()
        if not any(given.values()):
            return
        serve(wait=True)


def blocks(scorer: Scorer, parts: Iterator[Part]) -> Iterator[tuple[int, Block | SampledBlock]]:
    """The scored shards; a GPU scores the next while one is used."""
    before: tuple[int, Callable[[], Block | SampledBlock]] | None = None
    for part in parts:
        now = part.shard, scorer.start(part.rows, part.first)
        if not scorer.model.async_decode:
            yield part.shard, now[1]()
            continue
        if before is not None:
            yield before[0], before[1]()
        before = now
    if before is not None:
        yield before[0], before[1]()


def _packed(rows: list[Row]) -> bytes:
    """Tokens int32, trained positions bool and segment ids uint8 of rows, all of one length."""
    return b"".join(np.stack(column).tobytes() for column in zip(*rows, strict=True))


def unpacked(data: bytes, seq_len: int) -> list[Row]:
    size = len(data) // 6
    tokens = np.frombuffer(data, np.int32, size).reshape(-1, seq_len)
    trained = np.frombuffer(data, bool, size, 4 * size).reshape(-1, seq_len)
    segments = np.frombuffer(data, np.uint8, size, 5 * size).reshape(-1, seq_len)
    return list(zip(tokens, trained, segments, strict=True))
