"""What all pictures share. matplotlib is imported when one is drawn."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from kernels.files import replacing

# What it reads while it is imported: a notebook's way to show pictures, which need not be installed here, and settings
# for papers and screens, which may ask for TeX.
READ_ON_IMPORT = {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}


@contextmanager
def drawing(picture: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of matplotlib's, in inches, which is written as PNG in place of what is there when the block ends well.

    It is drawn without a screen and by matplotlib's own defaults, whatever the user's settings say.
    """
    matplotlib = _matplotlib()
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    # Names are no formulas: a category may be "$x$".
    with matplotlib.rc_context(defaults | {"text.parse_math": False}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(picture) as temporary, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what does not fit: nobody who draws can do anything about it
            figure.savefig(temporary, dpi=110, format="png")


def _matplotlib() -> ModuleType:
    before = {name: os.environ.get(name) for name in READ_ON_IMPORT}
    os.environ.update(READ_ON_IMPORT)
    try:
        import matplotlib
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return matplotlib
