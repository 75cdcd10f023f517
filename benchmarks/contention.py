"""How much slower work becomes beside programs that keep the processor's cores busy.

    python -m benchmarks.contention
    python -m benchmarks.contention --work plain,speculative --rounds 9 --json beside.json

Each kind of work runs for a stretch beside no, one, two, ... busy loops in turn, round after round, each loop a process
of its own. Printed is the median, over the rounds, of a stretch's rate over that of the same round beside none, and in
brackets what share of the fair rate that is: on c cores beside n loops fair is (c - n / 2) / c for n <= c, since a loop
and a thread of ours take turns on a core. Meant for a machine that is otherwise idle, on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from decode.batching import Batch, Job
from decode.drafters.model import ModelDrafter
from decode.engine import Request, generate
from decode.models.checkpoint import find_teacher
from decode.models.drafts import find_draft
from decode.models.transformer import Transformer
from decode.sampling import Sampling
from distill.data.packing import pack, segment
from distill.data.scoring import Scorer
from distill.training import cpu
from distill.training.cpu import CpuHead
from distill.training.draft_config import DraftConfig
from distill.training.drafts.llama import Standalone
from distill.training.loader import assemble
from distill.training.state import State
from distill.training.step import Step
from kernels.backends import use_fast_blas
from kernels.device import processors

SETTLE_SECONDS = 0.3  # until busy loops have spread over the cores
TOKENS = 64  # of a reply
# Until the benchmark ends, however it ends.
BUSY = [sys.executable, "-c", "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1 << 20))"]
Work = Callable[[], int]  # does one unit and returns its tokens


def decoding(teacher: Transformer, draft: Transformer | None) -> Work:
    """Replies to one prompt, plainly or with k = 3 drafted."""
    request = Request(list(range(5, 37)), TOKENS)

    def work() -> int:
        drafter = None if draft is None else ModelDrafter(draft, Sampling(), frozenset())
        return sum(len(found.tokens) for found in generate(teacher, request, drafter, 3))

    return work


def replies(teacher: Transformer) -> Work:
    """Short replies to 16 prompts together."""
    prompts = [list(range(5 + i, 25 + i)) for i in range(16)]
    batch = Batch(teacher, 16, 16, frozenset())

    def work() -> int:
        jobs = (Job([prompt], [0.8], (i,), 64) for i, prompt in enumerate(prompts))
        return sum(len(reply.tokens) for _, replies in batch.run(jobs) for reply in replies)

    return work


def scoring(teacher: Transformer) -> Work:
    """Two rows of 256 tokens into top-32 logits."""
    rows = pack([segment(np.arange(10, 266, dtype=np.int32) + i, np.ones(256, bool)) for i in range(2)], 256)
    scorer = Scorer(teacher, 32, (1.0,), 2)
    return lambda: scorer.score(rows).tokens.size


def training(teacher: Transformer, folder: Path) -> Work:
    """Steps of a draft of 2 x 256 on four rows of 256 tokens."""
    rows = pack([segment(np.arange(10, 266, dtype=np.int32) + 3 * i, np.ones(256, bool)) for i in range(4)], 256)
    block = Scorer(teacher, 32, (1.0,), 4).score(rows)
    batch = assemble([(block, i) for i in range(4)], 0)
    config = DraftConfig.for_teacher(folder, 2, 256)
    head = CpuHead("kl", 1.0, chunk_bytes=32 << 20, eager=True)
    draft = Standalone(config, cpu.attention)
    step = Step(draft, head, weight_decay=0.0, clip=1.0, dtype=mx.float32)
    state = State(folder, {})
    state.begin(draft.create())

    def work() -> int:
        mx.eval(step(state.tensors, batch, 1, 1e-4))
        return batch.tokens.size

    return work


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many other programs that want a core each, in this session: Linux shares cores among sessions first."""
    loops = [subprocess.Popen(BUSY) for _ in range(count)]
    try:
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def rate(work: Work, seconds: float) -> float:
    """Tokens a second over whole units of at least so many seconds."""
    work()
    tokens, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        tokens += work()
    return tokens / passed


def fair(cores: int, loops: int) -> float:
    """The share of its quiet rate that work on all cores can ask for."""
    return (cores - loops / 2) / cores if loops <= cores else cores / (cores + loops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("plain", "speculative", "replies", "scoring", "training")
    parser.add_argument("--work", default=",".join(kinds), help="which kinds of work (default: %(default)s)")
    parser.add_argument("--loops", type=int, default=processors(), help="most busy loops (default: one a core)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a stretch")
    parser.add_argument("--teacher", default=None)
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()

    use_fast_blas()
    checkpoint = find_teacher(asked.teacher)
    teacher = checkpoint.load()
    draft = find_draft(None, checkpoint).draft.load("int8", "int8")
    make: dict[str, Callable[[], Work]] = {
        "plain": lambda: decoding(teacher, None),
        "speculative": lambda: decoding(teacher, draft),
        "replies": lambda: replies(teacher),
        "scoring": lambda: scoring(teacher),
        "training": lambda: training(teacher, checkpoint.folder),
    }
    cores, report = processors(), {}
    print(f"{cores} cores; share of the quiet rate, in brackets of the fair one")
    for name in asked.work.split(","):
        work = make[name]()
        shares: dict[int, list[float]] = {n: [] for n in range(1, asked.loops + 1)}
        quiet = []
        for _ in range(asked.rounds):
            rates = []
            for n in range(asked.loops + 1):
                with busy_loops(n):
                    rates.append(rate(work, asked.seconds))
            quiet.append(rates[0])
            for n in shares:
                shares[n].append(rates[n] / rates[0])
        medians = {n: statistics.median(values) for n, values in shares.items()}
        report[name] = {"tok_per_s": statistics.median(quiet), "share": medians, "all": shares}
        columns = "   ".join(f"{n}: {share:.2f} ({share / fair(cores, n):.2f})" for n, share in medians.items())
        print(f"{name:12} {statistics.median(quiet):8.0f} tok/s   beside {columns}", flush=True)
    if asked.json is not None:
        asked.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
