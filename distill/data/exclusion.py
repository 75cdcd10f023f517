"""Prompts that a collection must not hold, because drafts are measured with them: `--exclude`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from decode.prompts import COMPRESSED, TABLES
from distill.data.documents import Document, LeftOut, normalise_prompt
from distill.data.duplicates import NearDuplicates, Parts
from distill.data.source_files import (
    holds_objects,
    kind_of,
    lines_of,
    lists_objects,
    read_files,
    readable,
    source_files,
    visible_files,
)
from distill.data.source_names import SUFFIXES, TEXT
from kernels.errors import UserError

EXCLUDED, NEAR_EXCLUDED = "excluded", "near an excluded prompt"


class Excluded:
    """Prompts to leave out, and what is near them."""

    def __init__(self, prompts: Iterable[str] = ()) -> None:
        self.prompts = frozenset(map(normalise_prompt, prompts)) - {""}
        self._near = NearDuplicates(sorted(self.prompts))

    def reason(self, document: Document) -> str | None:
        """Why a document is left out: the prompt, any user message, or the whole text is excluded, or, a text aside,
        near what is. None where it is not."""
        if not self.prompts:
            return None
        if document.kind == "text":
            return EXCLUDED if normalise_prompt(document.text or "") in self.prompts else None
        return self.reason_of(*map(Parts, document.user_texts))

    def reason_of(self, *said: Parts) -> str | None:
        """Why what a user says is left out."""
        if any(text.text in self.prompts for text in said):
            return EXCLUDED
        return NEAR_EXCLUDED if any(map(self._near.find, said)) else None


def _files(path: Path) -> list[Path]:
    """Of a folder also each `.json` that lists objects: one that has no prompts is refused, not passed over, as is a
    table, and what is packed in a way that is not read."""
    files = source_files(path)
    others = [file for file in visible_files(path) if file not in files and file.is_file()] if path.is_dir() else []
    for file in others:
        if not {ending.lower() for ending in file.suffixes}.isdisjoint(TABLES):
            raise UserError(f"--exclude {file}: is a table, which is not read; give JSON (.jsonl, .json), or .txt")
        with readable(file) as content:
            if content.read(8).startswith(COMPRESSED):
                raise UserError(f"--exclude {file}: is compressed, and not read; give {', '.join(SUFFIXES)}")
    return files + [file for file in others if kind_of(file) == ".json" and lists_objects(file)]


def load_excluded(paths: Iterable[str | Path]) -> Excluded:
    """The prompts of prompts files: JSON, parquet, arrow, or plain text with one prompt a line. UserError for a row or
    line without one, and where a file holds none: whoever names it means to leave something out."""
    excluded: set[str] = set()
    for path in paths:
        prompts: set[str] = set()
        for file in _files(Path(path)):
            if kind_of(file) in TEXT and not holds_objects(file):
                prompts.update(normalise_prompt(line) for _, line in lines_of(file))
            else:
                documents = read_files([file], None, LeftOut(), learnt=False)
                prompts.update(normalise_prompt(text) for document in documents for text in document.user_texts)
        if not prompts - {""}:
            raise UserError(f"--exclude {path}: holds no prompt")
        excluded |= prompts
    return Excluded(excluded)
