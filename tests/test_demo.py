"""What `make demo` does to the folder of a demo that is done."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from kernels.files import working_in


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A copy of demo.py beside a finished demo's folder, in which a user left something."""
    shutil.copy(Path(demo.__file__), tmp_path)
    out = tmp_path / demo.OUT
    for name in ("dataset/manifest.json", "replies-mine/reply-00000.safetensors", "draft/NOTES.txt", "results.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(name)
    (out / "shipped").symlink_to(tmp_path)
    return out


def test_two_demos_do_not_share_a_folder(finished: Path) -> None:
    with working_in(finished):
        done = subprocess.run([sys.executable, "demo.py"], cwd=finished.parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and str(demo.OUT) in done.stderr
    assert len(done.stderr.splitlines()) == 1 and (finished / "results.json").exists()


def test_a_finished_demo_is_kept(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.parents[1])
    (finished.parent / "demo-1").symlink_to("nowhere")
    names = {path.relative_to(finished) for path in finished.rglob("*")}
    demo.move_aside()
    aside = finished.parent / "demo-2"
    assert not finished.exists() and {path.relative_to(aside) for path in aside.rglob("*")} == names
