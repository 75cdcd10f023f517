"""Near duplicates: texts that say the same with a few other words, or quote the same passage.

Two texts are near each other when, both normalised as for `--exclude`, they

- share WORDS words in a row, words being what white space separates, or
- have sets of shingles with a Jaccard index (shared over all) above 0.8. The shingles of a text are its parts of
  SHINGLE characters; a shorter text is its only one.

The answers are exact, though a text is compared with few of those held. Those that share words in a row with it are
found by hash. Those with similar sets are found by prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007,
https://doi.org/10.1145/1242572.1242591). All shingles have one order, and of each set only the first quarter is looked
up, its *prefix*; rare shingles come first, so the common words of a template lead to no one. Sets of a and b members
are near each other when they share more than 4/9 (a + b). Of the set whose prefix ends first in the order, what is
shared is in both prefixes or among its other three quarters, so the prefixes share more than 4/9 (a + b) - 3/4 c, c the
larger of a and b. Sets whose prefixes share fewer are passed over.

Equal hashes only add texts to compare, and how rare a shingle is decides about time alone, so no answer depends on
Python's hashes, which differ from one process to the next.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from distill.data.documents import normalise_prompt

WORDS = 13
SHINGLE = 5
REORDERED_AT = (1 << 10, 1 << 14)  # texts: those tell what is rare among more, and all are looked at once again
RECENT = 1 << 16  # entries of an index


class Parts:
    """A text taken apart, to be compared with others. text: normalised; hashes: of the shingles, uint32, as is all by
    which it is looked up: odd hashes of `words` in a row, and even ones of a few shingles."""

    def __init__(self, text: str) -> None:
        self.text = normalise_prompt(text)
        self.runs, self.shingles = _runs(self.text), _shingles(self.text)
        self.hashes, self.words = _hashes(self.shingles), _hashes(self.runs) | 1

    def is_near(self, other: str) -> bool:
        """Whether it is near another text, which is normalised."""
        return not self.runs.isdisjoint(_runs(other)) or _alike(self.shingles, _shingles(other))


class NearDuplicates:
    """Texts, and which of them another text is near.

    Beside itself a text takes 8 bytes a word and 2 bytes a character. 200,000 prompts of 200 to 250 characters, each
    compared with all before it, took 62 to 72 s of one shared core, 50,000 took 14 to 16 s.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        """texts: are all held, whether near each other or not."""
        self._texts: list[bytes] = []  # normalised, UTF-8
        self._sizes = array("I")  # shingles of each
        self._index, self._rarity = _Index(), _Rarity()
        for text in map(Parts, texts):
            self._hold(text, self._keys(text))

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: Parts) -> str | None:
        """The first text held that this one is near, normalised."""
        known = 5 * self._rarity.known(text.hashes) > 4 * len(text.shingles)  # else no set is like this one
        return self._find(text, self._keys(text) if known else text.words)

    def add(self, text: Parts) -> str | None:
        """Hold a text unless one that it is near is held: the first of those is given back, normalised."""
        keys = self._keys(text)
        found = self._find(text, keys)
        if found is None:
            self._hold(text, keys)
        return found

    def forget(self, kept: int) -> None:
        """Hold only the first texts, so many of them."""
        if kept < len(self._texts):
            del self._texts[kept:], self._sizes[kept:]
            self._index.keep(lambda entries: entries & 0xFFFFFFFF < kept)

    def _keys(self, text: Parts) -> np.ndarray:
        return np.concatenate([text.words, self._rarity.prefix(text.hashes)])

    def _hold(self, text: Parts, keys: np.ndarray) -> None:
        self._index.add(keys, len(self._texts))
        self._rarity.count(text.hashes)
        self._texts.append(text.text.encode("utf-8", "surrogatepass"))
        self._sizes.append(len(text.shingles))
        if len(self._texts) in REORDERED_AT:
            self._reorder()

    def _reorder(self) -> None:
        self._rarity.reorder()
        self._index.keep(_are_of_words)
        for number in range(len(self._texts)):
            self._index.add(self._rarity.prefix(_hashes(_shingles(self._held(number)))), number)

    def _held(self, number: int) -> str:
        return self._texts[number].decode("utf-8", "surrogatepass")

    def _find(self, text: Parts, keys: np.ndarray) -> str | None:
        entries = self._index.find(keys)
        if not len(entries):
            return None
        numbers = entries.astype(np.uint32)
        perhaps = set(numbers[_are_of_words(entries)].tolist()) | self._perhaps_alike(len(text.shingles), numbers)
        return next((held for held in map(self._held, sorted(perhaps)) if text.is_near(held)), None)

    def _perhaps_alike(self, size: int, numbers: np.ndarray) -> set[int]:
        """The texts whose prefix shares enough with that of a set of so many shingles. numbers: a text's as often as it
        shares one."""
        # Whatever the size of the other, more than this must be shared, and few texts share as many.
        least = size // 20
        numbers.sort()
        often = numbers[least:][numbers[least:] == numbers[: -least or None]]
        alike = set()
        for number, more in Counter(often.tolist()).items():
            smaller, larger = sorted((size, self._sizes[number]))
            if 5 * smaller > 4 * larger and 9 * (least + more + 3 * larger // 4) > 4 * (larger + smaller):
                alike.add(number)
        return alike


def near(one: str, other: str) -> bool:
    """Whether two texts are near each other: the rule itself."""
    return Parts(one).is_near(normalise_prompt(other))


def _runs(text: str) -> set[tuple[str, ...]]:
    """All WORDS words in a row of a normalised text."""
    words = text.split(" ")
    return set(zip(*(words[i:] for i in range(WORDS)), strict=False))


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))}


