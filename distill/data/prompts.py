"""The first pass of a collection: which documents of a source, in which order, and which of them want a reply.

All of it follows from the files, the seed and the settings; the teacher is not asked.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from decode.prompts import ANSWERED, Prompt
from decode.tokenizer import Tokenizer
from distill.data.exclusion import Excluded
from distill.data.sources import Document, LeftOut, Source, read_source

UNTOLD = "turns of the assistant that a longer conversation's text has otherwise, and that are not learnt"
READ_AHEAD = 10_000  # documents of a source that are held, for one of them to be the next

Numbered = tuple[int, Document]


class Chosen(NamedTuple):
    """The documents of one source, in the order in which they are taken; they are to be closed.

    left_out: what of the source is not used, before what was taken of it; met: what was met since, further on. weight:
    the source's share, over the sum of all.
    """

    documents: Generator[Numbered, None, None]
    left_out: LeftOut
    met: LeftOut
    weight: float


def choose_documents(source: Source, *, excluded: Excluded, longest: int, seed: tuple[int, int]) -> Chosen:
    """The documents of a source without those that are excluded, long texts split, each with its number.

    They come in a seeded order: each is drawn from READ_AHEAD that are held, and those are read in an order over the
    whole source where `read_source` knows one, else in the source's own. longest: characters of a text that is not
    split.
    """
    met, order = LeftOut(), np.random.default_rng(seed)
    documents = _wanted(source, excluded, longest, met, order)
    if source.kind != "self":
        documents = _shuffled(documents, order)
    return Chosen(_numbered(documents), LeftOut(), met, source.weight)


def _numbered(documents: Iterator[Document]) -> Generator[Numbered, None, None]:
    yield from enumerate(documents)


def _shuffled(documents: Iterator[Document], order: np.random.Generator) -> Iterator[Document]:
    held: list[Document] = []
    for document in documents:
        if len(held) < READ_AHEAD:
            held.append(document)
        else:
            place = int(order.integers(READ_AHEAD))
            yield held[place]
            held[place] = document
    yield from (held[place] for place in order.permutation(len(held)))


def _wanted(
    source: Source, excluded: Excluded, longest: int, left_out: LeftOut, order: np.random.Generator
) -> Iterator[Document]:
    for document in read_source(source, left_out, order):
        if reason := excluded.reason(document):
            left_out.add(reason, document.where)
        else:
            yield from split_text(document, longest)


def wants_reply(document: Document) -> bool:
    """Whether a document ends where the teacher should speak."""
    if document.messages is not None:
        return document.messages[-1]["role"] in ANSWERED
    return document.kind in ("prompt", "self")


def split_text(document: Document, characters: int) -> Iterator[Document]:
    """Cut long plain text at white space into parts of about `characters`; others pass whole."""
    text = document.text
    if document.kind != "text" or text is None or len(text) <= characters:
        yield document
        return
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= characters else _cut(text, start, start + characters)
        yield replace(document, text=text[start:end])
        start = end


def _cut(text: str, start: int, end: int) -> int:
    """Where a part that begins at `start` ends, at most at `end`: before its last empty line, else before its last
    white space, else, where all is one word, at `end`."""
    line = text.rfind("\n\n", start + 1, end + 2)
    if line > 0:
        return line
    return next((at for at in range(end, start, -1) if text[at].isspace()), end)


def encode_turns(tokenizer: Tokenizer, document: Document) -> list[list[int]]:
    """What the teacher is given before each of its replies: one chunk, of `turns` one for each, and of `self` one
    before what it says as the user and one behind that."""
    if document.kind == "self":
        return list(tokenizer.open_turn)
    if document.kind == "turns":
        return tokenizer.encode_turns(document.user_texts, document.where)
    return [_encode_prompt(tokenizer, document)]


def encode_text(
    tokenizer: Tokenizer, document: Document, left_out: LeftOut | None = None
) -> tuple[list[int], np.ndarray]:
    """Any document as it is, and which of its tokens are learnt, bool [n]: of a conversation the assistant's turns, and
    it ends with the last of these; of all else everything. left_out: counts turns that are not learnt."""
    messages = document.messages or []
    if answered := [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]:
        ids, turns = tokenizer.encode_conversation(messages[: answered[-1]], document.where)
        trained = np.zeros(len(ids), bool)
        for turn in turns:
            if not tokenizer.is_blank(ids[turn.start : turn.stop]):  # nobody should learn to say nothing
                trained[turn.start : turn.stop] = True
        if left_out is not None and len(turns) < len(answered):
            left_out.add(UNTOLD, document.where, len(answered) - len(turns))
        return ids, trained
    ids = tokenizer.encode_text(document.text or "") if document.kind == "text" else _encode_prompt(tokenizer, document)
    return ids, np.ones(len(ids), bool)


def _encode_prompt(tokenizer: Tokenizer, document: Document) -> list[int]:
    messages = document.messages or [{"role": "user", "content": document.text or ""}]
    return tokenizer.encode_prompt(Prompt(messages, "", where=document.where))
