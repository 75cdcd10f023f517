"""The kinds of drafts, as training sees them: functions of weights by name.

`layers` has what all share, `llama` the standalone draft, `reader` the one that reads its teacher's hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import mlx.core as mx

from distill.training.loader import Batch
from distill.training.tensors import Tensors

# What the head reads at the trained positions of a batch, [m, hidden], and which of them count, float32 [m].
Term = tuple[mx.array, mx.array]


class Trainable(Protocol):
    """A kind of draft in training. The loss is a mean over its terms, one for each step that it is unrolled."""

    step_weights: tuple[float, ...]  # how much a position counts in each term
    frozen_head: bool  # whether the head is the teacher's, and not learnt

    def create(self) -> Tensors:
        """The weights that a run begins with, float32."""
        ...

    def arrays(self, batch: Batch) -> Tensors:
        """A batch as `terms` takes it."""
        ...

    def terms(self, weights: Tensors, batch: Tensors) -> Iterator[Term]:
        """Differentiable by the weights, in their dtype."""
        ...

    def head(self, weights: Tensors) -> mx.array:
        """[v, hidden], whose product with what the head reads gives the logits."""
        ...
