"""Lookup in the text proposes what stood behind the same tokens before."""

from __future__ import annotations

import pytest

from decode.drafters.ngram import LONGEST, NgramDrafter


@pytest.mark.parametrize(
    ("sequence", "k", "proposed"),
    [
        ([1, 2, 3, 4, 1, 2], 3, [3, 4, 1]),
        ([1, 2, 3, 4, 1, 2], 1, [3]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, [8, 1]),  # the latest place
        ([5, 1, 2, 9, 6, 1, 2, 8, 5, 1, 2], 1, [9]),  # but rather the longer suffix
        ([1, 2, 3], 3, []),
        ([1, 2, 1], 3, []),  # one token alone says too little
        ([7, 7, 7], 4, [7]),
        ([7, 7, 7, 7], 1, [7]),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_proposals(sequence: list[int], k: int, proposed: list[int]) -> None:
    proposal = NgramDrafter().propose(sequence, k)
    assert proposal.tokens == proposed and proposal.q is None


def test_suffixes_are_looked_for_up_to_a_length() -> None:
    suffix = list(range(1, LONGEST + 1))
    sequence = [0, *suffix, 50, 99, *suffix, 60, 0, *suffix]  # beyond LONGEST tokens the later place counts
    assert NgramDrafter().propose(sequence, 1).tokens == [60]
