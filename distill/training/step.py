"""One training step and one evaluation, as functions of weights and a batch."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from distill.training.draft import Attention, forward, head_weight, masked_attention
from distill.training.loader import Batch
from distill.training.losses import FusedHead, head_ids, teacher_buckets

Tensors = dict[str, mx.array]
BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine down to a tenth of the peak.

    step: 0 for the first.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def trained_hidden(model: nn.Module, batch: Tensors, attention: Attention) -> mx.array:
    """Hidden states of the trained positions, [m, hidden]."""
    hidden = forward(model, batch["tokens"], batch["document"], attention)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden if "positions" not in batch else hidden[batch["positions"]]


class TrimmedHead:
    """The rows of a head that keeps only some tokens.

    kept: int32 [v], its ids; rows: int32 [vocab_size], the row of each id or -1.
    """

    def __init__(self, kept: np.ndarray, vocab_size: int) -> None:
        self.kept, self.rows = mx.array(kept), head_ids(kept, vocab_size)


def targets(
    batch: Tensors, temperature: float, trimmed: TrimmedHead | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """What `FusedHead` takes: the head's rows, the teacher's buckets, the weights."""
    rows = batch["top_ids"] if trimmed is None else trimmed.rows[batch["top_ids"]]
    p = teacher_buckets(batch["top_logprobs"], batch["lse_one"], batch["lse"], rows >= 0, temperature)
    return rows, p, batch["weights"]


def adamw(
    weights: Tensors, gradients: Tensors, m: Tensors, v: Tensors, schedule: mx.array, decay: float, clip: float
) -> tuple[Tensors, Tensors, Tensors, mx.array]:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with bias correction, after clipping the
    gradient's global norm. Vectors (norms) do not decay.

    schedule: float32 [3], the learning rate, 1 - beta1^t and 1 - beta2^t. Returns new weights, m
    and v, and the norm before clipping.
    """
    norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), start=mx.array(0.0)))
    factor = mx.minimum(1.0, clip / (norm + 1e-6))
    rate, c1, c2 = schedule[0], schedule[1], schedule[2]
    new: tuple[Tensors, Tensors, Tensors] = ({}, {}, {})
    for name, w in weights.items():
        g = gradients[name] * factor
        first = BETAS[0] * m[name] + (1 - BETAS[0]) * g
        second = BETAS[1] * v[name] + (1 - BETAS[1]) * mx.square(g)
        kept = w * (1 - rate * decay) if w.ndim > 1 else w
        new[0][name] = kept - rate * (first / c1) / (mx.sqrt(second / c2) + EPS)
        new[1][name], new[2][name] = first, second
    return *new, norm


class Step:
    """One update of weights and moments.

    Not compiled: on an H100 the plain graph already runs at 0.8 M tokens a second (2 layers, hidden
    256, vocabulary 16,384), while `mx.compile` of it took over a minute; on CPUs numpy does the work.

    dtype: of the computation; weights, moments and gradients stay float32.
    """

    def __init__(
        self,
        model: nn.Module,
        head: FusedHead,
        weight_decay: float,
        clip: float,
        dtype: mx.Dtype,
        attention: Attention = masked_attention,
        trimmed: TrimmedHead | None = None,
    ) -> None:
        self.model, self.head, self.attention, self.trimmed = model, head, attention, trimmed
        self.weight_decay, self.clip, self.dtype = weight_decay, clip, dtype

    def __call__(self, tensors: dict[str, Tensors], batch: Batch, number: int, rate: float) -> mx.array:
        """Replaces the entries of `tensors` ("weights", "m", "v").

        number: 1 for the first step. Returns float32 [5], not waited for: loss, agreement, lower
        bound of acceptance (means over the batch's trained positions), their count, gradient norm.
        """
        schedule = mx.array(np.array([rate, *(1 - b**number for b in BETAS)], np.float32))
        weights, m, v, figures = self._update(tensors["weights"], tensors["m"], tensors["v"], batch.arrays(), schedule)
        mx.async_eval(weights, m, v, figures)
        tensors["weights"], tensors["m"], tensors["v"] = weights, m, v
        return figures

    def _update(
        self, weights: Tensors, m: Tensors, v: Tensors, batch: Tensors, schedule: mx.array
    ) -> tuple[Tensors, Tensors, Tensors, mx.array]:
        def loss(weights: Tensors) -> tuple[mx.array, mx.array]:
            # The embedding is cast after its look-up instead: its gradient adds up in float32.
            narrow = {k: w if "embed_tokens" in k else w.astype(self.dtype) for k, w in weights.items()}
            self.model.update(tree_unflatten(list(narrow.items())))
            hidden = trained_hidden(self.model, batch, self.attention)
            head = head_weight(self.model, self.trimmed.kept if self.trimmed else None).astype(hidden.dtype)
            return self.head(hidden, head, *targets(batch, self.head.temperature, self.trimmed))

        (value, stats), gradients = mx.value_and_grad(loss)(weights)
        weights, m, v, norm = adamw(weights, gradients, m, v, schedule, self.weight_decay, self.clip)
        count = mx.maximum(stats[2], 1.0)
        return weights, m, v, mx.stack([value, stats[0] / count, stats[1] / count, stats[2], norm])


def measure(
    model: nn.Module,
    head: FusedHead,
    weights: Tensors,
    batches: list[Batch],
    attention: Attention = masked_attention,
    trimmed: TrimmedHead | None = None,
) -> tuple[float, float, float]:
    """Loss, agreement and the lower bound of acceptance over held-out batches, in float32."""
    model.update(tree_unflatten(list(weights.items())))
    total = mx.zeros(4)
    for batch in batches:
        arrays = batch.arrays()
        loss, stats = head.evaluate(
            trained_hidden(model, arrays, attention),
            head_weight(model, trimmed.kept if trimmed else None),
            *targets(arrays, head.temperature, trimmed),
        )
        total = total + mx.concatenate([(loss * stats[2])[None], stats])
        mx.async_eval(total)
    sums = [float(x) for x in np.array(total)]
    return sums[0] / sums[3], sums[1] / sums[3], sums[2] / sums[3]
