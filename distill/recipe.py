"""Recipes: TOML files that hold every setting of a run, read with plain errors.

A recipe has `teacher`, `out` and the sections `[collect]`, `[train]` and `[evaluate]`, each with an `out` of its own
and the keys of its command's settings (decode.settings); what is left out has the commands' default.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from decode.models.checkpoint import ROOT, RUNS
from decode.prompts import STANDARD_INPUT, read_content
from decode.settings import Settings
from distill.data.settings import CollectSettings
from distill.release.settings import EvaluateSettings
from distill.training.losses import check_draws
from distill.training.settings import TrainSettings, check_layers
from kernels.errors import UserError, first_line
from kernels.files import expanded

RECIPES = ROOT / "recipes"
RECIPE_FILE = "recipe.toml"  # the copy beside a draft
STAGES = ("collect", "train", "evaluate")
OTHER_KEYS = {"collect": ["out"], "train": ["out", "init"], "evaluate": ["out"]}  # strings, beside the settings
SETTINGS: dict[str, type[Settings]] = {"collect": CollectSettings, "train": TrainSettings, "evaluate": EvaluateSettings}
TOP = ("teacher", "out", *STAGES)


@dataclass(frozen=True)
class Recipe:
    """One run: its settings, and the folders of what each stage makes. Paths are as on a command line."""

    path: Path
    content: bytes = field(repr=False)
    teacher: str | None
    collect: CollectSettings
    train: TrainSettings
    evaluate: EvaluateSettings
    dataset: Path
    draft: Path
    evaluation: Path
    init: str | None = None  # a draft that training goes on from

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def sha256(self) -> str:
        """Of the file as it is, comments and all."""
        return hashlib.sha256(self.content).hexdigest()

    def inputs(self) -> Iterator[str | Path]:
        """The files and folders of documents that a run reads, itself among them."""
        yield self.path
        yield self.evaluate.prompts
        yield from self.collect.inputs()

    def check_for(self, config: dict[str, Any]) -> None:
        """UserError, naming the line, for what a teacher of this config.json cannot do."""
        vocab, size = self.train.vocab, config["vocab_size"]

        def check_vocab() -> None:
            if vocab is not None and vocab >= size:
                raise UserError(f"--vocab {vocab}: the teacher has {size} tokens; leave it out for a head with all")

        def check_taps() -> None:
            check_layers(self.train.tapped, int(config["num_hidden_layers"]))

        self.attempt("train", check_vocab)
        self.attempt("train", check_taps)
        self.attempt("collect", lambda: self.collect.check(config))

    def prompts(self) -> bytes:
        """What the prompts file of its evaluation holds. UserError, naming the line, where it is none: a run that goes
        on reads it again."""
        name = self.evaluate.prompts

        def check() -> None:
            if name == STANDARD_INPUT or not Path(name).is_file():
                raise UserError(f"--prompts {name}: is no file")

        self.attempt("evaluate", check)
        return read_content(Path(name))

    def attempt(self, section: str, check: Callable[[], object]) -> None:
        """Run a check of a section's options, and say of what it refuses where it stands in the file."""
        try:
            check()
        except UserError as error:
            option = re.match(r"--([a-z-]+)", str(error))
            if option is None:
                raise
            key = option[1].replace("-", "_")
            source = _Source(self.path, self.content.decode("utf-8-sig"))
            raise source.error(section, key, key + str(error)[option.end() :]) from None


