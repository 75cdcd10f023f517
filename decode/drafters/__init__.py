"""What proposes tokens for the teacher to verify: the protocol that every kind of drafter keeps.

The engine knows nothing else of drafts. A drafter may be a model of its own (`model`), a lookup in the text (`ngram`),
a reader of the teacher's hidden states, or one that proposes a whole block in one pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

# The teacher's states by layer: float32 [rows, hidden], what leaves that layer, a row a position.
Hidden = Mapping[int, mx.array]


@dataclass(frozen=True)
class Proposal:
    """Tokens proposed behind a text.

    tokens: none or more, as ids or as uint32 [n] that may still be being computed. q: the distributions that they were
    drawn from, float64 [n, vocab]; None where each was chosen without chance, a distribution of that one token.
    """

    tokens: list[int] | mx.array
    q: np.ndarray | None = None


class Drafter(Protocol):
    """Proposes tokens of one reply. The engine calls `start` once, then `propose` and `accept` in turn, round by round;
    a round in which nothing could be accepted (the reply's last token, the end of `context`) asks for no proposal, and
    is accepted all the same."""

    @property
    def context(self) -> int:
        """The longest text, its own proposals included, that it can work on."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """The teacher's layers, from 0, whose hidden states it reads."""
        ...

    def start(self, prompt: list[int], hidden: Hidden) -> None:
        """Begin behind `prompt`. hidden: of its tokens but the last, whose state comes with the first `accept`."""
        ...

    def propose(self, sequence: list[int], k: int) -> Proposal:
        """Up to k tokens (k at least 1), perhaps none, that may follow `sequence`: the prompt and what was emitted."""
        ...

    def accept(self, sequence: list[int], accepted: int, hidden: Hidden) -> None:
        """Of the round's proposals behind `sequence` so many were accepted; a token of the teacher's own follows.

        hidden: of the last token of `sequence` and of the accepted proposals, [accepted + 1, hidden] each.
        """
        ...
