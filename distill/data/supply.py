"""What a source can still give to a collection: its documents as tokens, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np

from decode.batching import CHECK_EVERY, LONGEST_LOOP
from decode.metrics import is_looping
from decode.tokenizer import Tokenizer
from distill.data.documents import UNLEARNT, Document, LeftOut
from distill.data.duplicates import NearDuplicates, Parts
from distill.data.exclusion import Excluded
from distill.data.packing import MIN_SEGMENT, cuts, segment
from distill.data.prompts import Chosen, encode_text, encode_turns, wants_reply
from distill.data.reply_dataset import Example
from distill.data.settings import CollectSettings
from kernels.errors import UserError

REFUSED = "refused by the chat template or tokenizer"
TOO_SHORT = f"fewer than {MIN_SEGMENT} tokens"
SAME, NEAR = "the same as a prompt before", "near a prompt before"
SILENT = "a reply that says nothing"
LOOPING = "fell into a loop, and ends there"
UNENDED = "has no end token within --max-reply, or was the last that --tokens left room for"
FURTHER = "left no room for a further turn and its reply"
GIVEN_UP = 1000
OF_USERS = 1.0  # the temperature at which the teacher writes a user's turn


@dataclass(frozen=True)
class Candidate:
    """A document as tokens, before the teacher has said anything."""

    number: int
    turns: list[list[int]]  # chunks of given tokens; where it asks, a reply of the teacher's follows each
    asks: bool  # whether the teacher is to write
    trained: np.ndarray | None = None  # bool: which tokens of the one chunk are learnt, where it does not ask
    kind: str = ""
    as_user: bool = False  # whether the teacher writes the user's turn too, as its first reply

    def temperature(self, turn: int, temperatures: Sequence[float]) -> float:
        """At which the reply to a chunk is sampled; temperatures: those of replies, used in turn."""
        return OF_USERS if self.as_user and turn == 0 else temperatures[self.number % len(temperatures)]

    def example(self, source: int, replies: Sequence[np.ndarray] = ()) -> Example:
        """The conversation with what the teacher wrote, int32 [n] each; that is learnt."""
        given = [np.array(chunk, np.int32) for chunk in self.turns[: len(replies) or 1]]
        parts = [*chain(*zip_longest(given, replies, fillvalue=np.zeros(0, np.int32)))]
        trained = self.trained
        if trained is None:
            trained = np.repeat([False, True] * len(given), [len(part) for part in parts])
        return Example(source, self.number, np.concatenate(parts), trained, self.asks, self.kind)


class _Met(NamedTuple):
    """A candidate, None behind the last; the prompt that others may be duplicates of, empty where there is none; its
    place; and what was left out before it."""

    candidate: Candidate | None
    prompt: str
    where: str
    left_out: LeftOut


class _Ahead(NamedTuple):
    """A candidate that is no duplicate, None behind the last; what was left out before it; and how many were met up to
    it."""

    candidate: Candidate | None
    left_out: LeftOut
    met: int
    asks: bool


class Supply:
    """What one source can still give, in the order of its numbers.

    `ahead` looks forward as far as is needed to keep the teacher busy, `take` uses what is first, and `rest` ends the
    source's turn. How far one looked ahead decides nothing: only what was met before what is taken counts as left out,
    and a prompt is a duplicate where it is near one that was taken, of this source or of another.
    """

    def __init__(
        self,
        source: int,
        chosen: Chosen,
        tokenizer: Tokenizer,
        settings: CollectSettings,
        context: int,
        asked: NearDuplicates,
        excluded: Excluded,
    ) -> None:
        """context: tokens that the teacher can work on; asked: the prompts that all sources have given; excluded: those
        that the teacher may not write itself."""
        self.source, self.weight, self.left_out = source, chosen.weight, chosen.left_out
        self.room = min(context, settings.seq_len) - settings.max_reply  # most tokens before a reply
        self._tokenizer, self._settings, self._asked, self._excluded = tokenizer, settings, asked, excluded
        self.cut = LeftOut()  # not the documents: what their replies lack
        self._dropped = 0  # of what the teacher wrote, in a row
        self._unread: Iterator[_Met] = self._encoded(chosen)
        self._met: deque[_Met] = deque()  # behind what was taken
        self._ahead: deque[_Ahead] = deque()

    def ahead(self, place: int = 0) -> Candidate | None:
        """The candidate so many places behind the next one; None behind the last."""
        while len(self._ahead) <= place and not (self._ahead and self._ahead[-1].candidate is None):
            self._ahead.append(self._next())
        return self._ahead[min(place, len(self._ahead) - 1)].candidate

    def take(self) -> Candidate | None:
        """The next candidate, which does not come again; None at the end."""
        self.ahead()
        first = self._ahead.popleft()
        self.left_out.add_all(first.left_out)
        for _ in range(first.met):
            self._met.popleft()
        return first.candidate

    def keeps(self, example: Example) -> bool:
        """Whether the next candidate is used with what the teacher wrote; what is not is counted. Left out are replies
        that say nothing, and what it wrote as the user like any other prompt: excluded, or near one before.

        example: as it will be kept, its end cut off or not, so that it is judged alike when it is read again.
        """
        candidate = self.ahead()
        assert candidate is not None and candidate.number == example.number
        reason = self._fault(candidate, example) if candidate.asks else None
        self._dropped = self._dropped + 1 if reason else 0
        if reason:
            self.left_out.add(reason, f"number {candidate.number}")
        if candidate.as_user and self._dropped == GIVEN_UP:
            raise UserError(f"--source self: the teacher said nothing of use {GIVEN_UP} times in a row ({reason})")
        if not reason and candidate.asks and (lacks := self._lacks(candidate, example)):
            self.cut.add(lacks, f"number {candidate.number}")
        return not reason

    def _lacks(self, candidate: Candidate, example: Example) -> str | None:
        """Why a conversation ends before its end: the last reply was cut, or there would have been further turns."""
        trained = example.trained
        starts = np.flatnonzero(np.concatenate([trained[:1], trained[1:] > trained[:-1]]))
        if not len(starts) or not trained[-1] or int(example.tokens[-1]) not in self._tokenizer.end_tokens:
            reply = example.tokens[starts[-1] :].tolist() if len(starts) else []
            return LOOPING if len(reply) % CHECK_EVERY == 0 and is_looping(reply, LONGEST_LOOP) else UNENDED
        return FURTHER if len(starts) < len(candidate.turns) else None

    def _fault(self, candidate: Candidate, example: Example) -> str | None:
        learnt = example.tokens[example.trained].tolist()
        if learnt and self._tokenizer.is_blank(learnt):
            return SILENT
        if not candidate.as_user:
            return None
        said = example.tokens[len(candidate.turns[0]) :].tolist()
        end = next((at for at, token in enumerate(said) if token in self._tokenizer.end_tokens), None)
        prompt = Parts(self._tokenizer.decode(said[:end]))
        return self._excluded.reason_of(prompt) or self._duplicate(prompt)

    def _duplicate(self, prompt: Parts) -> str | None:
        """What a prompt is to one that was asked before; else it counts as asked from now on."""
        near = self._asked.add(prompt)
        return None if near is None else SAME if near == prompt.text else NEAR

    def rest(self) -> None:
        """Forget what was looked at and not taken, before other sources have their turn: it comes again, unless what
        they give is near it."""
        self._asked.forget(len(self._asked) - sum(one.asks for one in self._ahead))
        self._unread = chain(self._met, self._unread)
        self._met, self._ahead = deque(), deque()

    def _next(self) -> _Ahead:
        left_out = LeftOut()
        for count, met in enumerate(self._unread, 1):
            self._met.append(met)
            left_out.add_all(met.left_out)
            reason = self._duplicate(Parts(met.prompt)) if met.prompt else None
            if reason is None:
                return _Ahead(met.candidate, left_out, count, bool(met.prompt))
            left_out.add(reason, met.where)
        return _Ahead(None, left_out, 0, False)

    def _encoded(self, chosen: Chosen) -> Iterator[_Met]:
        for number, document in chosen.documents:
            if candidate := self._candidate(number, document, chosen.met):
                prompt = "\n".join(document.user_texts) if candidate.asks and not candidate.as_user else ""
                yield _Met(candidate, prompt, document.where, chosen.met.drained())
        yield _Met(None, "", "", chosen.met.drained())

    def _candidate(self, number: int, document: Document, left_out: LeftOut) -> Candidate | None:
        """A document as tokens; None where it is left out."""
        asks, trained = self._settings.reply and wants_reply(document), None
        if document.unlearnt and not asks:
            left_out.add(UNLEARNT, document.where)
            return None
        try:
            if asks:
                turns = encode_turns(self._tokenizer, document)
            else:
                ids, trained = encode_text(self._tokenizer, document, left_out)
                turns = [ids]
        except UserError as error:
            if document.kind == "self":  # then so is every other
                raise
            left_out.add(REFUSED, str(error))
            return None
        if asks and len(turns[0]) > self.room:
            left_out.add(
                f"more than {self.room} tokens, which --seq-len less --max-reply leaves for a prompt",
                f"{document.where} has {len(turns[0]):,}",
            )
        elif not turns[0] or (trained is not None and not size_in_rows(turns[0], trained, self._settings.seq_len)):
            left_out.add(TOO_SHORT, document.where)
        else:
            return Candidate(number, turns, asks, trained, document.category, document.kind == "self")
        return None


def size_in_rows(tokens: Sequence[int] | np.ndarray, trained: np.ndarray, seq_len: int) -> int:
    """How many of an example's tokens will stand in rows. trained: bool [n], which are learnt."""
    whole = segment(np.asarray(tokens, np.int32), trained)
    return sum(part.stop - part.start for part in cuts(whole.mask, seq_len))
