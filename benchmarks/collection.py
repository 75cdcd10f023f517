"""Collection's two passes over a teacher beside their baselines, in one run: replies in a continuous batch over plain
decoding, and scoring over the bare model. Prints Markdown for docs/collect.md.

    python -m benchmarks.collection
    python -m benchmarks.collection --at-once 2048 --prompts 9300 --batch 64 --rows 1024
    python -m benchmarks.collection --shape bitnet-2b --at-once 256 --prompts 1024 --batch 16 --rows 128
    python -m benchmarks.collection --work memory --tokens 10000000 --at-once 3072 --batch 64

`memory` collects a tenth of `--tokens` and all of them, each whole and in a process of its own: half from the prompts,
the rest from what the teacher says to itself.

`--shape bitnet-2b` is a stand-in with random weights (benchmarks.standin), in a folder that is deleted: its replies
mean nothing, and none ends by itself.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.standin import BITNET_2B, write_weights
from decode.batching import Batch, Job
from decode.engine import Request, generate
from decode.models.cache import Packed
from decode.models.checkpoint import ROOT, Checkpoint, find_teacher
from decode.models.transformer import Transformer
from decode.prompts import read_prompts
from decode.tokenizer import Tokenizer
from distill.data import codec
from distill.data.collect import Collector, plan_collection
from distill.data.manifest import DatasetSettings
from distill.data.packing import Row
from distill.data.scoring import LOGIT_ROWS, Scorer
from distill.data.settings import CollectSettings
from kernels.device import device_name

PROMPTS = ROOT / "data" / "prompts.jsonl"
PLAIN = 8  # prompts of the baseline


def replies(teacher: Transformer, prompts: list[list[int]], ends: frozenset[int], asked: argparse.Namespace) -> dict:
    """A batch and plain decoding, each once, greedy. That their tokens are the same is checked."""
    batch = Batch(teacher, asked.at_once, asked.max_reply, ends)
    tokens = 0
    jobs = [Job([p], [0.0], (0, i), len(p) + asked.max_reply) for i, p in enumerate(prompts)]

    def count(more: int) -> None:
        nonlocal tokens
        tokens += more

    list(Batch(teacher, min(asked.at_once, len(jobs)), 16, ends).run(iter(jobs[: asked.at_once])))  # compiles
    began = time.perf_counter()
    found = dict(batch.run(iter(jobs), count))
    seconds, prefill = time.perf_counter() - began, batch.prefill_seconds
    said, plain = 0, 0.0
    for i in range(PLAIN):
        alone, more = plainly(teacher, prompts[i], ends, asked.max_reply)
        said, plain = said + len(alone), plain + more
        if teacher.fused_step is not None and not teacher.fused_step.EXACT:  # what it says may differ in a near tie
            step, teacher.fused_step = teacher.fused_step, None
            alone, _ = plainly(teacher, prompts[i], ends, asked.max_reply)
            teacher.fused_step = step
        (reply,) = found[i]
        if reply.tokens != alone[: len(reply.tokens)]:
            sys.exit(f"prompt {i}: the batch says {reply.tokens}, plain decoding {alone}")
    return {
        "tokens": tokens,
        "tok_per_s": tokens / (seconds - prefill),
        "with_prefill_tok_per_s": tokens / seconds,
        "prefill_tok_per_s": sum(map(len, prompts)) / prefill if prefill else float("nan"),  # of two groups not known
        "plain_tok_per_s": said / plain,
        "over_plain": tokens / (seconds - prefill) / (said / plain),
    }


def plainly(teacher: Transformer, prompt: list[int], ends: frozenset[int], most: int) -> tuple[list[int], float]:
    """The tokens of plain decoding, and the seconds they took."""
    rounds = generate(teacher, Request(prompt, most, ends))
    began = time.perf_counter()
    return [token for one in rounds for token in one.tokens], time.perf_counter() - began


def scoring(teacher: Transformer, vocab_size: int, asked: argparse.Namespace) -> dict:
    """Rows of two segments into coded tensors in memory, over the body alone and over body and head; alternating."""
    rng = np.random.default_rng(0)
    shape = (asked.rows, asked.seq_len)
    tokens = rng.integers(0, vocab_size, shape).astype(np.int32)
    segments = np.ones(shape, np.uint8)
    segments[:, asked.seq_len * 3 // 5 :] = 2
    rows: list[Row] = [(t, np.ones(asked.seq_len, bool), s) for t, s in zip(tokens, segments, strict=True)]
    scorer = Scorer(teacher, 32, (1.0,), asked.batch)
    values = {
        "teacher": {"name": "", "hash": ""},
        "tokenizer_hash": "",
        "seq_len": asked.seq_len,
        "k": 32,
        "vocab_size": vocab_size,
        "temperatures": [1.0],
    }
    settings = DatasetSettings(values)
    shards = [rows[i : i + 64] for i in range(0, len(rows), 64)]

    def written() -> None:
        finish: Callable[[], codec.Block] | None = None
        for shard in [*shards, None]:
            before, finish = finish, None if shard is None else scorer.start(shard)
            if before is not None:
                block = before()
                if codec.faults(block, settings, coded=False):
                    sys.exit("a block is wrong")
                codec.encode(block, settings)

    def bare(head: bool) -> None:
        last = len(teacher.layers) - 1
        for i in range(0, len(rows), asked.batch):
            packed = Packed(segments[i : i + asked.batch])
            x = teacher.forward(tokens[i : i + asked.batch], packed, taps=[last]).hidden[last]
            mx.async_eval(x) if teacher.async_decode else mx.eval(x)
            for at in range(0, len(x) if head else 0, LOGIT_ROWS):
                logits = teacher.logits(teacher.normed(x[at : at + LOGIT_ROWS]))
                mx.async_eval(logits) if teacher.async_decode else mx.eval(logits)
        mx.synchronize()

    kinds: dict[str, Callable[[], None]] = {
        "scoring": written, "body": lambda: bare(False), "body and head": lambda: bare(True)
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for work in kinds.values():
        work()
    for _ in range(asked.rounds):
        for name, work in kinds.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "tok_per_s": tokens.size / medians["scoring"],
        "over_body": medians["body"] / medians["scoring"],
        "over_body_and_head": medians["body and head"] / medians["scoring"],
    }


def memory(asked: argparse.Namespace) -> dict[str, float]:
    """Most memory of a collection, resident and what MLX held, in bytes; and over that of a tenth of its tokens."""
    figures: dict[str, float] = {}
    for tokens in (asked.tokens // 10, asked.tokens):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            resident, held = process.submit(peak_of, tokens, asked).result()
        if figures:
            figures["over_a_tenth"] = resident / figures["resident"]
            figures["mlx_over_a_tenth"] = held / figures["mlx"]
        figures |= {"tokens": tokens, "resident": resident, "mlx": held}
    return figures


def peak_of(tokens: int, asked: argparse.Namespace) -> tuple[int, int]:
    settings = CollectSettings(
        sources=(str(PROMPTS), "self"),
        tokens=tokens,
        seq_len=asked.seq_len,
        max_reply=asked.max_reply,
        reply_batch=asked.at_once,
        batch=asked.batch,
    )
    with tempfile.TemporaryDirectory() as folder:
        Collector(plan_collection(find_teacher(asked.teacher), settings, Path(folder, "data"))).run()
    return resident_bytes(), mx.get_peak_memory()


def resident_bytes() -> int:
    """Most memory that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=None, help="a model folder; the embedded one by default")
    parser.add_argument("--shape", choices=["bitnet-2b"], help="a stand-in of this shape in place of a teacher")
    parser.add_argument("--work", default="replies,scoring", help="replies, scoring, or memory alone [%(default)s]")
    parser.add_argument("--prompts", type=int, default=512, help="of data/prompts.jsonl, the first so many [512]")
    parser.add_argument("--at-once", type=int, default=64, help="prompts answered at a time [64]")
    parser.add_argument("--max-reply", type=int, default=128, help="most tokens a reply [128]")
    parser.add_argument("--rows", type=int, default=64, help="rows scored [64]")
    parser.add_argument("--batch", type=int, default=8, help="rows scored at a time [8]")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a row [512]")
    parser.add_argument("--rounds", type=int, default=5, help="of scoring and its baselines [5]")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of memory's larger collection [1000000]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    if asked.work == "memory":
        print(", ".join(f"{name} {value:,.3f}" for name, value in memory(asked).items()))
        return

    embedded = find_teacher(asked.teacher)
    tokenizer = Tokenizer(embedded.folder)
    most = 512 - asked.max_reply
    prompts = [tokenizer.encode_prompt(prompt) for prompt in read_prompts(PROMPTS)]
    prompts = list(islice(cycle(prompt for prompt in prompts if len(prompt) <= most), asked.prompts))
    ends = tokenizer.end_tokens
    with tempfile.TemporaryDirectory() as folder:
        if asked.shape:
            write_weights(Path(folder), BITNET_2B, 1, 0)
            Path(folder, "config.json").write_text(json.dumps(BITNET_2B))
            embedded, ends = Checkpoint(Path(folder), asked.shape, BITNET_2B), frozenset()
        teacher = embedded.load()
        mx.eval([layer.qkv.data for layer in teacher.layers])
    report: dict[str, Any] = {
        "teacher": embedded.name,
        "device": device_name(),
        "options": vars(asked) | {"json": None},
    }
    print(f"{report['device']}, {embedded.name}", flush=True)
    for name in asked.work.split(","):
        mx.reset_peak_memory()
        began = time.perf_counter()
        figures = (
            replies(teacher, prompts, ends, asked) if name == "replies" else scoring(teacher, teacher.vocab_size, asked)
        )
        report[name] = figures | {"resident_bytes": resident_bytes(), "mlx_bytes": mx.get_peak_memory()}
        line = ", ".join(f"{key} {value:,.2f}" for key, value in figures.items())
        print(
            f"{name}: {line}; {time.perf_counter() - began:.0f} s, MLX {mx.get_peak_memory() / 1e9:.2f} GB", flush=True
        )
    if asked.json is not None:
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
