"""Whether `distill verify` finds every change of one byte: a small dataset and its replies are collected, every byte of
every file is changed in turn, and each time the check of its folder must name the file; so must the check of the shards
where the file is one of their replies. So it must where a file is shorter or longer by a byte, gone, or one too many.
Prints what was done; exit 1 where a change was not found.

    python -m benchmarks.verify_sweep
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from decode.models.checkpoint import ROOT
from distill.data.inspection import verify
from distill.data.manifest import MANIFEST
from kernels.errors import UserError

SIZES = "--tokens 2200 --seq-len 64 --max-reply 16 --reply-batch 8 --top-k 4 --quiet"  # a file of each kind
OF_MANIFESTS = 16  # values that each byte of a manifest is changed to; of other files one

Finds = Callable[[Path, Path], bool]  # dataset, file: whether a check of the one names the other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=300, help="changes that the real command is to find [300]")
    asked = parser.parse_args()
    rng, missed, began = random.Random(0), list[str](), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        data = folder / "data"
        source = str(ROOT / "data" / "prompts-sample.jsonl")
        done = distill("collect", "--source", source, "--source", "self", "--out", str(data), *SIZES.split())
        if done.returncode:
            sys.exit(done.stderr)
        (replies,) = folder.glob("replies-*")
        files = sorted((*data.iterdir(), *replies.iterdir()))
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} files, {size:,} bytes", flush=True)
        if verify(data) or verify(replies):
            sys.exit("something is wrong with what was collected")
        changes = 0
        for file in files:
            for at, value in byte_changes(file, rng):
                changes += 1
                with changed(file, at, value):
                    missed += misses(data, file, f"byte {at} is {value}", found_by_library)
            for how, change in OTHERS.items():
                changes += 1
                with restored(file):
                    change(file)
                    missed += misses(data, file, how, found_by_library)
        for one in (data, replies):
            last = max(one.glob("*.safetensors"))
            more = last.with_name(f"{last.name.split('-')[0]}-00099.safetensors")
            shutil.copy(last, more)
            missed += misses(data, more, "one too many", found_by_library)
            more.unlink()
            changes += 1
        if verify(data) or verify(replies):
            sys.exit("a file was not restored")
        print(f"{changes:,} changes, {len(missed)} not found, {time.perf_counter() - began:.0f} s", flush=True)
        for number in range(asked.commands):
            file = files[number % len(files)]
            at = rng.randrange(file.stat().st_size)
            with changed(file, at, (file.read_bytes()[at] + rng.randrange(1, 256)) % 256):
                missed += misses(data, file, f"byte {at}", found_by_command)
        print(f"{asked.commands} of them with the command, {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join(missed) or "all were found")
    sys.exit(bool(missed))


def byte_changes(file: Path, rng: random.Random) -> Iterator[tuple[int, int]]:
    """Places in a file, and the values that they are changed to."""
    for at, byte in enumerate(file.read_bytes()):
        others = [value for value in range(256) if value != byte]
        yield from ((at, value) for value in rng.sample(others, OF_MANIFESTS if file.name == MANIFEST else 1))


def misses(data: Path, file: Path, how: str, finds: Finds) -> list[str]:
    """The folders whose checks do not find a change."""
    return [f"{file}: {how}: not found in {one}" for one in {data, file.parent} if not finds(one, file)]


def found_by_library(dataset: Path, file: Path) -> bool:
    try:
        return any((dataset / problem.file).resolve() == file for problem in verify(dataset))
    except UserError as error:  # what the command says in one line
        return str(file.parent) in str(error)


def found_by_command(dataset: Path, file: Path) -> bool:
    done = distill("verify", str(dataset))
    if done.returncode == 1:
        return str(file) in done.stdout
    return done.returncode == 2 and str(file.parent) in done.stderr


def distill(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "distill", *options], capture_output=True, text=True)


@contextmanager
def changed(file: Path, at: int, value: int) -> Iterator[None]:
    """A file with another byte, written in place."""
    with file.open("r+b", buffering=0) as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([value]))
        yield
        opened.seek(at)
        opened.write(byte)


@contextmanager
def restored(file: Path) -> Iterator[None]:
    data = file.read_bytes()
    yield
    file.write_bytes(data)


OTHERS: dict[str, Callable[[Path], object]] = {
    "a byte shorter": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a byte longer": lambda file: file.write_bytes(file.read_bytes() + b"\n"),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
}


if __name__ == "__main__":
    main()
