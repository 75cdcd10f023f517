"""What every command shares: one-line errors, exit codes, JSON output, progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from tqdm import tqdm

from kernels import UserError

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the results as one JSON object; - is standard output."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars or summaries.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
TeacherOption = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="PATH|REPO",
        help="BitNet teacher: a folder or a Hub name. Default: the embedded one.",
    ),
]


def run(app: typer.Typer) -> None:
    """Run a command line: 0 done, 1 a check failed, 2 the user's input is at fault, 130 interrupted."""
    name = Path(sys.argv[0]).name
    try:
        app(standalone_mode=False)
    except UserError as error:
        fail(name, str(error))
    except (typer.Abort, KeyboardInterrupt) as error:
        detail = f": {error}" if str(error) else ""
        print(f"\n{name}: interrupted{detail}", file=sys.stderr)
        raise SystemExit(130) from None
    except typer.Exit as error:
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(name, f"{where}{error.strerror or error}")
    except Exception as error:
        # typer reports wrong options through click's exceptions.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            fail(name, error.format_message())
        raise


def fail(name: str, message: str) -> None:
    """One line on standard error, exit code 2."""
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def write_json(target: str | None, value: dict[str, Any]) -> None:
    """Write a command's results where --json asks for them."""
    if target is None:
        return
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {target}: cannot be written: {error.strerror}") from error


def check_json_target(target: str | None) -> None:
    """Find out before a long run that its results could not be written."""
    if target is not None and target != "-" and not Path(target).parent.is_dir():
        raise UserError(f"--json {target}: the folder {Path(target).parent} does not exist")


def say(quiet: bool) -> Callable[[str], None]:
    """A printer to standard error that --quiet silences."""
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def progress(total: int | None, label: str, unit: str, quiet: bool, initial: int = 0) -> tqdm:
    """A bar on standard error with rate and ETA."""
    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=True, disable=quiet, initial=initial,
        file=sys.stderr, dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip


def text_sink(json_target: str | None) -> TextIO:
    """Where generated text goes: standard output, unless the JSON is to be alone there."""
    return sys.stderr if json_target == "-" else sys.stdout
