"""A draft that reads its teacher's hidden states, after EAGLE-3 (Li et al., arXiv:2503.01840).

Row t of such a draft stands for position t of a text. It is made of the token behind it, t + 1, and of what the teacher
thought at t: the states that left a few of its layers (the *taps*), each normed, side by side, projected to one *fused*
state. A few decoder layers later (one, mostly) the teacher's head reads from it what token t + 2 will be. Beyond the
text the draft's own last state takes the fused state's place, one row after the other. Embedding and head are the
teacher's and not stored again; the head may be trimmed to a draft vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from decode.models import draft_vocabulary
from decode.models.cache import KVCache
from decode.models.checkpoint import Checkpoint
from decode.models.draft_vocabulary import D2T, check_d2t, over_vocabulary, rows_of_readers
from decode.models.formats import READER, TAPS, TEACHER_HIDDEN
from decode.models.transformer import PREFILL_CHUNK, Precision, Transformer
from kernels import UserError
from kernels.errors import first_line
from kernels.files import read_json
from kernels.ops import AttentionShape, Epilogue, Layer, Weight, stacked
from kernels.packing import unpack_ternary
from kernels.reference import rms_norm

FORMAT_KEY, FORMAT = "bitdraft_format", 1  # of config.json and of the tensors
EPILOGUE: Epilogue = "silu_mul"


@dataclass(frozen=True)
class ReaderConfig:
    """What a reader's config.json says of its shape."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float
    eps: float
    context: int
    vocab_size: int
    taps: tuple[int, ...]
    teacher_hidden: int
    head_size: int | None  # tokens of a trimmed head
    quantization: Mapping[str, Any] | None  # as mlx-lm writes it

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ReaderConfig:
        """From config.json; UserError naming the key that is not right."""
        found = config.get(FORMAT_KEY)
        if found != FORMAT:
            raise UserError(f"{FORMAT_KEY} is {found!r}; this version reads {FORMAT}")
        taps = config.get(TAPS)
        if not (isinstance(taps, list) and taps and all(type(tap) is int and tap >= 0 for tap in taps)):
            raise UserError(f"{TAPS} is {taps!r}, not a list of the teacher's layers")
        if sorted(set(taps)) != taps:
            raise UserError(f"{TAPS} is {taps!r}, not ascending")
        for key in ("rope_theta", "rms_norm_eps"):
            value = config.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise UserError(f"{key} is {value!r}, not a positive number")
        try:
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=int(config["hidden_size"]),
                heads=int(config["num_attention_heads"]),
                kv_heads=int(config["num_key_value_heads"]),
                head_dim=int(config["head_dim"]),
                intermediate=int(config["intermediate_size"]),
                rope_theta=float(config["rope_theta"]),
                eps=float(config["rms_norm_eps"]),
                context=int(config["max_position_embeddings"]),
                vocab_size=int(config["vocab_size"]),
                taps=tuple(taps),
                teacher_hidden=int(config[TEACHER_HIDDEN]),
                head_size=config.get(draft_vocabulary.SIZE),
                quantization=config.get("quantization"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"no usable {error}") from None


def is_reader(draft: Checkpoint) -> bool:
    """Whether a draft reads its teacher's states."""
    return draft.config.get("model_type") == READER


def load_reader(draft: Checkpoint, teacher: Checkpoint, model: Transformer, precision: Precision = "float") -> Reader:
    """A reader for the teacher that it was trained with, loaded as `model`; precision: of its float matrices.

    Raises UserError, naming the folder, where it is another teacher's, or damaged.
    """
    about = read_json(draft.folder / "draft.json").get("teacher")
    made_for = about.get("hash") if isinstance(about, dict) else None
    if made_for != teacher.weights_hash:
        name = about.get("name") if isinstance(about, dict) else "an unknown one"
        raise UserError(f"{draft.folder}: reads the states of {name}, not of {teacher.folder}, whose weights differ")
    try:
        config = ReaderConfig.of(draft.config)
        if config.teacher_hidden != model.embedding.shape[1] or config.vocab_size != model.vocab_size:
            raise UserError(
                f"is for a teacher of width {config.teacher_hidden} and {config.vocab_size} tokens;"
                f" {teacher.folder} has {model.embedding.shape[1]} and {model.vocab_size}"
            )
        if config.taps[-1] >= len(model.layers):
            raise UserError(f"reads layer {config.taps[-1]}; {teacher.folder} has layers 0 to {len(model.layers) - 1}")
        return Reader(config, draft.arrays(), model, teacher.head_weight(model.embedding), precision)
    except UserError as error:
        raise UserError(f"{draft.folder}: {error}") from None
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{draft.folder}: cannot be loaded: {first_line(error)}") from error


