"""The teacher against an independent implementation: Hugging Face transformers' BitNet in PyTorch.

Needs the extra `parity`; docs/parity.md has the figures and says why 100% cannot be reached.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from decode.models.checkpoint import find_teacher
from decode.prompts import read_prompts
from decode.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
pytest.importorskip("accelerate", reason="needs the extra `parity`")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_next_token_choices_agree_with_transformers() -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = find_teacher(None)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    torch.nn.Module.float(theirs)  # transformers leaves the head in bfloat16
    ours, tokenizer = checkpoint.load(), Tokenizer(checkpoint.folder)
    held_out = Path(__file__).parents[3] / "data" / "eval.jsonl"
    same = positions = 0
    divergence = 0.0
    for prompt in read_prompts(held_out)[::16]:
        ids = tokenizer.encode_prompt(prompt)[:400]
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].float().numpy()
        found = np.array(ours.forward(ids, ours.new_cache()).logits)
        p, q = log_softmax(expected), log_softmax(found)
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((expected.argmax(-1) == found.argmax(-1)).sum())
        positions += len(ids)
    print(f"{same} of {positions} choices agree ({same / positions:.4f}), KL {divergence / positions:.5f} nats")
    assert same / positions > 0.96
    assert divergence / positions < 0.005
