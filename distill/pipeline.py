"""`distill run`: collect, train and evaluate as a recipe says, skipping what is done.

A stage is done when its folder holds the whole of what the same settings would make. Nothing that was made under
other settings is overwritten.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from decode.models.checkpoint import Checkpoint, find_model
from decode.models.drafts import ABOUT
from decode.tokenizer import Tokenizer
from distill.data.collect import Collector, Plan, plan_collection
from distill.data.manifest import FORMAT, MANIFEST
from distill.data.ranks import Ranks
from distill.data.reply_pass import Progress
from distill.data.shards import Dataset
from distill.provenance import teacher_files, this_machine
from distill.recipe import RECIPE_FILE, STAGES, Recipe
from distill.release.evaluate import (
    REPORT,
    check_evaluation_folder,
    check_report,
    evaluate,
    fingerprint,
    finished_report,
    select,
)
from distill.training.checkpoint import load, read_shape, start_hash
from distill.training.draft_config import DraftConfig
from distill.training.run import check_room, check_start, train, working_on_draft
from distill.training.settings import TrainSettings
from distill.training.state import STATE, check_begun, difference, discard, is_begun, of_finished
from kernels.backends import device_backend
from kernels.console import say
from kernels.errors import UserError
from kernels.files import CONFIG, read_json, sha256, write_atomic

OTHERWISE = "give the recipe another `out`, or delete it"


@dataclass(frozen=True)
class Stage:
    """One stage: where its output is, whether that is whole, what makes it, and what to report of it.

    done raises UserError where the folder holds the output of other settings.
    """

    folder: Path
    done: Callable[[], bool]
    run: Callable[[], None]
    figures: Callable[[], dict[str, Any]]


class Pipeline:
    """A recipe and the teacher it names."""

    def __init__(
        self, recipe: Recipe, teacher: Checkpoint, quiet: bool, progress: Progress, collected: Callable[[], None]
    ) -> None:
        """progress: told of a collection's progress, as `Collector` tells it; collected: called when it ends."""
        self.recipe, self.teacher, self.quiet = recipe, teacher, quiet
        self.progress, self.collected = progress, collected
        self.stages = {
            "collect": Stage(recipe.dataset, self._collected, self._collect, self._collect_figures),
            "train": Stage(recipe.draft, self._trained, self._train, self._train_figures),
            "evaluate": Stage(recipe.evaluation, self._evaluated, self._evaluate, self._evaluate_figures),
        }

    def run(self, start: str = STAGES[0]) -> list[dict[str, Any]]:
        """Do the stages from `start` on; what is before it is taken as it is. Returns a record of each.

        What the recipe gets wrong is refused before the first stage, not after hours of one. KeyboardInterrupt says
        what was kept.
        """
        names = STAGES[STAGES.index(start) :]
        self._check(names)
        note, records = say(self.quiet), list[dict[str, Any]]()
        for name in names:
            began, stage = time.perf_counter(), self.stages[name]
            skipped = stage.done()
            number = f"{STAGES.index(name) + 1}/{len(STAGES)}"
            note(f"{number} {name}: {stage.folder}{' (done before)' if skipped else ''}")
            if not skipped:
                stage.run()
                free_memory()
            if name == "train":
                self._keep_recipe()
            seconds = time.perf_counter() - began
            records.append(
                {"stage": name, "folder": str(stage.folder), "skipped": skipped, "seconds": seconds, **stage.figures()}
            )
        return records

    def _check(self, names: tuple[str, ...]) -> None:
        recipe = self.recipe
        training = self._settings
        config = training.shape(self.teacher.folder, training.vocab) if self._start is None else self._check_start()
        recipe.check_for(self.teacher.config)
        select(recipe.evaluate, recipe.prompts())
        trained = self._trained()
        if "collect" in names:
            if not self._collected() and trained:
                self._check_data_of_draft()
        elif "train" in names:
            self._check_dataset(trained)
        if not trained and "train" not in names:
            raise UserError(f"{recipe.draft}: holds no finished draft; run the recipe from an earlier stage")
        self._check_recipe_file()
        if not trained:
            self._check_begun()
            rows = -(-recipe.collect.tokens // recipe.collect.seq_len)  # at most
            check_room(training, config, self.teacher.folder, min(training.batch, rows), recipe.collect.seq_len)
            with working_on_draft(recipe.draft, config):
                pass
        check_evaluation_folder(recipe.evaluation)
        of = self._fingerprint() if trained else None
        recipe.attempt("evaluate", lambda: check_report(recipe.evaluation, recipe.draft, of))

    def _check_recipe_file(self) -> None:
        """A recipe beside the draft is the one that made it, or this one: another's is not replaced."""
        path = self.recipe.draft / RECIPE_FILE
        if path.exists():
            about = self.recipe.draft / ABOUT
            made_by = read_json(about).get("recipe") if about.is_file() else None
            known = {self.recipe.sha256, made_by.get("sha256") if isinstance(made_by, dict) else None}
            if not path.is_file() or sha256(path) not in known:
                raise UserError(f"{path}: is in the way of this recipe; move it elsewhere")

    # --- collect

    @cached_property
    def _plan(self) -> Plan:
        return plan_collection(self.teacher, self.recipe.collect, self.recipe.dataset)

    def _collected(self) -> bool:
        folder = self.recipe.dataset
        plan = self._plan
        if not (folder / MANIFEST).is_file():
            return False
        dataset = Dataset.open(folder)
        if dataset.format != FORMAT:  # whole, and its manifest has other names: compare what it has of the settings
            self._check_dataset(trained=False)
            return True
        if difference := dataset.settings.difference(plan.manifest):
            name, was, now = difference
            raise UserError(f"{folder}: was begun with {name} = {json.dumps(was)}, not {json.dumps(now)}; {OTHERWISE}")
        return dataset.complete

    def _check_dataset(self, trained: bool) -> None:
        """The dataset as it is must be what [collect] says; its sources need not be there any more."""
        folder = self.recipe.dataset
        if trained and not (folder / MANIFEST).is_file():
            self._check_data_of_draft()
            return
        dataset = Dataset.open(folder)
        if not dataset.complete:
            raise UserError(f"{folder}: is not complete; run the recipe from its first stage")
        if dataset.settings.teacher_hash != self.teacher.weights_hash:
            raise UserError(f"{folder}: was made with another teacher than {self.teacher.name}; {OTHERWISE}")
        self._check_made_with(folder, dataset.settings.values)

    def _check_data_of_draft(self) -> None:
        """What the draft was trained on, be it finished or not, must be what [collect] says."""
        about = self.recipe.draft / ABOUT
        try:
            values = read_json(about)["training"]["data"].get("settings")
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{about}: is damaged ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{about}: training.data.settings is {values!r}, not that of one dataset; {OTHERWISE}")
        self._check_made_with(about, values)

    def _check_made_with(self, where: Path, values: dict[str, Any]) -> None:
        if difference := self.recipe.collect.difference(values):
            name, was, now = difference
            raise UserError(f"{where}: was made with {name} = {json.dumps(was)}, not {json.dumps(now)}; {OTHERWISE}")

    def _collect(self) -> None:
        with Ranks.gather(None, this_machine(), mixed=False) as ranks:
            if device_backend() != "cpu":
                ranks.start_worker()
            collector = Collector(self._plan, self.progress, ranks)
            collector.check_folder()
            try:
                dataset = collector.run()
            except KeyboardInterrupt:
                raise KeyboardInterrupt("finished shards are kept; the same command goes on from there") from None
            finally:
                self.collected()
        for remark in collector.remarks(dataset):
            say(self.quiet)(remark)

    def _collect_figures(self) -> dict[str, Any]:
        dataset = Dataset.open(self.recipe.dataset)
        return {"tokens": dataset.tokens, "bytes": sum(entry.bytes for entry in dataset.shards)}

    # --- train

    @cached_property
    def _start(self) -> Path | None:
        """The draft that is gone on from."""
        return None if self.recipe.init is None else find_model(self.recipe.init, "[train] init").folder

    def _check_start(self) -> DraftConfig:
        """The shape of the draft that is gone on from. UserError, naming the line, where that cannot be."""
        assert self._start is not None
        first, start, teacher, recipe = load(self._start), self._start, self.teacher, self.recipe
        recipe.attempt("train", lambda: check_start(first, start, recipe.draft, teacher.weights_hash, teacher.folder))
        return first.config

    @cached_property
    def _settings(self) -> TrainSettings:
        """With what the teacher, or the draft that is gone on from, decides."""
        settings = self.recipe.train
        if self._start is not None:
            config = read_shape(self._start / CONFIG)
            self.recipe.attempt("train", lambda: settings.like(config))
            settings = settings.like(config)
        return settings.for_teacher(self.teacher.config)

    def _trained(self) -> bool:
        folder = self.recipe.draft
        if not (folder / ABOUT).is_file():
            return False
        about = read_json(folder / ABOUT)
        if not about.get("complete"):
            return False
        try:
            training = about["training"]
            begun, data = of_finished(training), training["data"]["sha256"]
            teacher_hash = about["teacher"]["hash"]
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / ABOUT}: is damaged (no {error})") from None
        if text := difference(begun, self._asked):
            raise UserError(f"{folder}: holds a finished draft that was trained with {text}; {OTHERWISE}")
        same_teacher = teacher_hash == self.teacher.weights_hash
        if not same_teacher or self._data not in (None, data):
            what = "on other data" if same_teacher else "for another teacher"
            raise UserError(f"{folder}: holds a finished draft that was trained {what}; {OTHERWISE}")
        discard(folder / STATE)  # which a kill left
        return True

    def _check_begun(self) -> None:
        """An unfinished run in the draft's folder must be this one, as far as that is known before collecting: what
        data it had is told by the draft that an interrupted one leaves."""
        state, about, data = self.recipe.draft / STATE, self.recipe.draft / ABOUT, self._data
        check_begun(state, self._asked if data is None else self._asked | {"data": data}, OTHERWISE)
        if data is None and is_begun(state) and about.is_file():
            made_for = read_json(about).get("teacher")
            if not isinstance(made_for, dict) or made_for.get("hash") != self.teacher.weights_hash:
                raise UserError(f"{about.parent}: an unfinished run was begun there for another teacher; {OTHERWISE}")
            self._check_data_of_draft()

    @property
    def _asked(self) -> dict[str, Any]:
        """What a training run is known by, but for its data."""
        asked = self._settings.record() | {"teacher_files": teacher_files(Tokenizer(self.teacher.folder))}
        return asked if self._start is None else asked | {"init": start_hash(self._start)}

    @property
    def _data(self) -> str | None:
        """The hash of the dataset; None as long as it is not whole."""
        folder = self.recipe.dataset
        dataset = Dataset.open(folder) if (folder / MANIFEST).is_file() else None
        return dataset.sha256 if dataset is not None and dataset.complete else None

    def _train(self) -> None:
        recipe = self.recipe
        train(recipe.dataset, self.teacher.folder, recipe.draft, recipe.train, quiet=self.quiet, init=self._start)

    def _train_figures(self) -> dict[str, Any]:
        training = read_json(self.recipe.draft / ABOUT)["training"]
        return {name: training[name] for name in ("tokens", "held_out_loss", "agreement", "expected_acceptance")}

    def _keep_recipe(self) -> None:
        """The recipe as it is beside the draft, and its name and hash in draft.json, for whoever gets the draft."""
        folder, recipe = self.recipe.draft, self.recipe
        about = read_json(folder / ABOUT)
        known = {"name": recipe.name, "sha256": recipe.sha256}
        if about.get("recipe") != known or not (folder / RECIPE_FILE).is_file():
            write_atomic(folder / RECIPE_FILE, recipe.content)
            write_atomic(folder / ABOUT, (json.dumps(about | {"recipe": known}, indent=2) + "\n").encode())

    # --- evaluate

    @cached_property
    def _draft(self) -> Checkpoint:
        return find_model(str(self.recipe.draft), "[train] out")

    def _evaluated(self) -> bool:
        """A check that failed is none that was done: what was wrong may have been mended."""
        report = self._finished()
        return report is not None and bool(report["identical"])

    def _fingerprint(self) -> dict[str, Any]:
        return fingerprint(self.recipe.evaluate, self.recipe.prompts(), self.teacher, self._draft)

    def _finished(self) -> dict[str, Any] | None:
        return finished_report(self.recipe.evaluation, self._fingerprint())

    def _evaluate(self) -> None:
        recipe = self.recipe
        report = evaluate(self.teacher, self._draft, recipe.evaluate, recipe.evaluation, self.quiet)
        if not report["complete"]:
            raise KeyboardInterrupt(f"{report['prompts']} prompts are done; the same command goes on from there")

    def _evaluate_figures(self) -> dict[str, Any]:
        # The stage's own, even where its prompts were edited meanwhile: then it is done again next time.
        report = read_json(self.recipe.evaluation / REPORT)
        return {"report": {name: value for name, value in report.items() if name != "outputs"}}


def free_memory() -> None:
    """Free what a stage left, now: models go with their reference cycles."""
    gc.collect()
    mx.clear_cache()
