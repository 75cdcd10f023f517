"""Models and commands that several tests share."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "checkpoints" / "bitnet-smol-116m"
SHIPPED = ROOT / "checkpoints" / "bitnet-smol-116m-draft"

Command = Callable[..., "Result"]

# Started in the background of a script, this process ignores Ctrl-C, and so would the commands it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, program: str, *parts: str) -> None:
        """Assert the form every bad input has: exit code 2 and one line that names the culprit."""
        assert self.code == 2, (self.code, self.err)
        lines = self.err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith(f"{program}: error: "), self.err
        for part in parts:
            assert part in lines[0], lines[0]
        assert self.out == ""


def arguments(program: str, *options: object) -> list[str]:
    """A command line that runs `decode` or `distill` of this checkout."""
    start = f"import sys; sys.argv[0] = {program!r}; from {program}.cli import main; main()"
    return [sys.executable, "-c", start, *map(str, options)]


def environment(**variables: str) -> dict[str, str]:
    """This process's, the checkout importable, the Hub out of reach."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "120", **variables}


def in_background() -> None:
    """A `preexec_fn`: what a script starts with `&` ignores Ctrl-C, which is not meant for it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder commands run in: no drafts or datasets of the checkout's own runs/ can be found."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="session")
def command(work: Path) -> Command:
    def run(
        program: str, *options: object, stdin: str | bytes = b"", cwd: Path | None = None, **variables: str
    ) -> Result:
        done = subprocess.run(
            arguments(program, *options),
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            cwd=cwd or work,
            env=environment(**variables),
            timeout=120,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def inside(work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Commands in this process, which start in no time: for what asks nothing of signals, the network or streams."""
    from huggingface_hub import constants

    def run(program: str, *options: object, cwd: Path | None = None) -> Result:
        main = importlib.import_module(f"{program}.cli").main
        with monkeypatch.context() as patch:
            patch.chdir(cwd or work)
            patch.setattr(sys, "argv", [program, *map(str, options)])
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            patch.setenv("COLUMNS", "120")
            patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            capfd.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def weak_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random draft for the embedded teacher: almost nothing it proposes is accepted."""
    from distill.training import checkpoint
    from distill.training.draft_config import DraftConfig
    from distill.training.drafts import llama

    folder = tmp_path_factory.mktemp("drafts") / "weak"
    config = DraftConfig.for_teacher(TEACHER, layers=1, hidden=64)
    checkpoint.save(folder, llama.create(config, seed=0), config, TEACHER, {"complete": True})
    return folder


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the embedded teacher: enough for what asks nothing of its words."""
    layers = 4
    folder = tmp_path_factory.mktemp("teachers") / "small"
    config = json.loads((TEACHER / "config.json").read_text()) | {"num_hidden_layers": layers}
    changed_copy(TEACHER, folder, config__json=json.dumps(config).encode(), model__safetensors=None)
    weights: dict[str, mx.array] = mx.load(str(TEACHER / "model.safetensors"))  # type: ignore[assignment]
    later = tuple(f"model.layers.{i}." for i in range(layers, 100))
    kept = {name: array for name, array in weights.items() if not name.startswith(later)}
    mx.save_safetensors(str(folder / "model.safetensors"), kept, {"format": "mlx"})
    return folder


@pytest.fixture(scope="session")
def text_dataset(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the small teacher says of a few texts."""
    from collected import collect_into

    return collect_into(tmp_path_factory.mktemp("data") / "dataset", small_teacher, "wiki")


def changed_copy(source: Path, target: Path, **replaced: bytes | None) -> Path:
    """A model folder of links to another's files; `name__ext=content` replaces or (None) leaves out a file."""
    target.mkdir(parents=True)
    new = {name.replace("__", "."): content for name, content in replaced.items()}
    for file in source.iterdir():
        if file.name not in new:
            (target / file.name).symlink_to(file)
    for name, content in new.items():
        if content is not None:
            (target / name).write_bytes(content)
    return target


def unsealed(manifest: Path) -> str:
    """What a dataset's manifest says, without its own hash, as earlier versions wrote it: may be edited."""
    content = json.loads(manifest.read_text())
    content.pop("sha256", None)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def trimmed_copy(source: Path, target: Path, kept: np.ndarray) -> Path:
    """A draft's folder whose head knows some ids only. kept: int32 [v], ascending."""
    from decode.models import draft_vocabulary

    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": draft_vocabulary.MODEL_TYPE, draft_vocabulary.SIZE: len(kept)}
    changed_copy(source, target, config__json=json.dumps(config).encode(), model__safetensors=None, draft__json=None)
    weights = dict(mx.load(str(source / "model.safetensors")))  # type: ignore[arg-type]
    mx.save_safetensors(str(target / "model.safetensors"), weights | {"kept": mx.array(kept)}, {"format": "mlx"})
    return target


def mounted(folder: Path, size: str, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program whose first argument is `folder`, a file system of its own that ends with it."""
    script = f'mount -t tmpfs -o size={size} none "$1" && exec "$0" -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", script, sys.executable]
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    return subprocess.run(
        [*command, str(folder), program], env=environment(), capture_output=True, text=True, timeout=60
    )
