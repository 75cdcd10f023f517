"""One training step and one evaluation, as functions of weights and a batch."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from distill.training.drafts.llama import Attention, forward, head_weight, masked_attention
from distill.training.loader import Batch
from distill.training.losses import FusedHead, drawn_buckets, head_rows, teacher_buckets
from distill.training.optimizer import adamw, schedule
from distill.training.tensors import Tensors


def trained_hidden(model: nn.Module, batch: Tensors, attention: Attention) -> mx.array:
    """Hidden states of the trained positions, [m, hidden]."""
    hidden = forward(model, batch["tokens"], batch["segments"], attention)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden if "positions" not in batch else hidden[batch["positions"]]


class TrimmedHead:
    """The rows of a head that has a draft vocabulary only.

    d2t: int32 [v], its ids; rows: int32 [vocab_size], the row of each id or -1.
    """

    def __init__(self, d2t: np.ndarray, vocab_size: int) -> None:
        self.d2t, self.rows = mx.array(d2t), head_rows(d2t, vocab_size)


def targets(
    batch: Tensors, temperature: float, trimmed: TrimmedHead | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """What `FusedHead` takes: the head's rows, the teacher's buckets, the weights."""
    ids = batch["top_ids"]
    rows = ids if trimmed is None else mx.where(ids < 0, -1, trimmed.rows[mx.maximum(ids, 0)])
    if "counts" in batch:
        p = drawn_buckets(batch["counts"], rows >= 0)
    else:
        p = teacher_buckets(batch["top_logprobs"], batch["lse_one"], batch["lse"], rows >= 0, temperature)
    return rows, p, batch["weights"]


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
        weights, m, v, figures = self._update(
            tensors["weights"], tensors["m"], tensors["v"], batch.arrays(), schedule(number, rate)
        )
        mx.async_eval(weights, m, v, figures)
        tensors["weights"], tensors["m"], tensors["v"] = weights, m, v
        return figures

    def _update(
        self, weights: Tensors, m: Tensors, v: Tensors, batch: Tensors, scheduled: mx.array
    ) -> tuple[Tensors, Tensors, Tensors, mx.array]:
        def loss(weights: Tensors) -> tuple[mx.array, mx.array]:
            # The embedding is cast after its look-up instead: its gradient adds up in float32.
            narrow = {k: w if "embed_tokens" in k else w.astype(self.dtype) for k, w in weights.items()}
            self.model.update(tree_unflatten(list(narrow.items())))
            hidden = trained_hidden(self.model, batch, self.attention)
            head = head_weight(self.model, self.trimmed.d2t if self.trimmed else None).astype(hidden.dtype)
            return self.head(hidden, head, *targets(batch, self.head.temperature, self.trimmed))

        (value, stats), gradients = mx.value_and_grad(loss)(weights)
        weights, m, v, norm = adamw(weights, gradients, m, v, scheduled, self.weight_decay, self.clip)
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
            head_weight(model, trimmed.d2t if trimmed else None),
            *targets(arrays, head.temperature, trimmed),
        )
        total = total + mx.concatenate([(loss * stats[2])[None], stats])
        mx.async_eval(total)
    sums = [float(x) for x in np.array(total)]
    return sums[0] / sums[3], sums[1] / sums[3], sums[2] / sums[3]
