"""`make demo`: the whole path on the embedded teacher, and one table at the end.

    distill collect   the teacher answers prompts and reads texts of data/; its logits become shards
    distill train     a small draft learns from them
    decode spec       the teacher decodes with that draft, and with the shipped one

It runs the commands a user would, and shows each. Everything it makes is in runs/demo. A finished
demo is started anew; an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
OUT = Path("runs/demo")
DATASET, DRAFT, RESULTS = OUT / "dataset", OUT / "draft", OUT / "results.json"
SHIPPED = Path("checkpoints/bitnet-smol-43m-draft")
PROMPTS = Path("data/prompts-sample.jsonl")
COLLECT_TOKENS, TRAIN_TOKENS = 90_000, 300_000
SHAPE = ("--layers", 2, "--hidden", 128, "--batch", 2, "--lr", 0.004)  # for few tokens: small, many steps
COLUMNS = ("draft", "acceptance rate", "tokens per verification", "tok/s", "plain tok/s", "speed-up", "identical")


def main() -> int:
    os.chdir(ROOT)
    began = time.perf_counter()
    if RESULTS.exists():
        shutil.rmtree(OUT)
    OUT.mkdir(parents=True, exist_ok=True)
    drafts = {}
    if lacks_native_kernels():
        print(
            "The native CPU kernels are missing (no C++ compiler at setup?). Collecting and training would take hours"
        )
        print("without them, so this demo only decodes, with the shipped draft.")
    else:
        heading("1/4 the teacher answers prompts and reads texts; its top logits become shards")
        run("distill", "collect", "--tokens", COLLECT_TOKENS, "--out", DATASET)
        heading("2/4 a draft learns to say what the teacher would")
        if not complete(DRAFT):
            run("distill", "train", "--data", DATASET, *SHAPE, "--tokens", TRAIN_TOKENS, "--out", DRAFT)
        drafts["trained just now"] = DRAFT
    if complete(SHIPPED):
        drafts["shipped"] = SHIPPED
    reports = {}
    for name, folder in drafts.items():
        heading(f"{3 if folder == DRAFT else 4}/4 the teacher decodes, plainly and with the draft {name}, in turn")
        report = OUT / f"decode-{folder.name}.json"
        run("decode", "spec", "--draft", folder, "--prompts", PROMPTS, "--compare", "--json", report)
        reports[name] = json.loads(report.read_text(encoding="utf-8"))

    rows = {name: facts(report) for name, report in reports.items()}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    any_report = next(iter(reports.values()))
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    heading(
        f"{any_report['prompts']} prompts, k = {any_report['k']}, {any_report['backend']} kernels"
        f" on {any_report['device']}; the demo took {minutes} min {seconds} s"
    )
    print(table(rows))
    print(f"\npictures  {', '.join(str(folder / 'curves.png') for folder in drafts.values())}")
    print(f"results   {RESULTS}, and with every token {OUT}/decode-*.json")
    return 0 if all(report["identical"] for report in reports.values()) else 1


def lacks_native_kernels() -> bool:
    """Whether this is Linux without the C++ extension (no compiler at setup)."""
    if sys.platform != "linux":
        return False
    from kernels import backend

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backend().NAME == "reference"


def complete(folder: Path) -> bool:
    """Whether a folder holds a finished draft."""
    try:
        return bool(json.loads((folder / "draft.json").read_text(encoding="utf-8"))["complete"])
    except (OSError, ValueError, KeyError):
        return False


def run(command: str, *arguments: object) -> None:
    """Show a command, run it, and end the demo with its exit code if it fails."""
    words = [command, *map(str, arguments)]
    print(f"$ {shlex.join(words)}", flush=True)
    script = Path(sys.executable).parent / command
    with subprocess.Popen([str(script), *words[1:]], stdin=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the command got it too, and may want to save what it has
            process.wait()
            raise SystemExit(130) from None
    # 1 from `decode spec --compare` says that an output differs: the table will show it.
    if code and not (command == "decode" and code == 1):
        raise SystemExit(code)


def facts(report: dict[str, Any]) -> dict[str, Any]:
    """What the table shows of one `decode spec --compare --json`."""
    return {
        "acceptance rate": report["acceptance_rate"],
        "tokens per verification": report["mean_acceptance_length"],
        "tok/s": report["tok_per_s"],
        "plain tok/s": report["baseline_tok_per_s"],
        "speed-up": report["speedup"],
        "identical": report["identical"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in aligned columns."""
    formats = {
        "acceptance rate": "{:.1%}",
        "tokens per verification": "{:.2f}",
        "tok/s": "{:.0f}",
        "plain tok/s": "{:.0f}",
        "speed-up": "{:.2f}x",
    }
    lines = [list(COLUMNS)]
    for name, row in rows.items():
        lines.append([name, *(formats[c].format(row[c]) for c in COLUMNS[1:-1]), "yes" if row["identical"] else "NO"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
