"""Local sources: plain text, JSON, columnar files, folders of these."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from decode.prompts import LIKE_JSON, SURROGATE, TOOLS, Entry, read_entries, text_lines
from distill.data.documents import (
    COLUMN_NAMES,
    COMPANIONS,
    EMPTY,
    KINDS,
    OBJECT,
    OTHER_FILE,
    Document,
    LeftOut,
    check_columns,
    of_rows,
    parse,
)
from distill.data.source_names import COLUMNS, LINES, SUFFIXES, TEXT
from kernels.errors import UserError, first_line

MAX_TEXT = 1 << 20  # characters; a text file longer than this is cut at its next blank line


def source_files(path: Path, left_out: LeftOut | None = None, column: str | None = None) -> list[Path]:
    """The files that a local source consists of, sorted by their names inside it. left_out: counts the others of a
    folder, hidden ones aside. column: the one that is read, where it has a name of its own."""
    if path.is_dir():
        visible = sorted((file.relative_to(path).as_posix(), file) for file in visible_files(path))
        if odd := next((name for name, _ in visible if SURROGATE.search(name)), None):
            raise UserError(f"{path}: holds a file whose name is not valid UTF-8: {odd}")
        regular = (file for _, file in visible if kind_of(file) and file.is_file())
        files = [file for file in regular if not _describes(file, {*COLUMN_NAMES, column})]
        if not files:
            raise UserError(f"{path}: holds none of {', '.join((*TEXT, '.jsonl', '.ndjson', *COLUMNS))}")
        read = set(files)
        for name, file in visible:
            if left_out is not None and file not in read:
                left_out.add(OTHER_FILE, name)
        return files
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_file():
        raise UserError(
            f"{path}: is no regular file but a pipe, socket or device; what is collected is read several times"
        )
    if not kind_of(path):
        raise UserError(f"{path}: not a source; its name must end in one of {', '.join(SUFFIXES)}")
    return [path]


def visible_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All but folders in a folder and those below it, links followed, hidden names aside. above: the folders that it is
    in."""
    real = Path(os.path.realpath(folder))
    if real in above:
        raise UserError(f"{folder}: is a link to a folder that it is in")
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link that leads nowhere")
        if path.is_dir():
            yield from visible_files(path, (*above, real))
        else:
            yield path


def _describes(file: Path, columns: Set[str | None]) -> bool:
    """Whether a `.json` in a folder holds no documents, in a list, a line each, or one: such a file mostly describes a
    dataset. By its own name it is read, whatever it holds."""
    return kind_of(file) == ".json" and not next(iter(_first_objects(file)[0]), {}).keys() & columns


def lists_objects(file: Path) -> bool:
    """Whether a file is a list of objects, or has one a line and several."""
    objects, listed = _first_objects(file)
    return len(objects) > (0 if listed else 1)