def _alike(one: set[str], other: set[str]) -> bool:
    """Whether the Jaccard index is above 4/5: of a + b = shared + all, 9 shared > 4 (a + b)."""
    return 9 * len(one & other) > 4 * (len(one) + len(other))


def _are_of_words(entries: np.ndarray) -> np.ndarray:
    return entries & 1 << 32 != 0


def _hashes(members: set[str] | set[tuple[str, ...]]) -> np.ndarray:
    """uint32 [members]."""
    return np.fromiter(map(hash, members), np.int64, len(members)).astype(np.uint32)


class _Rarity:
    """The order of shingles: by the number of texts that have one, as far as was known at the last `reorder`, then by
    hash. Shingles are counted together where the first 20 bits of their hashes agree."""

    def __init__(self) -> None:
        self._counts, self._order = np.zeros(1 << 20, np.uint32), np.zeros(1 << 20, np.uint16)

    def count(self, hashes: np.ndarray) -> None:
        self._counts[hashes >> 12] += 1

    def reorder(self) -> None:
        self._order = np.minimum(self._counts, 0xFFFF).astype(np.uint16)

    def known(self, hashes: np.ndarray) -> int:
        """How many of them a text has, at most: those of a text that was forgotten still count."""
        return int(np.count_nonzero(self._counts[hashes >> 12]))

    def prefix(self, hashes: np.ndarray) -> np.ndarray:
        """The first quarter of them, rounded up, as keys."""
        order = self._order[hashes >> 12].astype(np.uint64) << 32 | hashes
        order.sort()
        return order[: len(order) - 3 * len(order) // 4].astype(np.uint32) & 0xFFFFFFFE


class _Index:
    """Which texts have a key: entries, uint64, a key above a number of 32 bits. New ones stand in a dict; RECENT of
    them together become a sorted array, and one that has grown to a 16th of the one before it is merged with that.

    Keys are spread evenly. So beside each array stands where its *buckets* begin, the keys with the same first bits:
    in a long array a binary search costs more than all the rest.
    """

    def __init__(self) -> None:
        self._recent: dict[int, tuple[int, ...]] = {}  # numbers by key
        self._recent_size = 0
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # entries, and where the buckets begin and the last ends

    def add(self, keys: np.ndarray, number: int) -> None:
        for key in keys.tolist():
            self._recent[key] = (*self._recent.get(key, ()), number)
        self._recent_size += len(keys)
        if self._recent_size >= RECENT:
            self._sort_recent()

    def _sort_recent(self) -> None:
        entries = _entries(self._recent, self._recent)
        entries.sort()
        while self._parts and len(self._parts[-1][0]) <= 16 * len(entries):
            merged, _ = self._parts.pop()
            merged.resize(len(merged) + len(entries), refcheck=False)  # in place: the memory is not needed twice
            merged[-len(entries) :] = entries
            merged.sort(kind="stable")  # the kind that knows what is sorted already
            entries = merged
        self._parts.append((entries, _buckets(entries)))
        self._recent, self._recent_size = {}, 0

    def keep(self, wanted: Callable[[np.ndarray], np.ndarray]) -> None:
        """Only the entries of which a function, uint64 [n] -> bool [n], says so."""
        self._sort_recent()
        parts = [entries[wanted(entries)] for entries, _ in self._parts]
        self._parts = [(entries, _buckets(entries)) for entries in parts if len(entries)]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """All entries of these keys."""
        found = [_entries(self._recent, keys.tolist())]
        wanted = keys.astype(np.uint64)
        for entries, buckets in self._parts:
            bucket = wanted >> (33 - len(buckets).bit_length())
            starts = buckets[bucket]
            sizes = buckets[bucket + 1] - starts
            before = sizes.cumsum(dtype=np.uint32) - sizes
            places = np.arange(sizes.sum(), dtype=np.uint32) + (starts - before).repeat(sizes)
            nearby = entries[places]
            found.append(nearby[nearby >> 32 == wanted.repeat(sizes)])
        return np.concatenate(found)


def _entries(numbers: dict[int, tuple[int, ...]], keys: Iterable[int]) -> np.ndarray:
    return np.array([key << 32 | number for key in keys for number in numbers.get(key, ())], np.uint64)


def _buckets(entries: np.ndarray) -> np.ndarray:
    """uint32 [buckets + 1]. A bucket has 4 to 8 entries."""
    bits = max(len(entries).bit_length() - 3, 1)
    firsts = np.arange(1 << bits, dtype=np.uint64) << (64 - bits)
    return np.append(entries.searchsorted(firsts), len(entries)).astype(np.uint32)
