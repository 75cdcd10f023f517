"""Settings of the commands, each said once.

A command's settings are a frozen dataclass derived from `Settings`, whose fields are made by `option`. From it come the
command line (`takes_settings`), a recipe's keys (`Settings.from_options`), the checks (`check`), what settings of older
versions are filled up with (`filled_up`), and the command that a model card shows (`command_line`). A new setting is
one new field.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Self, get_args, get_origin, get_type_hints

import typer

from kernels.errors import UserError

LARGEST = (1 << 63) - 1  # whole number: files and random number generators take no larger one
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def option(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] = (),
    show_default: bool = True,
    recipe_only: bool = False,
    added: bool = False,
    before: Any = None,
) -> Any:
    """A field of a settings class, and all that is to be said of it.

    flag: the option, if it is not the field's name; without its dashes it is the recipe's key. low, high: the least and
    the largest value; above: a value that it must exceed (each element's, of a tuple). show_default: whether `--help`
    shows it; otherwise the help says it, and an option that is not given is left to `Settings.from_options`.
    recipe_only: recipes may set it, the command line does not have it. added: it came after a release; where it asks
    for what was done before, it does not count in the names of folders (`Settings.naming`), so that what an older
    version began there is found. before: the value that asks for that, where it is not the default.
    """
    about = Option(help, flag, metavar, low, high, above, choices, show_default, recipe_only, added, before)
    return field(default=default, metadata={"option": about})


@dataclass(frozen=True)
class Option:
    """What `option` was told, beside the default."""

    help: str
    flag: str | None
    metavar: str | None
    low: float | None
    high: float | None
    above: float | None
    choices: tuple[Any, ...]
    show_default: bool
    recipe_only: bool
    added: bool
    before: Any


@dataclass(frozen=True)
class Setting:
    """A field of a settings class. kind: bool, int, float or str, of each element where it is a tuple (`many`)."""

    name: str
    kind: type
    many: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The option as it is typed: `--seq-len`."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    @property
    def key(self) -> str:
        """The recipe's key: `seq_len`."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def before(self) -> Any:
        """What a record that does not know it stands for, as JSON keeps it."""
        value = self.default if self.option.before is None else self.option.before
        return list(value) if self.many else value

    def parameter(self) -> inspect.Parameter:
        """The option as a parameter that typer reads."""
        about = self.option
        declaration = f"{self.flag}/--no-{self.flag.removeprefix('--')}" if self.kind is bool else self.flag
        hidden = self.many or not about.show_default
        kind: Any = list[self.kind] if self.many else self.kind  # type: ignore[name-defined]
        return inspect.Parameter(
            self.key,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if hidden else self.default,
            annotation=Annotated[kind | None, typer.Option(declaration, metavar=about.metavar, help=about.help)],
        )

    def unlike(self, value: Any) -> str | None:
        """What a value from a recipe must be, in words, where it is not that."""
        if not self.many:
            return None if _is(value, self.kind) else WORDS[self.kind]
        fits = isinstance(value, list) and value and all(_is(part, self.kind) for part in value)
        return None if fits else f"a list of {'strings' if self.kind is str else 'numbers'}"

    def check(self, value: Any, high: float | None = None) -> None:
        """UserError naming the option where its value is out of bounds; high: another bound than its own."""
        about = self.option
        high = about.high if high is None else high
        for part in value if self.many else () if value is None else (value,):
            if about.choices and part not in about.choices:
                raise UserError(f"{self.flag} {part}: must be {listed(about.choices)}")
            if self.kind not in (int, float):
                continue
            if part > LARGEST and self.kind is int:
                raise UserError(f"{self.flag} {part}: must be below 2^63")
            fits = math.isfinite(part) and (about.above is None or part > about.above)
            fits = fits and (about.low is None or part >= about.low) and (high is None or part <= high)
            if not fits:
                if about.low is not None:
                    allowed = f"at least {about.low:g}" if high is None else f"{about.low:g} to {high:g}"
                elif about.above is not None:
                    allowed = f"above {about.above:g} and " + ("finite" if high is None else f"at most {high:g}")
                else:
                    allowed = "a finite number"
                raise UserError(f"{self.flag} {part}: must be {allowed}")

    def words(self, value: Any) -> list[str]:
        """The option with a value, as it is typed; nothing for None and for a switch at its default. TypeError where
        a record has something else."""
        parts = value or () if self.many else () if value is None else (value,)
        for part in parts:
            if not _is(part, self.kind):
                raise TypeError(f"{self.name} is {part!r}")
        if self.kind is bool:
            return (
                []
                if value in (None, self.default)
                else [self.flag if value else f"--no-{self.flag.removeprefix('--')}"]
            )
        typed = [f"{part}".removesuffix(".0") if self.kind is float else str(part) for part in parts]
        return [word for part in typed for word in (self.flag, part)]


class Settings:
    """What decides what a command makes, beside the files that it is given; derived classes are frozen dataclasses."""

    @classmethod
    def schema(cls) -> tuple[Setting, ...]:
        """Every setting, those of base classes among them, in the order of the fields."""
        hints = get_type_hints(cls)
        result = []
        for one in fields(cls):  # type: ignore[arg-type]
            hint = hints[one.name]
            kinds = [part for part in get_args(hint) or (hint,) if part not in (type(None), Ellipsis)]
            many = get_origin(hint) is tuple
            result.append(Setting(one.name, kinds[0], many, one.default, one.metadata["option"]))
        return tuple(result)

    @classmethod
    def from_options(cls, **values: Any) -> Self:
        """Settings from values by key, as a command line or a recipe gives them; None and absent ones are defaults."""
        names = {setting.key: setting.name for setting in cls.schema()}
        given = {names[key]: value for key, value in values.items() if value not in (None, [])}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    def check(self) -> None:
        """UserError naming the first option that cannot be."""
        self.check_bounds()

    def check_bounds(self, **high: float | None) -> None:
        """The part of `check` that `option` states. high: largest values by field, where something else sets them."""
        for setting in self.schema():
            setting.check(getattr(self, setting.name), high.get(setting.name))

    def record(self) -> dict[str, Any]:
        """The settings by field, as JSON keeps them: lists in place of tuples."""
        assert not isinstance(self, type)
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def naming(self) -> dict[str, Any]:
        """The part of the record that a default folder is named after."""
        return self.without_added(self.record())

    @classmethod
    def without_added(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record without what came after a release and asks for what was done before: as older versions wrote it."""
        before = {one.name: one.before for one in cls.schema() if one.option.added}
        return {name: value for name, value in record.items() if name not in before or value != before[name]}

    @classmethod
    def filled_up(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record, perhaps of an older version, with the settings that it does not know yet as that version did."""
        return {one.name: one.before for one in cls.schema()} | dict(record)

    @classmethod
    def command_line(cls, record: Mapping[str, Any]) -> list[str]:
        """The options that stand for a record, perhaps of an older version, as far as the command line has them."""
        record = {one.name: one.before for one in cls.schema() if one.option.before is not None} | dict(record)
        known = [setting for setting in cls.schema() if setting.name in record and not setting.option.recipe_only]
        return [word for setting in known for word in setting.words(record[setting.name])]


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: each parameter of a settings class stands for the options of that class."""
    hints = get_type_hints(command, include_extras=True)
    classes: dict[str, type[Settings]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        if isinstance(hint, type) and issubclass(hint, Settings):
            classes[name] = hint
            parameters += [one.parameter() for one in hint.schema() if not one.option.recipe_only]
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, cls in classes.items():
            options = {one.key: values.pop(one.key) for one in cls.schema() if one.key in values}
            values[name] = cls.from_options(**options)
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def given_options(context: typer.Context) -> set[str]:
    """The keys of the options that the command line named, be it with their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def listed(values: tuple[Any, ...]) -> str:
    """`a, b or c`"""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind
