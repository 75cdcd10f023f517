"""Plain decoding and draft-then-verify decoding. Knows token ids only.

A round of draft-then-verify: the drafter proposes up to k tokens; the teacher computes the last token and all proposals
in one pass over its weights; the longest prefix that it agrees with is emitted, and one token of its own. The teacher's
rows have the same bits alone or together, so greedy output never depends on the drafter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from decode.drafters import Drafter, Proposal
from decode.metrics import Round
from decode.models.cache import KVCache
from decode.models.transformer import Transformer
from decode.sampling import Sampling, accept
from decode.timing import ComputedAt


@dataclass(frozen=True)
class Request:
    """What is asked for: a reply to `prompt` (at least one id).

    It ends behind an end token, with max_tokens tokens, or where the teacher's context ends.
    """

    prompt: list[int]
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


def generate(teacher: Transformer, request: Request, drafter: Drafter | None = None, k: int = 0) -> Iterator[Round]:
    """Compute the prompt, now, and return the rounds of the reply, each computed when it is asked for.

    k: most proposals a round. Without a drafter a round is one step of plain decoding. Raises ValueError for a drafter
    that reads states where they come with other bits than plain decoding has (kernels.ops.FusedStep).
    """
    prompt = request.prompt
    room = min(request.max_tokens, teacher.context - len(prompt))
    cache = teacher.new_cache()
    fused = teacher.fused_step
    if drafter and drafter.taps and fused and not (fused.TAPS or fused.EXACT):
        raise ValueError("this backend's fused step hands out no states, and has other bits than the steps that do")
    hidden = teacher.prefill(prompt[:-1], cache, drafter.taps if drafter else ())
    if drafter is None:
        return plain(teacher, cache, request, room)
    drafter.start(prompt, hidden)
    return speculative(teacher, cache, request, room, drafter, k)


def plain(teacher: Transformer, cache: KVCache, request: Request, room: int) -> Iterator[Round]:
    """A token a step, at most `room`, behind a cache that holds all of the prompt but its last token.

    Where the device works asynchronously, a greedy step is queued before the token that it reads is known here.
    """
    rng = np.random.default_rng([request.seed, 0])
    greedy = request.sampling.greedy
    last: list[int] | mx.array = request.prompt[-1:]
    queued: mx.array | None = None
    while room > 0:
        if greedy:
            own = _next_token(teacher, last, cache) if queued is None else queued
            queued = None
            if teacher.async_decode and room > 1:
                queued = _next_token(teacher, own, cache)
                mx.async_eval(queued)
            tokens = np.array(own).tolist()
        else:
            p = request.sampling.probabilities(np.array(teacher.step(last, cache).logits))
            tokens = [accept([], None, p, rng)[1]]
        last, room = tokens, room - 1
        yield Round(tokens)
        if tokens[0] in request.end_tokens:
            return


def _next_token(teacher: Transformer, last: list[int] | mx.array, cache: KVCache) -> mx.array:
    """The teacher's choice behind one token, uint32 [1], not evaluated."""
    return teacher.best_tokens(teacher.step(last, cache).logits)


def speculative(
    teacher: Transformer, cache: KVCache, request: Request, room: int, drafter: Drafter, k: int
) -> Iterator[Round]:
    """Rounds of at most k proposals, together at most `room` tokens, behind a cache as for `plain`."""
    rng = np.random.default_rng([request.seed, 0])
    sequence = list(request.prompt)
    k = min(k, drafter.context - 1)
    while room > 0:
        wanted = min(k, room - 1)  # the last token of all is always the teacher's own
        fits = wanted > 0 and len(sequence) + wanted <= drafter.context
        proposal = drafter.propose(sequence, wanted) if fits else Proposal([])
        computed = ComputedAt(teacher.ops, proposal.tokens) if len(proposal.tokens) else None
        # Queued before the proposals are known here, so that the device need not wait for that.
        feed = mx.concatenate([mx.array(sequence[-1:], mx.uint32), mx.array(proposal.tokens, mx.uint32)])
        output = teacher.step(feed, cache, drafter.taps)
        own = teacher.best_tokens(output.logits) if request.sampling.greedy else output.logits
        mx.async_eval(own)
        if computed is not None:
            computed.before(own)
        drafted = upto_end(np.array(proposal.tokens, np.int64).tolist(), request.end_tokens)
        if request.sampling.greedy:
            choices = np.array(own).tolist()
            accepted = next((i for i, token in enumerate(drafted) if token != choices[i]), len(drafted))
            chosen = choices[accepted]
        else:
            p = request.sampling.probabilities(np.array(own[: len(drafted) + 1]))
            accepted, chosen = accept(drafted, proposal.q, p, rng)
        tokens = upto_end([*drafted[:accepted], chosen], request.end_tokens)
        ended = tokens[-1] in request.end_tokens
        accepted = min(accepted, len(tokens))
        cache.offset = len(sequence) + accepted
        drafter.accept(sequence, accepted, {i: rows[: accepted + 1] for i, rows in output.hidden.items()})
        sequence += tokens
        room -= len(tokens)
        yield Round(tokens, min(len(drafted), len(tokens)) if ended else len(drafted), accepted, computed)
        if ended:
            return


def upto_end(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """The tokens without those behind an end token."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), None)]


def logit_margin(teacher: Transformer, prompt: list[int], tokens: list[int]) -> float:
    """Gap between the two highest logits behind prompt + tokens: how close a choice was."""
    sequence = prompt + tokens
    cache = teacher.new_cache()
    teacher.prefill(prompt[:-1], cache)
    top = np.sort(np.array(teacher.step(sequence[len(prompt) - 1 :], cache).logits[-1]))
    return float(top[-1] - top[-2])
