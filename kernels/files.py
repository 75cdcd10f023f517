"""Files and folders that appear whole or not at all, with plain errors where they cannot."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kernels.errors import UserError, first_line

TEMPORARY = ".tmp-"  # what the names of files begin with that have not taken their place yet
OF_SYSTEMS = {"lost+found", ".DS_Store"}  # in the root of a disk; of a Mac's Finder
CONFIG = "config.json"  # makes a folder one of a model
BOM = b"\xef\xbb\xbf"  # a byte order mark: what editors on Windows put before UTF-8
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Files of models and datasets, which no results replace, and others that stand beside a model or belong to results.
OF_MODELS = {"manifest.json", "draft.json", "converted.json", CONFIG, "generation_config.json"} | {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json",
}  # fmt: skip
BESIDE_MODELS = {"added_tokens.json", "vocab.json", "chat_template.json", "published.json", "run.json"} | {
    "evaluation.json", "evaluation.md", "evaluation-categories.png", "evaluation-positions.png",
    "evaluation-unfinished.jsonl", "log.jsonl", "curves.png", "recipe.toml",
}  # fmt: skip


def check_file(path: Path) -> None:
    """UserError where something else stands in a file's place: a link that leads nowhere would be taken for no file,
    and a pipe be waited for."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: is a link that leads nowhere")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no file but a folder, pipe, socket or device")


def read_bytes(path: Path) -> bytes:
    """What a file holds. UserError where it cannot be read."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, perhaps behind a byte order mark, or a UserError that names it."""
    check_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value


def begins_with_bom(path: Path) -> bool:
    """Whether a byte order mark stands before a file's text: libraries that read it would fail, or take it for text."""
    with path.open("rb") as file:
        return file.read(len(BOM)) == BOM


def json_hash(content: Any) -> str:
    """sha256 of JSON, whatever its white space and order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json_lines(path: Path) -> list[Any]:
    """The values of a file that has one a line, or a UserError that names it; a line that a kill cut short is left
    out."""
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    values = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            values.append(json.loads(line))
    return values


def sha256(path: Path) -> str:
    """Hex digest of a file's content. UserError where it is no file."""
    check_file(path)
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
    temporary = temporary_for(path, shared)
    try:
        if path.exists() and not path.is_file():  # whoever may replace /dev/null would
            raise UserError(f"{path}: is no regular file, and would be replaced by one")
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


def expanded(name: str | Path) -> Path:
    """A path that a user gave and no shell has looked at: `~` is a user's own folder."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  (Path.expanduser raises for an unknown ~user)


def real_path(path: Path) -> Path:
    """Where a path leads, be it through links: what is replaced there stays where the user put it."""
    return Path(os.path.realpath(path))  # Path.resolve raises where links go round


def temporary_for(path: Path, shared: bool = False) -> Path:
    """Where a file lies until it takes its place. A long name has a short one there: file systems limit names."""
    name = os.fsencode(path.name)
    short = path.name if len(name) <= 100 else hashlib.sha256(name).hexdigest() + path.suffix[:20]
    return path.with_name(f"{TEMPORARY}{f'{os.getpid()}-' if shared else ''}{short}")


def check_writable(path: Path) -> None:
    """UserError where `replacing(path, shared=True)` would fail: no room, no right, or too long a name."""
    temporary = temporary_for(path, shared=True)
    try:
        path.exists()  # raises where the name is too long
        try:
            temporary.write_bytes(b"0")  # takes a block of the disk
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{cannot_write(error)} {path.parent} ({path.name}: {error.strerror})") from error


def check_output(
    option: str, path: Path, inputs: Iterable[str | Path | None] = (), folders: Iterable[Path | None] = ()
) -> None:
    """UserError, naming the option, where what a command is asked to write to `path` would take the place of something
    that it reads, or that a model, a dataset or the command's other results consist of.

    inputs: files that it reads, and folders of documents, into which nothing may come: what a source has would be
    another the next time. folders: those that it writes to. Of a model or a dataset, be it one of the command's or not,
    only a `.json` of another name than any of theirs is written.
    """
    real = Path(os.path.realpath(path))
    for name in (Path(given) for given in inputs if given):
        if name.is_dir() and real.is_relative_to(os.path.realpath(name)):
            raise UserError(f"{option} {path}: lies in {name}, which is read; choose another place")
        if name.is_file() and path.exists() and path.samefile(name):
            raise _replaces(option, path)
    if path.is_file() and os.path.samestat(path.stat(), os.fstat(0)):  # redirected to standard input
        raise _replaces(option, path)
    written = {os.path.realpath(folder) for folder in folders if folder}
    for place in (path, real):
        is_model_file = place.name in OF_MODELS or place.suffix == ".safetensors"
        named = is_model_file or place.name in BESIDE_MODELS
        if path.is_file() and is_model_file:
            raise _replaces(option, path)
        if named or place.suffix != ".json":
            if os.path.realpath(place.parent) in written:
                raise UserError(f"{option} {path}: could be one of the files that are written there; give another name")
            if _holds_tensors(place.parent):
                raise UserError(f"{option} {path}: could be a file of the model or dataset there; give another name")


def _replaces(option: str, path: Path) -> UserError:
    return UserError(f"{option} {path}: is what commands read, and would be replaced; give another name")


def _holds_tensors(folder: Path) -> bool:
    """Whether a folder is one of a model, of a draft in training or of a dataset."""
    return any(any(folder.glob(name)) for name in ("*.safetensors", "draft.json", "state/run.json"))


def cannot_write(error: OSError) -> str:
    """What stands against writing, to be followed by the place."""
    return "no room left in" if error.errno in NO_ROOM else "cannot write to"


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, value: Any) -> None:
    """Add a value as a line of JSON. Raises UserError naming the folder."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise UserError(f"{cannot_write(error)} {path.parent} ({path.name}: {error.strerror})") from error


