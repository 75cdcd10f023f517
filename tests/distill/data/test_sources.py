"""Sources: what counts as a document, and one clear line for whatever does not."""

import bz2
import gzip
import json
import lzma
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from loopback_hub import Hub

from distill.data.exclusion import Excluded, load_excluded
from distill.data.source_names import Source, parse_source
from distill.data.sources import Document, LeftOut, normalise_prompt, read_source, sha256_of, source_fingerprint
from kernels.errors import UserError

ROOT = Path(__file__).parents[3]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]


def lines(*objects: Any) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pack: Any = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data))
    return path


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        list(read_source(path))
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize("ending", ["", ".xz", ".gz"])
def test_jsonl(tmp_path: Path, ending: str) -> None:
    rows = [
        {"text": "A text.", "id": 3},
        {"prompt": "A prompt?", "text": "not this"},
        {"messages": CHAT, "prompt": "nor this"},
        {"messages": None, "prompt": None, "text": "null is absent"},
        {"text": "  "},
        {"messages": [{"role": "system", "content": "Be brief.", "name": "x"}, *CHAT]},
    ]
    path = write(tmp_path / f"a.jsonl{ending}", b"\xef\xbb\xbf" + lines(*rows[:2]) + b"\r\n\n" + lines(*rows[2:]))
    assert list(read_source(path)) == [
        Document("text", "A text.", None, 1),
        Document("prompt", "A prompt?", None, 2),
        Document("messages", None, CHAT, 5),
        Document("text", "null is absent", None, 6),
        Document("messages", None, [{"role": "system", "content": "Be brief."}, *CHAT], 8),
    ]


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "a.json.gz", "a.txt", "a.txt.xz"])
def test_json_by_any_name(tmp_path: Path, name: str) -> None:
    rows = [{"id": 1, "prompt": "A prompt?"}, {"prompt": "One?", "completion": "Two."}, {"text": "A text."}]
    answered = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]
    contents = [lines(*rows)] + ([json.dumps(rows, indent=1).encode()] if "json" in name else [])
    for content in contents:
        path = write(tmp_path / name, content)
        assert [(one.kind, one.text, one.messages) for one in read_source(path)] == [
            ("prompt", "A prompt?", None),
            ("messages", None, answered),
            ("text", "A text.", None),
        ]
    assert "line 2 is not JSON" in refusal(write(tmp_path / name, lines(rows[0]) + b'{"prompt": \n'))


@pytest.mark.parametrize("ending", ["", ".xz"])
def test_what_a_text_file_holds_is_found_out(tmp_path: Path, ending: str) -> None:
    """As for the prompts of `decode`: JSON over many lines, and lines that carriage returns end; a text may begin like
    JSON."""
    asked = [{"prompt": "One?"}, {"prompt": "Two?"}]
    for name in (f"a.txt{ending}", f"a.jsonl{ending}"):
        for content in (json.dumps(asked, indent=2).encode(), lines(*asked).replace(b"\n", b"\r")):
            path = write(tmp_path / name, content)
            order = np.random.default_rng(0)
            assert [one.text for one in read_source(path)] == ["One?", "Two?"]
            assert {one.text for one in read_source(path, order=order)} == {"One?", "Two?"}
            assert load_excluded([path]).prompts == {"one?", "two?"}
    path = write(tmp_path / f"a.txt{ending}", b"A line.\rAnother.\r\rEnd.")
    assert [one.text for one in read_source(path)] == ["A line.\nAnother.\n\nEnd."]
    assert load_excluded([path]).prompts == {"a line.", "another.", "end."}
    for text in ('{"a": 1} is an object in JSON.\n{ and so on }', "[\n  {{Infobox}}\n]", '["a", b]'):
        assert [one.text for one in read_source(write(path, text.encode()))] == [text]
    for content, message in (
        (lines({"question": "a"}), "line 1 has none of"),
        (b'["a", "b"]', "entry 1 is not a JSON"),
    ):
        assert message in refusal(write(path, content))
        with pytest.raises(UserError, match=message):
            load_excluded([path])


