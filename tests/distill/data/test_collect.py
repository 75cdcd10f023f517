"""Collection: what goes into rows, what teachers say of them, and that killing it changes no byte."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from collecting import OPTIONS, ask, copied, files, with_template
from conftest import ROOT, Command, arguments, changed_copy, environment, in_background, unsealed

from decode.models.checkpoint import Checkpoint, find_teacher
from distill.data.collect import Collector, plan_collection, plan_scoring
from distill.data.inspection import inspect_dataset, table, verify
from distill.data.manifest import DatasetSettings, folder_name
from distill.data.packing import cut, pack, segment
from distill.data.reply_dataset import Replies
from distill.data.rows import Rows
from distill.data.settings import CollectSettings
from distill.data.shards import Dataset
from distill.data.sources import normalise_prompt
from kernels import UserError
from kernels.files import sha256

pytest_plugins = ("collect_fixtures",)
pytestmark = pytest.mark.usefixtures("short_files")


# --- the dataset


def test_size_and_completeness(collector: tuple[Collector, Dataset], settings: CollectSettings) -> None:
    _, dataset = collector
    assert dataset.complete and verify(dataset.folder) == []
    assert 0.95 * settings.tokens <= dataset.tokens <= settings.tokens
    again = files(dataset.folder)
    assert collector[0].run().tokens == dataset.tokens
    assert files(dataset.folder) == again


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damaged_replies_are_named_and_written_anew(
    collector: tuple[Collector, Dataset], tmp_path: Path, damage: str
) -> None:
    again = copied(collector[0], tmp_path)
    whole = files(tmp_path)
    path = again.plan.replies / "reply-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data) if damage == "flipped" else path.unlink()
    assert [problem.file for problem in verify(tmp_path / "d")] == [f"../{path.parent.name}/{path.name}"]
    verify(tmp_path / "d", repair=True)
    assert not path.exists() and not Dataset.open(tmp_path / "d").complete and verify(tmp_path / "d") == []
    again.run()
    assert files(tmp_path) == whole


def test_reply_manifests_are_verified(collector: tuple[Collector, Dataset], tmp_path: Path) -> None:
    path = copied(collector[0], tmp_path).plan.replies / "manifest.json"
    whole, content = path.read_text(), unsealed(path)
    for change, named in (
        (whole.replace('"seed": 0', '"seed": 1'), "was changed since it was written"),
        (content[:100], "not valid JSON"),
        (content.replace('"seed": 0', '"seed": 1'), "is not the one that the shards were scored from"),
        (content.replace('"rows": 8', '"rows": 9', 1), "lengths is uint32 [8], expected uint32 [9]"),
    ):
        path.write_text(change)
        (problem,) = verify(tmp_path / "d")
        assert problem.file.startswith(f"../{path.parent.name}/") and named in problem.message
    path.unlink()
    assert [problem.file for problem in verify(tmp_path / "d")] == [f"../{path.parent.name}/manifest.json"]
    shutil.rmtree(path.parent)  # shards without their replies are a whole dataset too
    assert verify(tmp_path / "d") == []


def test_held_out_prompts_are_dropped(collector: tuple[Collector, Dataset]) -> None:
    held_out = {
        normalise_prompt(json.loads(line)["prompt"]) for line in (ROOT / "data" / "eval.jsonl").open(encoding="utf-8")
    }
    tokenizer = collector[0].tokenizer
    examples = Replies.open(collector[0].plan.replies)
    answered = [tokenizer.decode(e.tokens[~e.trained].tolist()) for e in examples if e.replied]
    assert answered
    asked = [normalise_prompt(text.rsplit("user\n", 1)[1].rsplit("assistant", 1)[0]) for text in answered]
    assert not held_out & set(asked)
    assert all("tell me something about the number" in text for text in asked)


@pytest.mark.slow
def test_held_out_prompts_would_be_there_otherwise(
    teacher: Checkpoint, settings: CollectSettings, tmp_path: Path
) -> None:
    def prompts(exclude: tuple[str, ...]) -> str:
        chosen = replace(settings, sources=settings.sources[:1], exclude=exclude, reply=False, tokens=100_000)
        collector = Collector(plan_collection(teacher, chosen, tmp_path / "x"))
        rows = collector.rows(collector.replies())
        return normalise_prompt("".join(collector.tokenizer.decode(tokens.tolist()) for tokens, _, _ in rows))

    held_out = normalise_prompt(json.loads((ROOT / "data" / "eval.jsonl").open(encoding="utf-8").readline())["prompt"])
    assert held_out in prompts(())
    assert held_out not in prompts(settings.exclude)


def test_replies_are_the_teachers(collector: tuple[Collector, Dataset]) -> None:
    """A greedy reply, written in a batch, is near what decoding alone gives; its row is trained from its start."""
    model, ends = collector[0].model, collector[0].tokenizer.end_tokens
    replies = [example for example in Replies.open(collector[0].plan.replies) if example.replied]
    greedy = [reply for reply in replies if reply.number % 2 == 0][:6]
    same = total = 0
    for reply in greedy:
        cache = model.new_cache()
        start = int(np.argmax(reply.trained))
        model.prefill(reply.tokens[: start - 1].tolist(), cache)
        for at in range(start, len(reply.tokens)):
            best = int(mx.argmax(model.step([int(reply.tokens[at - 1])], cache).logits[0]).item())
            same, total = same + (best == reply.tokens[at]), total + 1
        assert not set(reply.tokens[start:-1].tolist()) & ends
        assert len(reply.tokens) - start <= 16
    assert same >= 0.95 * total > 0


def test_shards_hold_what_the_teacher_thinks(collector: tuple[Collector, Dataset]) -> None:
    """Against one sequence at a time through the decoding path, which shares nothing with packed scoring."""
    model = collector[0].model
    block = collector[1].read(0)
    checked = 0
    for row in range(0, len(block.tokens), 3):
        for one in set(block.segments[row].tolist()) - {0}:
            places = np.flatnonzero(block.segments[row] == one)
            if len(places) > 60:
                places = places[:60]
            cache = model.new_cache()
            logits = np.array(model.step(block.tokens[row, places].tolist(), cache).logits).astype(np.float64)
            for t, (place, z) in enumerate(zip(places, logits, strict=True)):
                if t % 7:
                    continue
                lse = np.log(np.exp(z - z.max()).sum()) + z.max()
                assert block.lse[row, place, 0] == pytest.approx(lse, abs=0.25)
                warm = np.log(np.exp((z - z.max()) / 0.7).sum()) + z.max() / 0.7
                assert block.lse[row, place, 1] == pytest.approx(warm, abs=0.35)
                p = np.exp(z[block.top_ids[row, place]] - lse)
                assert np.abs(np.exp(block.top_logprobs[row, place]) - p).max() < 0.06
                checked += 1
    assert checked > 20


@pytest.mark.slow
def test_what_the_last_source_lacks_the_first_gives(
    teacher: Checkpoint, settings: CollectSettings, tmp_path: Path
) -> None:
    """And a run that was stopped between the two turns of the first ends with the same bytes."""
    (tmp_path / "short.txt").write_text("The ship sailed on over the grey sea. " * 9)
    chosen = replace(settings, sources=(settings.sources[0], str(tmp_path / "short.txt")), tokens=600)
    turns: list[int] = []

    def stop(stage: str, done: int, total: int | None) -> None:
        turns.extend([] if stage != "replies" or total is None else [total])
        if len(turns) == 2:
            raise KeyboardInterrupt

    folders = [tmp_path / name / "d" for name in ("stopped", "whole")]
    stopped, whole = (Collector(plan_collection(teacher, chosen, folder)) for folder in folders)
    stopped.progress = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert turns[0] == 300 and not Replies.open(stopped.plan.replies).complete
    stopped.progress = whole.progress
    datasets = [stopped.run(), whole.run()]
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert 600 - 16 < datasets[1].tokens <= 600
    assert sum(" left out, " in remark for remark in whole.remarks(datasets[1])) == 1  # what is excluded


@pytest.mark.slow
def test_too_few_tokens_are_told(teacher: Checkpoint, settings: CollectSettings, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("The ship sailed on over the grey sea. " * 9)
    collector = Collector(
        plan_collection(teacher, replace(settings, sources=(str(tmp_path / "short.txt"),)), tmp_path / "d")
    )
    dataset = collector.run()
    assert collector.remarks(dataset) == [
        f"{tmp_path / 'd'}: the sources had only {dataset.tokens} of the 1,500 tokens asked for"
    ]


@pytest.mark.slow
def test_of_a_hub_dataset_that_was_begun_the_commit_stays(
    teacher: Checkpoint, settings: CollectSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub and its client are stood in for: what is asked of them is what is tested."""
    hub, datasets = pytest.importorskip("huggingface_hub"), pytest.importorskip("datasets")
    commit, read = "a" * 40, list[str]()

    def dataset_info(api: object, name: str, revision: str | None) -> SimpleNamespace:
        if not commit:
            raise ConnectionError("offline")
        return SimpleNamespace(sha=commit)

    def load_dataset(*name: object, revision: str, **options: object) -> dict[str, list[dict[str, object]]]:
        read.append(revision)
        lines = [{"text": f"Line {i}. " + "The ship sailed on. " * 20} for i in range(9)]
        return {"train": [{"text": ""}, *lines, {"text": 5}]}

    monkeypatch.setattr(hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chosen = replace(settings, sources=("owner/name",), tokens=300)

    def run() -> tuple[dict[str, bytes], list[str]]:
        read.clear()
        collector = Collector(plan_collection(teacher, chosen, tmp_path / "d"))
        remarks = collector.remarks(collector.run())
        assert "owner/name: 1 left out, empty (the first: owner/name: row 1)" in remarks
        return files(tmp_path / "d"), list(read)

    first, asked = run()
    assert asked == ["a" * 40]
    commit = ""  # offline, and what is whole asks for nothing
    assert run() == (first, [])
    (tmp_path / "d" / "shard-00000.safetensors").unlink()
    commit = "b" * 40  # something was uploaded meanwhile
    assert run() == (first, [])  # the replies are there
    (tmp_path / "d" / "shard-00000.safetensors").unlink()
    (replies,) = tmp_path.glob("replies-*")
    shutil.rmtree(replies)
    assert run() == (first, ["a" * 40])


# --- the passes


@pytest.mark.slow
def test_scoring_can_be_repeated_from_the_replies_alone(
    collector: tuple[Collector, Dataset], teacher: Checkpoint, settings: CollectSettings, tmp_path: Path
) -> None:
    """With equal bytes: after shards were deleted, and elsewhere from copied replies, whose sources are not there."""
    again = copied(collector[0], tmp_path)
    whole = files(tmp_path / "d")
    again.plan = replace(again.plan, sources=("gone",))
    (tmp_path / "d" / "shard-00000.safetensors").unlink()
    again.run()
    assert files(tmp_path / "d") == whole

    again.plan.replies.rename(tmp_path / "elsewhere")
    given = ("top_k", "temperature", "batch")
    plan = plan_scoring(teacher, tmp_path / "elsewhere", settings, given, tmp_path / "there")
    Collector(plan).run()
    assert files(tmp_path / "there") == whole
    assert inspect_dataset(tmp_path / "there")["replies"][0]["folder"] == str(tmp_path / "elsewhere")
    assert str(tmp_path / "elsewhere") in table(inspect_dataset(tmp_path / "there"))


def test_replies_lie_beside_the_folder_itself(small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    """Be it named as `.` or through a link; what of them is not there is not said to be well."""
    (tmp_path / "runs" / "d").mkdir(parents=True)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "l").symlink_to(tmp_path / "runs" / "d")
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": "The ships sailed, and nobody saw them again. " * 20}) + "\n")
    collect = ("distill", "collect", "--teacher", small_teacher, "--source", tmp_path / "s.jsonl", "--no-reply", "-q")
    sizes = ("--tokens", 100, "--seq-len", 32)
    assert inside(*collect, *sizes, "--out", ".", cwd=tmp_path / "runs" / "d").code == 0
    (replies,) = tmp_path.rglob("replies-*")
    assert replies.parent == tmp_path / "runs"
    assert inside(*collect, *sizes, "--out", tmp_path / "links" / "l").code == 0
    assert [*tmp_path.rglob("replies-*")] == [replies]

    ways = [(tmp_path / "runs" / "d", None), (".", tmp_path / "runs" / "d"), (tmp_path / "links" / "l", None)]
    missing = replies / "reply-00000.safetensors"
    kept = missing.read_bytes()
    missing.unlink()
    for folder, cwd in ways:
        found = inside("distill", "verify", folder, cwd=cwd)
        assert found.code == 1 and missing.name in found.out, (folder, found.out)
    missing.write_bytes(kept)
    for folder, cwd in ways:
        assert replies.name not in inside("distill", "verify", folder, cwd=cwd).out
    replies.rename(tmp_path / "elsewhere")
    for folder, cwd in ways:
        found = inside("distill", "verify", folder, "--json", tmp_path / "v.json", cwd=cwd)
        assert found.code == 0 and replies.name in found.out
        assert json.loads((tmp_path / "v.json").read_text())["unchecked"] == [replies.name]


@pytest.mark.slow
def test_other_scores_come_from_the_same_replies(
    collector: tuple[Collector, Dataset], teacher: Checkpoint, settings: CollectSettings, tmp_path: Path
) -> None:
    again = copied(collector[0], tmp_path)
    replies = files(again.plan.replies)
    chosen = replace(settings, top_k=4, temperatures=(1.0,), batch=3, reply_batch=5)
    plan = plan_collection(teacher, chosen, tmp_path / "other")
    assert plan.replies == again.plan.replies
    dataset = Collector(replace(plan, sources=("gone",))).run()
    assert files(plan.replies) == replies and verify(tmp_path / "other") == []
    assert dataset.settings.k == 4 and dataset.tokens == collector[1].tokens
    assert dataset.scored_from == collector[1].scored_from
    assert plan_collection(teacher, replace(settings, seed=1), tmp_path / "other").replies != plan.replies

    shorter = plan_scoring(teacher, plan.replies, replace(settings, seq_len=64), ("seq_len",), tmp_path / "shorter")
    dataset = Collector(shorter).run()
    assert dataset.settings.seq_len == 64 and dataset.tokens > 0.9 * collector[1].tokens
    assert dataset.read(0).tokens.shape[1] == 64 and verify(tmp_path / "shorter") == []


def test_shards_of_other_replies_are_not_mixed(collector: tuple[Collector, Dataset], tmp_path: Path) -> None:
    again = copied(collector[0], tmp_path)
    manifest = again.plan.folder / "manifest.json"
    (sha256,) = (replies.sha256 for replies in collector[1].scored_from)
    whole = unsealed(manifest)
    manifest.write_text(whole.replace(sha256, "0" * 64).replace('"complete": true', '"complete": false'))
    assert "and what is there now is another" in table(inspect_dataset(again.plan.folder))
    with pytest.raises(UserError, match=rf"was begun from other replies \(.*0{{12}}\), not from .*{sha256[:12]}"):
        again.run()


@pytest.mark.slow
def test_what_an_older_version_made_is_taken_up(
    collector: tuple[Collector, Dataset], teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole reply dataset and shards that were begun, whose manifests lack a setting that came later."""
    again = copied(collector[0], tmp_path)
    plan, listed = again.plan, [folder / "manifest.json" for folder in (again.plan.replies, again.plan.folder)]
    replies, begun = (json.loads(unsealed(path)) for path in listed)
    del replies["settings"]["seed"], begun["settings"]["seed"]
    listed[0].write_text(json.dumps(replies, indent=1) + "\n")
    begun |= {"complete": False, "scored_from": [begun["scored_from"][0] | {"sha256": sha256(listed[0])}]}
    listed[1].write_text(json.dumps(begun))
    shard = plan.folder / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    assert again.run().complete and shard.read_bytes() == whole
    assert plan_scoring(teacher, plan.replies, again.settings, (), None).manifest.difference(plan.manifest) is None

    late = [replace(one, option=replace(one.option, added=one.name == "seed")) for one in CollectSettings.schema()]
    monkeypatch.setattr(CollectSettings, "schema", lambda: tuple(late))
    names = [
        folder_name("replies", DatasetSettings(replies["settings"] | seed)) for seed in ({}, {"seed": 0}, {"seed": 1})
    ]
    assert names[0] == names[1] != names[2]


@pytest.mark.slow
def test_replies_that_cannot_be_scored(
    collector: tuple[Collector, Dataset], teacher: Checkpoint, settings: CollectSettings, tmp_path: Path
) -> None:
    folder = copied(collector[0], tmp_path).plan.replies
    manifest = folder / "manifest.json"
    content = unsealed(manifest)

    def refused(message: str, *given: str, change: tuple[str, str] = ("", "")) -> None:
        manifest.write_text(content.replace(*change))
        with pytest.raises(UserError, match=message):
            plan_scoring(teacher, folder, settings, given, tmp_path / "x")
        assert not (tmp_path / "x").exists()

    refused("--tokens would decide new ones", "tokens")
    refused("--source would decide new ones", "source")
    refused("is not complete", change=('"complete": true', '"complete": false'))
    refused(f"was written by .*, not by {teacher.name}", change=(teacher.weights_hash, "0" * 64))
    refused("another tokenizer_hash", change=(teacher.tokenizer_hash, "0" * 64))
    refused("is damaged", change=('"sources"', '"sauces"'))
    refused("is of the older format 2, and cannot be scored again", change=('"version": 4', '"version": 1'))
    with pytest.raises(UserError, match="holds shards, not replies"):
        plan_scoring(teacher, collector[1].folder, settings, (), tmp_path / "x")


# --- what will be read


def test_a_dry_run_says_what_will_be_read(inside: Command, small_teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "a=1.jsonl").write_text(json.dumps({"q": "What?"}) + "\n")
    (tmp_path / "b.txt").write_text("A text.\n")
    sources = (f"{tmp_path / 'a=1.jsonl'}#q=2", str(tmp_path / "b.txt"), "self")
    options = [option for source in sources for option in ("--source", source)]
    done = inside(
        *(
            "distill",
            "collect",
            "--dry-run",
            "--teacher",
            small_teacher,
            *options,
            *OPTIONS,
            "--json",
            tmp_path / "j.json",
        )
    )
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "j.json").read_text())["sources"]
    assert [(one["source"], one["kind"], one["share"]) for one in said] == [
        ("a=1.jsonl#q=2", "file", 0.5),
        ("b.txt", "file", 0.25),
        ("self", "self", 0.25),
    ]
    assert "a=1.jsonl#q=2: 50% of the tokens, column q of a=1.jsonl" in done.err
    refused = inside("distill", "collect", "--teacher", small_teacher, "--source", f"{tmp_path / 'b.txt'}=much")
    refused.refused("distill", "b.txt=much", "the weight much")
    refused = inside("distill", "collect", "--teacher", small_teacher, "--source", "self", "--no-reply")
    refused.refused("distill", "--source self", "--no-reply")
    plain = with_template(small_teacher, tmp_path / "plain", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    inside("distill", "collect", "--teacher", plain, "--source", "self").refused("distill", str(plain), "end token")


# --- what a dataset is made from


DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


@pytest.mark.slow
def test_a_teachers_files_belong_to_a_dataset(
    small_teacher: Path, inside: Command, sources: tuple[str, ...], tmp_path: Path
) -> None:
    """What decides a prompt's tokens; not how a file writes it, nor what tools put beside it for themselves."""
    teacher = changed_copy(small_teacher, tmp_path / "t")
    options = ("collect", "--teacher", teacher, "--source", sources[1], "--tokens", 300, *OPTIONS[2:])
    assert inside("distill", *options, "--out", tmp_path / "d").code == 0
    (replies,) = tmp_path.glob("replies-*")
    before = files(tmp_path / "d")

    def write(name: str, content: dict[str, object]) -> None:
        (teacher / name).unlink(missing_ok=True)
        (teacher / name).write_text(json.dumps(content, indent=7, sort_keys=True))

    kept = {path.name: json.loads(path.read_text()) for path in teacher.glob("*.json")}
    about = {"transformers_version": "9.9.9"}
    for name in ("config.json", "generation_config.json"):
        write(name, kept[name] | about)
    write("tokenizer_config.json", kept["tokenizer_config.json"] | {"backend": "tokenizers", "is_local": True})
    assert inside("distill", *options, "--out", tmp_path / "d").code == 0

    def forgotten() -> None:
        """What an older version began does not know a tokenizer's rules, and goes on."""
        for folder in (replies, tmp_path / "d"):
            manifest = json.loads((folder / "manifest.json").read_text())
            del manifest["settings"]["teacher_files"]["tokenizer.json"]
            manifest.pop("sha256", None)
            (folder / "manifest.json").write_text(json.dumps(manifest))

    digits = {"type": "Digits", "individual_digits": False}
    phi = [token | {"rstrip": token["content"] == "<|im_end|>"} for token in kept["tokenizer.json"]["added_tokens"]]
    helper = {"type": "Replace", "pattern": {"String": "assistant"}, "content": "helper"}
    for name, change in (
        ("config.json", {"rope_theta": 5.0}),
        ("generation_config.json", {"temperature": 0.5}),
        ("tokenizer_config.json", {"bos_token": "<|endoftext|>"}),
        ("tokenizer.json", {"pre_tokenizer": digits}),
        ("tokenizer.json", {"added_tokens": phi}),
        ("tokenizer.json", {"normalizer": helper}),
    ):
        write(name, kept[name] | change)
        inside("distill", *options, "--out", tmp_path / "d").refused("distill", str(tmp_path / "d"), name)
        if name == "tokenizer.json":
            again = inside("distill", "collect", "--replies", replies, "--teacher", teacher, "--out", tmp_path / "e")
            again.refused("distill", str(replies), name)
        write(name, kept[name])
    assert files(tmp_path / "d") == before and not (tmp_path / "e").exists()
    forgotten()
    assert inside("distill", *options, "--out", tmp_path / "d").code == 0


@pytest.mark.slow
def test_a_dataset_is_of_one_time(small_teacher: Path, sources: tuple[str, ...], tmp_path: Path) -> None:
    """A template that prints the time is told that of the first run, which ends up in the manifest."""
    teacher = find_teacher(str(with_template(small_teacher, tmp_path / "t", DATED)))
    settings = CollectSettings(sources=sources[:1], tokens=900, seq_len=128, max_reply=4, reply_batch=2)

    def stop(stage: str, done: int, total: int | None) -> None:
        if list(tmp_path.glob("replies-*/reply-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Collector(plan_collection(teacher, settings, tmp_path / "d"), stop).run()
    time.sleep(1.1)
    collector = Collector(plan_collection(teacher, settings, tmp_path / "d"))
    collector.run()
    told = collector.plan.manifest.values["template_time"].replace("T", " ")
    replies = list(Replies.open(collector.plan.replies))
    assert len(replies) > 10
    assert {collector.tokenizer.decode(one.tokens[~one.trained].tolist())[:19] for one in replies} == {told}
    assert {json.loads(path.read_text())["settings"]["template_time"] for path in tmp_path.glob("*/manifest.json")} == {
        told.replace(" ", "T")
    }
    assert Collector(plan_collection(teacher, settings, tmp_path / "d")).run().complete  # is done, whatever the time


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_sources_edited_while_they_are_read(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Nothing of the edited file is kept, though its lines are read one by one; a touched file is not an edited one.
    late: edited behind the first file of replies."""
    prompts, folder = tmp_path / "p.jsonl", tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("The ships sail home. " * 40)
    prompts.write_text("".join(json.dumps({"prompt": ask(number)}) + "\n" for number in range(400)))
    settings = CollectSettings(
        sources=(str(prompts), str(folder)), tokens=1200, seq_len=128, max_reply=4, reply_batch=4
    )
    monkeypatch.setattr("distill.data.reply_pass.EXAMPLES_PER_FILE", 4)
    teacher, edited = find_teacher(str(small_teacher)), list[str]()

    def edit(stage: str, done: int, total: int | None) -> None:
        os.utime(folder / "a.txt")
        if not edited and bool(list(tmp_path.glob("replies-*/reply-*"))) == late:
            edited.append(prompts.read_text())
            prompts.write_text(edited[0].replace(ask(1)[:4], ask(1)[:4].upper()))

    with pytest.raises(UserError, match=r"p\.jsonl: was changed while it was read"):
        Collector(plan_collection(teacher, settings, tmp_path / "d"), edit).run()
    prompts.write_text(edited[0])
    assert Collector(plan_collection(teacher, settings, tmp_path / "d"), edit).run().complete
    assert Collector(plan_collection(teacher, settings, tmp_path / "undisturbed" / "d")).run().complete
    (made,), (undisturbed,) = tmp_path.glob("replies-*"), tmp_path.glob("undisturbed/replies-*")
    assert files(made) == files(undisturbed)


@pytest.mark.slow
def test_replies_that_an_older_version_began_are_refused(collector: tuple[Collector, Dataset], tmp_path: Path) -> None:
    """It chose another order."""
    again = copied(collector[0], tmp_path)
    manifest = again.plan.replies / "manifest.json"
    content = json.loads(unsealed(manifest))
    manifest.write_text(json.dumps(content | {"version": 3, "complete": False}))
    with pytest.raises(
        UserError, match=re.escape(f"{again.plan.replies}: is an unfinished dataset of the older format 3")
    ):
        again.replies()


# --- rows


def test_rows_are_those_of_all_segments_in_memory(collector: tuple[Collector, Dataset]) -> None:
    """By bytes, though no more than places is held: cut, shuffled by the seed, packed."""
    replies = Replies.open(collector[0].plan.replies)
    for seq_len, seed in ((128, 0), (24, 1)):
        segments = [part for one in replies for part in cut(segment(one.tokens, one.trained), seq_len)]
        order = np.random.default_rng(seed).permutation(len(segments))
        expected = pack([segments[i] for i in order], seq_len)
        rows = Rows(replies, seq_len, seed)
        assert len(rows) == len(expected) > 8
        for row, other in zip([*rows[:3], *rows[3:5], *list(rows)[5:]], expected, strict=True):
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(row, other, strict=True))
        assert rows.sizes.tolist() == [np.count_nonzero(ids) for _, _, ids in expected]


def test_replies_that_go_while_they_are_scored(collector: tuple[Collector, Dataset], tmp_path: Path) -> None:
    again = copied(collector[0], tmp_path)
    rows = Rows(Replies.open(again.plan.replies), 128, 0)
    for path in again.plan.replies.glob("reply-*"):
        path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"reply-0000\d.safetensors"):
        rows[:]


# --- replies


@pytest.mark.slow
def test_the_batch_changes_no_byte(collector: tuple[Collector, Dataset], tmp_path: Path) -> None:
    """Conversations, prompts and texts, sampled and greedy, one at a time and many."""
    plan = collector[0].plan
    rows = [{"prompt": "Say a word " + "more " * n} for n in range(1, 30)]
    rows += [{"turns": [f"Hello {n}", "Go on", "And now?"]} for n in range(6)]
    rows += [{"text": "There is a house at the river. " * n} for n in range(1, 9)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for size in (1, 5, 64):
        settings = replace(plan.settings, sources=(str(tmp_path / "p.jsonl"),), reply_batch=size, tokens=1500)
        out = tmp_path / f"{size}" / "d"
        Collector(plan_collection(plan.teacher, settings, out)).run()
        found.append(files(out.parent))
    assert found[0] == found[1] == found[2]


# --- settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": 0}, "--tokens 0"),
        ({"seq_len": 15}, "--seq-len 15"),
        ({"seq_len": 4096}, "--seq-len 4096: must be 16 to 2048"),
        ({"top_k": 0}, "--top-k 0"),
        ({"top_k": 16385}, "--top-k 16385"),
        ({"batch": 0}, "--batch 0"),
        ({"reply_batch": -1}, "--reply-batch -1"),
        ({"max_reply": 0}, "--max-reply 0"),
        ({"temperatures": (1.0, 0.0)}, "--temperature 0.0"),
        ({"temperatures": (1.0, float("nan"))}, "--temperature nan"),
        ({"reply_temperatures": (-1.0,)}, "--reply-temperature -1.0"),
        ({"sources": ()}, "--source"),
        ({"sources": ("gone.jsonl",)}, "gone.jsonl"),
        ({"exclude": ("gone.jsonl",)}, "gone.jsonl"),
    ],
)
def test_impossible_settings(
    teacher: Checkpoint, settings: CollectSettings, change: dict[str, object], named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        plan_collection(teacher, replace(settings, **change), tmp_path / "d")  # type: ignore[arg-type]
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
def test_caches_beyond_the_memory_are_refused(
    teacher: Checkpoint, settings: CollectSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("kernels.memory.memory_bytes", lambda: 16 << 30)
        for batch, named in ((1 << 16, r"--batch 65536: .* this machine has 17\.2 GB"), (1 << 17, "--batch 131072")):
            with pytest.raises(UserError, match=named):
                Collector(plan_collection(teacher, replace(settings, batch=batch), tmp_path))
        # What fits is estimated from a part of it: with all rows of a batch this would take minutes.
        patch.setattr("distill.data.collect.ESTIMATE_SECONDS", 0.1)
        collector = Collector(plan_collection(teacher, replace(settings, batch=4000, reply=False), tmp_path))
        assert collector.estimate().tokens == settings.tokens
    monkeypatch.setattr("kernels.memory.memory_bytes", lambda: 100_000)
    monkeypatch.setattr("distill.data.collect.check_memory", lambda *shape: None)
    with pytest.raises(UserError, match=rf"--reply-batch {settings.reply_batch}: .* this machine has 0\.0 GB"):
        Collector(plan_collection(teacher, settings, tmp_path)).run()
    with pytest.raises(UserError, match=rf"--reply-batch {settings.reply_batch}: .* this machine has 0\.0 GB"):
        Collector(plan_collection(teacher, settings, tmp_path)).estimate()  # what a dry run does


# --- interruptions


def collect(
    out: Path, teacher: Checkpoint, sources: tuple[str, ...], *more: object, before: str = ""
) -> subprocess.Popen[str]:
    """A process that collects. before: Python that it runs first."""
    options = ["--teacher", teacher.folder, *(option for source in sources for option in ("--source", source))]
    start = arguments("distill", "collect", *options, *OPTIONS, "--quiet", "--out", out, *more)
    return subprocess.Popen(
        [start[0], "-c", before + start[2], *start[3:]], env=environment(), cwd=out.parent, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=in_background,
    )  # fmt: skip


def ends(process: subprocess.Popen[str], code: int, message: str) -> None:
    """It ends with this code, and says this much on standard error."""
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.strip()) == (code, message)


@pytest.mark.slow
def test_however_it_is_stopped_it_ends_with_the_same_bytes(
    teacher: Checkpoint, sources: tuple[str, ...], tmp_path: Path
) -> None:
    """Interrupted and killed, refused for other settings, and out of room; beside a run that nobody disturbed."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    ends(collect(tmp_path / "whole" / "d", teacher, sources), 0, "")
    whole, out = files(tmp_path / "whole"), tmp_path / "stopped" / "d"

    def begun(text: str) -> bool:
        """Whether the manifest of the replies is there and says this."""
        return any(text in path.read_text() for path in out.parent.glob("replies-*/manifest.json"))

    process = collect(out, teacher, sources)
    while process.poll() is None and not begun(""):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    ends(process, 130, "distill: interrupted: finished shards are kept; the same command goes on from there")
    assert not Dataset.open(out).complete

    before = files(out.parent)
    ends(collect(out, teacher, sources, "--seed", 1), 2, f"distill: error: {out}: was begun with seed = 0, not 1")
    assert files(out.parent) == before

    process = collect(out, teacher, sources)
    while process.poll() is None and not begun('"complete": true'):
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert not Dataset.open(out).complete

    largest = max(map(len, whole.values()))  # a limit on file sizes stands in for a full disk
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest - 1}, {largest - 1})); "
    process = collect(out, teacher, sources, before=limit)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1 and f"no room left in {out}" in err
    assert not Dataset.open(out).complete and not list(out.glob(".*"))

    ends(collect(out, teacher, sources), 0, "")
    assert files(out.parent) == whole
