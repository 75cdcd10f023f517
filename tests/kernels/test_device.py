"""What the kernels are told of the machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from kernels.device import cpu_quota

FREE = "max 100000\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": FREE}, math.inf),
        ("0::/\n", {}, math.inf),
        # A limit of any group above counts too, the lowest of all.
        ("0::/a/b\n", {"a/b/cpu.max": FREE, "a/cpu.max": "50000 100000\n", "cpu.max": "300000 100000\n"}, 0.5),
        # The host's path, seen from inside of the container.
        ("0::/docker/1f2e\n", {"cpu.max": "400000 100000\n"}, 4.0),
        ("0::/../other\n", {"cpu.max": "400000 100000\n"}, 4.0),
        # Version 1; a group with a colon in its name; cpuset is no time.
        (
            "5:cpuset:/k\n4:cpu,cpuacct:/k:8s\n1:name=systemd:/k\n",
            {"cpu/k:8s/cpu.cfs_quota_us": "150000\n", "cpu/k:8s/cpu.cfs_period_us": "50000\n"},
            3.0,
        ),
        ("4:cpu,cpuacct:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ],
)
def test_the_processors_that_a_container_is_given(
    tmp_path: Path, groups: str, files: dict[str, str], quota: float
) -> None:
    listed = tmp_path / "cgroup"
    listed.write_text(groups)
    for name, content in files.items():
        file = tmp_path / "mounted" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    assert cpu_quota(listed, tmp_path / "mounted") == quota


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "none", tmp_path) == math.inf


def test_a_quota_is_rounded_up_to_processors(tmp_path: Path) -> None:
    """Of this process's own affinity, and never none."""
    code = """
import sys
from pathlib import Path
from kernels import device
device.cpu_quota.__defaults__ = (Path(sys.argv[1]), Path(sys.argv[2]))
print(device.processors())
"""
    listed = tmp_path / "cgroup"
    listed.write_text("0::/\n")
    most = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    for quota, processors in (("1000 100000", 1), ("110000 100000", min(2, most or 1)), (FREE, most)):
        (tmp_path / "cpu.max").write_text(quota)
        done = subprocess.run(
            [sys.executable, "-c", code, listed, tmp_path], env=environment(), cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.strip() == str(processors), done.stderr


@pytest.mark.parametrize(("home", "chosen"), [("", ""), ("", "relative"), ("somewhere", "")])
def test_without_a_home_nothing_is_kept_in_the_current_folder(home: str, chosen: str) -> None:
    code = "from kernels.device import cache_folder; print(cache_folder())"
    variables = {**environment(), "HOME": home, "XDG_CACHE_HOME": chosen}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_absolute()
