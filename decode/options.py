"""Options that several commands of `decode` and `distill` have, each said once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from decode.models.transformer import Precision
from decode.sampling import Sampling
from decode.settings import Settings, option

TeacherOption = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="PATH|REPO",
        help="BitNet teacher: a folder or a Hub name. Default: the embedded one.",
    ),
]


@dataclass(frozen=True)
class HeadSettings(Settings):
    """How the teacher's output layer is computed."""

    head: str = option(
        "bf16",
        "The teacher's output layer as the checkpoint has it (bf16), or rounded to 8 bits (int8).",
        choices=("bf16", "int8"),
    )

    @property
    def precision(self) -> Precision:
        return "int8" if self.head == "int8" else "float"


@dataclass(frozen=True)
class DraftingSettings(Settings):
    """How much a draft proposes."""

    k: int = option(3, "Tokens drafted before each verification.", low=1, high=1024)


@dataclass(frozen=True)
class GreedySettings(HeadSettings):
    """What decides the greedy replies of a teacher to prompts."""

    max_tokens: int = option(128, "Most new tokens a prompt.", low=1)
    seed: int = option(0, "Seed of everything random.", low=0)


@dataclass(frozen=True)
class PlainSettings(GreedySettings):
    """What decides replies, sampled ones too."""

    temperature: float = option(0.0, "0 is greedy.", low=0)
    top_p: float = option(1.0, "Sample from the smallest set with this probability.", above=0, high=1)
    top_k: int = option(0, "Sample from this many tokens; 0 is all.", low=0)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.top_k)


@dataclass(frozen=True)
class SpecSettings(PlainSettings, DraftingSettings):
    """What decides how replies come about with a draft."""
