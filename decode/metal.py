"""What only Metal has: memory that is shared with all other programs, and traces for Xcode."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from kernels import UserError
from kernels.backends import device_backend

CACHE_SHARE = 4  # of the working set, one in so many for buffers that wait to be used again


@dataclass(frozen=True)
class MemoryLimits:
    """What MLX may take of a Mac's memory, in bytes.

    memory: above it MLX waits for work that is under way before it begins more, and gives cached buffers back;
    cache: freed buffers kept for reuse; wired: what macOS keeps resident.
    """

    memory: int
    cache: int
    wired: int

    @classmethod
    def of(cls, working_set: int) -> MemoryLimits:
        """The rule for a GPU with this `max_recommended_working_set_size`, two thirds or more of a Mac's memory.

        Left alone, MLX begins to wait at 1.5 times the working set, which is all that a 16 GB Mac has and makes it
        swap; it may keep as much in its cache; and it wires nothing, so that macOS may take weights back between two
        tokens. What MLX holds, its cache too, is taken from all other programs, and from our own numpy arrays: hence
        a quarter for the cache.
        """
        return cls(memory=working_set, cache=working_set // CACHE_SHARE, wired=working_set)


def limit_memory() -> MemoryLimits | None:
    """Keep this process within what macOS recommends for its GPU: set and return the limits; None elsewhere."""
    if device_backend() != "metal":
        return None
    limits = MemoryLimits.of(int(mx.device_info()["max_recommended_working_set_size"]))
    mx.set_memory_limit(limits.memory)
    mx.set_cache_limit(limits.cache)
    mx.set_wired_limit(limits.wired)  # has an effect from macOS 15 on
    return limits


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
