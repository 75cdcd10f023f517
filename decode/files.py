"""Reading small files with plain errors."""

from __future__ import annotations

import json
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


def first_line(error: BaseException) -> str:
    """What an exception says, without what follows below its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
