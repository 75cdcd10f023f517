"""mlx-lm where a system allows a process few open files."""

from __future__ import annotations

import resource
from typing import Any

WANTED = (2048, 4096)  # open files, soft and hard, for which mlx-lm asks as it is imported


def import_with_few_files() -> None:
    """Let mlx-lm be imported where the system would refuse what it asks for: the files of one model are far fewer."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY or most >= WANTED[1]:
        return
    asked = resource.setrlimit

    def unless_refused(which: int, limits: Any) -> None:
        if (which, limits) != (resource.RLIMIT_NOFILE, WANTED):
            asked(which, limits)

    resource.setrlimit = unless_refused
