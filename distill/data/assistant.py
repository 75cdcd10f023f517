"""What a rank other than 0 does, and rank 0's worker: answer and score what rank 0 gives (`distill.data.sharing`)."""

from __future__ import annotations

import socket
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from decode.batching import AsTheyCome, Batch, Job
from decode.keep_awake import keep_awake
from decode.models.checkpoint import Checkpoint, find_teacher
from distill.data.collect import Collector, Plan, of_teacher
from distill.data.manifest import DatasetSettings
from distill.data.ranks import Connection, Ended, Gone, Launch, Message, ignore_signals, serve, serve_over
from distill.data.settings import CollectSettings
from distill.data.shards import coded
from distill.data.sharing import Part, blocks, unpacked
from distill.provenance import this_machine

REPLIES_AT_ONCE = 64  # replies in a message, at most


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


def main() -> NoReturn:
    """Be the worker that `Ranks.start_worker` has started. A signal is for rank 0, which ends this one."""
    ignore_signals()
    rank_0 = Connection(socket.socket(fileno=int(sys.argv[1])))
    serve_over(rank_0, _Assistant(rank_0).work)


class _Assistant:
    """What a process does that computes for rank 0, as it is told."""

    def __init__(self, rank_0: Connection) -> None:
        self.rank_0 = rank_0
        self._inbox: SimpleQueue[tuple[int, Message | None, bytes]] = SimpleQueue()
        self._jobs: deque[tuple[int, Job]] = deque()
        rank_0.listen(self._inbox, 0)

    def run(self, checkpoint: Checkpoint, settings: CollectSettings, scores_only: bool) -> NoReturn:
        """Introduce oneself, and `work`."""
        mine = introduction(checkpoint, settings, scores_only)
        self.rank_0.send({"introduction": mine, "slots": settings.reply_batch})
        with keep_awake():
            self.work(checkpoint)

    def work(self, checkpoint: Checkpoint | None = None) -> NoReturn:
        """Work until rank 0 ends it (Ended), or has ended (Gone). checkpoint: the teacher, where it need not be rank
        0's folder."""
        begin, _ = self._next()
        values = begin["settings"]
        settings = CollectSettings(**values | {"temperatures": tuple(values["temperatures"])})
        told = DatasetSettings(begin["dataset"])
        teacher = checkpoint or find_teacher(begin["teacher"])
        collector = Collector(Plan(teacher, settings, Path(), told, Path(), told, sources=None))
        scorer = collector.scorer()
        batch: Batch | None = None
        while True:
            message, data = self._next()
            if "jobs" in message:
                batch = batch or collector.batch()
                self._take(message)
                with suppress(_Dropped):
                    self._answer(batch)
            elif "shard" in message:
                batch = None  # its cache makes room
                for index, block in blocks(scorer, self._parts(message, data, settings.seq_len)):
                    one = coded(block, told)
                    self.rank_0.send({"shard": index, "counts": one.counts}, one.data)
            elif "replied" in message:
                self.rank_0.send({"seconds": collector.seconds_per_token(message["replied"])})

    def _parts(self, message: Message, data: bytes, seq_len: int) -> Iterator[Part]:
        """This one, and those that have come meanwhile: in the last pass nothing else does."""
        yield Part(message["shard"], message["first"], unpacked(data, seq_len))
        while not self._inbox.empty():
            message, data = self._next()
            yield Part(message["shard"], message["first"], unpacked(data, seq_len))

    def _answer(self, batch: Batch) -> None:
        numbers, jobs, said = list[int](), self._jobs, list[list[Any]]()

        def tell() -> None:
            if said:
                self.rank_0.send({"replies": said})
                said.clear()

        def look(_tokens: int) -> None:
            tell()
            self._look()

        def next_job() -> Job | None:
            if not jobs:
                return None
            number, job = jobs.popleft()
            numbers.append(number)
            return job

        with closing(batch.run(AsTheyCome(next_job), look)) as done:
            for place, replies in done:
                said.append([numbers[place], [[reply.tokens, reply.finish] for reply in replies]])
                if len(said) == REPLIES_AT_ONCE:
                    tell()
        tell()

    def _look(self) -> None:
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


if __name__ == "__main__":
    main()
