"""What the tests of collections share: small sources, and copies of what was collected."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import changed_copy

from decode.tokenizer import Tokenizer
from distill.data.collect import Collector
from distill.data.reply_dataset import Example

OPTIONS = ("--tokens", 1200, "--seq-len", 128, "--max-reply", 16, "--reply-batch", 4, "--batch", 2)


def ask(number: int) -> str:
    """A prompt that is near no other."""
    return f"Tell me something about the number {hashlib.sha256(b'%d' % number).hexdigest()[:12]}."


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(collector: Collector, folder: Path) -> Collector:
    """A collector of copies of what this one has made."""
    again, plan = copy.copy(collector), collector.plan
    shutil.copytree(plan.folder, folder / "d")
    shutil.copytree(plan.replies, folder / plan.replies.name)
    again.plan = replace(plan, folder=folder / "d", replies=folder / plan.replies.name)
    return again


def parts(tokenizer: Tokenizer, example: Example) -> list[tuple[bool, str]]:
    """The stretches of an example that are learnt, and those that are not, as text without special tokens."""
    cuts = np.flatnonzero(np.diff(example.trained.astype(int))) + 1
    pairs = zip(np.split(example.trained, cuts), np.split(example.tokens, cuts), strict=True)
    return [(bool(mask[0]), tokenizer.decode(tokens.tolist())) for mask, tokens in pairs]


def with_template(teacher: Path, folder: Path, template: str) -> Path:
    config = json.loads((teacher / "tokenizer_config.json").read_text()) | {"chat_template": template}
    left = {"chat_template__jinja": None} if (teacher / "chat_template.jinja").exists() else {}
    return changed_copy(teacher, folder, tokenizer_config__json=json.dumps(config).encode(), **left)


def turns(*roles: str) -> dict[str, object]:
    return {"messages": [{"role": role, "content": f"Something of the {role}'s, said at length."} for role in roles]}
