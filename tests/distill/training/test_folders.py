"""`distill train` as a guest in its folder: what is the user's stays, whatever the folder is."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import Command, arguments, environment, mounted
from small_bitnets import PACKED
from synthetic import VOCAB, block, dataset, teacher_folder

from decode.tokenizer import Tokenizer
from distill.data.manifest import DatasetSettings
from distill.data.shards import Dataset, ShardWriter
from distill.provenance import teacher_files
from distill.release.publish import prepare
from distill.training.draft_config import DraftConfig
from distill.training.memory import check_memory, disk_bytes, estimate_memory
from distill.training.run import train
from distill.training.settings import TrainSettings
from kernels.errors import UserError
from kernels.files import read_json_lines

TINY = TrainSettings(live_prompts=0, layers=1, hidden=64, tokens=4_000, batch=4, lr=5e-3, evals=4)
OPTIONS = ("--live-prompts", "0", "--layers", 1, "--hidden", 64, "--tokens", 10_000, "--batch", 4, "--lr", 5e-3)


class Stopped(Exception):
    """Raised in a run's progress, which ends it as a kill would."""


def stop_at(kind: str) -> Any:
    def progress(line: dict[str, Any]) -> None:
        if line["kind"] == kind:
            raise Stopped

    return progress


def ctrl_c_once(line: dict[str, Any]) -> None:
    """A run's progress that presses Ctrl-C at its first step."""
    if line["kind"] == "step" and line["step"] == 1:
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, teacher), the teacher with weights, as commands want it."""
    root = tmp_path_factory.mktemp("train")
    teacher = teacher_folder(root / "teacher")
    mx.save_safetensors(str(teacher / "model.safetensors"), {"model.embed_tokens.weight": mx.ones((VOCAB, 128))})
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"num_attention_heads": 2, "quantization_config": PACKED}))
    (teacher / "generation_config.json").write_text('{"eos_token_id": 2}')
    return dataset(root / "data", teacher), teacher


@pytest.fixture(scope="module", autouse=True)
def quickly_drawn() -> Iterator[None]:
    """Pictures take half the time of runs as short as these; those of processes are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "distill.training.loop.training_curves", lambda log, picture, title: picture.write_bytes(b"drawn")
        )
        yield


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(*made, out, TINY, quiet=True)
    return out


MINE = {"NOTES.txt": b"mine", "README.md": b"# mine", "plots/a.png": b"\x89PNG", "state/mine.txt": b"mine too"}


