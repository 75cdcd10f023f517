"""Drafts with a trimmed head: a Llama or a BitNet that reads every token and can only propose some.

Its folder holds what a stock Llama's does and an int32 tensor `kept`: the ids, ascending, that the head has rows
for. Row i of the head is row kept[i] of the embedding. A stock loader would take the whole embedding for the head, and
propose tokens that were never trained; so the model type is one that no stock loader knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kernels import UserError
from kernels.ops import OUTPUTS_A_BLOCK

MODEL_TYPE = "bitdraft_trimmed_llama"
D2T = "kept"  # the tensor of the ids, as files call it
SIZE = "head_vocab_size"  # in config.json: how many ids are kept
OF_TEXT = 256  # rows that a reader's trimmed head has besides, for a text's own tokens


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """Model and arguments for a config.json of MODEL_TYPE, as `mlx_lm.utils.load_model` asks for them."""
    from mlx_lm.models import bitnet, llama

    ternary = "quantization_config" in config
    module: Any = bitnet if ternary else llama

    @dataclass
    class Args(module.ModelArgs):  # type: ignore[misc]
        head_vocab_size: int = 0

        def __post_init__(self) -> None:
            if not ternary:
                super().__post_init__()
            self.model_type = "bitnet" if ternary else "llama"  # what it is apart from its head

    class Model(module.Model):  # type: ignore[misc]
        def __init__(self, args: Args) -> None:
            super().__init__(args)
            self.kept = mx.zeros((args.head_vocab_size,), mx.int32)

    return Model, Args


def check_d2t(kept: mx.array, vocab_size: int) -> np.ndarray:
    """The ids of a trimmed head, int32 [v]; UserError where they are not ascending ids of the vocabulary."""
    ids = np.array(kept)
    if ids.dtype != np.int32 or ids.ndim != 1 or not len(ids):
        raise UserError(f"its tensor `kept` is {ids.dtype} {list(ids.shape)}, not int32 ids")
    if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= vocab_size:
        raise UserError(f"its tensor `kept` does not hold ascending ids of a vocabulary of {vocab_size}")
    return ids


def rows_of_readers(kept: int, vocab_size: int) -> tuple[int, int]:
    """How many rows a reader's head has that keeps so many ids: filled up to a block of the kernels' layout, and for
    the tokens of a text besides."""
    filled = min(vocab_size, -(-kept // OUTPUTS_A_BLOCK) * OUTPUTS_A_BLOCK)
    return filled, min(OF_TEXT, (vocab_size - filled) // OUTPUTS_A_BLOCK * OUTPUTS_A_BLOCK)


def over_vocabulary(p: np.ndarray, d2t: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """A distribution over a head's rows, float64 [v], as one over all ids, [vocab_size]: zero for those that a trimmed
    head lacks. d2t: the ids of its rows; None for all."""
    if d2t is None:
        return p
    whole = np.zeros(vocab_size, p.dtype)
    whole[d2t] = p
    return whole