# Folders


def make_folder(folder: Path) -> None:
    """Make a folder where there is none, also where a link leads to. UserError where it cannot be one."""
    if goes_round(folder):
        raise UserError(f"{folder}: goes through a link that leads back to itself")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder")
    real_path(folder).mkdir(parents=True, exist_ok=True)


def own_name(path: Path) -> str:
    """The name that a file or folder has itself, be it reached as `.` or through a link. UserError where it is not
    UTF-8: no manifest or report could hold it."""
    name = real_path(path).name
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: its name, {os.fsencode(name)!r}, is not valid UTF-8") from None
    return name


def goes_round(path: Path) -> bool:
    """Whether links on the way to a path lead back to themselves."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


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


@contextmanager
def working_in(folder: Path, room: float = 0) -> Iterator[None]:
    """Make a folder and hold its lock. What would fail at the end of long work is tried at its start: writing,
    renaming, and whether there is `room`, in bytes.

    UserError names the folder. One that was made and is empty in the end goes again.
    """
    made = not folder.exists()
    try:
        lock = _begin(folder, room)
        try:
            yield
        finally:
            os.close(lock)
    finally:
        if made:
            with suppress(OSError):
                folder.rmdir()


def _begin(folder: Path, room: float) -> int:
    """Make, lock and try a folder; the lock's descriptor."""
    try:
        make_folder(folder)
        lock = lock_folder(folder)
        try:
            tried = folder / f"{TEMPORARY}tried"
            write_atomic(tried, b"whether this can be written")
            tried.unlink()
            check_room(folder, room)
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise UserError(f"{cannot_write(error)} {folder} ({error.strerror})") from error
    return lock


def check_room(folder: Path, room: float) -> None:
    """UserError where there are less than `room` bytes for a folder, be it made or not."""
    real = real_path(folder)
    disk = shutil.disk_usage(next(path for path in (real, *real.parents) if path.exists()))
    if disk.free < room and disk.total:  # some file systems do not tell
        raise UserError(f"no room left in {folder}: {room / 1e9:.2f} GB are needed, {disk.free / 1e9:.2f} free")


def stored_bytes(folder: Path) -> int:
    """What the tensors in a folder, if there is one, take of the disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())


def holds_current(folder: Path) -> bool:
    """Whether a folder is the current one or above it, as the root always is: neither is a model's own."""
    return Path.cwd().is_relative_to(real_path(folder))


@contextmanager
def replacing_files(folder: Path, record: str) -> Iterator[Path]:
    """An empty folder whose files take their places in `folder` when the block ends well: all of them or none.

    record: the JSON file whose `files` lists, by their hashes, those that a folder has of ours. What it listed before
    and is not there any more goes; all else in `folder` stays. A kill while files take their places leaves no
    config.json, so nothing that could be taken for a model, and `finish_replacing` ends what was begun.
    """
    new, whole = _waiting(folder, "new", record), _waiting(folder, "whole", record)
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        new.mkdir()
        yield new
        for path in new.iterdir():
            sync(path)
        sync(new)
        new.rename(whole)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    finish_replacing(folder, record)


def finish_replacing(folder: Path, record: str) -> bool:
    """Let the files take their places that a kill kept from it; whether there were any."""
    whole = _waiting(folder, "whole", record)
    if not whole.is_dir():
        return False
    waiting = {path.name for path in whole.iterdir()}
    if record in waiting:  # else the folder's is the new one already, and lists what has taken its place
        gone = listed_files(folder / record).keys() - waiting
        for name in (*waiting & {CONFIG}, *gone, record):  # no model from here on, until all is in its place
            (folder / name).unlink(missing_ok=True)
    for name in sorted(waiting, key=lambda name: (name == record, name == CONFIG)):
        (whole / name).replace(folder / name)
    sync(folder)
    whole.rmdir()
    return True


def _waiting(folder: Path, how: str, record: str) -> Path:
    """Where files wait to take their places, all of them written in "whole"; a folder may have several records."""
    return folder / f"{TEMPORARY}{how}-{record}"


def listed_files(record: Path) -> dict[str, str]:
    """Names and hashes of the files of ours in a folder, as its record lists them; none where it does not say."""
    try:
        files = read_json(record).get("files")
    except UserError:
        return {}
    return {n: h for n, h in files.items() if Path(n).name == n} if isinstance(files, dict) else {}


def unlisted_files(folder: Path, record: str) -> set[str]:
    """The names in a folder that its record does not list: they are not ours."""
    return {path.name for path in folder.iterdir()} - listed_files(folder / record).keys()


def check_own_files(folder: Path, record: str, names: Collection[str]) -> None:
    """UserError where writing `names` and weights into a folder would replace files that are not ours, or that were
    edited, and where other weights would be read with them.

    Ours are those that the folder's record lists. Weights of ours that differ are damaged, not edited.
    """
    listed = listed_files(folder / record)
    for path in sorted(folder.iterdir()):
        weights = path.match("model*.safetensors")
        if not (weights or path.name in names or path.name in listed):
            continue
        if not path.is_file() or path.name not in listed:
            raise UserError(f"{path}: is in the way: bitdraft did not write it; move it elsewhere")
        if not weights:
            check_unchanged(path, listed[path.name])


def named_by_users(folder: Path) -> set[str]:
    """The names in a folder, without the files that a process was killed over, and what systems put there."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(TEMPORARY)} - OF_SYSTEMS


def check_unchanged(path: Path, digest: str) -> None:
    """UserError where a file of ours is not as we wrote it, and would be replaced."""
    if not path.is_file() or sha256(path) != digest:
        raise UserError(f"{path}: was changed, and would be replaced; move it elsewhere")
