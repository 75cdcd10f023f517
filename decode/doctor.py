"""`decode doctor`: is everything here that decoding needs, and does it compute what it should?

No MLX, and nothing of this project that needs it, is imported before it has been looked at: where `decode` cannot even
start, `python -m decode.doctor` says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from decode.system import unsupported
from kernels.errors import first_line

if TYPE_CHECKING:
    from decode.models.transformer import Transformer

Status = Literal["ok", "warning", "FAILED"]

# Charles Dickens, Bleak House (1853); stands in data/novels.jsonl.xz, the dashes as plain ones.
TEXT = """My Lady Dedlock is restless, very restless. The astonished fashionable intelligence hardly knows where to have
her. To-day, she is at Chesney Wold; yesterday, she was at her house in town; to-morrow, she may be abroad, for anything
the fashionable intelligence can with confidence predict. Even Sir Leicester's gallantry has some trouble to keep pace
with her. It would have more, but that his other faithful ally, for better and for worse - the gout - darts into the old
oak bed-chamber at Chesney Wold, and grips him by both legs. Sir Leicester receives the gout as a troublesome demon, but
still a demon of the patrician order. All the Dedlocks, in the direct male line, through a course of time during and
beyond which the memory of man goeth not to the contrary, have had the gout. It can be proved, sir. Other men's fathers
may have died of the rheumatism, or may have taken base contagion from the tainted blood of the sick vulgar; but, the
Dedlock family have communicated something exclusive, even to the levelling process of dying, by dying of their own
family gout.""".replace("\n", " ")
# Perplexity of TEXT's second half by the teacher with these weights (sha256), on the reference kernels.
EXPECTED = {"64073cca7e03b512cbce6aa87155622d14d8a1a4665166013581b98f26e08449": 34.31}
MARGIN = 0.05  # relative: other kernels sum in another order, and roundings of activations to int8 flip
ROOM = 2_000_000_000  # bytes free that a dataset and a draft should find, or a downloaded teacher
BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")  # MLX's packages; one of them is there


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and in words; value: a number where it is one."""

    name: str
    status: Status
    detail: str
    value: float | None = None

    def line(self) -> str:
        return f"{self.status:<8} {self.name:<26} {self.detail}"


def examine(teacher: str | None) -> Iterator[Check]:
    """Every check, as it is done. Ends early where nothing further could run.

    teacher: as `--teacher`.
    """
    for check in (_python(), _system(), _mlx()):
        yield check
        if check.status == "FAILED":
            return
    yield from _guarded("packages", _packages)
    yield from _guarded("source", _source)
    yield from _guarded("name clash", _name_clash)
    yield from _guarded("kernels", _kernels)
    yield from _guarded("memory", _memory)
    yield from _guarded("teacher", lambda: _teacher(teacher))
    yield from _guarded("disk", _disk)
    yield from _guarded("hub", _hub)
    yield from _guarded("compiler", _compiler)


def report(checks: list[Check]) -> dict[str, Any]:
    """The JSON object."""
    return {
        "ok": all(check.status != "FAILED" for check in checks),
        "failed": [check.name for check in checks if check.status == "FAILED"],
        "warnings": [check.name for check in checks if check.status == "warning"],
        "checks": [asdict(check) for check in checks],
    }


