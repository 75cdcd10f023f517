"""`distill` as its users meet it: its output and its exit code."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import TEACHER, Command, changed_copy, unsealed
from synthetic import dataset, teacher_folder

from distill.data.reply_dataset import Replies


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    return dataset(root / "data", teacher_folder(root / "teacher"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--nope"], ["--nope"]),
        (["frob"], ["frob"]),
        (["inspect"], ["dataset"]),
        (["inspect", "gone"], ["gone: no such dataset folder"]),
        (["verify", "."], ["not a dataset"]),
        (["collect", "--tokens", 0], ["--tokens 0"]),
        (["collect", "--source", "gone.jsonl"], ["gone.jsonl"]),
        (["collect", "--source", "-"], ["--source -"]),
        (["collect", "--exclude", "-"], ["--exclude -"]),
        (["collect", "--source", "odd"], ["odd: holds a file whose name is not valid UTF-8: b?.txt"]),
        (["collect", "--source", "odd/b\udcff.txt"], ["odd/b?.txt: is not valid UTF-8"]),
        (["collect", "--source", "bad.jsonl", "--dry-run", "--max-reply", 4], ["bad.jsonl: line 1 is not JSON"]),
        (["collect", "--teacher", "gone"], ["--teacher gone"]),
        (["collect", "--temperature", 0], ["--temperature 0.0"]),
        (["collect", "--seed", -1], ["--seed"]),
        (["convert", "--out", "."], ["is the current folder or holds it"]),
        (["convert", "--out", ""], ["--out is empty"]),
        (["collect", "--source", ""], ["--source is empty"]),
        (["collect", "--exclude", ""], ["--exclude is empty"]),
        (["train", "--data="], ["--data is empty"]),
        (["inspect", ""], ["an argument is empty"]),
        (["run", "pipe"], ["pipe: is no regular file"]),
        (["convert", "--out", "/"], ["--out /: is the current folder or holds it"]),
        (["convert", "--out", "round"], ["round: goes through a link"]),
        (["collect", "--out", "round"], ["round: goes through a link"]),
        (["collect", "--out", "round/below"], ["round/below: goes through a link"]),
        (["evaluate", "--out", "round"], ["round: goes through a link"]),
        (["run", "round.toml"], ["round/", ": goes through a link"]),
        (["train", "--json", "round"], ["--json round: goes through a link"]),
        (["train", "--json", "astray"], ["--json astray", "nowhere"]),
        (["publish", "--repo", "a/b", "--draft", "/"], ["/draft.json: missing"]),
        (["collect", "--json", "no/x.json"], ["--json no/x.json"]),
        (["collect", "--replies", "gone"], ["gone: no such dataset folder"]),
        (["collect", "--replies", "gone", "--tokens", 9], ["--replies gone", "--tokens would decide new ones"]),
        (["collect", "--out", "foreign"], ["foreign", "holds thesis.txt"]),
        (["collect", "--out", "bad.jsonl"], ["bad.jsonl"]),
        (["collect", "--out", "new/huge", "--tokens", 10**15], ["no room left in new/huge"]),
        (["collect", "--teacher", "spoilt"], ["spoilt", "no positive number"]),
        (["collect", "--teacher", "bare"], ["bare/tokenizer_config.json: not there"]),
        (["run", "bare.toml"], ["bare/tokenizer_config.json: not there"]),
        (["train", "--layers", 0, "--data", "gone"], ["gone"]),
        (["train"], ["distill collect", "--data"]),
    ],
)
def test_bad_input_is_one_line(inside: Command, work: Path, options: list[object], named: list[str]) -> None:
    if not (work / "foreign").exists():
        import mlx.core as mx

        (work / "bad.jsonl").write_text('{"prompt": \n{"prompt": "a"}\n')
        arrays = mx.load(str(TEACHER / "model.safetensors"))
        assert isinstance(arrays, dict)
        arrays["model.layers.4.mlp.up_proj.weight_scale"] = mx.array([0.0])
        mx.save_safetensors(str(work / "spoilt.safetensors"), arrays, {"format": "mlx"})
        changed_copy(TEACHER, work / "spoilt", model__safetensors=(work / "spoilt.safetensors").read_bytes())
        changed_copy(TEACHER, work / "bare", tokenizer_config__json=None)
        (work / "odd").mkdir()
        (work / "odd" / "b\udcff.txt").write_text("It was a bright cold day in April.")
        (work / "round").symlink_to("round")
        os.mkfifo(work / "pipe")
        (work / "astray").symlink_to("nowhere/x.json")
        (work / "round.toml").write_text('out = "round"\n')
        (work / "bare.toml").write_text('teacher = "bare"\n')
        (work / "foreign").mkdir()
        (work / "foreign" / "thesis.txt").write_text("years of work")
    before = sorted(work.rglob("*"))
    inside("distill", *options).refused("distill", *named)
    assert sorted(work.rglob("*")) == before


def test_what_one_process_does_is_refused_to_ranks(inside: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, said in ((0, ["evaluate", "only collect and train run under mlx.launch"]), (1, [])):
        ranks = {"MLX_RANK": rank, "MLX_WORLD_SIZE": 2, "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": 1}
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))
        done = inside("distill", "evaluate", "--limit", 1)
        assert done.code == 2 and len(done.err.splitlines()) == bool(said) and all(text in done.err for text in said)


def test_inspect_and_verify(inside: Command, data: Path) -> None:
    inspected = inside("distill", "inspect", data, "--json", "-")
    assert inspected.code == 0 and json.loads(inspected.out)["complete"] is True
    shown = inside("distill", "inspect", data)
    assert shown.code == 0 and "logits, complete" in shown.out and "{" not in shown.out
    fine = inside("distill", "verify", data)
    assert (fine.code, fine.err) == (0, "") and "all well" in fine.out

    manifest = data / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(unsealed(manifest).replace('"complete": true', '"complete": false'))
    assert "not complete" in inside("distill", "verify", data).out
    manifest.write_text(whole)
    shard = sorted(data.glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    wrong = inside("distill", "verify", data, "--json", "-")
    assert wrong.code == 1  # a check that failed
    report = json.loads(wrong.out)
    assert report["ok"] is False and report["problems"][0]["file"] == shard.name
    told = inside("distill", "verify", data)
    assert told.code == 1 and str(shard) in told.out


def test_names_of_others_do_nothing_to_a_terminal(inside: Command, tmp_path: Path) -> None:
    """A dataset may come from anywhere; so may what its manifest calls its teacher and its sources."""
    copy = dataset(tmp_path / "data\x1b[2J", teacher_folder(tmp_path / "teacher"))
    content = json.loads(unsealed(copy / "manifest.json"))
    content["settings"]["sources"] = [{"name": "a\nall well\x1b[1A", "kind": "file", "sha256": "0" * 64}]
    (copy / "manifest.json").write_text(json.dumps(content))
    shown = inside("distill", "inspect", copy)
    assert shown.code == 0 and "\x1b" not in shown.out and r"a\nall well\x1b[1A" in shown.out
    next(copy.glob("shard-*")).unlink()
    told = inside("distill", "verify", copy)
    assert told.code == 1 and "\x1b" not in told.out and r"data\x1b[2J" in told.out
    failed = inside("distill", "inspect", tmp_path / "gone\x1b[2J")
    failed.refused("distill", r"gone\x1b[2J")


def test_verify_tells_a_damaged_dataset_from_none(inside: Command, data: Path, tmp_path: Path) -> None:
    """Where files of a dataset are, a manifest that says nothing of one is a check that failed, whatever it holds."""
    damaged, none = shutil.copytree(data, tmp_path / "damaged"), tmp_path / "none"
    none.mkdir()
    for content in (b"", b"[]", b"{}", b"null", b'{"format": "other"}', None):
        for folder in (damaged, none):
            (folder / "manifest.json").unlink(missing_ok=True)
            if content is not None:
                (folder / "manifest.json").write_bytes(content)
        done = inside("distill", "verify", damaged, "--repair", "--json", "-")
        assert done.code == 1, (content, done.err)
        assert [problem["file"] for problem in json.loads(done.out)["problems"]] == ["manifest.json"]
        inside("distill", "verify", none).refused("distill", str(none))


def test_a_folder_in_a_files_place_is_named(inside: Command, data: Path, tmp_path: Path) -> None:
    """Nothing is dropped, and no folder of the user's deleted."""
    folder = shutil.copytree(data, tmp_path / "data")
    before = (folder / "manifest.json").read_bytes()
    for place in (sorted(folder.glob("shard-*"))[1], folder / ".tmp-manifest.json"):
        kept = place.read_bytes() if place.exists() else None
        place.unlink(missing_ok=True)
        (place / "mine").mkdir(parents=True)
        if kept is not None:
            assert inside("distill", "verify", folder).code == 1
        else:
            sorted(folder.glob("shard-*"))[0].write_bytes(b"damaged")
        inside("distill", "verify", folder, "--repair").refused("distill", str(place))
        assert (place / "mine").is_dir() and (folder / "manifest.json").read_bytes() == before
        shutil.rmtree(place)
        if kept is not None:
            place.write_bytes(kept)


