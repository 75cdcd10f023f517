"""A collection by one process and by several under mlx.launch: the same bytes, and how much faster.

    python -m benchmarks.ranks                                            # two GPUs
    python -m benchmarks.ranks --tokens 20000 --backend ring --reply-batch 8 --batch 4 --max-reply 32

Each pass is timed by what appears in the folders: replies from the moment when the folder is begun, with the models
loaded, to their complete manifest, scoring from there to the shards'. A small collection by each goes first, so that
kernels are compiled. Exit 1 where bytes differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from decode.models.checkpoint import DEFAULT_TEACHER, ROOT
from kernels.device import device_name

LAUNCH = "from mlx._distributed_utils.launch import main; main()"
COLLECT = "import sys; sys.argv[0] = 'distill'; from distill.cli import main; main()"
WARM = 20_000  # tokens


def collected(folder: Path, ranks: int, tokens: int, asked: argparse.Namespace) -> tuple[float, float]:
    """Seconds of replies and of scoring."""
    command = [
        sys.executable, "-c", COLLECT, "collect", "--quiet", "--out", str(folder / "d"), "--tokens", str(tokens),
        "--teacher", asked.teacher, "--source", str(ROOT / "data" / "prompts.jsonl"), "--source", "self",
        "--max-reply", str(asked.max_reply), "--reply-batch", str(asked.reply_batch), "--batch", str(asked.batch),
    ]  # fmt: skip
    if ranks > 1:
        backend = ["--backend", asked.backend] if asked.backend else []
        command = [sys.executable, "-c", LAUNCH, "-n", str(ranks), *backend, "--", *command]
    folder.mkdir()
    times: list[float] = []
    signs = (("d", ""), ("replies-*", '"complete": true'), ("d", '"complete": true'))
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE) as process:  # mlx.launch reads it to its end
        while process.poll() is None or len(times) < len(signs):
            name, text = signs[min(len(times), len(signs) - 1)]
            if len(times) < len(signs) and any(
                text in path.read_text() for path in folder.glob(f"{name}/manifest.json")
            ):
                times.append(time.perf_counter())
            elif process.poll() is not None and len(times) < len(signs):
                sys.exit(f"{ranks} ranks: ended with {process.returncode} before all was done")
            time.sleep(0.002)
    return times[1] - times[0], times[2] - times[1]


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="[2]")
    parser.add_argument("--backend", help="of mlx.launch; its choice by default: nccl where there is CUDA, else ring")
    parser.add_argument("--teacher", default=str(DEFAULT_TEACHER), help="the embedded one by default")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of the dataset [10,000,000]")
    parser.add_argument("--reply-batch", type=int, default=3072, help="prompts that each rank answers at a time [3072]")
    parser.add_argument("--max-reply", type=int, default=256, help="[256]")
    parser.add_argument("--batch", type=int, default=64, help="rows scored at a time [64]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    asked = parser.parse_args()
    print(device_name(), flush=True)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in (1, asked.ranks):
            if asked.tokens > WARM:
                collected(Path(folder, f"warm-{ranks}"), ranks, WARM, asked)
            seconds = collected(Path(folder, str(ranks)), ranks, asked.tokens, asked)
            found[f"{ranks} ranks" if ranks > 1 else "1 process"] = dict(
                zip(("replies", "scoring"), seconds, strict=True)
            )
        same = hashes(Path(folder, "1")) == hashes(Path(folder, str(asked.ranks)))
        replied = json.loads(next(Path(folder, "1").glob("replies-*/manifest.json")).read_text())
        tokens = {
            "replies": sum(line["trained_tokens"] for line in replied["shards"]),
            "scoring": json.loads(Path(folder, "1", "d", "manifest.json").read_text())["settings"]["tokens"],
        }
    one, many = found.values()
    for name, seconds in found.items():
        rates = ", ".join(f"{part} {tokens[part] / seconds[part]:,.0f} tok/s" for part in seconds)
        print(f"{name}: {rates} ({sum(seconds.values()):.1f} s)")
    over = {part: one[part] / many[part] for part in one} | {"both": sum(one.values()) / sum(many.values())}
    print(f"over one: {', '.join(f'{part} {ratio:.2f}' for part, ratio in over.items())}; the same bytes: {same}")
    if asked.json is not None:
        report = {"device": device_name(), "options": vars(asked) | {"json": None}, "tokens": tokens}
        asked.json.write_text(json.dumps(report | {"seconds": found, "over_one": over, "same": same}, indent=1) + "\n")
    sys.exit(not same)


if __name__ == "__main__":
    main()
