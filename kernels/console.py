"""What every command shares: one-line errors, exit codes, JSON output, progress bars."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from kernels.errors import UserError, first_line, printable, printable_lines
from kernels.files import NO_ROOM, check_output, check_writable, goes_round, replacing
from kernels.signals import take_signals

if TYPE_CHECKING:
    from tqdm import tqdm

# Options that name what is worked on, one thing each. Numbers may be given again, as aliases of commands have them.
NAME_ONE = (
    "--prompt",
    "--prompts",
    "--teacher",
    "--draft",
    "--init",
    "--replies",
    "--out",
    "--json",
    "--repo",
    "--plot",
)
# What MLX says where there is no memory, on CPUs and Macs, on NVIDIA's, and where a thread cannot begin.
NO_MEMORY = re.compile(r"(Unable|Failed) to allocate|out of memory|Resource temporarily unavailable")
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the results as one JSON object; - is standard output."),
]


def _quiet(value: bool) -> bool:
    if value:  # read when the Hub's client is imported, which is after this
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return value


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, help="No progress bars or summaries.")]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, with what the user should know of it."""


def run(app: typer.Typer, name: str) -> None:
    """Run a command line: 0 done, 1 a check failed, 2 the user's input is at fault, 130 interrupted, by Ctrl-C or
    SIGTERM.

    name: of the command, before each error. A reader that goes away (`| head`) ends it quietly with 141, as a shell
    says of other programs that SIGPIPE ended.
    """
    _mend_streams()
    if sys.getfilesystemencoding() != "utf-8":  # in which MLX and others would look for other files than were named
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    try:
        Path.cwd()
    except OSError as error:
        fail(name, f"the current folder is not there any more ({error.strerror}); change to another")
    _check_arguments(name)
    _prepare_environment(name)
    take_signals()
    try:
        # typer swallows typer.Exit and KeyboardInterrupt, and returns their codes; no command returns a value.
        code = app(prog_name=name, standalone_mode=False) or 0
        sys.stdout.flush()  # or a reader that is gone would be found out when nobody can say so quietly
    except BrokenPipeError:
        _reader_gone()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer's answer to it is 1, a failed check
            _reader_gone()
        raise
    except UserError as error:
        fail(name, str(error))
    except (Interrupted, KeyboardInterrupt, typer.Abort) as error:  # typer tells of Ctrl-C where it is at work
        _finish_computing()
        print(f"\n{name}: interrupted{f': {error}' if str(error) else ''}", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        # What is written to files names them; a disk that is full below a redirected output does not.
        where = error.filename or ("standard output" if error.errno in NO_ROOM else "")
        where = f"{where}: " if where else ""
        fail(name, f"{where}{error.strerror or error}")
    except Exception as error:
        if lacking := lacks_memory(error):
            fail(name, lacking)
        # typer reports wrong options through click's exceptions.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if not error.format_message():  # no command was given, and its help stands above
                raise SystemExit(error.exit_code) from None
            fail(name, error.format_message())
        if module := _broken_import(error):
            given = [f"{key}={value}" for key, value in os.environ.items() if value and repr(value) in str(error)]
            fail(name, ", ".join([f"{module} cannot be imported ({first_line(error)})", *given]))
        raise
    if code == 130:
        _finish_computing()
        print(f"\n{name}: interrupted", file=sys.stderr)
    raise SystemExit(code)


def lacks_memory(error: BaseException) -> str | None:
    """What to say of an error that is for want of memory, Python's or MLX's; None of any other."""
    if isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)):
        return f"this needs more memory than there is ({error})"
    return "this needs more memory than there is" if isinstance(error, MemoryError) else None


def _check_arguments(name: str) -> None:
    """Fail for what no command wants, and what typer would take."""
    for before, argument in pairwise(sys.argv):
        if not _is_text(argument):  # which no manifest or report could name, and MLX could not open
            fail(name, f"{argument}: is not valid UTF-8")
        if argument == "" or re.fullmatch(r"--[a-z-]+=", argument):  # an unset variable, which would name the folder .
            option = next((text for text in (argument, before) if text.startswith("-")), "an argument")
            fail(name, f"{option.rstrip('=')} is empty")
    given = Counter(argument.partition("=")[0] for argument in sys.argv[1:])
    if twice := next((option for option in NAME_ONE if given[option] > 1), None):
        fail(name, f"{twice} is given twice")  # the first would be forgotten without a word


