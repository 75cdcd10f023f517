"""Long work keeps a Mac from falling asleep."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_awake() -> Iterator[None]:
    """Hold off a Mac's idle sleep inside the block; nothing on other systems, or without `caffeinate`.

    The display may still sleep, and a closed lid still puts a laptop to sleep.
    """
    tool = shutil.which("caffeinate") if sys.platform == "darwin" else None
    if tool is None:
        yield
        return
    try:
        child = subprocess.Popen(
            [tool, "-i", "-w", str(os.getpid())],  # -w: it ends with this process, also with one that is killed
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is not for it: the work goes on until its state is saved
        )
    except OSError:  # sleep is a nuisance, no reason to stop
        yield
        return
    try:
        yield
    finally:
        child.terminate()
        child.wait()
