"""What a collection leaves out or ends early, and says of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from collecting import OPTIONS, ask, turns, with_template
from conftest import Command, changed_copy

from decode.batching import Batch, Job, Reply
from decode.models.checkpoint import Checkpoint, find_teacher
from decode.prompts import make_prompt
from decode.tokenizer import Tokenizer
from distill.data.collect import Collector, plan_collection
from distill.data.inspection import inspect_dataset, table, verify
from distill.data.prompts import encode_text
from distill.data.reply_dataset import Replies
from distill.data.settings import CollectSettings
from distill.data.shards import Dataset
from distill.data.sources import Document, LeftOut
from kernels import UserError

pytest_plugins = ("collect_fixtures",)
pytestmark = pytest.mark.usefixtures("short_files")

PICKY = """{% for m in messages %}{% if m.role == 'system' or loop.index0 % 2 != (m.role == 'assistant') | int %}
{{ raise_exception('no ' + m.role + ' here') }}{% endif %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""


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

    monkeypatch.setattr("distill.data.collect.Batch", Short)
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

    monkeypatch.setattr("distill.data.collect.Batch", Saying)
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
