"""The second pass of a collection: the teacher answers the prompts, and all that will be scored becomes tokens.

Which documents are taken is the beginning of their order, whatever the lengths of prompts and replies: long and short
ones, prompts and texts, as often as the source has them. A reply's temperature and random numbers follow from its
prompt's number, and its tokens do not depend on what else is in the batch (`decode.batching`). How many are answered
depends on how long the replies are, and nothing else does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from decode.batching import AsTheyCome, Job
from decode.tokenizer import Tokenizer
from distill.data.documents import LeftOut
from distill.data.duplicates import NearDuplicates
from distill.data.exclusion import Excluded
from distill.data.packing import MIN_SEGMENT
from distill.data.prompts import Chosen
from distill.data.reply_dataset import EXAMPLES_PER_FILE, Example, Replies, ReplyWriter
from distill.data.settings import CollectSettings
from distill.data.sharing import SharedBatch
from distill.data.supply import TOO_SHORT, Candidate, Supply, size_in_rows

# Examples that are judged for each that is done: more may wait behind one that is late, and all of them at once would
# keep those waiting who want to be given jobs.
JUDGED_AT_ONCE = 2

Progress = Callable[[str, int, int | None], None]


@dataclass
class Quota:
    """How many tokens one source should give in its turn, and did."""

    size: int
    taken: int = 0
    announced: bool = False

    @property
    def left(self) -> int:
        return self.size - self.taken

    @property
    def filled(self) -> bool:
        return self.left < MIN_SEGMENT


@dataclass
class Waiting:
    """A candidate in its place in the order, and the example that it becomes, once that is known."""

    candidate: Candidate
    size: float  # its tokens, expected or known
    example: Example | None = None


class Line(deque[Waiting]):
    """Candidates in their order, from the next one to be used on."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0.0  # tokens of all of them

    def join(self, waiting: Waiting) -> None:
        """Take one in at the end."""
        self.append(waiting)
        self.size += waiting.size

    def settle(self, waiting: Waiting, example: Example, size: int) -> None:
        """Say what one has become, and how many tokens that are."""
        self.size += size - waiting.size
        waiting.example, waiting.size = example, size

    def leave(self) -> None:
        """Let the first one go."""
        self.size -= self.popleft().size