def _filled_up(ids: np.ndarray, more: int, vocab_size: int) -> np.ndarray:
    """These ids, and behind them so many of the lowest others there are: int32."""
    others = np.ones(vocab_size, bool)
    others[ids] = False
    return np.concatenate([ids, np.flatnonzero(others)[:more]]).astype(np.int32)


class Reader:
    """A loaded reader, and the arithmetic of its rows. Every product goes through the kernels."""

    def __init__(
        self,
        config: ReaderConfig,
        tensors: Mapping[str, mx.array],
        teacher: Transformer,
        teacher_head: mx.array,
        precision: Precision = "float",
    ) -> None:
        """tensors: as its file has them; teacher_head: bfloat16 or float32 [vocab, hidden], of which the rows of the
        draft vocabulary are taken; precision: of float matrices and the head. UserError where they do not fit."""
        self.config, self._tensors, self._precision = config, tensors, precision
        self.ops, self.embedding, self.taps = teacher.ops, teacher.embedding, config.taps
        self.context = min(config.context, teacher.context)
        self.vocab_size = config.vocab_size
        hidden, read = config.hidden, config.teacher_hidden
        exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
        frequency = mx.array((config.rope_theta**-exponent).astype(np.float32))
        self.shape = AttentionShape(config.heads, config.kv_heads, config.head_dim, frequency)
        self.feature_norms = list(mx.split(self._norm("feature_norm", len(self.taps) * read), len(self.taps)))
        self.fusion = self._weight(hidden, "fusion", inputs=len(self.taps) * read)
        self.embedding_norm = self._norm("embedding_norm", read)
        self.state_norm = self._norm("state_norm", hidden)
        self.input = self._weight(hidden, "input", inputs=read + hidden)
        self.layers = [self._layer(f"layers.{i}.") for i in range(config.layers)]
        self.final_norm = self._norm("norm", hidden)
        self.output = None if hidden == read else self._weight(read, "output", inputs=hidden)
        self.d2t: np.ndarray | None = None  # the ids that the head's rows stand for, where it is trimmed
        self._d2t: mx.array | None = None
        self._teacher_head = teacher_head
        if config.head_size is None:
            self.head = self._prepare(teacher_head)
        else:
            kept = check_d2t(self._tensor(D2T, (config.head_size,)), config.vocab_size)
            self._set_head_ids(_filled_up(kept, self._rows[0] - len(kept), config.vocab_size))
            self.head = self._prepare(teacher_head[self._d2t])
        del self._tensors
        self.fused = self.ops.fused_reader(
            fusion=self.fusion,
            feature_norms=self.feature_norms,
            input=self.input,
            embedding_norm=self.embedding_norm,
            state_norm=self.state_norm,
            layers=self.layers,
            final_norm=self.final_norm,
            output=self.output,
            head=self.head,
            embedding=self.embedding,
            shape=self.shape,
            epilogue=EPILOGUE,
            eps=config.eps,
        )

    def for_text(self, tokens: Sequence[int]) -> Reader:
        """The same reader for the reply to a prompt, whose tokens its trimmed head takes in: as many as there is room
        for, the last ones first.

        A reply names again what it was asked of: two thirds of what a head of frequent tokens lacks is there. All else
        is shared. There is always the same number of rows: on GPUs it is compiled in.
        """
        room = self._rows[1]
        if self.d2t is None or not room:
            return self
        last_first = np.array(list(dict.fromkeys(reversed(tokens))), np.int64)
        besides = last_first[~np.isin(last_first, self.d2t)][:room]
        whole = _filled_up(np.concatenate([self.d2t, besides]), room - len(besides), self.vocab_size)
        made = copy.copy(self)
        made._set_head_ids(whole)
        rows = self._prepare(self._teacher_head[mx.array(whole[len(self.d2t) :], mx.uint32)])
        made.head = stacked(self.head, rows)
        made.fused = None if self.fused is None else self.fused.with_head(made.head)
        return made

    @property
    def _rows(self) -> tuple[int, int]:
        """Of a trimmed head, without and for a text's own tokens."""
        return rows_of_readers(self.config.head_size or self.vocab_size, self.vocab_size)

    def _set_head_ids(self, ids: np.ndarray) -> None:
        self.d2t, self._d2t = ids, mx.array(ids, mx.uint32)
        mx.eval(self._d2t)

    def _tensor(self, name: str, shape: tuple[int, ...] | None = None) -> mx.array:
        if name not in self._tensors:
            raise UserError(f"its tensor {name} is missing")
        tensor = self._tensors[name]
        if shape is not None and tensor.shape != shape:
            raise UserError(f"its tensor {name} is {list(tensor.shape)}, config.json asks for {list(shape)}")
        return tensor

    def _norm(self, name: str, size: int) -> mx.array:
        weight = self._tensor(f"{name}.weight", (size,)).astype(mx.float32)
        mx.eval(weight)
        return weight

    def _layer(self, prefix: str) -> Layer:
        c = self.config
        heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def sub_norm(name: str, size: int) -> mx.array | None:
            return self._norm(prefix + name, size) if f"{prefix}{name}.weight" in self._tensors else None

        qkv = [f"{prefix}self_attn.{part}_proj" for part in "qkv"]
        return Layer(
            qkv=self._weight(heads + 2 * kv_heads, *qkv, inputs=c.hidden),
            o=self._weight(c.hidden, f"{prefix}self_attn.o_proj", inputs=heads),
            gate_up=self._weight(2 * c.intermediate, f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj", inputs=c.hidden),
            down=self._weight(c.hidden, f"{prefix}mlp.down_proj", inputs=c.intermediate),
            input_norm=self._norm(f"{prefix}input_layernorm", c.hidden),
            attention_sub_norm=sub_norm("self_attn.attn_sub_norm", heads),
            post_norm=self._norm(f"{prefix}post_attention_layernorm", c.hidden),
            ffn_sub_norm=sub_norm("mlp.ffn_sub_norm", c.intermediate),
        )

    def _weight(self, outputs: int, *names: str, inputs: int) -> Weight:
        """Matrices that read the same input, stacked: ternary ones in BitNet's packing, or float ones."""
        if self._tensor(f"{names[0]}.weight").dtype == mx.uint8:
            parts = [unpack_ternary(np.array(self._tensor(f"{name}.weight")), name) for name in names]
            scales = [np.array(self._tensor(f"{name}.weight_scale", (1,)).astype(mx.float32)) for name in names]
            ternary = np.concatenate(parts)
            self._check_shape(names, ternary.shape, (outputs, inputs))
            repeated = np.repeat(np.concatenate(scales), [len(part) for part in parts])
            return self.ops.prepare_ternary(ternary, repeated)
        weight = mx.concatenate([self._float(name) for name in names])
        self._check_shape(names, weight.shape, (outputs, inputs))
        return self._prepare(weight)

    def _check_shape(self, names: tuple[str, ...], found: tuple[int, ...], wanted: tuple[int, int]) -> None:
        if found != wanted:
            raise UserError(f"{' and '.join(names)}: {list(found)}, config.json asks for {list(wanted)}")

    def _float(self, name: str) -> mx.array:
        """A float matrix, dequantised where mlx has quantised it."""
        weight = self._tensor(f"{name}.weight")
        if weight.dtype != mx.uint32:
            return weight if weight.dtype in (mx.bfloat16, mx.float32) else weight.astype(mx.float32)
        quantization = self.config.quantization or {}
        return mx.dequantize(
            weight,
            self._tensor(f"{name}.scales"),
            self._tensor(f"{name}.biases"),
            group_size=quantization.get("group_size"),
            bits=quantization.get("bits"),
        ).astype(mx.bfloat16)

    def _prepare(self, weight: mx.array) -> Weight:
        return self.ops.prepare_int8(weight) if self._precision == "int8" else self.ops.prepare_dense(weight)

    def new_cache(self) -> KVCache:
        return KVCache(len(self.layers), self.shape.kv_heads, self.shape.head_dim)

    def fuse(self, hidden: Mapping[int, mx.array]) -> mx.array:
        """The teacher's states of some positions, float32 [m, teacher_hidden] by tap, as one each: [m, hidden]."""
        normed = [
            rms_norm(hidden[tap], weight, self.config.eps)
            for tap, weight in zip(self.taps, self.feature_norms, strict=True)
        ]
        return self.ops.linear(mx.concatenate(normed, axis=-1), self.fusion)

    def forward(self, tokens: mx.array, states: mx.array, cache: KVCache) -> mx.array:
        """New rows behind those of the cache, which moves on.

        tokens: ids [m], each the one behind its row's position; states: float32 [m, hidden], fused ones, or the draft's
        own. Returns what leaves the last layer, float32 [m, hidden].
        """
        cache.reserve(len(tokens))
        eps = self.config.eps
        embedded = rms_norm(self.embedding[tokens].astype(mx.float32), self.embedding_norm, eps)
        x = self.ops.linear(mx.concatenate([embedded, rms_norm(states, self.state_norm, eps)], axis=-1), self.input)
        for i, layer in enumerate(self.layers):
            attend = partial(cache.attend, i, ops=self.ops, shape=self.shape)
            x = layer.run(x, self.ops.linear, attend, EPILOGUE, eps)
        cache.advance(len(tokens))
        return x

    def prefill(self, tokens: mx.array, hidden: Mapping[int, mx.array], cache: KVCache) -> None:
        """Put rows into the cache, of which nothing is proposed; hidden: as for `fuse`."""
        for start in range(0, len(tokens), PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            self.forward(tokens[part], self.fuse({tap: rows[part] for tap, rows in hidden.items()}), cache)
            mx.eval(cache.keys, cache.values)

    def logits(self, states: mx.array) -> mx.array:
        """float32 [m, head], of what leaves the last layer."""
        eps = self.config.eps
        if self.output is None:
            return self.ops.linear(states, self.head, norm=self.final_norm, eps=eps)
        return self.ops.linear(self.ops.linear(states, self.output, norm=self.final_norm, eps=eps), self.head)

    def greedy_tokens(self, tokens: list[int], hidden: Mapping[int, mx.array], cache: KVCache, count: int) -> mx.array:
        """The `count` tokens that follow greedily behind new rows, uint32, not evaluated.

        tokens: 1..SMALL_ROWS ids, each the one behind its row's position; hidden: the teacher's states of these, as for
        `fuse`. The cache moves on by all rows and all choices but the last.
        """
        if self.fused is not None:
            rows = len(tokens) + count - 1
            cache.reserve(rows)
            states = [hidden[tap] for tap in self.taps]
            chosen = self.fused.greedy_tokens(tokens, states, cache.keys, cache.values, cache.offset, count, self._d2t)
            cache.advance(rows)
            return chosen
        state = self.forward(mx.array(tokens, mx.uint32), self.fuse(hidden), cache)[-1:]
        choices = [self.best_tokens(self.logits(state))]
        while len(choices) < count:
            state = self.forward(choices[-1], state, cache)
            choices.append(self.best_tokens(self.logits(state)))
        return mx.concatenate(choices)

    def best_tokens(self, logits: mx.array) -> mx.array:
        """The id of each row's highest logit, the lowest among equals: float32 [m, head] -> uint32 [m]."""
        best = self.ops.argmax(logits)
        return best if self._d2t is None else self._d2t[best]

    def over_vocabulary(self, p: np.ndarray) -> np.ndarray:
        """A distribution over the head's rows, float64 [v], as one over all ids."""
        return over_vocabulary(p, self.d2t, self.vocab_size)
