"""The standalone draft: a small Llama, made, started from its teacher's embedding, and run for training.

The module is mlx-lm's own `llama`; training runs it through `forward` instead of its own call,
because rows hold several documents: attention must not cross them and RoPE restarts with each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from distill.training.draft_config import DraftConfig
from distill.training.tensors import load_tensors


def build(config: DraftConfig) -> nn.Module:
    """mlx-lm's Llama of that shape, its weights not yet evaluated."""
    from mlx_lm.models.llama import Model, ModelArgs  # slow to import

    return Model(ModelArgs.from_dict(config.to_json()))


def named_weights(model: nn.Module) -> dict[str, mx.array]:
    """A module's arrays by their names in a safetensors file."""
    flat: Any = tree_flatten(model.parameters())
    return dict(flat)


def create(config: DraftConfig, seed: int, embedding: mx.array | None = None) -> nn.Module:
    """A fresh draft in float32: matrices normal with 1/sqrt(inputs), those that write into the
    residual stream smaller by sqrt(2 layers) (GPT-2), norms one.

    embedding: float32 [vocab, hidden] to start the embedding from. The same seed gives the same
    weights and leaves MLX's global random state alone.
    """
    model = build(config)
    key = mx.random.key(seed)
    weights = []
    for name, array in sorted(named_weights(model).items()):
        if array.ndim == 1:
            weights.append((name, mx.ones(array.shape)))
            continue
        key, part = mx.random.split(key)
        scale = array.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * config.layers)
        weights.append((name, scale * mx.random.normal(array.shape, key=part)))
    model.update(tree_unflatten(weights))
    if embedding is not None:
        model.model.embed_tokens.weight = embedding
    mx.eval(model.parameters())
    return model


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


def segment_mask(segments: mx.array) -> tuple[mx.array, mx.array]:
    """Who may attend to whom, and positions that restart with each segment.

    segments: integer [b, t], the id of each position's segment, a segment's positions standing together. Returns
    bool [b, 1, t, t] (query, key) and int32 [b, t].
    """
    t = segments.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) & (mx.arange(t)[:, None] >= mx.arange(t))
    return mask[:, None], mask.astype(mx.int32).sum(axis=-1) - 1


def masked_attention(q: mx.array, k: mx.array, v: mx.array, segments: mx.array) -> mx.array:
    """Causal attention within segments, by MLX.

    q: [b, heads, t, d]; k, v: [b, kv_heads, t, d]; segments: integer [b, t]. Returns the shape of q.
    """
    mask, _ = segment_mask(segments)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


Attention = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def forward(
    model: nn.Module, tokens: mx.array, segments: mx.array, attention: Attention = masked_attention
) -> mx.array:
    """Hidden states after the last norm, differentiable, in the dtype of the model's weights.

    tokens: int32 [b, t]; segments: integer [b, t]; attention: how to compute it. Returns
    [b, t, hidden]; the head's product with them gives the logits (`head_weight`).
    """
    args = model.args
    b, t = tokens.shape
    _, positions = segment_mask(segments)
    # Gathered in the embedding's own dtype, so that its gradient adds up in it.
    x = model.model.embed_tokens(tokens).astype(model.model.norm.weight.dtype)
    d = args.head_dim
    frequency = args.rope_theta ** (-mx.arange(0, d, 2, dtype=mx.float32) / d)
    angle = positions.astype(mx.float32)[:, None, :, None] * frequency  # [b, 1, t, d / 2]
    cos, sin = mx.cos(angle).astype(x.dtype), mx.sin(angle).astype(x.dtype)

    def heads(y: mx.array) -> mx.array:
        return y.reshape(b, t, -1, d).transpose(0, 2, 1, 3)

    def rotate(y: mx.array) -> mx.array:  # kernels.reference.rope, heads before positions
        u, v = mx.split(y, 2, axis=-1)
        return mx.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1)

    for layer in model.model.layers:
        y = mx.fast.rms_norm(x, layer.input_layernorm.weight, args.rms_norm_eps)
        a = layer.self_attn
        q, k, v = rotate(heads(a.q_proj(y))), rotate(heads(a.k_proj(y))), heads(a.v_proj(y))
        y = attention(q, k, v, segments)
        x = x + a.o_proj(y.transpose(0, 2, 1, 3).reshape(b, t, -1))
        y = mx.fast.rms_norm(x, layer.post_attention_layernorm.weight, args.rms_norm_eps)
        x = x + layer.mlp.down_proj(nn.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return mx.fast.rms_norm(x, model.model.norm.weight, args.rms_norm_eps)


def head_weight(model: nn.Module, d2t: mx.array | None = None) -> mx.array:
    """[v, hidden], the matrix that turns hidden states into logits; d2t: int32, the ids of a
    draft vocabulary, where the head has rows for those only."""
    weight = model.model.embed_tokens.weight if model.args.tie_word_embeddings else model.lm_head.weight
    return weight if d2t is None else weight[d2t]
