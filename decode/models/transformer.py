"""One forward pass for teachers and drafts, over weights that mlx-lm has loaded.

A layer is four `linear` calls and one attention of the kernels, whatever the weights are: ternary with sub-norms and
squared ReLU (BitNet) or float with SiLU (Llama). Activations are float32. `forward` runs new tokens of one sequence, of
several, or packed rows; `step` is the lossless path of one sequence's next tokens, and `prefill` that of its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from decode.models.cache import KVCache, NewRows, Packed
from decode.models.draft_vocabulary import check_d2t, over_vocabulary
from kernels import BitLinear, UserError, backend
from kernels.backends import device_backend
from kernels.ops import (
    SMALL_ROWS,
    AttentionShape,
    Backend,
    ChoosesTokens,
    DenseWeight,
    Epilogue,
    Int8Weight,
    Layer,
    Weight,
)
from kernels.reference import rms_norm

Tokens = Sequence[int] | np.ndarray | mx.array
Precision = Literal["float", "int8"]
ACTIVATIONS = {"bitnet": "relu2", "llama": "silu"}  # of a model type, where config.json names none
EPILOGUES: dict[str, Epilogue] = {"relu2": "relu2_mul", "silu": "silu_mul"}
PREFILL_CHUNK = 512


@dataclass
class Forward:
    """What a forward pass gives; nothing of it is evaluated.

    hidden: by tapped layer, float32 [rows, hidden], what leaves that layer, before any norm.
    """

    hidden: dict[int, mx.array]
    _logits: Callable[[], mx.array]

    @cached_property
    def logits(self) -> mx.array:
        """float32 [rows, vocab], one logit a row of the head. Who does not read them does not pay for them."""
        return self._logits()


class Transformer:
    """A decoder-only model whose every product goes through the kernels."""

    def __init__(
        self, model: nn.Module, config: dict[str, Any], head: Precision = "float", layers: Precision = "float"
    ) -> None:
        """model: an mlx-lm `bitnet` or `llama` model, BitLinear already swapped; config: its config.json.

        head: "float" as the checkpoint has it, or "int8", rounded to 8 bits (kernels.ops.Int8Weight);
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
        self.d2t: np.ndarray | None = None
        self._d2t: mx.array | None = None
        if "kept" in model:
            self.d2t = check_d2t(model.kept, self.vocab_size)
            self._d2t = mx.array(self.d2t, mx.uint32)
            mx.eval(self._d2t)
            float_head = float_head[self._d2t]
        self.head: DenseWeight | Int8Weight = (
            self.ops.prepare_int8(float_head) if head == "int8" else self.ops.prepare_dense(float_head)
        )
        self._float_head: mx.array | None = None  # for scoring, made when first used
        self.final_norm = model.model.norm.weight.astype(mx.float32)
        self.layers = [self._layer(block) for block in model.layers]
        mx.eval(self.embedding, self.final_norm)
        # Whether plain decoding queues a step before its token is known. On a CPU the host's share of the work would
        # compete with the step before.
        self.async_decode = device_backend() != "cpu"
        self.fused_step = self.ops.fused_step(
            layers=self.layers,
            embedding=self.embedding,
            final_norm=self.final_norm,
            head=self.head,
            shape=self.shape,
            epilogue=self.epilogue,
            eps=self.eps,
        )
        if self.fused_step is not None:
            self.layers = self.fused_step.share_weights(self.layers)

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

    def forward(self, tokens: Tokens, cache: KVCache | NewRows | Packed, taps: Sequence[int] = ()) -> Forward:
        """New tokens behind what a cache holds, or packed rows; the cache moves on.

        tokens: ids of one sequence [m], of as many as the cache has [s, t], of some [m], or of packed rows [b, t]; an
        array of them may still be computed. Rows of the result lie in this order. taps: layers whose states are asked
        for.

        A row's bits do not depend on other sequences, nor on the other rows of its own where these are at most
        SMALL_ROWS. More of them (a chunk of a prompt) may be left to a library, as one.
        """
        ids = tokens if isinstance(tokens, mx.array) else np.asarray(tokens, np.int32)
        rows = ids.shape[-1]
        cache.reserve(rows)
        x = self.embedding[mx.array(ids).reshape(-1)].astype(mx.float32)
        hidden = {}
        for i, layer in enumerate(self.layers):
            attend = partial(cache.attend, i, ops=self.ops, shape=self.shape)
            x = layer.run(x, self.ops.linear, attend, self.epilogue, self.eps)
            if i in taps:
                hidden[i] = x
        cache.advance(rows)
        return Forward(hidden, lambda: self._head_of(x))

    def step(self, tokens: Tokens, cache: KVCache, taps: Sequence[int] = ()) -> Forward:
        """The lossless path: a few new tokens of one sequence, each with the bits that it has alone.

        As `forward`, but more than SMALL_ROWS tokens are run in groups of so many, and through the fused step where
        there is one; with taps, where that hands out states.
        """
        cache.reserve(len(tokens))
        groups = [self._few(tokens[i : i + SMALL_ROWS], cache, taps) for i in range(0, len(tokens), SMALL_ROWS)]
        if len(groups) == 1:
            return groups[0]
        hidden = {tap: mx.concatenate([group.hidden[tap] for group in groups]) for tap in taps}
        return Forward(hidden, lambda: mx.concatenate([group.logits for group in groups]))

    def _few(self, tokens: Tokens, cache: KVCache, taps: Sequence[int]) -> Forward:
        """At most SMALL_ROWS tokens of one sequence."""
        if self.fused_step is None or (taps and not self.fused_step.TAPS):
            return self.forward(tokens, cache, taps)
        ids = tokens if isinstance(tokens, mx.array) else np.asarray(tokens, np.int32).tolist()
        logits, hidden = self.fused_step(ids, cache.keys, cache.values, cache.offset, taps)
        cache.advance(len(tokens))
        return Forward(hidden, lambda: logits)

    def prefill(self, tokens: Tokens, cache: KVCache, taps: Sequence[int] = ()) -> dict[int, mx.array]:
        """Put a prompt of one sequence into the cache, and return its tapped states, float32 [m, hidden] a layer.

        In chunks counted from the sequence's start, so that plain and speculative decoding share them.
        """
        chunks: list[dict[int, mx.array]] = []
        start = 0
        while start < len(tokens):
            end = start + PREFILL_CHUNK - cache.offset % PREFILL_CHUNK
            chunks.append(self.forward(tokens[start:end], cache, taps).hidden)
            mx.eval(cache.keys, cache.values, chunks[-1])
            start = end
        nothing = mx.zeros((0, self.embedding.shape[1]))
        return {tap: mx.concatenate([nothing, *(chunk[tap] for chunk in chunks)]) for tap in taps}

    def greedy_tokens(self, tokens: list[int], cache: KVCache, count: int) -> mx.array:
        """The `count` tokens that follow `tokens` greedily, uint32, still being computed.

        tokens: at most SMALL_ROWS ids of one sequence. The cache moves on by all of them and all choices but the last.
        """
        rows = len(tokens) + count - 1
        cache.reserve(rows)
        if self.fused_step is not None:
            chosen = self.fused_step.greedy_tokens(tokens, cache.keys, cache.values, cache.offset, count, self._d2t)
            cache.advance(rows)
            mx.async_eval(chosen)
            return chosen
        feed: list[int] | mx.array = tokens
        choices: list[mx.array] = []
        for _ in range(count):
            feed = self.best_tokens(self.step(feed, cache).logits[-1:])
            mx.async_eval(feed)  # runs while the next one is put together
            choices.append(feed)
        return mx.concatenate(choices)

    def choose_next(
        self,
        tokens: mx.array,
        cache: KVCache,
        sequences: Sequence[int],
        temperature: np.ndarray,
        uniform: np.ndarray,
    ) -> mx.array:
        """A step of some sequences of a cache, by one token each, and the choice behind it (kernels.ops, `choose`).

        tokens: uint32 [m]; sequences: whose they are, ascending; temperature, uniform: float32 [m]. Returns uint32 [m],
        not evaluated.
        """
        cache.reserve(1)
        if isinstance(self.fused_step, ChoosesTokens):
            offsets = [cache.offsets[i] for i in sequences]
            chosen = self.fused_step.choose_tokens(
                tokens, cache.keys, cache.values, sequences, offsets, temperature, uniform
            )
            for i in sequences:
                cache.offsets[i] += 1
        else:
            counts = np.zeros(len(cache.offsets), int)
            counts[list(sequences)] = 1
            logits = self.forward(tokens, NewRows(cache, counts.tolist())).logits
            chosen = self.ops.choose(logits, mx.array(temperature), mx.array(uniform))
        return chosen if self._d2t is None else self._d2t[chosen]

    def new_cache(self, sequences: int = 1) -> KVCache:
        return KVCache(len(self.layers), self.shape.kv_heads, self.shape.head_dim, sequences)

    def normed(self, hidden: mx.array) -> mx.array:
        """What leaves the last layer, behind the final norm, as the head reads it. float32 [..., hidden]."""
        return rms_norm(hidden, self.final_norm, self.eps)

    def logits(self, hidden: mx.array) -> mx.array:
        """For scoring, in chunks as large as there is memory for. hidden: float32 [n, hidden], `normed`.

        Returns float32 [n, vocab].
        """
        if isinstance(self.head, Int8Weight):
            return self.ops.linear(hidden, self.head)
        if self._float_head is None:
            self._float_head = self.head.data.astype(mx.float32).T
            mx.eval(self._float_head)
        return hidden @ self._float_head

    def _head_of(self, x: mx.array) -> mx.array:
        """The logits of what leaves the last layer."""
        return self.ops.linear(x, self.head, norm=self.final_norm, eps=self.eps)

    def best_tokens(self, logits: mx.array) -> mx.array:
        """The id of each row's highest logit, the lowest among equals.

        float32 [m, vocab] -> uint32 [m], not evaluated.
        """
        best = self.ops.argmax(logits)
        return best if self._d2t is None else self._d2t[best]

    def over_vocabulary(self, p: np.ndarray) -> np.ndarray:
        """A distribution over the head's rows, float64 [v], as one over all ids, [vocab_size]."""
        return over_vocabulary(p, self.d2t, self.vocab_size)


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
