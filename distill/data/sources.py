"""Reading sources into documents: plain text, JSON, columnar files, datasets of the Hub.

Files are read line by line, datasets of the Hub row by row, and the same source gives the same documents in the same
order. (Whoever shuffles the documents of a source, as `prompts` does, holds all of them.)
"""

import gc
import gzip
import hashlib
import lzma
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from decode.prompts import ANSWERED, SURROGATE, Message, conversation, read_entries, text_lines, text_of
from kernels.errors import UserError, first_line

Kind = Literal["text", "prompt", "messages", "turns"]

TEXT, LINES, COLUMNS = (".txt",), (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow")
SUFFIXES = tuple(f"{s}{c}" for s in TEXT + LINES for c in ("", ".xz", ".gz")) + COLUMNS
COLUMN_NAMES = ("messages", "prompt", "text")
COMPANIONS = ("completion", "tools")  # columns that are read where they stand beside those
MAX_TEXT = 1 << 20  # characters; a text file longer than this is cut at its next blank line
_HUB = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?", re.ASCII)
_OBJECT = re.compile(r'\s*\[?\s*\{(.*,)?\s*"(messages|prompt|text)"\s*:')  # the first line of what is JSON by any name
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True)
class Document:
    """One document of a source; of `text` and `messages`, one is None. Of `turns`, messages are a user's, and each of
    them wants a reply."""

    kind: Kind
    text: str | None  # the text or the prompt
    messages: list[Message] | None
    line: int  # the line, row or entry of a list that it begins at, from 1
    where: str = field(default="", compare=False)  # file and line, for messages
    category: str = field(default="", compare=False)  # what kind of thing it is, where the source says so

    @property
    def user_texts(self) -> list[str]:
        """What a user says in it: the prompt, every user message, or the text."""
        if self.messages is None:
            return [self.text or ""]
        return [text_of(message) for message in self.messages if message["role"] == "user"]


@dataclass
class LeftOut:
    """What of a source is not used: how many documents for each reason, and what the first of them is."""

    counts: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, first: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        self.firsts.setdefault(reason, first)

    def add_all(self, other: "LeftOut") -> None:
        for reason, count in other.counts.items():
            self.add(reason, other.firsts[reason], count)

    def drained(self) -> "LeftOut":
        """What is in it; nothing is left."""
        found = LeftOut(self.counts, self.firsts)
        self.counts, self.firsts = {}, {}
        return found


EMPTY, NO_DOCUMENT, EXCLUDED, OTHER_FILE = "empty", "no document", "excluded", "a file of another kind"


def read_source(path: str | Path, left_out: LeftOut | None = None) -> Iterator[Document]:
    """The documents of a file, of all files of a folder in sorted order, or of a Hub dataset.

    `.txt` is one document of plain text, unless it holds JSON; `.jsonl`, `.ndjson`, `.json`, `.parquet` and `.arrow`
    hold objects, which count as `messages` if they have them, else as `prompt`, else as `text`. Files of text may be
    compressed (`.xz`, `.gz`). A Hub dataset is written `owner/name`, `owner/name:config` or `owner/name@revision`, and
    its split `train` is read, no further than documents are taken.
    Raises UserError naming file and line. What is empty is left out and counted in `left_out`; so is a row of columns
    that is no document: whoever collects did not write a dataset of a million rows and cannot mend it.
    """
    left_out = left_out or LeftOut()
    if hub := _hub_name(path):
        yield from _row_documents(str(path), str(hub["name"]), _hub_rows(hub), left_out)
        return
    for file in source_files(path, left_out):
        kind = _kind(file)
        if kind in COLUMNS:
            yield from _row_documents(str(file), file.name, _column_rows(file), left_out)
        elif kind in LINES or _holds_objects(file):
            yield from _line_documents(file, left_out)
        else:
            yield from _text_documents(file, left_out)


def source_files(path: str | Path, left_out: LeftOut | None = None) -> list[Path]:
    """The files that a local source consists of, sorted by their names inside it. left_out: counts the others of a
    folder, hidden ones aside."""
    path = Path(path)
    if path.is_dir():
        inside = ((file.relative_to(path), file) for file in path.rglob("*") if file.is_file())
        visible = sorted(
            (name.as_posix(), file) for name, file in inside if not any(part.startswith(".") for part in name.parts)
        )
        # In a folder a .json describes a dataset more often than it is one; by its own name it is read.
        files = [file for _, file in visible if _kind(file) not in ("", ".json")]
        if not files:
            raise UserError(f"{path}: holds none of {', '.join((*TEXT, '.jsonl', '.ndjson', *COLUMNS))}")
        read = set(files)
        for name, file in visible:
            if left_out is not None and file not in read:
                left_out.add(OTHER_FILE, name)
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not _kind(path):
        raise UserError(f"{path}: not a source; its name must end in one of {', '.join(SUFFIXES)}")
    return [path]