def find_recipe(name: str) -> Path:
    """A recipe by path, or by its name in recipes/."""
    path, shipped = Path(name), RECIPES / f"{name}.toml"
    if path.is_file():
        return path
    if Path(name).name == name and shipped.is_file():
        return shipped
    if path.exists():
        raise UserError(f"{name}: is no regular file, which a recipe is: runs are kept by its name")
    known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
    raise UserError(f"{name}: no such recipe, neither as a file nor among those in recipes/ ({known})")


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. UserError names the file, the line and the key at fault."""
    try:
        content = path.read_bytes()
        values = tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not valid UTF-8 (byte {error.start})") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: is not TOML: {first_line(error)}") from None
    if not values:
        raise UserError(f"{path}: holds no settings")
    source = _Source(path, content.decode("utf-8-sig"))
    top = source.checked("", values)
    parts = {name: source.checked(name, top.get(name, {})) for name in STAGES}
    out = expanded(top.get("out", RUNS / path.stem))
    folders = {name: expanded(part.pop("out")) if "out" in part else None for name, part in parts.items()}
    draft = folders["train"] or out / "draft"
    init = parts["train"].pop("init", None)
    recipe = Recipe(
        path=path,
        content=content,
        teacher=top.get("teacher"),
        collect=CollectSettings.from_options(**parts["collect"]),
        train=TrainSettings.from_options(**parts["train"]),
        evaluate=EvaluateSettings.from_options(**parts["evaluate"]),
        dataset=folders["collect"] or out / "dataset",
        draft=draft,
        evaluation=folders["evaluate"] or draft,
        init=init,
    )
    _check(recipe)
    return recipe


class _Source:
    """A recipe's text, for errors that say where."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def checked(self, section: str, values: dict[str, Any]) -> dict[str, Any]:
        """The values of a section, each known and of its type; lists become tuples."""
        for key, value in values.items():
            if key not in keys(section):
                raise self.error(section, key, f"{key}: no such key; {self._hint(section, key)}")
            if wrong := _unlike(section, key, value):
                raise self.error(section, key, f"{key} must be {wrong}, not {_shown(value)}")
        return values

    def _hint(self, section: str, key: str) -> str:
        for other in ("", *STAGES):
            if other != section and key in keys(other):
                return f"it belongs {f'into [{other}]' if other else 'above all sections'}"
        return f"did you mean {get_close_matches(key, keys(section), 1, 0.0)[0]}?"

    def error(self, section: str, key: str, message: str) -> UserError:
        line = self._line(section, key)
        where = f"{self.path}: line {line}" if line else str(self.path)
        return UserError(f"{where}: {f'[{section}] ' if section else ''}{message}")

    def _line(self, section: str, key: str) -> int | None:
        """Where a key is set, if it stands on a line of its own section; a table counts as a key of the top."""
        inside = ""
        name = rf"[\"']?{re.escape(key)}[\"']?"
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[+\s*([^\]]*?)\s*\]", line):
                inside = header[1].strip("\"'")
                if not section and inside.split(".")[0] == key:
                    return number
            elif inside == section and re.match(rf"\s*{name}\s*[=.]", line):
                return number
        return None


def _check(recipe: Recipe) -> None:
    """What no teacher would make possible."""
    train, temperatures = recipe.train, recipe.collect.temperatures
    recipe.attempt("collect", recipe.collect.check)
    # Of what kind a draft is that is gone on from shows when it is loaded.
    recipe.attempt("train", (train if recipe.init is None else replace(train, reads_teacher=True)).check)
    recipe.attempt("evaluate", recipe.evaluate.check)

    def check_rest() -> None:
        if train.temperature not in temperatures:
            raise UserError(f"--temperature {train.temperature}: must be 1 or one of [collect] temperature")
        check_draws(train.loss, recipe.collect.sampled)

    recipe.attempt("train", check_rest)
    dataset = Path(os.path.realpath(recipe.dataset))
    for section, folder in (("train", recipe.draft), ("evaluate", recipe.evaluation)):
        other = Path(os.path.realpath(folder))
        if dataset.is_relative_to(other) or other.is_relative_to(dataset):
            text = recipe.content.decode("utf-8-sig")
            message = f"out: the folders of [{section}] ({folder}) and of [collect] ({recipe.dataset}) must lie apart"
            raise _Source(recipe.path, text).error(section, "out", message)


def keys(section: str) -> list[str]:
    """The keys of a section, "" being the top."""
    if not section:
        return [*TOP]
    return [setting.key for setting in SETTINGS[section].schema()] + OTHER_KEYS[section]


def _unlike(section: str, key: str, value: Any) -> str | None:
    """What a value must be in words, where it is not that."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if any("\0" in text for text in texts):
        return "without null characters"  # no file's name can hold one
    if not all(map(str.strip, texts)):
        return "a name"  # an empty one would be the current folder
    if section and key not in OTHER_KEYS[section]:
        return next(setting for setting in SETTINGS[section].schema() if setting.key == key).unlike(value)
    if key in STAGES:
        return None if isinstance(value, dict) else "a section"
    return None if isinstance(value, str) else "a string"


def _shown(value: Any) -> str:
    text = "a section" if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
