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

from decode.models.cache import KVCache
from decode.models.transformer import Transformer
from decode.sampling import Sampling, accept, draw


@dataclass(frozen=True)
class Round:
    """What one verification emitted; times in seconds of wall clock.

    drafted counts only proposals that could have been emitted: none behind an end token, none
    past the limit. draft_seconds end when the proposals are computed; a greedy verification is queued by then.
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

    def propose(self, sequence: list[int], k: int) -> mx.array:
        """The k tokens that follow greedily, uint32, still being computed: some of them may be behind an end token."""
        return self.model.greedy_tokens(sequence[self.cache.offset :], self.cache, k)

    def sample(self, sequence: list[int], k: int) -> tuple[list[int], np.ndarray]:
        """Up to k tokens, none behind an end token, and the distributions that they were drawn from, [k, vocab]."""
        feed = sequence[self.cache.offset :]
        drafted: list[int] = []
        distributions: list[np.ndarray] = []
        while len(drafted) < k:
            logits = np.array(self.model.step(feed, self.cache).logits[-1:])
            q = self.model.over_vocabulary(self.sampling.probabilities(logits)[0])
            token = draw(q, self.rng)
            drafted.append(token)
            distributions.append(q)
            feed = [token]
            if token in self.end_tokens:
                break
        return drafted, np.array(distributions)

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
    queues = drafter is None and sampling.greedy and teacher.async_decode
    queued: mx.array | None = None

    while room > 0:
        began = proposed = time.perf_counter()
        drafted: list[int] = []
        # The last token of all is always the teacher's own, so a proposal for it would be wasted.
        wanted = min(k, room - 1)
        fits = drafter is not None and wanted > 0 and len(sequence) + wanted <= drafter.model.context
        proposer = drafter if fits else None
        if not sampling.greedy:
            q = np.empty(0)
            if proposer is not None:
                drafted, q = proposer.sample(sequence, wanted)
                proposed = time.perf_counter()
            logits = np.array(teacher.step([sequence[-1], *drafted], cache).logits)
            accepted, chosen = accept(drafted, q, sampling.probabilities(logits), rng)
            emitted = [*drafted[:accepted], chosen]
        elif proposer is not None:
            proposals, own, proposed = _propose_and_verify(teacher, proposer, sequence, wanted, cache)
            drafted = _upto_end(proposals, end_tokens)
            accepted = next((i for i, drawn in enumerate(drafted) if drawn != own[i]), len(drafted))
            emitted = [*drafted[:accepted], own[accepted]]
        else:
            token = queued
            if token is None:
                cache.reserve(2)  # both steps' rows, as a drafter's
                token = teacher.best_tokens(teacher.step(sequence[-1:], cache).logits)
            queued = None
            if queues and room > 1:
                queued = teacher.best_tokens(teacher.step(token, cache).logits)
                mx.async_eval(queued)
            accepted, emitted = 0, np.array(token).tolist()
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


def _propose_and_verify(
    teacher: Transformer, drafter: ModelDrafter, sequence: list[int], k: int, cache: KVCache
) -> tuple[list[int], list[int], float]:
    """k proposals, the teacher's k + 1 choices, and when (`time.perf_counter`) the proposals had been computed.

    Verification is queued before the host knows the proposals, so that the device need not wait for it.
    """
    proposals = drafter.propose(sequence, k)
    clock = teacher.ops.clock(proposals)
    mx.async_eval(proposals if clock is None else clock)
    feed = mx.concatenate([mx.array(sequence[-1:], mx.uint32), proposals])
    own = teacher.best_tokens(teacher.step(feed, cache).logits)
    mx.async_eval(own)
    if clock is None:
        mx.eval(proposals)
        proposed = time.perf_counter()
    else:  # a host without an idle core would learn of the proposals late
        mx.eval(own)
        proposed = 1e-9 * int(np.array(clock))
    return np.array(proposals).tolist(), np.array(own).tolist(), proposed


def _upto_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """The tokens without those behind an end token."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), None)]


def margin_at(teacher: Transformer, prompt: list[int], tokens: list[int]) -> float:
    """Gap between the two highest logits after prompt + tokens: how close a choice was."""
    sequence = prompt + tokens
    cache = teacher.new_cache()
    teacher.prefill(prompt[:-1], cache)
    top = np.sort(np.array(teacher.step(sequence[len(prompt) - 1 :], cache).logits[-1]))
    return float(top[-1] - top[-2])
