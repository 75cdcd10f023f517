"""The settings of `distill collect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from decode.models.checkpoint import ROOT
from distill.data.packing import MIN_SEGMENT
from distill.data.sources import shown_name
from kernels.errors import UserError

HELD_OUT = ROOT / "data" / "eval.jsonl"
DEFAULT_SOURCES = (ROOT / "data" / "prompts.jsonl", ROOT / "data" / "wiki.jsonl.xz", ROOT / "data" / "novels.jsonl.xz")

# What decides the replies, beside the teacher and the files themselves. All else can change and they stay.
OF_REPLIES = ("sources", "exclude", "tokens", "seq_len", "reply", "max_reply", "reply_temperatures", "seed")
OF_SCORES = ("seq_len", "top_k", "temperatures", "batch")
REPLY_OPTIONS = ("source", "exclude", "tokens", "reply", "reply_batch", "max_reply", "reply_temperature", "seed")
NAMES = {"top_k": "k"}  # in a manifest, where it is another


@dataclass(frozen=True)
class CollectSettings:
    """What decides a dataset's content, beside the teacher and the files themselves.

    tokens: the dataset's size; batch: rows scored at a time; reply_batch: prompts answered at a time, which decides
    only how fast it goes; reply_temperatures: what replies are sampled at, in turn (0 is greedy).
    """

    sources: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    tokens: int = 150_000
    seq_len: int = 512
    top_k: int = 32
    batch: int = 8
    temperatures: tuple[float, ...] = (1.0,)
    reply: bool = True
    reply_batch: int = 64
    max_reply: int = 256
    reply_temperatures: tuple[float, ...] = (0.0, 0.8)
    seed: int = 0

    @classmethod
    def from_options(
        cls,
        *,
        source: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        temperature: Sequence[float] | None = None,
        reply_temperature: Sequence[float] | None = None,
        max_reply: int | None = None,
        seq_len: int = 512,
        **others: Any,
    ) -> CollectSettings:
        """The settings that options of `distill collect` stand for; None where one was not given.

        Beside what `exclude` names, the held-out prompts are excluded wherever they are there.
        """
        held_out = [str(HELD_OUT)] if HELD_OUT.exists() else []
        return cls(
            sources=tuple(source or map(str, DEFAULT_SOURCES)),
            exclude=tuple(dict.fromkeys([*held_out, *(exclude or [])])),
            temperatures=tuple(dict.fromkeys((1.0, *(temperature or [])))),
            reply_temperatures=tuple(reply_temperature or (0.0, 0.8)),
            max_reply=seq_len // 2 if max_reply is None else max_reply,
            seq_len=seq_len,
            **others,
        )

    def check(self, config: Mapping[str, Any] | None = None) -> None:
        """UserError naming the first option that cannot be; config: the teacher's, which sets some of the limits."""
        context = config.get("max_position_embeddings") if config else None
        _check_limits({"--tokens": (self.tokens, 1, None)})
        self.check_scores(config)
        _check_limits(
            {
                "--reply-batch": (self.reply_batch, 1, None),
                "--max-reply": (self.max_reply, 1, context),
                "--seed": (self.seed, 0, None),
            }
        )
        for temperature in self.reply_temperatures:
            if not 0 <= temperature < float("inf"):
                raise UserError(f"--reply-temperature {temperature}: must be 0 (greedy) or more")
        if self.reply and self.seq_len - self.max_reply < MIN_SEGMENT:
            raise UserError(f"--max-reply {self.max_reply}: leaves no room for prompts in --seq-len {self.seq_len}")
        if not self.sources:
            raise UserError("--source: at least one file, folder or dataset is needed")

    def check_scores(self, config: Mapping[str, Any] | None = None) -> None:
        """The same of what decides only how replies are scored."""
        vocab = config["vocab_size"] if config else None
        context = config.get("max_position_embeddings") if config else None
        _check_limits(
            {
                "--seq-len": (self.seq_len, 2 * MIN_SEGMENT, context),
                "--top-k": (self.top_k, 1, vocab),
                "--batch": (self.batch, 1, None),
            }
        )
        for temperature in self.temperatures:
            if not 0 < temperature < float("inf"):
                raise UserError(f"--temperature {temperature}: must be above 0")

    def recorded(self, names: Sequence[str]) -> dict[str, Any]:
        """These settings under the names and in the form that a manifest has; sources by their names as given."""
        values = asdict(self)
        return {NAMES.get(name, name): values[name] for name in names}

    def difference(self, values: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """The first setting that decides content and differs from what a manifest (or a draft.json) says: its name,
        the value there and the one here. Of sources only the names count: they need not be there any more."""
        for name in dict.fromkeys((*OF_REPLIES, *OF_SCORES)):
            was, now = values.get(NAMES.get(name, name)), getattr(self, name)
            if name in ("sources", "exclude"):
                was = [entry.get("name") for entry in was or [] if isinstance(entry, dict)]
                now = [shown_name(path) for path in now]
            elif isinstance(now, tuple):
                now = list(now)
            if was != now:
                return name, was, now
        return None


def _check_limits(limits: Mapping[str, tuple[int, int, int | None]]) -> None:
    for option, (value, low, high) in limits.items():
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" if high is None else f"{low} to {high}"
            raise UserError(f"{option} {value}: must be {allowed}")
