"""What a draft was made from and with: the part of draft.json that outlives the machine it was trained on."""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from decode.models.checkpoint import CARD, ROOT, Checkpoint
from decode.tokenizer import Tokenizer
from distill.data.joined import Datasets
from distill.data.manifest import DatasetSettings
from distill.data.shards import Dataset
from kernels import UserError, backend
from kernels.device import device_name, versions
from kernels.files import json_hash, read_json

CONVERTED = "converted.json"  # what `distill convert` leaves in a folder: where the model comes from
HUB = "https://huggingface.co"
LICENCE_KEYS = ("license", "license_name", "license_link")
CONFIG_FILES = ("config.json", "generation_config.json")
RULES = "tokenizer.json"  # stands for a tokenizer's rules; what was begun before they were kept does not know them
FORMS_PROMPTS = ("chat template", "tokenizer.json or tokenizer_config.json", RULES)
# What tools write into these as they save a model again, and no model reads.
BOOKKEEPING = ("_name_or_path", "_from_model_config", "transformers_version")
ORIGIN_KEYS = ("repo", "revision", *LICENCE_KEYS)
# Where the Hub's client keeps what it downloads: models--OWNER--NAME/snapshots/COMMIT.
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})")


def this_machine() -> dict[str, str]:
    """What of this machine decides bits, beside the command and the teacher."""
    versions_here, chosen = versions(), backend()
    return {name: versions_here[name] for name in ("bitdraft", "mlx")} | {
        "device": f"{device_name()} ({chosen.NAME})",
        "instruction set": _instruction_set(chosen.NAME),
    }


def _instruction_set(kernels: str) -> str:
    if kernels != "cpu":
        return "of the device"
    from kernels.cpu import _native

    return _native.isa()


def teacher_files(tokenizer: Tokenizer) -> dict[str, str]:
    """sha256 of what decides, beside weights and table of tokens, how a teacher reads and answers a prompt: what its
    config files hold, its chat template, and what its tokenizer's files make of text, however they are written."""
    template = tokenizer.template_hash
    return (
        config_hashes(tokenizer.folder)
        | ({} if template is None else {FORMS_PROMPTS[0]: template})
        | {FORMS_PROMPTS[1]: tokenizer.spelling_hash, RULES: tokenizer.rules_hash}
    )


def other_file(begun: dict[str, Any], now: dict[str, str]) -> str | None:
    """The first, by name, of two `teacher_files` that differs; None where none does."""
    return min((name for name in begun.keys() | now.keys() if begun.get(name) != now.get(name)), default=None)


def check_same_teacher(tokenizer: Tokenizer, begun: dict[str, Any]) -> None:
    """UserError where a teacher's files are not those of the `teacher_files` with which a work was begun."""
    if name := other_file(begun, teacher_files(tokenizer)):
        raise UserError(f"{tokenizer.folder}: its {name} was changed meanwhile: put it back, or begin anew")


def completed(begun: dict[str, Any], now: dict[str, str]) -> dict[str, Any]:
    """The `teacher_files` of what was begun, perhaps by an older version: rules it does not know were those of now."""
    return {RULES: now[RULES]} | begun if RULES in now else begun


def config_hashes(folder: Path) -> dict[str, str]:
    """sha256 of what a model's config files hold, those that are there, whatever their spacing and order of keys."""
    contents = {name: read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}
    return {
        name: json_hash({key: value for key, value in content.items() if key not in BOOKKEEPING})
        for name, content in contents.items()
    }


def teacher_metadata(folder: Path, settings: DatasetSettings) -> dict[str, Any]:
    """The teacher of a dataset: name and hash; where the folder holds that very teacher, its `origin` too."""
    metadata: dict[str, Any] = {"name": settings.teacher_name, "hash": settings.teacher_hash}
    if Checkpoint(folder, folder.name, {}).weights_hash != settings.teacher_hash:
        return metadata
    return metadata | origin(folder)


def origin(folder: Path) -> dict[str, str]:
    """Where the model in a folder comes from: `repo` and `revision` on the Hub and the licence of its model card, as
    far as they are known. Of a conversion: those of what was converted, and its hash as `converted_from`."""
    original = _converted_from(folder)
    found = {key: original[key] for key in ORIGIN_KEYS if isinstance(original.get(key), str)}
    if isinstance(original.get("hash"), str):
        found["converted_from"] = original["hash"]
    elif snapshot := SNAPSHOT.search(folder.absolute().as_posix()):
        found |= {"repo": f"{snapshot['owner']}/{snapshot['name']}", "revision": snapshot["revision"]}
    return linked(found if found.keys() & LICENCE_KEYS else found | licence_of(folder))


def _converted_from(folder: Path) -> dict[str, Any]:
    try:
        original = read_json(folder / CONVERTED).get("from")
    except UserError:  # none, or damaged: then it says nothing
        return {}
    return original if isinstance(original, dict) else {}


def licence_of(folder: Path) -> dict[str, str]:
    """`license`, and `license_name` and `license_link` where it is no standard one, from a folder's model card."""
    from huggingface_hub import metadata_load

    if not (folder / CARD).is_file():
        return {}
    try:
        metadata = metadata_load(folder / CARD) or {}
    except Exception:  # a card is prose that someone wrote: one that cannot be read says nothing
        return {}
    return {key: metadata[key] for key in LICENCE_KEYS if isinstance(metadata.get(key), str)}


def linked(found: dict[str, str]) -> dict[str, str]:
    """The same with a `license_link` that leads somewhere from everywhere, where the repository is known."""
    link = found.get("license_link", "")
    if "repo" not in found or not link or urlsplit(link).scheme:
        return found
    path = posixpath.normpath(link.lstrip("/"))
    return found | {"license_link": f"{HUB}/{found['repo']}/blob/{found.get('revision', 'main')}/{path}"}


def licence_file(folder: Path, about: dict[str, Any]) -> Path | None:
    """The file of a folder that the `license_link` of its model names; None for other links, and where it is not there.

    A model card is no licence, whatever the link says."""
    link = about.get("license_link")
    name = posixpath.normpath(link) if isinstance(link, str) else ""
    path = folder / name
    return path if name not in ("", CARD) and Path(name).name == name and path.is_file() else None


def copy_licence(source: Path, target: Path, about: dict[str, Any], but: Collection[str] = ()) -> None:
    """Copy the licence that a model's `license_link` names to another folder of its files, unless its name is in `but`
    or taken."""
    path = licence_file(source, about)
    if path is not None and path.name not in but and not (target / path.name).exists():
        shutil.copyfile(path, target / path.name)


def data_metadata(data: Dataset | Datasets) -> dict[str, Any]:
    """What a draft learnt from: hash and tokens, and how it was collected; of several datasets each."""
    found: dict[str, Any] = {"sha256": data.sha256, "tokens": data.tokens}
    parts = data.parts if isinstance(data, Datasets) else (data,)
    if not all(part.complete for part in parts):
        found["complete"] = False
    if len(parts) > 1:
        return found | {"datasets": [data_metadata(part) for part in parts]}
    # Without what draft.json says elsewhere.
    settings = {key: value for key, value in data.settings.values.items() if key not in ("teacher", "tokenizer_hash")}
    return found | {"settings": settings}


def made_with() -> dict[str, Any]:
    """Device, versions, and the commit of bitdraft's checkout (None without git or outside one)."""
    return {"device": device_name(), "commit": _commit(), "versions": versions()}


def _commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", changed" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
