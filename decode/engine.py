"""Draft-then-verify generation. Knows token ids only; one loop serves plain and speculative.

A round: the drafter proposes up to k tokens; the teacher computes the last token and all
proposals in one pass over its weights; the longest prefix it agrees with is emitted, and one token
of its own. Without a drafter a round is one step of plain decoding. The teacher's rows have the
same bits alone or together, so greedy output never depends on the drafter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from decode.model import Transformer
from decode.sampling import Sampling, accept, draw, greedy_tokens


@dataclass(frozen=True)
class Round:
    """What one verification emitted; times in seconds of wall clock.

    drafted counts only proposals that could have been emitted: none behind an end token, none
    past the limit. draft_seconds end when the proposals are known; on a GPU the verification is queued by then.
    """

    tokens: list[int]
    drafted: int
    accepted: int
    draft_seconds: float
    verify_seconds: float
    prefill_seconds: float = 0.0  # of the whole prompt; in the first round only


class ModelDrafter:
    """A draft model with a cache of its own, proposing one token after another."""

    def __init__(self, model: Transformer, sampling: Sampling, end_tokens: frozenset[int], seed: int) -> None:
        self.model = model
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.seed = seed

    def start(self, prompt: list[int]) -> None:
        self.cache = self.model.new_cache()
        self.rng = np.random.default_rng([self.seed, 1])
        self.model.prefill(prompt[:-1], self.cache)

    def propose(self, sequence: list[int], k: int) -> tuple[list[int] | mx.array, np.ndarray]:
        """Up to k tokens, none behind an end token; where they are sampled, with their distributions [k, vocab].

        Where steps are queued, k tokens as an array, uint32, that is not evaluated: then some may be behind an end.
        """
        if self.sampling.greedy and self.model.queues:
            return self._queued(sequence, k), np.empty(0)
        feed = sequence[self.cache.offset :]
        drafted: list[int] = []
        distributions: list[np.ndarray] = []
        while len(drafted) < k:
            logits = self.model.step(feed, self.cache)[-1:]
            if self.sampling.greedy:
                token = self.model.token_of(greedy_tokens(logits)[0])
            else:
                q = self.model.over_vocabulary(self.sampling.probabilities(np.array(logits))[0])
                token = draw(q, self.rng)
                distributions.append(q)
            drafted.append(token)
            feed = [token]
            if token in self.end_tokens:
                break
        return drafted, np.array(distributions)

    def _queued(self, sequence: list[int], k: int) -> mx.array:
        feed: list[int] | mx.array = sequence[self.cache.offset :]
        # A cache that grew between two steps would be copied without waiting for the first to write to it.
        self.cache.reserve(len(feed) + k)
        tokens: list[mx.array] = []
        for _ in range(k):
            feed = self.model.best_tokens(self.model.step(feed, self.cache)[-1:])
            tokens.append(feed)
        return mx.concatenate(tokens)

    def confirm(self, sequence: list[int], accepted: int) -> None:
        """Drop rejected proposals: `sequence` is the text before them, of which `accepted` stay."""
        self.cache.offset = min(self.cache.offset, len(sequence) + accepted)


def generate(
    teacher: Transformer,
    prompt: list[int],
    *,
    max_tokens: int,
    end_tokens: frozenset[int],
    drafter: ModelDrafter | None = None,
    k: int = 0,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[Round]:
    """Generate after `prompt` (at least one id), a round at a time.

    Stops behind an end token, at max_tokens, or where the teacher's context ends.
    """
    sampling = sampling or Sampling()
    rng = np.random.default_rng([seed, 0])
    started = time.perf_counter()
    cache = teacher.new_cache()
    teacher.prefill(prompt[:-1], cache)
    if drafter is not None:
        drafter.start(prompt)
        k = min(k, drafter.model.context - 1)
    sequence = list(prompt)
    room = min(max_tokens, teacher.context - len(prompt))
    prefill_seconds = time.perf_counter() - started
    # Plain decoding's next token, where its step runs before the one before is known.
    queues = drafter is None and sampling.greedy and teacher.queues
    queued: mx.array | None = None

    while room > 0:
        began = time.perf_counter()
        drafted: list[int] = []
        q = np.empty(0)
        verified: mx.array | None = None
        # The last token of all is always the teacher's own, so a proposal for it would be wasted.
        wanted = min(k, room - 1)
        if drafter is not None and wanted > 0 and len(sequence) + wanted <= drafter.model.context:
            proposals, q = drafter.propose(sequence, wanted)
            if isinstance(proposals, mx.array):
                # Verification is queued before the proposals are known, so that the GPU need not wait for the host.
                mx.async_eval(proposals)
                feed = mx.concatenate([mx.array(sequence[-1:], mx.uint32), proposals])
                verified = teacher.best_tokens(teacher.step(feed, cache))
                mx.async_eval(verified)
                drafted = _upto_end(np.array(proposals).tolist(), end_tokens)
            else:
                drafted = proposals
        proposed = time.perf_counter()
        if queues:
            token = queued
            if token is None:
                cache.reserve(2)  # both steps' rows, as a drafter's
                token = teacher.best_tokens(teacher.step(sequence[-1:], cache))
            queued = None
            if room > 1:
                queued = teacher.best_tokens(teacher.step(token, cache))
                mx.async_eval(queued)
            accepted, emitted = 0, np.array(token).tolist()
        elif sampling.greedy:
            if verified is None:
                own = greedy_tokens(teacher.step([sequence[-1], *drafted], cache))
            else:
                own = np.array(verified).tolist()
            accepted = next((i for i, drawn in enumerate(drafted) if drawn != own[i]), len(drafted))
            emitted = [*drafted[:accepted], own[accepted]]
        else:
            logits = np.array(teacher.step([sequence[-1], *drafted], cache))
            accepted, chosen = accept(drafted, q, sampling.probabilities(logits), rng)
            emitted = [*drafted[:accepted], chosen]
        emitted = _upto_end(emitted, end_tokens)
        ended = emitted[-1] in end_tokens
        counted = min(len(drafted), len(emitted)) if ended else len(drafted)
        accepted = min(accepted, len(emitted))
        cache.offset = len(sequence) + len(emitted) - (queued is None)
        if drafter is not None:
            drafter.confirm(sequence, accepted)
        sequence += emitted
        room -= len(emitted)
        done = time.perf_counter()
        yield Round(emitted, counted, accepted, proposed - began, done - proposed, prefill_seconds)
        prefill_seconds = 0.0
        if ended:
            return


def _upto_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """The tokens without those behind an end token."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), None)]


def margin_at(teacher: Transformer, prompt: list[int], tokens: list[int]) -> float:
    """Gap between the two highest logits after prompt + tokens: how close a choice was."""
    sequence = prompt + tokens
    cache = teacher.new_cache()
    teacher.prefill(prompt[:-1], cache)
    top = np.sort(np.array(teacher.step(sequence[len(prompt) - 1 :], cache)[-1]))
    return float(top[-1] - top[-2])
