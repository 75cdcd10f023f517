"""What the kernels run on: its name, its memory and caches, and the versions that decide how a run goes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
GROUPS, MOUNTED = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def device_info() -> dict[str, Any]:
    """What MLX says of its device; empty where it says nothing."""
    return dict(mx.device_info()) if hasattr(mx, "device_info") else {}


def device_name() -> str:
    """What MLX computes on, in words."""
    return str(device_info().get("device_name") or mx.default_device())


def cache_folder() -> Path:
    """Where what was found or compiled on this machine is kept: `bitdraft` in the user's cache folder.

    Never below the current folder, which may be someone else's: a user without a home has the root, as in containers.
    """
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  (Path.home raises for a user without a home)
    home = home if home.is_absolute() else Path("/")
    if platform.system() == "Darwin":
        return home / "Library" / "Caches" / "bitdraft"
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else home / ".cache") / "bitdraft"


def processors() -> int:
    """Processors that this process may use: more threads than a container's share allows would stand still in turn."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(here, cpu_quota())))


def cpu_quota(groups: Path = GROUPS, mounted: Path = MOUNTED) -> float:
    """Processors' worth of time that this process's control groups allow; infinite where nothing limits it."""
    quotas = [math.inf]
    for folder, version_1 in control_groups("cpu", groups, mounted):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version_1 else ("cpu.max",)
        with contextlib.suppress(OSError, ValueError):  # without a limit, a quota is -1, or the word max
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            quotas += [quota / period] if quota > 0 else []
    return min(quotas)


def control_groups(controller: str, groups: Path = GROUPS, mounted: Path = MOUNTED) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's control groups and of those above them, and whether they are of version 1.

    groups: its groups as Linux lists them; mounted: where they lie. A container often sees its own group as the root,
    while its path is still the host's: folders that are not there say nothing.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        version_1 = controller in controllers.split(",")
        if controllers and not version_1:
            continue
        inside = Path(path.lstrip("/"))
        for group in (inside, *inside.parents):
            yield mounted / (controller if version_1 else "") / group, version_1


def cache_bytes() -> int:
    """Size of the processor's last-level cache; 0 where the system does not tell."""
    sizes = []
    for file in CPU_CACHES.glob("index*/size"):
        size = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip())
        if size:
            sizes.append(int(size[1]) * _UNITS[size[2]])
    if platform.system() == "Darwin":
        asked = [sysctl(name) for name in ("hw.l3cachesize", "hw.l2cachesize", "hw.perflevel0.l2cachesize")]
        sizes += [int(size) for size in asked if size.isdigit()]
    return max(sizes, default=0)


def sysctl(name: str) -> str:
    """A value of macOS's `sysctl`, empty where there is none."""
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def versions() -> dict[str, str]:
    """What decides how a run went, for reports."""
    packages = {}
    for name in ("mlx", "mlx-lm", "numpy", "bitdraft"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "uninstalled"
    return {
        **packages,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
