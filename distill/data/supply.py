"""What a source can still give to a collection: its documents as tokens, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np

from decode.tokenizer import Tokenizer
from distill.data.packing import MIN_SEGMENT, cut, segment
from distill.data.prompts import Chosen, encode_text, encode_turns, wants_reply
from distill.data.reply_dataset import Example
from distill.data.settings import CollectSettings
from distill.data.sources import LeftOut
from kernels.errors import UserError

REFUSED = "refused by the chat template or tokenizer"
TOO_SHORT = f"fewer than {MIN_SEGMENT} tokens"
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

    def next_turn(self, replies: Sequence[np.ndarray], end_tokens: frozenset[int], room: int) -> list[int] | None:
        """The chunk to give behind these replies; None where the conversation ends.

        It ends behind its last turn, behind a reply that has no end token (it was too long, or looped), and where the
        chunk would leave no room for a reply. room: most tokens before a reply.
        """
        turn = len(replies)
        if turn == len(self.turns) or (replies and int(replies[-1][-1]) not in end_tokens):
            return None
        before = sum(map(len, replies)) + sum(map(len, self.turns[: turn + 1]))
        return self.turns[turn] if before <= room else None

    def example(self, source: int, replies: Sequence[np.ndarray] = ()) -> Example:
        """The conversation with what the teacher wrote, int32 [n] each; that is learnt."""
        given = [np.array(chunk, np.int32) for chunk in self.turns[: len(replies) or 1]]
        pairs = list(zip_longest(given, replies, fillvalue=np.zeros(0, np.int32)))
        trained = self.trained
        if trained is None:
            trained = np.concatenate([np.arange(len(a) + len(b)) >= len(a) for a, b in pairs])
        return Example(source, self.number, np.concatenate([*chain(*pairs)]), trained, self.asks, self.kind)


class Supply:
    """What one source can still give, in the order of its numbers.

    `ahead` looks forward as far as is needed to keep the teacher busy, `take` uses what is first. Only what was met
    before what is taken counts as left out: how far one looked ahead decides nothing.
    """

    def __init__(
        self, source: int, chosen: Chosen, tokenizer: Tokenizer, settings: CollectSettings, context: int
    ) -> None:
        """context: tokens that the teacher can work on."""
        self.source, self.left_out = source, chosen.left_out
        self._tokenizer, self._settings, self._met = tokenizer, settings, chosen.met
        self.room = min(context, settings.seq_len) - settings.max_reply  # most tokens before a reply
        self._candidates = self._encoded(chosen)
        self._ahead: deque[tuple[Candidate | None, LeftOut]] = deque()  # each with what was left out before it

    def ahead(self, place: int = 0) -> Candidate | None:
        """The candidate so many places behind the next one; None behind the last."""
        while len(self._ahead) <= place:
            if self._ahead and self._ahead[-1][0] is None:
                return None
            self._ahead.append((next(self._candidates, None), self._met.drained()))
        return self._ahead[place][0]

    def take(self) -> Candidate | None:
        """The next candidate, which does not come again; None at the end."""
        candidate = self.ahead()
        self.left_out.add_all(self._ahead[0][1])
        if candidate is None:
            self._ahead[0] = (None, LeftOut())
        else:
            self._ahead.popleft()
        return candidate

    def _encoded(self, chosen: Chosen) -> Iterator[Candidate]:
        for number, document in chosen.documents:
            asks = self._settings.reply and wants_reply(document)
            trained = None
            try:
                if asks:
                    turns = encode_turns(self._tokenizer, document)
                else:
                    ids, trained = encode_text(self._tokenizer, document)
                    turns = [ids]
            except UserError as error:
                self._met.add(REFUSED, str(error))
                continue
            if asks and len(turns[0]) > self.room:
                self._met.add(
                    f"more than {self.room} tokens, which --seq-len less --max-reply leaves for a prompt",
                    f"{document.where} has {len(turns[0]):,}",
                )
            elif not turns[0] or not (asks or size_in_rows(turns[0], trained, self._settings.seq_len)):
                self._met.add(TOO_SHORT, document.where)
            else:
                yield Candidate(number, turns, asks, trained, document.category)


def size_in_rows(tokens: Sequence[int] | np.ndarray, trained: np.ndarray | None, seq_len: int) -> int:
    """How many of an example's tokens will stand in rows. trained: bool [n], which are learnt; None is all."""
    tokens = np.asarray(tokens, np.int32)
    parts = cut(segment(tokens, np.ones(len(tokens), bool) if trained is None else trained), seq_len)
    return sum(len(part.tokens) for part in parts)
