"""What the kernels run on: its name, its memory and caches, and the versions that decide how a run goes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx

CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def device_info() -> dict[str, Any]:
    """What MLX says of its device; empty where it says nothing."""
    return dict(mx.device_info()) if hasattr(mx, "device_info") else {}


def device_name() -> str:
    """What MLX computes on, in words."""
    return str(device_info().get("device_name") or mx.default_device())


def memory_bytes() -> int:
    """Memory that arrays can lie in: the GPU's where MLX knows it, else the machine's."""
    info = device_info()
    known = info.get("memory_size") or info.get("total_memory")
    return int(known) if known else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cache_folder() -> Path:
    """Where what was found or compiled on this machine is kept: `bitdraft` in the user's cache folder."""
    home = Path(os.path.expanduser("~"))  # noqa: PTH111  (Path.home raises for a user without a home)
    if platform.system() == "Darwin":
        return home / "Library" / "Caches" / "bitdraft"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "bitdraft"


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
