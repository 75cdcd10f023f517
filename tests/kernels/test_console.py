"""What every command line does with errors that libraries raise."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAILS = """
import typer
from kernels.console import run
app = typer.Typer()
@app.command()
def fails() -> None:
    raise RuntimeError({said!r})
run(app, "fails")
"""


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("[malloc] Unable to allocate 40000000000 bytes.", 2),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", 2),
        ("Resource temporarily unavailable", 2),
        ("a fault of ours", 1),
    ],
)
def test_missing_memory_is_no_traceback(said: str, expected: int) -> None:
    ended = subprocess.run([sys.executable, "-c", FAILS.format(said=said)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == expected
    assert ("Traceback" in ended.stderr) == (expected == 1)
    if expected == 2:
        assert "memory" in ended.stderr and len(ended.stderr.splitlines()) == 1
