"""Training by several processes: what one would have learnt, and what is heard of one that dies."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from launched import ended, start
from synthetic import block, teacher_folder

from distill.training.assembly import make_step
from distill.training.draft_config import DraftConfig
from distill.training.loader import assemble
from distill.training.settings import TrainSettings
from distill.training.step import Gradients
from kernels.files import read_json_lines


@pytest.mark.parametrize("whole_rows", [False, True], ids=["replies", "texts"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(tmp_path: Path, whole_rows: bool) -> None:
    """One part has no position to learn."""
    config = DraftConfig.for_teacher(teacher_folder(tmp_path / "t"), 1, 64)
    rows = block(6, seed=3)
    mask = np.ones_like(rows.loss_mask) if whole_rows else rows.loss_mask & (np.arange(6) < 4)[:, None]
    segments = np.ones_like(rows.segments) if whole_rows else rows.segments
    one = dataclasses.replace(rows, loss_mask=mask, segments=segments)
    batch = assemble([(one, i) for i in range(6)], 0)
    assert (batch.positions is None) == whole_rows
    step = make_step(TrainSettings(layers=1, hidden=64), config, tmp_path / "t", None, None)
    weights = step.draft.create()
    whole = step.gradients(weights, step.draft.arrays(batch))
    parts = [step.gradients(weights, step.draft.arrays(batch.part(*at))) for at in ((0, 1), (1, 4), (4, 6))]
    total = Gradients.total(parts, step.draft.step_weights)
    assert np.allclose(np.array(whole.stats), np.array(total.stats), atol=1e-3)
    assert whole.loss.item() == pytest.approx(total.loss.item(), rel=1e-5)
    for name, gradient in whole.weights.items():
        largest = np.abs(np.array(gradient)).max()
        assert np.abs(np.array(gradient) - np.array(total.weights[name])).max() < 1e-5 * largest, name


@pytest.mark.slow
def test_two_processes_learn_what_one_does(
    text_dataset: Path, small_teacher: Path, inside: Command, tmp_path: Path
) -> None:
    """A reader; rank 0 alone reads the dataset. A rank that dies is named, and the same command goes on."""
    shape = ("--reads-teacher", "--hidden", 64, "--vocab", 200, "--live-prompts", 0, "--unroll", 2)
    work = ("--tokens", 1300, "--batch", 4, "--seed", 3, "-q", "--teacher", small_teacher)
    command = ["train", *shape, *work]
    alone, two = tmp_path / "alone", tmp_path / "two" / "d"
    assert inside("distill", *command, "--data", text_dataset, "--out", alone).code == 0

    commands = [*command, "--data", text_dataset], [*command, "--data", tmp_path / "nowhere"]
    zero, dying = start(tmp_path / "two", *commands)
    until = time.monotonic() + 60
    while not ((two / "log.jsonl").exists() and '"eval"' in (two / "log.jsonl").read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    dying.send_signal(signal.SIGKILL)
    (code, out, said), _ = ended([zero, dying])
    assert (code, out) == (2, "") and said.startswith("distill: error: rank 1 of 2 (process ")
    assert len(said.splitlines()) == 1 and "the same command goes on" in said

    assert ended(start(tmp_path / "two", *commands)) == [(0, "", "")] * 2
    logs = [read_json_lines(folder / "log.jsonl") for folder in (alone, two)]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in logs]
    # AdamW moves a weight by its gradient's sign, be it of rounding; so not the weights are compared.
    assert np.allclose(losses[0], losses[1], rtol=0.02) and np.allclose(losses[0][:3], losses[1][:3], rtol=1e-4)


@pytest.mark.slow
def test_sigterm_to_any_rank_ends_the_run_with_a_draft(text_dataset: Path, small_teacher: Path, tmp_path: Path) -> None:
    command: list[object] = ["train", "--data", text_dataset, "--teacher", small_teacher, "--hidden", 64, "-q"]
    command += ["--live-prompts", 0, "--tokens", 40_000, "--batch", 2]
    zero, told = start(tmp_path / "x", command, command)
    log, until = tmp_path / "x" / "d" / "log.jsonl", time.monotonic() + 60
    while not (log.exists() and '"step": 2' in log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.01)
    told.send_signal(signal.SIGTERM)
    (code, out, said), other = ended([zero, told])
    assert (code, out) == (130, "") and len(said.strip().splitlines()) == 1 and "the same command" in said, said
    assert other == (130, "", "")
    assert json.loads((log.parent / "draft.json").read_text())["complete"] is False


@pytest.mark.slow
def test_a_rank_with_another_teacher_is_named(text_dataset: Path, small_teacher: Path, tmp_path: Path) -> None:
    command: list[object] = ["train", "--data", text_dataset, "--live-prompts", 0, "--tokens", 100, "-q"]
    zero, one = ended(start(tmp_path / "x", [*command, "--teacher", small_teacher], command))
    assert zero[:2] == (2, "") and one == (2, "", "")
    assert "rank 1 of 2" in zero[2] and "its teacher differs from rank 0's" in zero[2]
