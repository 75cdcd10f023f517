"""The rows of a collection, of whose tokens none are held: they are read from the reply dataset as they are needed."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np

from distill.data.packing import Row, Segment, cuts, place, row_of, segment
from distill.data.reply_dataset import Replies


class Rows:
    """The examples of a reply dataset, cut into segments, shuffled by a seed and packed into rows.

    16 bytes a segment and a bit a token are held. Every file is read, and its hash checked, before the first row.
    """

    def __init__(self, replies: Replies, seq_len: int, seed: int) -> None:
        self._replies, self._seq_len = replies, seq_len
        self._trained: list[np.ndarray] = []  # of each file: a bit a token
        found, sizes = array("I"), array("I")
        for file in range(len(replies.shards)):
            examples, start = replies.read(file), 0
            for example in examples:
                for part in cuts(segment(example.tokens, example.trained).mask, seq_len):
                    found.extend((file, start, len(example.tokens), part.start))
                    sizes.append(part.stop - part.start)
                start += len(example.tokens)
            self._trained.append(np.packbits(np.concatenate([np.zeros(0, bool), *(e.trained for e in examples)])))
        shuffled, of_row = np.random.default_rng(seed).permutation(len(sizes)), np.frombuffer(sizes, np.uint32)
        packed, ends = array("I"), array("I", [0])
        for row in place(map(int, of_row[shuffled]), seq_len):
            packed.extend(row)
            ends.append(len(packed))
        order = shuffled[np.frombuffer(packed, np.uint32)]
        self._ends = np.frombuffer(ends, np.uint32)
        # In the order of the rows: the file, where the example begins in it and how long it is, where the segment
        # begins in the example.
        self._segments = np.frombuffer(found, np.uint32).reshape(-1, 4)[order]
        self.sizes = np.add.reduceat(of_row[order], self._ends[:-1]) if len(order) else of_row  # of rows, in tokens

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, which: slice) -> list[Row]:
        """Some of them. UserError where a file of the replies cannot be read any more."""
        return [
            row_of([self._segment(*place) for place in self._segments[start:end].tolist()], self._seq_len)
            for start, end in zip(self._ends[:-1][which], self._ends[1:][which], strict=True)
        ]

    def __iter__(self) -> Iterator[Row]:
        return (row for at in range(len(self)) for row in self[at : at + 1])

    def _segment(self, file: int, start: int, length: int, begin: int) -> Segment:
        bits = np.unpackbits(self._trained[file][start // 8 : (start + length + 7) // 8])[start % 8 :][:length]
        whole = segment(self._replies.tokens_at(file, start, length), bits.view(bool))
        part = slice(begin, begin + self._seq_len)
        return Segment(whole.tokens[part], whole.mask[part])
