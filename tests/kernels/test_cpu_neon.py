"""The CPU's NEON kernels, compiled for ARM and run there or by an emulator: by bits against the portable ones."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

NATIVE = ROOT / "kernels" / "cpu" / "native"
HERE = platform.system() == "Linux" and platform.machine() == "aarch64"
# Debian: qemu-user and g++-aarch64-linux-gnu.
COMPILER = shutil.which("g++" if HERE else "aarch64-linux-gnu-g++")
EMULATOR = None if HERE else shutil.which("qemu-aarch64")

if COMPILER is None or not (HERE or EMULATOR):
    pytest.skip("no compiler for ARM, or nothing to run its programs with", allow_module_level=True)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """neon_check.cpp with the kernels, compiled as CMakeLists.txt does."""
    out = tmp_path_factory.mktemp("neon") / "check"
    sources = [NATIVE / f"{name}.cpp" for name in ("isa", "isa_neon", "isa_portable")]
    options = ["-std=gnu++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-static"]
    done = subprocess.run(
        [str(COMPILER), *options, f"-I{NATIVE}", Path(__file__).parent / "neon_check.cpp", *sources, "-o", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


def run(program: Path, processor: str, *arguments: str) -> list[str]:
    start = [EMULATOR, "-cpu", processor] if EMULATOR else []
    done = subprocess.run([*start, program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\n")


def test_neon_equals_the_portable_kernels_by_bits(program: Path) -> None:
    if "neondot" not in run(program, "max", "isas"):
        pytest.skip("this processor has no dot product")
    (line, _) = run(program, "max")
    assert line.endswith(" values compared") and int(line.split()[0]) > 900_000


@pytest.mark.skipif(EMULATOR is None, reason="processors without the dot product are emulated")
def test_a_processor_without_the_dot_product_has_the_portable_kernels(program: Path) -> None:
    assert run(program, "max", "isas") == ["neondot", "portable", ""]
    assert run(program, "cortex-a53", "isas") == ["portable", ""]
