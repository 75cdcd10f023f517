"""Proposals of a model that are drawn, one token after another, as the teacher draws its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from decode.drafters import Proposal
from decode.sampling import Sampling, draw


class _OverVocabulary(Protocol):
    def over_vocabulary(self, p: np.ndarray) -> np.ndarray: ...


def sampled(
    step: Callable[[int | None], np.ndarray],
    k: int,
    model: _OverVocabulary,
    sampling: Sampling,
    rng: np.random.Generator,
    end_tokens: frozenset[int],
) -> Proposal:
    """Up to k tokens, none behind an end token, and their distributions.

    step: the logits behind a token that was drawn, float32 [1, head]; at first, behind the text (None).
    """
    drafted: list[int] = []
    distributions: list[np.ndarray] = []
    token = None
    while len(drafted) < k and token not in end_tokens:
        q = model.over_vocabulary(sampling.probabilities(step(token))[0])
        token = draw(q, rng)
        drafted.append(token)
        distributions.append(q)
    return Proposal(drafted, np.array(distributions))
