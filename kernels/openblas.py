"""Where the OpenBLAS of the wheel `scipy-openblas32` lies."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from kernels.device import processors

THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # what OpenBLAS heeds


def find_openblas() -> Path | None:
    """The wheel's library, or None when the wheel is not installed.

    Also tells OpenBLAS, unless the user did, to let its idle threads sleep after about 0.1 ms: by
    default they spin for tens of milliseconds, on cores that our own operations need next. And to
    start no more of them than a container has processors, which by itself it does not look at.
    """
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        return None
    library = Path(spec.origin).parent / "lib" / "libscipy_openblas.so"
    if not library.exists():
        return None
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "18")
    if not any(name in os.environ for name in THREADS):
        os.environ[THREADS[0]] = str(processors())
    return library
