"""What the commands of `decode` and `distill` share, beside `kernels.console`."""

from __future__ import annotations

from typing import Annotated

import typer

from kernels.console import (
    Interrupted,
    JsonOption,
    QuietOption,
    check_json_target,
    fail,
    progress,
    run,
    say,
    text_sink,
    write_json,
)

__all__ = [
    "Interrupted",
    "JsonOption",
    "QuietOption",
    "SeedOption",
    "TeacherOption",
    "check_json_target",
    "fail",
    "progress",
    "run",
    "say",
    "text_sink",
    "write_json",
]

SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
TeacherOption = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="PATH|REPO",
        help="BitNet teacher: a folder or a Hub name. Default: the embedded one.",
    ),
]
