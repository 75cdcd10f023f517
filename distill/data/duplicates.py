"""Near duplicates: texts that say the same with a few other words, or quote the same passage.

Two texts are near each other when, both normalised as for `--exclude`, they

- share WORDS words in a row, words being what white space separates, or
- have sets of shingles with a Jaccard index (shared over all) above 0.8. The shingles of a text are its parts of
  SHINGLE characters; a shorter text is its only one.

The answers are exact. What makes them quick only passes over texts that cannot be near: the words in a row are found by
their hashes, and of the sets a bitmap is kept (Sandes et al. 2020, https://arxiv.org/abs/1711.07295). Python's hashes
differ from one process to the next; no answer depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from distill.data.documents import normalise_prompt

WORDS = 13
SHINGLE = 5


class NearDuplicates:
    """Texts, and which of them another text is near.

    Beside itself a text takes 12 bytes a word and 1 to 4 bits a character. 100,000 prompts of 230 characters, each
    compared with all before it, are a minute's work of one core.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """texts: are all held, whether near each other or not."""
        self._texts: list[str] = []  # normalised
        self._runs = _Runs()
        self._sets = _Sets()
        for text in texts:
            self._hold(normalise_prompt(text))

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> str | None:
        """The first text held that this one is near, normalised."""
        return self._find(normalise_prompt(text))

    def add(self, text: str) -> str | None:
        """Hold a text unless one that it is near is held: the first of those is given back, normalised."""
        text = normalise_prompt(text)
        found = self._find(text)
        if found is None:
            self._hold(text)
        return found

    def forget(self, kept: int) -> None:
        """Hold only the first texts, so many of them."""
        del self._texts[kept:]
        self._runs.forget(kept)
        self._sets.forget(kept)

    def _hold(self, text: str) -> None:
        self._runs.add(_runs(text), len(self._texts))
        self._sets.add(_shingles(text), len(self._texts))
        self._texts.append(text)

    def _find(self, text: str) -> str | None:
        runs, shingles = _runs(text), _shingles(text)
        perhaps = sorted(
            [(number, True) for number in self._runs.candidates(runs)]
            + [(number, False) for number in self._sets.candidates(shingles)]
        )
        for number, by_words in perhaps:
            held = self._texts[number]
            if not runs.isdisjoint(_runs(held)) if by_words else _alike(shingles, _shingles(held)):
                return held
        return None


def near(one: str, other: str) -> bool:
    """Whether two texts are near each other: the rule itself."""
    one, other = normalise_prompt(one), normalise_prompt(other)
    return not _runs(one).isdisjoint(_runs(other)) or _alike(_shingles(one), _shingles(other))


def _runs(text: str) -> set[str]:
    """All WORDS words in a row of a normalised text."""
    words = text.split(" ")
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))}


def _alike(one: set[str], other: set[str]) -> bool:
    """Whether the Jaccard index is above 4/5: of a + b = shared + all, 9 shared > 4 (a + b)."""
    return 9 * len(one & other) > 4 * (len(one) + len(other))


class _Runs:
    """The hashes of all runs of words, in sorted arrays each of which is more than twice as long as the next."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # hashes, int64, and numbers of texts, int32

    def add(self, runs: set[str], number: int) -> None:
        if not runs:
            return
        hashes, numbers = np.sort(_hashes(runs)), np.full(len(runs), number, np.int32)
        while self._parts and len(self._parts[-1][0]) <= 2 * len(hashes):
            longer = self._parts.pop()
            hashes, numbers = np.concatenate([longer[0], hashes]), np.concatenate([longer[1], numbers])
            order = np.argsort(hashes, kind="stable")
            hashes, numbers = hashes[order], numbers[order]
        self._parts.append((hashes, numbers))

    def forget(self, kept: int) -> None:
        parts = [(hashes[numbers < kept], numbers[numbers < kept]) for hashes, numbers in self._parts]
        self._parts = [part for part in parts if len(part[0])]

    def candidates(self, runs: set[str]) -> set[int]:
        """The texts that have a run with the hash of one of these."""
        if not runs:
            return set()
        wanted, found = np.sort(_hashes(runs)), set[int]()
        for hashes, numbers in self._parts:
            starts = np.searchsorted(hashes, wanted)
            hits = np.flatnonzero(hashes[np.minimum(starts, len(hashes) - 1)] == wanted)
            for start, end in zip(starts[hits], np.searchsorted(hashes, wanted[hits], side="right"), strict=True):
                found.update(numbers[start:end].tolist())
        return found


class _Sets:
    """Bitmaps of sets, those of similar sizes together.

    Bit i of a bitmap is the parity of the members whose hash is i modulo its length. A member that only one of two
    sets has changes one bit, so two bitmaps differ in at most as many bits as sets do in members.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}  # by their smallest size: sizes that agree in the first three bits

    def add(self, members: set[str], number: int) -> None:
        shift = max(len(members).bit_length() - 3, 0)
        lowest = len(members) >> shift << shift
        group = self._groups.setdefault(lowest, _Group(lowest, lowest + (1 << shift) - 1))
        group.add(_bitmap(_hashes(members), group.bits), len(members), number)

    def forget(self, kept: int) -> None:
        for group in self._groups.values():
            group.forget(kept)

    def candidates(self, members: set[str]) -> list[int]:
        """The sets that may have a Jaccard index above 4/5 with this one, by sizes and bitmaps: those are the sets of a
        and b members of which fewer than (a + b) / 9 are in one only."""
        size, hashes = len(members), _hashes(members)
        found: list[int] = []
        for group in self._groups.values():
            if 4 * size < 5 * group.highest and 4 * group.lowest < 5 * size:
                found += group.candidates(_bitmap(hashes, group.bits), size)
        return found


class _Group:
    def __init__(self, lowest: int, highest: int) -> None:
        """lowest, highest: sizes of sets."""
        self.lowest, self.highest = lowest, highest
        self.bits = max(1 << highest.bit_length(), 64)
        self._count = 0
        self._bitmaps = np.zeros((8, self.bits // 64), np.uint64)
        self._sizes = np.zeros(8, np.int32)
        self._numbers = np.zeros(8, np.int32)

    def add(self, bitmap: np.ndarray, size: int, number: int) -> None:
        if self._count == len(self._sizes):
            self._bitmaps, self._sizes, self._numbers = (
                np.concatenate([a, np.zeros_like(a)]) for a in (self._bitmaps, self._sizes, self._numbers)
            )
        self._bitmaps[self._count], self._sizes[self._count], self._numbers[self._count] = bitmap, size, number
        self._count += 1

    def forget(self, kept: int) -> None:
        self._count = int(np.searchsorted(self._numbers[: self._count], kept))

    def candidates(self, bitmap: np.ndarray, size: int) -> list[int]:
        differing = np.bitwise_count(self._bitmaps[: self._count] ^ bitmap).sum(axis=1, dtype=np.int32)
        alike: np.ndarray = 9 * differing < self._sizes[: self._count] + size
        numbers: list[int] = self._numbers[: self._count][alike].tolist()
        return numbers


def _hashes(members: set[str]) -> np.ndarray:
    return np.fromiter(map(hash, members), np.int64, len(members))


def _bitmap(hashes: np.ndarray, bits: int) -> np.ndarray:
    """uint64 [bits / 64]. bits: a power of two."""
    parities = np.bincount(hashes & (bits - 1), minlength=bits).astype(np.uint8) & 1
    return np.packbits(parities).view(np.uint64)
