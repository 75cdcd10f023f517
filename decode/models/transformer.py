"""One forward pass for teachers and drafts, over weights that mlx-lm has loaded.

A layer is four `linear` calls and one `attention` of the kernels, whatever the weights are:
ternary with sub-norms and squared ReLU (BitNet) or float with SiLU (Llama). Activations are
float32. `step` is the lossless path of 1..8 rows; `prefill` and `batch_*` use the libraries'
matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from decode.models.draft_vocabulary import check_kept
from kernels import BitLinear, UserError, backend
from kernels.backends import Backend, device_backend
from kernels.reference import (
    SMALL_ROWS,
    AttentionShape,
    DenseWeight,
    Epilogue,
    Int8Weight,
    Weight,
    rms_norm,
    split_heads,
)

Precision = Literal["float", "int8"]
ACTIVATIONS = {"bitnet": "relu2", "llama": "silu"}  # of a model type, where config.json names none
EPILOGUES: dict[str, Epilogue] = {"relu2": "relu2_mul", "silu": "silu_mul"}
PREFILL_CHUNK = 512
CACHE_STEP = 256


@dataclass(frozen=True)
class Layer:
    """Fused weights of one transformer layer; the sub-norms are None in a Llama."""

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: mx.array
    attention_sub_norm: mx.array | None
    post_norm: mx.array
    ffn_sub_norm: mx.array | None


class KVCache:
    """Keys and values of one sequence, a pair of [kv_heads, capacity, head_dim] arrays a layer.

    Rows at and beyond `offset` are junk that is overwritten before it is read, so rewinding is
    an assignment.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int) -> None:
        self.keys = [mx.zeros((kv_heads, 0, head_dim)) for _ in range(layers)]
        self.values = [mx.zeros((kv_heads, 0, head_dim)) for _ in range(layers)]
        self.offset = 0

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more rows."""
        heads, capacity, dim = self.keys[0].shape
        missing = self.offset + rows - capacity
        if missing > 0:
            room = mx.zeros((heads, -(-missing // CACHE_STEP) * CACHE_STEP, dim))
            self.keys = [mx.concatenate([keys, room], axis=1) for keys in self.keys]
            self.values = [mx.concatenate([values, room], axis=1) for values in self.values]


class Transformer:
    """A decoder-only model whose every product goes through the kernels."""

    def __init__(
        self, model: nn.Module, config: dict[str, Any], head: Precision = "float", layers: Precision = "float"
    ) -> None:
        """model: an mlx-lm `bitnet` or `llama` model, BitLinear already swapped; config: its config.json.

        head: "float" as the checkpoint has it, or "int8", rounded to 8 bits (kernels.reference.Int8Weight);
        layers: the same of the layers' float matrices. Ternary ones stay what they are.
        """
        self.config = config
        self._precision = layers
        self.ops: Backend = backend()
        args = model.args
        if args.model_type not in ACTIVATIONS:
            raise UserError(f"model type {args.model_type!r} is not supported (bitnet and llama are)")
        activation = config.get("hidden_act") or ACTIVATIONS[args.model_type]
        if activation not in EPILOGUES:
            raise UserError(f"hidden_act {activation!r} is not supported ({' and '.join(EPILOGUES)} are)")
        if "sliding_attention" in (getattr(args, "layer_types", None) or []):
            raise UserError("layers with a sliding window are not supported")
        attention = model.layers[0].self_attn
        heads, kv_heads = args.num_attention_heads, args.num_key_value_heads
        q, k = (
            layer.weight.shape[0] * (4 if isinstance(layer, BitLinear) else 1)
            for layer in (attention.q_proj, attention.k_proj)
        )
        if heads % kv_heads or q % (2 * heads) or k != q // heads * kv_heads:
            raise UserError(
                f"{heads} attention heads and {kv_heads} key/value heads do not fit projections to {q} and {k}:"
                " heads must be of one even size"
            )
        self.shape = AttentionShape(heads, kv_heads, q // heads, inverse_frequency(attention.rope))
        self.vocab_size: int = args.vocab_size
        self.context: int = args.max_position_embeddings or 1 << 30
        self.eps: float = args.rms_norm_eps
        self.epilogue: Epilogue = EPILOGUES[activation]
        self.embedding = float_weight(model.model.embed_tokens)
        float_head = self.embedding if args.tie_word_embeddings else float_weight(model.lm_head)
        # The ids that the head's rows stand for, where it is trimmed (decode.models.draft_vocabulary).
        self.kept: np.ndarray | None = None
        self._kept_ids: mx.array | None = None
        if "kept" in model:
            self.kept = check_kept(model.kept, self.vocab_size)
            self._kept_ids = mx.array(self.kept, mx.uint32)
            mx.eval(self._kept_ids)
            float_head = float_head[self._kept_ids]
        self.head: DenseWeight | Int8Weight = (
            self.ops.prepare_int8(float_head) if head == "int8" else self.ops.prepare_dense(float_head)
        )
        self._float_head: mx.array | None = None  # for scoring, made when first used
        self.final_norm = model.model.norm.weight.astype(mx.float32)
        self.layers = [self._layer(block) for block in model.layers]
        mx.eval(self.embedding, self.final_norm)
        # Whether plain decoding queues a step before its token is known. On a CPU the host's share of the work would
        # compete with the step before.
        self.queues = device_backend() != "cpu"
        self.whole_step = self.ops.whole_step(
            layers=self.layers,
            embedding=self.embedding,
            final_norm=self.final_norm,
            head=self.head,
            shape=self.shape,
            epilogue=self.epilogue,
            eps=self.eps,
        )
        if self.whole_step is not None:
            self.layers = self.whole_step.share_weights(self.layers)

    def _layer(self, block: nn.Module) -> Layer:
        attention, mlp = block.self_attn, block.mlp

        def norm(parent: nn.Module, name: str) -> mx.array | None:
            return parent[name].weight.astype(mx.float32) if name in parent else None

        return Layer(
            qkv=self._fuse(attention.q_proj, attention.k_proj, attention.v_proj),
            o=self._fuse(attention.o_proj),
            gate_up=self._fuse(mlp.gate_proj, mlp.up_proj),
            down=self._fuse(mlp.down_proj),
            input_norm=block.input_layernorm.weight.astype(mx.float32),
            attention_sub_norm=norm(attention, "attn_sub_norm"),
            post_norm=block.post_attention_layernorm.weight.astype(mx.float32),
            ffn_sub_norm=norm(mlp, "ffn_sub_norm"),
        )

    def _fuse(self, *parts: nn.Module) -> Weight:
        """Stack the outputs of several layers that read the same input into one weight."""
        if isinstance(parts[0], BitLinear):
            scales = np.concatenate([part.scales() for part in parts])
            return self.ops.prepare_ternary(np.concatenate([part.ternary() for part in parts]), scales)
        weight = mx.concatenate([float_weight(part) for part in parts])
        return self.ops.prepare_int8(weight) if self._precision == "int8" else self.ops.prepare_dense(weight)

    def best_tokens(self, logits: mx.array) -> mx.array:
        """The id of each row's highest logit, the lowest among equals.

        float32 [m, vocab] -> uint32 [m], not evaluated.
        """
        best = self.ops.argmax(logits)
        return best if self._kept_ids is None else self._kept_ids[best]

    def over_vocabulary(self, p: np.ndarray) -> np.ndarray:
        """A distribution over the head's rows, float64 [v], as one over all ids, [vocab_size]: zero for the others."""
        if self.kept is None:
            return p
        whole = np.zeros(self.vocab_size, p.dtype)
        whole[self.kept] = p
        return whole

    def new_cache(self) -> KVCache:
        return KVCache(len(self.layers), self.shape.kv_heads, self.shape.head_dim)

    def step(self, tokens: list[int] | np.ndarray | mx.array, cache: KVCache) -> mx.array:
        """Logits of each of a few new tokens; a token's bits are the same alone or among others.

        tokens: m ids, or an array of them that may still be computed. Returns float32 [m, vocab], one logit a
        row of the head; the cache moves on by m. More than eight rows are run in groups of eight.
        """
        cache.reserve(len(tokens))
        groups = [tokens[i : i + SMALL_ROWS] for i in range(0, len(tokens), SMALL_ROWS)]
        logits = [self._small_step(group, cache) for group in groups]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits)

    def continuation(self, tokens: list[int], cache: KVCache, count: int) -> mx.array:
        """The `count` tokens that follow `tokens` greedily, uint32, still being computed.

        tokens: at most eight ids. The cache moves on by all of them and all choices but the last.
        """
        # A cache that grew between two steps would be copied without waiting for the first to write to it.
        rows = len(tokens) + count - 1
        cache.reserve(rows)
        if self.whole_step is not None:
            chosen = self.whole_step.continuation(tokens, cache.keys, cache.values, cache.offset, count, self._kept_ids)
            cache.offset += rows
            mx.async_eval(chosen)
            return chosen
        feed: list[int] | mx.array = tokens
        choices: list[mx.array] = []
        for _ in range(count):
            feed = self.best_tokens(self.step(feed, cache)[-1:])
            mx.async_eval(feed)  # runs while the next one is put together
            choices.append(feed)
        return mx.concatenate(choices)

    def _small_step(self, tokens: list[int] | np.ndarray | mx.array, cache: KVCache) -> mx.array:
        if self.whole_step is not None:
            ids = tokens if isinstance(tokens, mx.array) else [int(t) for t in tokens]
            logits = self.whole_step(ids, cache.keys, cache.values, cache.offset)
            cache.offset += len(tokens)
            return logits
        x = self._extend(mx.array(tokens), cache)
        return self.ops.linear(x, self.head, norm=self.final_norm, eps=self.eps)

    def _extend(self, tokens: mx.array, cache: KVCache) -> mx.array:
        """Put tokens behind the cache. int [m] -> last hidden states, float32 [m, hidden]."""
        cache.reserve(tokens.size)
        x = self.embedding[tokens].astype(mx.float32)
        for i, layer in enumerate(self.layers):
            qkv = self.ops.linear(x, layer.qkv, norm=layer.input_norm, eps=self.eps)
            a, cache.keys[i], cache.values[i] = self.ops.attention(
                qkv, cache.keys[i], cache.values[i], cache.offset, self.shape
            )
            x = self._after_attention(x, a, layer)
        cache.offset += tokens.size
        return x

    def _after_attention(self, x: mx.array, a: mx.array, layer: Layer) -> mx.array:
        """The rest of a layer. x, a: float32 [m, hidden] and [m, heads * head_dim]."""
        linear, eps = self.ops.linear, self.eps
        x = linear(a, layer.o, norm=layer.attention_sub_norm, eps=eps, residual=x)
        h = linear(x, layer.gate_up, norm=layer.post_norm, eps=eps, epilogue=self.epilogue)
        return linear(h, layer.down, norm=layer.ffn_sub_norm, eps=eps, residual=x)

    def prefill(self, tokens: list[int], cache: KVCache) -> None:
        """Put a prompt into the cache, in chunks that plain and speculative decoding share."""
        for start in range(0, len(tokens), PREFILL_CHUNK):
            self._extend(mx.array(tokens[start : start + PREFILL_CHUNK]), cache)
            mx.eval(cache.keys, cache.values)

    def batch_hidden(self, tokens: np.ndarray, document: np.ndarray) -> mx.array:
        """Final hidden states of packed rows, for scoring: attention never crosses a document.

        tokens: int [b, t]; document: int [b, t], 0 is padding. Returns float32 [b, t, hidden],
        already normalised for the head.
        """
        b, t = tokens.shape
        x = self.embedding[mx.array(tokens)].astype(mx.float32).reshape(b * t, -1)
        for layer in self.layers:
            qkv = self.ops.linear(x, layer.qkv, norm=layer.input_norm, eps=self.eps)
            a = self.ops.attention_packed(qkv.reshape(b, t, -1), document, self.shape)
            x = self._after_attention(x, a.reshape(b * t, -1), layer)
        return rms_norm(x, self.final_norm, self.eps).reshape(b, t, -1)

    def batch_prefill(self, tokens: np.ndarray) -> tuple[list[mx.array], list[mx.array]]:
        """Keys and values of a batch of sequences, all from position 0 on.

        tokens: int [s, t]. Returns two lists of a layer's float32 [s, kv_heads, t, head_dim].
        """
        s, t = tokens.shape
        positions = mx.broadcast_to(mx.arange(t)[None], (s, t))
        whole = np.ones((s, t), np.int32)
        keys, values = [], []
        x = self.embedding[mx.array(tokens)].astype(mx.float32).reshape(s * t, -1)
        for layer in self.layers:
            qkv = self.ops.linear(x, layer.qkv, norm=layer.input_norm, eps=self.eps).reshape(s, t, -1)
            _, k, v = split_heads(qkv, positions, self.shape)
            keys.append(k.transpose(0, 2, 1, 3))
            values.append(v.transpose(0, 2, 1, 3))
            a = self.ops.attention_packed(qkv, whole, self.shape)
            x = self._after_attention(x, a.reshape(s * t, -1), layer)
        mx.eval(keys, values)
        return keys, values

    def batch_logits(self, hidden: mx.array) -> mx.array:
        """hidden: float32 [n, hidden], normalised. Returns float32 [n, vocab]."""
        if isinstance(self.head, Int8Weight):
            return self.ops.linear(hidden, self.head)
        if self._float_head is None:
            self._float_head = self.head.data.astype(mx.float32).T
            mx.eval(self._float_head)
        return hidden @ self._float_head

    def batch_step(
        self, tokens: mx.array, positions: mx.array, keys: list[mx.array], values: list[mx.array]
    ) -> mx.array:
        """One new token for each of s sequences, each at its own position.

        tokens, positions: int32 [s]; keys, values: a layer's float32 [s, kv_heads, capacity,
        head_dim] each, replaced in the lists. Returns logits, float32 [s, vocab].
        """
        x = self.embedding[tokens].astype(mx.float32)
        for i, layer in enumerate(self.layers):
            qkv = self.ops.linear(x, layer.qkv, norm=layer.input_norm, eps=self.eps)
            a, keys[i], values[i] = self.ops.attention_batch(qkv, keys[i], values[i], positions, self.shape)
            x = self._after_attention(x, a, layer)
        if len(tokens) <= SMALL_ROWS:
            return self.ops.linear(x, self.head, norm=self.final_norm, eps=self.eps)
        # More rows of a float head go to the library, for which it would be made float32 at every step.
        return self.batch_logits(rms_norm(x, self.final_norm, self.eps))


def float_weight(layer: nn.Module) -> mx.array:
    """The matrix of a (possibly MLX-quantised) linear or embedding layer, bfloat16 or float32."""
    if "bias" in layer:
        raise UserError("linear layers with a bias are not supported")
    if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
        weight = mx.dequantize(
            layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode
        )
        return weight.astype(mx.bfloat16)
    weight = layer.weight
    return weight if weight.dtype in (mx.float32, mx.bfloat16) else weight.astype(mx.float32)


def inverse_frequency(rope: nn.Module) -> mx.array:
    """RoPE's angle a position, float32 [d / 2], of an mlx-lm rope module."""
    from mlx_lm.models.rope_utils import Llama3RoPE

    if isinstance(rope, nn.RoPE) and not rope.traditional:
        exponent = np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims
        return mx.array((rope.scale * rope.base**-exponent).astype(np.float32))
    if isinstance(rope, Llama3RoPE):  # others also scale what they turn, or turn by the length of the text
        return 1.0 / rope._freqs.astype(mx.float32)
    raise UserError(f"this kind of RoPE is not supported: {type(rope).__name__}")
