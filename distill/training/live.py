"""What a draft in training is worth when it decodes: a few held-out prompts through the engine itself.

Agreement is measured where the text before is the teacher's; a draft goes on from its own proposals. So the best
checkpoint is the one that emits most tokens a verification here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np

from decode.drafters import Drafter
from decode.drafters.model import ModelDrafter
from decode.drafters.reader import ReaderDrafter
from decode.engine import Request, generate
from decode.models.checkpoint import Checkpoint
from decode.models.reader import Reader, ReaderConfig
from decode.models.transformer import Precision, Transformer
from distill.training.checkpoint import WEIGHTS, as_saved
from distill.training.draft_config import DraftConfig
from distill.training.loader import Batch
from distill.training.tensors import Tensors, write_tensors
from kernels import backend, reference

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
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.json").write_text(json.dumps(description))
            write_tensors(folder / WEIGHTS, tensors, {"format": "mlx"})
            return ModelDrafter(Checkpoint(folder, "draft", description).load(precision, precision))


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
