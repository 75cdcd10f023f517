"""Training runs: they learn, resume to the same bits, stop politely and name what is wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from synthetic import SEQ_LEN, VOCAB, block, dataset, teacher_folder

from distill.data.shards import Dataset
from distill.release.publish import prepare
from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama
from distill.training.drafts.llama import Standalone
from distill.training.loader import DataLoader, assemble, held_out_rows
from distill.training.losses import FusedHead
from distill.training.optimizer import learning_rate
from distill.training.run import default_folder, train
from distill.training.settings import TrainSettings
from distill.training.step import Step, measure
from kernels.errors import UserError
from kernels.files import read_json_lines

HERE = Path(__file__).parent
SMALL = TrainSettings(live_prompts=0, layers=1, hidden=64, tokens=20_000, batch=4, lr=5e-3, evals=5)
STEPS = -(-SMALL.tokens // (SMALL.batch * SEQ_LEN))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, teacher)"""
    root = tmp_path_factory.mktemp("train")
    teacher = teacher_folder(root / "teacher")
    return dataset(root / "data", teacher), teacher


@pytest.fixture(scope="module")
def whole(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(*made, out, SMALL, quiet=True)
    return out


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(w) for name, w in checkpoint.load(folder).weights.items()}


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def evals(folder: Path) -> list[dict[str, float]]:
    return [line for line in read_json_lines(folder / "log.jsonl") if line["kind"] == "eval"]


@pytest.mark.slow
def test_learns_and_leaves_a_draft(made: tuple[Path, Path], whole: Path) -> None:
    curve = evals(whole)
    assert curve[-1]["held_out_loss"] < 0.1 * curve[0]["held_out_loss"]
    assert curve[-1]["agreement"] > 0.8
    names = {p.name for p in whole.iterdir()}
    assert {"config.json", "model.safetensors", "draft.json", "log.jsonl", "curves.png"} <= names
    assert "state" not in names
    assert (whole / "curves.png").read_bytes()[:4] == b"\x89PNG"
    about = json.loads((whole / "draft.json").read_text())
    assert about["complete"] and about["teacher"]["name"] == "synthetic"
    assert about["training"]["steps"] == STEPS == curve[-1]["step"]
    collected = about["training"]["data"]["settings"]
    assert collected["k"] == 8 and collected["temperatures"] == [1.0, 0.7] and "teacher" not in collected
    assert about["made_with"]["device"] and about["made_with"]["versions"]["python"]
    steps = [line for line in read_json_lines(whole / "log.jsonl") if line["kind"] == "step"]
    assert {"step", "tokens", "loss", "agreement", "lr", "grad_norm", "tok_per_s"} <= steps[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [None, 60])
def test_learns_from_draws(made: tuple[Path, Path], whole: Path, tmp_path: Path, vocab: int | None) -> None:
    """As much of the teacher as from logits, by the logits of the held-out rows."""
    data = dataset(tmp_path / "data", made[1], sampled=64)
    out = tmp_path / "draft"
    summary = train(data, made[1], out, dataclasses.replace(SMALL, vocab=vocab), quiet=True)
    assert summary.agreement > (0.75 if vocab is None else 0.5)
    assert 0 < summary.expected_acceptance < 1
    about = json.loads((out / "draft.json").read_text())
    assert about["training"]["data"]["settings"]["sampled"] == 64
    if vocab is None:
        held_out = DataLoader(Dataset.open(made[0]), 1.0, 4, 0, SMALL.eval_share, SMALL.eval_rows).held_out_batches()
        saved, head = checkpoint.load(out), FusedHead("kl", eager=True)
        found = measure(Standalone(saved.config), head, saved.weights, [batch.arrays() for batch in held_out])
        assert found.loss < evals(whole)[0]["held_out_loss"] * 0.2 and found.agreement[0] > 0.75