@pytest.mark.parametrize("ending", ["", ".xz", ".gz"])
def test_plain_text(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.txt{ending}", "Größe\r\n\r\nzwei  \nAbsätze".encode())
    assert list(read_source(path)) == [Document("text", "Größe\n\nzwei  \nAbsätze", None, 1)]
    left_out = LeftOut()
    assert list(read_source(write(tmp_path / "empty.txt", b"\n \n"), left_out)) == []
    assert left_out == LeftOut({"empty": 1}, {"empty": "empty.txt"})
    code = "{\n  int text;\n}\n"  # begins with a brace, and is a text all the same
    assert [one.text for one in read_source(write(tmp_path / "c.txt", code.encode()))] == [code]


def test_long_text_is_cut_at_paragraphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.source_files.MAX_TEXT", 10)
    path = write(tmp_path / "a.txt", b"one\n\ntwo three\n\nfour\n")
    assert list(read_source(path)) == [
        Document("text", "one\n\ntwo three\n\n", None, 1),
        Document("text", "four\n", None, 5),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 2 is not JSON: "),
        (b"[" * 100_000, "line 2 is not JSON: "),
        (b'["text"]', "line 2 is not a JSON object"),
        (b'{"text": "a\xff"}', "line 2 (byte 28) is not valid UTF-8"),
        (b'{"texts": "a"}', "line 2 has none of messages, turns, prompt and text"),
        (b'{"prompt": " \\n"}', "line 2 has an empty prompt"),
        (b'{"prompt": ["a"]}', "line 2 has a prompt that is not a string"),
        (b'{"text": "\\ud800"}', "line 2 has a text with half a surrogate pair"),
        (b'{"messages": []}', "not a list of messages"),
        (b'{"messages": "hello"}', "not a list of messages"),
        (b'{"messages": ["hello"]}', "the role None"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "none of a user"),
        (b'{"messages": [{"role": "human", "content": "a"}]}', "the role 'human'"),
        (b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}', "nothing to answer"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "a part of the type 'image'"),
        (b'{"prompt": "a", "completion": 3}', "a completion that is not a string"),
        (b'{"prompt": "a", "tools": [{}]}', "`tools`, which are not read"),
        (b'{"text": "a\0"}', "(byte 28) is a null byte"),
        (b'{"prompt": "a", "system": 3}', "a `system` that is not a string"),
        (b'{"messages": [{"role": "user", "content": "b"}], "completion": "c"}', "a `completion` beside messages"),
        (lines({"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT]}).strip(), "a turn of weight 0"),
        (b'{"messages": [{"role": "user", "content": "b"}], "functions": [{}]}', "`functions`, which are not read"),
        *(
            (b'{%s, "%s": "b"}' % (said, other), f"`{other.decode()}` beside {name}")
            for name, said in (("turns", b'"turns": ["a"]'), ("text", b'"text": "a"'))
            for other in (b"system", b"completion", b"tools", b"functions")
        ),
        (b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "system": "c"}', "one"),
        (b'{"messages": [{"role": "user", "content": 1}]}', "content of a message that is not a string"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "an empty prompt"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "none of a user"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".xz"])
def test_faults_are_named(tmp_path: Path, line: bytes, message: str, ending: str) -> None:
    path = write(tmp_path / f"a.jsonl{ending}", b'{"text": "good"}\n' + line + b"\n")
    assert message in refusal(path)


def test_bad_files(tmp_path: Path) -> None:
    assert "line 2 (byte 4)" in refusal(write(tmp_path / "a.txt", b"a\r\nb\xe9\n"))
    assert "no such file" in refusal(tmp_path / "missing.jsonl")
    assert "no such file" in refusal(Path("/missing/corpus"))
    assert "its name must end in" in refusal(write(tmp_path / "a.pdf", b"%PDF"))
    assert "holds none of" in refusal(write(tmp_path / "folder" / ".a.txt", b"hidden").parent)
    whole = lzma.compress(lines({"text": "a" * 5000}) * 100)
    (tmp_path / "a.jsonl.xz").write_bytes(whole[:-40])
    assert "cannot be decompressed" in refusal(tmp_path / "a.jsonl.xz")
    (tmp_path / "b.jsonl.gz").write_bytes(b"plain")
    assert "cannot be decompressed" in refusal(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"a" * 9000)[:-9])
    assert "cannot be decompressed" in refusal(tmp_path / "c.jsonl.gz")
    assert "cannot be read" in refusal(write(tmp_path / "a.parquet", b"PAR1"))
    assert "cannot be read" in refusal(write(tmp_path / "a.arrow", b"ARROW"))


def test_what_can_be_read_once_only_is_refused(tmp_path: Path) -> None:
    """Sources and what they exclude are hashed, and read again: a pipe would keep the second reader waiting."""
    pipe, column, other = (tmp_path / "in" / name for name in ("ex.jsonl", "a.parquet", "b.json"))
    write(tmp_path / "in" / "c.jsonl", lines({"prompt": "One?"}))
    for path in (pipe, column, other):
        os.mkfifo(path)
    with socket.socket(socket.AF_UNIX) as listening, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # names of sockets are short
        listening.bind("in/s.txt")
    for path in (pipe, column, tmp_path / "in" / "s.txt"):
        for read in (lambda path: list(read_source(path)), source_fingerprint, lambda path: load_excluded([path])):
            with pytest.raises(UserError, match=f"{path}: is no regular file but a pipe"):
                read(path)
    (descriptor, _), given = os.pipe(), LeftOut()  # as `<(zcat prompts.gz)` gives one
    assert "is no regular file but a pipe" in refusal(f"/dev/fd/{descriptor}")
    assert [one.text for one in read_source(tmp_path / "in", given)] == ["One?"]
    assert given == LeftOut({"a file of another kind": 4}, {"a file of another kind": "a.parquet"})
    assert load_excluded([tmp_path / "in"]).prompts == {"one?"}
    assert len(source_fingerprint(tmp_path / "in")["sha256"]) == 64


def test_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.jsonl.gz", "C.TXT"):
        write(tmp_path / name, lines({"text": name}) if "jsonl" in name else name.encode())
    for ignored in ("README.md", ".git/config.txt", "a/.hidden.txt"):
        write(tmp_path / ignored, b"no")
    write(tmp_path / "a" / "dataset_info.json", b"{}")
    left_out = LeftOut()
    assert [d.text for d in read_source(tmp_path, left_out)] == ["C.TXT", "a/b.jsonl.gz", "a/z.txt", "b.txt"]
    assert left_out == LeftOut({"a file of another kind": 2}, {"a file of another kind": "README.md"})
    # A .json that holds documents is no description; linked folders are read; what cannot be is named.
    write(tmp_path / "lines" / "l.json", lines({"prompt": "In lines?", "question": "Or?"}, {"prompt": "Still?"}))
    assert [d.text for d in read_source(tmp_path / "lines")] == ["In lines?", "Still?"]
    assert load_excluded([tmp_path / "lines"]).prompts == {"in lines?", "still?"}
    write(tmp_path / "asked" / "q.json", json.dumps([{"question": "Asked?"}]).encode())
    write(tmp_path / "asked" / "a.jsonl", lines({"question": "Too?", "prompt": "Prompt?"}))
    assert [d.text for d in read_source(f"{tmp_path / 'asked'}#question")] == ["Too?", "Asked?"]
    assert [d.text for d in read_source(tmp_path / "asked")] == ["Prompt?"]
    with pytest.raises(UserError, match=r"q\.json: entry 1 has none of"):  # or its prompts would not be left out
        load_excluded([tmp_path / "asked"])
    write(tmp_path / "asked" / "q.json", b'{"builder_name": "json", "splits": [{"name": "train"}]}\n')
    assert load_excluded([tmp_path / "asked"]).prompts == {"prompt?"}
    write(tmp_path / "data" / "d.json", b'[\n {\n  "id": 1,\n  "prompt": "Asked?"\n }\n]')
    write(tmp_path / "elsewhere" / "e.jsonl", lines({"prompt": "Linked?"}))
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert [d.text for d in read_source(tmp_path / "data")] == ["Asked?", "Linked?"]
    assert load_excluded([tmp_path / "data"]).prompts == {"asked?", "linked?"}
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    assert "data/linked/back: is a link to a folder that it is in" in refusal(tmp_path / "data")
    (tmp_path / "elsewhere" / "back").unlink()
    (tmp_path / "elsewhere" / "gone").symlink_to("nowhere")
    assert "data/linked/gone: is a link that leads nowhere" in refusal(tmp_path / "data")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_columns(tmp_path: Path, form: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "one", "n": 1}, {"messages": CHAT, "n": 2}, {"text": "three", "n": 3}]
    names = ("messages", "prompt", "text", "n")
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})

    def save(path: Path, table: Any) -> Path:
        if form == "parquet":
            pyarrow.parquet.write_table(table, path)
            return path
        make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with make(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=2)
        return path

    path = save(tmp_path / ("a.parquet" if form == "parquet" else "a.arrow"), table)
    expected = [
        Document("prompt", "one", None, 1),
        Document("messages", None, CHAT, 2),
        Document("text", "three", None, 3),
    ]
    assert list(read_source(path)) == expected
    save(path, table.select(["n"]))
    assert "has no column messages, turns, prompt or text; it has n" in refusal(path)
    systems = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
    save(path, pyarrow.table({"prompt": ["one", "two"], "system": ["Be brief.", None]}))
    assert [(one.text, one.messages) for one in read_source(path)] == [(None, systems), ("two", None)]
    save(path, pyarrow.table({"text": ["one", "two"], "completion": ["Lost.", None], "functions": [None, "[]"]}))
    assert list(read_source(path, left_out := LeftOut())) == [] and left_out.counts == {"no document": 2}
    assert [one.text for one in read_source(f"{path}#text")] == ["one", "two"]
    save(path, pyarrow.table({"chat": [json.dumps(CHAT), "[1, 2]"]}))
    assert [(one.text, one.messages) for one in read_source(f"{path}#chat")] == [(None, CHAT), ("[1, 2]", None)]
    if form != "parquet":  # whose own writer refuses these
        save(path, pyarrow.table([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"]))
        assert "cannot be read" in refusal(path)
    offsets, content = (pyarrow.py_buffer(data) for data in (b"\0\0\0\0\3\0\0\0", b"a\xffb"))
    save(path, pyarrow.table({"prompt": pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, content])}))
    assert "cannot be read" in refusal(path)
    save(path, pyarrow.table({"prompt": ["", "good", "  "]}))
    left_out = LeftOut()
    assert list(read_source(path, left_out)) == [Document("prompt", "good", None, 2)]
    assert left_out == LeftOut({"no document": 2}, {"no document": f"{path.name}: row 1 has an empty prompt"})


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None, None, None, 1)),
        ("owner/name:small@v1.0", ("owner/name", "small", None, "v1.0", None, 1)),
        ("owner/name:small:test", ("owner/name", "small", "test", None, None, 1)),
        ("owner/name::test@main#question=2", ("owner/name", None, "test", "main", "question", 2)),
        ("owner/name@refs/pr/1=0.5", ("owner/name", None, None, "refs/pr/1", None, 0.5)),
        ("owner/name#a column", ("owner/name", None, None, None, "a column", 1)),
        ("name", None),
        ("owner/name:", None),
        ("owner/name::", None),
        ("/owner/name", None),
        ("./owner/name", None),
        ("../owner", None),
        ("owner/name.jsonl", None),
        ("owner/name.jsonl#question", None),
        ("here/name", None),
        ("here/name=2", None),
    ],
)
def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    file = Source(Path(name).name, "file", name)
    assert parse_source(name) == (file if parts is None else Source(name, "hub", *parts))


