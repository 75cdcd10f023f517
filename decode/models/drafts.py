"""Which draft a teacher gets: the one that was named, else the one measured fastest here, else the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode.metrics import VERSION
from decode.models.checkpoint import ROOT, RUNS, Checkpoint, find_model
from decode.models.formats import READER
from kernels.backends import backend
from kernels.device import device_name
from kernels.errors import UserError
from kernels.files import CONFIG, read_json

ABOUT, EVALUATION = "draft.json", "evaluation.json"
SHIPPED = ROOT / "checkpoints"


@dataclass(frozen=True)
class Choice:
    """A draft, and why it is that one."""

    draft: Checkpoint
    reason: str


def find_draft(name: str | None, teacher: Checkpoint) -> Choice:
    """A draft by path or Hub name, else the `default_draft`."""
    if name is None:
        return default_draft(teacher)
    draft = find_model(name, "--draft")
    return Choice(draft, "named by --draft" + ("; its training is not finished" if is_unfinished(draft) else ""))


def is_unfinished(draft: Checkpoint) -> bool:
    """Whether a draft is what an interrupted training has left."""
    try:
        return read_json(draft.folder / ABOUT).get("complete") is False
    except UserError:  # it does not say, as drafts of others don't
        return False


def newest_draft(teacher: Checkpoint | None, runs: Path = RUNS) -> Path | None:
    """The complete draft under `runs` that was written last, for this teacher or, where it is None, for any."""
    trained = [path for path in drafts_under(runs) if _made_for(path, teacher)]
    return max(trained, key=lambda path: path.stat().st_mtime).parent if trained else None


def default_draft(teacher: Checkpoint, runs: Path = RUNS) -> Choice:
    """Of the shipped drafts for this teacher and the complete ones under `runs`, the one with the highest speed-up that
    `distill evaluate` found on this device, replies that loop left out. Where none was evaluated: a shipped one, those
    that read their teacher's states before others, else the newest.

    Only evaluations count that this version's metrics made. Raises UserError where there is no draft.
    """
    shipped = [path.parent for path in sorted(SHIPPED.glob(f"*/{ABOUT}")) if _made_for(path, teacher)]
    shipped.sort(key=lambda folder: not _reads_teacher(folder))
    trained = [path.parent for path in drafts_under(runs) if _made_for(path, teacher)]
    speedups = _speedups(runs, [*shipped, *trained], teacher)
    measured = {folder: speedups[hash] for folder, hash in _hashes([*shipped, *trained], speedups)}
    if measured:
        best = max(measured, key=lambda folder: measured[folder])
        others = f" of {len(measured)} drafts" if len(measured) > 1 else ""
        reason = f"speed-up {measured[best]:.2f} by `distill evaluate` on this device, the highest{others}"
    elif shipped:
        best, reason = shipped[0], "the shipped one: none was evaluated on this device"
    elif newest := newest_draft(teacher, runs):
        best, reason = newest, "the newest: none was evaluated on this device"
    else:
        raise UserError(f"no draft for {teacher.name} under {runs}/ or {SHIPPED.name}/; train one or give --draft")
    return Choice(find_model(str(best), "--draft"), reason)


def _reads_teacher(folder: Path) -> bool:
    try:
        return read_json(folder / CONFIG).get("model_type") == READER
    except UserError:
        return False


def _hashes(folders: list[Path], wanted: dict[str, float]) -> Iterator[tuple[Path, str]]:
    """The drafts among `folders` whose weights' hash is wanted, and that hash."""
    for folder in folders if wanted else []:
        digest = Checkpoint(folder, folder.name, {}).weights_hash
        if digest in wanted:
            yield folder, digest


def _speedups(runs: Path, drafts: list[Path], teacher: Checkpoint) -> dict[str, float]:
    """By the hash of a draft's weights, the highest speed-up that was measured on this device with this teacher."""
    found: dict[str, float] = {}
    for report in _evaluations(runs, drafts):
        identity = report["identity"]
        if identity["teacher"] == teacher.weights_hash:
            speedup = float(report["without_looping"]["speedup"])
            found[identity["draft"]] = max(speedup, found.get(identity["draft"], 0.0))
    return found


def drafts_under(runs: Path) -> Iterator[Path]:
    """The draft.json of every draft under a folder, but those that a process killed while it saved one left hidden."""
    for path in runs.glob(f"**/{ABOUT}"):
        if not any(part.startswith(".") for part in path.relative_to(runs).parts):
            yield path


def _made_for(draft_json: Path, teacher: Checkpoint | None) -> bool:
    try:
        draft = read_json(draft_json)
    except UserError:
        return False
    made_for = draft.get("teacher") if draft.get("complete") else None
    return isinstance(made_for, dict) and (teacher is None or made_for.get("hash") == teacher.weights_hash)


def _evaluations(runs: Path, drafts: list[Path]) -> Iterator[dict[str, Any]]:
    """The complete evaluations under `runs`, or beside a draft, that this version's metrics made on this device."""
    here = {"device": device_name(), "backend": backend().NAME, "metrics_version": VERSION}
    here |= {"complete": True, "identical": True}
    paths = dict.fromkeys([*runs.glob(f"**/{EVALUATION}"), *(draft / EVALUATION for draft in drafts)])
    for path in paths:
        try:
            report = read_json(path)
            counts = all(report[name] == value for name, value in here.items())
            known = all(isinstance(report["identity"][name], str) for name in ("draft", "teacher"))
            if counts and known and report["without_looping"]["prompts"] and report["without_looping"]["speedup"] > 0:
                yield report
        except (UserError, LookupError, TypeError):
            continue  # something else of the user's, or one of an older version
