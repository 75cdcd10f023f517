"""Which draft a command takes when none is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import SHIPPED, TEACHER, changed_copy

from decode.metrics import VERSION
from decode.models import drafts
from decode.models.checkpoint import Checkpoint, find_model, find_teacher
from decode.models.drafts import default_draft, find_draft
from kernels import UserError, backend
from kernels.device import device_name


@pytest.fixture(scope="module")
def teacher() -> Checkpoint:
    return find_teacher(None)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for drafts, where nothing is shipped."""
    monkeypatch.setattr(drafts, "SHIPPED", tmp_path / "checkpoints")
    return tmp_path / "runs"


def make_draft(folder: Path, about: object, age: int = 0) -> Path:
    """A folder with weights of its own and this draft.json."""
    changed_copy(TEACHER, folder, draft__json=json.dumps(about).encode(), model__safetensors=None)
    mx.save_safetensors(str(folder / "model.safetensors"), {"weight": mx.random.normal((4,))})
    os.utime(folder / "draft.json", (age, age))
    return folder


def evaluated(folder: Path, draft: Path, speedup: float, teacher: Checkpoint, **changed: Any) -> None:
    """An evaluation.json in `folder`, as `distill evaluate` writes it on this device."""
    report = {
        "complete": True,
        "identical": True,
        "device": device_name(),
        "backend": backend().NAME,
        "metrics_version": VERSION,
        "identity": {"draft": find_model(str(draft), "--draft").weights_hash, "teacher": teacher.weights_hash},
        "without_looping": {"prompts": 3, "speedup": speedup},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report | changed))


def test_a_named_draft_is_taken(runs: Path, teacher: Checkpoint) -> None:
    named = make_draft(runs / "one", {})
    assert find_draft(str(named), teacher).draft.folder == named


def test_without_any_draft_the_error_says_what_to_do(runs: Path, teacher: Checkpoint) -> None:
    with pytest.raises(UserError, match="train one or give --draft"):
        default_draft(teacher, runs)


def test_only_complete_drafts_of_this_teacher_count(runs: Path, teacher: Checkpoint) -> None:
    mine = {"complete": True, "teacher": {"hash": teacher.weights_hash}}
    abouts: dict[str, object] = {
        "a-old": mine,
        "b-new": mine,
        "c-begun": {**mine, "complete": False},
        "d-other": {"complete": True, "teacher": {"hash": "0" * 64}},
        "e-odd": {"complete": True, "teacher": "me"},
        "f-list": [],
        ".b-new.replaced": mine,
        ".c-begun.1234.tmp": mine,
    }
    for age, (name, about) in enumerate(abouts.items()):
        folder = make_draft(runs / "deep" / name, about, age)
        evaluated(folder, folder, 9.0 if name not in ("a-old", "b-new") else 0.1, teacher, device="another")
    assert default_draft(teacher, runs).draft.folder.name == "b-new"  # the newest, where none was measured here
    make_draft(drafts.SHIPPED / "shipped", mine)
    assert default_draft(teacher, runs).draft.folder.name == "shipped"
    reader = make_draft(drafts.SHIPPED / "that-reads", mine)
    config = json.loads((reader / "config.json").read_text()) | {"model_type": "bitdraft_reader"}
    (reader / "config.json").unlink()
    (reader / "config.json").write_text(json.dumps(config))
    assert default_draft(teacher, runs).draft.folder == reader
    evaluated(runs / "deep" / "a-old", runs / "deep" / "a-old", 0.5, teacher)
    choice = default_draft(teacher, runs)
    assert choice.draft.folder.name == "a-old" and "0.50" in choice.reason


def test_the_fastest_on_this_device_wins(runs: Path, teacher: Checkpoint) -> None:
    mine = {"complete": True, "teacher": {"hash": teacher.weights_hash}}
    demo, good, shipped = (
        make_draft(folder, mine, age)
        for age, folder in enumerate((runs / "demo" / "draft", runs / "good", drafts.SHIPPED / "shipped"))
    )
    evaluated(demo, demo, 0.8, teacher)
    assert default_draft(teacher, runs).draft.folder == demo
    # A shipped draft's evaluation lies under runs/, and tells whose it is by the hash of the weights.
    evaluated(runs / "evaluation-shipped", shipped, 1.3, teacher)
    assert default_draft(teacher, runs).draft.folder == shipped
    evaluated(good, good, 1.5, teacher)
    choice = default_draft(teacher, runs)
    assert choice.draft.folder == good and "1.50" in choice.reason and "of 3 drafts" in choice.reason


@pytest.mark.parametrize(
    "changed",
    [
        {"device": "another"},
        {"backend": "another"},
        {"metrics_version": VERSION + 1},
        {"complete": False},
        {"identical": False},
        {"without_looping": {"prompts": 0, "speedup": 2.0}},
        {"identity": {"draft": 7}},
        {"identity": None},
    ],
)
def test_evaluations_that_say_nothing_of_here(runs: Path, teacher: Checkpoint, changed: dict[str, Any]) -> None:
    mine = {"complete": True, "teacher": {"hash": teacher.weights_hash}}
    slow, fast = (make_draft(runs / name, mine) for name in ("slow", "fast"))
    evaluated(slow, slow, 0.5, teacher)
    evaluated(fast, fast, 2.0, teacher, **changed)
    assert default_draft(teacher, runs).draft.folder == slow


def test_an_evaluation_with_another_teacher_says_nothing(runs: Path, teacher: Checkpoint) -> None:
    mine = {"complete": True, "teacher": {"hash": teacher.weights_hash}}
    slow, fast = (make_draft(runs / name, mine) for name in ("slow", "fast"))
    evaluated(slow, slow, 0.5, teacher)
    evaluated(fast, fast, 2.0, Checkpoint(fast, "another", {}))
    assert default_draft(teacher, runs).draft.folder == slow


def test_an_unfinished_draft_is_told(tmp_path: Path) -> None:
    about = json.loads((SHIPPED / "draft.json").read_text())
    for complete in (True, False):
        changed = json.dumps(about | {"complete": complete}).encode()
        folder = changed_copy(SHIPPED, tmp_path / str(complete), draft__json=changed)
        assert ("not finished" in find_draft(str(folder), find_teacher(None)).reason) is not complete
