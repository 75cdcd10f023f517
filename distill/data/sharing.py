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
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

import mlx.core as mx
import numpy as np

from decode.batching import Batch, Job, Reply
from decode.keep_awake import keep_awake
from decode.models.checkpoint import Checkpoint, find_teacher
from distill.data.codec import Block, SampledBlock
from distill.data.dataset import Coded
from distill.data.manifest import DatasetSettings
from distill.data.packing import Row
from distill.data.ranks import KEPT, Connection, Gone, Launch, Message, Ranks, connect, ignore_signals
from distill.data.scoring import Scorer
from distill.data.settings import CollectSettings
from distill.data.shards import coded
from kernels.backends import backend
from kernels.device import device_name, versions
from kernels.errors import UserError

if TYPE_CHECKING:
    from distill.data.collect import Collector

SHARDS_AHEAD = 3  # that a rank is given: one to score, and on a GPU one to be coded beside it; one to go on with
Done = Generator[tuple[int, list[Reply]], None, None]


@dataclass(frozen=True)
class Part:
    """The rows of a shard; first: the number of the first of them in the dataset."""

    shard: int
    first: int
    rows: list[Row]


def introduction(checkpoint: Checkpoint, settings: CollectSettings, scores_only: bool) -> dict[str, dict[str, Any]]:
    """What ranks must have in common. Of sources only names count: rank 0 alone reads them. `reply_batch` is each
    rank's own: it decides only how fast that is."""
    from distill.data.collect import of_teacher

    teacher, values = of_teacher(checkpoint), settings.record()
    del values["reply_batch"]
    values |= {name: [Path(path).name for path in values[name]] for name in ("sources", "exclude")}
    return {
        "command": values | {"--replies": scores_only},
        "teacher": teacher | {"teacher": teacher["teacher"]["hash"], "template_time": None},
        "machine": this_machine(),
    }


def this_machine() -> dict[str, str]:
    """What of it decides bits, beside the command and the teacher."""
    versions_here, chosen = versions(), backend()
    return {name: versions_here[name] for name in ("bitdraft", "mlx")} | {
        "device": f"{device_name()} ({chosen.NAME})",
        "instruction set": _instruction_set(chosen.NAME),
    }


def _instruction_set(kernels: str) -> str:
    if kernels != "cpu":
        return "of the device"
    from kernels.cpu import _native

    return _native.isa()


class SharedBatch:
    """A `Batch` whose jobs the other ranks answer too."""

    def __init__(self, batch: Batch, ranks: Ranks) -> None:
        self.batch, self.ranks = batch, ranks
        self._numbers = count()  # of jobs that others are given, so that what comes too late is known as such
        self._given: dict[int, dict[int, tuple[int, Job]]] = {rank: {} for rank in ranks.connections}

    def run(self, jobs: Iterator[Job], advance: Callable[[int], None], prefilled: Callable[[int], None]) -> Done:
        """As `Batch.run`: the place of each job and its replies, in the order in which they are done."""
        places, done = enumerate(jobs), deque[tuple[int, list[Reply]]]()

        def serve(wait: bool = False) -> None:
            for rank, message, _ in self.ranks.received(wait):
                if (found := self._given[rank].pop(message["number"], None)) is not None:
                    place, job = found
                    replies = [Reply(*reply) for reply in message["replies"]]
                    prefilled(sum(map(len, job.turns[: len(replies)])))
                    advance(sum(len(reply.tokens) for reply in replies))
                    done.append((place, replies))
            self._give(places)

        def written(tokens: int) -> None:
            advance(tokens)
            serve()

        mine = list[int]()

        def own() -> Iterator[Job]:
            """Of the jobs, one in turn for every rank that has room, and for this one."""
            while True:
                self._give(places, most=1)
                place, job = next(places, (0, None))
                if job is None:
                    return
                mine.append(place)
                yield job

        try:
            while True:
                mine.clear()
                with closing(self.batch.run(own(), written, prefilled)) as here:
                    for at, replies in here:
                        yield mine[at], replies
                        while done:
                            yield done.popleft()
                if not done and any(self._given.values()):
                    serve(wait=True)
                elif not done:
                    return
                while done:
                    yield done.popleft()
        finally:
            for rank, given in self._given.items():
                if given:
                    given.clear()
                    with suppress(UserError):  # it has ended, which whoever needs it next will say
                        self.ranks.send(rank, {"drop": True})

    def _give(self, places: Iterator[tuple[int, Job]], most: int = 1 << 16) -> None:
        """Give jobs to all ranks that have room: for each of their slots, and some to go on with at once."""
        for rank, given in self._given.items():
            slots, fresh = self.ranks.slots[rank], list[list[Any]]()
            while len(given) < slots + slots // 8 + 1 and len(fresh) < most and (found := next(places, None)):
                number, job = next(self._numbers), found[1]
                given[number] = found
                fresh.append([number, job.turns, job.temperatures, job.seed, job.most_tokens])
            if fresh:
                self.ranks.send(rank, {"jobs": fresh})


def score(
    ranks: Ranks,
    scorer: Scorer,
    settings: DatasetSettings,
    part_of: Callable[[int], Part],
    missing: Collection[int],
) -> Iterator[tuple[int, Coded]]:
    """The missing shards, each with its index, in the order in which they are done. part_of: what one is made of."""
    waiting, done = deque(missing), deque[tuple[int, Coded]]()
    given = dict.fromkeys(ranks.connections, 0)

    def serve(wait: bool = False) -> None:
        for rank, message, data in ranks.received(wait):
            if "shard" in message:  # and no late reply
                given[rank] -= 1
                one = Coded(data, message["counts"], ranks.devices.get(rank, ""))
                scorer.advance(one.counts["tokens"])
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

    def advance(tokens: int) -> None:
        scorer.advance(tokens)
        serve()

    while True:
        for index, block in _blocks(replace(scorer, advance=advance), own()):
            yield index, coded(block, settings, ranks.devices.get(0, ""))
            while done:
                yield done.popleft()
        while done:  # what came when nothing was left to score here
            yield done.popleft()
        if not any(given.values()):
            return
        serve(wait=True)


