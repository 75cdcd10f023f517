"""What the drafts in training share: decoder layers as differentiable functions of weights by name.

Names and layouts are mlx-lm's. Rows hold several documents: attention does not cross them, and RoPE restarts with each.
A ternary draft (BitNet b1.58, arXiv:2402.17764) keeps float weights while it is trained and computes with what they
round to; gradients pass straight through the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from distill.training.draft_config import DraftConfig
from distill.training.tensors import Tensors

# Attention of queries [b, heads, t, d] over keys and values [b, kv_heads, t, d] before them in their own segment, and
# over `OwnKeys` where a position has some: [b, heads, t, d].
Attention = Callable[..., mx.array]


@dataclass(frozen=True)
class OwnKeys:
    """Keys and values that only the query of their own position sees, s of them: [b, kv_heads, t, s, d] each."""

    keys: mx.array
    values: mx.array


def matrices(config: DraftConfig) -> dict[str, tuple[int, int]]:
    """The matrices of every layer, [outputs, inputs], by their names."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    of_layer = {
        "self_attn.q_proj": (heads, config.hidden),
        "self_attn.k_proj": (kv_heads, config.hidden),
        "self_attn.v_proj": (kv_heads, config.hidden),
        "self_attn.o_proj": (config.hidden, heads),
        "mlp.gate_proj": (config.intermediate, config.hidden),
        "mlp.up_proj": (config.intermediate, config.hidden),
        "mlp.down_proj": (config.hidden, config.intermediate),
    }
    prefix = config.prefix
    return {f"{prefix}layers.{i}.{n}.weight": shape for i in range(config.layers) for n, shape in of_layer.items()}


def norms(config: DraftConfig) -> dict[str, int]:
    """The weights of every layer's norms, and of the last one, by their names."""
    of_layer = {"input_layernorm": config.hidden, "post_attention_layernorm": config.hidden}
    if config.ternary:
        of_layer |= {"self_attn.attn_sub_norm": config.heads * config.head_dim, "mlp.ffn_sub_norm": config.intermediate}
    prefix = config.prefix
    of_layers = {f"{prefix}layers.{i}.{n}.weight": size for i in range(config.layers) for n, size in of_layer.items()}
    return of_layers | {f"{prefix}norm.weight": config.hidden}


