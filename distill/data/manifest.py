"""What `manifest.json` says of a dataset: the settings that decide its content, and every finished file."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from distill.data.settings import MOST_DRAWS, CollectSettings, complete_settings
from kernels.errors import UserError
from kernels.files import check_file

MANIFEST = "manifest.json"
FORMAT = 4
OLD_FORMATS = {1: 2, 3: 3}  # that are still read: the manifest's version (0.1.0 wrote 1), and its format
MAX_BITS = 25  # a packed value and the up to seven bits before it have to fit one 32-bit window
# What manifests began to pin after others had been written without it, and what no folder is named after: where one of
# these differs, the same command must find the folder and refuse it, or take the time from it.
PINNED_LATER = ("teacher_files", "teacher_files.tokenizer.json", "template_time")
SEAL = b',\n "sha256": "'  # what stands between a manifest and the hash of all before it, its last entry
SHARD_FILE = re.compile(r"(shard|reply)-\d{5,9}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class DatasetSettings:
    """All that decides a dataset's content, as plain JSON; two datasets with equal settings are equal.

    Every dataset has `teacher` {name, hash}, `tokenizer_hash` and `vocab_size`; shards also have `k` (of logits) or
    `sampled` (of draws), `temperatures` (1.0 first) and `seq_len`. Whoever collects adds the rest: the teacher's other
    files, sources, seeds, exclusions, budgets. Raises ValueError where one of these is missing or impossible.
    """

    values: dict[str, Any]

    def __post_init__(self) -> None:
        # A copy as JSON has it: tuples become lists, and later changes by the caller stay outside.
        object.__setattr__(self, "values", json.loads(json.dumps(self.values, allow_nan=False)))
        values = self.values
        teacher = values.get("teacher")
        if not isinstance(teacher, dict) or not all(isinstance(teacher.get(x), str) for x in ("name", "hash")):
            raise ValueError("settings: teacher must have a name and a hash")
        if not isinstance(values.get("tokenizer_hash"), str):
            raise ValueError("settings: tokenizer_hash is missing")
        if "template_time" in values:
            datetime.fromisoformat(str(values["template_time"]))
        whole = [name for name in ("vocab_size", "k", "sampled", "seq_len") if name in values or name == "vocab_size"]
        for name in whole:
            if type(values.get(name)) is not int or not 1 <= values[name] < 2**MAX_BITS:
                raise ValueError(f"settings: {name} is {values.get(name)!r}")
        if self.sampled is not None and ("k" in values or self.sampled > MOST_DRAWS):
            raise ValueError(
                f"settings: sampled is {self.sampled!r}, expected at most {MOST_DRAWS}, and no k beside it"
            )
        if values.keys() & {"k", "sampled"}:
            temperatures = values.get("temperatures")
            if "seq_len" not in values or values.get("k", 1) > self.vocab_size:
                raise ValueError("settings: shards need a seq_len, and a vocabulary of at least k tokens")
            if (
                not isinstance(temperatures, list)
                or temperatures[:1] != [1.0]
                or not all(_positive(t) for t in temperatures)
            ):
                raise ValueError(f"settings: temperatures are {temperatures!r}, expected 1.0 and then others above 0")

    @property
    def teacher_name(self) -> str:
        return self.values["teacher"]["name"]

    @property
    def teacher_hash(self) -> str:
        return self.values["teacher"]["hash"]

    @property
    def tokenizer_hash(self) -> str:
        return self.values["tokenizer_hash"]

    @property
    def vocab_size(self) -> int:
        return self.values["vocab_size"]

    @property
    def k(self) -> int:
        """Logits kept a position; KeyError of draws."""
        return self.values["k"]

    @property
    def sampled(self) -> int | None:
        """Ids drawn a position; None of logits."""
        return self.values.get("sampled")

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(float(t) for t in self.values["temperatures"])

    @property
    def seq_len(self) -> int:
        return self.values["seq_len"]

    def difference(self, other: "DatasetSettings") -> tuple[str, Any, Any] | None:
        """The first setting that differs, as (dotted name, value here, value there); None if none does. Either may be
        of an older version: what it does not know was at its default, or is not known."""
        here, there = (_flat("", complete_settings(settings.values)) for settings in (self, other))
        unknown = [
            one for one in PINNED_LATER if not all(any(_is_of(one, name) for name in flat) for flat in (here, there))
        ]
        for name in [*here, *(name for name in there if name not in here)]:
            if any(_is_of(one, name) for one in unknown):
                continue
            if here.get(name, "absent") != there.get(name, "absent"):
                return name, here.get(name, "absent"), there.get(name, "absent")
        return None


def _is_of(setting: str, name: str) -> bool:
    """Whether a dotted name is a setting's, or of a part of it."""
    return f"{name}.".startswith(f"{setting}.")


