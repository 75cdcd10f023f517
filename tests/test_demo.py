"""What `make demo` does to the folder of a demo that is done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from kernels.files import sha256, working_in

ROOT = Path(demo.__file__).parent


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A copy of demo.py beside a finished demo's folder."""
    (tmp_path / "demo.py").write_bytes((ROOT / "demo.py").read_bytes())
    out = tmp_path / demo.OUT
    for name in (
        *("dataset/manifest.json", "dataset/shard-00000.safetensors", "replies-x/manifest.json"),
        *("replies-x/reply-00000.safetensors", "draft/config.json", "draft/log.jsonl", "draft/evaluation-a.png"),
        *("shipped/evaluation.json", "results.json", "notes.txt"),
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    listed = {"config.json": sha256(out / "draft/config.json")}
    (out / "draft/draft.json").write_text(json.dumps({"files": listed}))
    return out


def refused(finished: Path) -> str:
    """What the demo says when it ends with exit code 2 and has changed nothing."""
    files = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    done = subprocess.run([sys.executable, "demo.py"], cwd=finished.parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert files == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize("name", ["dataset/NOTES.txt", "draft/README.md", "shipped/a.png", "replies-x/sub/b.txt"])
def test_a_file_that_the_demo_did_not_make_is_kept(finished: Path, name: str) -> None:
    (finished / name).parent.mkdir(exist_ok=True)
    (finished / name).write_text("mine")
    assert str(demo.OUT / name).removesuffix("/b.txt") in refused(finished)


def test_an_edited_file_of_the_draft_is_kept(finished: Path) -> None:
    (finished / "draft/config.json").write_text("edited")
    assert str(demo.DRAFT / "config.json") in refused(finished)


def test_two_demos_do_not_share_a_folder(finished: Path) -> None:
    with working_in(finished):
        assert str(demo.OUT) in refused(finished)


def test_a_finished_demo_is_cleared(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parents[1])
    demo.clear()
    assert [path.name for path in finished.iterdir()] == ["notes.txt"]
