"""The draft that reads its teacher's hidden states (decode.models.reader), made and run for training.

It is trained as it is used (training-time test, EAGLE-3, arXiv:2503.01840): unrolled for several steps, from the second
on with its own state in place of the teacher's. Step j of index t takes token t + j, stands at RoPE's position
t + j - 1, sees the first step's keys up to t and those of steps 2..j at t alone, and predicts token t + j + 1: its
target is what the teacher says at position t + j.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from decode.models.cache import Packed
from decode.models.transformer import Transformer
from distill.training.draft_config import DraftConfig
from distill.training.drafts import Term
from distill.training.drafts.layers import (
    Attention,
    LayerStack,
    Rotation,
    fresh,
    linear,
    masked_attention,
    matrices,
    norms,
    segment_mask,
)
from distill.training.loader import Batch
from distill.training.tensors import Tensors

SCALES = (0.05, 20.0)  # a dimension of what is read starts out scaled to size 1, but not by more than this


class ReaderInTraining:
    """drafts.Trainable: a reader beside the teacher that it reads, which runs over every batch."""

    frozen_head = True

    def __init__(
        self,
        config: DraftConfig,
        features: Features,
        embedding: mx.array,
        head: mx.array,
        step_weights: Sequence[float],
        first: Batch | None = None,
        attention: Attention = masked_attention,
        seed: int = 0,
    ) -> None:
        """embedding: the teacher's, [vocab, teacher_hidden]; head: rows of its head, those of the draft vocabulary;
        step_weights: as many as it is unrolled for steps; first: the batch that a fresh draft is scaled by."""
        self.config, self.features, self.embedding, self._head = config, features, embedding, head
        self.step_weights, self.first = tuple(step_weights), first
        self.attention, self.seed = attention, seed

    def create(self) -> Tensors:
        read = None if self.first is None else self.features.of(self.first.tokens, self.first.segments)
        return create(self.config, self.seed, read)

    def arrays(self, batch: Batch) -> Tensors:
        index, counts = unrolled_targets(batch, len(self.step_weights))
        features = self.features.of(batch.tokens, batch.segments)
        return batch.arrays() | {"features": features, "index": mx.array(index), "counts_in_step": mx.array(counts)}

    def terms(self, weights: Tensors, batch: Tensors) -> Iterator[Term]:
        steps = unroll(
            self.config,
            weights,
            self.embedding,
            batch["features"],
            batch["tokens"],
            batch["segments"],
            len(self.step_weights),
            self.attention,
        )
        for step, hidden in enumerate(steps):
            yield hidden.reshape(-1, hidden.shape[-1])[batch["index"][step]], batch["counts_in_step"][step]

    def head(self, weights: Tensors) -> mx.array:
        return self._head


def shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """All weights by their names."""
    hidden, read = config.hidden, config.teacher_hidden
    found: dict[str, tuple[int, ...]] = {
        "feature_norm.weight": (len(config.taps) * read,),
        "fusion.weight": (hidden, len(config.taps) * read),
        "embedding_norm.weight": (read,),
        "state_norm.weight": (hidden,),
        "input.weight": (hidden, read + hidden),
    }
    if hidden != read:
        found["output.weight"] = (read, hidden)
    return found | matrices(config) | {name: (size,) for name, size in norms(config).items()}


def create(config: DraftConfig, seed: int, features: mx.array | None = None) -> Tensors:
    """The weights of a fresh draft (`layers.fresh`).

    features: [..., taps * teacher_hidden] of some tokens, normed; a few dimensions of a teacher's states are ten times
    the rest, so each starts out scaled to size 1.
    """
    weights = fresh(shapes(config), config.layers, seed)
    if features is not None:
        flat = features.astype(mx.float32).reshape(-1, features.shape[-1])
        weights["feature_norm.weight"] = mx.clip(mx.rsqrt(mx.square(flat).mean(axis=0) + 1e-12), *SCALES)
    return weights


class Features:
    """What a reader reads: its teacher's states at the tapped layers, normed and side by side."""

    def __init__(self, teacher: Transformer, taps: tuple[int, ...]) -> None:
        self.teacher, self.taps = teacher, taps

    def of(self, tokens: np.ndarray, segments: np.ndarray) -> mx.array:
        """tokens, segments: int [b, t]. Returns float16 [b, t, taps * teacher_hidden], not evaluated."""
        hidden = self.teacher.forward(tokens, Packed(segments), self.taps).hidden
        normed = [mx.fast.rms_norm(hidden[tap], None, self.teacher.eps).astype(mx.float16) for tap in self.taps]
        return mx.concatenate(normed, axis=-1).reshape(*tokens.shape, -1)


