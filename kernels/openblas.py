"""Where the OpenBLAS of the wheel `scipy-openblas32` lies."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def find_openblas() -> Path | None:
    """The wheel's library, or None when the wheel is not installed.

    Also tells OpenBLAS, unless the user did, to let its idle threads sleep after about 0.1 ms: by
    default they spin for tens of milliseconds, on cores that our own operations need next.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    if not library.exists():
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")
    return library
