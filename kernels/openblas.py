"""Where the OpenBLAS of the wheel `scipy-openblas32` lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def find_openblas() -> Path | None:
    """The wheel's library, or None when the wheel is not installed."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    if not library.exists():
        return None
    return library
