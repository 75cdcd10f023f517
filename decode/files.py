"""Reading small files with plain errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kernels import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def asks_for_code(tokenizer_config: Path) -> bool:
    """Whether a tokenizer_config.json names Python code of the checkpoint's own, which is never run."""
    return tokenizer_config.is_file() and "auto_map" in read_json(tokenizer_config)


def copy_tokenizer_file(source: Path, target: Path) -> None:
    """Copy one of a tokenizer's files; a tokenizer_config.json without the code it names."""
    if source.name == "tokenizer_config.json" and asks_for_code(source):
        content = {key: value for key, value in read_json(source).items() if key != "auto_map"}
        target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(source, target)


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows below its first line; of a list that it announces, the first."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.rstrip().endswith(":") and more:
        return f"{first.rstrip()} {more[0].strip().rstrip(',')}{', ...' if len(more) > 1 else ''}"
    return first
