"""One training step and one evaluation, as functions of weights and a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from distill.training.drafts import Trainable
from distill.training.loader import Batch
from distill.training.losses import FusedHead, drawn_buckets, head_rows, teacher_buckets
from distill.training.optimizer import adamw, schedule
from distill.training.tensors import Tensors


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


class Gradients(NamedTuple):
    """What a step learns from. loss: the mean; stats: float32 [steps, 3], as `FusedHead` sums them in each step that
    the draft is unrolled; weights: the gradient of the mean, by name."""

    loss: mx.array
    stats: mx.array
    weights: Tensors

    @classmethod
    def total(cls, parts: Sequence[Gradients], step_weights: Sequence[float]) -> Gradients:
        """Of all rows, from those of parts of them."""
        stats = sum((part.stats for part in parts[1:]), start=parts[0].stats)
        whole = _counted(step_weights, stats).sum()
        shares = [_counted(step_weights, part.stats).sum() / whole for part in parts]

        def summed(values: Sequence[mx.array]) -> mx.array:
            return sum((share * value for share, value in zip(shares, values, strict=True)), start=mx.array(0.0))

        names = parts[0].weights
        weights = {name: summed([part.weights[name] for part in parts]) for name in names}
        return cls(summed([part.loss for part in parts]), stats, weights)


class Sharing(Protocol):
    """Who computes gradients with others (distill.training.parallel)."""

    def gradients(self, step: Step, weights: Tensors, batch: Batch) -> Gradients: ...


class Step:
    """One update of weights and moments.

    Not compiled: on an H100 the plain graph already runs at 0.8 M tokens a second (2 layers, hidden
    256, vocabulary 16,384), while `mx.compile` of it took over a minute; on CPUs numpy does the work.

    dtype: of the computation; weights, moments and gradients stay float32.
    """

    def __init__(
        self,
        draft: Trainable,
        head: FusedHead,
        weight_decay: float,
        clip: float,
        dtype: mx.Dtype,
        trimmed: TrimmedHead | None = None,
    ) -> None:
        self.draft, self.head, self.trimmed = draft, head, trimmed
        self.weight_decay, self.clip, self.dtype = weight_decay, clip, dtype

    def __call__(
        self, tensors: dict[str, Tensors], batch: Batch, number: int, rate: float, shared: Sharing | None = None
    ) -> mx.array:
        """Replaces the entries of `tensors` ("weights", "m", "v").

        number: 1 for the first step; shared: computes the gradients together with others. Returns float32 [4 + steps],
        not waited for: loss, lower bound of acceptance, the batch's trained positions, gradient norm, and the agreement
        in each step that the draft is unrolled.
        """
        weights = tensors["weights"]
        if shared is None:
            found = self.gradients(weights, self.draft.arrays(batch))
        else:
            found = shared.gradients(self, weights, batch)
        weights, m, v, norm = adamw(
            weights,
            found.weights,
            tensors["m"],
            tensors["v"],
            schedule(number, rate),
            self.weight_decay,
            self.clip,
        )
        counts = mx.maximum(found.stats[:, 2], 1.0)
        figures = mx.stack([found.loss, found.stats[0, 1] / counts[0], found.stats[0, 2], norm])
        figures = mx.concatenate([figures, found.stats[:, 0] / counts])
        mx.async_eval(weights, m, v, figures)
        tensors["weights"], tensors["m"], tensors["v"] = weights, m, v
        return figures

    def gradients(self, weights: Tensors, batch: Tensors) -> Gradients:
        """Of a batch as `Trainable.arrays` gives it, not evaluated."""

        def loss(weights: Tensors) -> tuple[mx.array, mx.array]:
            # The embedding is cast after its look-up instead: its gradient adds up in float32.
            narrow = {k: w if "embed_tokens" in k else w.astype(self.dtype) for k, w in weights.items()}
            head = self.draft.head(narrow).astype(self.dtype)
            rows, p, _ = targets(batch, self.head.temperature, self.trimmed)
            found = [self.head(hidden, head, rows, p, counts) for hidden, counts in self.draft.terms(narrow, batch)]
            return _mean(self.draft.step_weights, found)

        (value, stats), gradients = mx.value_and_grad(loss)(weights)
        return Gradients(value, stats, gradients)


def _mean(step_weights: Iterable[float], found: list[tuple[mx.array, mx.array]]) -> tuple[mx.array, mx.array]:
    """The mean of a loss over all positions of all steps, each counting as its step does, and the stats of each step.

    found: what `FusedHead` returns of each step, a mean and its stats.
    """
    stats = mx.stack([measured for _, measured in found])
    counted = _counted(step_weights, stats)
    value = (mx.stack([value for value, _ in found]) * counted).sum() / counted.sum()
    return value, stats


def _counted(step_weights: Iterable[float], stats: mx.array) -> mx.array:
    """How much each step counts in the mean. stats: [steps, 3]."""
    return mx.array(list(step_weights)) * mx.maximum(stats[:, 2], 1.0)


@dataclass(frozen=True)
class Measured:
    """How a draft does on held-out rows.

    loss: in nats; expected_acceptance: the lower bound of the first step's; agreement: in each step that it is
    unrolled, of positions whose tokens before are the teacher's.
    """

    loss: float
    expected_acceptance: float
    agreement: tuple[float, ...]


def measure(
    draft: Trainable,
    head: FusedHead,
    weights: Tensors,
    batches: list[Tensors],
    trimmed: TrimmedHead | None = None,
) -> Measured:
    """What a draft with these weights makes of batches, as its `arrays` gives them, in float32."""
    total, all_stats = mx.zeros(2), mx.zeros((len(draft.step_weights), 3))
    matrix = draft.head(weights).astype(mx.float32)
    for batch in batches:
        rows, p, _ = targets(batch, head.temperature, trimmed)
        found = [head.evaluate(hidden, matrix, rows, p, counts) for hidden, counts in draft.terms(weights, batch)]
        value, stats = _mean(draft.step_weights, found)
        counted = (mx.array(list(draft.step_weights)) * stats[:, 2]).sum()
        total, all_stats = total + mx.stack([value * counted, counted]), all_stats + stats
        mx.async_eval(total, all_stats)
    sums, (loss_sum, positions) = np.array(all_stats), np.array(total).tolist()
    shares = sums / np.maximum(sums[:, 2:], 1.0)
    return Measured(loss_sum / positions, float(shares[0, 1]), tuple(map(float, shares[:, 0])))
