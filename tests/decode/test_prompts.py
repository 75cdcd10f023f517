"""Prompts from files, arguments and pipes; text that comes out in whole characters."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TEACHER, Command, Result, changed_copy

from decode.prompts import Prompt, gather_prompts, make_prompt, read_prompts
from decode.tokenizer import Tokenizer
from kernels import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TEACHER)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# --- files


def test_json_lines(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one"},
        {"id": "b", "category": "chat", "prompt": "zwei äöü 🙂"},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "three"}], "extra": 1},
    ]
    text = "\r\n".join(json.dumps(line, ensure_ascii=i == 0) for i, line in enumerate(lines)) + "\n\n"
    for start in ("", "\ufeff", "\n"):
        prompts = read_prompts(write(tmp_path / "p.jsonl", start + text))
        assert [p.messages[-1]["content"] for p in prompts] == ["one", "zwei äöü 🙂", "three"]
        assert prompts[1].id == "b" and prompts[1].category == "chat"
        assert prompts[0].category is None
        assert prompts[2].messages[0] == {"role": "system", "content": "be brief"}


def test_plain_text(tmp_path: Path) -> None:
    text = '\ufefffirst\r\n\n  \n\ufeffsecond {"prompt": 1}\n[INST] {name} (1)\n    indented \n[[a link]] and []'
    for content in (text, text.replace("\r\n", "\r").replace("\n", "\r")):
        prompts = read_prompts(write(tmp_path / "p.txt", content))
        assert [(p.id, p.messages) for p in prompts] == [
            ("1", [{"role": "user", "content": "first"}]),
            ("4", [{"role": "user", "content": 'second {"prompt": 1}'}]),
            ("5", [{"role": "user", "content": "[INST] {name} (1)"}]),
            ("6", [{"role": "user", "content": "    indented "}]),  # as --prompt would have it
            ("7", [{"role": "user", "content": "[[a link]] and []"}]),
        ]


LINES = b'\xef\xbb\xbf{"prompt": "one\\ntwo"}\n\n{"messages": [{"role": "user", "content": "three"}], "id": "c"}\n'
LIST = b'[\n {"prompt": "one\\ntwo"},\n {"prompt": "three", "id": "c"}\n]\n'
OBJECT = b'{\n "messages": [\n  {"role": "user", "content": "one\\ntwo"}\n ]\n}\n'


NAMES = ["p.json", "p.jsonl", "p.ndjson", "P.JSON", "p.txt", "p", "a pipe", "standard input", "-"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("data", "asked"), [(LINES, 2), (LIST, 2), (OBJECT, 1)])
def test_what_is_json_is_read_as_such_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, asked: int
) -> None:
    if name in ("standard input", "-"):
        standard_input(monkeypatch, data)
        prompts = gather_prompts(None, Path(name) if name == "-" else None, Path())
    elif name == "a pipe":
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        prompts = read_prompts(Path(f"/dev/fd/{reader}"))
        os.close(reader)
    else:
        prompts = read_prompts(write(tmp_path / name, data))
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["one\ntwo", "three"][:asked]
    assert [prompt.id for prompt in prompts][1:] == ["c"][: asked - 1]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"prompt": "a"', "line 1 is not JSON"),
        ("{'prompt': 'a'}", "line 1 is not JSON"),
        ("{prompt: a}", "line 1 is not JSON"),
        ('[\n{"prompt": "a"},\n{"prompt": b}\n]', "line 3 is not JSON"),
        ('[{"prompt": "a"}]\n[{"prompt": "b"}]', "line 1 is not a JSON object"),
        ('[{"prompt": "a"}, 3]', "entry 2 is not a JSON object"),
        ('{"prompt": "a"}\nplain', "line 2 is not JSON"),
        ('plain\n\n{"prompt": "a"}', "line 3 looks like JSON, which line 1 is not"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "standard input"])
def test_what_looks_like_json_and_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, line: str
) -> None:
    standard_input(monkeypatch, content.encode())
    file = write(tmp_path / name, content)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        gather_prompts(None, None if name == "standard input" else file, Path())
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_the_projects_own_prompts() -> None:
    held_out = read_prompts(ROOT / "data" / "eval.jsonl")
    categories = [prompt.category for prompt in held_out]
    assert len(held_out) == 384 and len({prompt.id for prompt in held_out}) == 384
    assert {categories.count(category) for category in categories} == {48}
    assert read_prompts(ROOT / "data" / "prompts-sample.jsonl")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{oops}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a list"]', "is not a JSON object"),
        ("[null]", "is not a JSON object"),
        (
            '{"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]}',
            "has a function_call",
        ),
        ('[[{"prompt": "a"}]]', "is not a JSON object"),
        ('{"prompt": "a", "category": "x\\ud83d"}', "has a category with half a surrogate pair"),
        ('{"text": "t"}', "neither `prompt` nor `messages`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "one of them is to be answered"),
        ('{"prompt": "a", "id": NaN}', "has the id nan"),
        ('{"prompt": 3}', "a prompt that is not a string"),
        ('{"prompt": "  "}', "an empty prompt"),
        ('{"messages": []}', "messages that are not a list"),
        ('{"messages": "hello"}', "messages that are not a list"),
        ('{"messages": [{"role": "user"}]}', "a content of a message that is not a string"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": ""}]}', "an empty prompt"),
        ('{"messages": [{"role": "user", "content": []}]}', "a content of a message that is not a string"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a part of the type 'image_url'"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "nothing to answer",
        ),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "nothing to answer"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "none of a user"),
        ('{"messages": [{"role": "human", "content": "a"}]}', "the role 'human'"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [3]}]}',
            "tool_calls",
        ),
        ('{"prompt": "a", "tools": [{"name": "f"}]}', "`tools`, which are not read"),
        ('{"prompt": "a", "functions": [{"name": "f"}]}', "`functions`, which are not read"),
        ('{"prompt": "fine", "category": 3}', "the category 3"),
        ('{"prompt": "fine", "category": ["a"]}', "the category ['a']"),
        ('{"prompt": "fine", "category": "two\\nlines"}', "the category 'two\\nlines'"),
        ('{"prompt": "half \\ud83d"}', "half a surrogate pair"),
        ('{"prompt": "fine", "id": "\\udc00"}', "half a surrogate pair"),
        (b'{"prompt": "caf\xe9"}', "is not valid UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16-le"), "is a null byte"),
        ("plain text", "is not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str | bytes, complaint: str) -> None:
    bad = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / "p.jsonl", b'{"prompt": "good"}\n\n' + bad + b"\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: line 3")) as caught:
        read_prompts(path)
    assert complaint in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    for name, content in (("empty.jsonl", ""), ("blank.txt", "\n \n")):
        with pytest.raises(UserError, match=f"{name}: holds no prompt"):
            read_prompts(write(tmp_path / name, content))
    with pytest.raises(UserError, match=r"binary.txt: line 2 \(byte 5\) is not valid UTF-8"):
        read_prompts(write(tmp_path / "binary.txt", b"fine\n\xff\xfe"))
    with pytest.raises(UserError, match=r"missing.jsonl: cannot be read"):
        read_prompts(tmp_path / "missing.jsonl")
    for pack in (gzip.compress, lzma.compress, bz2.compress):
        with pytest.raises(UserError, match=r"p.jsonl.packed: is compressed"):
            read_prompts(write(tmp_path / "p.jsonl.packed", pack(b'{"prompt": "a"}\n')))


@pytest.mark.parametrize("name", ["p.csv", "P.TSV"])
def test_tables_are_refused(inside: Command, weak_draft: Path, tmp_path: Path, name: str) -> None:
    """Their header, quotes and columns would be sent as prompts, and what they exclude would not be found."""
    (tmp_path / "in").mkdir()
    table = write(tmp_path / "in" / name, 'prompt,category\n"What is 2, or 3?",maths\n')
    write(tmp_path / "in" / "p.txt", "Hi\n")
    inside("decode", "plain", "--prompts", table).refused("decode", str(table), "JSON", "plain text")
    evaluate = ("distill", "evaluate", "--draft", weak_draft, "--out", tmp_path / "e")
    inside(*evaluate, "--prompts", table).refused("distill", str(table), "JSON", "plain text")
    collect = ("distill", "collect", "--source", tmp_path / "in" / "p.txt", "--out", tmp_path / "d")
    for excluded in (table, table.parent):
        inside(*collect, "--exclude", excluded).refused("distill", str(table), ".jsonl", ".txt")
    assert read_prompts(write(tmp_path / "csv.md", "a,b\n"))[0].messages[0]["content"] == "a,b"


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ('{"prompt": "a", "id": "x"}\n\n{"prompt": "b", "id": "x"}', ("line 3", "line 1")),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', ("line 2", "line 1")),  # one without is named by its line
        ('[{"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": "x"}]', ("entry 3", "entry 1")),
    ],
)
def test_two_prompts_with_one_id_are_refused(tmp_path: Path, content: str, lines: tuple[str, str]) -> None:
    """What is kept of a reply names its prompt by its id."""
    path = write(tmp_path / "p.jsonl", content)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {lines[0]} .*{lines[1]}"):
        read_prompts(path)
    prompts = read_prompts(write(path, '{"prompt": "a", "id": null}\n{"prompt": "b", "id": null}'))
    assert [prompt.id for prompt in prompts] == ["1", "2"]


# --- where prompts come from


def standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool = False) -> None:
    fake = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", fake)


def test_sources_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = write(tmp_path / "samples.txt", "sample one\nsample two\n")
    file = write(tmp_path / "mine.txt", "mine\n")

    def asked(prompt: str | None = None, path: Path | None = None) -> list[str]:
        return [p.messages[-1]["content"] for p in gather_prompts(prompt, path, samples)]

    standard_input(monkeypatch, b"not read, as an option is given")
    assert asked("said") == ["said"]
    assert asked(path=file) == ["mine"]
    with pytest.raises(UserError, match="--prompt or --prompts, not both"):
        asked("said", file)
    with pytest.raises(UserError, match="prompt is empty"):
        asked(" \n")
    with pytest.raises(UserError, match="prompt is not valid UTF-8"):
        asked("caf\udce9")  # how Python passes on a byte that is not UTF-8

    standard_input(monkeypatch, "\ufefftwo lines\nare two prompts ü\n".encode())
    assert asked() == ["two lines", "are two prompts ü"]
    standard_input(monkeypatch, b'\n{"prompt": "a"}\n{"prompt": "b"}\n')
    assert asked() == ["a", "b"]
    standard_input(monkeypatch, b"\xff")
    with pytest.raises(UserError, match=r"standard input: line 1 .* is not valid UTF-8"):
        asked()
    standard_input(monkeypatch, b"\xef\xbb\xbf \n")
    assert asked() == ["sample one", "sample two"]
    standard_input(monkeypatch, b"typed", terminal=True)
    assert asked() == ["sample one", "sample two"]


def test_title() -> None:
    assert make_prompt("\n  Tell me\nmore  of it ", "1").title == "Tell me more of it"


# --- the tokenizer


def test_chat_template(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_prompt(make_prompt("Hi", "1"))
    text = tokenizer._wrapped.decode(ids)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer.encode_prompt(make_prompt("Hi", "1"), raw=True)) == "Hi"


def templated(folder: Path, template: str) -> Tokenizer:
    config = json.loads((TEACHER / "tokenizer_config.json").read_text()) | {"chat_template": template}
    return Tokenizer(changed_copy(TEACHER, folder, tokenizer_config__json=json.dumps(config).encode()))


PARTS = """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"""
TOOLS = """{% for m in messages %}{{ m.role }}:{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments }}){% endfor %};{% endfor %}"""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Rome"}}}


def one_prompt(tmp_path: Path, *messages: dict[str, object]) -> Prompt:
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", json.dumps({"messages": messages})))
    return prompt


def test_content_in_parts_where_the_template_reads_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there", "image": None}]
    prompt = one_prompt(tmp_path, {"role": "user", "content": parts})
    assert prompt.title == "Hello there"
    reading = templated(tmp_path / "m", PARTS)
    assert reading.decode(reading.encode_prompt(prompt)) == "user:Hello there;"
    assert reading.decode(reading.encode_prompt(prompt, raw=True)) == "Hello there"
    with pytest.raises(UserError, match=r"line 1: the chat template refuses it: it does not read .* in parts"):
        tokenizer.encode_prompt(prompt)
    with pytest.raises(UserError, match="the chat template refuses it: it does not read content in parts"):
        templated(tmp_path / "n", "{% for m in messages %}{{ m.content }}{% endfor %}").encode_prompt(prompt)


def test_tool_turns_where_the_template_writes_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "Is it warm?"}
    answered = {"role": "tool", "content": "30 degrees", "tool_call_id": "1"}
    prompt = one_prompt(tmp_path, asked, {"role": "assistant", "content": None, "tool_calls": [CALL]}, answered)
    writing = templated(tmp_path / "m", TOOLS)
    said = "user:Is it warm?;assistant:weather({'place': 'Rome'});tool:30 degrees;"
    assert writing.decode(writing.encode_prompt(prompt)) == said
    with pytest.raises(UserError, match=r"p.jsonl: line 1: the chat template refuses it: .*"):
        tokenizer.encode_prompt(prompt)
    with pytest.raises(UserError, match=r"p.jsonl: line 1: calls tools"):
        tokenizer.encode_prompt(prompt, raw=True)


def test_the_template_is_told_one_time_a_run(tmp_path: Path) -> None:
    dated = (
        "{{ strftime_now('%d %b %Y, %-H') }}{% macro hour() %}{{ strftime_now('%H:%M:%S') }}{% endmacro %} {{ hour() }}"
        " {{ messages[0].content }}"
    )
    prompt = make_prompt("Hi", "1")
    told = templated(tmp_path / "m", dated)
    time = datetime.fromisoformat(str(told.template_time))
    assert abs(datetime.now() - time).total_seconds() < 60
    assert told.decode(told.encode_prompt(prompt)) == time.strftime("%d %b %Y, %-H %H:%M:%S Hi")
    then = Tokenizer(tmp_path / "m", "2024-02-03T04:05:06")
    assert then.decode(then.encode_prompt(prompt)) == "03 Feb 2024, 4 04:05:06 Hi"


@pytest.mark.parametrize("draw", ["range(100000)|random", "lipsum(1)"])
def test_what_a_template_draws_is_the_same_each_time(draw: str, tmp_path: Path) -> None:
    drawn = templated(tmp_path / "m", "{{ " + draw + " }}: {{ messages[0].content }}")
    before = random.getstate()
    said = [drawn.encode_prompt(make_prompt("Hi", "1")) for _ in range(3)]
    assert said[0] == said[1] == said[2] and len(said[0]) > 4 and random.getstate() == before


def test_a_prompt_beside_messages_that_say_it_is_no_other(tmp_path: Path) -> None:
    line = {"prompt": "a", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(line) + "\n")
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    assert prompt.messages == line["messages"]


@pytest.mark.slow
def test_decode_says_the_time_that_the_template_was_told(small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    config = json.loads((TEACHER / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    dated = changed_copy(small_teacher, tmp_path / "m", tokenizer_config__json=json.dumps(config).encode())

    def time(*options: object) -> object:
        run = inside("decode", "plain", "--prompt", "Hi", "--max-tokens", 2, "--json", tmp_path / "p.json", *options)
        assert run.code == 0, run.err
        return json.loads((tmp_path / "p.json").read_text())["template_time"]

    assert datetime.fromisoformat(str(time("--teacher", dated))).year >= 2024
    assert time("--teacher", dated, "--raw") is None and time("--teacher", small_teacher) is None


def test_conversations_end_with_the_end_token(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]
    ids, (reply,) = tokenizer.encode_conversation(messages)
    assert ids[: reply.start] == tokenizer.encode_prompt(Prompt(messages[:1], "1")) and reply.stop == len(ids)
    assert tokenizer.decode(ids[reply.start :]) == "Hello there."
    assert ids[-1] in tokenizer.end_tokens and not tokenizer.end_tokens & set(ids[reply.start : -1])


def test_every_turn_of_the_assistant_is_told(tokenizer: Tokenizer) -> None:
    said = ["Hi", "Hello there.", "And now?", "Nothing.", "Go on.", "No."]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    ids, replies = tokenizer.encode_conversation(messages)
    assert [tokenizer.decode(ids[one.start : one.stop]) for one in replies] == said[1::2]
    assert all(ids[one.stop - 1] in tokenizer.end_tokens for one in replies)


def test_turns_that_are_answered_one_by_one_read_as_the_conversation_does(tokenizer: Tokenizer) -> None:
    asked, said = ["Hi", "And\nnow?", "Go on."], ["Hello there.", "Nothing.", "No."]
    chunks = tokenizer.encode_turns(asked)
    messages, ids = [], []
    for chunk, question, answer in zip(chunks, asked, said, strict=True):
        messages.append({"role": "user", "content": question})
        assert ids + chunk == tokenizer.encode_prompt(Prompt(messages, "1"))
        messages.append({"role": "assistant", "content": answer})
        ids = tokenizer.encode_conversation(messages)[0]
    before, behind = tokenizer.open_turn
    hi = tokenizer.encode_prompt(Prompt([{"role": "user", "content": "Hi"}], "1"))
    assert hi[: len(before)] == before and hi[-len(behind) :] == behind
    assert tokenizer.decode(hi[len(before) : -len(behind)]) == "Hi" and hi[-len(behind) - 1] in tokenizer.end_tokens


def test_a_system_turn_is_written_or_refused(tmp_path: Path) -> None:
    """Beside a prompt too; a template that leaves it out would change what is asked."""
    lines = [{"prompt": "Hi", "system": "Be brief.\n\nBe kind."}, {"prompt": "Ho", "system": ""}, {"prompt": "He"}]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    first, *others = read_prompts(path)
    assert [one.messages for one in others] == [[{"role": "user", "content": text}] for text in ("Ho", "He")]
    assert first.messages == [{"role": "system", "content": lines[0]["system"]}, {"role": "user", "content": "Hi"}]
    writing = templated(tmp_path / "m", "{% for m in messages %}{{ m.role }}:{{ m.content | trim }};{% endfor %}")
    assert writing.decode(writing.encode_prompt(first)) == "system:Be brief.\n\nBe kind.;user:Hi;"
    deaf = templated(tmp_path / "n", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(
        UserError, match=r"p.jsonl: line 1: the chat template refuses it: it leaves out what the system"
    ):
        deaf.encode_prompt(first)
    assert deaf.decode(deaf.encode_prompt(others[0])) == "Ho"


@pytest.mark.parametrize(
    "written",
    [
        "{{ m.content.split('\\n')[0] }}",  # as a template does that was made for one line
        "{{ m.content[:12] }}",
        "{% if m.role != 'tool' %}{{ m.content }}{% endif %}",
    ],
)
def test_what_the_user_says_is_written_or_refused(
    inside: Command, small_teacher: Path, tmp_path: Path, written: str
) -> None:
    messages = [{"role": "user", "content": "  Add this up:\n\n  2\n  3 \n"}, {"role": "tool", "content": '"5"\nor so'}]
    path = write(tmp_path / "p.jsonl", '{"prompt": "Hi"}\n' + json.dumps({"messages": messages}) + "\n")
    config = json.loads((TEACHER / "tokenizer_config.json").read_text())
    every = "{%% for m in messages %%}%s;{%% endfor %%}"

    def decoded(name: str, template: str) -> Result:
        config["chat_template"] = every % template
        teacher = changed_copy(small_teacher, tmp_path / name, tokenizer_config__json=json.dumps(config).encode())
        return inside("decode", "plain", "--teacher", teacher, "--prompts", path, "--max-tokens", 1)

    decoded("deaf", written).refused("decode", "p.jsonl: line 2", "chat template", "leaves out")
    told = decoded("told", "{{ m.content | tojson if m.role == 'tool' else m.content | trim }}")
    assert told.code == 0, told.err


@pytest.mark.parametrize(
    ("template", "complaint"),
    [("{{ raise_exception('roles must take turns') }}", "roles must take turns"), ("{{ 1 / 0 }}", "division by zero")],
)
def test_a_template_that_refuses_is_one_line(tmp_path: Path, template: str, complaint: str) -> None:
    picky = templated(tmp_path / "m", template)
    with pytest.raises(UserError, match=f"prompt p7: the chat template refuses it: {complaint}"):
        picky.encode_prompt(Prompt([{"role": "user", "content": "a"}], "p7"))


def test_an_empty_template_is_named(inside: Command, small_teacher: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", '{"prompt": "Hi"}\n')
    about = json.loads((TEACHER / "tokenizer_config.json").read_text())
    for i, (name, content) in enumerate(
        [("chat_template.jinja", ""), ("tokenizer_config.json", json.dumps(about | {"chat_template": " \n"}))]
    ):
        files = {name.replace(".", "__"): content.encode()}
        teacher = changed_copy(small_teacher, tmp_path / f"t{i}", **files)
        for command in ("decode plain --prompts", f"distill collect --out {tmp_path / 'd'} --source"):
            program, *options = command.split()
            inside(program, *options, prompts, "--teacher", teacher).refused(program, str(teacher / name), "empty")


@pytest.mark.slow
@pytest.mark.parametrize(("declared", "ends"), [("[2, 5]", {2, 5}), ("7", {2, 7}), ("null", {2})])
def test_end_tokens(tmp_path: Path, declared: str, ends: set[int]) -> None:
    config = b'{"eos_token_id": %s}' % declared.encode()
    folder = changed_copy(TEACHER, tmp_path / "m", generation_config__json=config)
    assert Tokenizer(folder).end_tokens == ends


@pytest.mark.slow
def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """Kernels would read beyond the embedding, or another token's."""
    known = json.loads((TEACHER / "config.json").read_text())["vocab_size"]
    content = json.loads((TEACHER / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": known, "content": "<|tool|>"})
    ends = f'{{"eos_token_id": [2, {known}, -1]}}'.encode()
    folder = changed_copy(
        TEACHER, tmp_path / "m", tokenizer__json=json.dumps(content).encode(), generation_config__json=ends
    )
    wide = Tokenizer(folder)
    assert wide.end_tokens == {2}  # the model cannot say the others
    assert wide.encode_text("Hi") == Tokenizer(TEACHER).encode_text("Hi")
    prompt, reply = {"role": "user", "content": "Hi <|tool|>"}, {"role": "assistant", "content": "Hello <|tool|>"}
    for encode, given in (
        (wide.encode_text, "Hi <|tool|>"),
        (wide.encode_prompt, Prompt([prompt], "1")),
        (wide.encode_conversation, [{**prompt, "content": "Hi"}, reply]),
    ):
        with pytest.raises(UserError, match=rf"token {known} \('<\|tool\|>'\) .* vocabulary of {known}$"):
            encode(given)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("generation_config.json", b"{", "/generation_config.json: cannot be read"),
        ("generation_config.json", b'{"eos_token_id": "a"}', "/generation_config.json: eos_token_id is 'a', not"),
        ("tokenizer.json", b"{}", ": the tokenizer cannot be loaded"),
        ("tokenizer.json", b'{"model": []}', ": the tokenizer cannot be loaded"),
        ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "BPE", "vocab": [1]}}', ": the tokenizer cannot"),
        ("tokenizer_config.json", b"nope", ""),
        ("special_tokens_map.json", b"[]", "/special_tokens_map.json: is not a JSON object"),
        ("chat_template.jinja", b"caf\xe9", "/chat_template.jinja: cannot be read"),
        ("tokenizer_config.json", b'{"chat_template_type": "zzz"}', ": the tokenizer cannot be loaded"),
        ("config.json", b'{"model_type": "bitnet", "eos_token_id": "a"}', "/config.json: eos_token_id is 'a', not"),
        ("config.json", b'{"model_type": "bitnet", "rms_norm_eps": "a"}', "/config.json: Validation error for field"),
    ],
)
def test_damaged_tokenizers(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    folder = changed_copy(TEACHER, tmp_path / "m", **{name.replace(".", "__"): content})
    with pytest.raises(UserError, match=re.escape(f"{folder}{complaint}")) as caught:
        Tokenizer(folder)
    assert "\n" not in str(caught.value)


TEXTS = (
    "naïve café, 東京タワー 🙂👩‍👩‍👧 ﷽ done",
    "two  spaces , and a stop . It 's so !\n\n  indented\n",
    ("a line of text that is long enough to start a new window, äöü 🙂\n" * 9),
    "🙂🙂🙂",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_streams_whole_characters(tokenizer: Tokenizer, text: str, size: int) -> None:
    ids = tokenizer.encode_text(text)
    streamer = tokenizer.streamer()
    pieces = [streamer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + streamer.finish() == tokenizer.decode(ids) == text
    if size == 1 and "🙂" in text:
        assert "" in pieces  # an emoji takes several tokens: the first of them print nothing


def test_a_reply_cut_within_a_character_ends_visibly(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("ok 🙂")
    cut = ids[:-1]
    streamer = tokenizer.streamer()
    shown = "".join(streamer.push([token]) for token in cut)
    assert "\ufffd" not in shown
    assert shown + streamer.finish() == tokenizer.decode(cut)
