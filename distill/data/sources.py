"""Sources: what `--source` names, read into documents.

`source_names` says what a name stands for, `source_files` and `source_hub` read, `documents` has what they give. Files
are read line by line, datasets of the Hub row by row, and the same source gives the same documents in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.documents import Document, LeftOut, normalise_prompt, of_rows
from distill.data.source_files import (
    has_lines_of_objects,
    read_files,
    read_shuffled,
    readable,
    source_files,
    visible_files,
)
from distill.data.source_hub import COMMIT, commit_of, rows_of
from distill.data.source_names import Source, parse_source, shown_name
from kernels.errors import UserError

__all__ = [
    "Document",
    "LeftOut",
    "Source",
    "Watch",
    "at_commit",
    "normalise_prompt",
    "parse_source",
    "read_source",
    "sha256_of",
    "shown_name",
    "source_fingerprint",
]


def read_source(
    source: Source | str | Path, left_out: LeftOut | None = None, order: np.random.Generator | None = None
) -> Iterator[Document]:
    """The documents of a file, of all files of a folder in sorted order, or of a Hub dataset.

    `.txt` is one document of plain text, unless it holds JSON; `.jsonl`, `.ndjson`, `.json`, `.parquet` and `.arrow`
    hold objects (`documents.parse`). Files of text may be compressed (`.xz`, `.gz`). A Hub dataset is read no further
    than documents are taken. The teacher itself (`self`) gives documents without end, in which nothing stands yet.
    Raises UserError naming file and line. What is empty is left out and counted in `left_out`; so is a row of columns
    that is no document: whoever collects did not write a dataset of a million rows and cannot mend it.
    order: documents come in a random order, where all of them can be reached.
    """
    source, left_out = _parsed(source), LeftOut() if left_out is None else left_out
    if source.kind == "self":
        yield from (Document("self", None, None, number, source.name, "self") for number in count(1))
    elif source.kind == "hub":
        yield from of_rows(rows_of(source), source.name, source.path, source.column, left_out)
    else:
        files = source_files(Path(source.path), left_out, source.column)
        shuffled = None if order is None else read_shuffled(files, source.column, left_out, order)
        yield from read_files(files, source.column, left_out) if shuffled is None else shuffled


def describe(source: Source) -> str:
    """What will be read of a source, and in which order, in words."""
    column = f"column {source.column} of " if source.column else ""
    if source.kind == "self":
        return "what the teacher writes as the user and as itself"
    if source.kind == "hub":
        config = f"configuration {source.config}, " if source.config else ""
        return f"{column}{config}split {source.split or 'train'}, streamed at commit {source.revision}"
    files = source_files(Path(source.path), column=source.column)
    size = sum(file.stat().st_size for file in files) / 1e6
    named = files[0].name if len(files) == 1 else f"{len(files)} files"
    lines = ", its lines in an order over all" if has_lines_of_objects(files) else ""
    return f"{column}{named}, {size:,.1f} MB{lines}"


def sha256_of(source: Source | str | Path) -> str:
    """The hash of a source: of a file's bytes, of a folder's names and hashes, of a Hub dataset's commit."""
    source, digest = _parsed(source), hashlib.sha256()
    if source.kind == "hub":
        split = f":{source.split}" if source.split else ""
        digest.update(f"{source.path}:{source.config or ''}{split}@{commit_of(source)}".encode())
    elif source.kind == "folder":
        path = Path(source.path)
        for file in source_files(path, column=source.column):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
    else:
        (path,) = source_files(Path(source.path))
        with readable(path) as file_:
            while data := file_.read(1 << 20):
                digest.update(data)
    return digest.hexdigest()


def source_fingerprint(source: Source | str | Path) -> dict[str, str]:
    """What a manifest says of a source: name, sha256, kind (file, folder, hub or self), and of a Hub dataset the
    commit."""
    source = at_commit(_parsed(source))
    if source.kind == "self":
        return {"name": source.name, "kind": source.kind}
    values = {"name": source.name, "sha256": sha256_of(source), "kind": source.kind}
    return values if source.revision is None else values | {"commit": source.revision}


class Watch:
    """The local files of sources, looked at again and again while they are read: whoever edits one meanwhile would get
    a dataset of both."""

    def __init__(self, sources: Iterable[Source]) -> None:
        """To be called before the hashes are taken."""
        self._sources = tuple(sources)
        self._stamps = [_stamps(source) for source in self._sources]

    def check(self, fingerprints: Sequence[dict[str, Any]]) -> None:
        """UserError for a source whose bytes are not those of its fingerprint any more."""
        for index, source in enumerate(self._sources):
            if (stamps := _stamps(source)) != self._stamps[index]:
                if sha256_of(source) != fingerprints[index]["sha256"]:
                    raise UserError(
                        f"{source.path}: was changed while it was read; what is kept is of the file as it was"
                    )
                self._stamps[index] = stamps


def _stamps(source: Source) -> list[tuple[Path, int, int, int]]:
    """What tells a file that was written to from one that was not, for each file of a local source."""
    path, files = Path(source.path), list[Path]()
    if source.kind in ("file", "folder"):  # of a folder all that is there: to tell what is read takes reading
        files = list(visible_files(path)) if source.kind == "folder" else source_files(path)
    status = ((file, file.stat()) for file in files)
    return [(file, of_file.st_ino, of_file.st_size, of_file.st_mtime_ns) for file, of_file in status]


def at_commit(source: Source, begun: Iterable[Any] = ()) -> Source:
    """A Hub dataset at the commit to read; any other source as it is.

    begun: what a manifest says of the sources it was begun with. The Hub is asked only where neither they nor the name
    itself say the commit.
    """
    if source.kind != "hub":
        return source
    known = [entry.get("commit") for entry in begun if isinstance(entry, dict) and entry.get("name") == source.name]
    commit = next((commit for commit in known if COMMIT.fullmatch(str(commit))), None)
    return replace(source, revision=commit or commit_of(source))


def _parsed(source: Source | str | Path) -> Source:
    return source if isinstance(source, Source) else parse_source(source)
