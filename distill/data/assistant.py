"""What a rank other than 0 does: it answers and scores what rank 0 gives it (`distill.data.sharing`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from decode.batching import Batch, Job
from decode.keep_awake import keep_awake
from decode.models.checkpoint import Checkpoint, find_teacher
from distill.data.collect import Collector, Plan, of_teacher
from distill.data.manifest import DatasetSettings
from distill.data.ranks import Connection, Ended, Gone, Launch, Message, serve
from distill.data.settings import CollectSettings
from distill.data.shards import coded
from distill.data.sharing import Part, blocks, unpacked
from distill.provenance import this_machine


def introduction(checkpoint: Checkpoint, settings: CollectSettings, scores_only: bool) -> dict[str, dict[str, Any]]:
    """What ranks must have in common. Of sources only names count: rank 0 alone reads them. `reply_batch` is each
    rank's own: it decides only how fast that is."""
    teacher, values = of_teacher(checkpoint), settings.record()
    del values["reply_batch"]
    values |= {name: [Path(path).name for path in values[name]] for name in ("sources", "exclude")}
    return {
        "command": values | {"--replies": scores_only},
        "teacher": teacher | {"teacher": teacher["teacher"]["hash"], "template_time": None},
        "machine": this_machine(),
    }


class _Dropped(Exception):
    """Rank 0 has no use any more for the replies that it asked for."""


def assist(launch: Launch, teacher: str | None, settings: CollectSettings, scores_only: bool) -> NoReturn:
    """Be a rank other than 0, and end this process with rank 0's exit code."""
    serve(launch, lambda rank_0: _Assistant(rank_0).run(find_teacher(teacher), settings, scores_only))


class _Assistant:
    """What a rank other than 0 does, as it is told."""

    def __init__(self, rank_0: Connection) -> None:
        self.rank_0 = rank_0
        self._inbox: SimpleQueue[tuple[int, Message | None, bytes]] = SimpleQueue()
        self._jobs: deque[tuple[int, Job]] = deque()
        rank_0.listen(self._inbox, 0)

    def run(self, checkpoint: Checkpoint, settings: CollectSettings, scores_only: bool) -> NoReturn:
        """Work until rank 0 ends it (Ended), or has ended (Gone)."""
        mine = introduction(checkpoint, settings, scores_only)
        self.rank_0.send({"introduction": mine, "slots": settings.reply_batch})
        begin, _ = self._next()
        values = begin["settings"]
        settings = replace(settings, **values | {"temperatures": tuple(values["temperatures"])})
        told = DatasetSettings(begin["dataset"])
        collector = Collector(Plan(checkpoint, settings, Path(), told, Path(), told, sources=None))
        with keep_awake():
            self._work(collector)

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
                for index, block in blocks(scorer, self._parts(message, data, settings.seq_len)):
                    one = coded(block, settings)
                    self.rank_0.send({"shard": index, "counts": one.counts}, one.data)

    def _parts(self, message: Message, data: bytes, seq_len: int) -> Iterator[Part]:
        """This one, and those that have come meanwhile: in the last pass nothing else does."""
        yield Part(message["shard"], message["first"], unpacked(data, seq_len))
        while not self._inbox.empty():
            message, data = self._next()
            yield Part(message["shard"], message["first"], unpacked(data, seq_len))

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
            raise Ended(message["end"])
        return message, data
