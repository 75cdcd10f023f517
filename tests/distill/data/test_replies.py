"""What a teacher answers: which prompts, in which order, every turn of them, whenever it is stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from collecting import ask, files, parts
from conftest import changed_copy

from decode.models.checkpoint import Checkpoint, find_teacher
from decode.tokenizer import Tokenizer
from distill.data.collect import Collector, plan_collection
from distill.data.duplicates import NearDuplicates
from distill.data.exclusion import Excluded
from distill.data.inspection import inspect_dataset
from distill.data.manifest import DatasetSettings
from distill.data.prompts import Chosen
from distill.data.reply_dataset import Replies
from distill.data.settings import CollectSettings
from distill.data.sources import Document, LeftOut
from distill.data.supply import Supply

pytest_plugins = ("collect_fixtures",)
pytestmark = pytest.mark.usefixtures("short_files")


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
