"""Choosing tokens: greedily, or by rejection sampling that keeps the teacher's distribution.

Speculative sampling after Leviathan et al. (arXiv:2211.17192) and Chen et al. (arXiv:2302.01318):
a draft token x is accepted with probability min(1, p(x) / q(x)); at the first rejection the
teacher's token is drawn from the residual max(p - q, 0), normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels import UserError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.temperature < float("inf")):
            raise UserError(f"--temperature {self.temperature}: must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k}: must be 0 (all) or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """The distribution that is sampled from. float32 [m, vocab] -> float64 [m, vocab]."""
        behind = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        with np.errstate(over="ignore"):  # at a temperature of almost 0, where only the highest are left
            scaled = behind / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            kth = -np.partition(-scaled, self.top_k - 1, axis=-1)[:, self.top_k - 1 : self.top_k]
            scaled = np.where(scaled < kth, -np.inf, scaled)
        p = np.exp(scaled)
        p /= p.sum(-1, keepdims=True)
        if self.top_p < 1:
            order = np.argsort(-p, axis=-1, kind="stable")
            ordered = np.take_along_axis(p, order, -1)
            # A token stays if the mass before it is below top_p, so at least one stays.
            ordered[np.cumsum(ordered, -1) - ordered >= self.top_p] = 0
            np.put_along_axis(p, order, ordered, -1)
            p /= p.sum(-1, keepdims=True)
        return p


def draw(p: np.ndarray, rng: np.random.Generator) -> int:
    """One token from a distribution, float64 [vocab]."""
    return int(min(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"), len(p) - 1))


def accept(drafted: list[int], q: np.ndarray | None, p: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Rejection sampling over one round.

    drafted: k tokens; q: the draft's distributions, float64 [k, vocab], None where each is its one token; p: the
    teacher's, float64 [k + 1, vocab]. Returns how many are accepted, and the teacher's own token that follows them.
    """
    for i, token in enumerate(drafted):
        if rng.random() * (1.0 if q is None else q[i, token]) >= p[i, token]:
            residual = np.where(np.arange(len(p[i])) == token, 0.0, p[i]) if q is None else np.maximum(p[i] - q[i], 0)
            # p == q leaves no residual; rounding can bring us here all the same.
            return i, draw(residual if residual.sum() > 0 else p[i], rng)
    return len(drafted), draw(p[len(drafted)], rng)
