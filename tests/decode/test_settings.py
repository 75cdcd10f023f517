"""One dataclass gives a command its options, a recipe its keys, the checks, and the command on a card."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

from decode.settings import Settings, option, takes_settings
from distill.data.settings import CollectSettings
from distill.release.settings import EvaluateSettings
from distill.training.settings import TrainSettings
from kernels import UserError


@dataclass(frozen=True)
class Shared(Settings):
    seed: int = option(0, "Seed.", low=0)


@dataclass(frozen=True)
class Example(Shared):
    files: tuple[str, ...] = option(("a", "b"), "Files.", flag="--file", metavar="FILE")
    rates: tuple[float, ...] = option((1.0,), "Rates.", above=0)
    batch_size: int = option(8, "Rows.", low=1, high=64)
    limit: int | None = option(None, "Most.", low=1)
    rate: float = option(0.5, "Rate.", above=0)
    mode: str = option("fast", "Mode.", choices=("fast", "slow"))
    reply: bool = option(True, "Reply.")
    secret: float = option(0.1, "Secret.", low=0, high=1, recipe_only=True)
    late: int = option(3, "Came in a later version.", added=True)
    later: int = option(3, "Does something new by default.", added=True, before=0)


def settings_of(*words: str) -> Example:
    """What a command gets that is called with these words."""
    got: list[Example] = []
    app = typer.Typer()

    @app.command()
    @takes_settings
    def command(*, teacher: str = "", settings: Example, out: str = "x") -> None:
        got.append(settings)

    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return got[0]


def test_a_command_line_becomes_settings() -> None:
    assert settings_of() == Example()
    words = ["--file", "x", "--file", "y z", "--rates", "0.5", "--batch-size", "4", "--limit", "3", "--no-reply"]
    expected = Example(files=("x", "y z"), rates=(0.5,), batch_size=4, limit=3, reply=False, seed=7)
    assert settings_of(*words, "--seed", "7", "--teacher", "t") == expected


@pytest.mark.parametrize(
    "settings",
    [
        Example(),
        Example(files=("x",), rates=(0.1, 2.0), limit=5, rate=1e-05, reply=False),
        TrainSettings(vocab=60, loss="tv", lr=0.00123, bits=4, temperature=2.0),
        EvaluateSettings(prompts="a b.jsonl", limit=2, head="int8"),
        CollectSettings(sources=("a", "owner/name@v1.0"), reply=False, temperatures=(1.0, 0.7), max_reply=17),
    ],
)
def test_the_command_of_a_record_makes_the_same_settings(settings: Settings) -> None:
    got: list[Settings] = []

    def command(*, settings: Settings) -> None:
        got.append(settings)

    command.__annotations__["settings"] = type(settings)
    app = typer.Typer()
    app.command()(takes_settings(command))
    done = CliRunner().invoke(app, type(settings).command_line(settings.record()))
    assert done.exit_code == 0, done.output
    expected = settings.record()
    if isinstance(settings, CollectSettings):  # the held-out prompts are always among them
        expected["exclude"] = CollectSettings.from_options().record()["exclude"]
    assert got[0].record() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be 1 to 64"),
        ({"batch_size": 65}, "--batch-size 65: must be 1 to 64"),
        ({"limit": 0}, "--limit 0: must be at least 1"),
        ({"rate": 0.0}, "--rate 0.0: must be above 0 and finite"),
        ({"rate": float("nan")}, "--rate nan: must be above 0 and finite"),
        ({"rate": float("inf")}, "--rate inf: must be above 0 and finite"),
        ({"rates": (1.0, -1.0)}, "--rates -1.0: must be above 0 and finite"),
        ({"mode": "slwo"}, "--mode slwo: must be fast or slow"),
        ({"secret": 1.5}, "--secret 1.5: must be 0 to 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"seed": 1 << 63}, "--seed 9223372036854775808: must be below 2^63"),
    ],
)
def test_bounds_are_refused_by_the_option_s_name(change: dict[str, object], message: str) -> None:
    Example().check()
    with pytest.raises(UserError) as error:
        Example(**change).check()  # type: ignore[arg-type]
    assert str(error.value) == message


def test_records_of_older_versions_are_filled_up_with_what_those_did() -> None:
    filled_up = Example.filled_up({"seed": 3, "files": ["x"], "gone": 1})
    assert filled_up == Example(seed=3, files=("x",), later=0).record() | {"gone": 1}


def test_a_new_setting_that_asks_for_nothing_new_does_not_change_the_names_of_folders() -> None:
    old = Example(later=0)
    assert old.naming() == {n: v for n, v in old.record().items() if n not in ("late", "later")}
    assert Example(late=4).naming() == old.naming() | {"late": 4, "later": 3}
