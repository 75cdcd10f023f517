"""A draft model of its own, with a cache of its own, proposing one token after another."""

from __future__ import annotations

import numpy as np

from decode.drafters import Hidden, Proposal
from decode.drafters.sampling import sampled
from decode.models.transformer import Transformer
from decode.sampling import Sampling
from kernels.ops import SMALL_ROWS


class ModelDrafter:
    """Drafts with a model that has the teacher's tokens, greedily or by sampling as the teacher does."""

    taps: tuple[int, ...] = ()

    def __init__(
        self,
        model: Transformer,
        sampling: Sampling | None = None,
        end_tokens: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> None:
        self.model = model
        self.sampling = sampling or Sampling()
        self.end_tokens = end_tokens
        self.seed = seed

    @property
    def context(self) -> int:
        return self.model.context

    def start(self, prompt: list[int], hidden: Hidden) -> None:
        self.cache = self.model.new_cache()
        self.rng = np.random.default_rng([self.seed, 1])
        self.model.prefill(prompt[:-1], self.cache)

    def propose(self, sequence: list[int], k: int) -> Proposal:
        """Greedily k tokens, still being computed, some of them perhaps behind an end token; sampling, up to k and none
        behind one."""
        unseen = sequence[self.cache.offset :]
        if len(unseen) > SMALL_ROWS:  # it was not asked for a while
            self.model.prefill(unseen[:-1], self.cache)
            unseen = unseen[-1:]
        if self.sampling.greedy:
            return Proposal(self.model.greedy_tokens(unseen, self.cache, k))

        def step(token: int | None) -> np.ndarray:
            return np.array(self.model.step(unseen if token is None else [token], self.cache).logits[-1:])

        return sampled(step, k, self.model, self.sampling, self.rng, self.end_tokens)

    def accept(self, sequence: list[int], accepted: int, hidden: Hidden) -> None:
        """Drop the rejected proposals from the cache."""
        self.cache.offset = min(self.cache.offset, len(sequence) + accepted)