def test_a_file_that_is_there_goes_before_what_its_name_could_mean(tmp_path: Path) -> None:
    name = str(tmp_path / "a:b@c#d=2.jsonl")
    write(Path(name), lines({"prompt": "One?", "question": "Two?"}))
    for more, column, weight in (
        ("", None, 1),
        ("=3", None, 3),
        ("#question", "question", 1),
        ("#question=.5", "question", 0.5),
    ):
        assert parse_source(name + more) == Source(f"a:b@c#d=2.jsonl{more}", "file", name, column=column, weight=weight)
        (document,) = read_source(name + more)
        assert document.text == ("One?" if column is None else "Two?")
    for weight in ("0", "-1", "nan", "inf", "much", "", "1e308"):
        with pytest.raises(UserError, match=f"--source .*=2.jsonl={weight}: the weight {weight} is no number above 0"):
            parse_source(f"{name}={weight}")
    assert parse_source("self=2") == Source("self=2", "self", "self", weight=2)
    assert parse_source(tmp_path).kind == "folder" and parse_source("self").weight == 1


def test_a_column_is_read_as_what_is_in_it(tmp_path: Path) -> None:
    row = {"prompt": "P?", "completion": "C.", "content": "A text.", "question": "Q?", "asked": ["One?", "Two?"]}
    path = write(tmp_path / "a.jsonl", lines(row | {"chat": CHAT, "n": 3, "category": "maths"}))
    users = [{"role": "user", "content": text} for text in row["asked"]]
    for column, kind, text, messages in (
        ("content", "text", "A text.", None),
        ("question", "prompt", "Q?", None),
        ("prompt", "prompt", "P?", None),  # what is beside it does not count: the teacher answers it
        ("asked", "turns", None, users),
        ("chat", "messages", None, CHAT),
    ):
        (document,) = read_source(f"{path}#{column}")
        assert (document.kind, document.text, document.messages) == (kind, text, messages)
        assert document.category == "maths"
    for column, message in (("n", "line 1 has a n that is neither"), ("gone", "line 1 has no gone; it has prompt, ")):
        with pytest.raises(UserError, match=f"{path}: {message}"):
            list(read_source(f"{path}#{column}"))
    with pytest.raises(UserError, match="plain text, which has no column x"):
        list(read_source(f"{write(tmp_path / 'a.txt', b'Text.')}#x"))


