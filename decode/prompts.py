"""Prompts: from a command line, a file, a pipe or the samples.

What a text holds is decided by its content, in files, pipes and standard input alike: JSON objects, or plain lines.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from kernels import UserError

Message = dict[str, Any]  # role and content; perhaps tool_calls, tool_call_id and name

SURROGATE = re.compile("[\ud800-\udfff]")
STANDARD_INPUT = "-"  # in place of a file's name
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")  # are not read: their header and quotes would be sent as prompts
LIKE_JSON = re.compile(
    r"""\s*( \{\s*( ["'}] | \w+\s*: | $ ) | \[\s*( (\[\s*)*[{"] | $ | (null|\])[\s,\]]*$ ) )""", re.VERBOSE
)
ROLES = ("system", "developer", "user", "assistant", "tool")
TOOLS = ("tools", "functions")  # what a model may call, and OpenAI's older name of it
COMPRESSED = (b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"(\xb5/\xfd")  # how files of gzip, xz, bzip2 and zstd begin
ANSWERED = ("user", "tool")  # a conversation that ends with one of these waits for the teacher


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer, or text to go on from. where: its file and line, for messages."""

    messages: list[Message]
    id: str
    category: str | None = None
    where: str = ""

    @property
    def place(self) -> str:
        return self.where or f"prompt {self.id}"

    @property
    def title(self) -> str:
        """Its first words, for a line on the screen."""
        return " ".join(text_of(self.messages[-1]).split())[:100]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from JSON (`prompt` or `messages`, optional `id`, `category`) or plain text lines; `-` is standard
    input."""
    return parse_prompts(read_content(path), str(path))


def read_content(path: Path) -> bytes:
    """What a prompts file holds, or standard input."""
    if path.name.lower().endswith(TABLES):
        raise UserError(f"{path}: is a table, which is not read; give JSON (.jsonl, .json) or plain text")
    try:
        content = sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if content.startswith(COMPRESSED):
        raise UserError(f"{path}: is compressed; unpack it, perhaps into a pipe (`--prompts -`)")
    return content


def parse_prompts(data: bytes, name: str) -> list[Prompt]:
    """The prompts of a file's content, or of standard input's. Raises UserError naming the line, and where there is
    none or where two have one id: what is kept of a reply names its prompt by it."""
    name = "standard input" if name == STANDARD_INPUT else name
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    is_json = name.lower().endswith(JSON_SUFFIXES)
    entries = read_entries(text_lines(io.BytesIO(data), name), name, is_json=is_json)
    prompts: dict[str, Prompt] = {}
    for entry in entries:
        prompt = _prompt(entry, f"{name}: {entry.place}")
        if (first := prompts.setdefault(prompt.id, prompt)) is not prompt:
            raise UserError(f"{prompt.where} has the id {prompt.id!r}, which {first.where.rpartition(': ')[2]} has too")
    if not prompts:
        raise UserError(f"{name}: holds no prompt")
    return list(prompts.values())


def _prompt(entry: Entry, where: str) -> Prompt:
    if isinstance(entry.value, str):
        return Prompt([{"role": "user", "content": entry.value}], str(entry.number), where=where)
    try:
        messages = conversation(entry.value)
        if messages[-1]["role"] not in ANSWERED:
            raise ValueError(f"ends with a turn of the role {messages[-1]['role']}: there is nothing to answer")
        _check_prompt_beside(entry.value)
        given = entry.value.get("id")
        if isinstance(given, float) and not math.isfinite(given):
            raise ValueError(f"has the id {given}, which is no number of JSON's")
        prompt_id = str(entry.number if given is None else given)
        if SURROGATE.search(prompt_id):
            raise ValueError("has an id with half a surrogate pair, which no UTF-8 text can hold")
        category = entry.value.get("category")
        if category is not None and not (isinstance(category, str) and len(f"{category}.".splitlines()) == 1):
            raise ValueError(f"has the category {category!r}, which is no name of one line")
        if SURROGATE.search(category or ""):
            raise ValueError("has a category with half a surrogate pair, which no UTF-8 text can hold")
    except ValueError as error:
        raise UserError(f"{where} {error}") from None
    return Prompt(messages, prompt_id, category, where)


def _check_prompt_beside(entry: Mapping[str, Any]) -> None:
    """Datasets have an answered `prompt` beside its `messages`; another one would not be answered. ValueError."""
    prompt = entry.get("prompt")
    if entry.get("messages") is None or prompt is None:
        return
    if not any(text_of(message) == prompt for message in entry["messages"] if message.get("role") == "user"):
        raise ValueError("has a `prompt` and `messages` in which no user says it: one of them is to be answered")


def make_prompt(text: str, prompt_id: str) -> Prompt:
    """A prompt of one user turn. Raises UserError if it is empty."""
    if not text.strip():
        raise UserError("the prompt is empty")
    if SURROGATE.search(text):  # how Python passes on bytes of a command line that are not UTF-8
        raise UserError("the prompt is not valid UTF-8")
    return Prompt([{"role": "user", "content": text}], prompt_id)


def gather_prompts(prompt: str | None, file: Path | None, samples: Path) -> list[Prompt]:
    """Prompts from --prompt, --prompts, standard input, or else the samples shipped in data/."""
    if prompt is not None and file is not None:
        raise UserError("give --prompt or --prompts, not both")
    if prompt is not None:
        return [make_prompt(prompt, "1")]
    if file is not None:
        return read_prompts(file)
    if not sys.stdin.isatty():
        data = sys.stdin.buffer.read()
        if data.removeprefix(b"\xef\xbb\xbf").strip():
            return parse_prompts(data, STANDARD_INPUT)
    return read_prompts(samples)


# --- what a text holds


class Entry(NamedTuple):
    """A line of plain text, without its end, or a JSON object.

    place: `line 3`, or `entry 3` of a list.
    """

    number: int
    place: str
    value: str | dict[str, Any]


def text_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end) of text in UTF-8, without a byte order mark. UserError names the line."""
    offset = 0
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().removeprefix("\ufeff")  # of the file, or of one that `cat` put behind another
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: line {number} (byte {offset + error.start}) is not valid UTF-8") from None
        if "\0" in text:  # UTF-16 of English text is valid UTF-8
            raise UserError(f"{name}: line {number} (byte {offset + line.index(0)}) is a null byte, not text in UTF-8")
        yield number, text
        offset += len(line)


