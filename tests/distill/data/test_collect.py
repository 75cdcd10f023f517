"""Collection: what goes into rows, what teachers say of them, and that killing it changes no byte."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, Command, arguments, changed_copy, environment, in_background, unsealed

from decode.batching import Batch, Job, Reply
from decode.models.checkpoint import Checkpoint, find_teacher
from decode.prompts import make_prompt
from decode.tokenizer import Tokenizer
from distill.data.collect import Collector, plan_collection, plan_scoring
from distill.data.duplicates import NearDuplicates
from distill.data.exclusion import Excluded
from distill.data.inspection import inspect_dataset, table, verify
from distill.data.manifest import DatasetSettings, folder_name
from distill.data.packing import Segment, cut, pack, segment
from distill.data.prompts import Chosen, encode_text, split_text, wants_reply
from distill.data.reply_dataset import Example, Replies
from distill.data.rows import Rows
from distill.data.settings import CollectSettings
from distill.data.shards import Dataset
from distill.data.sources import Document, LeftOut, normalise_prompt, read_source
from distill.data.supply import Supply
from kernels import UserError
from kernels.files import sha256

OPTIONS = ("--tokens", 1200, "--seq-len", 128, "--max-reply", 16, "--reply-batch", 4, "--batch", 2)


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Checkpoint:
    return find_teacher(str(small_teacher))


def ask(number: int) -> str:
    """A prompt that is near no other."""
    return f"Tell me something about the number {hashlib.sha256(b'%d' % number).hexdigest()[:12]}."


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Prompts, some of them held out, and conversations; plain text."""
    folder = tmp_path_factory.mktemp("sources")
    held_out = [json.loads(line)["prompt"] for line in (ROOT / "data" / "eval.jsonl").open(encoding="utf-8")]
    lines: list[dict[str, object]] = [{"prompt": ask(i)} for i in range(60)]
    lines[3:3] = [{"prompt": f"  {held_out[0].upper()} "}, {"messages": [{"role": "user", "content": held_out[1]}]}]
    lines.append(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = "\n\n".join(f"Paragraph {i}. " + "The ship sailed on over the grey sea. " * 9 for i in range(40))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return str(folder / "prompts.jsonl"), str(folder / "text.txt")


@pytest.fixture(scope="module")
def settings(sources: tuple[str, ...]) -> CollectSettings:
    return CollectSettings(
        sources=sources,
        exclude=(str(ROOT / "data" / "eval.jsonl"),),
        tokens=1500,
        seq_len=128,
        batch=2,
        reply_batch=4,
        max_reply=16,
        temperatures=(1.0, 0.7),
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def short_files() -> Iterator[None]:
    """So that a small reply dataset has several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.data.reply_pass.EXAMPLES_PER_FILE", 8)
        yield


@pytest.fixture(scope="module")
def collector(
    teacher: Checkpoint, settings: CollectSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Collector, Dataset]:
    seen: list[tuple[str, int, int | None]] = []
    collector = Collector(
        plan_collection(teacher, settings, tmp_path_factory.mktemp("data") / "d"), lambda *step: seen.append(step)
    )
    dataset = collector.run()
    for stage in ("replies", "scoring"):
        totals = [total for name, _, total in seen if name == stage and total is not None]
        assert len(totals) == 1
    assert sum(done for name, done, total in seen if name == "scoring" and total is None) == dataset.tokens
    return collector, dataset


def copied(collector: Collector, folder: Path) -> Collector:
    """A collector of copies of what this one has made."""
    again, plan = copy.copy(collector), collector.plan
    shutil.copytree(plan.folder, folder / "d")
    shutil.copytree(plan.replies, folder / plan.replies.name)
    again.plan = replace(plan, folder=folder / "d", replies=folder / plan.replies.name)
    return again


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


@pytest.fixture(scope="module")
def of_prompts(teacher: Checkpoint, settings: CollectSettings, tmp_path_factory: pytest.TempPathFactory) -> Collector:
    chosen = replace(settings, sources=settings.sources[:1], tokens=1500, max_reply=12)
    return Collector(plan_collection(teacher, chosen, tmp_path_factory.mktemp("prompts") / "d"))


@pytest.mark.slow
def test_reply_n_answers_prompt_n_of_a_seeded_order(of_prompts: Collector) -> None:
    """Whatever the batch, and however long the replies before it: they decide only how many there are."""
    (chosen,) = of_prompts.choose()
    documents = list(chosen.documents)
    numbers = [number for number, _ in documents]
    assert [document.line for _, document in documents] != sorted(document.line for _, document in documents)
    replies = list(of_prompts.replies())
    assert [reply.number for reply in replies] == numbers[: len(replies)] and len(replies) > 20
    assert sum(len(reply.tokens) for reply in replies) == 1500  # the last one is cut off
    for reply, (_, document) in zip(replies[:-1], documents, strict=False):
        said = of_prompts.tokenizer.decode(reply.tokens[~reply.trained].tolist())
        assert document.user_texts[-1] in said and reply.replied == (document.kind == "prompt")

    counts = {}
    for name, value in (("reply_batch", 1), ("reply_batch", 9), ("max_reply", 5), ("tokens", 700)):
        other = copy.copy(of_prompts)
        other.settings = replace(of_prompts.settings, **{name: value})  # type: ignore[arg-type]
        recorded = {} if name == "reply_batch" else {name: value}
        folder = of_prompts.plan.folder.parent / f"{name}-{value}"
        manifest = DatasetSettings(of_prompts.plan.reply_manifest.values | recorded)
        other.plan = replace(of_prompts.plan, replies=folder, reply_manifest=manifest)
        found = list(other.replies())
        counts[name] = len(found)
        assert [reply.number for reply in found] == numbers[: len(found)]
        both = list(zip(found[:-1], replies[:-1], strict=False))
        assert all(a.tokens[~a.trained].tolist() == b.tokens[~b.trained].tolist() for a, b in both)
        assert all(a.tokens[a.trained].tolist()[:5] == b.tokens[b.trained].tolist()[:5] for a, b in both)
        if name == "reply_batch":
            assert files(folder) == files(of_prompts.plan.replies)
    assert counts["max_reply"] > len(replies) > counts["tokens"]


@pytest.mark.slow
def test_stopped_anywhere_the_replies_end_the_same(of_prompts: Collector, tmp_path: Path) -> None:
    """Stopped at some of its steps, and with a file lost."""
    of_prompts.replies()
    whole = files(of_prompts.plan.replies)
    again, steps, limit = copy.copy(of_prompts), 0, 3

    def stop(stage: str, done: int, total: int | None) -> None:
        nonlocal steps
        steps += 1
        if steps == limit:
            raise KeyboardInterrupt

    again.plan, again.progress = replace(again.plan, replies=tmp_path), stop
    while not (tmp_path / "manifest.json").exists() or not Replies.open(tmp_path).shards:
        steps, limit = 0, limit + 6
        with pytest.raises(KeyboardInterrupt):
            again.replies()
        assert not Replies.open(tmp_path).complete
    again.progress = of_prompts.progress
    again.replies()
    assert files(tmp_path) == whole and "reply-00001.safetensors" in whole
    (tmp_path / "reply-00000.safetensors").unlink()
    again.replies()
    assert files(tmp_path) == whole


# --- several turns, the teacher's own, weights, duplicates


def parts(tokenizer: Tokenizer, example: Example) -> list[tuple[bool, str]]:
    """The stretches of an example that are learnt, and those that are not, as text without special tokens."""
    cuts = np.flatnonzero(np.diff(example.trained.astype(int))) + 1
    pairs = zip(np.split(example.trained, cuts), np.split(example.tokens, cuts), strict=True)
    return [(bool(mask[0]), tokenizer.decode(tokens.tolist())) for mask, tokens in pairs]


@pytest.fixture(scope="module")
def of_turns(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Collector:
    """What is answered turn by turn, what the teacher says to itself, and conversations of others; with weights. The
    teacher ends its replies with " and", which it says often."""
    folder = tmp_path_factory.mktemp("turns")
    ends = json.dumps({"eos_token_id": [2, 284]}).encode()
    teacher = find_teacher(str(changed_copy(small_teacher, folder / "t", generation_config__json=ends)))
    said = ["Hi", "Hello there, how are you?", "Well", "Good to hear that."]
    chat = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    chats = [{"messages": chat, "kind": "chat"}, {"messages": [*chat, {"role": "user", "content": "Bye"}]}]
    rows = [{"turns": [ask(3 * i), "And then?", "Why so?"], "kind": "dialogue"} for i in range(30)]
    for name, content in (("chats", chats), ("turns", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    sources = (str(folder / "chats.jsonl"), f"{folder / 'turns.jsonl'}=3", "self")
    settings = CollectSettings(sources=sources, tokens=3000, seq_len=256, max_reply=24, reply_batch=4)
    return Collector(plan_collection(teacher, settings, folder / "d"))


@pytest.mark.slow
def test_every_turn_is_answered(of_turns: Collector) -> None:
    """Behind what was said before; of given conversations the assistant's turns are learnt, or only read."""
    replies, tokenizer = list(of_turns.replies()), of_turns.tokenizer
    chats, turns, own = (sum(len(one.tokens) for one in replies if one.source == source) for source in range(3))
    # A source may end with less missing than a reply can be cut to.
    assert 0 < chats < 600 and 0 <= (3000 - chats) * 3 // 4 - turns < 8 and 0 <= 3000 - chats - turns - own < 8
    ends = tokenizer.end_tokens
    dialogues = [one for one in replies if one.kind == "dialogue"][:-1]
    assert len(dialogues) > 10 and all(one.replied for one in dialogues)
    several = 0
    for one in dialogues:
        said = parts(tokenizer, one)
        assert [learnt for learnt, _ in said] == [False, True] * (len(said) // 2)
        asked = [text for learnt, text in said if not learnt]
        assert all(text in given for text, given in zip(("number", "And then?", "Why so?"), asked, strict=False))
        last = [
            int(run[-1]) for run in np.split(one.tokens, np.flatnonzero(np.diff(one.trained.astype(int))) + 1)[1::2]
        ]
        assert all(token in ends for token in last[:-1])  # a reply without an end is the last
        assert len(said) == 6 or last[-1] not in ends or len(one.tokens) > 256 - 24 - 40
        several += len(said) > 2
    assert several > 0
    (chat,) = (one for one in replies if one.kind == "chat")
    assert [text for learnt, text in parts(tokenizer, chat) if learnt] == [
        "Hello there, how are you?",
        "Good to hear that.",
    ]
    (answered,) = (one for one in replies if not one.kind)
    assert [learnt for learnt, _ in parts(tokenizer, answered)] == [False, True] and "Good to hear" in parts(
        tokenizer, answered
    )[0][1]
    table = {one["kind"]: one for one in inspect_dataset(of_turns.plan.replies)["by_kind"]}
    assert list(table) == [None, "chat", "dialogue", "self"]
    assert sum(one["tokens"] for one in table.values()) == chats + turns + own and table["chat"]["replied"] == 0


@pytest.mark.slow
def test_the_teacher_says_both_turns(of_turns: Collector) -> None:
    """From where a user's turn begins, each another one; and what it says is learnt."""
    own, tokenizer = [one for one in of_turns.replies() if one.source == 2], of_turns.tokenizer
    before, behind = tokenizer.open_turn
    assert [one.number for one in own] == list(range(len(own))) and {one.kind for one in own} == {"self"}
    asked = set()
    for one in own[:-1]:
        learnt = one.trained.tolist()
        assert one.tokens[: len(before)].tolist() == before and learnt[: len(before)] == [False] * len(before)
        said = parts(tokenizer, one)
        asked.add(said[1][1])
        if len(said) > 2:
            at = learnt.index(False, len(before))
            assert one.tokens[at : at + len(behind)].tolist() == behind
        assert [learnt for learnt, _ in said] in ([False, True], [False, True, False, True])
    assert len(asked) == len(own) - 1 > 5


@pytest.mark.slow
def test_turns_that_are_stopped_end_the_same(of_turns: Collector, tmp_path: Path) -> None:
    """Whatever was read ahead when they were."""
    of_turns.replies()
    whole = files(of_turns.plan.replies)
    again, steps, stops = copy.copy(of_turns), 0, 0

    def stop(stage: str, done: int, total: int | None) -> None:
        nonlocal steps
        steps += 1
        if steps == 40 * (stops + 1):  # each time it comes further
            raise KeyboardInterrupt

    again.plan, again.progress = replace(again.plan, replies=tmp_path / "r"), stop
    while not (tmp_path / "r").exists() or not Replies.open(tmp_path / "r").complete:
        try:
            again.replies()
        except KeyboardInterrupt:
            steps, stops = 0, stops + 1
    assert stops > 1 and files(tmp_path / "r") == whole


@pytest.mark.parametrize("ahead", [1, 40])
def test_duplicates_are_those_of_what_was_taken(small_teacher: Path, tmp_path: Path, ahead: int) -> None:
    """Within a source and across them, however far one looks ahead: what was only looked at takes no one's place."""
    asked, tokenizer = NearDuplicates(), Tokenizer(small_teacher)
    rows = [[ask(i) for i in range(20)], [ask(i) for i in (30, 0, 31, 3, 2, 30, 32)]]
    rows[0][2:2] = [ask(1).replace("Tell", "tell"), f"{ask(1)[:-1]}?"]
    settings = CollectSettings(sources=("a", "b"), seq_len=128, max_reply=16)
    supplies = []
    for source, prompts in enumerate(rows):
        documents = ((n, Document("prompt", text, None, n, f"{source}: {n}")) for n, text in enumerate(prompts))
        chosen = Chosen((one for one in documents), LeftOut(), LeftOut(), 1)
        supplies.append(Supply(source, chosen, tokenizer, settings, 2048, asked, Excluded()))

    def take(source: int, count: int) -> list[int]:
        supplies[source].ahead(ahead)
        taken = [one.number for one in [supplies[source].take() for _ in range(count)] if one]
        supplies[source].rest()
        return taken

    assert take(0, 4) == [0, 1, 4, 5]  # 0, 1, 2, 3
    assert take(1, 3) == [0, 2, 6]  # 30, 31, 32
    assert supplies[0].left_out.counts == {"the same as a prompt before": 1, "near a prompt before": 1}
    assert supplies[1].left_out.counts == {"the same as a prompt before": 4}
    assert supplies[1].left_out.firsts == {"the same as a prompt before": "1: 1"}
    assert take(0, 30) == list(range(6, 22)) and take(1, 9) == []
    assert supplies[0].take() is None and supplies[0].left_out.counts["near a prompt before"] == 1


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


PICKY = """{% for m in messages %}{% if m.role == 'system' or loop.index0 % 2 != (m.role == 'assistant') | int %}
{{ raise_exception('no ' + m.role + ' here') }}{% endif %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""
DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


def with_template(teacher: Path, folder: Path, template: str) -> Path:
    config = json.loads((teacher / "tokenizer_config.json").read_text()) | {"chat_template": template}
    left = {"chat_template__jinja": None} if (teacher / "chat_template.jinja").exists() else {}
    return changed_copy(teacher, folder, tokenizer_config__json=json.dumps(config).encode(), **left)


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"Something of the {role}'s, said at length."} for role in roles]}


def test_turns_that_are_not_learnt_are_counted(small_teacher: Path, tmp_path: Path) -> None:
    """A template may write an earlier answer otherwise than the last; an empty one teaches nothing; and one may begin
    within a token: with line ends, as those of some models do."""
    said = "{% for m in messages %}{{ m.role }}\n{{ m.content if SHOWN else '(said)' }}<|im_end|>\n{% endfor %}"
    said += "{% if add_generation_prompt %}assistant\n{% endif %}"
    messages = [{"role": role, "content": f"What {role} says."} for role in ("user", "assistant") * 4]
    messages[1]["content"], messages[3]["content"] = "\n\nWhat assistant says.", ""
    document = Document("messages", None, messages, 1, "a.jsonl: line 1")
    for name, shown, learnt, untold in (("a", "true", 3, 0), ("b", "loop.last or m.role == 'user'", 1, 3)):
        tokenizer = Tokenizer(with_template(small_teacher, tmp_path / name, said.replace("SHOWN", shown)))
        left_out = LeftOut()
        ids, trained = encode_text(tokenizer, document, left_out)
        told = tokenizer.decode([token for token, is_learnt in zip(ids, trained, strict=True) if is_learnt])
        assert told.replace("\n", "") == "What assistant says." * learnt
        ends = [i for i in np.flatnonzero(trained) if ids[i] in tokenizer.end_tokens]
        assert len(ends) == learnt
        assert sum(left_out.counts.values()) == untold and set(left_out.firsts.values()) <= {"a.jsonl: line 1"}


@pytest.mark.slow
def test_what_is_left_out_is_counted_by_reason(small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    """A template that refuses a conversation costs that conversation, and not the hours before it."""
    folder, used = tmp_path / "sources", tmp_path / "sources" / "mixed.jsonl"
    folder.mkdir()
    rows = [
        {"prompt": "Tell me something about ships."},
        {"prompt": "Leave this one out."},
        {"prompt": "word " * 200},
        {"text": " "},
        {"text": "Short."},
        turns("system", "user"),
        turns("user", "assistant", "assistant"),
        turns("user", "assistant"),
        {"prompt": "What is 2 + 2?", "completion": "It is 4, as everybody knows."},
    ]
    used.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.md").write_text("Not read.")
    (tmp_path / "held-out.txt").write_text('{"prompt": "leave THIS one out."}\n')
    picky = with_template(small_teacher, tmp_path / "picky", PICKY)
    options = ("--teacher", picky, "--exclude", tmp_path / "held-out.txt", *OPTIONS, "--out", tmp_path / "d")
    done = inside("distill", "collect", "--source", folder, *options, "--json", tmp_path / "c.json")
    assert done.code == 0, done.err
    left_out = json.loads((tmp_path / "c.json").read_text())["left_out"]
    assert {one["source"] for one in left_out} == {"sources"}
    counts = {one["first"].split(" has")[0].split(": the chat")[0]: one["count"] for one in left_out}
    names = ["notes.md", *(f"mixed.jsonl: line {line}" for line in (2, 3, 4, 5))]
    assert counts == dict.fromkeys(names, 1) | {next(x for x in counts if x not in names): 2}
    for one in left_out:
        assert f"sources: {one['count']} left out, {one['reason']} (the first: {one['first']})" in done.err
    (refused,) = (one for one in left_out if one["count"] == 2)
    assert re.match(
        r"mixed.jsonl: line [67]: the chat template refuses it: no (system|assistant) here", refused["first"]
    )
    (replies,) = tmp_path.glob("replies-*")
    assert sorted(example.replied for example in Replies.open(replies)) == [False, False, True]
    assert "mixed.jsonl: line 2" in inside("distill", "inspect", replies).out
    assert "mixed.jsonl: line 2" in inside("distill", "collect", "--source", folder, *options).err  # all is done

    used.write_text("".join(json.dumps(row) + "\n" for row in rows[1:7]))
    nothing = inside("distill", "collect", "--source", folder, *options[:-1], tmp_path / "e")
    assert nothing.code == 2
    for reason in ("notes.md", "excluded", "more than 112 tokens", "empty", "fewer than 8 tokens", "refused"):
        assert reason in nothing.err.splitlines()[-1]


def test_turns_of_weight_0_are_read_where_they_are_not_learnt(
    small_teacher: Path, inside: Command, tmp_path: Path
) -> None:
    """Before a user's last turn, which the teacher answers. With --no-reply they would be learnt."""
    said = turns("user", "assistant", "user")["messages"]
    asked, unlearnt = tmp_path / "asked.jsonl", tmp_path / "unlearnt.jsonl"
    asked.write_text(json.dumps({"messages": [said[0], said[1] | {"weight": 0}, said[2]]}) + "\n")
    unlearnt.write_text(json.dumps({"messages": [said[0], said[1] | {"weight": 0}]}) + "\n")
    teacher = ("--teacher", small_teacher)
    decoded = inside("decode", "plain", *teacher, "--prompts", asked, "--max-tokens", 1)
    assert decoded.code == 0, decoded.err
    collect = ("distill", "collect", *teacher, *OPTIONS, "--quiet")
    done = inside(*collect, "--source", asked, "--out", tmp_path / "d")
    assert done.code == 0, done.err
    (replies,) = tmp_path.glob("replies-*")
    (example,) = Replies.open(replies)
    assert example.replied and "assistant's" in Tokenizer(small_teacher).decode(example.tokens[~example.trained])
    refused = ("weight 0", "line 1")
    inside(*collect, "--source", unlearnt, "--out", tmp_path / "e").refused("distill", *refused, str(unlearnt))
    inside(*collect, "--source", asked, "--no-reply", "--out", tmp_path / "f").refused(
        "distill", *refused, "1 left out"
    )


def test_long_prompts_and_conversations_are_taken_as_often_as_they_are_there(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is stood in for by one that says a word: which documents are taken is what is tested."""
    rng = np.random.default_rng(0)
    pool = [int(n) for n in rng.integers(2, 30, 600)]
    said: list[dict[str, object]] = [{"prompt": f"{i} " * n} for i, n in enumerate(pool, 1000)]
    said += [turns("user", "assistant")] * 200
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in said))
    settings = CollectSettings(sources=(str(tmp_path / "p.jsonl"),), tokens=9000, seq_len=256, max_reply=64)

    class Short(Batch):
        def __init__(self, *options: object) -> None:
            """Needs nothing."""

        def run(self, jobs: Iterator[Job], *told: object) -> Iterator[tuple[int, list[Reply]]]:  # type: ignore[override]
            for place, _ in enumerate(jobs):
                yield place, [Reply([500, 2], "stop")]

    monkeypatch.setattr("distill.data.reply_pass.Batch", Short)
    monkeypatch.setattr(Checkpoint, "load", lambda self: SimpleNamespace(context=2048))
    monkeypatch.setattr("distill.data.reply_pass.EXAMPLES_PER_FILE", 128)
    replies = list(Collector(plan_collection(find_teacher(str(small_teacher)), settings, tmp_path / "d")).replies())
    assert [one.number for one in replies] == list(range(len(replies)))
    asked = [len(one.tokens) - 2 for one in replies if one.replied]
    tokenizer = Tokenizer(small_teacher)
    there = [len(tokenizer.encode_prompt(make_prompt(str(one["prompt"]), "1"))) for one in said[: len(pool)]]
    assert np.mean(asked) == pytest.approx(np.mean(there), rel=0.1)
    assert len(asked) / len(replies) == pytest.approx(600 / 800, abs=0.08)


def test_conversations_that_end_early_are_counted(
    small_teacher: Path, inside: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By source and reason, said at the end and kept in the manifest; also of what an earlier run wrote."""
    turns = [{"turns": [ask(2 * i), ask(2 * i + 1)], "kind": "talk"} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in turns))
    looping, whole = [600, 601] * 8, [500, 501, 2]
    repeating = [600, 601] * 7  # cut for its length, and not looked at for loops there
    said = [
        [Reply(whole, "stop"), Reply(whole, "stop")],
        [Reply(looping, "loop")],
        [Reply(whole, "stop"), Reply(looping, "loop")],
        [Reply(repeating, "length")],
        [Reply(whole, "stop")],  # there was no room for the second turn
        [Reply(whole, "stop"), Reply(whole, "stop")],
    ]
    stop_at = 3

    class Saying(Batch):
        def run(self, jobs: Iterator[Job], *told: object) -> Iterator[tuple[int, list[Reply]]]:  # type: ignore[override]
            for place, job in enumerate(jobs):
                if job.seed[2:] == (stop_at,):
                    raise KeyboardInterrupt
                yield place, said[job.seed[-1] % len(said)]

    monkeypatch.setattr("distill.data.reply_pass.Batch", Saying)
    monkeypatch.setattr("distill.data.reply_pass.EXAMPLES_PER_FILE", 1)
    run = ("collect", "--teacher", small_teacher, "--source", tmp_path / "p.jsonl", "--tokens", 5000, "--seq-len", 128)
    run = (*run, "--max-reply", 16, "--out", tmp_path / "d", "--json", tmp_path / "c.json")
    assert inside("distill", *run).code == 130
    (replies,) = tmp_path.glob("replies-*")
    assert len(Replies.open(replies).shards) == 3
    stop_at = -1
    done = inside("distill", *run)
    assert done.code == 0, done.err
    cut = json.loads((tmp_path / "c.json").read_text())["cut"]
    assert [(one["reason"][:4], one["count"], one["first"]) for one in cut] == [
        ("fell", 2, "number 1"),
        ("has ", 1, "number 3"),
        ("left", 1, "number 4"),
    ]
    assert all(one["source"].endswith("p.jsonl") for one in cut), cut
    assert "2 cut, fell into a loop" in done.err, done.err
    assert inspect_dataset(replies)["cut"] == cut == json.loads((replies / "manifest.json").read_text())["cut"]
    assert "fell into a loop" in table(inspect_dataset(replies)) and verify(replies) == []


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


def test_of_a_hub_dataset_no_more_is_read_than_is_taken(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's client is stood in for: what is asked of it is what is tested."""
    datasets, read = pytest.importorskip("datasets"), list[int]()

    def rows() -> Iterator[dict[str, str]]:
        for number in range(300_000):
            read.append(number)
            yield ({"prompt": ask(number)} if number % 2 else {"text": f"{number} ships sail. " * 9})

    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **options: {"train": rows()})
    settings = CollectSettings(sources=(f"owner/name@{40 * 'a'}",), tokens=600, seq_len=128, max_reply=8, reply_batch=4)
    plan = plan_collection(find_teacher(str(small_teacher)), settings, tmp_path / "d")
    assert 500 < Collector(plan).run().tokens <= 600
    assert len(read) < 10_060
    assert [one.number for one in Replies.open(plan.replies)][:4] == [0, 1, 2, 3]


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


def test_pack_keeps_every_token_once() -> None:
    rng = np.random.default_rng(0)
    segments = []
    for i, size in enumerate(rng.integers(8, 33, 300)):
        tokens = np.full(size, i + 1, np.int32)
        segments.append(Segment(tokens, tokens % 2 == 0))
    rows = pack(segments, 64)
    assert sum(int((ids > 0).sum()) for _, _, ids in rows) == sum(len(p.tokens) for p in segments)
    assert len(rows) < 1.1 * sum(len(p.tokens) for p in segments) / 64
    seen: list[int] = []
    for tokens, mask, ids in rows:
        assert not mask[ids == 0].any() and not tokens[ids == 0].any()
        for number in sorted(set(ids.tolist()) - {0}):
            (value,) = set(tokens[ids == number].tolist())
            seen.append(value)
            assert len(segments[value - 1].tokens) == (ids == number).sum()
            assert set(mask[ids == number].tolist()) == {value % 2 == 0}
    assert sorted(seen) == list(range(1, 301))


def test_cut_drops_ends_too_short_to_learn_from() -> None:
    def sizes(length: int, trained_from: int = 0) -> list[int]:
        mask = np.arange(length) >= trained_from
        return [len(part.tokens) for part in cut(Segment(np.zeros(length, np.int32), mask), 32)]

    assert sizes(70) == [32, 32]
    assert sizes(72) == [32, 32, 8]
    assert sizes(7) == []
    assert sizes(70, trained_from=40) == [32]


def test_split_text() -> None:
    text = "word " * 500 + "\n\n" + "unbroken" * 100
    parts = list(split_text(Document("text", text, None, 1), 300))
    assert "".join(part.text or "" for part in parts) == text
    assert max(len(part.text or "") for part in parts) <= 300 < len(text)
    prompt = Document("prompt", text, None, 1)
    assert list(split_text(prompt, 300)) == [prompt]


def test_texts_are_not_cut_inside_words() -> None:
    """Behind an empty line too, where the next one is far, and at white space of any kind."""
    novels = [document.text or "" for document in islice(read_source(str(ROOT / "data" / "novels.jsonl.xz")), 60)]
    hard = ["\n\n" + "word " * 200, "one\ttwo\nthree\u3000" * 99, ("x" * 299 + " ") * 3, "\n\n".join(["ab " * 99] * 9)]
    cuts = 0
    for text in [*hard, *novels]:
        parts = [part.text or "" for part in split_text(Document("text", text, None, 1), 300)]
        assert "".join(parts) == text and max(map(len, parts)) <= 300
        for before, after in pairwise(parts):
            assert before and (before[-1].isspace() or after[0].isspace()), (before[-20:], after[:20])
        cuts += len(parts) - 1
    assert cuts > 100


def test_wants_reply() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert wants_reply(Document("prompt", "a", None, 1))
    assert not wants_reply(Document("text", "a", None, 1))
    assert wants_reply(Document("messages", None, [user, assistant, user], 1))
    assert not wants_reply(Document("messages", None, [user, assistant], 1))


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


@pytest.mark.slow
def test_nothing_to_collect_from(teacher: Checkpoint, settings: CollectSettings, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    chosen = replace(settings, sources=(str(tmp_path / "empty.jsonl"),))
    collector = Collector(plan_collection(teacher, chosen, tmp_path / "d"))
    assert collector.estimate().tokens == settings.tokens
    for _ in range(2):  # nothing is not a whole dataset of replies that another run would take up
        with pytest.raises(UserError, match=r"empty.jsonl: nothing to collect from"):
            collector.run()
    assert not Dataset.open(tmp_path / "d").complete and not Replies.open(collector.plan.replies).complete


def test_nothing_is_said_with_its_reasons(small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    """Also where every reply was left out, and where they are there from the run before."""
    config = json.loads((small_teacher / "tokenizer_config.json").read_text())
    del config["chat_template"]
    bare = changed_copy(small_teacher, tmp_path / "bare", tokenizer_config__json=json.dumps(config).encode())
    source = tmp_path / "short.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("ab", "cd", "ef")))
    lengths = ("--seq-len", 64, "--max-reply", 3, "--tokens", 100, "--out", tmp_path / "d")
    for _ in range(2):
        done = inside("distill", "collect", "--teacher", bare, "--source", source, *lengths, "--quiet")
        done.refused("distill", str(source), "3 left out", "fewer than 8 tokens")
    (replies,) = tmp_path.glob("replies-*")
    scored = inside("distill", "collect", "--teacher", bare, "--replies", replies, "--out", tmp_path / "e", "--quiet")
    scored.refused("distill", f"--replies {replies}", "3 left out", "fewer than 8 tokens")


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