def test_kinds_and_turns(tmp_path: Path) -> None:
    rows = [
        {"turns": ["One?", "Two?"], "kind": "dialogue", "category": "no"},
        {"prompt": "P?", "category": " in two\nlines "},
        {"text": "T", "kind": 3},
        {"prompt": "P?", "completion": " "},
        {"messages": [*CHAT[:1], {"role": "assistant", "content": ""}]},
    ]
    left_out = LeftOut()
    documents = list(read_source(write(tmp_path / "a.jsonl", lines(*rows)), left_out))
    assert [one.category for one in documents] == ["dialogue", "in two lines", "3"]
    assert left_out == LeftOut({"empty": 2}, {"empty": "a.jsonl: line 4"})  # answers that say nothing
    assert documents[0].user_texts == ["One?", "Two?"]


def test_lines_come_in_an_order_over_the_whole_source(tmp_path: Path) -> None:
    """Each once, with its own number, blank ones and ends of lines aside; files that hold no lines in their own."""
    write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"".join(b'{"prompt": "a %d"}\r\n\n' % i for i in range(50)))
    write(tmp_path / "b.txt", b"".join(b'{"prompt": "b %d"}\n' % i for i in range(50)).removesuffix(b"\n"))
    order = [document.text for document in read_source(tmp_path, order=np.random.default_rng(1))]
    assert sorted(order) == sorted(document.text for document in read_source(tmp_path))
    assert len({text[0] for text in order[:10] if text}) == 2
    again = list(read_source(tmp_path, order=np.random.default_rng(1)))
    assert (
        [one.text for one in again]
        == order
        != [one.text for one in read_source(tmp_path, order=np.random.default_rng(2))]
    )
    assert {one.line for one in again if str(one.text).startswith("a")} == set(range(1, 100, 2))
    assert all(
        one.where == f"{'a.jsonl' if one.text[0] == 'a' else 'b.txt'}: line {one.line}" for one in again if one.text
    )
    for name, content in (
        ("c.json", b'[{"prompt": "a"},\n {"prompt": "b"}]'),
        ("d.txt", b"Text.\n"),
        ("e.jsonl.gz", lines({"prompt": "c"})),
    ):
        path = write(tmp_path / "other" / name, content)
        assert list(read_source(path, order=np.random.default_rng(0))) == list(read_source(path))


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> dict[str, list[dict[str, str]]]:
        asked.append((arguments, options["revision"]))
        return {"train": rows}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [{"prompt": "one"}, {"prompt": ""}, {"prompt": "three"}]
    left_out = LeftOut()
    assert [document.line for document in read_source("owner/name:c@r", left_out)] == [1, 3]
    assert left_out.firsts == {"no document": "owner/name: row 2 has an empty prompt"}
    assert asked == [(("owner/name", "c"), "r")]
    rows = [{"question": "one"}]
    with pytest.raises(UserError, match="owner/name: has no column messages, turns, prompt or text; it has question"):
        list(read_source("owner/name"))


