"""Sizes of models, from `config.json` alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from decode.models import draft_vocabulary, formats
from kernels import UserError

DRAFT_HEAD_DIM = 64


@dataclass(frozen=True)
class Dimensions:
    """What decides how many bytes a model reads for a token."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    head_rows: int  # fewer than the vocabulary where the head is trimmed
    layer_bits: int = 8  # of a weight of the layers when it decodes: 2 in a BitNet, else int8
    reading: int = 0  # weights of a reader's products before its layers, and of the one behind them
    head_width: int = 0  # inputs of the head, where it is another model's

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> Dimensions:
        """From the config.json of a teacher or a draft; UserError, naming `where` and the key that is no size."""
        try:
            heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
            vocab = _size(config, "vocab_size")
            kv_heads = _size(config, "num_key_value_heads", heads)
            taps, read = config.get(formats.TAPS) or [], 0
            if config.get("model_type") == formats.READER:
                read = _size(config, formats.TEACHER_HIDDEN)
            reading = len(taps) * read * hidden + (read + hidden) * hidden + (hidden * read if hidden != read else 0)
            head_dim = None if config.get("head_dim") is None else _size(config, "head_dim")
            head_rows = _size(config, draft_vocabulary.SIZE, vocab)
            if read:  # it takes in a text's tokens
                head_rows = sum(draft_vocabulary.rows_of_readers(head_rows, vocab))
            return cls(
                layers=_size(config, "num_hidden_layers"),
                hidden=hidden,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=checked_head_dim(hidden, heads, kv_heads, head_dim),
                intermediate=_size(config, "intermediate_size"),
                vocab=vocab,
                head_rows=head_rows,
                layer_bits=2 if formats.is_bitnet(config) else 8,
                reading=reading if read else 0,
                head_width=read,
            )
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    @classmethod
    def of_draft(
        cls, layers: int, hidden: int, *, kv_ratio: float, vocab: int, head_rows: int | None = None
    ) -> Dimensions:
        """The draft that `distill train --layers --hidden --vocab` makes.

        hidden: a multiple of 64; kv_ratio: the teacher's key/value heads over its heads.
        """
        heads = hidden // DRAFT_HEAD_DIM
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=next(d for d in range(1, heads + 1) if heads % d == 0 and d >= heads * kv_ratio),
            head_dim=DRAFT_HEAD_DIM,
            intermediate=64 * math.ceil(hidden * 8 / 3 / 64),
            vocab=vocab,
            head_rows=head_rows or vocab,
        )

    @property
    def kv_ratio(self) -> float:
        return self.kv_heads / self.heads

    @property
    def outputs(self) -> int:
        """Outputs of all linear layers but the head: one scale each where they are quantised."""
        attention = (self.heads + 2 * self.kv_heads) * self.head_dim
        narrower = self.head_width if self.hidden != self.head_width else 0
        reading = 2 * self.hidden + narrower if self.reading else 0
        return reading + self.layers * (attention + 2 * self.hidden + 2 * self.intermediate)

    @property
    def weights(self) -> int:
        """Weights of all linear layers but the head. Those that fuse a teacher's states are read once a round, and are
        among them as if it were for every token."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return self.reading + self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.head_rows * (self.head_width or self.hidden)

    @property
    def parameters(self) -> int:
        """Without norms; the embedding is tied to the head."""
        return self.weights + self.vocab * self.hidden

    def cache_bytes(self, context: int) -> int:
        """Keys and values, bfloat16, of `context` positions."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2 * context


def checked_head_dim(hidden: int, heads: int, kv_heads: int, head_dim: int | None) -> int:
    """The size of a head, hidden / heads where config.json has none; UserError for heads that no attention can have."""
    if heads % kv_heads:
        raise UserError(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, which is {kv_heads}")
    if head_dim is None and hidden % heads:
        raise UserError(f"hidden_size is {hidden}, not a multiple of num_attention_heads, which is {heads}")
    size = head_dim or hidden // heads
    if size % 2:
        raise UserError(f"the size of a head is {size}; RoPE turns pairs, so it has to be even")
    return size


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A size of config.json's; default: where it has none."""
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise UserError(f"has no {key}")
    if type(value) is not int:  # bool is an int to isinstance
        raise UserError(f"{key} is {value!r}, not a whole number")
    if value < 1:
        raise UserError(f"{key} is {value}, not positive")
    return value
