"""Which tokens a draft's head keeps, where it is trimmed: the frequent ones and all that are special.

A draft reads its head for every token it proposes, and with a large vocabulary the head is most of it. Tokens that
the teacher hardly says cost a little acceptance when the draft cannot propose them, and time when it can.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decode.models.checkpoint import token_table
from decode.tokenizer import Tokenizer
from distill.data.joined import Datasets
from distill.data.shards import Dataset
from kernels.errors import UserError
from kernels.files import read_json


@dataclass(frozen=True)
class DraftVocabulary:
    """The tokens of a trimmed head. d2t: int32, their ids, ascending; size: of the whole vocabulary; coverage: the
    share of a dataset's targets that are among them."""

    d2t: np.ndarray
    size: int
    coverage: float

    def metadata(self) -> dict[str, Any]:
        """For draft.json and logs."""
        return {"kept": len(self.d2t), "size": self.size, "coverage": self.coverage}


def select_draft_vocabulary(dataset: Dataset | Datasets, n: int, teacher_folder: Path) -> DraftVocabulary:
    """The n tokens that are targets most often, and all special tokens beside them."""
    size = dataset.settings.vocab_size
    if not 1 <= n < size:
        raise UserError(f"--vocab {n}: must be 1 to {size - 1}; without it the head has all {size} tokens")
    counts = target_counts(dataset)
    return _covering(most_frequent(counts, n, special_tokens(teacher_folder, size)), counts)


def as_draft_vocabulary(dataset: Dataset | Datasets, d2t: np.ndarray) -> DraftVocabulary:
    """The tokens that a draft has already, int32, ascending."""
    return _covering(d2t, target_counts(dataset))


def _covering(d2t: np.ndarray, counts: np.ndarray) -> DraftVocabulary:
    return DraftVocabulary(d2t, len(counts), float(counts[d2t].sum() / max(1, counts.sum())))


def target_counts(dataset: Dataset | Datasets) -> np.ndarray:
    """How often each token follows a trained position of its document, int64 [vocab_size]."""
    counts = np.zeros(dataset.settings.vocab_size, np.int64)
    for i in range(len(dataset.shards)):
        tokens, trained, segments = dataset.read_text(i)
        targets = trained[:, :-1] & (segments[:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:])
        counts += np.bincount(tokens[:, 1:][targets], minlength=len(counts))
    return counts


def most_frequent(counts: np.ndarray, n: int, always: Iterable[int]) -> np.ndarray:
    """The n ids of the largest counts, lower ids first among equals, and those of `always`: int32, ascending."""
    order = np.argsort(-counts, kind="stable")[:n]
    return np.union1d(order, np.fromiter(always, np.int64)).astype(np.int32)


def special_tokens(teacher_folder: Path, vocab_size: int) -> set[int]:
    """Ids that no head may lack: special tokens, and whatever ends or begins a text."""
    ids = {token_id for token_id, (_, special) in token_table(teacher_folder).items() if special}
    ids |= Tokenizer(teacher_folder).end_tokens
    config = read_json(teacher_folder / "config.json")
    for name in ("bos_token_id", "eos_token_id"):
        value = config.get(name)
        ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    return {token_id for token_id in ids if 0 <= token_id < vocab_size}
