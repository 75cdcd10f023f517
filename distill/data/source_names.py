"""What `--source` names: `NAME_OR_PATH[:config[:split]][@revision][#column][=weight]`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kernels.errors import UserError
from kernels.files import own_name

TEXT, LINES, COLUMNS = (".txt",), (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow")
SUFFIXES = tuple(f"{s}{c}" for s in TEXT + LINES for c in ("", ".xz", ".gz")) + COLUMNS
HEAVIEST = 1_000_000  # weight: sums of many stay numbers
SELF = "self"  # no source of its own: the teacher writes what a user says too
_HUB = re.compile(
    r"(?P<path>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+)?(:(?P<split>[\w.-]+))?(?<!:))?(@(?P<revision>[\w./-]+))?"
    r"(#(?P<column>[^#=]+))?(=(?P<weight>.*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Source:
    """A file, a folder, a dataset of the Hub, or the teacher itself."""

    name: str  # as manifests have it: what was given, of a file or folder without the one it is in
    kind: Literal["file", "folder", "hub", "self"]
    path: str  # of a file or folder; owner/name on the Hub
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    column: str | None = None  # the one to read, whatever others there are
    weight: float = 1  # its share of the tokens, over the sum of all weights


def parse_source(text: str | Path) -> Source:
    """What a name stands for. A file or folder that is there goes before everything else, so that its name may hold any
    of the marks. UserError for a weight that is none, and for no name, which would be the current folder."""
    if not (text := str(text)).strip():
        raise UserError(f"--source {text!r}: is no name")
    for path, column, weight in _readings(text):
        if Path(path).exists():
            kind: Literal["file", "folder"] = "folder" if Path(path).is_dir() else "file"
            name = own_name(Path(path)) + text[len(path) :]
            return Source(name, kind, path, column=column, weight=_weight(weight, text))
    if (path := text.partition("=")[0]) == SELF:
        return Source(text, "self", path, weight=_weight(text[len(path) + 1 :] or None, text))
    hub = _HUB.fullmatch(text)
    # A name below a folder that exists is a mistyped path, not a dataset; so is one that ends as files do.
    if hub and not hub["path"].lower().endswith(SUFFIXES) and not Path(hub["path"]).parent.is_dir():
        path, config, split, revision, column, weight = hub.group(
            "path", "config", "split", "revision", "column", "weight"
        )
        return Source(text, "hub", path, config, split, revision, column, _weight(weight, text))
    return Source(own_name(Path(text)), "file", text)


def shown_name(text: str | Path) -> str:
    """The name of a source in a manifest."""
    return parse_source(text).name


def _readings(text: str) -> Iterator[tuple[str, str | None, str | None]]:
    """What of a text may be a path, the column and the weight, the longest paths first."""
    yield text, None, None
    head, weighted, weight = text.rpartition("=")
    if weighted:
        yield head, None, weight
    for rest, share in [(text, None), (head, weight)] if weighted else [(text, None)]:
        path, columned, column = rest.rpartition("#")
        if columned and column and "=" not in column:
            yield path, column, share


def _weight(weight: str | None, text: str) -> float:
    try:
        value = 1.0 if weight is None else float(weight)
    except ValueError:
        value = 0.0
    if not 0 < value <= HEAVIEST:
        raise UserError(f"--source {text}: the weight {weight} is no number above 0, and at most {HEAVIEST:,}")
    return value