def _positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0


def _flat(name: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}, with empty containers kept as values."""
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else key, value[key]) for key in sorted(value)]
    elif isinstance(value, list):
        parts = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return {key: leaf for part in parts for key, leaf in _flat(*part).items()} if parts else {name: value}


CHANGED = "was changed since it was written (its own sha256 differs): put a copy back, or begin anew"


class DamagedManifest(UserError):
    """The folder is a dataset, but its manifest cannot be trusted."""


@dataclass(frozen=True)
class Entry:
    """One finished file.

    Of a reply dataset, rows and documents are its examples.
    """

    file: str
    rows: int
    tokens: int  # positions that are not padding
    trained_tokens: int
    documents: int
    sha256: str
    bytes: int
    device: str = ""  # what computed it, where machines of several kinds work on one dataset

    @cached_property
    def text(self) -> str:
        """Its lines in a manifest, which are written again with every further file."""
        values = {name: value for name, value in asdict(self).items() if name != "device" or value}
        return "  " + json.dumps(values, indent=1, ensure_ascii=False).replace("\n", "\n  ")

    @property
    def index(self) -> int:
        return int(self.file.split("-")[1].split(".")[0])


@dataclass(frozen=True)
class ScoredFrom:
    """The reply dataset that shards were scored from: the name its settings give it, and its manifest's sha256."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Omission:
    """What of a source is not in the dataset, or ends early, for one reason: how many, and which was the first."""

    source: str
    reason: str
    count: int
    first: str

    def told(self, what: str) -> str:
        """In a line; what: happened to them."""
        return f"{self.source}: {self.count:,} {what}, {self.reason} (the first: {self.first})"


