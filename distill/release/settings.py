"""What decides an evaluation, beside teacher and draft."""

from __future__ import annotations

from dataclasses import dataclass

from decode.models.checkpoint import ROOT
from distill.settings import Settings, option

PROMPTS = ROOT / "data" / "eval.jsonl"


@dataclass(frozen=True)
class EvaluateSettings(Settings):
    """What decides an evaluation, beside teacher and draft."""

    prompts: str = option(
        str(PROMPTS),
        "JSONL with `prompt` or `messages` a line, and `category`. Default: the held-out data/eval.jsonl.",
        metavar="FILE",
        show_default=False,
    )
    limit: int | None = option(None, "Only the first N prompts of each category.", metavar="N", low=1)
    k: int = option(3, "Tokens drafted before each verification.", low=1)
    max_tokens: int = option(128, "Most new tokens a prompt.", low=1)
    head: str = option(
        "bf16",
        "The teacher's output layer as the checkpoint has it (bf16), or rounded to 8 bits (int8).",
        choices=("bf16", "int8"),
    )
    seed: int = option(0, "Seed of everything random.", low=0)
