"""A draft that reads the teacher's hidden states (decode.models.reader), with a cache of its own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from decode.drafters import Hidden, Proposal
from decode.drafters.sampling import sampled
from decode.models.reader import Reader
from decode.sampling import Sampling
from kernels.ops import SMALL_ROWS


class ReaderDrafter:
    """Drafts behind what the teacher thought of the text so far.

    Row t of the draft stands for position t and needs the token behind it; so of a text the last row that can be there
    is that of the last token but one, whose state came with the round before. Rows of proposals are made of the draft's
    own states, and give way to those of the teacher's.
    """

    def __init__(
        self,
        reader: Reader,
        sampling: Sampling | None = None,
        end_tokens: frozenset[int] = frozenset(),
        seed: int = 0,
    ) -> None:
        self.loaded, self.sampling = reader, sampling or Sampling()
        self.end_tokens, self.seed = end_tokens, seed
        self.context, self.taps = reader.context, reader.taps

    def start(self, prompt: list[int], hidden: Hidden) -> None:
        self.reader = self.loaded.for_text(prompt)
        self.cache = self.reader.new_cache()
        self.rng = np.random.default_rng([self.seed, 1])
        self.unread = [hidden]  # the teacher's states of the positions behind the cache

    def propose(self, sequence: list[int], k: int) -> Proposal:
        """Greedily k tokens, still being computed, some of them perhaps behind an end token; sampling, up to k and none
        behind one. None behind a text of one token, of which no state is known."""
        tokens = sequence[self.cache.offset + 1 :]
        if not tokens:
            return Proposal([])
        hidden, self.unread = self._unread(), []
        if len(tokens) > SMALL_ROWS:
            before = {tap: rows[:-1] for tap, rows in hidden.items()}
            self.reader.prefill(mx.array(tokens[:-1], mx.uint32), before, self.cache)
            tokens, hidden = tokens[-1:], {tap: rows[-1:] for tap, rows in hidden.items()}
        if self.sampling.greedy:
            proposal = self.reader.greedy_tokens(tokens, hidden, self.cache, k)
            mx.async_eval(proposal)
            return Proposal(proposal)
        states = self.reader.fuse(hidden)

        def step(token: int | None) -> np.ndarray:
            nonlocal states
            fed = mx.array(tokens if token is None else [token], mx.uint32)
            states = self.reader.forward(fed, states, self.cache)[-1:]
            return np.array(self.reader.logits(states))

        return sampled(step, k, self.reader, self.sampling, self.rng, self.end_tokens)

    def _unread(self) -> Hidden:
        """Mostly those of one round."""
        if len(self.unread) == 1:
            return self.unread[0]
        return {tap: mx.concatenate([hidden[tap] for hidden in self.unread]) for tap in self.taps}

    def accept(self, sequence: list[int], accepted: int, hidden: Hidden) -> None:
        """Drop the rows of proposals, and keep what the teacher thought in the places of those accepted."""
        self.cache.offset = min(self.cache.offset, len(sequence) - 1)
        self.unread.append(hidden)