class CachedFeatures(Features):
    """Features that are kept for the next pass over the data, of the first rows that there is room for."""

    def __init__(self, teacher: Transformer, taps: tuple[int, ...], room: int) -> None:
        """room: bytes."""
        super().__init__(teacher, taps)
        self.room, self.rows = room, dict[bytes, mx.array]()

    def of(self, tokens: np.ndarray, segments: np.ndarray) -> mx.array:
        keys = [hashlib.sha256(row.tobytes()).digest() for row in np.concatenate([tokens, segments], axis=1)]
        missing = [i for i, key in enumerate(keys) if key not in self.rows]
        new = dict[bytes, mx.array]()
        if missing:
            computed = super().of(tokens[missing], segments[missing])
            new = {keys[i]: computed[j] for j, i in enumerate(missing)}
        found = mx.stack([self.rows[key] if key in self.rows else new[key] for key in keys])
        if new and self.room >= computed.nbytes:
            mx.eval(found, new)
            self.rows |= new
            self.room -= computed.nbytes
        return found


def unroll(
    config: DraftConfig,
    weights: Tensors,
    embedding: mx.array,
    features: mx.array,
    tokens: mx.array,
    segments: mx.array,
    steps: int,
    attention: Attention = masked_attention,
) -> Iterator[mx.array]:
    """Of each step what the head reads, [b, t, teacher_hidden], at every index; differentiable.

    embedding: the teacher's, [vocab, teacher_hidden]; features: as `Features` returns them; tokens: int32 [b, t];
    segments: integer [b, t]. Where step j would need tokens of another segment, or of none, the result means nothing.
    """
    norm = weights["norm.weight"]
    dtype = norm.dtype
    _, positions = segment_mask(segments)
    stack = LayerStack(config, weights, attention, segments)
    earlier: list[list[tuple[mx.array, mx.array]]] = [[] for _ in range(config.layers)]
    state = linear(features.astype(dtype) * weights["feature_norm.weight"], weights["fusion.weight"], config.ternary)
    for step in range(1, steps + 1):
        following = mx.pad(tokens[:, step:], [(0, 0), (0, step)])
        embedded = mx.fast.rms_norm(embedding[following].astype(dtype), weights["embedding_norm.weight"], config.eps)
        normed = mx.fast.rms_norm(state, weights["state_norm.weight"], config.eps)
        x = linear(mx.concatenate([embedded, normed], axis=-1), weights["input.weight"], config.ternary)
        state = stack.run(x, Rotation.at(positions + (step - 1), config, dtype), earlier)
        out = mx.fast.rms_norm(state, norm, config.eps)
        yield out if "output.weight" not in weights else linear(out, weights["output.weight"], config.ternary)


def unrolled_targets(batch: Batch, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Which index predicts each trained position of a batch in each step, and whether that counts.

    Step j predicts position s from index s - j; it counts where positions s - j + 1 .. s are trained ones of one
    document, as the tokens between are the draft's own then: it would be proposing a part of a reply. Returns int32
    [steps, m] into b * t, 0 where it does not count, and float32 [steps, m], 0 or 1.
    """
    b, t = batch.tokens.shape
    positions = np.arange(b * t, dtype=np.int32) if batch.positions is None else batch.positions
    trained = np.zeros(b * t, bool)
    trained[positions[batch.weights > 0]] = True
    segments = batch.segments.reshape(-1)
    index, counts = np.zeros((steps, len(positions)), np.int32), np.zeros((steps, len(positions)), np.float32)
    ok = batch.weights > 0
    for step in range(1, steps + 1):
        # Of the same row and document as the position: then all between are.
        at = positions - step
        ok = ok & (positions % t >= step)
        ok[ok] = segments[at[ok]] == segments[positions[ok]]
        if step > 1:
            ok[ok] = trained[at[ok] + 1]
        index[step - 1], counts[step - 1] = np.where(ok, at, 0), ok
    return index, counts
