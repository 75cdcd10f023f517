"""What a draft learns from: losses against the teacher's sparse distribution.

The teacher is known at k ids S and by its exact log-sum-exp (docs/how-it-works.md), so every loss
here is a function of k + 1 *buckets*: the k ids, and one for the whole rest of the vocabulary.
That gives two ways to compute the same numbers:

- `reference_loss`: log-softmax over the whole vocabulary, differentiated by MLX. Short and plain.
- `FusedHead`: head product, loss and gradient together, a chunk of positions at a time, so that
  the logits [positions, vocabulary] never exist whole. A loss's gradient with respect to the k + 1
  bucket logits (z_S, logsumexp of the rest) is all it needs: within the rest it spreads by the
  rest's own softmax. For the KL this is q_i - p_i in S and q_j - r q_j / q_tail outside.

Letters: n positions, h hidden size, v vocabulary of the head, k teacher ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.errors import UserError

BucketLoss = Callable[[mx.array, mx.array], mx.array]


def teacher_buckets(
    top_logprobs: mx.array, lse_one: mx.array, lse: mx.array, valid: mx.array, temperature: float = 1.0
) -> mx.array:
    """The teacher's probabilities: of each id in S, then of the tail.

    top_logprobs: float32 [n, k], logit - lse_one; lse_one, lse: float32 [n], log-sum-exp at
    temperature 1 and at `temperature`; valid: bool [n, k], ids that the draft's head has (others
    belong to the tail). Returns float32 [n, k + 1], rows summing to 1 but for rounding.
    """
    p = mx.exp((top_logprobs + lse_one[:, None]) / temperature - lse[:, None])
    p = mx.where(valid, p, 0.0)
    tail = mx.clip(1.0 - p.sum(axis=-1, keepdims=True), 0.0, 1.0)
    return mx.concatenate([p, tail], axis=-1)


def drawn_buckets(counts: mx.array, valid: mx.array) -> mx.array:
    """What draws say of the teacher's probabilities: the share of each id, and nothing for the tail.

    counts: int [n, k], how often each id was drawn; valid: bool [n, k], ids that the draft's head has. Draws of others
    count for no bucket: the draft learns the teacher's distribution over what its head has. So the expectation is that
    of each id's probability, and the KL's that over the head's whole vocabulary, but for a constant. Returns float32
    [n, k + 1].
    """
    draws = mx.maximum(counts.sum(axis=-1, keepdims=True), 1)  # padding has none
    p = mx.where(valid, counts / draws, 0.0)
    return mx.pad(p, [(0, 0), (0, 1)])


def kl(log_q: mx.array, p: mx.array) -> mx.array:
    """sum_S p (log p - log q) + r (log r - log q_tail), with 0 log 0 = 0.

    A lower bound of the KL over the whole vocabulary, tight when the tails have the same shape.
    log_q, p: float32 [n, k + 1]. Returns float32 [n], nats.
    """
    used = (p > 0) & (log_q > -mx.inf)
    safe_q, safe_p = mx.where(used, log_q, 0.0), mx.where(used, p, 1.0)
    return mx.where(used, safe_p * (mx.log(safe_p) - safe_q), 0.0).sum(axis=-1)


def ce(log_q: mx.array, p: mx.array) -> mx.array:
    """Cross-entropy to the teacher's first choice (bucket 0; the tail if the head lacks it, where q is 0)."""
    missing = log_q[:, 0] == -mx.inf
    return -mx.where(missing, log_q[:, -1], log_q[:, 0])


def tv(log_q: mx.array, p: mx.array) -> mx.array:
    """1 - sum min(p, q) over the buckets: total variation, the chance that speculative sampling
    rejects a token (Leviathan et al., arXiv:2211.17192, corollary 3.6)."""
    return 1.0 - mx.minimum(mx.exp(log_q), p).sum(axis=-1)


