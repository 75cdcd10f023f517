"""What decides a training run, beside its data and its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decode.settings import Settings, option
from distill.training.draft_config import GROUP_SIZE, DraftConfig, check_size
from distill.training.losses import parse_loss
from kernels.errors import UserError
from kernels.files import read_json


@dataclass(frozen=True)
class TrainSettings(Settings):
    """All that decides what a training run does with its data; saved with the draft."""

    layers: int | None = option(None, "Decoder layers of the draft. Default: 2; 1 where it reads its teacher.")
    hidden: int | None = option(
        None, "Width of the draft, a multiple of 64. Default: 256; the teacher's where it reads its teacher."
    )
    reads_teacher: bool = option(
        False, "A draft that reads its teacher's hidden states (after EAGLE-3), not a model of its own.", added=True
    )
    taps: str | None = option(
        None,
        "The teacher's layers whose states it reads, from 0: a low, a middle and a high one by default.",
        metavar="N,N,N",
        added=True,
    )
    unroll: int = option(4, "Steps that a reader is trained for on its own states.", low=1, high=16, added=True)
    step_decay: float = option(
        0.8,
        "How much each step of a reader counts in the loss, of the one before.",
        above=0,
        high=1,
        recipe_only=True,
        added=True,
    )
    ternary: bool = option(False, "A BitNet b1.58 draft: ternary matrices, int8 activations.", added=True)
    vocab: int | None = option(
        None,
        "Trim the head to the N most frequent tokens of the dataset and all special ones. Default: all.",
        metavar="N",
        low=1,
    )
    loss: str = option(
        "kl",
        "kl (with the tail as a bucket), tv (total variation), reverse_kl, js (Jensen-Shannon), ce (the teacher's first"
        " choice), or a mix such as kl=1,tv=0.5.",
    )
    temperature: float = option(1.0, "Temperature of the loss; the dataset must have it.", above=0)
    tokens: int = option(500_000, "Tokens trained on; the dataset is repeated.", low=1)
    batch: int = option(2, "Rows a step.", low=1)
    lr: float = option(2e-3, "Peak learning rate.", above=0, high=10)
    warmup: float = option(0.05, "Share of the steps in which the rate rises.", low=0, high=1, recipe_only=True)
    weight_decay: float = option(0.1, "Of matrices, not of norms.", low=0, high=10, recipe_only=True)
    clip: float = option(1.0, "The largest norm of a gradient.", above=0, recipe_only=True)
    bits: int | None = option(
        None, "Quantise the saved weights to 4 or 8 bits. Default: bfloat16.", choices=tuple(GROUP_SIZE)
    )
    seed: int = option(0, "Seed of everything random.", low=0)
    eval_share: float = option(0.02, "Share of the rows held out.", low=0, high=0.5, recipe_only=True)
    eval_rows: int = option(64, "Most rows held out.", low=1, recipe_only=True)
    evals: int = option(20, "Evaluations, evenly over the run, the last at its end.", low=1, recipe_only=True)
    live_prompts: int = option(
        6,
        "Held-out prompts that each evaluation decodes; the best checkpoint emits most tokens a verification. With 0 it"
        " has the lowest held-out loss.",
        low=0,
        added=True,
        before=0,
    )
    dtype: str = option(
        "auto",
        "Of the computation; auto is bfloat16 on a GPU.",
        choices=("auto", "float32", "bfloat16"),
        recipe_only=True,
    )
    teacher_embedding: bool = option(True, "Start the embedding from the teacher's.", recipe_only=True)

    def for_teacher(self, teacher: Mapping[str, Any]) -> TrainSettings:
        """These settings with every default that depends on the teacher filled in. teacher: its config.json."""
        if not self.reads_teacher:
            return replace(self, layers=self.layers or 2, hidden=self.hidden or 256)
        layers, hidden = (teacher.get(name) for name in ("num_hidden_layers", "hidden_size"))
        taps = ",".join(map(str, default_taps(int(layers or 1)))) if self.taps is None else self.taps
        return replace(self, layers=self.layers or 1, hidden=self.hidden or hidden or 256, taps=taps)

    def like(self, config: DraftConfig) -> TrainSettings:
        """These settings for a draft that is there already. UserError naming an option that asks for another."""
        taps = ",".join(map(str, config.taps)) if config.taps else None
        shape: dict[str, Any] = {
            "layers": config.layers,
            "hidden": config.hidden,
            "vocab": config.draft_vocab_size,
            "taps": taps,
        }
        shape |= {"reads_teacher": bool(config.taps), "ternary": config.ternary}
        for setting in self.schema():
            given = getattr(self, setting.name)
            if setting.name in shape and given not in (None, False, shape[setting.name]):
                shown = "" if given is True else f" {given}"
                there = "" if given is True else f" has {shape[setting.name]} and"
                raise UserError(f"{setting.flag}{shown}: the draft of --init{there} stays what it is")
        return replace(self, **shape)

    @property
    def tapped(self) -> tuple[int, ...]:
        """The teacher's layers that the draft reads; none for a standalone one. UserError where they are no numbers."""
        try:
            return tuple(int(part) for part in (self.taps or "").split(",") if self.taps is not None)
        except ValueError:
            raise UserError(f"--taps {self.taps}: must be the numbers of layers, with commas between") from None

    @property
    def step_weights(self) -> tuple[float, ...]:
        """How much a position counts in each step that a reader is unrolled."""
        return tuple(self.step_decay**step for step in range(self.unroll))

    def shape(self, teacher_folder: Path, draft_vocab_size: int | None = None) -> DraftConfig:
        """The draft's shape, for the teacher in a folder; its head has so many tokens, or all."""
        path = teacher_folder / "config.json"
        return self.shape_for(read_json(path), str(path), draft_vocab_size)

    def shape_for(self, teacher: Mapping[str, Any], name: str, draft_vocab_size: int | None = None) -> DraftConfig:
        """The same for a teacher of which only config.json is known; name: the file's, for errors."""
        settings = self.for_teacher(teacher)
        assert settings.layers is not None and settings.hidden is not None
        return DraftConfig.for_config(
            dict(teacher), name, settings.layers, settings.hidden, draft_vocab_size, settings.tapped, self.ternary
        )

    def check(self, vocab_size: int | None = None) -> None:
        """UserError naming the first option that cannot be; vocab_size: the teacher's, which bounds a trimmed head."""
        parse_loss(self.loss)
        check_size(2 if self.layers is None else self.layers, 256 if self.hidden is None else self.hidden)
        self.check_bounds(vocab=vocab_size and vocab_size - 1)
        if self.taps is not None and not self.reads_teacher:
            raise UserError(f"--taps {self.taps}: is for drafts that read their teacher (--reads-teacher)")
        if self.unroll != type(self).unroll and not self.reads_teacher:
            raise UserError(f"--unroll {self.unroll}: is for drafts that read their teacher (--reads-teacher)")
        if list(self.tapped) != sorted(set(self.tapped)) or min(self.tapped, default=0) < 0:
            raise UserError(f"--taps {self.taps}: must be ascending numbers of layers, from 0")


def check_layers(taps: tuple[int, ...], layers: int, teacher: str = "the teacher") -> None:
    """UserError where a teacher with so many layers does not have all that a draft is to read. teacher: its name."""
    if max(taps, default=0) >= layers:
        raise UserError(f"--taps {','.join(map(str, taps))}: {teacher} has layers 0 to {layers - 1}")


def default_taps(layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer of a teacher with so many: 2, 14 and 26 of 30."""
    return tuple(sorted({min(2, layers - 1), max(layers // 2 - 1, 0), max(layers - 4, 0)}))