def _guarded(name: str, look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """A check that dies has failed, and the others go on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what there is to warn of has a line of its own
            yield from look()
    except Exception as error:
        yield Check(name, "FAILED", first_line(error))


def _python() -> Check:
    """Of a version that could import this file."""
    return Check("python", "ok", f"{platform.python_version()} {platform.machine()} at {sys.executable}")


def _system() -> Check:
    """What MLX's wheels ask of the system."""
    detail = f"{platform.system()} {platform.release()} {platform.machine()}"
    if sys.platform == "darwin":
        detail = f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    elif sys.platform.startswith("linux"):
        detail += f", {' '.join(platform.libc_ver())}"
    reason = unsupported()
    return Check("system", "FAILED" if reason else "ok", f"{detail}: {reason}" if reason else detail)


def _mlx() -> Check:
    try:
        import mlx.core as mx
    except ImportError as error:
        hint = "on Linux it needs one of its own extras: pip install 'mlx[cpu]' or 'mlx[cuda13]', not both"
        return Check("mlx", "FAILED", f"cannot be imported: {first_line(error)}; {hint}")
    version: str = mx.__version__  # type: ignore[attr-defined]
    return Check("mlx", "ok", f"{version} on {mx.default_device()}")


def _packages() -> Iterator[Check]:
    found, missing = [], []
    for name in (
        *BACKENDS,
        "mlx-lm",
        "numpy",
        "safetensors",
        "tokenizers",
        "transformers",
        "huggingface_hub",
        "bitdraft",
    ):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name not in BACKENDS:
                missing.append(name)
    if not missing:
        yield Check("packages", "ok", ", ".join(found))
    elif missing == ["bitdraft"]:
        yield Check("packages", "ok", ", ".join(found) + "; bitdraft runs from its folder, not installed")
    else:
        yield Check("packages", "FAILED", f"not installed: {', '.join(missing)}")


def _source() -> Iterator[Check]:
    """Which commit runs, where that can be known."""
    folder = Path(__file__).resolve().parent.parent
    commit = ""
    if (folder / ".git").exists():
        commit = _output("git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*")
    yield Check("source", "ok", f"commit {commit} at {folder}" if commit else f"no commit known, at {folder}")


def _name_clash() -> Iterator[Check]:
    """Hugging Face's package `kernels` has the import name of ours."""
    import kernels

    ours = Path(__file__).resolve().parent.parent / "kernels"
    imported = Path(kernels.__file__ or "").resolve().parent
    try:
        other = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        other = None
    if imported != ours:
        yield Check(
            "name clash", "FAILED", f"`kernels` is imported from {imported}, not {ours}: use an own environment"
        )
    elif other is not None:
        yield Check(
            "name clash",
            "warning",
            f"the package kernels {other}, of Hugging Face's, has the import name of ours: use an own environment",
        )
    else:
        yield Check("name clash", "ok", "no other package is called kernels")


def _kernels() -> Iterator[Check]:
    from kernels import info

    found = info.kernel_info()
    yield Check("device", "ok", f"{found['device']} ({found['runs_on']})")
    asked = "asked for by BITDRAFT_KERNELS" if found["forced"] else f"made for {found['runs_on']}"
    if found["reason"]:
        yield Check("backend", "warning", f"{found['backend']}, slow, since {found['reason']}")
    else:
        yield Check("backend", "ok", f"{found['backend']}, {asked}")
    if found["cpu"]:
        yield Check("processor", "ok", f"{found['cpu']['instruction_set']}, {found['cpu']['threads']} threads")
    elif sys.platform == "darwin":
        yield Check("processor", "ok", _chip())
    for operation, fault in found["self_test"].items():
        name = f"self-test {operation}"
        yield Check(name, "FAILED" if fault else "ok", f"{found['tested']} kernels" + (f": {fault}" if fault else ""))
    settings = ", ".join(f"{name} {value}" for name, value in found["tuning"]["settings"].items())
    yield Check("tuning", "ok", settings or "none stored for this device (python -m kernels tune)")


def _chip() -> str:
    """A Mac's, with its cores: the same chip is sold with more and with fewer of them."""
    from kernels.device import sysctl

    chip, model = sysctl("machdep.cpu.brand_string") or "unknown chip", sysctl("hw.model") or "unknown model"
    fast, slow = sysctl("hw.perflevel0.physicalcpu") or "?", sysctl("hw.perflevel1.physicalcpu") or "?"
    cores = re.search(r'"gpu-core-count" = (\d+)', _output("ioreg", "-rc", "AGXAccelerator", "-d", "1"))
    gpu = cores[1] if cores else "?"
    return f"{chip} ({model}), {fast} performance, {slow} efficiency and {gpu} GPU cores"


def _output(*command: str) -> str:
    """What a program prints; nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _memory() -> Iterator[Check]:
    from decode.metal import MemoryLimits
    from kernels.device import device_info, sysctl
    from kernels.memory import machine_bytes

    detail = f"{(device_info().get('memory_size') or machine_bytes()) / 1e9:.1f} GB"
    working_set = int(device_info().get("max_recommended_working_set_size", 0))
    if working_set:
        limits = MemoryLimits.of(working_set)
        detail += f", of which the GPU should use {limits.memory / 1e9:.1f} (cache: {limits.cache / 1e9:.1f})"
    if swap := sysctl("vm.swapusage"):
        detail += f"; swap: {' '.join(swap.split())}"
    yield Check("memory", "ok", detail)


def _teacher(name: str | None) -> Iterator[Check]:
    from decode.metal import limit_memory
    from decode.models.checkpoint import find_teacher
    from decode.prompts import Prompt
    from decode.tokenizer import Tokenizer

    limit_memory()
    with _offline():
        checkpoint = find_teacher(name)
    teacher = checkpoint.load()
    yield Check("teacher", "ok", f"{checkpoint.name} at {checkpoint.folder}, sha256 {checkpoint.weights_hash[:12]}")
    try:
        tokenizer = Tokenizer(checkpoint.folder)
        ids = tokenizer.encode_text(TEXT)
        same = tokenizer.decode(ids).strip() == TEXT
        turn = {"role": "user", "content": TEXT.replace(". ", ".\n")}
        tokenizer.encode_prompt(Prompt([turn], "", where="a known text"))
    except Exception as error:
        yield Check("tokenizer", "FAILED", f"{checkpoint.folder}: {first_line(error)}")
        return
    ends = f"{len(ids)} tokens for {len(TEXT)} characters, end tokens {sorted(tokenizer.end_tokens)}"
    yield Check("tokenizer", "ok" if same else "warning", ends if same else f"{ends}; decoding does not restore a text")
    yield _perplexity(teacher, ids[: teacher.context], EXPECTED.get(checkpoint.weights_hash), shipped=name is None)


@contextmanager
def _offline() -> Iterator[None]:
    """A Hub name is looked for among what was downloaded: to look whether all is well must not take gigabytes."""
    from huggingface_hub import constants

    allowed, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = allowed


def _perplexity(teacher: Transformer, ids: list[int], expected: float | None, *, shipped: bool) -> Check:
    """Of a text's second half, its first half being the prompt: prefill and decoding steps both take part.

    expected: None where nobody knows, which is a fault with the shipped teacher.
    """
    import mlx.core as mx
    import numpy as np

    half, cache = len(ids) // 2, teacher.new_cache()
    teacher.prefill(ids[:half], cache)
    logits = teacher.step(ids[half:-1], cache).logits
    right = mx.take_along_axis(logits, mx.array(ids[half + 1 :])[:, None], axis=1)[:, 0]
    loss = float(np.array(mx.logsumexp(logits, axis=1) - right).mean())
    if not math.isfinite(loss):
        return Check("perplexity", "FAILED", "of a known text: not a number")
    value = math.exp(min(loss, 700.0))
    detail = f"{value:.2f} of a known text"
    if expected is None:
        if shipped:
            return Check("perplexity", "FAILED", f"{detail}; these are not the weights that bitdraft ships", value)
        return Check("perplexity", "ok", f"{detail}; what it should be is known for the shipped teacher only", value)
    low, high = expected * (1 - MARGIN), expected * (1 + MARGIN)
    detail += f", expected {low:.2f} to {high:.2f}"
    return Check("perplexity", "ok" if low <= value <= high else "FAILED", detail, value)


def _disk() -> Iterator[Check]:
    from decode.models.checkpoint import RUNS

    folder = RUNS if RUNS.is_dir() else Path.cwd()
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free for {RUNS.resolve()}"
    if not os.access(folder, os.W_OK):
        yield Check("disk", "warning", f"{folder} cannot be written: give --out")
    else:
        yield Check("disk", "ok" if free >= ROOM else "warning", detail, free)


def _hub() -> Iterator[Check]:
    """Without asking the network."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    offline = "offline: only models in it can be named" if constants.HF_HUB_OFFLINE else "others are downloaded"
    detail = f"models are kept in {cache}, {free / 1e9:.1f} GB free; {offline}"
    yield Check("hub", "ok" if free >= ROOM else "warning", detail, free)


def _compiler() -> Iterator[Check]:
    if sys.platform == "darwin":
        yield Check("compiler", "ok", "none is needed: MLX compiles Metal kernels itself")
        return
    named = os.environ.get("CXX", "").split()
    found = next((path for name in (*named[:1], "c++", "g++", "clang++") if (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if found is None:
        yield Check("compiler", "warning", "no C++ compiler: the CPU kernels cannot be built")
    elif not headers:
        yield Check("compiler", "warning", f"{found}, but no Python.h: the CPU kernels cannot be built")
    else:
        yield Check("compiler", "ok", f"{found} and Python's headers, to build the CPU kernels with")


def main() -> None:
    """Where `decode` cannot start."""
    checks = []
    for check in examine(None):
        print(check.line(), flush=True)
        checks.append(check)
    raise SystemExit(0 if report(checks)["ok"] else 1)


if __name__ == "__main__":
    main()
