"""Tokens in segments, and segments in rows of one length: what forms which row follows from their order alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

MAX_SEGMENTS = 255  # of a row: their ids are bytes, and 0 is padding
OPEN_ROWS = 64
MIN_SEGMENT = 8  # tokens: shorter ends are dropped

Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens int32, trained positions bool, segment ids uint8: [seq_len]


@dataclass
class Segment:
    """A stretch of one text that will stand in a row: token ids, and which positions are trained on."""

    tokens: np.ndarray
    mask: np.ndarray


def segment(tokens: np.ndarray, trained: np.ndarray) -> Segment:
    """All of a text, trained on the predictions of its trained tokens (bool [n]); the first of them has none."""
    mask = np.zeros(len(tokens), bool)
    mask[:-1] = trained[1:]
    return Segment(tokens, mask)


def cut(whole: Segment, seq_len: int) -> Iterator[Segment]:
    """A segment in parts of at most seq_len, as `cuts` says."""
    for part in cuts(whole.mask, seq_len):
        yield Segment(whole.tokens[part], whole.mask[part].copy())


def cuts(mask: np.ndarray, seq_len: int) -> Iterator[slice]:
    """Where a segment is cut into parts of at most seq_len. Ends too short to learn from are dropped, and parts with
    nothing to learn, unless all of it is such: the beginning of a text that was cut off."""
    for start in range(0, len(mask), seq_len):
        part = slice(start, min(start + seq_len, len(mask)))
        if part.stop - start >= MIN_SEGMENT and (mask[part].any() or not mask.any()):
            yield part


def pack(segments: Sequence[Segment], seq_len: int) -> list[Row]:
    """Rows of seq_len that hold segments, as `place` says."""
    sizes = (len(part.tokens) for part in segments)
    return [row_of([segments[number] for number in row], seq_len) for row in place(sizes, seq_len)]


def place(sizes: Iterable[int], seq_len: int) -> Iterator[list[int]]:
    """Which segments form each row of seq_len, by their numbers: first fit, with OPEN_ROWS rows open at a time."""
    opened: list[list[int]] = []
    free: list[int] = []
    for number, size in enumerate(sizes):
        fits = (i for i, room in enumerate(free) if room >= size and len(opened[i]) < MAX_SEGMENTS)
        at = next(fits, None)
        if at is None:
            if len(opened) == OPEN_ROWS:
                fullest = free.index(min(free))
                free.pop(fullest)
                yield opened.pop(fullest)
            opened.append([])
            free.append(seq_len)
            at = len(opened) - 1
        opened[at].append(number)
        free[at] -= size
    yield from opened


def row_of(parts: list[Segment], seq_len: int) -> Row:
    """Segments, one behind the other, as a row."""
    tokens, mask = np.zeros(seq_len, np.int32), np.zeros(seq_len, bool)
    segments = np.zeros(seq_len, np.uint8)
    at = 0
    for number, part in enumerate(parts, 1):
        end = at + len(part.tokens)
        tokens[at:end], mask[at:end], segments[at:end] = part.tokens, part.mask, number
        at = end
    return tokens, mask, segments
