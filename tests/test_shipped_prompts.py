"""The prompts in data/: made as data/make_prompts.py says, broad, and none near those that are held out."""

import json
import runpy
from collections import Counter
from typing import Any

import pytest
from conftest import ROOT, TEACHER

from decode.prompts import read_prompts, text_of
from decode.tokenizer import Tokenizer
from distill.data.duplicates import NearDuplicates, Parts
from distill.data.sources import read_source

DATA = ROOT / "data"
MAKER = runpy.run_path(str(DATA / "make_prompts.py"))


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "prompts.jsonl").open(encoding="utf-8")]


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / "eval.jsonl").open(encoding="utf-8")]


def user_text(line: dict[str, Any]) -> str:
    messages = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
    return "\n".join(message["content"] for message in messages if message["role"] == "user")


@pytest.mark.slow
def test_the_lists_give_the_file() -> None:
    made = MAKER["make_prompts"]()
    assert made.encode() == (DATA / "prompts.jsonl").read_bytes(), "run: python data/make_prompts.py"


def test_many_prompts_of_many_kinds(lines: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    counts = Counter(line["kind"] for line in lines)
    assert len(counts) >= 20 and min(counts.values()) >= 200
    assert counts.keys() >= {line["category"] for line in held_out}
    assert len([line for line in lines if "messages" in line]) >= 200


def test_none_is_near_a_held_out_one(lines: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    among = NearDuplicates(line["prompt"] for line in held_out)
    for line in lines:
        for text in [user_text(line), *(message["content"] for message in line.get("messages", []))]:
            assert among.find(Parts(text)) is None, line


def test_none_is_near_another(lines: list[dict[str, Any]]) -> None:
    made = NearDuplicates()
    for line in lines:
        assert made.add(Parts(user_text(line))) is None, line


def test_each_is_a_prompt_that_fits(lines: list[dict[str, Any]]) -> None:
    """Of at most 256 tokens, which the default --seq-len less --max-reply leaves, save a few."""
    path = DATA / "prompts.jsonl"
    prompts = read_prompts(path)
    assert len(prompts) == len(lines) == len(list(read_source(path)))
    assert all(text_of(message) == text_of(message).strip() for prompt in prompts for message in prompt.messages)
    longest = sorted(prompts, key=lambda prompt: -sum(len(text_of(message)) for message in prompt.messages))[:200]
    tokenizer = Tokenizer(TEACHER)
    sizes = [len(tokenizer.encode_prompt(prompt)) for prompt in longest]
    assert max(sizes) <= 512 and sum(size > 256 for size in sizes) < 10


# --- the templates' small language


def written(lists: dict[str, Any]) -> list[str]:
    text: list[str] = MAKER["Writer"](lists, {}, MAKER["Random"]("test")).write()
    return text


def test_a_slot_is_filled_the_same_wherever_it_stands() -> None:
    (text,) = written({"templates": ["{Fruit}, {fruit}, {fruit#2}"], "fruit": ["plum", "fig"]})
    assert text in ("Plum, plum, fig", "Fig, fig, plum")
    turns = written({"templates": [["{fruit}", "{fruit}", "{fruit#2}"]], "fruit": ["plum", "fig"]})
    assert turns[0] == turns[1] != turns[2]


def test_members_hold_slots_and_tables_do_not() -> None:
    lists = {"templates": ["{a} and {b.code}"], "a": ["one {c}"], "c": ["of us"], "b": [{"code": "\n{c}\n"}]}
    assert written(lists) == ["one of us and {c}"]
