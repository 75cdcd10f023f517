"""What a training run needs to go on after it was stopped, in files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from distill.provenance import completed, other_file
from distill.training.settings import TrainSettings
from distill.training.tensors import Tensors, load_tensors, save_tensors
from kernels.errors import UserError
from kernels.files import TEMPORARY, cannot_write, read_json, sha256, sync, write_atomic

LOG, CURVES = "log.jsonl", "curves.png"  # beside a draft
STATE = "state"  # the folder of a run that is not finished, beside its draft
RUN = "run.json"
OF_LOG = b'{"kind": "'  # what its lines begin with
OURS = re.compile(r"run\.json|(step|best)-\d+\.safetensors|" + re.escape(TEMPORARY) + ".*")


class State:
    """Weights, AdamW's moments, the best weights so far, and the step they belong to.

    `run.json` names the tensor files it belongs with and is replaced last, so a kill at any
    instant leaves the state before or after. fingerprint: settings, data and, where it is not that of
    the data, the teacher; a run goes on only with an equal one. Randomness needs no saving: data
    order is a function of seed and step.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self.step, self.best_step = 0, 0
        self.best_loss: float | None = None
        self.best_live: float | None = None  # tokens a verification, where they are measured
        self.best_weights: Tensors | None = None
        self.tensors: dict[str, Tensors] = {}
        self._run: dict[str, Any] = {}  # what run.json says

    @classmethod
    def open(cls, folder: Path, fingerprint: dict[str, Any]) -> State:
        """The state in a folder, or a new one. UserError where it is of another run."""
        state = cls(folder, fingerprint)
        if (folder / RUN).is_file():
            check_begun(folder, fingerprint, "give another --out or delete it")
            run = read_json(folder / RUN)
            try:
                state.step, state.best_step = int(run["step"]), int(run["best_step"])
                state.best_loss = None if run["best_loss"] is None else float(run["best_loss"])
                state.best_live = None if run.get("best_live") is None else float(run["best_live"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{folder / RUN}: damaged ({error}); delete {folder} to start over") from error
            state._run = run
        curves = folder.parent / CURVES
        state._run.setdefault("curves", [sha256(curves)] if curves.is_file() else [])  # as `check_shown` takes it
        if not (folder / RUN).is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{cannot_write(error)} {folder} ({error.strerror})") from error
            state.write_run(b"")
        return state

    @property
    def weights(self) -> Tensors:
        return self.tensors["weights"]

    def begin(self, weights: Tensors) -> None:
        """Start from these weights, with moments of zero."""
        self.tensors = {"weights": weights} | {
            part: {name: mx.zeros_like(w) for name, w in weights.items()} for part in ("m", "v")
        }

    def read(self) -> None:
        """Load the tensors of the step that run.json names."""
        self.tensors = {"weights": {}, "m": {}, "v": {}}
        for name, array in self._load(self._file("step", self.step)).items():
            part, _, rest = name.partition(":")
            self.tensors.setdefault(part, {})[rest] = array
        if self.best_loss is not None:
            self.best_weights = self._load(self._file("best", self.best_step))

    def offer(self, step: int, loss: float, live: float | None) -> None:
        """Keep the present weights if they are the best so far: those that emit most tokens a verification, and of
        these, or where that is not measured, those with the lowest held-out loss."""
        if self.best_loss is None or (-(live or 0.0), loss) < (-(self.best_live or 0.0), self.best_loss):
            self.best_step, self.best_loss, self.best_live = step, loss, live
            self.best_weights = dict(self.weights)

    def save(self, step: int) -> None:
        """Write the state after `step` steps."""
        self.step = step
        whole = {f"{part}:{name}": array for part, group in self.tensors.items() for name, array in group.items()}
        current = {RUN}
        for kind, number, tensors in (("step", step, whole), ("best", self.best_step, self.best_weights)):
            path = self._file(kind, number)
            current.add(path.name)
            if tensors is not None and not (kind == "best" and path.exists()):
                save_tensors(path, tensors)
        log = self.folder.parent / LOG
        sync(log)  # or a power cut could leave less of it than is said here
        self.write_run(log.read_bytes())
        _remove(self.folder, but=current)

    def _file(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}-{step}.safetensors"

    def _load(self, path: Path) -> Tensors:
        try:
            return load_tensors(path)
        except UserError as error:
            raise UserError(f"{error}; delete {self.folder} to start over") from error

    def note_picture(self, picture: Path) -> None:
        """Say that this is one of ours, before it takes the place of the last one."""
        self._run["curves"] = [*self._run["curves"][-1:], sha256(picture)]
        self._replace_run()

    def write_run(self, log: bytes) -> None:
        """Write run.json. log: what log.jsonl holds."""
        self._run = {
            "identity": self.fingerprint,
            "step": self.step,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "best_live": self.best_live,
            "log": {"bytes": len(log), "sha256": hashlib.sha256(log).hexdigest()},
            "curves": self._run["curves"],
        }
        self._replace_run()

    def _replace_run(self) -> None:
        write_atomic(self.folder / RUN, (json.dumps(self._run, indent=1) + "\n").encode())


def check_shown(out: Path) -> None:
    """UserError where the log or the picture of a run that goes on in `out` is not as the run left it: it would be
    replaced. What a run of an older version left is taken as its own, but lines of a log that no run writes."""
    try:
        run = read_json(out / STATE / RUN)
    except UserError:
        run = {}
    kept, log, curves = run.get("log"), out / LOG, out / CURVES
    for path in (log, curves):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is in the way: bitdraft did not write it; move it elsewhere")
    content = log.read_bytes() if log.is_file() else b""
    size, digest = (kept.get("bytes"), kept.get("sha256")) if isinstance(kept, dict) else (None, None)
    whole = not content or type(size) is not int or hashlib.sha256(content[:size]).hexdigest() == digest
    behind = content[size if type(size) is int else 0 :].split(b"\n")  # the last one may be cut short
    if not whole or not all(line.startswith(OF_LOG) or OF_LOG.startswith(line) for line in behind):
        raise UserError(f"{log}: was changed, and would be replaced; move it elsewhere")
    if "curves" in run and curves.exists() and sha256(curves) not in run["curves"]:
        raise UserError(f"{curves}: is not the run's, and would be replaced; move it elsewhere")


def check_begun(folder: Path, fingerprint: dict[str, Any], advice: str) -> None:
    """UserError where the state in a folder, if there is one, is of another run. fingerprint: without its data where
    they are not known yet; advice: what to do about it."""
    if not (folder / RUN).is_file():
        return
    begun = read_json(folder / RUN).get("identity")
    if "data" not in fingerprint and isinstance(begun, dict):
        begun = {name: value for name, value in begun.items() if name != "data"}
    if text := difference(begun, fingerprint):
        raise UserError(f"{folder.parent}: an unfinished run was begun there with {text}; {advice}")


def is_begun(folder: Path) -> bool:
    """Whether a folder holds the state of a run that was begun."""
    try:
        return "identity" in read_json(folder / RUN)
    except UserError:
        return False


def discard(folder: Path) -> None:
    """Remove the state of a run that is finished; the folder too, unless there is something else in it."""
    if is_begun(folder):
        _remove(folder)
        with suppress(OSError):
            folder.rmdir()


def _remove(folder: Path, but: Collection[str] = ()) -> None:
    """Delete the files of a state, which may lie elsewhere behind a link; nothing else that is there."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN):  # run.json says whose they are: last
        if OURS.fullmatch(path.name) and path.name not in but and not path.is_dir():
            path.unlink()


def of_finished(training: dict[str, Any]) -> dict[str, Any]:
    """Settings and teacher's files of a finished run, as its draft.json has them in `training`, for `difference`."""
    begun = {**training["settings"]} | {name: training[name] for name in ("teacher_files",) if name in training}
    return begun | ({"init": training["init"]["sha256"]} if "init" in training else {})


def difference(begun: Any, fingerprint: dict[str, Any]) -> str | None:
    """What an earlier run had that this one has not, in words; None where both make the same draft.

    begun: the fingerprint of that run, perhaps of an older version, which did what it did before settings that it does
    not know; the teacher's files are then taken to be as they were.
    """
    begun = TrainSettings.filled_up(begun if isinstance(begun, dict) else {})
    files, files_now = begun.pop("teacher_files", None), fingerprint.get("teacher_files")
    if files is not None and files_now is not None and (name := other_file(completed(files, files_now), files_now)):
        return f"another {name} of the teacher"
    fingerprint = {name: value for name, value in fingerprint.items() if name != "teacher_files"}
    for name in sorted(fingerprint.keys() | begun.keys()):
        was, now = begun.get(name), fingerprint.get(name)
        if was != now:
            return {"data": "other data", "teacher": "another --teacher", "init": "another --init"}.get(
                name, f"{name} = {was}, not {now}"
            )
    return None