def reverse_kl(log_q: mx.array, p: mx.array) -> mx.array:
    """sum q (log q - log p) over the buckets: it seeks the teacher's modes (MiniLLM, arXiv:2306.08543). What
    the teacher gives no probability counts as LEAST_P."""
    q = mx.exp(log_q)
    safe_q = mx.where(q > 0, log_q, 0.0)
    return mx.where(q > 0, q * (safe_q - mx.log(mx.maximum(p, LEAST_P))), 0.0).sum(axis=-1)


def js(log_q: mx.array, p: mx.array) -> mx.array:
    """Jensen-Shannon divergence over the buckets: the mean of both KLs to the middle of p and q, at most log 2."""
    q = mx.exp(log_q)
    log_middle = mx.log(mx.maximum(0.5 * (p + q), 1e-30))
    from_p = mx.where(p > 0, p * (mx.log(mx.where(p > 0, p, 1.0)) - log_middle), 0.0)
    from_q = mx.where(q > 0, q * (mx.where(q > 0, log_q, 0.0) - log_middle), 0.0)
    return 0.5 * (from_p + from_q).sum(axis=-1)


LOSSES: dict[str, BucketLoss] = {"kl": kl, "ce": ce, "tv": tv, "reverse_kl": reverse_kl, "js": js}
LEAST_P = 1e-6  # of a bucket in the reverse KL
OF_DRAWS = ("kl", "ce")  # linear in p but for a constant, so that draws estimate them without bias