def read_entries(lines: Iterable[tuple[int, str]], name: str, *, is_json: bool) -> Iterator[Entry]:
    """Plain lines, or objects where the text is JSON: one a line, a list of them, or one over many lines. Blank lines
    are left out.

    It is JSON where `is_json` says so, or where it begins like JSON. Raises UserError, naming the line, for JSON that
    cannot be read and for a line of one kind among those of the other.
    """
    rest = iter(lines)
    first = next((line for line in rest if line[1].strip()), None)
    if first is not None:
        plain = not (is_json or LIKE_JSON.match(first[1]))
        yield from (_plain_entries if plain else _json_entries)(first, rest, name)


def _plain_entries(first: tuple[int, str], rest: Iterable[tuple[int, str]], name: str) -> Iterator[Entry]:
    for number, text in chain([first], rest):
        if LIKE_JSON.match(text):
            raise UserError(
                f"{name}: line {number} looks like JSON, which line {first[0]} is not; a prompt that begins so goes"
                ' into JSON: {"prompt": "..."}'
            )
        if text.strip():
            yield Entry(number, f"line {number}", text.removesuffix("\n").removesuffix("\r"))


def _json_entries(first: tuple[int, str], rest: Iterable[tuple[int, str]], name: str) -> Iterator[Entry]:
    number, text = first
    value, error = _parsed(text)
    if isinstance(value, dict):
        for number, text in chain([first], rest):
            if text.strip():
                value, error = _parsed(text)
                if error is not None:
                    raise UserError(f"{name}: line {number} is not JSON: {error}")
                yield Entry(number, f"line {number}", _object(value, f"{name}: line {number}"))
        return
    whole, fault = _parsed(text + "".join(line for _, line in rest))
    if fault is not None:
        if not text.strip(" \t\r\n[{"):  # only the beginning of it
            number, error = number + fault.lineno - 1, fault
        raise UserError(f"{name}: line {number} is not {f'JSON: {error}' if error else 'a JSON object'}")
    if isinstance(whole, list):
        for i, item in enumerate(whole, 1):
            yield Entry(i, f"entry {i}", _object(item, f"{name}: entry {i}"))
    else:
        yield Entry(number, f"line {number}", _object(whole, f"{name}: line {number}"))


