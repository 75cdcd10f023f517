"""The second pass of a collection: the teacher answers the prompts, and all that will be scored becomes tokens.

The prompt that a reply answers, its temperature and its random numbers follow from its number alone. How many are
answered depends on how long the replies are, and nothing else does: batches only decide how fast it goes.
(Until generation is independent of its batch by bits, another `reply_batch` can also turn a near tie.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from decode.models.dimensions import Dimensions
from decode.models.transformer import Transformer
from decode.tokenizer import Tokenizer
from distill.data.packing import MIN_SEGMENT, cut, segment
from distill.data.prompts import Chosen, Numbered, encode_prompt, encode_text
from distill.data.replies import generate_replies
from distill.data.reply_dataset import EXAMPLES_PER_FILE, Example, Replies, ReplyWriter
from distill.data.settings import CollectSettings
from kernels.memory import check_fits

WINDOW = 4  # batches of prompts among which lengths are sorted, so that little of a batch is padding

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


class Supply:
    """What one source can still give: its prompts first, in the order of their numbers, then its texts."""

    def __init__(self, source: int, chosen: Chosen, tokenizer: Tokenizer, longest: int) -> None:
        """longest: tokens of a prompt; those with more are left out."""
        self.source = source
        self._prompts = self._encoded(chosen.prompts, tokenizer, longest)
        self._texts = iter(chosen.texts)
        self._tokenizer = tokenizer
        self._ahead: list[tuple[int, list[int]]] = []

    def prompts(self, room: int, max_reply: int, batch: int) -> list[tuple[int, list[int]]]:
        """The next prompts, (number, ids) each, that are surely or probably needed for `room` tokens. They stay here
        until `taken` says how many were used."""
        window: list[tuple[int, list[int]]] = []
        sure = 0
        while len(window) < WINDOW * batch and (sure < room or len(window) < batch // 4):
            if len(window) == len(self._ahead):
                entry = next(self._prompts, None)
                if entry is None:
                    break
                self._ahead.append(entry)
            window.append(self._ahead[len(window)])
            sure += len(window[-1][1]) + max_reply
        return window

    def taken(self, prompts: int) -> None:
        del self._ahead[:prompts]

    def text(self) -> Example | None:
        """The next text, None where there is no more."""
        entry = next(self._texts, None)
        if entry is None:
            return None
        ids, prompt_length = encode_text(self._tokenizer, entry[1])
        return Example(self.source, entry[0], np.array(ids, np.int32), prompt_length, replied=False)

    @staticmethod
    def _encoded(prompts: Sequence[Numbered], tokenizer: Tokenizer, longest: int) -> Iterator[tuple[int, list[int]]]:
        for number, document in prompts:
            ids = encode_prompt(tokenizer, document)
            if 1 <= len(ids) <= longest:
                yield number, ids


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

    def run(self, writer: ReplyWriter, chosen: Sequence[Chosen]) -> None:
        """Every source gives an equal share of the tokens; what one cannot give, the later ones do, and what is missing
        then is shared out among those that have more, until it is there or none has any."""
        replies = Replies(writer.folder, writer.manifest)
        for i, entry in enumerate(replies.shards):
            first = entry.index * EXAMPLES_PER_FILE
            self._written.update(enumerate(replies.read(i), first))
        longest = min(self.model.context, self.settings.seq_len) - self.settings.max_reply
        supplies = [Supply(source, documents, self.tokenizer, longest) for source, documents in enumerate(chosen)]
        left = self.settings.tokens
        while supplies:
            before, more = left, []
            for place, supply in enumerate(supplies):
                quota = Quota(left // (len(supplies) - place))
                ended = self._turn(writer, supply, quota)
                left -= quota.taken
                more += [] if ended else [supply]
            supplies = more if left < before else []
        self._flush(writer)

    def _turn(self, writer: ReplyWriter, supply: Supply, quota: Quota) -> bool:
        """Let a source fill its quota; whether it has nothing more to give."""
        while quota.left >= MIN_SEGMENT:
            window = supply.prompts(quota.left, self.settings.max_reply, self.settings.reply_batch)
            if not window:
                break
            known = self._known(supply.source, window, quota.left)
            for example in self._answer(supply, window, quota) if known is None else known:
                self._add(writer, example, quota)
                supply.taken(1)
                if quota.left < MIN_SEGMENT:
                    return False
        while quota.left >= MIN_SEGMENT:
            text = supply.text()
            if text is None:
                return True
            if self._size(text):
                self._add(writer, text, quota)
        return False

    def _size(self, example: Example) -> int:
        """How many of its tokens will stand in rows."""
        parts = cut(segment(example.tokens, example.prompt_length), self.settings.seq_len)
        return sum(len(part.tokens) for part in parts)

    def _add(self, writer: ReplyWriter, example: Example, quota: Quota) -> None:
        """Take an example, its end cut off where it is more than the quota has left."""
        if self._size(example) > quota.left:
            tokens = example.tokens[: quota.left]
            example = replace(example, tokens=tokens, prompt_length=min(example.prompt_length, len(tokens)))
        quota.taken += self._size(example)
        self._pending.append(example)
        self._at += 1
        if self._at % EXAMPLES_PER_FILE == 0:
            self._flush(writer)

    def _flush(self, writer: ReplyWriter) -> None:
        index = (self._at - 1) // EXAMPLES_PER_FILE
        if self._pending and index not in writer.manifest.entries:
            writer.write(self._pending, index)
        self._pending = []

    def _known(self, source: int, window: list[tuple[int, list[int]]], room: int) -> list[Example] | None:
        """The replies to a window that an earlier run has written, as far as `room` goes; None if one is missing."""
        known = []
        for place, (number, _) in enumerate(window, self._at):
            example = self._written.get(place)
            if example is None or (example.source, example.number) != (source, number):
                return None
            known.append(example)
            room -= self._size(example)
            if room < MIN_SEGMENT:
                break
        return known

    def _answer(self, supply: Supply, window: list[tuple[int, list[int]]], quota: Quota) -> list[Example]:
        """Replies to a window of prompts, in the order of their numbers."""
        if not quota.announced:
            quota.announced = True
            self.progress("replies", quota.taken, quota.size)
        order = sorted(range(len(window)), key=lambda i: (len(window[i][1]), i))
        examples: dict[int, Example] = {}
        for start in range(0, len(order), self.settings.reply_batch):
            batch = [window[i] for i in order[start : start + self.settings.reply_batch]]
            self.progress("replies", sum(len(ids) for _, ids in batch), None)  # the total counts them too
            for (number, ids), reply in zip(batch, self._generate(supply.source, batch), strict=True):
                tokens = np.concatenate([np.array(ids, np.int32), reply])
                examples[number] = Example(supply.source, number, tokens, len(ids), replied=True)
        return [examples[number] for number, _ in window]

    def _generate(self, source: int, batch: list[tuple[int, list[int]]]) -> list[np.ndarray]:
        settings = self.settings
        self.check_caches(batch)
        temperatures = settings.reply_temperatures
        return generate_replies(
            self.model,
            [ids for _, ids in batch],
            [(settings.seed, source, number) for number, _ in batch],
            temperatures=[temperatures[number % len(temperatures)] for number, _ in batch],
            max_reply=settings.max_reply,
            end_tokens=self.tokenizer.end_tokens,
            advance=lambda tokens: self.progress("replies", tokens, None),
        )

    def check_caches(self, batch: Sequence[tuple[int, list[int]]]) -> None:
        """Refuse, before anything is allocated, a batch whose caches alone are more than there is memory."""
        longest = max(len(ids) for _, ids in batch) + self.settings.max_reply
        check_fits(
            len(batch) * self.shape.cache_bytes(longest),
            f"--reply-batch {self.settings.reply_batch}: the caches of {len(batch)} prompts and their replies need",
            "choose a smaller one",
        )
