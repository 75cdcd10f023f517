"""BitLinear and the other operations of a decoding step, on whatever MLX runs on.

`backend()` returns the fastest backend that passes its self-test here; `kernels.reference` is the
definition that every backend equals. Checkpoints are packed as `kernels.packing` says.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kernels.errors import UserError
from kernels.limits import import_with_few_files

if TYPE_CHECKING:
    from kernels.backends import backend
    from kernels.module import BitLinear, swap_bitlinear

__all__ = ["BitLinear", "UserError", "backend", "swap_bitlinear"]

import_with_few_files()

# Imported when asked for: errors and files are of use where MLX cannot be imported.
_HOMES = {"backend": "kernels.backends", "BitLinear": "kernels.module", "swap_bitlinear": "kernels.module"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
