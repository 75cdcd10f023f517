"""Several datasets read as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import dataset, teacher_folder

from distill.data.joined import Datasets
from distill.data.shards import Dataset
from kernels.errors import UserError


def test_datasets_of_one_kind_are_joined_and_others_named(tmp_path: Path) -> None:
    teacher = teacher_folder(tmp_path / "t")
    logits, drawn = dataset(tmp_path / "logits", teacher), dataset(tmp_path / "drawn", teacher, sampled=8)
    with pytest.raises(UserError, match=r"drawn: has another k \(none, not 8\) than .*logits"):
        Datasets.open([logits, drawn])
    with pytest.raises(UserError, match=r"logits: has another k \(8, not none\) than .*drawn"):
        Datasets.open([drawn, logits])
    with pytest.raises(UserError, match="drawn: is there twice"):
        Datasets.open([drawn, drawn])
    more = dataset(tmp_path / "more", teacher, shards=2, sampled=8)
    joined, parts = Datasets.open([drawn, more]), [Dataset.open(folder) for folder in (drawn, more)]
    assert joined.tokens == sum(part.tokens for part in parts)
    blocks = [block for part in parts for block in part]
    assert len(joined.shards) == len(blocks)
    for i, block in enumerate(blocks):
        assert (joined.read(i).tokens == block.tokens).all() and (joined.read_text(i)[0] == block.tokens).all()
