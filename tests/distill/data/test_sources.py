"""Sources: what counts as a document, and one clear line for whatever does not."""

import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.data import sources
from distill.data.sources import (
    Document,
    LeftOut,
    is_excluded,
    load_excluded,
    normalise_prompt,
    read_source,
    sha256_of,
    source_fingerprint,
)
from kernels.errors import UserError

ROOT = Path(__file__).parents[3]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": ""}]


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
    monkeypatch.setattr(sources, "MAX_TEXT", 10)
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
        (b'{"texts": "a"}', "line 2 has none of messages, prompt and text"),
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


def test_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b.jsonl.gz", "C.TXT"):
        write(tmp_path / name, lines({"text": name}) if "jsonl" in name else name.encode())
    for ignored in ("README.md", ".git/config.txt", "a/.hidden.txt"):
        write(tmp_path / ignored, b"no")
    write(tmp_path / "a" / "dataset_info.json", b"{}")
    left_out = LeftOut()
    assert [d.text for d in read_source(tmp_path, left_out)] == ["C.TXT", "a/b.jsonl.gz", "a/z.txt", "b.txt"]
    assert left_out == LeftOut({"a file of another kind": 2}, {"a file of another kind": "README.md"})


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
    assert "no column messages, prompt or text" in refusal(path)
    save(path, pyarrow.table({"prompt": ["", "good", "  "]}))
    left_out = LeftOut()
    assert list(read_source(path, left_out)) == [Document("prompt", "good", None, 2)]
    assert left_out == LeftOut({"no document": 2}, {"no document": f"{path.name}: row 1 has an empty prompt"})


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:small@v1.0", ("owner/name", "small", "v1.0")),
        ("owner/name@refs/pr/1", ("owner/name", None, "refs/pr/1")),
        ("name", None),
        ("/owner/name", None),
        ("./owner/name", None),
        ("../owner", None),
        ("owner/name.jsonl", None),
        ("here/name", None),
    ],
)
def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, parts: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    found = sources._hub_name(name)
    assert (tuple(found.values()) if found else None) == parts


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((arguments, options["revision"]))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [{"prompt": "one"}, {"prompt": ""}, {"prompt": "three"}]
    left_out = LeftOut()
    assert [document.line for document in read_source("owner/name:c@r", left_out)] == [1, 3]
    assert left_out.firsts == {"no document": "owner/name: row 2 has an empty prompt"}
    assert asked == [(("owner/name", "c"), "r")]
    rows = [{"question": "one"}]
    with pytest.raises(UserError, match="owner/name: has no column messages, prompt or text"):
        list(read_source("owner/name"))


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
    "parquet", data_files={str(tmp_path / "a.parquet")!r}, split="train", streaming=True
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
from distill.data.sources import at_commit, source_fingerprint, read_source, sha256_of
from kernels.errors import UserError
assert not {"datasets", "pyarrow"} & set(sys.modules)
for work in (lambda: list(read_source("nobody/nothing")), lambda: sha256_of("nobody/nothing")):
    try:
        work()
    except UserError as error:
        print(error)
for name in ("nobody/nothing@" + 40 * "a", "nobody/nothing:small@" + 40 * "a"):
    print(source_fingerprint(name)["commit"], at_commit(name))
begun = [{"name": "nobody/nothing:small", "commit": 40 * "b"}]
print(at_commit("nobody/nothing:small", begun))
"""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=offline, capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("nobody/nothing: no such file, and not") for line in said[:2])
    names = [f"nobody/nothing@{40 * 'a'}", f"nobody/nothing:small@{40 * 'a'}"]
    assert said[2:] == [*(f"{40 * 'a'} {name}" for name in names), f"nobody/nothing:small@{40 * 'b'}"]


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


def test_exclusion(tmp_path: Path) -> None:
    assert normalise_prompt(" \uff37hat\u00a0is\n\tStraße? ") == "what is strasse?"
    plain = write(tmp_path / "a.txt", b"What is  love?\n\nSing!\n")
    prompts = write(tmp_path / "b.jsonl", lines({"prompt": "Count to 3."}, {"messages": CHAT}))
    excluded = load_excluded([plain, str(prompts)])
    assert excluded == {"what is love?", "sing!", "count to 3.", "hello?"}
    held = lines({"prompt": "Count to 3."})
    for name in ("c.txt", "c.json", "c.ndjson"):
        assert load_excluded([write(tmp_path / name, b"\xef\xbb\xbf" + held)]) == {"count to 3."}
    with pytest.raises(UserError, match=r"--exclude .*d.txt: holds no prompt"):
        load_excluded([plain, write(tmp_path / "d.txt", b" \n")])

    def hit(kind: Any, text: str | None, messages: Any = None) -> bool:
        return is_excluded(Document(kind, text, messages, 1), excluded)

    assert hit("prompt", "WHAT IS LOVE?") and hit("text", "\nSing!\n") and hit("messages", None, CHAT)
    assert hit("messages", None, [{"role": "user", "content": "Hi"}, {"role": "user", "content": "sing!"}])
    assert not hit("messages", None, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sing!"}])
    assert not hit("text", "Sing! Then count.") and not hit("prompt", "Sing")
    assert not is_excluded(Document("prompt", "Sing!", None, 1), frozenset())