def fresh(shapes: Mapping[str, tuple[int, ...]], layers: int, seed: int) -> Tensors:
    """Weights to start from, float32: matrices normal with 1/sqrt(inputs), those that write into the residual stream
    smaller by sqrt(2 layers) (GPT-2), norms one. The same seed gives the same weights and leaves MLX's global random
    state alone."""
    key = mx.random.key(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        if len(shape) == 1:
            weights[name] = mx.ones(shape)
            continue
        key, part = mx.random.split(key)
        scale = shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale /= math.sqrt(2 * layers)
        weights[name] = scale * mx.random.normal(shape, key=part)
    mx.eval(weights)
    return weights


def segment_mask(segments: mx.array) -> tuple[mx.array, mx.array]:
    """Who may attend to whom, and positions that restart with each segment.

    segments: integer [b, t], the id of each position's segment, a segment's positions standing together. Returns
    bool [b, 1, t, t] (query, key) and int32 [b, t].
    """
    t = segments.shape[1]
    mask = (segments[:, :, None] == segments[:, None, :]) & (mx.arange(t)[:, None] >= mx.arange(t))
    return mask[:, None], mask.astype(mx.int32).sum(axis=-1) - 1


def masked_attention(q: mx.array, k: mx.array, v: mx.array, segments: mx.array, own: OwnKeys | None = None) -> mx.array:
    """Causal attention within segments, by MLX.

    q: [b, heads, t, d]; k, v: [b, kv_heads, t, d]; segments: integer [b, t]; own: what each position sees besides.
    Returns the shape of q.
    """
    mask, _ = segment_mask(segments)
    if own is None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
    b, heads, t, d = q.shape
    grouped = q.reshape(b, k.shape[1], -1, t, d) * d**-0.5
    before = mx.where(mask[:, None], grouped @ k[:, :, None].swapaxes(-1, -2), -mx.inf)
    besides = (grouped[..., None, :] * own.keys[:, :, None]).sum(axis=-1)
    p = mx.softmax(mx.concatenate([before, besides], axis=-1), axis=-1, precise=True)
    out = p[..., :t] @ v[:, :, None] + (p[..., t:, None] * own.values[:, :, None]).sum(axis=-2)
    return out.reshape(b, heads, t, d)


@dataclass(frozen=True)
class Rotation:
    """RoPE's turns of rows at their positions, [b, 1, t, d / 2] each, in the rotate-half layout."""

    cos: mx.array
    sin: mx.array

    @classmethod
    def at(cls, positions: mx.array, config: DraftConfig, dtype: mx.Dtype) -> Rotation:
        """positions: integer [b, t]."""
        d = config.head_dim
        frequency = config.rope_theta ** (-mx.arange(0, d, 2, dtype=mx.float32) / d)
        angle = positions.astype(mx.float32)[:, None, :, None] * frequency
        return cls(mx.cos(angle).astype(dtype), mx.sin(angle).astype(dtype))

    def turn(self, y: mx.array) -> mx.array:
        """y: [b, heads, t, d]; kernels.reference.rope, heads before positions."""
        u, v = mx.split(y, 2, axis=-1)
        return mx.concatenate([u * self.cos - v * self.sin, v * self.cos + u * self.sin], axis=-1)


class LayerStack:
    """The decoder layers of a draft, run over rows of documents."""

    def __init__(self, config: DraftConfig, weights: Tensors, attention: Attention, segments: mx.array) -> None:
        """segments: integer [b, t]."""
        self.config, self.weights, self.attention, self.segments = config, weights, attention, segments

    def run(
        self, x: mx.array, rotation: Rotation, earlier: list[list[tuple[mx.array, mx.array]]] | None = None
    ) -> mx.array:
        """Rows through all layers, [b, t, hidden], before the last norm.

        earlier: of each layer, keys and values of the runs before this one, which are added to them: the keys of the
        first are seen as causal attention sees keys, those of later ones by their own position only.
        """
        for i in range(self.config.layers):
            x = self._layer(f"{self.config.prefix}layers.{i}.", x, rotation, None if earlier is None else earlier[i])
        return x

    def _layer(
        self, prefix: str, x: mx.array, rotation: Rotation, earlier: list[tuple[mx.array, mx.array]] | None
    ) -> mx.array:
        b, t, _ = x.shape

        def heads(y: mx.array) -> mx.array:
            return y.reshape(b, t, -1, self.config.head_dim).transpose(0, 2, 1, 3)

        def product(name: str, y: mx.array) -> mx.array:
            return linear(y, self.weights[f"{prefix}{name}.weight"], self.config.ternary)

        y = self._norm(f"{prefix}input_layernorm.weight", x)
        q, k, v = (heads(product(f"self_attn.{name}_proj", y)) for name in "qkv")
        q, k, own = rotation.turn(q), rotation.turn(k), None
        if earlier is not None:
            earlier.append((k, v))
            (k, v), *later = earlier
            if later:
                own = OwnKeys(*(mx.stack(list(part), axis=3) for part in zip(*later, strict=True)))
        a = self.attention(q, k, v, self.segments, own)
        a = a.transpose(0, 2, 1, 3).reshape(b, t, -1)
        x = x + product("self_attn.o_proj", self._sub_norm(f"{prefix}self_attn.attn_sub_norm.weight", a))
        y = self._norm(f"{prefix}post_attention_layernorm.weight", x)
        gate, up = product("mlp.gate_proj", y), product("mlp.up_proj", y)
        h = (nn.relu2(gate) if self.config.activation == "relu2" else nn.silu(gate)) * up
        return x + product("mlp.down_proj", self._sub_norm(f"{prefix}mlp.ffn_sub_norm.weight", h))

    def _norm(self, name: str, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weights[name], self.config.eps)

    def _sub_norm(self, name: str, x: mx.array) -> mx.array:
        """BitNet's norm before a product, which a Llama does not have."""
        return self._norm(name, x) if self.config.ternary else x


def linear(x: mx.array, weight: mx.array, ternary: bool) -> mx.array:
    """x [..., k] times a float weight [n, k], or what both round to in a BitNet: [..., n]."""
    return _bitlinear(x, weight) if ternary else x @ weight.T


def _rounded(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """int8 rows and ternary weights in the dtype of x, which holds them exactly, and what each counts: with
    x ~ rows / s, float32 [..., 1], and weight ~ ternary * scale (kernels.reference, kernels.packing)."""
    wide = x.astype(mx.float32)
    s = 127.0 / mx.maximum(mx.abs(wide).max(axis=-1, keepdims=True), 1e-5)
    rows = mx.clip(mx.round(wide * s), -128, 127)
    factor = 1.0 / mx.maximum(mx.abs(weight.astype(mx.float32)).mean(), 1e-5)
    ternary = mx.clip(mx.round(weight.astype(mx.float32) * factor), -1, 1)
    return rows.astype(x.dtype), s, ternary.astype(x.dtype), 1.0 / factor


def _product(x: mx.array, weight: mx.array) -> mx.array:
    rows, s, ternary, scale = _rounded(x, weight)
    return ((rows @ ternary.T).astype(mx.float32) * (scale / s)).astype(x.dtype)


def _straight_through(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array]:
    """The gradient as if the rounded values were the values (Bengio et al., arXiv:1308.3432)."""
    x, weight = primals
    rows, s, ternary, scale = _rounded(x, weight)
    d_x = (cotangent @ ternary) * scale.astype(x.dtype)
    given = (cotangent.astype(mx.float32) / s).astype(x.dtype).reshape(-1, cotangent.shape[-1])
    d_weight = given.T @ rows.reshape(-1, rows.shape[-1])
    return d_x, d_weight.astype(weight.dtype)


_bitlinear: Any = mx.custom_function(_product)
_bitlinear.vjp(_straight_through)
