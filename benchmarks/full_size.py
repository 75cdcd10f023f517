"""Every stage at BitNet-2B's size, by the real commands, on a stand-in with random weights (benchmarks.standin).

    python -m benchmarks.full_size --out runs/full-size --tokenizer package/models --json runs/full-size.json

Prints Markdown: wall time, peak memory, disk and rate of every stage, what was checked, and what bytes alone predict
for Macs. Exit code 1 where a check fails: memory above --limit-gb, shards above 128 bytes a position, a damaged
dataset, or speculative text that differs from plain.

Needs 6 GB of disk. Memory is resident memory and, with a GPU, the most that MLX held at once, which on a Mac is part of
the former. No draft learns anything from random weights in a few steps, so acceptance means nothing here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.standin import GET_TOKENIZER, TOKENIZER_FILES, add_shape_options, shape_fault, shape_of, tensors
from decode.chips import BANDWIDTH

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES_A_POSITION = 128
CHIPS = ("M4", "M4 Pro", "M4 Max 40-core")
PREDICTED_TOKENS = 10_000_000
REPLY_BATCH = 64  # `distill collect`'s default
BATCH = 2  # rows of a training step: `distill train`'s default
CONTEXT = 256  # tokens in the cache, on average


@dataclass(frozen=True)
class Stage:
    """What one command took. peak_bytes: resident memory of the process; gpu_bytes: MLX's, None where it used no GPU;
    disk_bytes: of what it wrote."""

    name: str
    command: str
    seconds: float
    peak_bytes: int
    gpu_bytes: int | None
    disk_bytes: int
    tokens: int | None
    tok_per_s: float | None


class Bench:
    """Runs commands in `out` and keeps what they took."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.stages: list[Stage] = []
        self.codes: dict[str, int] = {}  # exit code of each stage
        self.failures: list[str] = []

    def run(self, name: str, program: str, *options: object, wrote: Path | None = None, fatal: bool = True) -> Any:
        """One stage. Returns the command's --json; its `tokens` and `tok_per_s`, where it has them, go into the table.

        fatal: end here if it fails; otherwise an exit code of 1 is left to the checks.
        """
        report, memory = (self.out / f"{name.replace(' ', '-')}.{what}" for what in ("json", "memory"))
        words = [*map(str, options)]
        if program in ("decode", "distill"):
            line, shown = [*start_of(program, memory), *words, "--quiet", "--json", str(report)], [program, *words]
        else:
            line, shown = [sys.executable, "-m", program, *words], ["python", "-m", program, *words]
        print(f"$ {shlex.join(shown)}", file=sys.stderr, flush=True)
        report.unlink(missing_ok=True)
        began = time.perf_counter()
        code, peak = measured(line)
        seconds = time.perf_counter() - began
        if code and (fatal or code != 1):
            raise SystemExit(code)
        self.codes[name] = code
        figures = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
        tokens = figures.get("tokens")
        rate = figures.get("tok_per_s") or (tokens / seconds if tokens else None)
        gpu = int(memory.read_text()) if memory.exists() else None
        disk = size_of(wrote) if wrote else 0
        self.stages.append(Stage(name, shlex.join(shown), seconds, peak, gpu, disk, tokens, rate))
        return figures

    def check(self, right: bool, text: str) -> str:
        """A line of the report, remembered where it is a failure."""
        if not right:
            self.failures.append(text)
        return f"- {'yes' if right else '**no**'}: {text}"


MEASURED = """
import atexit, sys
from pathlib import Path
import mlx.core as mx
sys.argv[0] = {program!r}
if mx.default_device() == mx.gpu:
    atexit.register(lambda: Path({memory!r}).write_text(str(mx.get_peak_memory())))
from {program}.cli import main
main()
"""


def start_of(program: str, memory: Path) -> list[str]:
    """A command line that runs `decode` or `distill` of this checkout, installed or not, and writes the most bytes that
    MLX held on a GPU to a file."""
    return [sys.executable, "-c", MEASURED.format(program=program, memory=str(memory.absolute()))]


