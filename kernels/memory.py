"""How much memory there is for arrays, and whether something fits: on machines, in containers, on GPUs and Macs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import mlx.core as mx

from kernels.device import GROUPS, MOUNTED, control_groups, device_info
from kernels.errors import UserError


def memory_bytes() -> int:
    """Memory that arrays can lie in: what macOS recommends for its GPU, another GPU's own, else the machine's or the
    container's."""
    info = device_info()
    if mx.default_device() == mx.Device(mx.gpu):
        known = info.get("max_recommended_working_set_size") or info.get("memory_size") or info.get("total_memory")
        if known:
            return int(known)
    return machine_bytes()


def machine_bytes() -> int:
    """The machine's memory, or what a container may have of it."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *_group_limits()])


def _group_limits(groups: Path = GROUPS, mounted: Path = MOUNTED) -> list[int]:
    """What this process's control groups, and those above them, allow; nothing where nothing limits it."""
    limits = []
    for folder, version_1 in control_groups("memory", groups, mounted):
        with contextlib.suppress(OSError, ValueError):  # without a limit it is the word max
            limits.append(int((folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).read_text()))
    return limits


def check_fits(need: float, what: str, advice: str) -> None:
    """UserError where `need` bytes are more than there are. what: needs them, {} for how many; advice: what to do."""
    have = memory_bytes()
    if need > have:
        size = f"{need / 1e9:,.1f} GB"
        raise UserError(f"{what.format(size)}, and this machine has {have / 1e9:,.1f} GB: {advice}")
