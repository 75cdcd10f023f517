"""How far two backends agree on a whole model: first choices and KL divergence, over the same tokens.

    python -m benchmarks.agreement --prompts prompts.jsonl --out cpu.safetensors
    python -m benchmarks.agreement --like cpu.safetensors       # on another machine, or with BITDRAFT_KERNELS

The first writes the tokens of prompts and of the teacher's replies, and their logits; the second takes those tokens
and compares. Logits are those of decoding: steps of eight rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from decode.engine import Request, generate
from decode.models.checkpoint import find_teacher
from decode.models.transformer import Transformer
from decode.prompts import read_prompts
from decode.tokenizer import Tokenizer
from kernels.device import device_name


def replies(model: Transformer, tokenizer: Tokenizer, prompts: Path, positions: int) -> np.ndarray:
    """Prompts and what the teacher says to them, as long as they fill int32 [prompts, positions]."""
    rows = []
    for prompt in read_prompts(prompts):
        tokens = tokenizer.encode_prompt(prompt)
        room = max(1, positions - len(tokens))
        said = generate(model, Request(tokens, room, tokenizer.end_tokens))
        whole = tokens + [token for step in said for token in step.tokens]
        if len(whole) >= positions:
            rows.append(whole[:positions])
    if not rows:
        raise SystemExit(f"--prompts {prompts}: no prompt and reply has {positions} tokens")
    return np.array(rows, np.int32)


def logits_of(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    """int32 [n, positions] -> float32 [n, positions, vocab]."""
    return np.stack([np.array(model.step(row, model.new_cache()).logits) for row in tokens])


def compared(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Two models' logits, float32 [..., vocab]: agreement, and KL(a || b) in nats."""
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    same = a.argmax(-1) == b.argmax(-1)
    return {
        "positions": same.size,
        "same_first_choice": int(same.sum()),
        "kl_mean": float(kl.mean()),
        "kl_median": float(np.median(kl)),
        "kl_max": float(kl.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="a checkpoint's folder; the embedded teacher where none is given")
    parser.add_argument("--prompts", type=Path, help="whose replies are written")
    parser.add_argument("--positions", type=int, default=120, help="tokens of each prompt and reply [120]")
    parser.add_argument("--like", type=Path, metavar="FILE", help="written by --out, to be compared with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where tokens and logits go")
    options = parser.parse_args()
    if (options.prompts is None) == (options.like is None):
        parser.error("give one of --prompts and --like")

    checkpoint = find_teacher(options.teacher)
    model = checkpoint.load()
    if options.like:
        before = mx.load(str(options.like))
        tokens = np.array(before["tokens"])
    else:
        tokens = replies(model, Tokenizer(checkpoint.folder), options.prompts, options.positions)
    logits = logits_of(model, tokens)
    if options.out:
        mx.save_safetensors(str(options.out), {"tokens": mx.array(tokens), "logits": mx.array(logits)})
    if options.like:
        print(
            json.dumps(
                {"backend": model.ops.NAME, "device": device_name()} | compared(np.array(before["logits"]), logits)
            )
        )


if __name__ == "__main__":
    main()