CARD = b"""---
configs:
- config_name: small
  default: true
  data_files: [{split: train, path: small/train.jsonl}, {split: test, path: small/test.jsonl}]
- config_name: large
  data_files: [{split: train, path: large/*.jsonl}]
---
"""


@pytest.mark.slow
def test_datasets_of_a_hub(tmp_path: Path) -> None:
    """Each part of a name, through the real clients; and what they have is named where something is not there."""
    files = {
        "README.md": CARD,
        "small/train.jsonl": lines(*({"prompt": f"p{i}", "question": f"q{i}"} for i in range(3))),
        "small/test.jsonl": lines({"prompt": "test"}),
        "large/a.jsonl": lines({"content": "large"}),
    }
    expected = {
        "maker/talk": ["p0", "p1", "p2"],
        "maker/talk#question=2": ["q0", "q1", "q2"],
        "maker/talk@v1": ["old"],
        "maker/talk:large#content": ["large"],
        "maker/talk::test": ["test"],
        "maker/talk:small:test": ["test"],
        "maker/talk::dev": "maker/talk::dev: has no split dev; choose one of train, test as maker/talk::NAME",
        "maker/talk:no": "maker/talk:no: has no configuration no; choose one of small, large as maker/talk:NAME",
        "maker/two": "maker/two: has several configurations; choose one of small, large as maker/two:NAME",
        "maker/talk#gone": "maker/talk#gone: has no column gone; it has prompt, question",
    }
    script = """
import json, sys
from distill.data.sources import at_commit, parse_source, read_source
from kernels.errors import UserError
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = [document.text for document in read_source(at_commit(parse_source(name)))]
    except UserError as error:
        found[name] = str(error)
print(json.dumps(found))
"""
    with Hub(tmp_path).running() as hub:
        talk = hub.add("datasets/maker/talk", {"README.md": b"", "a.jsonl": lines({"prompt": "old"})})
        talk.tags["v1"] = talk.head
        talk.commit(files)
        hub.add("datasets/maker/two", files | {"README.md": CARD.replace(b"  default: true\n", b"")})
        variables = os.environ | hub.environment(token=None) | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script, *expected], env=variables, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.slow