@dataclass
class Manifest:
    """What `manifest.json` says. `kind` is "shards" or "replies" and names the files as well.

    scored_from: of shards, the reply datasets that their tokens come from, once those are complete. left_out: of
    complete replies, what was met in the sources and not used; cut: of those, conversations that end early. machine:
    on which it was begun, as far as that decides bits: device, instruction set, versions; empty where that is not
    known. sealed: whether it ends with its own hash; one that was begun without goes on without, since others hold its
    bytes' hash.
    """

    kind: str
    settings: DatasetSettings
    entries: dict[int, Entry] = field(default_factory=dict)
    complete: bool = False
    scored_from: tuple[ScoredFrom, ...] = ()
    left_out: tuple[Omission, ...] = ()
    cut: tuple[Omission, ...] = ()
    machine: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    sealed: bool = True
    read_as: str = ""  # sha256 of the bytes that it was read from

    def __post_init__(self) -> None:
        if self.kind == "shards" and not self.settings.values.keys() & {"k", "sampled"}:
            raise ValueError("settings: shards need k or sampled, temperatures and seq_len")

    @staticmethod
    def file_of(kind: str, index: int) -> str:
        return f"{'shard' if kind == 'shards' else 'reply'}-{index:05d}.safetensors"

    def dump(self) -> bytes:
        scored_from = {"scored_from": [asdict(replies) for replies in self.scored_from]} if self.scored_from else {}
        left_out = {"left_out": [asdict(omission) for omission in self.left_out]} if self.left_out else {}
        cut = {"cut": [asdict(omission) for omission in self.cut]} if self.cut else {}
        content = {
            "format": f"bitdraft {self.kind}",
            "version": FORMAT,
            "complete": self.complete,
            "settings": self.settings.values,
            **({"machine": self.machine} if self.machine else {}),
            **scored_from,
            **left_out,
            **cut,
            "shards": [],
        }
        text = json.dumps(content, indent=1, ensure_ascii=False).removesuffix("\n}")
        if self.entries:
            lines = ",\n".join(self.entries[index].text for index in sorted(self.entries))
            text = f"{text.removesuffix('[]')}[\n{lines}\n ]"
        data = text.encode()
        return (data + SEAL + _end_of(data) if self.sealed else data + b"\n}") + b"\n"

    @classmethod
    def read(cls, folder: Path, kind: str | None = None, *, changed: bool = False) -> "Manifest":
        """The manifest of a folder that holds `kind`, or either kind if it is None; one that was changed since it was
        written only where `changed` says so.

        Raises UserError if the folder holds no such dataset, or an unfinished one of an older format; DamagedManifest
        if the manifest is broken, or says nothing of a dataset whose files are beside it.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise UserError(f"{folder}: no such dataset folder")
        wrong = DamagedManifest if any(SHARD_FILE.fullmatch(file.name) for file in folder.iterdir()) else UserError
        try:
            check_file(path)
            data = path.read_bytes()
            content = json.loads(data)
        except UserError as error:
            raise wrong(str(error)) from None
        except FileNotFoundError:
            raise wrong(f"{path}: missing, so this is not a dataset") from None
        except OSError as error:
            raise wrong(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise wrong(f"{path}: not valid JSON ({error})") from None
        found = content.get("format") if isinstance(content, dict) else None
        if found not in ("bitdraft shards", "bitdraft replies"):
            raise wrong(f"{path}: not a manifest of bitdraft's")
        version = content.get("version")
        if version != FORMAT and (type(version) is not int or version not in OLD_FORMATS):
            raise UserError(f"{path}: format version {version!r}, this is for version {FORMAT}")
        if kind is not None and found != f"bitdraft {kind}":
            raise UserError(f"{folder}: holds {found.split()[1]}, not {kind}")
        if version != FORMAT and content.get("complete") is not True:
            raise UserError(
                f"{folder}: is an unfinished dataset of the older format {OLD_FORMATS[version]}, which this version"
                " cannot go on with; begin anew in another folder, or delete this one"
            )
        try:
            manifest = cls(
                found.split()[1],
                DatasetSettings(content["settings"]),
                complete=content["complete"] is True,
                scored_from=tuple(_scored_from(entry) for entry in content.get("scored_from", [])),
                left_out=tuple(_omission(entry) for entry in content.get("left_out", [])),
                cut=tuple(_omission(entry) for entry in content.get("cut", [])),
                machine=_machine(content.get("machine", {})),
                format=OLD_FORMATS.get(version, FORMAT),
                sealed=SEAL in data,
                read_as=hashlib.sha256(data).hexdigest(),
            )
            for line in content["shards"]:
                manifest._list(Entry(**line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = error if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise DamagedManifest(f"{path}: is damaged ({what})") from None
        if not changed and is_changed(data):
            raise DamagedManifest(f"{path}: {CHANGED}")
        return manifest

    def _list(self, entry: Entry) -> None:
        # Only names this program gives are accepted, so no name can lead out of the folder.
        if not SHARD_FILE.fullmatch(entry.file) or entry.file != self.file_of(self.kind, entry.index):
            raise ValueError(f"{entry.file!r} is not the name of a shard in this folder")
        counts = (entry.rows, entry.tokens, entry.trained_tokens, entry.documents, entry.bytes)
        if any(type(count) is not int or count < 0 for count in counts) or not all(
            isinstance(text, str) for text in (entry.sha256, entry.device)
        ):
            raise ValueError(f"{entry.file} has an impossible count, hash or device")
        if entry.index in self.entries:
            raise ValueError(f"{entry.file} is listed twice")
        self.entries[entry.index] = entry


def is_changed(data: bytes) -> bool:
    """Whether the bytes of a manifest are others than those that were written, as far as its hash tells. Until format 4
    had one, `shards` was the last entry."""
    body, seal, end = data.rpartition(SEAL)
    if seal:
        return end != _end_of(body) + b"\n"
    content = json.loads(data)
    return bool(content["version"] == FORMAT and next(reversed(content)) != "shards")


def _end_of(body: bytes) -> bytes:
    """What stands behind the seal of a manifest, but for the last end of line."""
    return f'{hashlib.sha256(body).hexdigest()}"\n}}'.encode()


def _machine(values: dict[str, str]) -> dict[str, str]:
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"machine: {values!r} holds what is no text")
    return values


def _scored_from(values: dict[str, str]) -> ScoredFrom:
    replies = ScoredFrom(**values)
    if not isinstance(replies.sha256, str) or Path(replies.name).name != replies.name:
        raise ValueError(f"scored_from: {values!r} is no reply dataset's name and hash")
    return replies


def _omission(values: dict[str, Any]) -> Omission:
    omission = Omission(**values)
    if type(omission.count) is not int or not all(
        isinstance(text, str) for text in (omission.source, omission.reason, omission.first)
    ):
        raise ValueError(f"left_out or cut: {values!r} is no source, reason, count and first document")
    return omission


def folder_name(prefix: str, settings: DatasetSettings) -> str:
    """The name that a dataset's folder has by default: prefix, teacher, and 8 digits that its settings decide.

    A dataset of the Hub counts by its name, whatever is uploaded meanwhile.
    """
    values: dict[str, Any] = {"format": FORMAT, **CollectSettings.without_added(settings.values)}
    for name in PINNED_LATER:
        values.pop(name, None)
    for name in ("sources", "exclude"):
        values[name] = [
            entry["name"] if isinstance(entry, dict) and entry.get("kind") == "hub" else entry
            for entry in values.get(name, [])
        ]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    return f"{prefix}-{Path(settings.teacher_name).name}-{digest}"