@pytest.mark.slow
def test_dry_run_writes_nothing(inside: Command, work: Path, small_teacher: Path) -> None:
    (work / "one.txt").write_text("It was a bright cold day in April. " * 50)
    before = sorted(work.rglob("*"))
    options = ("--teacher", small_teacher, "--source", "one.txt", "--tokens", 5000, "--seq-len", 64)
    done = inside("distill", "collect", *options, "--dry-run", "--json", "-")
    assert done.code == 0 and sorted(work.rglob("*")) == before
    estimate = json.loads(done.out)["estimate"]
    assert estimate["tokens"] == 5000 and estimate["seconds"] > 0
    assert 5000 * 50 < estimate["bytes"] <= 5000 * 128
    assert "about 5,000 tokens" in done.err and "tok/s" in done.err


@pytest.mark.slow
def test_bars_of_replies_end_at_what_was_written(command: Command, work: Path, small_teacher: Path) -> None:
    """One prompt brings less than the 100 tokens asked of it, and some of eight the rest."""
    (work / "one.jsonl").write_text('{"prompt": "Hi"}\n', encoding="utf-8")
    (work / "eight.jsonl").write_text(
        "".join(f'{{"prompt": "{8 * letter}?"}}\n' for letter in "abcdefgh"), encoding="utf-8"
    )
    options = ("--teacher", small_teacher, "--source", "one.jsonl", "--source", "eight.jsonl", "--tokens", 200)
    options += ("--max-reply", 32, "--reply-batch", 8, "--batch", 1)
    done = command("distill", "collect", *options, "--out", "bars")
    assert done.code == 0, done.err
    bars = [line for line in done.err.replace("\r", "\n").splitlines() if line.startswith("teacher replies")]
    ends = [match for line in bars if (match := re.search(r"100%.* (\d+)\.?\d*/(\d+)\.?\d* \[", line))]
    (replies,) = work.glob("replies-*")
    written = [sum(len(e.tokens) for e in Replies.open(replies) if e.source == source) for source in (0, 1)]
    assert written[0] < 100 and sum(written) == 200
    # The first is answered to its end; of the second's replies, those that were not needed are not kept.
    assert any(int(end[1]) == int(end[2]) == written[0] for end in ends), bars
    assert any(int(end[1]) == int(end[2]) >= written[1] for end in ends), bars


def test_help(inside: Command) -> None:
    for options, words in (
        ([], ("collect", "inspect", "verify", "train", "evaluate", "run")),
        (
            ["collect"],
            ("--source", "--no-reply", "--exclude", "--tokens", "--seq-len", "--dry-run", "--replies", "default: 512"),
        ),
        (["evaluate"], ("--draft", "--prompts", "--limit", "--k", "--max-tokens", "--head", "--out")),
        (["run"], ("RECIPE", "--from", "--dry-run")),
        (["train"], ("--layers", "--hidden", "--loss", "--tokens", "--bits")),
    ):
        done = inside("distill", *options, "--help")
        assert done.code == 0 and done.err == "" and "Usage: distill" in done.out
        for word in words:
            assert word in done.out, word
