"""Lookup in the text itself: what followed the last few tokens when they stood there before is likely to follow again.

Known as prompt lookup or n-gram decoding; it needs no model, and pays where a reply repeats its prompt.
"""

from __future__ import annotations

from decode.drafters import Hidden, Proposal

LONGEST, SHORTEST = 8, 2  # tokens of a suffix that is looked for


class NgramDrafter:
    """Proposes what stands behind the latest earlier place of the text's longest suffix that is there twice."""

    context = 1 << 30
    taps: tuple[int, ...] = ()

    def start(self, prompt: list[int], hidden: Hidden) -> None:
        pass

    def propose(self, sequence: list[int], k: int) -> Proposal:
        for n in range(min(LONGEST, len(sequence) - 1), SHORTEST - 1, -1):
            suffix = sequence[-n:]
            for at in range(len(sequence) - n - 1, -1, -1):
                if sequence[at : at + n] == suffix:
                    return Proposal(sequence[at + n : at + n + k])
        return Proposal([])

    def accept(self, sequence: list[int], accepted: int, hidden: Hidden) -> None:
        pass
