"""Small datasets of what the small teacher says of texts."""

from __future__ import annotations

from pathlib import Path

from conftest import ROOT

from decode.models.checkpoint import find_teacher
from distill.data.collect import Collector, plan_collection
from distill.data.settings import CollectSettings


def collect_into(out: Path, teacher: Path, sample: str) -> Path:
    """The first of a sample in data/."""
    sources = (str(ROOT / "data" / f"{sample}.jsonl.xz"),)
    settings = CollectSettings(sources=sources, tokens=3000, seq_len=64, batch=8, reply=False, exclude=())
    Collector(plan_collection(find_teacher(str(teacher)), settings, out)).run()
    return out
