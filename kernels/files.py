"""Files and folders that appear whole or not at all, with plain errors where they cannot."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kernels.errors import UserError, first_line

TEMPORARY = ".tmp-"  # what the names of files begin with that have not taken their place yet
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def json_hash(content: Any) -> str:
    """sha256 of JSON, whatever its white space and order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file that has one a line; a line that a kill cut short is left out."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except ValueError:
            continue
    return values


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Files


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, wholly or not at all. Raises UserError naming the folder."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file to write, beside `path` and with its suffix, that takes its place when the block ends well.

    shared: several processes may write it at once; otherwise what a killed one left is written over by the next. Raises
    UserError naming the folder where it cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{f'{os.getpid()}-' if shared else ''}{path.name}")
    try:
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync(path.parent)
    except OSError as error:
        raise UserError(f"{cannot_write(error)} {path.parent} ({path.name}: {error.strerror})") from error


def cannot_write(error: OSError) -> str:
    """What stands against writing, to be followed by the place."""
    return "no room left in" if error.errno in _NO_ROOM else "cannot write to"


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Folders


def lock_folder(folder: Path) -> int:
    """A descriptor that holds the folder's lock until it is closed or the process ends. Raises UserError if another
    process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process is writing to it") from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def holds_current(folder: Path) -> bool:
    """Whether a folder is the current one or above it, as the root always is: neither is ever replaced."""
    return Path.cwd().is_relative_to(os.path.realpath(folder))  # Path.resolve raises where links go round


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place, by renames, when the block ends well.

    folder: absolute, and not one that `holds_current`. Whatever is raised inside, OSError too, passes on, and `folder`
    is as it was; `recover_folder` undoes what a kill between the renames leaves.
    """
    for path in folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"):  # of processes that were killed
        number = path.name.removeprefix(f".{folder.name}.").removesuffix(".tmp")
        if number.isdigit() and not _runs(int(number)):
            shutil.rmtree(path, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    replaced = _replaced(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            if path.is_file():
                sync(path)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(folder)


def recover_folder(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    if not folder.exists() and _replaced(folder).is_dir():
        _replaced(folder).rename(folder)


def _replaced(folder: Path) -> Path:
    """Where a folder stands while another takes its place."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  ("." and ".." have no name; Path.absolute keeps "..")
    return folder.with_name(f".{folder.name}.replaced")


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # someone else's
        return True
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """A file or a folder of files again at another place: the old one stays valid meanwhile."""
    if source.is_dir():
        target.mkdir()
        for path in source.iterdir():
            link_or_copy(path, target / path.name)
    elif source.is_file():
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)
