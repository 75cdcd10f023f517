"""The figures of a run, under the names that docs/commands.md explains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from decode.timing import ComputedAt

VERSION = 2  # of what the figures mean: those of other versions are not compared with ours
SHORT = 16  # tokens: what is shorter may well be said three times over, as in a refrain


@dataclass(frozen=True)
class Round:
    """What one pass of the teacher emitted: proposals that it accepted, then a token of its own; none behind an end.

    drafted: proposals that could have been emitted, so none behind an end token; accepted: of these. computed: when the
    proposals had been computed, where there were any.
    """

    tokens: list[int]
    drafted: int = 0
    accepted: int = 0
    computed: ComputedAt | None = None


@dataclass
class Metrics:
    """Counts and times (seconds of wall clock) over rounds, of one output or of many.

    rounds: those in which something was drafted; others say nothing of a draft. show_seconds: between rounds, while
    their text was decoded and printed: a user waits for that too, and the device may work meanwhile.
    """

    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    show_seconds: float = 0.0

    def add(self, found: Round, began: float, done: float) -> None:
        """Count a round. began, done: when it was asked for and when it came, as its `computed` has time."""
        self.tokens += len(found.tokens)
        self.rounds += found.drafted > 0
        self.drafted += found.drafted
        self.accepted += found.accepted
        self.accepted_at += [0] * (found.drafted - len(self.accepted_at))
        for i in range(found.accepted):
            self.accepted_at[i] += 1
        proposed = began if found.computed is None else found.computed.seconds
        self.draft_seconds += proposed - began
        self.verify_seconds += done - proposed

    def merge(self, other: Metrics) -> None:
        for name in (
            "tokens",
            "rounds",
            "drafted",
            "accepted",
            "prefill_seconds",
            "draft_seconds",
            "verify_seconds",
            "show_seconds",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted_at += [0] * (len(other.accepted_at) - len(self.accepted_at))
        for i, count in enumerate(other.accepted_at):
            self.accepted_at[i] += count

    @classmethod
    def of(cls, parts: Iterable[Metrics]) -> Metrics:
        """Many as one."""
        total = cls()
        for part in parts:
            total.merge(part)
        return total

    def speedup(self, plain: Metrics) -> float:
        """Over plain decoding of the same prompts."""
        return self.tok_per_s / plain.tok_per_s if plain.tok_per_s else 0.0

    @property
    def decode_seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds + self.show_seconds

    @property
    def tok_per_s(self) -> float:
        """Emitted tokens a second of decoding; the prefill is not counted."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def acceptance_rate(self) -> float | None:
        """None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_acceptance_length(self) -> float | None:
        """None where nothing was drafted."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def acceptance_per_position(self) -> list[float]:
        return [count / self.rounds for count in self.accepted_at]

    def times(self) -> dict[str, float]:
        return {
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "draft_seconds": self.draft_seconds,
            "verify_seconds": self.verify_seconds,
        }

    def acceptance(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "mean_acceptance_length": self.mean_acceptance_length,
            "acceptance_per_position": self.acceptance_per_position,
        }


def in_words(rate: float | None, digits: int = 3) -> str:
    """A rate as text: that of nothing is none, and not zero."""
    return "none" if rate is None else f"{rate:.{digits}f}"


def is_looping(tokens: list[int], longest: int | None = None) -> bool:
    """Whether a reply ends in one n-gram said over and over: 4 times, or 3 times where n is above SHORT.

    longest: the largest n looked for; None is any, so up to a third of the reply.
    """
    most = len(tokens) // 3 if longest is None else longest
    for n in range(1, most + 1):
        span = n * (4 if n <= SHORT else 3)
        if span > len(tokens):
            if n > SHORT:
                return False
        elif tokens[-1] == tokens[-1 - n] and tokens[-span:-n] == tokens[n - span :]:
            return True
    return False
