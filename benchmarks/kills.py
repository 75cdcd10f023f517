"""Collections killed (-9) at random instants over replies and scoring, by one process and by two ranks on this machine.

    python -m benchmarks.kills
    python -m benchmarks.kills --kills 20 --teacher FOLDER --seed 1 --json kills.json

A collection is killed four times, at instants of its replies while these are not whole, then of its scoring; then it
may end, and another begins, until there were so many kills. Of two ranks one or the other or both are killed; who is
left must end within a minute, with exit code 2 and one line that names the other. Every dataset must have the bytes of
one that nobody disturbed, replies and manifests included; exit 1 where something is not so. Files are kept small, so
that many are written.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# All is imported before processes are forked, so that each begins at once; nothing here computes with MLX.
from transformers import AutoTokenizer

from decode.models.checkpoint import DEFAULT_TEACHER, ROOT
from distill import cli
from distill.data import collect, reply_pass, sharing
from distill.predict import duration

PROMPTS = 150
OPTIONS = ("--seq-len", 128, "--max-reply", 16, "--reply-batch", 4, "--batch", 2, "--quiet")
KILLS_EACH = 4  # of a dataset
PATIENCE = 60.0  # seconds for a rank to end after another

__all__ = ["AutoTokenizer", "cli", "collect", "duration", "reply_pass", "sharing"]


@dataclass
class Run:
    """One start of the command: its processes by rank, and where what they say is kept."""

    folder: Path
    processes: dict[int, int]
    codes: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(cls, options: list[str], folder: Path, ranks: int) -> Run:
        folder.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        hosts = folder.with_suffix(".json")  # as mlx.launch writes it
        hosts.write_text(json.dumps([[address]] * ranks))
        run = cls(folder, {})
        run.begun.unlink(missing_ok=True)
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if ranks > 1 else {}
                run._become(rank, [*options, "--out", str(folder / "d")])
            run.processes[rank] = pid
        return run

    def _become(self, rank: int, options: list[str]) -> None:
        """What a forked process does, and never returns from."""
        said = os.open(self._said(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["distill", *options]
        work = collect.Collector.run

        def marked(collector: collect.Collector) -> Any:
            self.begun.touch()
            return work(collector)

        collect.Collector.run = marked  # type: ignore[method-assign]
        code: Any = 1
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(code or 0))

    @property
    def begun(self) -> Path:
        """A file that is there once all ranks have met and the work has begun."""
        return self.folder.with_suffix(".begun")

    def _said(self, rank: int) -> Path:
        return self.folder.with_suffix(f".{rank}.txt")

    def said(self, rank: int) -> str:
        return self._said(rank).read_text()

    def going(self) -> bool:
        """Whether one of them has not ended."""
        for rank, pid in self.processes.items():
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.processes)

    def wait(self, seconds: float, until: Path | None = None) -> bool:
        """Until all have ended, or `until` is there, or the time is up; whether all have ended."""
        deadline = time.monotonic() + seconds
        while self.going() and time.monotonic() < deadline and not (until and until.exists()):
            time.sleep(0.002)
        return not self.going()

    def kill(self, ranks: list[int]) -> list[int]:
        """Those of them that had not ended."""
        self.going()
        there = [rank for rank in ranks if rank not in self.codes]
        for rank in there:
            os.kill(self.processes[rank], signal.SIGKILL)
        return there


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replied(folder: Path) -> bool:
    """Whether all replies of a collection are there."""
    return any('"complete": true' in path.read_text() for path in folder.glob("replies-*/manifest.json"))


def survive(options: list[str], work: Path, ranks: int, kills: int, dice: random.Random) -> dict[str, Any]:
    """Kill collections of so many ranks so often; what was found, `faults` among it."""
    reference = work / f"whole-{ranks}"
    whole = Run.start(options, reference, ranks)
    whole.wait(600, until=whole.begun)
    began = time.monotonic()
    while not replied(reference) and whole.going():
        time.sleep(0.002)
    spans = {"replies": time.monotonic() - began}
    whole.wait(600)
    spans["scoring"], faults = time.monotonic() - began - spans["replies"], list[str]()
    if set(whole.codes.values()) != {0}:
        sys.exit(f"undisturbed: {whole.codes}, {whole.said(0)}")
    expected, stages, datasets, attempt, here = files(work / "whole-1"), Counter[str](), 0, 0, 0
    if files(reference) != expected:
        faults.append(f"{ranks} ranks, undisturbed, write other bytes than one process")
    folder = work / f"killed-{ranks}"
    while sum(stages.values()) < kills or folder.exists():
        run = Run.start(options, folder, ranks)
        attempt += 1
        if sum(stages.values()) < kills and here < KILLS_EACH:
            run.wait(PATIENCE, until=run.begun)
            if not run.wait(dice.uniform(0, spans["scoring" if replied(folder) else "replies"])):
                chosen = dice.choice([[0], [1], [0, 1]] if ranks > 1 else [[0]])
                if killed := run.kill(chosen):
                    stages["scoring" if replied(folder) else "replies"] += 1
                    here += 1
                    if not run.wait(PATIENCE):
                        faults.append(f"rank {killed} was killed, and another has not ended after {PATIENCE:.0f} s")
                        run.kill(list(range(ranks)))
                    faults += [
                        f"kill {sum(stages.values())}, of {killed}: rank {rank} ended with {code}: {run.said(rank)}"
                        for rank, code in run.codes.items()
                        if rank not in killed and not _named(code, run.said(rank), killed[0])
                    ]
                    continue
        run.wait(600)
        if set(run.codes.values()) != {0}:
            faults.append(f"start {attempt}: {run.codes}, {run.said(0)}")
            break
        datasets, here = datasets + 1, 0
        found = files(folder)
        if differ := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
            faults.append(f"dataset {datasets} differs in {', '.join(differ)}")
        shutil.rmtree(folder)
    return {"ranks": ranks, "kills": sum(stages.values()), **stages, "datasets": datasets, "faults": faults}


def _named(code: int, said: str, killed: int) -> bool:
    """Whether a rank that was left ended as it should. It may have been done, too."""
    return code == 0 or (code == 2 and len(said.splitlines()) == 1 and f"rank {killed} of" in said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="half of them of one process, half of two ranks [200]")
    parser.add_argument("--teacher", default=str(DEFAULT_TEACHER), help="the embedded one by default")
    parser.add_argument("--tokens", type=int, default=6000, help="of a dataset [6000]")
    parser.add_argument("--seed", type=int, default=0, help="of the instants [0]")
    parser.add_argument("--json", metavar="FILE")
    asked = parser.parse_args()
    reply_pass.EXAMPLES_PER_FILE = 8  # type: ignore[misc]
    collect.ROWS_PER_SHARD = 4  # type: ignore[misc]
    began, dice, found = time.monotonic(), random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with (ROOT / "data" / "prompts.jsonl").open(encoding="utf-8") as lines:
            (work / "prompts.jsonl").write_text("".join(line for line, _ in zip(lines, range(PROMPTS), strict=False)))
        sources = ["--source", str(work / "prompts.jsonl"), "--source", "self"]
        options = ["collect", "--teacher", asked.teacher, *sources, "--tokens", str(asked.tokens), *map(str, OPTIONS)]
        for ranks, kills in ((1, asked.kills - asked.kills // 2), (2, asked.kills // 2)):
            found.append(survive(options, work, ranks, kills, dice))
            print(", ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True)
    if asked.json:
        report = {"options": vars(asked), "found": found, "seconds": time.monotonic() - began}
        Path(asked.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(one["faults"] for one in found))


if __name__ == "__main__":
    main()
