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
from distill.data.sources import EXCLUDED, Document, LeftOut, is_excluded, is_hub, read_source

Numbered = tuple[int, Document]


class Chosen(NamedTuple):
    """The documents of one source, in the order in which they are taken; they are to be closed.

    left_out: what of the source is not used, before what was taken of it; met: what was met since, further on.
    """

    documents: Generator[Numbered, None, None]
    left_out: LeftOut
    met: LeftOut


def choose_documents(name: str, *, excluded: frozenset[str], longest: int, seed: tuple[int, int]) -> Chosen:
    """The documents of a source without those that are excluded, long texts split, each with its number.

    Those of files come in a seeded order, for which all of them are held in memory. Those of a Hub dataset come in its
    own, and are read as they are taken. longest: characters of a text that is not split.
    """
    met = LeftOut()
    documents = _wanted(name, excluded, longest, met)
    if is_hub(name):
        return Chosen(_numbered(documents), LeftOut(), met)
    held = list(documents)
    order = np.random.default_rng(seed).permutation(len(held))
    return Chosen(_numbered(held[i] for i in order), LeftOut(), met)


def _numbered(documents: Iterator[Document]) -> Generator[Numbered, None, None]:
    yield from enumerate(documents)


def _wanted(name: str, excluded: frozenset[str], longest: int, left_out: LeftOut) -> Iterator[Document]:
    for document in read_source(name, left_out):
        if is_excluded(document, excluded):
            left_out.add(EXCLUDED, document.where)
        else:
            yield from split_text(document, longest)


def wants_reply(document: Document) -> bool:
    """Whether a document ends where the teacher should speak."""
    if document.messages is not None:
        return document.messages[-1]["role"] in ANSWERED
    return document.kind == "prompt"


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
    """What the teacher is given before each of its replies: one chunk, of `turns` one for each."""
    if document.kind == "turns":
        return tokenizer.encode_turns(document.user_texts, document.where)
    return [_encode_prompt(tokenizer, document)]


def encode_text(tokenizer: Tokenizer, document: Document) -> tuple[list[int], np.ndarray]:
    """Any document as it is, and which of its tokens are learnt, bool [n]: of a conversation the assistant's turns, and
    it ends with the last of these; of all else everything."""
    messages = document.messages or []
    if answered := [i for i, message in enumerate(messages, 1) if message["role"] == "assistant"]:
        ids, turns = tokenizer.encode_conversation(messages[: answered[-1]], document.where)
        trained = np.zeros(len(ids), bool)
        for turn in turns:
            trained[turn.start : turn.stop] = True
        return ids, trained
    ids = tokenizer.encode_text(document.text or "") if document.kind == "text" else _encode_prompt(tokenizer, document)
    return ids, np.ones(len(ids), bool)


def _encode_prompt(tokenizer: Tokenizer, document: Document) -> list[int]:
    messages = document.messages or [{"role": "user", "content": document.text or ""}]
    return tokenizer.encode_prompt(Prompt(messages, "", where=document.where))