def parse_loss(text: str) -> dict[str, float]:
    """`kl`, or a mix such as `kl=1,tv=0.5`, as shares that sum to 1. UserError naming what is wrong."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if name not in LOSSES:
            raise UserError(f"--loss {text}: known are {', '.join(LOSSES)}, and mixes such as kl=1,tv=0.5")
        if name in found:
            raise UserError(f"--loss {text}: {name} is there twice")
        try:
            found[name] = float(number) if equals else 1.0
        except ValueError:
            raise UserError(f"--loss {text}: {number!r} is not a number") from None
        if not 0 <= found[name] < math.inf:
            raise UserError(f"--loss {text}: the weight of {name} must be a finite number of at least 0")
    total = sum(found.values())
    if not 0 < total < math.inf:
        raise UserError(f"--loss {text}: the weights must sum to a positive number")
    return {name: weight / total for name, weight in found.items() if weight}


def check_draws(loss: str, sampled: int | None) -> None:
    """UserError where a loss cannot be learnt from a dataset of so many draws a position; None: it has logits."""
    for name in parse_loss(loss) if sampled is not None else ():
        if name not in OF_DRAWS:
            raise UserError(
                f"--loss {loss}: cannot be learnt from draws (--sampled {sampled}), only {' and '.join(OF_DRAWS)} can"
            )


def bucket_loss(text: str) -> BucketLoss:
    """The loss called `text`, or the mix of some (`parse_loss`)."""
    shares = parse_loss(text)
    if len(shares) == 1:
        return LOSSES[next(iter(shares))]

    def mixed(log_q: mx.array, p: mx.array) -> mx.array:
        return sum((share * LOSSES[name](log_q, p) for name, share in shares.items()), start=mx.array(0.0))

    return mixed


def head_rows(d2t: np.ndarray | None, vocab_size: int) -> mx.array:
    """int32 [vocab_size]: the head's row of each token id, -1 for ids a trimmed head lacks.

    d2t: the ids that the head has rows for, ascending; None for all.
    """
    rows = np.full(vocab_size, -1, np.int32)
    ids = np.arange(vocab_size) if d2t is None else d2t
    rows[ids] = np.arange(len(ids))
    return mx.array(rows)


def tail_bucket_kl(
    logits: mx.array,
    top_ids: mx.array,
    top_logprobs: mx.array,
    lse_one: mx.array,
    lse: mx.array,
    mask: mx.array,
    temperature: float = 1.0,
    d2t: np.ndarray | None = None,
    vocab_size: int | None = None,
) -> mx.array:
    """The definition: mean over masked positions of the KL with a tail bucket.

    logits: float32 [n, v] of the draft (v = len(d2t) with a trimmed head); top_ids: int32 [n, k];
    top_logprobs, lse_one, lse: as for `teacher_buckets`; mask: bool [n]; vocab_size: the
    teacher's, where `d2t` is given. Returns a float32 scalar, nats a position.
    """
    rows = head_rows(d2t, vocab_size or logits.shape[-1])[top_ids]
    p = teacher_buckets(top_logprobs, lse_one, lse, rows >= 0, temperature)
    return reference_loss("kl", logits / temperature, rows, p, mask.astype(mx.float32))


def reference_loss(name: str, logits: mx.array, rows: mx.array, p: mx.array, weights: mx.array) -> mx.array:
    """Weighted mean of a loss, through a log-softmax over the head's whole vocabulary.

    logits: float32 [n, v], already divided by the temperature; rows: int32 [n, k], the head's row
    of each teacher id or -1; p: float32 [n, k + 1]; weights: float32 [n]. Returns a scalar.
    """
    log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    in_s = (mx.arange(logits.shape[-1]) == rows[:, :, None]).any(axis=1)
    # A masked log-sum-exp, never log(1 - sum q): that loses all digits as sum q nears 1.
    log_tail = mx.logsumexp(mx.where(in_s, -mx.inf, log_q), axis=-1, keepdims=True)
    chosen = mx.take_along_axis(log_q, mx.maximum(rows, 0), axis=-1)
    buckets = mx.concatenate([mx.where(rows >= 0, chosen, -mx.inf), log_tail], axis=-1)
    return (bucket_loss(name)(buckets, p) * weights).sum() / mx.maximum(weights.sum(), 1.0)


class FusedHead:
    """Head product, loss, its gradient and the metrics in one pass over chunks of positions.

    Calling it gives `(loss, stats)`, where loss is a differentiable scalar (with respect to hidden
    states and head weight only, or to hidden states alone where the head is frozen) and stats float32
    [3] holds sums over weighted positions: agreement (first choices equal), the lower bound
    sum_S min(p, q) of expected acceptance, and the positions themselves.

    eager: evaluate after each chunk, which is what keeps memory down on a CPU: MLX runs ahead of
    its own computation and would hold every chunk at once. Must be False under mx.compile.
    """

    def __init__(
        self,
        loss: str,
        temperature: float = 1.0,
        chunk_bytes: int = 32 << 20,
        eager: bool = False,
        frozen: bool = False,
    ) -> None:
        self.loss = bucket_loss(loss)
        self.temperature = temperature
        self.frozen = frozen
        self.chunk_bytes = chunk_bytes
        self.eager = eager

    def __call__(
        self, hidden: mx.array, weight: mx.array, rows: mx.array, p: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        """hidden: float [n, h]; weight: float [v, h], the same dtype; rows, p, weights: as for
        `reference_loss`. The gradient is computed along with the value: for evaluation use
        `evaluate`."""

        learnt = (hidden,) if self.frozen else (hidden, weight)

        def compute(hidden: mx.array, weight: mx.array = weight) -> tuple[mx.array, ...]:
            return self._run(hidden, weight, rows, p, weights, gradient=True)

        def vjp(
            primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
        ) -> tuple[mx.array, ...]:
            scale = cotangents[0]
            return tuple((scale * d).astype(x.dtype) for x, d in zip(learnt, outputs[2:], strict=True))

        run: Any = mx.custom_function(compute)
        run.vjp(vjp)
        loss, stats, *_ = run(*learnt)
        return loss, mx.stop_gradient(stats)

    def evaluate(
        self, hidden: mx.array, weight: mx.array, rows: mx.array, p: mx.array, weights: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The same value and stats without any gradient."""
        outputs = self._run(hidden, weight, rows, p, weights, gradient=False)
        return outputs[0], outputs[1]

    def _run(
        self,
        hidden: mx.array,
        weight: mx.array,
        rows: mx.array,
        p: mx.array,
        weights: mx.array,
        gradient: bool,
    ) -> tuple[mx.array, ...]:
        n = hidden.shape[0]
        chunk = max(64, self.chunk_bytes // (4 * weight.shape[0]))
        share = weights / mx.maximum(weights.sum(), 1.0)
        loss, stats = mx.array(0.0), mx.zeros(3)
        d_hidden: list[mx.array] = []
        d_weight: mx.array | None = None
        for start in range(0, n, chunk):
            part = slice(start, start + chunk)
            x = hidden[part]
            if d_hidden and not self.eager:
                (x,) = mx.depends([x], d_hidden[-1:] if d_weight is None else [d_weight])  # one by one, for memory
            value, measured, d_logits = self._chunk(x @ weight.T, rows[part], p[part], share[part], gradient)
            loss = loss + value
            stats = stats + (measured * (weights[part] > 0)[:, None]).sum(axis=0)
            if d_logits is not None:
                d_logits = d_logits.astype(weight.dtype)
                d_hidden.append(d_logits @ weight)
                if not self.frozen:
                    d = (d_logits.T @ x).astype(mx.float32)
                    d_weight = d if d_weight is None else d_weight + d
            if self.eager:
                mx.eval(loss, stats, d_hidden[-1:], *([] if d_weight is None else [d_weight]))
        outputs = [loss, stats]
        if d_hidden:
            outputs.append(mx.concatenate(d_hidden))
        if d_weight is not None:
            outputs.append(d_weight)
        return tuple(outputs)

    def _chunk(
        self, logits: mx.array, rows: mx.array, p: mx.array, share: mx.array, gradient: bool
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Loss (a scalar), measures float32 [m, 3] and the gradient by the logits [m, v]."""
        z = logits.astype(mx.float32) / self.temperature
        valid, at = rows >= 0, mx.maximum(rows, 0)
        line = mx.arange(z.shape[0])[:, None]
        z_s = mx.where(valid, mx.take_along_axis(z, at, axis=-1), -mx.inf)
        # Adding keeps several ids that the head lacks (all sent to row 0, adding 0) harmless.
        rest = z.at[line, at].add(mx.where(valid, -mx.inf, 0.0))
        z_tail = mx.logsumexp(rest, axis=-1, keepdims=True)
        buckets = mx.concatenate([z_s, z_tail], axis=-1)
        value, overlap, d = self._buckets(buckets, p, share, gradient)
        # Ties go to the lowest id, as in decoding; ids outside the head never agree.
        agree = (mx.argmax(z, axis=-1) == rows[:, 0]).astype(mx.float32)
        measured = mx.stack([agree, overlap, mx.ones_like(agree)], axis=-1)
        if d is None:
            return value, measured, None
        within_rest = mx.exp(rest - mx.where(z_tail > -mx.inf, z_tail, 0.0))
        d_logits = within_rest * d[:, -1:]
        return value, measured, d_logits.at[line, at].add(mx.where(valid, d[:, :-1], 0.0))

    def _buckets(
        self, buckets: mx.array, p: mx.array, share: mx.array, gradient: bool
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """From bucket logits [m, k + 1] to the loss (a scalar), sum_S min(p, q) [m] and the
        gradient by logits: of each id in S, then of the tail as a whole, [m, k + 1]."""
        lse = mx.logsumexp(buckets, axis=-1, keepdims=True)
        log_q = buckets - lse
        q = mx.exp(log_q)
        overlap = mx.minimum(p, q)[:, :-1].sum(axis=-1)

        def mean(log_q: mx.array) -> mx.array:
            return (self.loss(log_q, p) * share).sum()

        if not gradient:
            return mean(log_q), overlap, None
        value, d_log_q = mx.value_and_grad(mean)(log_q)
        d = d_log_q - q * d_log_q.sum(axis=-1, keepdims=True)  # through the normalisation
        return value, overlap, d / self.temperature
