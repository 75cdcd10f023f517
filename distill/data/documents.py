"""Documents: what sources consist of, and how a row or a line becomes one."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from decode.prompts import ANSWERED, SURROGATE, TOOLS, Message, called_functions, conversation, text_of
from kernels.errors import UserError

Kind = Literal["text", "prompt", "messages", "turns", "self"]

COLUMN_NAMES = ("messages", "turns", "prompt", "text")  # the first of them that a row has is its document
NAMES = "messages, turns, prompt and text"
KINDS = ("kind", "category")  # columns that say what kind of thing a document is
COMPANIONS = ("completion", "system", *TOOLS, *KINDS)  # columns that are read where they stand beside those
TEXTS = ("text", "content")  # columns of strings that hold texts; those of every other name hold prompts
UNLEARNT = "a turn of weight 0, which would be learnt all the same"
EMPTY, NO_DOCUMENT, OTHER_FILE = "empty", "no document", "a file of another kind"
OBJECT = re.compile(r'\s*\[?\s*\{(.*,)?\s*"(messages|turns|prompt|text)"\s*:')  # how JSON begins, by any name


@dataclass(frozen=True)
class Document:
    """One document of a source; of `text` and `messages`, one is None. Of `turns`, messages are a user's, and each of
    them wants a reply; of `self` there is nothing yet."""

    kind: Kind
    text: str | None  # the text or the prompt
    messages: list[Message] | None
    line: int  # the line, row or entry of a list that it begins at, from 1
    where: str = field(default="", compare=False)  # file and line, for messages
    category: str = field(default="", compare=False)  # what kind of thing it is, where the source says so
    unlearnt: bool = False  # whether a turn of the assistant's must not be learnt

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

    def add_all(self, other: LeftOut) -> None:
        for reason, count in other.counts.items():
            self.add(reason, other.firsts[reason], count)

    def drained(self) -> LeftOut:
        """What is in it; nothing is left."""
        found = LeftOut(self.counts, self.firsts)
        self.counts, self.firsts = {}, {}
        return found


def normalise_prompt(text: str) -> str:
    """The form in which prompts are compared: NFKC, case folded, white space collapsed."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def parse(
    row: Mapping[str, Any], line: int, where: str = "", column: str | None = None, learnt: bool = True
) -> Document | None:
    """An object -> its document, None for an empty text. Raises ValueError saying what it lacks.

    `messages` go before `turns`, those before `prompt` and `prompt` before `text`; null counts as absent. A prompt with
    a `completion` or a `system` is a conversation of these. column: read only this one. learnt: whether the turns of a
    conversation that ends with an answer are; otherwise it says what to leave out, and counts without an answer too.
    """
    category = _category(row)
    if column is not None:
        row = _of_column(row, column)
    if row.get("messages") is None and row.get("turns") is not None:
        _check_alone(row, "turns")
        turns = [{"role": "user", "content": turn} for turn in _turns(row["turns"])]
        return Document("turns", None, turns, line, where, category)
    if row.get("messages") is None and row.get("prompt") is None:
        if row.get("text") is None:
            raise ValueError(f"has none of {NAMES}")
        _check_alone(row, "text")
        text = _string(row["text"], "text")
        return Document("text", text, None, line, where, category) if text.strip() else None
    messages = conversation(row)
    if row.get("messages") is not None and row.get("completion"):
        raise ValueError("has a `completion` beside messages, which is not read")
    if row.get("messages") is None and row.get("completion") is not None:
        messages.append({"role": "assistant", "content": _string(row["completion"], "completion")})
    elif row.get("messages") is None and len(messages) == 1:
        return Document("prompt", text_of(messages[0]), None, line, where, category)
    if messages[-1]["role"] not in (*ANSWERED, "assistant"):
        raise ValueError(f"ends with a turn of the role {messages[-1]['role']}: there is nothing to answer or to learn")
    unlearnt = any(one.get("role") == "assistant" and one.get("weight") == 0 for one in row.get("messages") or ())
    if messages[-1]["role"] == "assistant":
        if learnt and unlearnt:
            raise ValueError(f"has {UNLEARNT}: leave it out")
        if learnt and not any(map(_says_something, messages)):
            return None  # there is nothing to learn
    return Document("messages", None, messages, line, where, category, unlearnt)


def of_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    name: str,
    shown: str,
    column: str | None,
    left_out: LeftOut,
    learnt: bool = True,
) -> Iterator[Document]:
    """The documents of rows that a program wrote: one that is none is counted, and an error where it says what to leave
    out. name: of the source, for errors; shown: that of what the rows are in; learnt: see `parse`."""
    for number, row in rows:
        check_columns(row, name, column)
        where = f"{shown}: row {number}"
        try:
            document = parse(row, number, where, column, learnt)
        except ValueError as error:
            if not learnt:
                raise UserError(f"{name}: row {number} {error}") from None
            left_out.add(NO_DOCUMENT, f"{where} {error}")
            continue
        if document is None:
            left_out.add(EMPTY, where)
        else:
            yield document


def check_columns(names: Iterable[str], where: str, column: str | None) -> None:
    """UserError where a table has no column to read, which names those that it has."""
    if column not in names if column else not any(name in names for name in COLUMN_NAMES):
        wanted = column or NAMES.replace(" and ", " or ")
        raise UserError(f"{where}: has no column {wanted}; it has {', '.join(names) or 'none'}")


def _of_column(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A row as though what is in a column had the name of what it is."""
    if column not in row:
        raise ValueError(f"has no {column}; it has {', '.join(row) or 'nothing'}")
    value = row[column]
    if isinstance(value, str) and column not in TEXTS:
        value = _listed(value)
    if isinstance(value, list):
        name = "messages" if value and isinstance(value[0], dict) else "turns"
        return {name: value} | {tools: row.get(tools) for tools in TOOLS}
    if value is None or isinstance(value, str):
        return {"text" if column in TEXTS or value is None else "prompt": value or ""}
    raise ValueError(f"has a {column} that is neither a text nor a list of turns")


def _check_alone(row: Mapping[str, Any], name: str) -> None:
    """ValueError for what stands beside turns or a text, and only messages or a prompt are read with."""
    for other in ("system", "completion", *TOOLS):
        if row.get(other):
            raise ValueError(f"has `{other}` beside {name}, which is not read; leave it out, or write messages")


def _says_something(message: Message) -> bool:
    """Whether a message is an answer that is not empty."""
    return message["role"] == "assistant" and bool(text_of(message).strip() or called_functions(message))


def _listed(value: str) -> str | list[Any]:
    """The messages of a text that is a list of them in JSON, as some tables keep a conversation; else the text."""
    try:
        found = json.loads(value) if value.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return value
    if isinstance(found, list) and found and all(isinstance(one, dict) and "role" in one for one in found):
        return found
    return value


def _turns(turns: Any) -> list[str]:
    if not isinstance(turns, list) or not turns:
        raise ValueError("has turns that are not a list of what a user says")
    said = [_string(turn, "turn") for turn in turns]
    if not all(turn.strip() for turn in said):
        raise ValueError("has an empty turn")
    return said


def _category(row: Mapping[str, Any]) -> str:
    """The kind of a row, in one line."""
    found = next((row[name] for name in KINDS if row.get(name) is not None), "")
    name = str(found) if isinstance(found, str | int) else ""
    return "" if SURROGATE.search(name) else " ".join(name.split())


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a {what} that is not a string")
    if SURROGATE.search(value):
        raise ValueError(f"has a {what} with half a surrogate pair, which no UTF-8 text can hold")
    return value
