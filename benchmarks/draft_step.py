"""What a draft step costs, in plain steps of its teacher: greedy proposals and plain decoding, in turn.

    python -m benchmarks.draft_step --draft DRAFT --k 3,7
    python -m benchmarks.draft_step --k 3,7             # a fresh ternary reader with a head of 4,096 tokens
    python -m benchmarks.draft_step --float --vocab 0   # its layer in int8, the whole head

A draft's round is what the engine asks for behind a verification that accepted one proposal: it computes two rows, of
which the text moved on, and then one for each further proposal. Weights do not decide how long that takes, so a draft
need not be trained. Medians; the teacher stands at 100 tokens of context.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from decode.models.checkpoint import Checkpoint, find_model, find_teacher
from decode.models.reader import Reader, is_reader, load_reader
from decode.models.transformer import Precision, Transformer
from distill.training import checkpoint
from distill.training.drafts import reader
from distill.training.settings import TrainSettings
from kernels import backend
from kernels.device import device_name

CONTEXT, ROUNDS, WARM_UP = 100, 400, 20


def fresh_reader(folder: Path, teacher: Checkpoint, vocab: int, ternary: bool) -> Checkpoint:
    """A draft of one layer with random weights. vocab: tokens of its head; 0: all."""
    settings = TrainSettings(reads_teacher=True, ternary=ternary)
    config = settings.shape_for(teacher.config, str(teacher.folder), vocab or None)
    d2t = np.linspace(0, config.vocab_size - 1, vocab).astype(np.int32) if vocab else None
    about = {"complete": True, "teacher": {"name": teacher.name, "hash": teacher.weights_hash}}
    checkpoint.save(folder, reader.create(config, 0), config, teacher.folder, about, d2t=d2t)
    return find_model(str(folder), "--draft")


def proposals(draft: Reader | Transformer, teacher: Transformer) -> Callable[[int], mx.array]:
    """A function that proposes so many tokens behind two new ones, from the same place each time."""
    cache = draft.new_cache()
    cache.reserve(CONTEXT + 64)
    if isinstance(draft, Reader):
        draft = draft.for_text(range(CONTEXT))
        hidden = teacher.prefill(list(range(CONTEXT)), teacher.new_cache(), draft.taps)
        states = {tap: rows[-2:] for tap, rows in hidden.items()}
        mx.eval(list(states.values()))
    else:
        draft.prefill(list(range(CONTEXT - 2)), cache)

    def propose(k: int) -> mx.array:
        cache.offset = CONTEXT - 2
        if isinstance(draft, Reader):
            return draft.greedy_tokens([1, 2], states, cache, k)
        return draft.greedy_tokens([1, 2], cache, k)

    return propose


def measure(teacher: Transformer, propose: Callable[[int], mx.array], k: int) -> tuple[float, float]:
    """Median seconds of a plain step, and of a proposal."""
    cache = teacher.new_cache()
    teacher.prefill(list(range(CONTEXT)), cache)
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(ROUNDS + WARM_UP):
        cache.offset = CONTEXT
        began = time.perf_counter()
        mx.eval(teacher.best_tokens(teacher.step([3], cache).logits))
        between = time.perf_counter()
        mx.eval(propose(k))
        done = time.perf_counter()
        if i >= WARM_UP:
            times[0].append(between - began)
            times[1].append((done - between) / k)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher")
    parser.add_argument("--draft", help="default: a fresh reader")
    parser.add_argument("--vocab", type=int, default=4096, help="of a fresh reader's head; 0 is all")
    parser.add_argument("--float", action="store_true", help="a fresh reader that is not ternary")
    parser.add_argument("--k", default="3,7")
    asked = parser.parse_args()
    found = find_teacher(asked.teacher)
    print(f"{found.name} on {device_name()} ({backend().NAME}); a proposal in plain steps, and ms")
    print(f"{'head':6}{'k':>4}{'ratio':>9}{'proposal':>10}{'plain':>9}")
    precision: Precision
    with tempfile.TemporaryDirectory() as name:
        if asked.draft:
            chosen = find_model(asked.draft, "--draft")
        else:
            chosen = fresh_reader(Path(name) / "draft", found, asked.vocab, not asked.float)
        for head, precision in (("int8", "int8"), ("bf16", "float")):
            teacher = found.load(precision)
            draft = load_reader(chosen, found, teacher, "int8") if is_reader(chosen) else chosen.load("int8", "int8")
            propose = proposals(draft, teacher)
            for k in map(int, asked.k.split(",")):
                plain, one = measure(teacher, propose, k)
                print(f"{head:6}{k:4}{one / plain:9.3f}{1e3 * one:10.3f}{1e3 * plain:9.3f}", flush=True)


if __name__ == "__main__":
    main()