def _parsed(text: str) -> tuple[Any, json.JSONDecodeError | None]:
    """A JSON value, or what is wrong with it."""
    try:
        return json.loads(text), None
    except json.JSONDecodeError as error:
        return None, error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; brackets in brackets
        return None, json.JSONDecodeError(str(error), text, 0)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object")
    return value


# --- conversations


def conversation(entry: Mapping[str, Any]) -> list[Message]:
    """The messages of an object: its `messages`, else its `prompt` as a user's turn; `system` goes before them. Null
    counts as absent.

    Raises ValueError saying what it lacks, as words to follow a place.
    """
    for name in TOOLS:
        if entry.get(name):
            raise ValueError(f"has `{name}`, which are not read")
    if (messages := entry.get("messages")) is None:
        if entry.get("prompt") is None:
            raise ValueError("has neither `prompt` nor `messages`")
        if not isinstance(entry["prompt"], str):
            raise ValueError("has a prompt that is not a string")
        messages = [{"role": "user", "content": entry["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise ValueError("has messages that are not a list of messages")
    checked = [_message(message) for message in messages]
    if (system := entry.get("system")) is not None:
        if not isinstance(system, str):
            raise ValueError("has a `system` that is not a string")
        if system.strip():
            if checked[0]["role"] in ("system", "developer"):
                raise ValueError("has a `system` beside messages that begin with one")
            checked.insert(0, _message({"role": "system", "content": system}))
    if not any(message["role"] == "user" for message in checked):
        raise ValueError("has messages, but none of a user")
    return checked


def text_of(message: Message) -> str:
    """What a message says: its content, of parts their texts one after the other."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _message(message: Any) -> Message:
    """A message with what of it a chat template may read."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"has a message with the role {role!r}, not {', '.join(ROLES)}")
    content, calls = message.get("content"), message.get("tool_calls")
    kept: Message = {"role": role, "content": content}
    if isinstance(content, list) and content:
        kept["content"] = [_part(part) for part in content]
    elif not (isinstance(content, str) or (content is None and role == "assistant" and calls)):
        raise ValueError("has a content of a message that is not a string")
    if role == "assistant" and calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) and _called(call) for call in calls):
            raise ValueError("has tool_calls that do not name a function")
        kept["tool_calls"] = calls
    if message.get("function_call"):
        raise ValueError("has a function_call, which is not read; write it as tool_calls")
    if role == "tool":
        kept |= {key: message[key] for key in ("tool_call_id", "name") if message.get(key) is not None}
    if SURROGATE.search(json.dumps(kept, ensure_ascii=False)):
        raise ValueError("has a message with half a surrogate pair, which no UTF-8 text can hold")
    if role == "user" and not text_of(kept).strip():
        raise ValueError("has an empty prompt")
    return kept


def _part(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"has a part of the type {kind!r} in a message, where only text is read")
    if not isinstance(part.get("text"), str):
        raise ValueError("has a content of a message that is not a string")
    return {"type": "text", "text": part["text"]}


def called_functions(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [_called(call) for call in message.get("tool_calls", [])]


def _called(call: dict[str, Any]) -> str:
    function = call.get("function", call)  # chat templates take both
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
