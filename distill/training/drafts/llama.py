"""The standalone draft: a small Llama, made, started from its teacher's embedding, and run for training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from distill.training.draft_config import DraftConfig
from distill.training.drafts import Term
from distill.training.drafts.layers import (
    Attention,
    LayerStack,
    Rotation,
    fresh,
    masked_attention,
    matrices,
    norms,
    segment_mask,
)
from distill.training.loader import Batch
from distill.training.tensors import Tensors, load_tensors


class Standalone:
    """drafts.Trainable: a Llama, or a BitNet, that reads the text alone."""

    step_weights: tuple[float, ...] = (1.0,)
    frozen_head = False

    def __init__(
        self,
        config: DraftConfig,
        attention: Attention = masked_attention,
        d2t: mx.array | None = None,
        teacher_folder: Path | None = None,
        seed: int = 0,
    ) -> None:
        """d2t: int32, the ids that a trimmed head has rows for; teacher_folder: whose embedding it starts from."""
        self.config, self.attention, self.d2t = config, attention, d2t
        self.teacher_folder, self.seed = teacher_folder, seed

    def create(self) -> Tensors:
        teacher = None if self.teacher_folder is None else teacher_embedding(self.teacher_folder)
        if teacher is None or len(teacher) != self.config.vocab_size:
            return create(self.config, self.seed)
        return create(self.config, self.seed, init_embedding_from(teacher, self.config.hidden, self.seed))

    def arrays(self, batch: Batch) -> Tensors:
        return batch.arrays()

    def terms(self, weights: Tensors, batch: Tensors) -> Iterator[Term]:
        hidden = forward(self.config, weights, batch["tokens"], batch["segments"], self.attention)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        yield (hidden if "positions" not in batch else hidden[batch["positions"]]), batch["weights"]

    def head(self, weights: Tensors) -> mx.array:
        return head_weight(self.config, weights, self.d2t)


def shapes(config: DraftConfig) -> dict[str, tuple[int, ...]]:
    """All weights by their names in mlx-lm's files."""
    embeddings = {"model.embed_tokens.weight": (config.vocab_size, config.hidden)}
    if not config.tied:
        embeddings["lm_head.weight"] = embeddings["model.embed_tokens.weight"]
    return embeddings | matrices(config) | {name: (size,) for name, size in norms(config).items()}


def create(config: DraftConfig, seed: int, embedding: mx.array | None = None) -> Tensors:
    """The weights of a fresh draft (`layers.fresh`). embedding: float32 [vocab, hidden] to start the embedding from."""
    weights = fresh(shapes(config), config.layers, seed)
    return weights if embedding is None else weights | {"model.embed_tokens.weight": embedding}


def init_embedding_from(teacher_embedding: np.ndarray, hidden: int, seed: int = 0) -> mx.array:
    """The teacher's embedding in fewer dimensions: tokens alike to it start out alike to the draft.

    Projects on the leading right singular vectors, turns the result by a random orthogonal matrix
    (or the first coordinates would hold nearly all variance, bad for RMSNorm, Adam and 4-bit
    groups) and scales it to the root mean square of a fresh embedding, 1/sqrt(hidden).
    teacher_embedding: float32 [v, h]. Returns float32 [v, hidden].
    """
    h = teacher_embedding.shape[1]
    gram = np.zeros((h, h))
    for block in np.array_split(teacher_embedding, max(1, len(teacher_embedding) // 8192)):
        gram += block.astype(np.float64).T @ block.astype(np.float64)
    vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :hidden]
    vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])])
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((hidden, hidden)))[0][: vectors.shape[1]]
    projected = teacher_embedding.astype(np.float32, copy=False) @ (vectors @ turn).astype(np.float32)
    return mx.array(projected * np.float32(hidden**-0.5 / np.sqrt(np.mean(projected**2) + 1e-20)))


def teacher_embedding(teacher_folder: Path) -> np.ndarray | None:
    """float32 [v, h] of a teacher's `model.embed_tokens.weight`, None where it has no such array."""
    for path in sorted(teacher_folder.glob("model*.safetensors")):
        arrays = load_tensors(path)
        if "model.embed_tokens.weight" in arrays:
            array = arrays["model.embed_tokens.weight"]
            # Not copied: a large vocabulary's takes gigabytes.
            return None if array.dtype == mx.uint32 else np.array(array.astype(mx.float32), copy=False)
    return None


def forward(
    config: DraftConfig,
    weights: Tensors,
    tokens: mx.array,
    segments: mx.array,
    attention: Attention = masked_attention,
) -> mx.array:
    """Hidden states after the last norm, differentiable, in the dtype of the norms' weights.

    tokens: int32 [b, t]; segments: integer [b, t]; attention: how to compute it. Returns
    [b, t, hidden]; the head's product with them gives the logits (`head_weight`).
    """
    _, positions = segment_mask(segments)
    norm = weights["model.norm.weight"]
    # Gathered in the embedding's own dtype, so that its gradient adds up in it.
    x = weights["model.embed_tokens.weight"][tokens].astype(norm.dtype)
    x = LayerStack(config, weights, attention, segments).run(x, Rotation.at(positions, config, x.dtype))
    return mx.fast.rms_norm(x, norm, config.eps)


def head_weight(config: DraftConfig, weights: Tensors, d2t: mx.array | None = None) -> mx.array:
    """[v, hidden], the matrix that turns hidden states into logits; d2t: int32, the ids of a
    draft vocabulary, where the head has rows for those only."""
    weight = weights["model.embed_tokens.weight" if config.tied else "lm_head.weight"]
    return weight if d2t is None else weight[d2t]