def _blocks(scorer: Scorer, parts: Iterator[Part]) -> Iterator[tuple[int, Block | SampledBlock]]:
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


def _unpacked(data: bytes, seq_len: int) -> list[Row]:
    size = len(data) // 6
    tokens = np.frombuffer(data, np.int32, size).reshape(-1, seq_len)
    trained = np.frombuffer(data, bool, size, 4 * size).reshape(-1, seq_len)
    segments = np.frombuffer(data, np.uint8, size, 5 * size).reshape(-1, seq_len)
    return list(zip(tokens, trained, segments, strict=True))


# The other ranks


class _Ended(Exception):
    """Rank 0 says that all is over, and with which exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


class _Dropped(Exception):
    """Rank 0 has no use any more for the replies that it asked for."""


def assist(launch: Launch, teacher: str | None, settings: CollectSettings, scores_only: bool) -> NoReturn:
    """Be a rank other than 0, and end this process: with rank 0's exit code, and without a word, which it has."""
    try:
        rank_0 = connect(launch)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    try:
        code = _Assistant(rank_0).run(find_teacher(teacher), settings, scores_only)
        ignore_signals()
    except BaseException as error:
        ignore_signals()
        with suppress(Gone):
            if isinstance(error, UserError):
                code = 2
                rank_0.send({"error": str(error)})
            elif isinstance(error, KeyboardInterrupt):
                code = 130
                rank_0.send({"interrupted": True})
            elif isinstance(error, Gone):
                if launch.rank == 1:  # one line is enough
                    raise UserError(f"rank 0 of {launch.size} (at {launch.host}) has ended; {KEPT}") from None
                code = 2
            else:
                raise
    rank_0.close()
    with suppress(Exception):  # a process that exits while MLX's threads run is aborted
        mx.synchronize()
    raise SystemExit(code)


class _Assistant:
    """What a rank other than 0 does, as it is told."""

    def __init__(self, rank_0: Connection) -> None:
        self.rank_0 = rank_0
        self._inbox: SimpleQueue[tuple[int, Message | None, bytes]] = SimpleQueue()
        self._jobs: deque[tuple[int, Job]] = deque()
        rank_0.listen(self._inbox, 0)

    def run(self, checkpoint: Checkpoint, settings: CollectSettings, scores_only: bool) -> int:
        """Work until rank 0 ends it; with which exit code. Raises Gone where rank 0 has."""
        from distill.data.collect import Collector, Plan

        mine = introduction(checkpoint, settings, scores_only)
        self.rank_0.send({"introduction": mine, "slots": settings.reply_batch})
        try:
            begin, _ = self._next()
            values = begin["settings"]
            settings = replace(settings, **values | {"temperatures": tuple(values["temperatures"])})
            told = DatasetSettings(begin["dataset"])
            collector = Collector(Plan(checkpoint, settings, Path(), told, Path(), told, sources=None))
            with keep_awake():
                self._work(collector)
        except _Ended as end:
            return end.code

    def _work(self, collector: Collector) -> NoReturn:
        settings, scorer = collector.plan.manifest, collector.scorer()
        batch: Batch | None = None
        while True:
            message, data = self._next()
            if "jobs" in message:
                batch = batch or collector.reply_pass().batch
                self._take(message)
                with suppress(_Dropped):
                    self._answer(batch)
            elif "shard" in message:
                batch = None  # its cache makes room
                for index, block in _blocks(scorer, self._parts(message, data, settings.seq_len)):
                    one = coded(block, settings)
                    self.rank_0.send({"shard": index, "counts": one.counts}, one.data)

    def _parts(self, message: Message, data: bytes, seq_len: int) -> Iterator[Part]:
        """This one, and those that have come meanwhile: in the last pass nothing else does."""
        yield Part(message["shard"], message["first"], _unpacked(data, seq_len))
        while not self._inbox.empty():
            message, data = self._next()
            yield Part(message["shard"], message["first"], _unpacked(data, seq_len))

    def _answer(self, batch: Batch) -> None:
        numbers, jobs = list[int](), self._jobs

        class AsTheyCome:
            """Jobs; where there is none now, there may be one later."""

            def __iter__(self) -> Iterator[Job]:
                return self

            def __next__(self) -> Job:
                if not jobs:
                    raise StopIteration
                number, job = jobs.popleft()
                numbers.append(number)
                return job

        with closing(batch.run(AsTheyCome(), self._look)) as done:
            for place, replies in done:
                said = [[reply.tokens, reply.finish] for reply in replies]
                self.rank_0.send({"number": numbers[place], "replies": said})

    def _look(self, _tokens: int) -> None:
        """Take what rank 0 has sent while this one was at work."""
        while not self._inbox.empty():
            message, _ = self._next()
            self._take(message)
            if "drop" in message:
                raise _Dropped

    def _take(self, message: Message) -> None:
        if "drop" in message:
            self._jobs.clear()
        for number, turns, temperatures, seed, most_tokens in message.get("jobs", ()):
            self._jobs.append((number, Job(turns, temperatures, tuple(seed), most_tokens)))

    def _next(self) -> tuple[Message, bytes]:
        _, message, data = self._inbox.get()
        if message is None:
            raise Gone
        if "end" in message:
            raise _Ended(message["end"])
        return message, data