@pytest.mark.slow
def test_what_a_user_puts_there_stays(
    inside: Command, made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From SIGTERM, which is as good as Ctrl-C, to the end of the resumed run; a second process is kept out of it."""
    out = tmp_path / "out"
    options = ("train", "--data", made[0], "--teacher", made[1], "--out", out, "-q")
    process = subprocess.Popen(
        arguments("distill", *options, *OPTIONS), env=environment(), stderr=subprocess.PIPE, cwd=tmp_path
    )
    until = time.monotonic() + 60
    while not list(out.glob("state/best-*")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    inside("distill", *options, *OPTIONS).refused("distill", str(out), "another process")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and b"the same command goes on" in errors, errors
    about = json.loads((out / "draft.json").read_text())
    assert about["complete"] is False
    for name, content in MINE.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content)
    done = inside("distill", *options, *OPTIONS, "--json", "-")
    assert done.code == 0, done.err
    assert {name: (out / name).read_bytes() for name in MINE} == MINE
    names = {path.name for path in out.iterdir()} - {name.split("/")[0] for name in MINE}
    assert names == {*json.loads((out / "draft.json").read_text())["files"], "draft.json", "log.jsonl", "curves.png"}
    assert [path.name for path in (out / "state").iterdir()] == ["mine.txt"]
    before = contents(out)
    assert inside("distill", *options, *OPTIONS).code == 0 and contents(out) == before


def test_files_of_ours_that_were_edited_stay(made: tuple[Path, Path], tmp_path: Path) -> None:
    """They are refused before the work, as is what has the names of ours; and so is nothing of a killed run's."""
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(*made, out, TINY, ctrl_c_once, quiet=True)
    for name in ("generation_config.json", "chat_template.jinja", "model-00002.safetensors", "special_tokens_map.json"):
        kept = (out / name).read_bytes() if (out / name).exists() else None
        if name == "special_tokens_map.json":
            (out / name).mkdir()
        else:
            (out / name).write_text("mine")
        with pytest.raises(UserError, match=f"{out / name}: .* move it elsewhere"):
            train(*made, out, TINY, quiet=True)
        if (out / name).is_dir():
            (out / name).rmdir()
        else:
            assert (out / name).read_text() == "mine"
            (out / name).unlink()
        if kept is not None:
            (out / name).write_bytes(kept)
    for name in (".tmp-curves.png", ".curves.png.tmp", ".tmp-draft.json"):
        (out / name).write_text("a kill left it")
    (out / ".tmp-new").mkdir()
    (out / ".tmp-new" / "config.json").write_text("{")
    (out / "draft.json").unlink()  # as before the first draft
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", *made[1].glob("gen*")):
        (out / Path(name).name).unlink()
    with pytest.raises(Stopped):
        train(*made, out, TINY, stop_at("start"), quiet=True)
    assert not (out / "config.json").exists()
    # A log of the user's, where no run was begun, is not written over.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"mine: holds log\.jsonl and is no draft"):
        train(*made, tmp_path / "mine", TINY, quiet=True)
    assert contents(tmp_path / "mine") == {"log.jsonl": b"mine"}


def test_a_log_and_a_picture_that_were_edited_stay(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """They are refused before the work; what a kill left of ours is not, nor are those of an older version's run."""
    out = tmp_path / "out"

    def killed(kind: str) -> None:
        with pytest.raises(Stopped):
            train(*made, out, TINY, stop_at(kind), quiet=True)

    killed("eval")  # before anything is drawn or saved
    (out / "curves.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"curves\.png: .* move it elsewhere"):
        train(*made, out, TINY, quiet=True)
    assert (out / "curves.png").read_bytes() == b"mine"
    (out / "curves.png").unlink()
    with pytest.raises(KeyboardInterrupt):
        train(*made, out, TINY, ctrl_c_once, quiet=True)
    log = (out / "log.jsonl").read_bytes()
    for name, content in (
        ("log.jsonl", log + b"a note\n"),
        ("log.jsonl", log + b"\xff\n"),
        ("log.jsonl", log.replace(b'"lr"', b'"LR"')),
        ("curves.png", b"mine"),
    ):
        before = (out / name).read_bytes()
        (out / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .* would be replaced; move it elsewhere"):
            train(*made, out, TINY, quiet=True)
        assert (out / name).read_bytes() == content
        (out / name).write_bytes(before)
    killed("eval")
    (out / "log.jsonl").write_bytes((out / "log.jsonl").read_bytes() + b'{"kind": "st')
    killed("start")
    (out / "log.jsonl").unlink()
    killed("start")
    run = json.loads((out / "state" / "run.json").read_text())
    del run["log"], run["curves"]
    (out / "state" / "run.json").write_text(json.dumps(run))
    train(*made, out, TINY, quiet=True)
    assert weights(out) == weights(whole)


def test_through_a_link(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """To a folder that is not there yet: the link stays, stopped or not, and the draft is where it leads."""
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    link.symlink_to("disk/target")
    with pytest.raises(KeyboardInterrupt):
        train(*made, link, TINY, ctrl_c_once, quiet=True)
    assert link.is_symlink() and (target / "draft.json").is_file()
    train(*made, link, TINY, quiet=True)
    assert link.is_symlink() and weights(target) == weights(whole)
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("link", "disk")] == []
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UserError, match=str(tmp_path / "round")):
        train(*made, tmp_path / "round", TINY, quiet=True)


def test_a_log_and_a_picture_behind_links(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """They go on where the links lead."""
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(KeyboardInterrupt):
        train(*made, out, TINY, ctrl_c_once, quiet=True)
    for name in ("log.jsonl", "curves.png"):
        (out / name).rename(kept / name)
        (out / name).symlink_to(kept / name)
    picture = (kept / "curves.png").stat().st_ino
    train(*made, out, TINY, quiet=True)
    assert weights(out) == weights(whole)
    assert (out / "log.jsonl").is_symlink() and (out / "curves.png").is_symlink()
    steps = [line["step"] for line in read_json_lines(kept / "log.jsonl") if line["kind"] == "step"]
    assert steps[0] == 1 and steps[-1] == json.loads((out / "draft.json").read_text())["training"]["steps"]
    assert (kept / "curves.png").stat().st_ino != picture  # drawn anew
    assert sorted(path.name for path in kept.iterdir()) == ["curves.png", "log.jsonl"]


@pytest.mark.slow
def test_an_environment_made_for_other_programs(command: Command, made: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder for temporary files that is not there, and a notebook's way to show pictures."""
    options = ("--data", made[0], "--teacher", made[1], "--out", tmp_path / "out", *OPTIONS, "-q")
    theirs = {"TMPDIR": "/no/such/folder", "MPLBACKEND": "module://no_such_module"}
    done = command("distill", "train", *options, **theirs)
    assert (done.code, done.err) == (0, "")
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_mount_and_a_full_disk(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """A folder that cannot be renamed does; one without room for the run is refused before it."""
    program = f"""
import sys
from pathlib import Path
from shutil import disk_usage
from distill.training.run import *
from distill.training.settings import *
from kernels.errors import UserError
data, teacher, disk = Path({str(made[0])!r}), Path({str(made[1])!r}), Path(sys.argv[1])
train(data, teacher, disk, {TINY!r}, quiet=True)
print((disk / "model.safetensors").read_bytes() == Path({str(whole)!r}, "model.safetensors").read_bytes())
(disk / "filled").write_bytes(bytes(disk_usage(disk).free - 500_000))
try:
    train(data, teacher, disk / "full", {TINY!r}, quiet=True)
except UserError as error:
    print(error, (disk / "full").exists())
"""
    done = mounted(tmp_path, "40m", program)
    same, refused = done.stdout.splitlines()
    assert same == "True", done.stderr
    assert refused.startswith(f"no room left in {tmp_path / 'full'}: ") and refused.endswith(" False"), done.stderr
    need = disk_bytes(DraftConfig.for_teacher(made[1], 1, 64))
    assert f"{need / 1e9:.2f} GB" in refused


def test_a_disk_that_fills_up_is_named(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for it; with room again, the same command goes on."""
    out, hard = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match=f"no room left in {out / 'state'}"):
            train(*made, out, TINY, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    train(*made, out, TINY, quiet=True)
    assert weights(out) == weights(whole)


@pytest.mark.slow
def test_stopped_before_the_first_evaluation_changes_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Though the held-out loss of the run only rises, so that its earliest evaluation is its best one."""
    rising = dataclasses.replace(TINY, lr=5.0, warmup=1.0)
    train(*made, tmp_path / "whole", rising, quiet=True)
    losses = [
        line["held_out_loss"] for line in read_json_lines(tmp_path / "whole" / "log.jsonl") if line["kind"] == "eval"
    ]
    assert losses[0] == min(losses)
    with pytest.raises(KeyboardInterrupt):
        train(*made, tmp_path / "stopped", rising, ctrl_c_once, quiet=True)
    stopped = json.loads((tmp_path / "stopped" / "draft.json").read_text())["training"]
    assert stopped["best_step"] == stopped["steps"] < 8 and stopped["held_out_loss"] < losses[0]
    train(*made, tmp_path / "stopped", rising, quiet=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")
    told = [json.loads((tmp_path / name / "draft.json").read_text())["training"] for name in ("stopped", "whole")]
    assert told[0] == told[1]


def test_an_unfinished_dataset_is_told(
    made: tuple[Path, Path], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On standard error and in the card, with what it had and what was asked for."""
    values = Dataset.open(made[0]).settings.values | {"tokens": 30_000, "sources": [{"name": "a.txt"}]}
    with ShardWriter.open(tmp_path / "data", DatasetSettings(values)) as writer:
        writer.write(block(16, seed=1))
    tokens = Dataset.open(tmp_path / "data").tokens
    train(tmp_path / "data", made[1], tmp_path / "out", TINY)
    told = [line for line in capsys.readouterr().err.splitlines() if "not complete" in line]
    assert len(told) == 1 and str(tmp_path / "data") in told[0] and f"{tokens:,} of 30,000" in told[0]
    card = prepare(tmp_path / "out", "a/b").card
    assert f"| tokens | {tokens:,} of 30,000" in card and "not finished" in card
    assert "not finished" not in prepare(whole, "a/b").card


def test_a_teacher_with_another_template_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    """A draft gets its teacher's template: it must be the one that its dataset was collected with."""
    teacher = shutil.copytree(made[1], tmp_path / "teacher")
    values = Dataset.open(made[0]).settings.values | {"teacher_files": teacher_files(Tokenizer(teacher))}
    with ShardWriter.open(tmp_path / "data", DatasetSettings(values)) as writer:
        writer.write(block(16, seed=1))
    config = json.loads((teacher / "tokenizer_config.json").read_text()) | {"chat_template": "Q: {{ messages }}"}
    (teacher / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"data: .*chat template.*teacher"):
        train(tmp_path / "data", teacher, tmp_path / "out", TINY, quiet=True)


@pytest.mark.parametrize(("dtype", "fits"), [("float32", False), ("bfloat16", True), ("auto", True)])
def test_memory_of_a_mac(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, dtype: str, fits: bool) -> None:
    """A 16 GB Mac lets its GPU have 11.5 GB; a draft that would need 13 in float32 is refused there."""
    shape = DraftConfig.for_teacher(made[1], 8, 512)
    batch = next(n for n in range(1, 1000) if estimate_memory(shape, n, 64, narrow=False) > 13e9)
    assert estimate_memory(shape, batch, 64) < 11e9
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    mac = {"memory_size": 17_179_869_184, "max_recommended_working_set_size": 11_453_251_584}
    monkeypatch.setattr("kernels.memory.device_info", lambda: mac)
    if fits:
        check_memory(shape, batch, 64, dtype=dtype)
    else:
        with pytest.raises(UserError, match=r"needs about 13\.\d GB to train, and this machine has 11\.5 GB"):
            check_memory(shape, batch, 64, dtype=dtype)
