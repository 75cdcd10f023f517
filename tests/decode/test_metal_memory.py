"""What only Metal has, with a Metal that records its calls, and refused elsewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command, arguments, environment

from decode import metal
from kernels import UserError
from kernels.backends import device_backend


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A Metal device with 12,000 bytes, and what it was told."""
    seen: list[tuple[Any, ...]] = []
    fake = SimpleNamespace(
        device_info=lambda: {"max_recommended_working_set_size": 12000},
        set_memory_limit=lambda size: seen.append(("memory", size)),
        set_cache_limit=lambda size: seen.append(("cache", size)),
        set_wired_limit=lambda size: seen.append(("wired", size)),
        synchronize=lambda: seen.append(("synchronize",)),
        metal=SimpleNamespace(
            start_capture=lambda path: seen.append(("start", path)), stop_capture=lambda: seen.append(("stop",))
        ),
    )
    monkeypatch.setattr(metal, "mx", fake)
    monkeypatch.setattr(metal, "device_backend", lambda: "metal")
    monkeypatch.setenv("MTL_CAPTURE_ENABLED", "1")
    return seen


def test_limits_follow_what_the_device_recommends(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert metal.limit_memory() == metal.MemoryLimits(12000, 3000, 12000)
    assert calls == [("memory", 12000), ("cache", 3000), ("wired", 12000)]
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(metal, "device_backend", lambda device=device: device)
        assert metal.limit_memory() is None
    assert len(calls) == 3


@pytest.mark.slow
def test_what_loads_a_model_limits_memory_first(small_teacher: Path, text_dataset: Path, tmp_path: Path) -> None:
    """All commands that do, in processes whose Metal notes what it is told and then gives up."""
    spoil = """
import sys
from decode import metal
class Limited(Exception): pass
def limit(size): raise Limited("limited")
metal.device_backend = lambda: "metal"
metal.mx.device_info = lambda: {"max_recommended_working_set_size": 12000}
metal.mx.set_memory_limit = limit
"""
    teacher = ("--teacher", small_teacher)
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm and the gulls cried over it. " * 40, encoding="utf-8")
    collect = ("collect", *teacher, "--source", text, "--tokens", 200, "--seq-len", 64)
    for program, options in (
        ("decode", ("plain", *teacher, "--prompt", "a")),
        ("distill", (*collect, "--out", tmp_path / "data")),
        ("distill", ("train", *teacher, "--data", text_dataset, "--tokens", 64, "--live-prompts", 0)),
        ("distill", ("convert", *teacher, "--out", tmp_path / "packed")),
        ("decode", ("doctor", *teacher)),
    ):
        start = arguments(program, *options)
        done = subprocess.run(
            [start[0], "-c", spoil + start[2], *start[3:]], env=environment(), cwd=tmp_path,
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        said = done.stderr + done.stdout  # the doctor reports what a check died of
        assert "Limited: limited" in said or re.search("FAILED +teacher +limited", said), said


def test_a_trace_covers_what_runs_inside(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    file = tmp_path / "a.gputrace"
    metal.check_trace(file)
    metal.check_trace(None)
    with metal.capture(None):
        assert calls == []
    with metal.capture(file):
        assert calls == [("start", str(file))]
    assert calls == [("start", str(file)), ("synchronize",), ("stop",)]
    with pytest.raises(KeyboardInterrupt), metal.capture(file):
        raise KeyboardInterrupt
    assert calls[-1] == ("stop",)


def test_what_cannot_be_traced_is_refused(
    calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.gputrace").mkdir()
    for name, said in (("a.trace", ".gputrace"), ("there.gputrace", "already"), ("no/a.gputrace", "does not exist")):
        with pytest.raises(UserError, match=said):
            metal.check_trace(tmp_path / name)
    monkeypatch.delenv("MTL_CAPTURE_ENABLED")
    with pytest.raises(UserError, match="MTL_CAPTURE_ENABLED=1"):
        metal.check_trace(tmp_path / "a.gputrace")


@pytest.mark.skipif(device_backend() == "metal", reason="traces can be made here")
def test_elsewhere_it_is_one_line(command: Command, work: Path) -> None:
    done = command("decode", "plain", "--prompt", "a", "--trace", "a.gputrace")
    done.refused("decode", "--trace a.gputrace", device_backend())
    assert not (work / "a.gputrace").exists()
