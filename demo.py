"""`make demo`: the whole path on the embedded teacher, and one table at the end.

    distill run demo  as recipes/demo.toml says: the teacher answers prompts and reads texts of data/, its logits become
                      shards, a small draft learns from them and is evaluated on held-out prompts
    distill run demo-continued
                      the shipped draft, which reads the teacher's states, goes on with the same data
    distill evaluate  the shipped draft on the same prompts, so that `decode spec` takes the fastest one from then on
    decode spec       the teacher decodes with each of these drafts

It runs the commands a user would, and shows each. Everything it makes is in runs/demo. A finished demo is moved aside,
whatever else is in its folder, and made anew; an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from kernels.files import working_in

ROOT = Path(__file__).resolve().parent
OUT = Path("runs/demo")
RESULTS = OUT / "results.json"
DRAFT, CONTINUED = OUT / "draft", OUT / "continued"  # as recipes/demo.toml and demo-continued.toml have them
SHIPPED = Path("checkpoints/bitnet-smol-116m-reader")
PROMPTS = Path("data/prompts-sample.jsonl")
COLUMNS = ("draft", "acceptance rate", "tokens per verification", "tok/s", "plain tok/s", "speed-up", "identical")


def main() -> int:
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with working_in(OUT):
            if RESULTS.exists():
                move_aside()
        with working_in(OUT):
            return demonstrate()
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2


def move_aside() -> None:
    """Give the folder of a finished demo another name."""
    names = (OUT.with_name(f"{OUT.name}-{number}") for number in itertools.count(1))
    aside = next(path for path in names if not os.path.lexists(path))
    OUT.rename(aside)
    print(f"The demo that was done is in {aside} now; delete it when you like.")


def demonstrate() -> int:
    """Run all, and print the table: the exit code."""
    began = time.perf_counter()
    drafts, well = {}, True
    if lacks_native_kernels():
        print(
            "The native CPU kernels are missing (no C++ compiler at setup?). Collecting and training would take hours"
        )
        print("without them, so this demo only decodes, with the shipped draft.")
    else:
        heading(
            "1/4 the teacher answers prompts and reads texts, and a small draft learns from its logits, from nothing"
        )
        well = run("distill", "run", "demo")
        drafts["from nothing"] = DRAFT
        if complete(SHIPPED):
            heading(
                "2/4 the shipped draft, which reads the teacher's states, goes on with the same data for two minutes"
            )
            well &= run("distill", "run", "demo-continued")
            drafts["shipped, continued"] = CONTINUED
    if complete(SHIPPED):
        if drafts:
            heading("3/4 the shipped draft itself is evaluated as the others were")
            same = ("--limit", 1, "--max-tokens", 64)  # as the recipes have them
            well &= run("distill", "evaluate", "--draft", SHIPPED, *same, "--out", OUT / "shipped")
        drafts["shipped"] = SHIPPED
    reports = {}
    heading("4/4 the teacher decodes, plainly and with each draft, in turn")
    for name, folder in drafts.items():
        report = OUT / f"decode-{folder.name}.json"
        well &= run("decode", "spec", "--draft", folder, "--prompts", PROMPTS, "--compare", "--json", report)
        reports[name] = json.loads(report.read_text(encoding="utf-8"))

    rows = {name: figures(report) for name, report in reports.items()}
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    any_report = next(iter(reports.values()))
    minutes, seconds = divmod(round(time.perf_counter() - began), 60)
    heading(
        f"{any_report['prompts']} prompts, k = {any_report['k']}, {any_report['backend']} kernels"
        f" on {any_report['device']}; the demo took {minutes} min {seconds} s"
    )
    print(table(rows))
    pictures = sorted(str(picture) for folder in drafts.values() for picture in folder.glob("*.png"))
    print(f"\npictures  {', '.join(pictures)}")
    print(f"results   {RESULTS}, and with every token {OUT}/decode-*.json")
    return 0 if well else 1


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


def run(command: str, *arguments: object) -> bool:
    """Show a command and run it: whether its checks held. The demo ends with its exit code if it fails."""
    words = [command, *map(str, arguments)]
    print(f"$ {shlex.join(words)}", flush=True)
    script = Path(sys.executable).parent / command
    with subprocess.Popen([str(script), *words[1:]], stdin=subprocess.DEVNULL) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the command got it too, and may want to save what it has
            process.wait()
            raise SystemExit(130) from None
        except SystemExit:  # it did not get this
            process.terminate()
            process.wait()
            raise
    if code > 1 or code < 0:  # 1 says that an output differs from plain decoding: the table will show it
        raise SystemExit(code)
    return code == 0


def figures(report: dict[str, Any]) -> dict[str, Any]:
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
        cells = ("none" if row[c] is None else formats[c].format(row[c]) for c in COLUMNS[1:-1])
        lines.append([name, *cells, "yes" if row["identical"] else "NO"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
