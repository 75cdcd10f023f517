"""What decides an evaluation, beside teacher and draft."""

from __future__ import annotations

from dataclasses import dataclass

from decode.models.checkpoint import ROOT
from decode.options import DraftingSettings, GreedySettings
from decode.settings import option

PROMPTS = ROOT / "data" / "eval.jsonl"


@dataclass(frozen=True)
class EvaluateSettings(GreedySettings, DraftingSettings):
    """What decides an evaluation, beside teacher and draft."""

    prompts: str = option(
        str(PROMPTS),
        "JSON with `prompt` or `messages`, and `category`, or plain text lines; - is stdin. Default: the held-out"
        " data/eval.jsonl.",
        metavar="FILE",
        show_default=False,
    )
    limit: int | None = option(None, "Only the first N prompts of each category.", metavar="N", low=1)
