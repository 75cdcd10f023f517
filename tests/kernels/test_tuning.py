"""Tuning: what is stored is what is read and applied, and nothing else is."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, environment

from kernels import reference, tuning
from kernels.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    yield tmp_path / "bitdraft" / "tuning.json"


def candidate(**changes: Any) -> Any:
    """The reference, with parameters that are remembered but change nothing."""
    operations = {name: getattr(reference, name) for name in dir(reference) if not name.startswith("_")}
    used: dict[str, int] = {}
    choices = {"TUNABLE": {"width": (32, 64), "depth": (1, 2, 4)}, "used": used, "set_tuning": used.update}
    return SimpleNamespace(**{**operations, "NAME": "fake", **choices, **changes})


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert tuning.path() == cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.path() == Path.home() / ".cache" / "bitdraft" / "tuning.json"
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert tuning.path() == Path.home() / "Library" / "Caches" / "bitdraft" / "tuning.json"


def test_what_is_stored_is_applied_on_the_same_device_only(cache: Path) -> None:
    ours = candidate()
    tuning.apply(ours)
    assert ours.used == {} and tuning.load() == {}
    tuning.store("another device", {"width": 32})
    tuning.store(tuning.key(ours), {"width": 64, "depth": 2})
    tuning.apply(ours)
    assert ours.used == {"width": 64, "depth": 2}
    assert tuning.load()["another device"] == {"width": 32}
    other = candidate(NAME="other")
    tuning.apply(other)
    assert other.used == {}
    assert [file.name for file in cache.parent.iterdir()] == ["tuning.json"]


def test_a_link_stays_one(cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.symlink_to(tmp_path / "kept.json")
    for width in (32, 64):
        tuning.store("a device", {"width": width})
        assert cache.is_symlink() and json.loads((tmp_path / "kept.json").read_text()) == {"a device": {"width": width}}


def test_what_was_found_with_other_kernels_is_not_applied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    kernel = tmp_path / "fake" / "native" / "product.cu"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("old")
    ours = candidate()
    tuning.store(tuning.key(ours), {"width": 64})
    kernel.write_text("new")
    tuning.apply(ours)
    assert ours.used == {}
    kernel.write_text("old")
    tuning.apply(ours)
    assert ours.used == {"width": 64}


def test_choices_that_are_gone_are_not_applied() -> None:
    ours = candidate()
    tuning.store(tuning.key(ours), {"width": 48, "depth": 4, "colour": 1})
    tuning.apply(ours)
    assert ours.used == {"depth": 4}


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[]", b'{"a": 3}', b'{"a": {"width": "64"}}', b'{"a": {"width": true}}']
)
def test_a_damaged_file_is_ignored_with_one_warning_and_replaced(cache: Path, content: bytes) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content)
    ours = candidate()
    with pytest.warns(UserWarning) as seen:
        tuning.apply(ours)
    assert len(seen) == 1 and str(cache) in str(seen[0].message)
    assert ours.used == {}
    tuning.store(tuning.key(ours), {"width": 64})
    assert json.loads(cache.read_text()) == {tuning.key(ours): {"width": 64}}


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written"):
        tuning.check_store()
    with pytest.raises(UserError, match=r"file/bitdraft/tuning\.json"):
        tuning.store("device", {"width": 64})


def test_settings_that_fail_are_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong bit with depth 2, an error with width 64: what remains is right."""
    monkeypatch.setattr(tuning, "MODELS", ((64, 96, 128),))
    ours = candidate()

    def bitlinear(*arguments: Any) -> Any:
        if ours.used["width"] == 64:
            raise RuntimeError("too many threads")
        return reference.bitlinear(*arguments) + (1e-3 if ours.used["depth"] == 2 else 0)

    ours.bitlinear = bitlinear
    ticks = []
    trials = tuning.tune(ours, tuning.grid(ours), 0.001, lambda: ticks.append(1))
    assert {tuple(trial.settings.items()) for trial in trials} == {
        (("width", 32), ("depth", 1)),
        (("width", 32), ("depth", 4)),
    }
    assert ours.used == trials[0].settings and trials[0].seconds <= trials[1].seconds
    assert len(ticks) == 6 * tuning.ROUNDS
    with pytest.raises(UserError, match="none of 1"):
        tuning.tune(ours, [{"width": 64, "depth": 1}], 0.001)


def test_nothing_to_tune() -> None:
    assert tuning.grid(reference) == []  # type: ignore[arg-type]
    assert tuning.grid(candidate(TUNABLE={"width": (64,)})) == []
    done = command("tune", BITDRAFT_KERNELS="reference")
    assert done.returncode == 0 and "nothing to tune in the reference kernels" in done.stdout
    assert not tuning.path().exists()


def test_thread_counts() -> None:
    assert tuning.thread_counts(1) == (1,)
    assert tuning.thread_counts(2) == (1, 2)
    assert tuning.thread_counts(10) == (1, 2, 3, 4, 6, 8, 10)


def command(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kernels", *options], env=environment(**variables), cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip


def native_threads(**variables: str) -> str:
    code = "from kernels import backend; backend(); from kernels.cpu import _native; print(_native.threads())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def cpu_runs() -> bool:
    from kernels.backends import select

    return select()[0].NAME == "cpu"


@pytest.mark.slow
@pytest.mark.skipif("not cpu_runs()", reason="the native CPU kernels do not run here")
def test_the_cpu_keeps_its_thread_count() -> None:
    done = command("tune", "--seconds", "0.01", "--json", "-", "--quiet")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    if len(report["trials"]) < 2:
        pytest.skip("one processor leaves nothing to choose")
    assert json.loads(tuning.path().read_text()) == {report["key"]: report["best"]}
    best = report["best"]["threads"]
    assert best == report["trials"][0]["settings"]["threads"]
    assert native_threads() == str(best)
    tuning.store(report["key"], {"threads": 1})
    assert native_threads() == "1"
    assert native_threads(BITDRAFT_THREADS="2") == "2"  # what the user asks for goes first


def test_bad_input_is_one_line() -> None:
    done = command("tune", "--seconds", "-1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--seconds -1" in done.stderr