def test_hub_datasets_of_parquet_can_be_left_early(tmp_path: Path) -> None:
    """Their readers have threads, which abort a Python that ends before them: often, not each time, as they race."""
    script = f"""
import datasets, pyarrow, pyarrow.parquet
from distill.data.sources import read_source
rows = [f"{{i}} ships sail on the sea" for i in range(300_000)]
pyarrow.parquet.write_table(pyarrow.table({{"text": rows}}), {str(tmp_path / "a.parquet")!r}, row_group_size=9_000)
real = datasets.load_dataset
datasets.load_dataset = lambda *name, **options: real(
    "parquet", data_files={str(tmp_path / "a.parquet")!r}, streaming=True
)
streams = [read_source("owner/name@" + 40 * "a") for _ in range(4)]
print([next(documents).line for documents in streams])
for documents in streams:
    documents.close()
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.splitlines()) == (0, "", [str([1] * 4)])


@pytest.mark.slow
def test_hub_offline_is_one_line_and_imports_are_lazy() -> None:
    script = """
import sys
from distill.data.sources import at_commit, parse_source, source_fingerprint, read_source, sha256_of
from kernels.errors import UserError
assert not {"datasets", "pyarrow"} & set(sys.modules)
for work in (lambda: list(read_source("nobody/nothing")), lambda: sha256_of("nobody/nothing")):
    try:
        work()
    except UserError as error:
        print(error)
for name in ("nobody/nothing@" + 40 * "a", "nobody/nothing:small@" + 40 * "a"):
    print(source_fingerprint(name)["commit"], at_commit(parse_source(name)).revision)
begun = [{"name": "nobody/nothing:small", "commit": 40 * "b"}]
print(at_commit(parse_source("nobody/nothing:small"), begun).revision)
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("nobody/nothing: no such file, and not") for line in said[:2])
    assert said[2:] == [*[f"{40 * 'a'} {40 * 'a'}"] * 2, 40 * "b"]