def measured(line: list[str]) -> tuple[int, int]:
    """Runs a command; its exit code and its largest resident memory in bytes."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # Standard output is for the tables alone.
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the command got it too
        process.wait()
        raise SystemExit(130) from None
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_of(path: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def run_stages(options: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    """All commands in turn. Returns what their reports say, by stage."""
    teacher, texts, replies, draft = (options.out / name for name in ("teacher", "texts", "replies", "draft"))
    sizes = [word for name, value in shape_of(options).items() for word in (f"--{name}", value)]
    bench.run(
        "stand-in", "benchmarks.standin", "--out", teacher, "--tokenizer", options.tokenizer, *sizes, wrote=teacher
    )
    collect = ("distill", "collect", "--teacher", teacher, "--seq-len", options.seq_len)
    wiki, questions = ("--source", ROOT / "data" / "wiki.jsonl.xz"), ("--source", ROOT / "data" / "prompts.jsonl")
    batched = ("--reply-batch", options.reply_batch, "--max-reply", options.max_reply)
    bench.run("collect texts", *collect, *wiki, "--no-reply", "--tokens", options.tokens, "--out", texts, wrote=texts)
    bench.run(
        "collect replies", *collect, *questions, *batched, "--tokens", options.tokens // 2, "--out", replies,
        wrote=replies,
    )  # fmt: skip
    bench.run("verify", "distill", "verify", texts, fatal=False)
    train = ("distill", "train", "--teacher", teacher, "--data", texts, "--batch", BATCH)
    size = ("--layers", options.draft_layers, "--hidden", options.draft_hidden)
    tokens = options.steps * BATCH * options.seq_len
    trained = bench.run("train", *train, *size, "--tokens", tokens, "--out", draft, wrote=draft)
    prompts = ("--prompts", ROOT / "data" / "prompts-sample.jsonl", "--max-tokens", options.max_tokens)
    both = ("--teacher", teacher, "--draft", draft, "--k", 3)
    plain = bench.run("decode plain", "decode", "plain", "--teacher", teacher, *prompts)
    spec = bench.run("decode spec", "decode", "spec", *both, *prompts, "--compare", fatal=False)
    bench.run("evaluate", "distill", "evaluate", *both, *prompts)
    return {"train": trained, "plain": plain, "spec": spec}


def checks(bench: Bench, reports: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """What must hold at this size, one line each."""
    most, highest = max((max(stage.peak_bytes, stage.gpu_bytes or 0), stage.name) for stage in bench.stages)
    lines = [
        bench.check(
            most <= options.limit_gb * 1e9,
            f"every stage stays below {options.limit_gb:g} GB of memory (highest: {highest}, {most / 1e9:.1f} GB)",
        )
    ]
    for name in ("texts", "replies"):
        stored = position_bytes(options.out / name)
        what = f"{name}: {stored:.1f} bytes a position, at most {LIMIT_BYTES_A_POSITION}"
        lines.append(bench.check(stored <= LIMIT_BYTES_A_POSITION, what))
    lines.append(bench.check(bench.codes["verify"] == 0, "every hash and value of the dataset is right"))
    spec = reports["spec"]
    same = sum(output["identical"] for output in spec["outputs"])
    what = f"speculative text is identical to plain: {same} of {spec['prompts']}, {spec['tokens']} tokens"
    return [*lines, bench.check(spec["identical"], what)]


def position_bytes(dataset: Path) -> float:
    """Bytes that a dataset takes a position, padding included: small ones end in rows that are not full."""
    manifest = json.loads((dataset / "manifest.json").read_text(encoding="utf-8"))
    positions = sum(shard["rows"] for shard in manifest["shards"]) * manifest["settings"]["seq_len"]
    return sum(shard["bytes"] for shard in manifest["shards"]) / positions


def predictions(options: argparse.Namespace, reports: dict[str, Any]) -> dict[str, Any]:
    """What bytes alone allow on a Mac, at its full memory bandwidth: floors, nothing that was measured.

    A step of decoding reads the ternary weights, the bfloat16 head and the bfloat16 cache; replies share weights and
    head among a batch. AdamW reads weight, gradient and two moments and writes three of them, and the gradient is
    written before: 32 bytes a parameter a step.
    """
    config = json.loads((options.out / "teacher" / "config.json").read_text(encoding="utf-8"))
    ternary = sum(tensor.nbytes for tensor in tensors(config) if tensor.dtype == "U8")
    head = 2 * config["vocab_size"] * config["hidden_size"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    cached = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim  # bytes a token
    plain = ternary + head + CONTEXT * cached
    replies = (ternary + head) / REPLY_BATCH + CONTEXT * cached  # a token
    training = 32 * reports["train"]["parameters"] / (BATCH * options.seq_len)  # a token
    return {
        "tokens": PREDICTED_TOKENS,
        "bytes_a_plain_step": plain,
        "bytes_a_reply_token": replies,
        "bytes_a_trained_token": training,
        "dataset_bytes": PREDICTED_TOKENS * position_bytes(options.out / "texts"),
        "replies_cache_bytes": REPLY_BATCH * 512 * cached,
        "chips": {
            chip: {
                "plain_tok_per_s": bandwidth / plain,
                "replies_tok_per_s": bandwidth / replies,
                "replies_hours": PREDICTED_TOKENS * replies / bandwidth / 3600,
                "training_hours": PREDICTED_TOKENS * training / bandwidth / 3600,
            }
            for chip, bandwidth in bandwidths().items()
        },
    }


def markdown(bench: Bench, reports: dict[str, Any], checked: list[str], predicted: dict[str, Any]) -> str:
    """The section of docs/full-size.md."""
    plain = reports["plain"]
    versions = f"MLX {plain['versions']['mlx']}, Python {plain['versions']['python']}, {plain['versions']['system']}"
    lines = [
        f"{plain['date']}, {plain['device']}, {plain['backend']} kernels, {versions}.",
        "",
        "| stage | wall time | peak memory | on the GPU | on disk | tokens | tok/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for stage in bench.stages:
        disk = f"{stage.disk_bytes / 1e6:,.1f} MB" if stage.disk_bytes else "—"
        tokens = f"{stage.tokens:,}" if stage.tokens else "—"
        rate = f"{stage.tok_per_s:,.1f}" if stage.tok_per_s else "—"
        gpu = f"{stage.gpu_bytes / 1e9:.1f} GB" if stage.gpu_bytes else "—"
        peak = f"{stage.peak_bytes / 1e9:.1f} GB"
        lines.append(f"| {stage.name} | {stage.seconds:,.0f} s | {peak} | {gpu} | {disk} | {tokens} | {rate} |")
    chips = predicted["chips"]
    rates = ", ".join(f"{chip} {rate / 1e9:g} GB/s" for chip, rate in bandwidths().items())
    rows = {
        "plain decoding, tok/s at most": ("plain_tok_per_s", "{:,.0f}"),
        f"teacher replies, {REPLY_BATCH} at a time, tok/s at most": ("replies_tok_per_s", "{:,.0f}"),
        f"{PREDICTED_TOKENS / 1e6:g} M tokens of replies, hours at least": ("replies_hours", "{:.2f}"),
        f"training on {PREDICTED_TOKENS / 1e6:g} M tokens, AdamW alone, hours at least": ("training_hours", "{:.2f}"),
    }
    lines += [
        "",
        *checked,
        "",
        f"**Predicted, not measured**: what the bytes allow at a chip's full bandwidth ({rates}). Arithmetic is"
        " left out, and it decides scoring and training; a dataset of"
        f" {PREDICTED_TOKENS / 1e6:g} M tokens takes {predicted['dataset_bytes'] / 1e9:.2f} GB of disk, the cache of"
        f" {REPLY_BATCH} replies of 512 tokens {predicted['replies_cache_bytes'] / 1e9:.1f} GB of memory.",
        "",
        f"| | {' | '.join(chips)} |",
        f"| --- |{' ---: |' * len(chips)}",
    ]
    for what, (key, form) in rows.items():
        lines.append(f"| {what} | {' | '.join(form.format(figures[key]) for figures in chips.values())} |")
    return "\n".join(lines)


def bandwidths() -> dict[str, float]:
    """Memory bandwidth of each chip, bytes a second."""
    return {chip: BANDWIDTH[chip] * 1e9 for chip in CHIPS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where models and datasets are put: a new or empty folder",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help=f"Llama 3's: {GET_TOKENIZER}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all of it as one object")
    parser.add_argument(
        "--tokens", type=int, default=4096, help="of the texts collected; half as many of replies [4096]"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a row [512]")
    parser.add_argument("--reply-batch", type=int, default=16, help="prompts answered at a time [16]")
    parser.add_argument("--max-reply", type=int, default=32, help="most tokens a reply [32]")
    parser.add_argument("--draft-layers", type=int, default=6, help="layers of the draft [6]")
    parser.add_argument("--draft-hidden", type=int, default=768, help="width of the draft [768]")
    parser.add_argument("--steps", type=int, default=3, help="training steps of two rows [3]")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each of the four replies decoded [32]")
    parser.add_argument("--limit-gb", type=float, default=12.0, help="most memory that a stage may take [12]")
    add_shape_options(parser)
    options = parser.parse_args()
    for name in TOKENIZER_FILES:
        if not (options.tokenizer / name).is_file():
            parser.error(f"--tokenizer {options.tokenizer}: has no {name}; Llama 3's: {GET_TOKENIZER}")
    if fault := shape_fault(shape_of(options)):
        parser.error(fault)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"--out {options.out}: exists and is not an empty folder")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: the folder {options.json.parent} does not exist")

    bench = Bench(options.out)
    reports = run_stages(options, bench)
    checked = checks(bench, reports, options)
    predicted = predictions(options, reports)
    print(markdown(bench, reports, checked, predicted))
    if options.json:
        result = {
            "stages": [asdict(stage) for stage in bench.stages],
            "failures": bench.failures,
            "predicted": predicted,
            **{name: reports["plain"][name] for name in ("backend", "device", "versions", "date")},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
