"""What a source can still give to a collection: its documents as tokens, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from decode.tokenizer import Tokenizer
from distill.data.packing import MIN_SEGMENT, cut, segment
from distill.data.prompts import Chosen, Numbered, encode_prompt, encode_text, wants_reply
from distill.data.settings import CollectSettings
from kernels.errors import UserError

WINDOW = 4  # batches of documents among whose prompts lengths are sorted, so that little of a batch is padding
REFUSED = "refused by the chat template or tokenizer"
TOO_SHORT = f"fewer than {MIN_SEGMENT} tokens"


@dataclass(frozen=True)
class Candidate:
    """A document as tokens, before the teacher has said anything."""

    number: int
    ids: list[int]
    prompt_length: int
    asks: bool  # whether the teacher is to reply


class Supply:
    """What one source can still give, in the order of its numbers."""

    def __init__(
        self, source: int, chosen: Chosen, tokenizer: Tokenizer, settings: CollectSettings, context: int
    ) -> None:
        """context: tokens that the teacher can work on."""
        self.source, self.left_out = source, chosen.left_out
        self._tokenizer, self._settings = tokenizer, settings
        self._longest = min(context, settings.seq_len) - settings.max_reply
        self._candidates = self._encoded(chosen.documents)
        self._ahead: list[Candidate] = []

    def window(self, room: int) -> list[Candidate]:
        """The next documents, those that are surely or probably needed for `room` tokens. They stay here until `taken`
        says how many were used."""
        batch, max_reply = self._settings.reply_batch, self._settings.max_reply
        window: list[Candidate] = []
        sure = 0
        while len(window) < WINDOW * batch and (sure < room or len(window) < batch // 4):
            if len(window) == len(self._ahead):
                candidate = next(self._candidates, None)
                if candidate is None:
                    break
                self._ahead.append(candidate)
            window.append(self._ahead[len(window)])
            sure += len(window[-1].ids) + (max_reply if window[-1].asks else 0)
        return window

    def taken(self, documents: int) -> None:
        del self._ahead[:documents]

    def _encoded(self, documents: Iterator[Numbered]) -> Iterator[Candidate]:
        for number, document in documents:
            asks = self._settings.reply and wants_reply(document)
            try:
                if asks:
                    ids = encode_prompt(self._tokenizer, document)
                    prompt_length = len(ids)
                else:
                    ids, prompt_length = encode_text(self._tokenizer, document)
            except UserError as error:
                self.left_out.add(REFUSED, str(error))
                continue
            if asks and len(ids) > self._longest:
                self.left_out.add(
                    f"more than {self._longest} tokens, which --seq-len less --max-reply leaves for a prompt",
                    f"{document.where} has {len(ids):,}",
                )
            elif not ids or not (asks or size_in_rows(ids, prompt_length, self._settings.seq_len)):
                self.left_out.add(TOO_SHORT, document.where)
            else:
                yield Candidate(number, ids, prompt_length, asks)


def size_in_rows(tokens: Sequence[int] | np.ndarray, prompt_length: int, seq_len: int) -> int:
    """How many of an example's tokens will stand in rows."""
    parts = cut(segment(np.asarray(tokens, np.int32), prompt_length), seq_len)
    return sum(len(part.tokens) for part in parts)
