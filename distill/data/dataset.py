"""The store under every dataset: a folder of finished files and the manifest that lists them.

A file exists when its manifest line does. It is written under a temporary name, fsynced, renamed, and only then listed,
so that a process killed at any instant leaves a dataset as it was before or after one file. Nothing here depends on the
clock: equal settings give equal bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from distill.data.codec import Layout, Tensors
from distill.data.manifest import FORMAT, MANIFEST, SHARD_FILE, DatasetSettings, Entry, Manifest
from kernels.errors import UserError
from kernels.files import OF_SYSTEMS, TEMPORARY, check_file, lock_folder, make_folder, read_bytes, write_atomic

_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY)}(manifest\.json|(shard|reply)-\d+\.safetensors)")


@dataclass(frozen=True)
class Coded:
    """The content of a file, and what its manifest line says of it. device: see `Entry`."""

    data: bytes
    counts: dict[str, int]
    device: str = ""

    @classmethod
    def of(cls, tensors: Tensors, counts: dict[str, int], device: str = "") -> Self:
        return cls(save_tensors(tensors), counts, device)


class Writer:
    """Writes the files of one dataset, one process at a time; the kinds differ only in the tensors they hold."""

    kind: ClassVar[str]

    def __init__(self, folder: Path, manifest: Manifest, lock: int) -> None:
        self.folder, self.manifest, self._lock = folder, manifest, lock

    @classmethod
    def open(
        cls,
        folder: Path | str,
        settings: DatasetSettings,
        *,
        machine: dict[str, str] | None = None,
        mixed: bool = False,
        changed: bool = False,
    ) -> Self:
        """Begins a dataset, or goes on with one that was begun with the same settings.

        Listed files that have gone count as missing. One process at a time may write to a folder. machine: this one, as
        `Manifest` has it; mixed: go on, too, with what was begun on one that may compute other bits. changed: take a
        manifest that was changed since it was written as it is.
        Raises UserError for other settings, another machine, a foreign folder, one in use, and one not writable.
        """
        folder, manifest = Path(folder), Manifest(cls.kind, settings, machine=machine or {})
        try:
            make_folder(folder)
            writer = cls(folder, manifest, lock_folder(folder))
            try:
                writer._begin(mixed, changed)
            except BaseException:
                writer.close()
                raise
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror})") from None
        return writer

    def _begin(self, mixed: bool, changed: bool) -> None:
        """Takes up what the folder holds, and removes what a killed run left half done."""
        path = self.folder / MANIFEST
        names = {path.name for path in self.folder.iterdir()}
        for name in sorted(names):
            if (SHARD_FILE.fullmatch(name) or _TEMPORARY.fullmatch(name)) and (self.folder / name).exists():
                check_file(self.folder / name)
        if MANIFEST in names:
            self._resume(mixed, changed)
        elif foreign := sorted(name for name in names - OF_SYSTEMS if not _TEMPORARY.fullmatch(name)):
            raise UserError(f"{self.folder}: is no dataset and not empty (it holds {foreign[0]})")
        # A shard that is not listed stays until it is written again: it may be someone's.
        for name in names:
            if _TEMPORARY.fullmatch(name):
                (self.folder / name).unlink()
        data = self.manifest.dump()
        if MANIFEST not in names or path.read_bytes() != data:
            write_atomic(path, data)

    def _resume(self, mixed: bool, changed: bool) -> None:
        old = Manifest.read(self.folder, self.kind, changed=changed)
        if old.format != FORMAT:
            raise UserError(
                f"{self.folder}: is of the older format {old.format}, which this version reads but does not write;"
                " begin anew in another folder, or delete this one"
            )
        if difference := old.settings.difference(self.manifest.settings):
            name, was, now = difference
            raise UserError(f"{self.folder}: was begun with {name} = {_short(was)}, not {_short(now)}")
        for index, entry in list(old.entries.items()):
            path = self.folder / entry.file
            if not path.is_file() or path.stat().st_size != entry.bytes:
                del old.entries[index]
                old.complete = False
        here, there = self.manifest.machine, old.machine
        if here and there and not (mixed or old.complete):
            for name in dict.fromkeys([*there, *here]):
                if (was := there.get(name, "none")) != (now := here.get(name, "none")):
                    raise UserError(
                        f"{self.folder}: was begun with another {name} ({was}, not {now}), and bits may differ;"
                        " `distill collect --mixed` goes on, and names the device of what is made here"
                    )
        self.manifest = old

    @property
    def settings(self) -> DatasetSettings:
        return self.manifest.settings

    @property
    def finished_shards(self) -> int:
        return len(self.manifest.entries)

    def missing(self, total: int) -> list[int]:
        """The indices below `total` that are still to be written."""
        return [index for index in range(total) if index not in self.manifest.entries]

    def finish(self) -> None:
        """Marks the dataset complete."""
        if not self.manifest.complete:
            self._commit(self.manifest.entries, complete=True)

    def drop(self, indices: Collection[int]) -> None:
        """Takes shards out of the dataset, which is then incomplete, and deletes their files."""
        kept = {index: entry for index, entry in self.manifest.entries.items() if index not in indices}
        self._commit(kept, complete=False)
        for index in indices:
            (self.folder / Manifest.file_of(self.kind, index)).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets other processes write to the folder; so does the end of this process, however it comes."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def add(self, coded: Coded, index: int | None = None) -> Entry:
        """Writes a file as number `index`, by default the first that is missing. UserError if it cannot be written."""
        if index is None:
            index = self.missing(self.finished_shards + 1)[0]
        if index in self.manifest.entries:
            raise ValueError(f"shard {index} is finished already")
        file, digest = Manifest.file_of(self.kind, index), hashlib.sha256(coded.data).hexdigest()
        entry = Entry(file, **coded.counts, sha256=digest, bytes=len(coded.data), device=coded.device)
        write_atomic(self.folder / file, coded.data)
        self._commit({**self.manifest.entries, index: entry}, self.manifest.complete)
        return entry

    def _commit(self, entries: dict[int, Entry], complete: bool) -> None:
        self._write(replace(self.manifest, entries=entries, complete=complete))

    def _write(self, manifest: Manifest) -> None:
        write_atomic(self.folder / MANIFEST, manifest.dump())
        self.manifest = manifest  # only now: a full disk leaves memory and folder agreeing


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class Reader:
    """A dataset opened for reading."""

    kind: ClassVar[str]

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.settings, self.complete = folder, manifest.settings, manifest.complete
        self.format, self.scored_from = manifest.format, manifest.scored_from
        self.sha256 = manifest.read_as  # of the manifest, which another process may write meanwhile
        self.left_out, self.cut, self.machine = manifest.left_out, manifest.cut, manifest.machine
        self.shards = [manifest.entries[index] for index in sorted(manifest.entries)]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Raises UserError if the folder is missing, no dataset or of another version."""
        return cls(Path(folder), Manifest.read(Path(folder), cls.kind))

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.shards)

    def _tensors(self, i: int, verify: bool) -> Tensors:
        """The tensors of the i-th listed file. Raises UserError naming a file that is missing or changed."""
        entry = self.shards[i]
        path = self.folder / entry.file
        data = read_bytes(path)
        if len(data) != entry.bytes:
            raise UserError(f"{path}: has {len(data)} bytes, the manifest says {entry.bytes}")
        if verify and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(f"{path}: does not have the sha256 of the manifest (changed or damaged)")
        try:
            return load_tensors(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a safetensors file ({error})") from None

    def _expect(self, i: int, tensors: Tensors, layout: Layout) -> None:
        path = self.folder / self.shards[i].file
        if odd := sorted(tensors.keys() ^ layout.keys()):
            raise UserError(f"{path}: tensor {odd[0]} is missing or does not belong")
        for name, (dtype, shape) in layout.items():
            found = tensors[name]
            if found.dtype != dtype or found.shape != shape:
                is_, wanted = f"{found.dtype} {list(found.shape)}", f"{dtype} {list(shape)}"
                raise UserError(f"{path}: {name} is {is_}, expected {wanted}")
