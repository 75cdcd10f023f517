"""Long work keeps a Mac awake: what is started, and that it ends, with a `caffeinate` that notes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import arguments, environment

from decode.keep_awake import keep_awake

# Ends as the real one does: told to, or when the process it was given does.
CAFFEINATE = """#!/bin/sh
trap 'echo > "{folder}/ended"; exit 0' TERM
trap 'echo > "{folder}/interrupted"; exit 0' INT
echo "$$ $*" > "{folder}/started"
while kill -0 "$3" 2>/dev/null; do sleep 0.05; done
echo > "{folder}/ended"
"""
MAC = """
from types import SimpleNamespace
from decode import keep_awake
keep_awake.sys = SimpleNamespace(platform='darwin')
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stub = tmp_path / "bin" / "caffeinate"
    stub.parent.mkdir()
    stub.write_text(CAFFEINATE.format(folder=tmp_path), encoding="utf-8")
    stub.chmod(0o755)
    return tmp_path


def start(code: str, folder: Path, *options: object) -> subprocess.Popen[str]:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, options)], env=environment(PATH=path), cwd=folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come"
        time.sleep(0.01)


def test_it_lasts_as_long_as_the_work(folder: Path) -> None:
    work = f"""{MAC}
import os, pathlib, time
with keep_awake.keep_awake():
    while not pathlib.Path("started").exists(): time.sleep(0.01)
    assert not pathlib.Path("ended").exists()
    print(os.getpid())
assert pathlib.Path("ended").exists()
"""
    process = start(work, folder)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    told = (folder / "started").read_text(encoding="utf-8").split()
    assert told[1:] == ["-i", "-w", out.strip()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_ctrl_c_is_not_for_it_and_a_kill_ends_it(folder: Path, number: int) -> None:
    work = f"""{MAC}
import signal, sys, time
if {number} == signal.SIGINT:  # as training does: the step is ended, the state saved
    signal.signal(signal.SIGINT, lambda *_: time.sleep(0.5) or sys.exit(0))
with keep_awake.keep_awake():
    time.sleep(60)
"""
    process = start(work, folder)
    wait_for(folder / "started")
    os.killpg(process.pid, number)  # as a terminal does, to all of the group
    process.communicate(timeout=30)
    wait_for(folder / "ended")
    assert not (folder / "interrupted").exists()


def test_an_error_of_the_work_is_passed_on_and_ends_it(folder: Path) -> None:
    process = start(f"{MAC}\nwith keep_awake.keep_awake():\n    raise ValueError('mine')", folder)
    assert "mine" in process.communicate(timeout=30)[1] and process.returncode == 1


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has it")
def test_elsewhere_nothing_is_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / "bin"), prepend=":")
    with keep_awake():
        time.sleep(0.2)
    assert not (folder / "started").exists()


def test_a_mac_without_it_works_too(folder: Path) -> None:
    (folder / "bin" / "caffeinate").write_bytes(b"\x00")  # nothing that can be run
    process = start(f"{MAC}\nwith keep_awake.keep_awake():\n    print('done')", folder)
    assert process.communicate(timeout=30) == ("done\n", "") and process.returncode == 0


@pytest.mark.slow
def test_collecting_and_training_stay_awake(folder: Path, small_teacher: Path) -> None:
    (folder / "text.txt").write_text("The sea was calm and the gulls cried over it. " * 60, encoding="utf-8")
    for name, options in (
        ("collect", ("--source", "text.txt", "--tokens", 300, "--seq-len", 64, "--out", "data")),
        (
            "train",
            ("--data", "data", "--tokens", 128, "--hidden", 64, "--live-prompts", 0, "--out", "draft"),
        ),
    ):
        process = start(MAC + arguments("distill")[2], folder, name, *options, "--teacher", small_teacher, "--quiet")
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 0, err
        assert (folder / "started").exists() and (folder / "ended").exists()
        (folder / "started").unlink()
        (folder / "ended").unlink()
