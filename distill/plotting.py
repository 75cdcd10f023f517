"""What all pictures share. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernels.files import replacing


def pyplot() -> Any:
    """matplotlib's, drawing without a screen."""
    import matplotlib  # slow, and needed only here

    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams["text.parse_math"] = False  # names are no formulas: a category may be "$x$"
    return matplotlib.pyplot


def save(figure: Any, picture: Path) -> None:
    """Write a figure as PNG, in place of what is there, and close it."""
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot().close(figure)
