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
from collections.abc import Iterable

import numpy as np

from distill.data.documents import normalise_prompt

WORDS = 13
SHINGLE = 5


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
        self._reordered_at = 1024  # texts
        for text in texts:
            self._hold(self._apart(text))

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, text: str) -> str | None:
        """The first text held that this one is near, normalised."""
        return self._find(self._apart(text))

    def add(self, text: str) -> str | None:
        """Hold a text unless one that it is near is held: the first of those is given back, normalised."""
        new = self._apart(text)
        found = self._find(new)
        if found is None:
            self._hold(new)
        return found

    def forget(self, kept: int) -> None:
        """Hold only the first texts, so many of them."""
        del self._texts[kept:], self._sizes[kept:]
        self._index.forget(kept)

    def _apart(self, text: str) -> _Apart:
        return _Apart(normalise_prompt(text), self._rarity)

    def _hold(self, new: _Apart) -> None:
        self._index.add(new.keys, len(self._texts))
        self._rarity.count(new.hashes)
        self._texts.append(new.text.encode("utf-8", "surrogatepass"))
        self._sizes.append(len(new.shingles))
        if len(self._texts) >= self._reordered_at:
            self._reordered_at *= 16
            self._rarity.reorder()
            self._index = _Index()
            for number in range(len(self._texts)):
                self._index.add(_Apart(self._held(number), self._rarity).keys, number)

    def _held(self, number: int) -> str:
        return self._texts[number].decode("utf-8", "surrogatepass")

    def _find(self, new: _Apart) -> str | None:
        entries = self._index.find(new.keys)
        numbers, by_words = entries.astype(np.uint32), _is_of_words(entries)
        perhaps = [(number, True) for number in set(numbers[by_words].tolist())]
        perhaps += [(number, False) for number in self._perhaps_alike(len(new.shingles), numbers[~by_words])]
        for number, words in sorted(perhaps):
            held = self._held(number)
            if not new.runs.isdisjoint(_runs(held)) if words else _alike(new.shingles, _shingles(held)):
                return held
        return None

    def _perhaps_alike(self, size: int, numbers: np.ndarray) -> list[int]:
        """The texts whose prefix shares enough with that of a set of so many shingles. numbers: a text's as often as it
        shares one."""
        candidates, shared = np.unique(numbers, return_counts=True)
        sizes = np.asarray(self._sizes)[candidates]
        larger, smaller = np.maximum(sizes, size), np.minimum(sizes, size)
        enough = 9 * (shared + 3 * larger // 4) > 4 * (larger + smaller)
        alike: list[int] = candidates[enough & (5 * smaller > 4 * larger)].tolist()
        return alike


def near(one: str, other: str) -> bool:
    """Whether two texts are near each other: the rule itself."""
    one, other = normalise_prompt(one), normalise_prompt(other)
    return not _runs(one).isdisjoint(_runs(other)) or _alike(_shingles(one), _shingles(other))


def _runs(text: str) -> set[tuple[str, ...]]:
    """All WORDS words in a row of a normalised text."""
    words = text.split(" ")
    return set(zip(*(words[i:] for i in range(WORDS)), strict=False))


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(len(text) - SHINGLE + 1, 1))}


def _alike(one: set[str], other: set[str]) -> bool:
    """Whether the Jaccard index is above 4/5: of a + b = shared + all, 9 shared > 4 (a + b)."""
    return 9 * len(one & other) > 4 * (len(one) + len(other))


class _Apart:
    """A normalised text taken apart. hashes: of the shingles; keys, uint32 too: what it is looked up by, odd ones of
    words and even ones of shingles."""

    def __init__(self, text: str, rarity: _Rarity) -> None:
        self.text, self.runs, self.shingles = text, _runs(text), _shingles(text)
        self.hashes = _hashes(self.shingles)
        self.keys = np.concatenate([_hashes(self.runs) | 1, rarity.prefix(self.hashes) & 0xFFFFFFFE])


def _is_of_words(entries: np.ndarray) -> np.ndarray:
    return entries >> 32 & 1 == 1


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

    def prefix(self, hashes: np.ndarray) -> np.ndarray:
        """The first quarter of them, rounded up."""
        order = self._order[hashes >> 12].astype(np.uint64) << 32 | hashes
        order.sort()
        return order[: len(order) - 3 * len(order) // 4].astype(np.uint32)


class _Index:
    """Which texts have a key: a few sorted arrays of entries, uint64, a key above a number of 32 bits. New entries go
    to a short array, and one that has grown to a 16th of the one before it is merged with that.

    Keys are spread evenly. So beside each array stands where its *buckets* begin, the keys with the same first bits:
    in a long array a binary search costs more than all the rest.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []  # entries, and where the buckets begin and the last ends

    def add(self, keys: np.ndarray, number: int) -> None:
        entries = keys.astype(np.uint64) << 32 | number
        entries.sort()
        while self._parts and len(self._parts[-1][0]) <= max(16 * len(entries), 2048):
            merged, _ = self._parts.pop()
            merged.resize(len(merged) + len(entries), refcheck=False)  # in place: the memory is not needed twice
            merged[-len(entries) :] = entries
            merged.sort()
            entries = merged
        self._parts.append((entries, _buckets(entries)))

    def forget(self, kept: int) -> None:
        parts = [entries[entries & 0xFFFFFFFF < kept] for entries, _ in self._parts]
        self._parts = [(entries, _buckets(entries)) for entries in parts if len(entries)]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """All entries of these keys."""
        wanted = keys.astype(np.uint64)
        found, sought = [wanted[:0]], [wanted[:0]]
        for entries, buckets in self._parts:
            bucket = wanted >> (33 - len(buckets).bit_length())
            starts, ends = buckets[bucket], buckets[bucket + 1]
            found += [entries[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
            sought.append(wanted.repeat(ends - starts))
        nearby = np.concatenate(found)
        return nearby[nearby >> 32 == np.concatenate(sought)]


def _buckets(entries: np.ndarray) -> np.ndarray:
    """uint32 [buckets + 1]. A bucket has 16 to 32 entries."""
    bits = max(len(entries).bit_length() - 5, 1)
    firsts = np.arange(1 << bits, dtype=np.uint64) << (64 - bits)
    return np.append(entries.searchsorted(firsts), len(entries)).astype(np.uint32)
