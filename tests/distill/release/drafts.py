"""Drafts to publish."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from conftest import TEACHER

from decode.models.checkpoint import find_model, find_teacher
from distill.recipe import RECIPE_FILE
from distill.release.card import EVALUATION
from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama

REPO = "alice/small-draft"
UPLOADED = {"README.md", "config.json", "draft.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
UPLOADED |= {"generation_config.json", "log.jsonl", "curves.png"}
ON_HUB = UPLOADED | {"published.json"}
DATA = {
    "sources": [{"name": "a|b.jsonl", "sha256": "ab" * 32, "kind": "file"}],
    "exclude": [{"name": "eval.jsonl", "sha256": "cd" * 32, "kind": "file"}],
    "tokens": 1000,
    "seq_len": 32,
    "k": 8,
    "temperatures": [1.0],
    "reply": True,
    "reply_temperatures": [0.0, 0.8],
}


def make_draft(folder: Path, teacher: dict[str, Any] | None = None, bits: int | None = None, **about: Any) -> Path:
    """A random draft for the embedded teacher, as `distill train` leaves one."""
    config = DraftConfig.for_teacher(TEACHER, layers=1, hidden=64)
    named = {"name": TEACHER.name, "hash": find_teacher(None).weights_hash, "license": "apache-2.0"}
    provenance = {
        "complete": True,
        "teacher": teacher or named,
        "tokenizer_hash": "ef" * 32,
        "training": {
            "settings": {"layers": 1, "hidden": 64, "lr": 0.002},
            "data": {"sha256": "12" * 32, "tokens": 1024, "settings": DATA},
            "steps": 2,
        },
        "made_with": {"device": "a device", "commit": "f00d", "versions": {"mlx": "1.2.3"}},
    }
    checkpoint.save(folder, llama.create(config, seed=0), config, TEACHER, provenance | about, bits)
    lines = [{"kind": "eval", "step": i, "tokens": i * 64, "held_out_loss": 1.5 / i} for i in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "curves.png").write_bytes(b"\x89PNG\r\n" + bytes(3000))
    # What must stay at home.
    (folder / "state").mkdir()
    (folder / "state" / "step-7.safetensors").write_bytes(b"optimiser state")
    for name in ("notes.txt", ".env", "model-old.safetensors.bak", "pytorch_model.bin"):
        (folder / name).write_text("mine")
    return folder


def evaluated(folder: Path, **found: Any) -> Path:
    """A draft with an evaluation of its own beside it, as far as publishing looks at one."""
    teacher = json.loads((folder / "draft.json").read_text())["teacher"]["hash"]
    identity = {"draft": find_model(str(folder), "--draft").weights_hash, "teacher": teacher}
    (folder / EVALUATION).write_text(json.dumps({"identity": identity, "identical": True} | found))
    return folder


def with_recipe(folder: Path, text: str) -> Path:
    """A draft with the recipe that made it, as `distill run` leaves one."""
    (folder / RECIPE_FILE).write_text(text)
    named = {"name": "mine", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    about = json.loads((folder / "draft.json").read_text())
    (folder / "draft.json").write_text(json.dumps(about | {"recipe": named}))
    return folder


def local_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in UPLOADED - {"README.md"}}
