"""Options that several commands of `decode` and `distill` have."""

from __future__ import annotations

from typing import Annotated

import typer

SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
TeacherOption = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="PATH|REPO",
        help="BitNet teacher: a folder or a Hub name. Default: the embedded one.",
    ),
]
