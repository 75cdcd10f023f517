"""What a draft in training is worth when it decodes: a few held-out prompts through the engine itself.

Agreement is measured where the text before is the teacher's; a draft goes on from its own proposals. So the best
checkpoint is the one that emits most tokens a verification here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from decode.drafters import Drafter
from decode.drafters.model import ModelDrafter
from decode.drafters.reader import ReaderDrafter
from decode.engine import Request, generate
from decode.models import draft_vocabulary
from decode.models.formats import PACKED
from decode.models.reader import Reader, ReaderConfig
from decode.models.transformer import Precision, Transformer
from distill.training.checkpoint import as_saved
from distill.training.draft_config import DraftConfig
from distill.training.loader import Batch
from distill.training.tensors import Tensors
from kernels import backend, reference, swap_bitlinear

K = 3  # tokens drafted before each verification
TOKENS = 48  # new ones a prompt
OF_TEXT = 32  # tokens of a document that is learnt from its first one on


class Live:
    """The teacher, and what it is asked."""

    def __init__(
        self,
        teacher: Transformer,
        teacher_head: mx.array,
        prompts: Sequence[list[int]],
        end_tokens: frozenset[int],
        config: DraftConfig,
        bits: int | None,
        d2t: np.ndarray | None,
    ) -> None:
        """teacher_head: its output layer's matrix; config, bits, d2t: of the draft, as `checkpoint.save` takes them."""
        self.teacher, self.teacher_head, self.prompts, self.end_tokens = teacher, teacher_head, prompts, end_tokens
        self.config, self.bits, self.d2t = config, bits, d2t

    def tokens_per_verification(self, weights: Tensors) -> float:
        """1 + accepted / rounds of greedy replies, with the draft as it would be saved."""
        drafter = self._drafter(weights)
        rounds = accepted = 0
        for prompt in self.prompts:
            for found in generate(self.teacher, Request(prompt, TOKENS, self.end_tokens), drafter, K):
                rounds += found.drafted > 0
                accepted += found.accepted
        return 1 + accepted / rounds if rounds else 1.0

    def _drafter(self, weights: Tensors) -> Drafter:
        precision: Precision = "float" if backend() is reference else "int8"
        description, tensors = as_saved(weights, self.config, self.bits, self.d2t)
        if self.config.taps:
            draft = Reader(ReaderConfig.of(description), tensors, self.teacher, self.teacher_head, precision)
            return ReaderDrafter(draft)
        return ModelDrafter(loaded(description, tensors, precision))


def loaded(description: dict[str, Any], tensors: Tensors, precision: Precision) -> Transformer:
    """A standalone draft as `Checkpoint.load` would have it, from what its files hold."""
    from mlx_lm.models import bitnet, llama

    module: Any = bitnet if description["model_type"] == "bitnet" else llama
    kind, arguments = module.Model, module.ModelArgs
    if description["model_type"] == draft_vocabulary.MODEL_TYPE:
        kind, arguments = draft_vocabulary.model_classes(description)
    model = kind(arguments.from_dict(description))
    if quantization := description.get("quantization"):
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            class_predicate=lambda path, module: f"{path}.scales" in tensors,
        )
    model.load_weights(list(tensors.items()))
    return Transformer(swap_bitlinear(model, PACKED), description, precision, precision)


def held_out_prompts(batches: Sequence[Batch], count: int, context: int) -> list[list[int]]:
    """At most so many prompts, evenly over the documents of held-out rows: of each what stands before its first trained
    token, or its first OF_TEXT tokens where that is the first of all. context: the teacher's."""
    found: list[list[int]] = []
    for batch in batches:
        t = batch.tokens.shape[1]
        trained = np.zeros(batch.tokens.size, bool)
        where = np.arange(batch.tokens.size) if batch.positions is None else batch.positions
        trained[where[batch.weights > 0]] = True
        for row, line in enumerate(batch.segments):
            borders = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), t]
            for start, end in pairwise(borders):
                first = np.flatnonzero(trained[row * t + start : row * t + end])
                if not line[start] or not len(first):
                    continue
                length = int(first[0]) + 1 if first[0] else OF_TEXT
                if length < min(end - start, context):
                    found.append(batch.tokens[row, start : start + length].tolist())
    if len(found) <= count:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
