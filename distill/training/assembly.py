"""What computes a run's gradients, put together from its settings: the kind of draft, its head, and the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from decode.models.checkpoint import find_model
from decode.models.transformer import Transformer
from distill.training import cpu
from distill.training.draft_config import DraftConfig
from distill.training.drafts import Trainable
from distill.training.drafts.layers import masked_attention
from distill.training.drafts.llama import Standalone
from distill.training.drafts.reader import CachedFeatures, ReaderInTraining
from distill.training.loader import Batch
from distill.training.losses import FusedHead
from distill.training.memory import is_narrow
from distill.training.settings import TrainSettings
from distill.training.step import Step, TrimmedHead


@dataclass(frozen=True)
class LoadedTeacher:
    """A teacher in memory. head: its output layer's matrix, bfloat16 or float32 [vocab, hidden]."""

    model: Transformer
    head: mx.array

    @classmethod
    def load(cls, folder: Path) -> LoadedTeacher:
        checkpoint = find_model(str(folder), "--teacher")
        model = checkpoint.load()
        return cls(model, checkpoint.head_weight(model.embedding))


def make_step(
    settings: TrainSettings,
    config: DraftConfig,
    teacher_folder: Path,
    teacher: LoadedTeacher | None,
    d2t: np.ndarray | None,
    first: Batch | None = None,
    feature_bytes: int = 0,
) -> Step:
    """The step of a run.

    teacher: needed by a draft that reads it; d2t: int32, the ids that a trimmed head has rows for; first: the batch
    that a fresh reader is scaled by; feature_bytes: in which what a reader reads is kept for the next pass.
    """
    on_gpu, narrow = mx.default_device() == mx.Device(mx.gpu), is_narrow(settings.dtype)
    draft = _trainable(settings, config, teacher_folder, teacher, d2t, first, feature_bytes)
    head_type = FusedHead if on_gpu or narrow else cpu.CpuHead
    head = head_type(
        settings.loss,
        settings.temperature,
        chunk_bytes=(256 if on_gpu else 32) << 20,
        eager=not on_gpu,
        frozen=draft.frozen_head,
    )
    return Step(
        draft,
        head,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        dtype=mx.bfloat16 if narrow else mx.float32,
        trimmed=None if d2t is None else TrimmedHead(d2t, config.vocab_size),
    )


def _trainable(
    settings: TrainSettings,
    config: DraftConfig,
    teacher_folder: Path,
    teacher: LoadedTeacher | None,
    d2t: np.ndarray | None,
    first: Batch | None,
    feature_bytes: int,
) -> Trainable:
    plain = mx.default_device() == mx.Device(mx.gpu) or is_narrow(settings.dtype)
    attention = masked_attention if plain else cpu.attention
    kept = None if d2t is None else mx.array(d2t)
    if not config.taps:
        start = teacher_folder if settings.teacher_embedding else None
        return Standalone(config, attention, kept, start, settings.seed)
    assert teacher is not None
    return ReaderInTraining(
        config,
        CachedFeatures(teacher.model, config.taps, feature_bytes),
        teacher.model.embedding,
        teacher.head if kept is None else teacher.head[kept],
        settings.step_weights,
        first,
        attention,
        settings.seed,
    )