def sha256_of(path: str | Path) -> str:
    """The hash of a source: of a file's bytes, of a folder's names and hashes, of a Hub dataset's commit."""
    digest = hashlib.sha256()
    if hub := _hub_name(path):
        digest.update(f"{hub['name']}:{hub['config'] or ''}@{_hub_commit(hub)}".encode())
    elif Path(path).is_dir():
        for file in source_files(path):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
    else:
        with _readable(Path(path)) as file_:
            while data := file_.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def source_fingerprint(path: str | Path, read: str | None = None) -> dict[str, str]:
    """What a manifest says of a source: name (without its folder), sha256, kind (file, folder or hub), and of a Hub
    dataset the commit. read: the same source `at_commit`."""
    if _hub_name(path):
        read = read or at_commit(path)
        return {
            "name": shown_name(path),
            "sha256": sha256_of(read),
            "kind": "hub",
            "commit": read.rpartition("@")[2],
        }
    return {"name": shown_name(path), "sha256": sha256_of(path), "kind": "folder" if Path(path).is_dir() else "file"}


def is_hub(path: str | Path) -> bool:
    """Whether a source's name is one of a Hub dataset."""
    return _hub_name(path) is not None


def at_commit(path: str | Path, begun: Iterable[Any] = ()) -> str:
    """A Hub dataset's name with the commit to read; any other source as it is.

    begun: what a manifest says of the sources it was begun with. The Hub is asked only where neither they nor the name
    itself say the commit.
    """
    hub = _hub_name(path)
    if not hub:
        return str(path)
    known = [entry.get("commit") for entry in begun if isinstance(entry, dict) and entry.get("name") == str(path)]
    commit = next((commit for commit in known if _COMMIT.fullmatch(str(commit))), None) or _hub_commit(hub)
    return f"{hub['name']}{':' if hub['config'] else ''}{hub['config'] or ''}@{commit}"


def shown_name(path: str | Path) -> str:
    """The name of a source in a manifest: of a file or folder without the one it is in."""
    return str(path) if _hub_name(path) else Path(path).resolve().name


# --- exclusion


def normalise_prompt(text: str) -> str:
    """The form in which prompts are compared: NFKC, case folded, white space collapsed."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def load_excluded(paths: Iterable[str | Path]) -> frozenset[str]:
    """The normalised prompts of prompts files: JSON, or plain text with one prompt a line. UserError where one holds
    none: whoever names it means to leave something out."""
    excluded: set[str] = set()
    for path in paths:
        prompts: set[str] = set()
        for file in source_files(path):
            if _kind(file) in TEXT and not _holds_objects(file):
                prompts.update(normalise_prompt(line) for _, line in _lines(file))
            else:
                said = (text for document in read_source(file) for text in document.user_texts)
                prompts.update(normalise_prompt(text) for text in said)
        if not prompts - {""}:
            raise UserError(f"--exclude {path}: holds no prompt")
        excluded |= prompts
    return frozenset(excluded - {""})


def is_excluded(document: Document, excluded: frozenset[str]) -> bool:
    """Whether the prompt, any user message, or the whole text of a document is among the excluded ones."""
    return bool(excluded) and any(normalise_prompt(text) in excluded for text in document.user_texts)


# --- local files


def _kind(path: Path) -> str:
    """`.txt`, `.jsonl`, `.parquet` or `.arrow`, compression aside; empty for all else."""
    name = path.name.lower()
    return next((s.removesuffix(".xz").removesuffix(".gz") for s in SUFFIXES if name.endswith(s)), "")


@contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """The file as it is, every failure to read it a UserError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a text file, compressed or not, without a byte order mark."""
    with _readable(path) as raw:
        file: Any = raw
        if path.name.lower().endswith(".xz"):
            file = lzma.open(raw)  # noqa: SIM115  (closed with the file under it)
        elif path.name.lower().endswith(".gz"):
            file = gzip.open(raw)  # noqa: SIM115
        try:
            yield from text_lines(file, str(path))
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: cannot be decompressed ({error})") from None


def _holds_objects(path: Path) -> bool:
    """Whether a file of text is one of JSON objects with messages, prompts or texts, by its first line."""
    return bool(_OBJECT.match(next((line for _, line in _lines(path) if line.strip()), "")))


def _text_documents(path: Path, left_out: LeftOut) -> Iterator[Document]:
    """The file as one document, or as several where it is longer than MAX_TEXT."""
    parts: list[str] = []
    size, first, number = 0, 1, 0
    for number, line in _lines(path):
        line = line.removesuffix("\n").removesuffix("\r") + "\n" if line.endswith("\n") else line
        parts.append(line)
        size += len(line)
        if size >= MAX_TEXT and not line.strip():
            yield Document("text", "".join(parts), None, first, f"{path.name}: line {first}")
            parts, size, first = [], 0, number + 1
    if (text := "".join(parts)).strip():
        yield Document("text", text, None, first, f"{path.name}: line {first}")
    elif first == 1:
        left_out.add(EMPTY, path.name)


def _column_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of a `.parquet` file, or of an `.arrow` file in either of its two forms."""
    import pyarrow
    import pyarrow.parquet

    def wanted(schema: Any) -> list[str]:
        if not any(name in schema.names for name in COLUMN_NAMES):
            raise UserError(f"{path}: has no column messages, prompt or text")
        return [name for name in (*COLUMN_NAMES, *COMPANIONS) if name in schema.names]

    try:
        if _kind(path) == ".parquet":
            table = pyarrow.parquet.ParquetFile(path)
            batches: Iterable[Any] = table.iter_batches(columns=wanted(table.schema_arrow))
        else:
            source = pyarrow.memory_map(str(path))
            try:
                file = pyarrow.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
        number = 0
        for batch in batches:
            for row in batch.select(wanted(batch.schema)).to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None


