"""The first pass of a collection: which documents of a source, in which order, and which of them want a reply.

All of it follows from the files, the seed and the settings; the teacher is not asked.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np

from decode.prompts import ANSWERED, Prompt
from decode.tokenizer import Tokenizer
from distill.data.sources import EXCLUDED, Document, LeftOut, is_excluded, is_hub, read_source

Numbered = tuple[int, Document]


class Chosen(NamedTuple):
    """The documents of one source, in the order in which they are taken, and what of it was met that is not used.

    Documents that are not taken to their end are to be closed.
    """

    documents: Generator[Numbered, None, None]
    left_out: LeftOut


def choose_documents(name: str, *, excluded: frozenset[str], longest: int, seed: tuple[int, int]) -> Chosen:
    """The documents of a source without those that are excluded, long texts split, each with its number.

    Those of files come in a seeded order, for which all of them are held in memory. Those of a Hub dataset come in its
    own, and are read as they are taken. longest: characters of a text that is not split.
    """
    left_out = LeftOut()
    documents = _wanted(name, excluded, longest, left_out)
    if is_hub(name):
        return Chosen(_numbered(documents), left_out)
    held = list(documents)
    order = np.random.default_rng(seed).permutation(len(held))
    return Chosen(_numbered(held[i] for i in order), left_out)


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
        yield Document("text", text[start:end], None, document.line, document.where)
        start = end


def _cut(text: str, start: int, end: int) -> int:
    """Where a part that begins at `start` ends, at most at `end`: before its last empty line, else before its last
    white space, else, where all is one word, at `end`."""
    line = text.rfind("\n\n", start + 1, end + 2)
    if line > 0:
        return line
    return next((at for at in range(end, start, -1) if text[at].isspace()), end)


def encode_prompt(tokenizer: Tokenizer, document: Document) -> list[int]:
    """A document as a prompt that the teacher is to answer."""
    messages = document.messages or [{"role": "user", "content": document.text or ""}]
    return tokenizer.encode_prompt(Prompt(messages, "", where=document.where))


def encode_text(tokenizer: Tokenizer, document: Document) -> tuple[list[int], int]:
    """Any document as it is, and how many of its tokens only lead up to what is to be learnt."""
    if document.kind == "text":
        return tokenizer.encode_text(document.text or ""), 0
    if document.messages is not None and document.messages[-1]["role"] == "assistant":
        return tokenizer.encode_conversation(document.messages, document.where)
    return encode_prompt(tokenizer, document), 0
