"""The first pass of a collection: which documents of a source, in which order, and which of them want a reply.

All of it follows from the files, the seed and the settings; the teacher is not asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from decode.prompts import Prompt
from decode.tokenizer import Tokenizer
from distill.data.sources import Document, Skipped, is_excluded, read_source

Numbered = tuple[int, Document]


@dataclass(frozen=True)
class Chosen:
    """The documents of one source, each with its number in the seeded order, ascending.

    prompts: those that the teacher will answer; texts: all others.
    """

    prompts: list[Numbered]
    texts: list[Numbered]


def choose_documents(
    name: str, *, excluded: frozenset[str], longest: int, seed: tuple[int, int], reply: bool, skipped: Skipped
) -> Chosen:
    """Read a source, leave out what is excluded, split long texts, and number everything in a seeded order.

    longest: characters of a text that is not split. The whole source is held in memory: its order is a permutation.
    """
    documents = [document for document in read_source(name, skipped) if not is_excluded(document, excluded)]
    documents = [part for document in documents for part in split_text(document, longest)]
    order = np.random.default_rng(seed).permutation(len(documents))
    numbered = [(number, documents[i]) for number, i in enumerate(order)]
    prompts = [entry for entry in numbered if reply and wants_reply(entry[1])]
    return Chosen(prompts, [entry for entry in numbered if not (reply and wants_reply(entry[1]))])


def wants_reply(document: Document) -> bool:
    """Whether a document ends where the teacher should speak."""
    if document.messages is not None:
        return document.messages[-1]["role"] == "user"
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
        yield Document("text", text[start:end], None, document.line)
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
    return tokenizer.encode_prompt(Prompt(messages, f"in line {document.line}"))


def encode_text(tokenizer: Tokenizer, document: Document) -> tuple[list[int], int]:
    """Any document as it is, and how many of its tokens only lead up to what is to be learnt."""
    if document.kind == "text":
        return tokenizer.encode_text(document.text or ""), 0
    if document.messages is not None and document.messages[-1]["role"] == "assistant":
        return tokenizer.encode_conversation(document.messages)
    return encode_prompt(tokenizer, document), 0
