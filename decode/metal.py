"""What only Metal has: memory that must not be paged out, and traces for Xcode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from kernels import UserError
from kernels.backends import device_backend


def raise_wired_limit() -> None:
    """Let the weights stay resident on a Mac's GPU, as much as macOS recommends; nothing elsewhere.

    Otherwise macOS may take memory back between two tokens, and a large model decodes in fits and starts.
    """
    if device_backend() == "metal":
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def check_trace(file: Path | None) -> None:
    """Find out before the model is loaded that no trace could be written."""
    if file is None:
        return
    if device_backend() != "metal":
        raise UserError(f"--trace {file}: traces are Metal's, and MLX runs on {device_backend()} here")
    if file.suffix != ".gputrace":
        raise UserError(f"--trace {file}: Xcode opens traces whose names end with .gputrace")
    if file.exists():
        raise UserError(f"--trace {file}: is there already, and Metal replaces no trace")
    if not file.parent.is_dir():
        raise UserError(f"--trace {file}: the folder {file.parent} does not exist")
    if os.environ.get("MTL_CAPTURE_ENABLED") != "1":
        raise UserError(f"--trace {file}: Metal captures only for processes started with MTL_CAPTURE_ENABLED=1")


@contextmanager
def capture(file: Path | None) -> Iterator[None]:
    """Write what the GPU does meanwhile to a .gputrace, checked by `check_trace`; None captures nothing."""
    if file is None:
        yield
        return
    mx.metal.start_capture(str(file))
    try:
        yield
        mx.synchronize()
    finally:
        mx.metal.stop_capture()
