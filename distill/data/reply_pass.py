"""The second pass of a collection: the teacher answers the prompts, and all that will be scored becomes tokens.

Which documents are taken is the beginning of their order, whatever the lengths of prompts and replies: long and short
ones, prompts and texts, as often as the source has them. A reply's temperature and random numbers follow from its
prompt's number. How many are answered depends on how long the replies are, and nothing else does: batches only decide
how fast it goes.
(Until generation is independent of its batch by bits, another `reply_batch` can also turn a near tie.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from decode.models.dimensions import Dimensions
from decode.models.transformer import Transformer
from decode.tokenizer import Tokenizer
from distill.data.duplicates import NearDuplicates
from distill.data.exclusion import Excluded
from distill.data.packing import MIN_SEGMENT
from distill.data.prompts import Chosen
from distill.data.replies import generate_replies
from distill.data.reply_dataset import EXAMPLES_PER_FILE, Example, Replies, ReplyWriter
from distill.data.settings import CollectSettings
from distill.data.supply import TOO_SHORT, Candidate, Supply, size_in_rows
from kernels.memory import check_fits

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


class ReplyPass:
    """Fills a reply dataset, going on where an earlier run stopped."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        shape: Dimensions,
        settings: CollectSettings,
        progress: Progress,
    ) -> None:
        self.model, self.tokenizer, self.shape = model, tokenizer, shape
        self.settings, self.progress = settings, progress
        self._written: dict[int, Example] = {}  # by their place in the dataset
        self._pending: list[Example] = []  # not yet in a file
        self._at = 0  # the place of the next example

    def run(self, writer: ReplyWriter, chosen: Sequence[Chosen], excluded: Excluded) -> None:
        """Every source gives its share of the tokens, by its weight; what one cannot give, the later ones do, and what
        is missing then is shared out among those that have more, until it is there or none has any."""
        replies = Replies(writer.folder, writer.manifest)
        for i, entry in enumerate(replies.shards):
            first = entry.index * EXAMPLES_PER_FILE
            self._written.update(enumerate(replies.read(i), first))
        asked = NearDuplicates()
        supplies = [
            Supply(source, documents, self.tokenizer, self.settings, self.model.context, asked, excluded)
            for source, documents in enumerate(chosen)
        ]
        left = self.settings.tokens
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

    def _turn(self, writer: ReplyWriter, supply: Supply, quota: Quota) -> bool:
        """Let a source fill its quota; whether it has nothing more to give."""
        while quota.left >= MIN_SEGMENT:
            window = self._window(supply, quota.left)
            if not window:
                supply.take()
                return True
            for example in self._known(supply, window, quota.left) or self._answer(supply, window, quota):
                self._add(writer, example, supply, quota)
                supply.take()
                if quota.left < MIN_SEGMENT:
                    break
        return False

    def _window(self, supply: Supply, room: int) -> list[Candidate]:
        """The next documents, those that are surely or probably needed for `room` tokens."""
        batch, window, sure = self.settings.reply_batch, list[Candidate](), 0
        while len(window) < batch and (sure < room or len(window) < batch // 4):
            candidate = supply.ahead(len(window))
            if candidate is None:
                break
            window.append(candidate)
            sure += len(candidate.turns[0]) + (self.settings.max_reply if candidate.asks else 0)
        return window

    def _size(self, example: Example) -> int:
        return size_in_rows(example.tokens, example.trained, self.settings.seq_len)

    def _add(self, writer: ReplyWriter, example: Example, supply: Supply, quota: Quota) -> None:
        """Take an example that is of use, its end cut off where it is more than the quota has left."""
        if self._size(example) > quota.left:
            example = example.first(quota.left)
        if not supply.keeps(example):
            return
        size = self._size(example)
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
            writer.write(self._pending, index)
        self._pending = []

    def _known(self, supply: Supply, window: list[Candidate], room: int) -> list[Example]:
        """A window with the replies that an earlier run wrote, as far as `room` goes; nothing if one is missing."""
        known = []
        for place, candidate in enumerate(window, self._at):
            example = self._written.get(place)
            if example is None or (example.source, example.number) != (supply.source, candidate.number):
                return []
            known.append(example)
            room -= self._size(example)
            if room < MIN_SEGMENT:
                break
        return known

    def _answer(self, supply: Supply, window: list[Candidate], quota: Quota) -> list[Example]:
        """A window with the teacher's replies, in the order of its numbers."""
        asked = [one for one in window if one.asks]
        if asked and not quota.announced:
            quota.announced = True
            self.progress("replies", quota.taken, quota.size)
        replies: dict[int, list[np.ndarray]] = {one.number: [] for one in window}
        while True:
            turns = [(one, one.next_turn(replies[one.number], self.tokenizer.end_tokens, supply.room)) for one in asked]
            batch = [(one, chunk) for one, chunk in turns if chunk is not None]
            if not batch:
                break
            self.progress("replies", sum(len(chunk) for _, chunk in batch), None)  # the total counts them too
            for (one, _), reply in zip(batch, self._generate(supply.source, batch, replies), strict=True):
                replies[one.number].append(reply)
        return [one.example(supply.source, replies[one.number]) for one in window]

    def _generate(
        self, source: int, batch: list[tuple[Candidate, list[int]]], replies: dict[int, list[np.ndarray]]
    ) -> list[np.ndarray]:
        settings = self.settings
        prompts = [
            [*one.example(source, before).tokens.tolist(), *chunk] if (before := replies[one.number]) else chunk
            for one, chunk in batch
        ]
        self.check_caches([len(prompt) for prompt in prompts])
        return generate_replies(
            self.model,
            prompts,
            [(settings.seed, source, one.number, len(replies[one.number])) for one, _ in batch],
            temperatures=[one.temperature(len(replies[one.number]), settings.reply_temperatures) for one, _ in batch],
            max_reply=settings.max_reply,
            end_tokens=self.tokenizer.end_tokens,
            advance=lambda tokens: self.progress("replies", tokens, None),
        )

    def check_caches(self, prompts: Sequence[int]) -> None:
        """Refuse, before anything is allocated, a batch of prompts of these lengths whose caches alone are more than
        there is memory."""
        longest = max(prompts) + self.settings.max_reply
        check_fits(
            len(prompts) * self.shape.cache_bytes(longest),
            f"--reply-batch {self.settings.reply_batch}: the caches of {len(prompts)} prompts and their replies need",
            "choose a smaller one",
        )
