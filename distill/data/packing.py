"""Documents in pieces, and pieces in rows of one length: what forms which row follows from their order alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distill.data.sources import Document

MAX_DOCUMENTS = 255  # of a row: their numbers are bytes, and 0 is padding
OPEN_ROWS = 64
MIN_PIECE = 8  # tokens: shorter ends are dropped

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens int32, trained positions bool, document uint8, each [seq_len]


@dataclass
class Piece:
    """A stretch of one document that will stand in a row: ids, and which positions are trained on."""

    tokens: np.ndarray
    mask: np.ndarray


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
        end = min(start + characters, len(text))
        if end < len(text):
            cut_at = max(
                text.rfind("\n\n", start, end), text.rfind(" ", start, end) if "\n\n" not in text[start:end] else -1
            )
            end = cut_at if cut_at > start else end
        yield Document("text", text[start:end], None, document.line)
        start = end


def cut(piece: Piece, seq_len: int) -> Iterator[Piece]:
    """A piece in parts of at most seq_len; ends too short to learn from are dropped."""
    for start in range(0, len(piece.tokens), seq_len):
        part = Piece(piece.tokens[start : start + seq_len], piece.mask[start : start + seq_len].copy())
        if len(part.tokens) >= MIN_PIECE and part.mask.any():
            yield part


def pack(pieces: list[Piece], seq_len: int) -> list[Row]:
    """First fit into rows of seq_len, with OPEN_ROWS rows open at a time.

    Returns tokens int32, trained positions bool and document uint8 (0 is padding) for each row.
    """
    closed: list[list[Piece]] = []
    opened: list[list[Piece]] = []
    free: list[int] = []
    for piece in pieces:
        size = len(piece.tokens)
        fits = (i for i, room in enumerate(free) if room >= size and len(opened[i]) < MAX_DOCUMENTS)
        at = next(fits, None)
        if at is None:
            if len(opened) == OPEN_ROWS:
                fullest = free.index(min(free))
                closed.append(opened.pop(fullest))
                free.pop(fullest)
            opened.append([])
            free.append(seq_len)
            at = len(opened) - 1
        opened[at].append(piece)
        free[at] -= size
    return [_row(row, seq_len) for row in closed + opened]


def _row(pieces: list[Piece], seq_len: int) -> Row:
    tokens, mask = np.zeros(seq_len, np.int32), np.zeros(seq_len, bool)
    document = np.zeros(seq_len, np.uint8)
    at = 0
    for number, piece in enumerate(pieces, 1):
        end = at + len(piece.tokens)
        tokens[at:end], mask[at:end], document[at:end] = piece.tokens, piece.mask, number
        at = end
    return tokens, mask, document
