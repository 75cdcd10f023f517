"""A collection from a small teacher, and what it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from collecting import ask
from conftest import ROOT

from decode.models.checkpoint import Checkpoint, find_teacher
from distill.data.collect import Collector, plan_collection
from distill.data.settings import CollectSettings
from distill.data.shards import Dataset


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Checkpoint:
    return find_teacher(str(small_teacher))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Prompts, some of them held out, and conversations; plain text."""
    folder = tmp_path_factory.mktemp("sources")
    held_out = [json.loads(line)["prompt"] for line in (ROOT / "data" / "eval.jsonl").open(encoding="utf-8")]
    lines: list[dict[str, object]] = [{"prompt": ask(i)} for i in range(60)]
    lines[3:3] = [{"prompt": f"  {held_out[0].upper()} "}, {"messages": [{"role": "user", "content": held_out[1]}]}]
    lines.append(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, how are you?"}]}
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = "\n\n".join(f"Paragraph {i}. " + "The ship sailed on over the grey sea. " * 9 for i in range(40))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return str(folder / "prompts.jsonl"), str(folder / "text.txt")


@pytest.fixture(scope="module")
def settings(sources: tuple[str, ...]) -> CollectSettings:
    return CollectSettings(
        sources=sources,
        exclude=(str(ROOT / "data" / "eval.jsonl"),),
        tokens=1500,
        seq_len=128,
        batch=2,
        reply_batch=4,
        max_reply=16,
        temperatures=(1.0, 0.7),
    )


@pytest.fixture(scope="module")
def short_files() -> Iterator[None]:
    """So that a small reply dataset has several files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.data.reply_pass.EXAMPLES_PER_FILE", 8)
        yield


@pytest.fixture(scope="module")
def collector(
    teacher: Checkpoint, settings: CollectSettings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Collector, Dataset]:
    seen: list[tuple[str, int, int | None]] = []
    collector = Collector(
        plan_collection(teacher, settings, tmp_path_factory.mktemp("data") / "d"), lambda *step: seen.append(step)
    )
    dataset = collector.run()
    for stage in ("replies", "scoring"):
        totals = [total for name, _, total in seen if name == stage and total is not None]
        assert len(totals) == 1
    assert sum(done for name, done, total in seen if name == "scoring" and total is None) == dataset.tokens
    return collector, dataset