def test_draws_cannot_teach_every_loss(made: tuple[Path, Path], tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", made[1], sampled=64)
    for changed, named in (
        ({"loss": "tv"}, r"--loss tv: cannot be learnt from draws \(--sampled 64\)"),
        ({"temperature": 0.7}, r"data: temperature 0\.7 was not collected, only 1"),
    ):
        with pytest.raises(UserError, match=named):
            train(data, made[1], tmp_path / "out", dataclasses.replace(SMALL, **changed), quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "short"
    settings = dataclasses.replace(SMALL, tokens=2_000)
    first = train(*made, out, settings, quiet=True)
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = train(*made, out, settings, quiet=True)
    assert again.done_before and not first.done_before
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == files
    assert dataclasses.replace(again, done_before=False, seconds=first.seconds, tok_per_s=first.tok_per_s) == first
    other = dataset(tmp_path / "other", made[1], shards=2)
    for data, changed, named in (
        (made[0], {"lr": 1e-3}, r"trained with lr = 0\.005, not 0\.001"),
        (other, {}, "trained with other data"),
    ):
        with pytest.raises(UserError, match=f"short: holds a finished draft that was {named}; give another --out"):
            train(data, made[1], out, dataclasses.replace(settings, **changed), quiet=True)
    (out / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"model\.safetensors: differs"):
        train(*made, out, settings, quiet=True)


@pytest.mark.slow
def test_data_of_another_teacher(made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told in one line, and the draft is one for the teacher that it learned from."""
    data, settings = made[0], dataclasses.replace(SMALL, tokens=2_000)
    teacher = teacher_folder(tmp_path / "tuned")
    mx.save_safetensors(str(teacher / "model.safetensors"), {"model.embed_tokens.weight": mx.ones((VOCAB, 128))})
    train(data, teacher, tmp_path / "draft", settings)
    told = [line for line in capsys.readouterr().err.splitlines() if "same tokenizer" in line]
    assert len(told) == 1 and "collected from synthetic, not from" in told[0]
    about = json.loads((tmp_path / "draft" / "draft.json").read_text())
    assert about["teacher"]["hash"] == Dataset.open(data).settings.teacher_hash
    assert about["training"]["started_from"]["name"] == "tuned"
    assert train(data, teacher, tmp_path / "draft", settings, quiet=True).done_before
    with pytest.raises(UserError, match="trained with another --teacher"):
        train(*made, tmp_path / "draft", settings, quiet=True)
    train(*made, tmp_path / "own", settings)
    assert "same tokenizer" not in capsys.readouterr().err
    assert "started_from" not in json.loads((tmp_path / "own" / "draft.json").read_text())["training"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce", "tv"])
def test_other_losses_learn_too(made: tuple[Path, Path], tmp_path: Path, loss: str) -> None:
    settings = dataclasses.replace(SMALL, loss=loss, tokens=8_000, temperature=0.7, bits=8)
    lines: list[dict[str, float]] = []
    summary = train(*made, tmp_path / "out", settings, progress=lines.append, quiet=True)
    first = next(line for line in lines if line["kind"] == "eval")
    assert summary.held_out_loss_float < first["held_out_loss"]
    assert summary.agreement > first["agreement"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["bits"] == 8


def start(made: tuple[Path, Path], out: Path) -> subprocess.Popen[str]:
    program = (
        "from pathlib import Path\nfrom distill.training.run import *\nfrom distill.training.settings import *\n"
        f"train(Path({str(made[0])!r}), Path({str(made[1])!r}), Path({str(out)!r}), {SMALL!r}, quiet=True)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[2])},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_eval(out: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        run = out / "state" / "run.json"
        if run.is_file() and json.loads(run.read_text())["step"] > 0:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_bits(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start(made, out)
    wait_for_eval(out, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out / "config.json").exists()  # nothing that could be taken for a draft
    with pytest.raises(UserError, match=r"begun there with lr = 0\.005, not 0\.001"):
        train(*made, out, dataclasses.replace(SMALL, lr=1e-3), quiet=True)
    lines: list[dict[str, float]] = []
    train(*made, out, SMALL, progress=lines.append, quiet=True)
    assert lines[0]["step"] > 0
    assert same(out, whole)
    keep = ("step", "held_out_loss", "agreement")
    assert [[e[k] for k in keep] for e in evals(out)] == [[e[k] for k in keep] for e in evals(whole)]


class Stopped(Exception):
    """Raised in a run's progress, which ends it as a kill would."""


@pytest.fixture(scope="module")
def begun(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended behind its second evaluation, before the state of that was saved."""
    out = tmp_path_factory.mktemp("runs") / "begun"
    seen: list[int] = []

    def stop(line: dict[str, Any]) -> None:
        if line["kind"] == "eval":
            seen.append(line["step"])
            if len(seen) == 2:
                raise Stopped

    with pytest.raises(Stopped):
        train(*made, out, SMALL, stop, quiet=True)
    return out


def resumed(made: tuple[Path, Path], begun: Path, out: Path, fingerprint: dict[str, Any], whole: bool = False) -> Path:
    """A copy of the run, its state with another fingerprint, taken up; whole: trained to its end."""
    shutil.copytree(begun, out)
    path = out / "state" / "run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps(run | {"identity": fingerprint}))

    def stop(line: dict[str, Any]) -> None:
        assert line["kind"] != "start" or line["step"] == run["step"] > 0
        if not whole:
            raise Stopped

    with nullcontext() if whole else pytest.raises(Stopped):
        train(*made, out, SMALL, stop, quiet=True)
    return out


@pytest.mark.slow
def test_runs_of_older_versions_go_on(made: tuple[Path, Path], begun: Path, whole: Path, tmp_path: Path) -> None:
    first = {  # as bitdraft 0.1.0 wrote it
        "layers": 1, "hidden": 64, "vocab": None, "loss": "kl", "temperature": 1.0, "tokens": 20_000, "batch": 4,
        "lr": 5e-3, "warmup": 0.05, "weight_decay": 0.1, "clip": 1.0, "seed": 0, "eval_share": 0.02, "eval_rows": 64,
        "evals": 5, "bits": None, "dtype": "auto", "teacher_embedding": True,
        "data": hashlib.sha256((made[0] / "manifest.json").read_bytes()).hexdigest(),
    }  # fmt: skip
    assert same(resumed(made, begun, tmp_path / "first", first, whole=True), whole)
    with pytest.raises(UserError, match=r"begun there with live_prompts = 0, not 6"):
        train(*made, shutil.copytree(begun, tmp_path / "live"), dataclasses.replace(SMALL, live_prompts=6), quiet=True)
    # One that knew fewer settings did what their defaults do; what was set otherwise is another run.
    older = {name: value for name, value in first.items() if name not in ("dtype", "teacher_embedding")}
    resumed(made, begun, tmp_path / "older", older)
    for number, (change, named) in enumerate(
        (
            ({"clip": 0.5}, r"begun there with clip = 0\.5, not 1\.0"),
            ({"unheard_of": 3}, "begun there with unheard_of = 3, not None"),
            ({"data": "0" * 64}, "begun there with other data"),
        )
    ):
        with pytest.raises(UserError, match=named):
            resumed(made, begun, tmp_path / f"other-{number}", older | change)


@pytest.mark.slow
def test_a_teachers_files_belong_to_a_run(made: tuple[Path, Path], begun: Path, whole: Path, tmp_path: Path) -> None:
    data, teacher = made
    other = shutil.copytree(teacher, tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    with pytest.raises(UserError, match=r"begun there with another config\.json of the teacher"):
        train(data, other, shutil.copytree(begun, tmp_path / "begun"), SMALL, quiet=True)
    finished = shutil.copytree(whole, tmp_path / "whole")
    with pytest.raises(UserError, match=r"trained with another config\.json of the teacher"):
        train(data, other, finished, SMALL, quiet=True)
    content = json.loads((teacher / "tokenizer.json").read_text())
    (other / "config.json").write_text(json.dumps(config))
    (other / "tokenizer.json").write_text(
        json.dumps(content | {"normalizer": {"type": "Replace", "pattern": {"String": "\x07"}, "content": ""}})
    )
    with pytest.raises(UserError, match=r"trained with another tokenizer\.json of the teacher"):
        train(data, other, finished, SMALL, quiet=True)
    about = json.loads((finished / "draft.json").read_text())
    del about["training"]["teacher_files"]["tokenizer.json"]  # as older versions left it
    (finished / "draft.json").write_text(json.dumps(about))
    assert train(data, other, finished, SMALL, quiet=True).done_before
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 77.0}))
    del about["training"]["teacher_files"]
    (finished / "draft.json").write_text(json.dumps(about))
    assert train(data, other, finished, SMALL, quiet=True).done_before


@pytest.mark.slow
def test_data_that_grow_as_training_begins(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft names the manifest whose rows it has seen, not the one that is there a moment later."""
    data = shutil.copytree(made[0], tmp_path / "data")
    whole = json.loads((data / "manifest.json").read_text())
    whole.pop("sha256")
    short = json.dumps(whole | {"complete": False, "shards": whole["shards"][:1]})
    (data / "manifest.json").write_text(short)

    def slow(folder: Path) -> None:
        (data / "manifest.json").write_text(json.dumps(whole))

    monkeypatch.setattr("distill.training.run.check_tokenizer", slow)
    train(data, made[1], tmp_path / "draft", SMALL, quiet=True)
    told = json.loads((tmp_path / "draft" / "draft.json").read_text())["training"]["data"]
    assert told["complete"] is False and told["sha256"] == hashlib.sha256(short.encode()).hexdigest()


@pytest.mark.slow
def test_a_teacher_edited_while_its_draft_is_trained(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    """The draft would get a tokenizer that it was not trained with, or none."""
    data, teacher, out = made[0], shutil.copytree(made[1], tmp_path / "teacher"), tmp_path / "draft"
    path = teacher / "tokenizer_config.json"
    before = path.read_text()

    def take_away(line: dict[str, Any]) -> None:
        if line["kind"] == "eval" and teacher.exists():
            teacher.rename(tmp_path / "away")

    def edit(line: dict[str, Any]) -> None:
        if line["kind"] == "start":
            path.write_text(json.dumps(json.loads(before) | {"chat_template": "{{ messages[0].content }}!"}))

    with pytest.raises(UserError, match=f"^{teacher}: is not there"):
        train(data, teacher, out, SMALL, take_away, quiet=True)
    (tmp_path / "away").rename(teacher)
    with pytest.raises(UserError, match="teacher: its chat template was changed meanwhile"):
        train(data, teacher, out, SMALL, edit, quiet=True)
    assert not (out / "draft.json").exists()
    path.write_text(before)
    train(data, teacher, out, SMALL, quiet=True)
    assert same(out, whole)


def test_a_batch_of_more_rows_than_there_are(
    made: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is as large as it can be; that is said, and stands in draft.json, in the results and on the card."""
    out, asked = tmp_path / "draft", dataclasses.replace(SMALL, tokens=2_000, batch=10_000)
    first = train(*made, out, asked)
    rows = read_json_lines(out / "log.jsonl")[0]["train_rows"]
    told = [line for line in capsys.readouterr().err.splitlines() if "--batch" in line]
    assert len(told) == 1 and str(made[0]) in told[0] and f"--batch 10000 is {rows}" in told[0]
    about = json.loads((out / "draft.json").read_text())["training"]
    assert first.batch == about["batch"] == rows and about["settings"]["batch"] == 10_000
    assert first.tokens == first.steps * rows * SEQ_LEN
    assert f"| rows a step | {rows} |" in prepare(out, "a/b").card
    again = train(*made, out, asked)  # what was asked for is the same
    assert again.done_before and again.batch == rows


def test_the_default_folder_is_the_one_of_older_versions() -> None:
    """0.1.0 hashed this very text; a setting that came later must not change it."""
    text = (
        "([('batch', 4), ('bits', None), ('clip', 1.0), ('dtype', 'auto'), ('eval_rows', 64), ('eval_share', 0.02),"
        " ('evals', 5), ('hidden', 64), ('layers', 1), ('loss', 'kl'), ('lr', 0.005), ('seed', 0),"
        " ('teacher_embedding', True), ('temperature', 1.0), ('tokens', 20000), ('vocab', None), ('warmup', 0.05),"
        " ('weight_decay', 0.1)], '/somewhere/data', 'abc')"
    )
    expected = f"draft-bitnet-1x64-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    assert default_folder(SMALL, [Path("/somewhere/data")], "maker/bitnet", "abc").name == expected


@pytest.mark.slow
def test_drafts_of_older_versions_are_finished(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "draft")
    path = out / "draft.json"
    about = json.loads(path.read_text())
    del about["training"]["settings"]["dtype"], about["training"]["settings"]["live_prompts"]
    path.write_text(json.dumps(about))
    assert train(*made, out, SMALL, quiet=True).done_before
    with (out / "log.jsonl").open("ab") as log:
        log.write(b'"a note"\n')
    assert train(*made, out, SMALL, quiet=True).done_before
    with (out / "log.jsonl").open("ab") as log:
        log.write(b"\xff\n")
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be read"):
        train(*made, out, SMALL, quiet=True)
    (out / "log.jsonl").unlink()
    with pytest.raises(UserError, match="trained with dtype = auto, not float32"):
        train(*made, out, dataclasses.replace(SMALL, dtype="float32"), quiet=True)


@pytest.mark.slow
def test_interrupted_leaves_a_usable_draft_and_goes_on(made: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    process = start(made, out)
    wait_for_eval(out, process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert "KeyboardInterrupt: stopped after step" in errors
    stopped = checkpoint.load(out)
    assert stopped.provenance["complete"] is False
    assert (out / "state").is_dir()
    train(*made, out, SMALL, quiet=True)
    assert same(out, whole)
    assert not (out / "state").exists()


def test_untrained_positions_and_other_documents_have_no_gradient(made: tuple[Path, Path]) -> None:
    """Only trained positions count: what the teacher says elsewhere, and padding, change nothing."""
    config = DraftConfig.for_teacher(made[1], 1, 64)
    start_weights = llama.create(config, 0)
    plain = block(4, seed=9)
    rubbish = np.random.default_rng(0).integers(VOCAB, size=plain.tokens.shape).astype(np.int32)
    off = ~plain.loss_mask
    changed = dataclasses.replace(
        plain,
        tokens=np.where(plain.segments == 0, rubbish, plain.tokens),
        top_logprobs=np.where(off[..., None], np.float32(-1), plain.top_logprobs),
        lse=np.where(off[..., None], np.float32(3), plain.lse),
    )
    step = Step(Standalone(config), FusedHead("kl", eager=True), 0.1, 1.0, mx.float32)
    results = []
    for one in (plain, changed):
        tensors = {"weights": dict(start_weights)} | {
            part: {name: mx.zeros_like(w) for name, w in start_weights.items()} for part in ("m", "v")
        }
        figures = step(tensors, assemble([(one, i) for i in range(4)], 0), 1, 1e-2)
        assert figures[2].item() == plain.loss_mask.sum()
        results.append(tensors["m"])
    for name in results[0]:
        assert np.allclose(np.array(results[0][name]), np.array(results[1][name]), atol=1e-7)
    assert any(np.array(m).any() for m in results[0].values())


def test_order_is_a_function_of_seed_and_batch_number(made: tuple[Path, Path]) -> None:
    data = Dataset.open(made[0])
    loaders = [DataLoader(data, 1.0, 4, seed, 0.1, 64) for seed in (0, 0, 1)]

    def tokens(loader: DataLoader, first: int, count: int) -> list[bytes]:
        batches = loader.batches(first)
        found = [next(batches).tokens.tobytes() for _ in range(count)]
        batches.close()
        return found

    whole_order = tokens(loaders[0], 0, 30)
    assert tokens(loaders[1], 17, 13) == whole_order[17:]
    assert tokens(loaders[2], 0, 30) != whole_order
    # Each pass sees each training row once, and never a held-out one.
    for epoch in (0, 1):
        rows = [row for window in loaders[0].windows(epoch) for row in window]
        assert len(rows) == len(set(rows)) == loaders[0].rows
        assert not set(rows) & set(loaders[0].held_out)
        assert len(rows) + len(loaders[0].held_out) == sum(shard.rows for shard in data.shards)


@pytest.mark.parametrize("rows", [[2], [1, 1], [100], [7] * 50, [0, 5, 0], [1000, 3]])
def test_held_out_rows(rows: list[int]) -> None:
    held = held_out_rows(rows, 0.02, 64)
    assert 1 <= len(held) <= max(1, min(64, sum(rows) // 8))
    assert len(set(held)) == len(held)
    assert all(0 <= i < rows[s] for s, i in held)


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(i, 100, 1.0, 0.1) for i in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_faults_are_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    data, teacher = made
    out = tmp_path / "out"

    def fails(match: str, data: Path = data, teacher: Path = teacher, out: Path = out, **changes: object) -> None:
        with pytest.raises(UserError, match=match):
            train(data, teacher, out, dataclasses.replace(SMALL, **changes), quiet=True)

    fails("--lr -1", lr=-1.0)
    fails("--loss x: known are", loss="x")
    fails("temperature 0.5 was not collected, only 1, 0.7", temperature=0.5)
    fails("--hidden 65", hidden=65)
    fails("100000 layers x 64", layers=100_000)
    fails("no such dataset", data=tmp_path / "nowhere")
    fails("config.json: missing|tokenizer.json", teacher=tmp_path)
    fails("no position is marked", data=dataset(tmp_path / "masked", teacher, mask=False))
    fails("holds 0 rows", data=dataset(tmp_path / "empty", teacher, shards=0))
    other = teacher_folder(tmp_path / "other", vocab=VOCAB + 1)
    fails("was collected from synthetic, whose tokenizer", teacher=other)
    bare = teacher_folder(tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    fails(r"bare/tokenizer_config\.json: not there", teacher=bare)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("x")
    fails("holds file and is no draft", out=tmp_path / "foreign")
    fails("is a file", out=tmp_path / "foreign" / "file")
    assert not out.exists()  # nothing was begun