def test_hashes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a" / "x.txt", b"1"), write(tmp_path / "a" / "y.txt", b"2")
    assert sha256_of(one) == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    before = sha256_of(tmp_path / "a")
    write(tmp_path / "a" / "README.md", b"not read, so not hashed")
    assert sha256_of(tmp_path / "a") == before
    assert source_fingerprint(tmp_path / "a") == {"name": "a", "sha256": before, "kind": "folder"}
    assert source_fingerprint(one)["kind"] == "file"
    two.rename(two.with_name("z.txt"))
    assert sha256_of(tmp_path / "a") != before
    with pytest.raises(UserError, match="nowhere"):
        sha256_of(tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl"])
def test_what_is_to_be_excluded_is_never_passed_over(inside: Command, tmp_path: Path, form: str) -> None:
    """A row that is no document may hold a held-out prompt all the same, and one without an answer does."""
    import pyarrow
    import pyarrow.parquet

    def held(rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / "held" / f"out.{form}"
        if form == "jsonl":
            return write(path, lines(*rows))
        path.parent.mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(rows, pyarrow.schema([(name, kinds[name]) for name in rows[0]]))
        if form == "parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(str(path), table.schema) as out:
                out.write_table(table)
        return path

    kinds = dict.fromkeys(("prompt", "completion", "tools"), pyarrow.string())
    kinds["messages"] = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    first = {"messages": CHAT, "prompt": None, "tools": None}
    place = "line 2" if form == "jsonl" else "row 2"
    for row in (
        {"messages": None, "prompt": "What is the capital of France?", "tools": "[{}]"},
        {"messages": [*CHAT, {"role": "system", "content": "Be brief."}], "prompt": None, "tools": None},
        {"messages": None, "prompt": "", "tools": None},
    ):
        path = held([first, row])
        with pytest.raises(UserError, match=re.escape(f"{path}: {place} ")):
            load_excluded([path])
    source = write(tmp_path / "s.jsonl", lines({"prompt": "What is the capital of France?"}))
    command = ("distill", "collect", "--dry-run", "--source", source, "--exclude", path)
    inside(*command).refused("distill", f"{path}: {place} ")
    path = held([{"prompt": "Asked?", "completion": "Yes."}, {"prompt": "Unanswered?", "completion": ""}])
    assert load_excluded([path]).prompts == {"asked?", "unanswered?"}
    for name, content in (("p.jsonl.bz2", bz2.compress(b"{}")), ("p.csv.GZ", b"prompt\n")):
        other = write(path.parent / name, content)
        with pytest.raises(UserError, match=re.escape(str(other))):
            load_excluded([path.parent])
        other.unlink()


def test_exclusion(tmp_path: Path) -> None:
    assert normalise_prompt(" \uff37hat\u00a0is\n\tStraße? ") == "what is strasse?"
    plain = write(tmp_path / "a.txt", b"What is  love?\n\nSing!\nTell me of the ships that sailed.\n")
    prompts = write(tmp_path / "b.jsonl", lines({"prompt": "Count to 3."}, {"messages": CHAT}))
    excluded = load_excluded([plain, str(prompts)])
    ships = "tell me of the ships that sailed."
    assert excluded.prompts == {"what is love?", "sing!", ships, "count to 3.", "hello?"}
    held = lines({"prompt": "Count to 3."})
    for name in ("c.txt", "c.json", "c.ndjson"):
        assert load_excluded([write(tmp_path / name, b"\xef\xbb\xbf" + held)]).prompts == {"count to 3."}
    unlearnt = write(tmp_path / "e.jsonl", lines({"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}))
    assert load_excluded([unlearnt]).prompts == {"hello?"}  # nothing of it is learnt
    with pytest.raises(UserError, match=r"--exclude .*d.txt: holds no prompt"):
        load_excluded([plain, write(tmp_path / "d.txt", b" \n")])

    def hit(kind: Any, text: str | None, messages: Any = None) -> str | None:
        return excluded.reason(Document(kind, text, messages, 1))

    assert hit("prompt", "WHAT IS LOVE?") == hit("text", "\nSing!\n") == hit("messages", None, CHAT) == "excluded"
    assert hit("messages", None, [{"role": "user", "content": "Hi"}, {"role": "user", "content": "sing!"}])
    assert not hit("messages", None, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sing!"}])
    assert not hit("text", "Sing! Then count.") and not hit("prompt", "Sing")
    near = f"{ships[:-1]}?"
    assert hit("prompt", near) == hit("turns", None, [{"role": "user", "content": near}]) == "near an excluded prompt"
    assert not hit("text", near)
    assert not Excluded().reason(Document("prompt", "Sing!", None, 1))