def _is_text(argument: str) -> bool:
    """Whether an argument is text: Python passes on bytes that are not UTF-8 as halves of surrogate pairs."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prepare_environment(name: str) -> None:
    """Take a folder for temporary files that is there, and refuse what tqdm cannot read as it is imported, or draw."""
    with suppress(OSError):  # MLX would go to the folder that the environment names, be there one or not
        os.environ["TMPDIR"] = tempfile.gettempdir()
    given = [f"{variable}={value}" for variable, value in os.environ.items() if variable.startswith("TQDM_")]
    try:
        if given:
            from tqdm import tqdm

            with tqdm(total=2000, initial=1000, file=io.StringIO(), unit_scale=True) as bar:
                bar.refresh()
    except Exception as error:
        fail(name, f"{', '.join(given)}: no progress bar can be drawn so ({first_line(error)})")


def _broken_import(error: BaseException) -> str | None:
    """Which library's import an exception ended, as what it cannot read in the environment does; None where it was
    none, or of a module of ours."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    module = str(frames[-1].f_globals["__name__"]) if frames else "__main__"
    return None if module.split(".")[0] in ("decode", "distill", "kernels", "__main__") else module


def _finish_computing() -> None:
    """Let MLX end what is queued: a process that exits while its threads run is aborted."""
    if "mlx.core" in sys.modules:
        with suppress(Exception):
            sys.modules["mlx.core"].synchronize()


def _reader_gone() -> NoReturn:
    """End without a word: what is still to be written at exit goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    raise SystemExit(128 + signal.SIGPIPE) from None


def _mend_streams() -> None:
    """Text that a terminal's encoding lacks is printed as `?`, and closed streams are no streams to trip over."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # or files opened later would be taken for streams
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:
            nothing = Path(os.devnull).open("r" if stream == "stdin" else "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, stream, nothing)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")


def fail(name: str, message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"{name}: error: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2)


def write_json(target: str | None, value: dict[str, Any]) -> None:
    """Write a command's results where --json asks for them."""
    if target is None:
        return
    if target == "-":
        sys.stdout.write(json.dumps(value, indent=1) + "\n")  # ASCII, whatever the terminal's encoding
        return
    path = Path(target)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    try:
        if path.is_file() or not path.exists():
            with replacing(path.resolve(), shared=True) as temporary:
                temporary.write_text(text, encoding="utf-8")
        else:  # a pipe or device is written where it is
            path.write_text(text, encoding="utf-8")
    except (OSError, UserError) as error:
        raise _cannot_be_written(target, error) from error


def _cannot_be_written(target: str, error: Exception) -> UserError:
    cause = error.__cause__ or error
    return UserError(f"--json {target}: cannot be written: {getattr(cause, 'strerror', cause)}")


def check_json_target(
    target: str | None, inputs: Iterable[str | Path | None] = (), folders: Iterable[Path | None] = ()
) -> None:
    """Find out before a long run that its results could not be written, or would replace what it reads or writes.
    inputs, folders: as `check_output` takes them."""
    if target is None or target == "-":
        return
    path = Path(target)
    if goes_round(path):
        raise UserError(f"--json {target}: goes through a link that leads back to itself")
    if path.is_dir():
        raise UserError(f"--json {target}: is a folder")
    folder = Path(os.path.realpath(path)).parent  # behind a link, as it is written
    if not folder.is_dir():
        raise UserError(f"--json {target}: the folder {folder} does not exist")
    check_output("--json", path, inputs, folders)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--json {target}: cannot be written: no permission")
    if path.is_file() or not path.exists():
        try:
            check_writable(path.resolve())
        except UserError as error:
            raise _cannot_be_written(target, error) from error


def say(quiet: bool) -> Callable[[str], None]:
    """A printer to standard error that --quiet silences."""

    def to_stderr(text: str) -> None:
        print(printable_lines(text), file=sys.stderr, flush=True)

    return (lambda text: None) if quiet else to_stderr


def progress(total: int | None, label: str, unit: str, quiet: bool, initial: int = 0, scale: bool = True) -> tqdm:
    """A bar on standard error with rate and ETA; scale: large counts are shown as 1.2k."""
    from tqdm import tqdm  # not before `run` has looked at its settings

    return tqdm(
        total=total, desc=label, unit=unit, unit_scale=scale, disable=quiet, initial=initial,
        file=sys.stderr, dynamic_ncols=True, smoothing=0.1,
    )  # fmt: skip


def text_sink(json_target: str | None) -> TextIO:
    """Where generated text goes: standard output, unless the JSON is to be alone there."""
    return sys.stderr if json_target == "-" else sys.stdout
