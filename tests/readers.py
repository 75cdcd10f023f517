"""Drafts that read the small teacher's hidden states, made up for tests: random weights, nothing learnt."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from decode.models.checkpoint import find_model, find_teacher
from decode.models.reader import Reader, load_reader
from decode.models.transformer import Precision, Transformer
from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import reader

TAPS = (0, 2, 3)


def make(
    folder: Path, teacher: Path, hidden: int = 64, *, layers: int = 1, ternary: bool = False, kept: int = 0
) -> Path:
    """A draft in a folder. kept: tokens of its head, spread over the vocabulary; all by default."""
    size = DraftConfig.for_teacher(teacher, layers, hidden).vocab_size
    d2t = np.linspace(0, size - 1, kept).astype(np.int32) if kept else None
    config = DraftConfig.for_teacher(teacher, layers, hidden, kept or None, TAPS, ternary)
    about = {"complete": True, "teacher": {"name": "small", "hash": find_teacher(str(teacher)).weights_hash}}
    checkpoint.save(folder, lively(config), config, teacher, about, d2t=d2t)
    return folder


def lively(config: DraftConfig) -> dict[str, mx.array]:
    """Fresh weights, but no norm is all ones, and bfloat16 holds them."""
    rng = np.random.default_rng(5)
    weights = reader.create(config, 3)
    for name, weight in weights.items():
        factor = mx.array(rng.uniform(0.5, 1.5, weight.shape).astype(np.float32)) if weight.ndim == 1 else 1.0
        weights[name] = (weight * factor).astype(mx.bfloat16).astype(mx.float32)
    return weights


def load(folder: Path, teacher: Path, model: Transformer, precision: Precision = "float") -> Reader:
    """The draft as decoding has it."""
    return load_reader(find_model(str(folder), "--draft"), find_teacher(str(teacher)), model, precision)
