"""Prompts: from a command line, a file, a pipe or the samples."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels import UserError

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer, or text to go on from."""

    messages: list[dict[str, str]]
    id: str
    category: str | None = None

    @property
    def title(self) -> str:
        """Its first words, for a line on the screen."""
        return " ".join(self.messages[-1]["content"].split())[:100]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from JSONL (`prompt` or `messages`, optional `id`, `category`) or plain text lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_prompts(data, str(path), jsonl=path.suffix == ".jsonl")


def parse_prompts(data: bytes, name: str, *, jsonl: bool) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(io.BytesIO(data), 1):
        where = f"{name}: line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not valid UTF-8 (byte {error.start + 1})") from None
        if text:
            prompts.append(_parse_line(text, where, number) if jsonl else make_prompt(text, str(number)))
    if not prompts:
        raise UserError(f"{name}: holds no prompt")
    return prompts


def _parse_line(text: str, where: str, number: int) -> Prompt:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not a JSON object")
    messages: Any = entry.get("messages")
    if messages is None:
        if not isinstance(entry.get("prompt"), str):
            raise UserError(f"{where} has neither `prompt` nor `messages`")
        messages = [{"role": "user", "content": entry["prompt"]}]
    valid = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not valid or not messages:
        raise UserError(f"{where}: its messages are not a list of objects with `role` and `content`")
    if not messages[-1]["content"].strip():
        raise UserError(f"{where}: the prompt is empty")
    if SURROGATE.search(json.dumps(entry, ensure_ascii=False)):
        raise UserError(f"{where}: holds half a surrogate pair, which no UTF-8 text can hold")
    category = entry.get("category")
    if category is not None and not (isinstance(category, str) and len(f"{category}.".splitlines()) == 1):
        raise UserError(f"{where}: its category is {category!r}, not a name of one line")
    return Prompt(messages, str(entry.get("id", number)), category)


def make_prompt(text: str, prompt_id: str) -> Prompt:
    """A prompt of one user turn. Raises UserError if it is empty."""
    if not text.strip():
        raise UserError("the prompt is empty")
    if SURROGATE.search(text):  # how Python passes on bytes of a command line that are not UTF-8
        raise UserError("the prompt is not valid UTF-8")
    return Prompt([{"role": "user", "content": text}], prompt_id)


def is_jsonl(data: bytes) -> bool:
    """Whether text is a prompts file: its first line is an object with `prompt` or `messages`."""
    try:
        first = json.loads(data.lstrip().splitlines()[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and ("prompt" in first or "messages" in first)


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
        if data.strip():
            if is_jsonl(data):
                return parse_prompts(data, "standard input", jsonl=True)
            try:
                return [make_prompt(data.decode("utf-8").strip(), "1")]
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not valid UTF-8 (byte {error.start + 1})") from None
    return read_prompts(samples)
