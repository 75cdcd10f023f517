"""What decides a dataset, beside the teacher and the files themselves: one class a pass, and all of them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from decode.models.checkpoint import ROOT
from decode.prompts import STANDARD_INPUT
from decode.settings import Settings, option
from distill.data.packing import MIN_SEGMENT
from distill.data.source_files import visible_files
from distill.data.sources import parse_source, shown_name
from kernels.errors import UserError

MOST_DRAWS = 254  # of a position: with the teacher's first choice beside them, a byte counts the different ids
HELD_OUT = ROOT / "data" / "eval.jsonl"
DEFAULT_SOURCES = tuple(str(ROOT / "data" / name) for name in ("prompts.jsonl", "wiki.jsonl.xz", "novels.jsonl.xz"))


@dataclass(frozen=True)
class PromptSettings(Settings):
    """The first pass: which documents, in which order."""

    sources: tuple[str, ...] = option(
        DEFAULT_SOURCES,
        "Text (.txt), JSON with `text`, `prompt`, `turns` or `messages`, parquet, arrow, a folder of these, a Hub"
        " dataset (owner/name:config:split@revision), or `self`: the teacher writes the user's turn too. With #column:"
        " what to read of a row; with =weight: its share of the tokens. Repeatable. Default: the samples in data/.",
        flag="--source",
        metavar="NAME",
    )
    exclude: tuple[str, ...] = option(
        (), "Prompts to leave out, beside the held-out ones in data/eval.jsonl.", metavar="FILE"
    )
    seq_len: int = option(512, "Tokens a row.", low=2 * MIN_SEGMENT)
    seed: int = option(0, "Seed of everything random.", low=0)


@dataclass(frozen=True)
class ReplySettings(Settings):
    """The second pass: what the teacher writes, and how much. reply_batch decides only how fast that goes."""

    reply: bool = option(True, "Let the teacher answer prompts and learn from its replies.")
    tokens: int = option(150_000, "Size of the dataset in tokens.", low=MIN_SEGMENT)
    max_reply: int = option(256, "Most tokens a reply. Default: half of --seq-len.", low=1, show_default=False)
    reply_temperatures: tuple[float, ...] = option(
        (0.0, 0.8),
        "Sample replies at this; 0 is greedy. Repeatable: used in turn. [0, 0.8]",
        flag="--reply-temperature",
        low=0,
        high=100,
    )
    reply_batch: int = option(64, "Prompts answered at a time.", low=1, high=1 << 16)


@dataclass(frozen=True)
class ScoringSettings(Settings):
    """The third pass: what is kept of the logits."""

    top_k: int | None = option(32, "Logits kept a token. [32]", metavar="N", low=1, show_default=False)
    sampled: int | None = option(
        None,
        "In place of --top-k: draw this many ids from the teacher's distribution and keep them with their counts, at"
        " the positions that are trained on. 1 to 254.",
        metavar="N",
        low=1,
        high=MOST_DRAWS,
        added=True,
    )
    temperatures: tuple[float, ...] = option(
        (1.0,),
        "Also store exact log-sum-exps at this temperature. Repeatable; 1 always is.",
        flag="--temperature",
        low=0.01,
        high=100,
    )
    batch: int = option(8, "Rows scored at a time.", low=1, high=1 << 16)


# What decides the replies, and what decides the scores of given replies. All else can change, and they stay.
OF_REPLIES = tuple(one.name for one in (*PromptSettings.schema(), *ReplySettings.schema()) if one.name != "reply_batch")
OF_SCORES = ("seq_len", *(one.name for one in ScoringSettings.schema()))
IN_MANIFESTS = {"top_k": "k"}  # the names there, where they are others


@dataclass(frozen=True)
class CollectSettings(ScoringSettings, ReplySettings, PromptSettings):
    """The settings of `distill collect`."""

    @classmethod
    def from_options(cls, **values: Any) -> Self:
        """As options or a recipe give them. Beside what `exclude` names, the held-out prompts are excluded wherever
        they are there. Draws take the place of the top logits."""
        settings = super().from_options(**values)
        held_out = [str(HELD_OUT)] if HELD_OUT.exists() else []
        return replace(
            settings,
            exclude=tuple(dict.fromkeys([*held_out, *settings.exclude])),
            temperatures=tuple(dict.fromkeys((1.0, *settings.temperatures))),
            max_reply=settings.seq_len // 2 if values.get("max_reply") is None else settings.max_reply,
            top_k=None if settings.sampled is not None and values.get("top_k") is None else settings.top_k,
        )

    def check(self, config: Mapping[str, Any] | None = None) -> None:
        """UserError naming the first option that cannot be; config: the teacher's, which sets some of the limits."""
        context = config.get("max_position_embeddings") if config else None
        self.check_bounds(seq_len=context, top_k=config["vocab_size"] if config else None, max_reply=context)
        if self.sampled is not None and self.top_k is not None:
            raise UserError(f"--sampled {self.sampled}: takes the place of --top-k {self.top_k}; give one of the two")
        if self.sampled is not None and (others := [t for t in self.temperatures if t != 1]):
            raise UserError(f"--temperature {others[0]:g}: --sampled draws at temperature 1, and at no other")
        if self.reply and self.seq_len - self.max_reply < MIN_SEGMENT:
            raise UserError(f"--max-reply {self.max_reply}: leaves no room for prompts in --seq-len {self.seq_len}")
        if not self.sources:
            raise UserError("--source: at least one file, folder or dataset is needed")
        if not self.reply and any(parse_source(source).kind == "self" for source in self.sources):
            raise UserError("--source self: is what the teacher writes, which --no-reply forbids")
        for flag, names in (("--source", self.sources), ("--exclude", self.exclude)):
            if STANDARD_INPUT in names:
                raise UserError(f"{flag} -: standard input is no source; a collection that goes on reads a file again")

    def inputs(self) -> Iterator[Path]:
        """What a collection reads on this machine: files, and folders with the files that lie or are linked there."""
        named = [one.path for one in map(parse_source, self.sources) if one.kind in ("file", "folder")]
        for path in map(Path, (*named, *self.exclude)):
            yield path
            if path.is_dir():
                yield from visible_files(path)

    def recorded(self, names: tuple[str, ...]) -> dict[str, Any]:
        """These settings as a manifest has them: `k` or `sampled`, not both; sources as they were given."""
        record = self.record()
        return {IN_MANIFESTS.get(name, name): record[name] for name in names if record[name] is not None}

    def difference(self, values: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """The first setting that decides content and is not what a manifest's (or a draft.json's) settings say: its
        name, the value there and the one here. Of sources only names count: they need not be there any more."""
        wanted, values = self.record(), complete_settings(values)
        for name in dict.fromkeys((*OF_REPLIES, *OF_SCORES)):
            was, now = values.get(IN_MANIFESTS.get(name, name)), wanted[name]
            if name in ("sources", "exclude"):
                was = [entry.get("name") for entry in was or [] if isinstance(entry, dict)]
                now = [shown_name(path) for path in now]
            if was != now:
                return name, was, now
        return None


def complete_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's settings, perhaps of an older version, with those that it does not know yet as that did; what is
    None has no place in one."""
    before = {IN_MANIFESTS.get(name, name): value for name, value in CollectSettings.filled_up({}).items()}
    absent = {name for name, value in before.items() if value is None} | ({"k"} if "sampled" in values else set())
    return {name: value for name, value in before.items() if name not in absent} | dict(values)
