"""Pictures, whatever a user's settings of matplotlib say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

DRAW = """
import sys
from pathlib import Path
from kernels.plotting import drawing
with drawing(Path(sys.argv[1]), 4, 3) as figure:
    figure.subplots().plot([1, 2], [3, 4], label="a")
    figure.suptitle("$x$")
"""


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False], ids=["in the current folder", "named by MATPLOTLIBRC"])
def test_a_users_settings_change_no_picture(tmp_path: Path, there: bool) -> None:
    """A notebook's way to show pictures, which is not installed here, and a file that asks for TeX."""
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\nsavefig.bbox: tight\n")
    theirs = {"MPLBACKEND": "module://no_such_module"} | ({} if there else {"MATPLOTLIBRC": str(settings)})
    for name, cwd, variables in (("plain.png", tmp_path, {}), ("set.png", settings if there else tmp_path, theirs)):
        done = subprocess.run(
            [sys.executable, "-c", DRAW, str(tmp_path / name)],
            env=environment(**variables), cwd=cwd, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    plain = (tmp_path / "plain.png").read_bytes()
    assert plain.startswith(b"\x89PNG") and (tmp_path / "set.png").read_bytes() == plain
