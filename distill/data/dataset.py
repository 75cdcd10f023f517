"""The store under every dataset, and the simplest thing kept in it: the replies of a teacher.

A dataset is a folder of finished shards and the manifest that lists them.
A shard exists when its manifest line does. Every file is written under a temporary name, fsynced,
renamed, and only then listed, so that a process killed at any instant leaves a dataset as it was
before or after one shard. Nothing here depends on the clock: equal settings give equal bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from distill.data import codec
from distill.data.codec import Settings
from kernels.errors import UserError
from kernels.files import TEMPORARY, lock_folder, write_atomic

MANIFEST = "manifest.json"
VERSION = 1
_SHARD = re.compile(r"(shard|reply)-\d{5,9}\.safetensors", re.ASCII)
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY)}(manifest\.json|(shard|reply)-\d+\.safetensors)")


class DamagedManifest(UserError):
    """The folder is a dataset, but its manifest cannot be trusted."""


@dataclass(frozen=True)
class Entry:
    """One finished shard. For replies, rows and documents are replies, and their answers are trained."""

    file: str
    rows: int
    tokens: int  # positions that are not padding
    trained_tokens: int
    documents: int
    sha256: str
    bytes: int

    @property
    def index(self) -> int:
        return int(self.file.split("-")[1].split(".")[0])


@dataclass
class Manifest:
    """What `manifest.json` says. `kind` is "shards" or "replies" and names the files as well."""

    kind: str
    settings: Settings
    entries: dict[int, Entry] = field(default_factory=dict)
    complete: bool = False

    def __post_init__(self) -> None:
        if self.kind == "shards" and "k" not in self.settings.values:
            raise ValueError("settings: shards need k, temperatures and seq_len")

    @staticmethod
    def file_of(kind: str, index: int) -> str:
        return f"{'shard' if kind == 'shards' else 'reply'}-{index:05d}.safetensors"

    def dump(self) -> bytes:
        listed = [asdict(self.entries[index]) for index in sorted(self.entries)]
        content = {
            "format": f"bitdraft {self.kind}",
            "version": VERSION,
            "complete": self.complete,
            "settings": self.settings.values,
            "shards": listed,
        }
        return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, folder: Path, kind: str) -> "Manifest":
        """Raises UserError if the folder holds no dataset of this kind, DamagedManifest if a broken one."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"{folder}: no such dataset folder")
        try:
            content = json.loads(path.read_bytes())
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(f"{folder}: not a dataset (no {MANIFEST})") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise DamagedManifest(f"{path}: not valid JSON ({error})") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found not in ("bitdraft shards", "bitdraft replies"):
            raise UserError(f"{path}: not a manifest of bitdraft's")
        if content.get("version") != VERSION:
            raise UserError(f"{path}: format version {content.get('version')!r}, this is for version {VERSION}")
        if found != f"bitdraft {kind}":
            raise UserError(f"{folder}: holds {found.split()[1]}, not {kind}")
        try:
            manifest = cls(kind, Settings(content["settings"]), complete=content["complete"] is True)
            for line in content["shards"]:
                manifest._list(Entry(**line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise DamagedManifest(f"{path}: is damaged ({what})") from None
        return manifest

    def _list(self, entry: Entry) -> None:
        # Only names this program gives are accepted, so no name can lead out of the folder.
        if not _SHARD.fullmatch(entry.file) or entry.file != self.file_of(self.kind, entry.index):
            raise ValueError(f"{entry.file!r} is not the name of a shard in this folder")
        counts = (entry.rows, entry.tokens, entry.trained_tokens, entry.documents, entry.bytes)
        if any(type(count) is not int or count < 0 for count in counts) or not isinstance(entry.sha256, str):
            raise ValueError(f"{entry.file} has an impossible count or hash")
        if entry.index in self.entries:
            raise ValueError(f"{entry.file} is listed twice")
        self.entries[entry.index] = entry


class Writer:
    """Writes the files of one dataset; the kinds of datasets differ only in the tensors they hold."""

    kind: ClassVar[str]

    def __init__(self, folder: Path, manifest: Manifest, lock: int) -> None:
        self.folder, self.manifest, self._lock = folder, manifest, lock

    @classmethod
    def open(cls, folder: Path | str, settings: Settings) -> Self:
        """Begins a dataset, or goes on with one that was begun with the same settings.

        Listed files that have gone count as missing. One process at a time may write to a folder.
        Raises UserError for other settings, a foreign folder, one in use, and one not writable.
        """
        folder, manifest = Path(folder), Manifest(cls.kind, settings)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writer = cls(folder, manifest, lock_folder(folder))
            try:
                writer._begin()
            except BaseException:
                writer.close()
                raise
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror})") from None
        return writer

    def _begin(self) -> None:
        """Takes up what the folder holds, and removes what a killed run left half done."""
        path = self.folder / MANIFEST
        names = {path.name for path in self.folder.iterdir()}
        if MANIFEST in names:
            self._resume()
        elif foreign := sorted(name for name in names if not _TEMPORARY.fullmatch(name)):
            raise UserError(f"{self.folder}: is no dataset and not empty (it holds {foreign[0]})")
        listed = {entry.file for entry in self.manifest.entries.values()}
        for name in names:
            if _TEMPORARY.fullmatch(name) or (_SHARD.fullmatch(name) and name not in listed):
                (self.folder / name).unlink()
        data = self.manifest.dump()
        if MANIFEST not in names or path.read_bytes() != data:
            write_atomic(path, data)

    def _resume(self) -> None:
        old = Manifest.read(self.folder, self.kind)
        if difference := old.settings.difference(self.manifest.settings):
            name, was, now = difference
            raise UserError(f"{self.folder}: was begun with {name} = {_short(was)}, not {_short(now)}")
        for index, entry in list(old.entries.items()):
            path = self.folder / entry.file
            if not path.is_file() or path.stat().st_size != entry.bytes:
                del old.entries[index]
                old.complete = False
        self.manifest = old

    @property
    def settings(self) -> Settings:
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

    def _add(self, index: int | None, tensors: codec.Tensors, counts: dict[str, int]) -> Entry:
        if index is None:
            index = self.missing(self.finished_shards + 1)[0]
        if index in self.manifest.entries:
            raise ValueError(f"shard {index} is finished already")
        data = save_tensors(tensors)
        file, digest = Manifest.file_of(self.kind, index), hashlib.sha256(data).hexdigest()
        entry = Entry(file, **counts, sha256=digest, bytes=len(data))
        write_atomic(self.folder / file, data)
        self._commit({**self.manifest.entries, index: entry}, self.manifest.complete)
        return entry

    def _commit(self, entries: dict[int, Entry], complete: bool) -> None:
        new = Manifest(self.kind, self.settings, entries, complete)
        write_atomic(self.folder / MANIFEST, new.dump())
        self.manifest = new  # only now: a full disk leaves memory and folder agreeing


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class Reader:
    """A dataset opened for reading."""

    kind: ClassVar[str]

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.settings, self.complete = folder, manifest.settings, manifest.complete
        self.shards = [manifest.entries[index] for index in sorted(manifest.entries)]

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Raises UserError if the folder is missing, no dataset or of another version."""
        return cls(Path(folder), Manifest.read(Path(folder), cls.kind))

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.shards)

    def _tensors(self, i: int, verify: bool) -> codec.Tensors:
        """The tensors of the i-th listed file. Raises UserError naming a file that is missing or changed."""
        entry = self.shards[i]
        path = self.folder / entry.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        if len(data) != entry.bytes:
            raise UserError(f"{path}: has {len(data)} bytes, the manifest says {entry.bytes}")
        if verify and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(f"{path}: does not have the sha256 of the manifest (changed or damaged)")
        try:
            return load_tensors(data)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: is not a safetensors file ({error})") from None

    def _expect(self, i: int, tensors: codec.Tensors, layout: codec.Layout) -> None:
        path = self.folder / self.shards[i].file
        if odd := sorted(tensors.keys() ^ layout.keys()):
            raise UserError(f"{path}: tensor {odd[0]} is missing or does not belong")
        for name, (dtype, shape) in layout.items():
            found = tensors[name]
            if found.dtype != dtype or found.shape != shape:
                is_, wanted = f"{found.dtype} {list(found.shape)}", f"{dtype} {list(shape)}"
                raise UserError(f"{path}: {name} is {is_}, expected {wanted}")


@dataclass(frozen=True)
class Reply:
    """What a teacher wrote to a prompt."""

    prompt: int  # which prompt of the source it answers, from 0
    tokens: np.ndarray  # int32 [n]: the prompt, then the answer with its end token
    prompt_length: int  # how many of the tokens are the prompt


def _reply_layout(replies: int, tokens: int, vocab_size: int) -> codec.Layout:
    number = (np.dtype(np.uint32), (replies,))
    return {
        "tokens": (codec.token_type(vocab_size), (tokens,)),
        "lengths": number,
        "prompt_lengths": number,
        "prompts": number,
    }


class ReplyWriter(Writer):
    """Writes replies batch by batch, so that generation killed at any instant goes on where it was."""

    kind = "replies"

    def write(self, replies: Sequence[Reply], index: int | None = None) -> Entry:
        """Writes a batch as file `index`, by default the first that is missing."""
        vocab_size = self.settings.vocab_size
        tokens = np.concatenate([np.zeros(0, np.int32), *(reply.tokens for reply in replies)])
        if tokens.dtype != np.int32 or (tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size):
            raise ValueError("tokens of replies must be int32 and within the vocabulary")
        if any(not 0 <= reply.prompt_length <= len(reply.tokens) for reply in replies):
            raise ValueError("a reply is shorter than its prompt")
        tensors = {
            "tokens": tokens.astype(codec.token_type(vocab_size)),
            "lengths": np.array([len(reply.tokens) for reply in replies], np.uint32),
            "prompt_lengths": np.array([reply.prompt_length for reply in replies], np.uint32),
            "prompts": np.array([reply.prompt for reply in replies], np.uint32),
        }
        return self._add(index, tensors, reply_counts(replies))


def reply_counts(replies: Sequence[Reply]) -> dict[str, int]:
    """What a manifest line says of replies."""
    tokens = sum(len(reply.tokens) for reply in replies)
    answers = tokens - sum(reply.prompt_length for reply in replies)
    return {"rows": len(replies), "tokens": tokens, "documents": len(replies), "trained_tokens": answers}


class Replies(Reader):
    """Replies opened for reading."""

    kind = "replies"

    def read(self, i: int, verify: bool = True) -> list[Reply]:
        """The replies of the i-th listed file. Raises UserError naming a file that is missing or wrong."""
        entry = self.shards[i]
        tensors = self._tensors(i, verify)
        self._expect(i, tensors, _reply_layout(entry.rows, entry.tokens, self.settings.vocab_size))
        lengths, prompts = tensors["lengths"].astype(np.int64), tensors["prompt_lengths"]
        tokens = tensors["tokens"].astype(np.int32)
        beyond = tokens.size and int(tokens.max()) >= self.settings.vocab_size
        if lengths.sum() != entry.tokens or (prompts > lengths).any() or beyond:
            raise UserError(f"{self.folder / entry.file}: lengths or tokens are impossible")
        parts = np.split(tokens, np.cumsum(lengths)[:-1]) if entry.rows else []
        facts = zip(tensors["prompts"], parts, prompts, strict=True)
        return [Reply(int(prompt), part, int(length)) for prompt, part, length in facts]

    def __iter__(self) -> Iterator[Reply]:
        """All replies in order."""
        for i in range(len(self.shards)):
            yield from self.read(i)