# --- the Hub


def _hub_name(path: str | Path) -> Mapping[str, str | None] | None:
    """The parts of a Hub dataset's name, or None for what can only be a local path."""
    text = str(path)
    match = _HUB.fullmatch(text)
    if not match or Path(text).exists() or text.lower().endswith(SUFFIXES) or Path(text).parent.is_dir():
        return None  # a name below a folder that exists is a mistyped path, not a dataset
    return match.groupdict()


def _hub_commit(hub: Mapping[str, str | None]) -> str:
    if hub["revision"] and _COMMIT.fullmatch(hub["revision"]):
        return hub["revision"]
    from huggingface_hub import HfApi

    try:
        return cast(str, HfApi().dataset_info(cast(str, hub["name"]), revision=hub["revision"]).sha)
    except Exception as error:  # the client raises errors of many libraries
        raise _unreachable(hub, error) from None


def _hub_rows(hub: Mapping[str, str | None]) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            hub["name"], hub["config"], revision=hub["revision"], split="train", streaming=True
        )
        yield from enumerate(rows, 1)
    except Exception as error:
        raise _unreachable(hub, error) from None
    finally:
        rows = None
        gc.collect()  # a parquet file that was left early has a thread, which would abort Python as it ends


def _unreachable(hub: Mapping[str, str | None], error: Exception) -> UserError:
    reason = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"{hub['name']}: no such file, and not readable as a Hugging Face dataset ({reason})")


# --- objects


def _line_documents(path: Path, left_out: LeftOut) -> Iterator[Document]:
    for entry in read_entries(_lines(path), str(path), is_json=True):
        assert isinstance(entry.value, dict)
        try:
            document = parse(entry.value, entry.number, f"{path.name}: {entry.place}")
        except ValueError as error:
            raise UserError(f"{path}: {entry.place} {error}") from None
        if document is None:
            left_out.add(EMPTY, f"{path.name}: {entry.place}")
        else:
            yield document


def _row_documents(
    name: str, shown: str, rows: Iterable[tuple[int, Mapping[str, Any]]], left_out: LeftOut
) -> Iterator[Document]:
    for number, row in rows:
        if not any(column in row for column in COLUMN_NAMES):
            raise UserError(f"{name}: has no column messages, prompt or text")
        where = f"{shown}: row {number}"
        try:
            document = parse(row, number, where)
        except ValueError as error:
            left_out.add(NO_DOCUMENT, f"{where} {error}")
            continue
        if document is None:
            left_out.add(EMPTY, where)
        else:
            yield document


def parse(row: Mapping[str, Any], line: int, where: str = "") -> Document | None:
    """An object -> its document, None for an empty text. Raises ValueError saying what it lacks.

    `messages` go before `prompt` and `prompt` before `text`; null counts as absent. A prompt with a `completion` is a
    conversation of the two.
    """
    if row.get("messages") is None and row.get("prompt") is None:
        if row.get("text") is None:
            raise ValueError("has none of messages, prompt and text")
        text = _string(row["text"], "text")
        return Document("text", text, None, line, where) if text.strip() else None
    messages = conversation(row)
    if row.get("messages") is None:
        if row.get("completion") is None:
            return Document("prompt", text_of(messages[0]), None, line, where)
        messages.append({"role": "assistant", "content": _string(row["completion"], "completion")})
    if messages[-1]["role"] not in (*ANSWERED, "assistant"):
        raise ValueError(f"ends with a turn of the role {messages[-1]['role']}: there is nothing to answer or to learn")
    return Document("messages", None, messages, line, where)


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a {what} that is not a string")
    if SURROGATE.search(value):
        raise ValueError(f"has a {what} with half a surrogate pair, which no UTF-8 text can hold")
    return value
