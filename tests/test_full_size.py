"""The full-size benchmark, run small: every command works on a stand-in, and a failed check is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import ROOT, TEACHER, environment

SHAPE = ("--layers", "1", "--hidden", "64", "--heads", "1", "--kv-heads", "1", "--intermediate", "64")
LITTLE = (
    *("--tokens", "400", "--seq-len", "64", "--reply-batch", "4", "--max-reply", "8", "--steps", "1"),
    *("--draft-layers", "1", "--draft-hidden", "64", "--max-tokens", "4"),
)


def benchmark(*options: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.full_size", "--tokenizer", TEACHER, *SHAPE, *LITTLE, *options]
    return subprocess.run([*map(str, line)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_every_stage_runs_and_too_much_memory_fails(tmp_path: Path) -> None:
    done = benchmark("--out", tmp_path / "out", "--json", tmp_path / "facts.json", "--limit-gb", "0.001")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert done.returncode == 1, done.stderr
    (failure,) = facts["failures"]
    assert "0.001 GB" in failure

    stages = {stage["name"]: stage for stage in facts["stages"]}
    models = ("collect texts", "collect replies", "train", "decode plain", "decode spec", "evaluate")
    assert set(stages) == {"stand-in", "verify", *models}
    for name, stage in stages.items():
        assert stage["seconds"] > 0 and stage["peak_bytes"] > 1e7
        assert f"\n| {name} | " in done.stdout
        if mx.default_device() == mx.cpu:
            assert stage["gpu_bytes"] is None
    teacher = tmp_path / "out" / "teacher"
    assert stages["stand-in"]["disk_bytes"] == sum(path.stat().st_size for path in teacher.iterdir())
    # A process that loads the teacher holds at least MLX and its weights; one that does not, less.
    assert stages["decode spec"]["peak_bytes"] > stages["stand-in"]["peak_bytes"]
    assert stages["collect texts"]["tokens"] == 400
    assert done.stdout.count("- **no**: ") == 1 and done.stdout.count("- yes: ") >= 4
    assert "Predicted, not measured" in done.stdout


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    done = benchmark("--out", tmp_path)
    assert done.returncode == 2 and "not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
