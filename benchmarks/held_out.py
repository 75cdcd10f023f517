"""Drafts beside one another by the teacher's whole distribution, whatever was kept of it where they were trained: over
the rows of a dataset that `distill train` holds out. Prints Markdown for docs/collect.md.

    python -m benchmarks.held_out runs/data runs/draft-a runs/draft-b

The drafts must have been trained on datasets of the same rows: from the same replies, with the same --seq-len.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import numpy as np

from decode.models.cache import Packed
from decode.models.checkpoint import find_teacher
from decode.models.transformer import Transformer
from distill.data.shards import Dataset
from distill.training.checkpoint import load
from distill.training.drafts import llama
from distill.training.loader import Batch, DataLoader
from distill.training.settings import TrainSettings

ROWS = 512  # positions at a time


def hidden_states(teacher: Transformer, batch: Batch) -> mx.array:
    """The teacher's, of the trained positions, float32 [m, hidden]."""
    last = len(teacher.layers) - 1
    tapped = teacher.forward(batch.tokens, Packed(batch.segments.astype(np.uint8)), taps=[last]).hidden[last]
    return teacher.normed(tapped).reshape(batch.tokens.size, -1)[trained(batch)]


def trained(batch: Batch) -> mx.array:
    """The places of the trained positions in the batch, int32."""
    return mx.array(np.arange(batch.tokens.size) if batch.positions is None else batch.positions)[
        mx.array(np.flatnonzero(batch.weights))
    ]


def log_softmax(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def figures(teacher: Transformer, folder: Path, batches: list[Batch]) -> np.ndarray:
    """KL in nats, share of equal first choices, sum of min(p, q), means over all trained positions."""
    draft = load(folder)
    draft.model.set_dtype(mx.float32)
    ids = mx.array(np.arange(teacher.vocab_size) if draft.d2t is None else draft.d2t)
    head = llama.head_weight(draft.model, None if draft.d2t is None else ids)
    sums, count = np.zeros(3), 0
    for batch in batches:
        known = hidden_states(teacher, batch)
        states = llama.forward(draft.model, mx.array(batch.tokens), mx.array(batch.segments))
        states = states.reshape(batch.tokens.size, -1)[trained(batch)]
        for start in range(0, len(known), ROWS):
            log_p = log_softmax(teacher.logits(known[start : start + ROWS]))
            log_q = log_softmax(states[start : start + ROWS] @ head.T)
            agree = mx.argmax(log_p, axis=-1) == ids[mx.argmax(log_q, axis=-1)]
            log_p = log_p[:, ids]
            p = mx.exp(log_p)
            found = (p * (log_p - log_q)).sum(), agree.sum(), mx.minimum(p, mx.exp(log_q)).sum()
            sums += np.array([float(figure) for figure in found])
        count += len(known)
    return sums / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("drafts", type=Path, nargs="+")
    parser.add_argument("--teacher", help="folder or Hub name [the embedded teacher]")
    asked = parser.parse_args()
    defaults = TrainSettings()
    loader = DataLoader(Dataset.open(asked.data), 1.0, 4, 0, defaults.eval_share, defaults.eval_rows)
    teacher, batches = find_teacher(asked.teacher).load(), loader.held_out_batches()
    positions = sum(int(batch.weights.sum()) for batch in batches)
    print(f"{positions:,} held-out positions\n\n| draft | KL, nats | agreement | sum min(p, q) |")
    print("| --- | ---: | ---: | ---: |")
    for folder in asked.drafts:
        kl, agreement, overlap = figures(teacher, folder, batches)
        print(f"| {folder.name} | {kl:.4f} | {agreement:.4f} | {overlap:.4f} |", flush=True)


if __name__ == "__main__":
    main()
