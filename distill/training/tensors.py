"""Arrays in safetensors files, with plain errors."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from kernels.errors import UserError, first_line
from kernels.files import replacing

Tensors = dict[str, mx.array]


def load_tensors(path: Path) -> Tensors:
    """The arrays of a safetensors file, read when used; UserError naming a file that is damaged."""
    try:
        arrays = mx.load(str(path))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    assert isinstance(arrays, dict)
    return arrays


def save_tensors(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file, wholly or not at all. UserError naming the folder where it cannot be written."""
    with replacing(path) as temporary:
        write_tensors(temporary, tensors)


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. OSError where it cannot be, which MLX says only of files that Python has opened."""
    with path.open("wb") as file:
        mx.save_safetensors(file, tensors, metadata)