class ReplyPass:
    """Fills a reply dataset, going on where an earlier run stopped."""

    def __init__(
        self,
        batch: SharedBatch,
        tokenizer: Tokenizer,
        context: int,
        settings: CollectSettings,
        progress: Progress,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """context: tokens that the teacher can work on; check: called before a file is written, and at the end; it may
        refuse."""
        self.batch, self.tokenizer, self.context = batch, tokenizer, context
        self.settings, self.progress = settings, progress
        self._written: deque[Example] = deque()  # the next that an earlier run wrote
        self._unread: Iterator[Example] = iter(())  # and those behind them
        self._check = check
        self._pending: list[Example] = []  # not yet in a file
        self._at = 0  # the place of the next example
        self._asked = 0  # how many jobs were given
        self._replies, self._reply_tokens = 1, settings.max_reply // 2  # so far: what the next ones are expected to be

    def run(self, writer: ReplyWriter, chosen: Sequence[Chosen], excluded: Excluded) -> list[LeftOut]:
        """Every source gives its share of the tokens, by its weight; what one cannot give, the later ones do, and what
        is missing then is shared out among those that have more, until it is there or none has any. Returns which
        conversations of each were cut."""
        self._unread = iter(Replies(writer.folder, writer.manifest))
        asked = NearDuplicates()
        supplies = [
            Supply(source, documents, self.tokenizer, self.settings, self.context, asked, excluded)
            for source, documents in enumerate(chosen)
        ]
        cut, left = [supply.cut for supply in supplies], self.settings.tokens
        while supplies:
            before, more = left, []
            for place, supply in enumerate(supplies):
                quota = Quota(int(left * supply.weight / sum(one.weight for one in supplies[place:])))
                ended = self._turn(writer, supply, quota)
                supply.rest()
                left -= quota.taken
                more += [] if ended else [supply]
            supplies = more if left < before else []
        self._flush(writer)
        self._check()
        return cut

    def _turn(self, writer: ReplyWriter, supply: Supply, quota: Quota) -> bool:
        """Let a source fill its quota; whether it has nothing more to give.

        Replies end in any order; they are used in that of their prompts.
        """
        line = Line()
        while not quota.filled:
            asked: dict[int, Waiting] = {}
            self._asked = 0
            jobs = AsTheyCome(partial(self._next_job, writer, supply, quota, line, asked))
            with closing(self.batch.run(jobs, self._advance, self._advance)) as done:
                for place, replies in done:
                    said = [np.array(reply.tokens, np.int32) for reply in replies]
                    waiting = asked.pop(place)  # who is done is not kept
                    example = waiting.candidate.example(supply.source, said)
                    line.settle(waiting, example, self._size(example))
                    self._replies += len(said)
                    self._reply_tokens += sum(map(len, said))
                    self._use(writer, supply, quota, line, JUDGED_AT_ONCE)
                    if quota.filled:
                        break
            self._use(writer, supply, quota, line)
            if not quota.filled and not line and supply.ahead() is None:
                supply.take()
                return True
        return False

    def _next_job(
        self, writer: ReplyWriter, supply: Supply, quota: Quota, line: Line, asked: dict[int, Waiting]
    ) -> Job | None:
        """Put the next candidates at the end of the line, up to the first that the teacher is to answer now: it becomes
        a job, and stands in `asked` by its place among these. None while the line will probably fill the quota."""
        while True:
            if line.size >= quota.left:  # if all of it is of use
                self._use(writer, supply, quota, line)
            candidate = supply.ahead(len(line))
            if quota.filled or candidate is None or line.size >= quota.left:
                return None
            waiting = Waiting(candidate, self._expected(candidate))
            line.join(waiting)
            example = self._known(supply.source, candidate)
            if example is None and not candidate.asks:
                example = candidate.example(supply.source)
            if example is None:
                if not quota.announced:
                    quota.announced = True
                    self.progress("replies", quota.taken, quota.size)
                asked[self._asked] = waiting
                self._asked += 1
                temperatures = self.settings.reply_temperatures
                return Job(
                    candidate.turns,
                    [candidate.temperature(turn, temperatures) for turn in range(len(candidate.turns))],
                    (self.settings.seed, supply.source, candidate.number),
                    supply.room + self.settings.max_reply,
                )
            line.settle(waiting, example, self._size(example))
            self._use(writer, supply, quota, line, JUDGED_AT_ONCE)

    def _expected(self, candidate: Candidate) -> float:
        """How many tokens a candidate will probably be."""
        replies = len(candidate.turns) * self._reply_tokens / self._replies if candidate.asks else 0
        return sum(map(len, candidate.turns)) + replies

    def _known(self, source: int, candidate: Candidate) -> Example | None:
        """What an earlier run made of a candidate. Its examples stand in the order of the candidates."""
        if not self._written and (example := next(self._unread, None)) is not None:
            self._written.append(example)
        if self._written and (self._written[0].source, self._written[0].number) == (source, candidate.number):
            return self._written.popleft()
        return None

    def _use(self, writer: ReplyWriter, supply: Supply, quota: Quota, line: Line, most: int | None = None) -> None:
        """Take what is known at the beginning of the line, at most so many, until the quota is filled."""
        for _ in range(len(line) if most is None else most):
            if not line or quota.filled or (example := line[0].example) is None:
                return
            self._add(writer, example, int(line[0].size), supply, quota)
            supply.take()
            line.leave()

    def _size(self, example: Example) -> int:
        return size_in_rows(example.tokens, example.trained, self.settings.seq_len)

    def _add(self, writer: ReplyWriter, example: Example, size: int, supply: Supply, quota: Quota) -> None:
        """Take an example of so many tokens that is of use, its end cut off where it is more than the quota has
        left."""
        if size > quota.left:
            example = example.first(quota.left)
            size = self._size(example)
        if not supply.keeps(example):
            return
        if not size:
            supply.left_out.add(TOO_SHORT, f"prompt {example.number} with its reply")
        quota.taken += size
        self._pending.append(example)
        self._at += 1
        if self._at % EXAMPLES_PER_FILE == 0:
            self._flush(writer)

    def _flush(self, writer: ReplyWriter) -> None:
        index = (self._at - 1) // EXAMPLES_PER_FILE
        if self._pending and index not in writer.manifest.entries:
            self._check()
            writer.write(self._pending, index, self.batch.ranks.device)
        self._pending = []

    def _advance(self, tokens: int) -> None:
        self.progress("replies", tokens, None)  # the total counts prompts too