def _first_objects(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """The objects on the first two lines of a file that has one a line, else those that it lists or the one that it is;
    and whether it is a list."""
    values = [_value(line) for line in _first_lines(file, 2)]
    listed = False
    if not (values and isinstance(values[0], dict)):
        whole = values[0] if values and isinstance(values[0], list) else None
        whole = whole or _value("".join(line for _, line in lines_of(file)))
        listed = isinstance(whole, list)
        values = whole if listed else [whole]
    return [value for value in values if isinstance(value, dict)], listed


def read_files(files: Iterable[Path], column: str | None, left_out: LeftOut, learnt: bool = True) -> Iterator[Document]:
    """The documents of files, one after the other. column: read only this one of objects and tables; learnt: see
    `documents.parse`."""
    for file in files:
        kind = kind_of(file)
        if kind in COLUMNS:
            yield from of_rows(_column_rows(file, column), str(file), file.name, column, left_out, learnt)
        elif kind in LINES or holds_objects(file):
            for entry in read_entries(lines_of(file), str(file), is_json=True):
                yield from _of_object(file, entry, column, left_out, learnt)
        elif column is not None:
            raise UserError(f"{file}: is plain text, which has no column {column}")
        else:
            yield from _text_documents(file, left_out)


def read_shuffled(
    files: list[Path], column: str | None, left_out: LeftOut, order: np.random.Generator
) -> Iterator[Document] | None:
    """The documents of files that can be read at any place, in an order over all of them; None of other files. 8 bytes
    a line are held, whatever stands in them."""
    if not has_lines_of_objects(files):
        return None
    starts = [_line_starts(file) for file in files]
    firsts = np.cumsum([0, *map(len, starts)])
    return chain.from_iterable(
        _document_at(files[at], int(place - firsts[at]), starts[at], column, left_out)
        for place in order.permutation(firsts[-1])
        for at in [int(np.searchsorted(firsts, place, side="right")) - 1]
    )


def has_lines_of_objects(files: list[Path]) -> bool:
    """Whether files can be read at any place: they are uncompressed, with a JSON object a line."""
    return all(map(_has_lines_of_objects, files))


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of a text file, compressed or not, without a byte order mark."""
    with readable(path) as raw:
        file: Any = raw
        if path.name.lower().endswith(".xz"):
            file = lzma.open(raw)  # noqa: SIM115  (closed with the file under it)
        elif path.name.lower().endswith(".gz"):
            file = gzip.open(raw)  # noqa: SIM115
        try:
            yield from text_lines(_by_carriage_returns(file) or file, str(path))
        except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: cannot be decompressed ({error})") from None


def _by_carriage_returns(file: BinaryIO) -> BinaryIO | None:
    """The text of a file whose lines end with carriage returns alone, as those of old Macs do; None of another, which
    is at its beginning then."""
    returns = False
    while data := file.read(1 << 20):
        if b"\n" in data:
            returns = False
            break
        returns = returns or b"\r" in data
    file.seek(0)
    return io.BytesIO(file.read().replace(b"\r", b"\n")) if returns else None


@contextmanager
def readable(path: Path) -> Iterator[BinaryIO]:
    """The file as it is, every failure to read it a UserError."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def kind_of(path: Path) -> str:
    """`.txt`, `.jsonl`, `.parquet` or `.arrow`, compression aside; empty for all else."""
    name = path.name.lower()
    return next((s.removesuffix(".xz").removesuffix(".gz") for s in SUFFIXES if name.endswith(s)), "")


def holds_objects(path: Path) -> bool:
    """Whether a file of text is JSON, whatever its name: it begins as an object that is a document does, or it can be
    read as JSON, line by line or whole. A text may begin like JSON and be none."""
    first, *more = _first_lines(path, 2) or [""]
    if OBJECT.match(first):
        return True
    if not LIKE_JSON.match(first):
        return False
    if all(isinstance(_value(line), dict) for line in (first, *more)):
        return True
    return isinstance(_value("".join(line for _, line in lines_of(path))), (dict, list))


def _first_lines(path: Path, count: int) -> list[str]:
    """Those that are not blank."""
    return list(islice((line for _, line in lines_of(path) if line.strip()), count))


def _value(text: str) -> Any:
    """What a text is as JSON; None of one that is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


# --- objects


def _of_object(
    path: Path, entry: Entry, column: str | None, left_out: LeftOut, learnt: bool = True
) -> Iterator[Document]:
    """The document of an object that somebody wrote by hand: one that is none is an error."""
    assert isinstance(entry.value, dict)
    where = f"{path.name}: {entry.place}"
    try:
        document = parse(entry.value, entry.number, where, column, learnt)
    except ValueError as error:
        raise UserError(f"{path}: {entry.place} {error}") from None
    if document is None:
        left_out.add(EMPTY, where)
    else:
        yield document


def _has_lines_of_objects(path: Path) -> bool:
    """Whether a file holds a JSON object a line, and lines are found where they stand."""
    if path.name.lower().endswith((".xz", ".gz", *COLUMNS)) or not (kind_of(path) in LINES or holds_objects(path)):
        return False
    with readable(path) as file:
        if _by_carriage_returns(file):
            return False
    return all(isinstance(_value(line), dict) for line in _first_lines(path, 1))


def _line_starts(path: Path) -> np.ndarray:
    """Where the lines of a file begin: int64 [lines]."""
    with readable(path) as file:
        sizes = np.fromiter(map(len, file), np.int64)
    return np.cumsum(sizes) - sizes


def _document_at(
    path: Path, line: int, starts: np.ndarray, column: str | None, left_out: LeftOut
) -> Iterator[Document]:
    """The document of a line, from 0; none of a blank one."""
    with readable(path) as file:
        file.seek(int(starts[line]))
        ((_, text),) = text_lines([file.readline()], str(path))
    for entry in read_entries([(line + 1, text)], str(path), is_json=True):
        yield from _of_object(path, entry, column, left_out)


# --- text and tables


def _text_documents(path: Path, left_out: LeftOut) -> Iterator[Document]:
    """The file as one document, or as several where it is longer than MAX_TEXT."""
    parts: list[str] = []
    size, first, number = 0, 1, 0
    for number, line in lines_of(path):
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


def _column_rows(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row) of a `.parquet` file, or of an `.arrow` file in either of its two forms."""
    import pyarrow
    import pyarrow.parquet

    def wanted(schema: Any) -> list[str]:
        check_columns(schema.names, str(path), column)
        names = (*COLUMN_NAMES, *COMPANIONS) if column is None else (column, *TOOLS, *KINDS)
        return [name for name in dict.fromkeys(names) if name in schema.names]

    try:
        if kind_of(path) == ".parquet":
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
    except (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        LookupError,
    ) as error:  # of texts that are no UTF-8, and others
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from None
