"""What a recipe will take on a Mac, from bytes and floating-point operations alone.

Every figure is a prediction: bytes that must be read over the memory's bandwidth, operations over the GPU's peak,
whichever takes longer. Real runs reach neither and take longer. None was measured on a Mac.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode.chips import BANDWIDTH
from decode.models.dimensions import Dimensions
from decode.models.hub import NotFound
from decode.plan import find_config
from distill.data.prompts import wants_reply
from distill.data.scoring import bytes_per_token
from distill.data.sources import parse_source, read_source
from distill.recipe import Recipe
from distill.release.evaluate import select
from distill.training.checkpoint import read_shape
from distill.training.draft_config import DraftConfig
from distill.training.memory import estimate_memory
from kernels.files import CONFIG

MOST_BYTES = 128  # a token, where the vocabulary is not known


@dataclass(frozen=True)
class Mac:
    """chip: as `decode.chips` names it; memory: GB; flops: float32 operations a second of the GPU, as Apple
    published them for the chip with the most GPU cores."""

    chip: str
    memory: int
    flops: float

    @property
    def name(self) -> str:
        return f"{self.chip}, {self.memory} GB"

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return BANDWIDTH[self.chip] * 1e9


MACS = (
    Mac("M1", 16, 2.6e12),
    Mac("M2", 24, 3.6e12),
    Mac("M1 Pro", 32, 5.2e12),
    Mac("M1 Max", 64, 10.4e12),
)


@dataclass(frozen=True)
class Work:
    """What one stage takes.

    disk: bytes that stay; memory: bytes at the peak; parts: (bytes read and written, operations) of each thing
    done one after the other, None where the teacher must be known.
    """

    stage: str
    what: str
    disk: float | None
    memory: float | None
    parts: tuple[tuple[float, float], ...] | None

    def seconds(self, mac: Mac) -> float | None:
        """How long it takes at full bandwidth and full speed."""
        if self.parts is None:
            return None
        return sum(max(moved / mac.bandwidth, operations / mac.flops) for moved, operations in self.parts)

    def fits(self, mac: Mac) -> bool:
        """Whether it fits beside the system: Apple lets a GPU have about two thirds of the memory."""
        return self.memory is None or self.memory < mac.memory * 1e9 * 2 / 3


def read_bytes(teacher: Dimensions) -> float:
    """Bytes of a BitNet teacher's weights, on disk, in memory and read for a token: two bits each, and its head."""
    return teacher.weights / 4 + 2 * teacher.head_weights


def operations(teacher: Dimensions, context: float) -> float:
    """Floating-point operations of a token that sees `context` others."""
    attention = 4 * teacher.layers * teacher.heads * teacher.head_dim * context
    return 2 * (teacher.weights + teacher.head_weights) + attention


def teacher_config(name: str | None) -> tuple[dict[str, Any] | None, str]:
    """A teacher's config.json, without its weights, and why there is none."""
    try:
        return find_config(name, "teacher")[1], ""
    except NotFound as error:
        return None, str(error)


def answered(sources: Sequence[str]) -> float:
    """The share of the sources that hold prompts for the teacher; one that is not here is taken for such."""
    asked = weights = 0.0
    for source in map(parse_source, sources):
        first = next(iter(read_source(source)), None) if Path(source.path).exists() else None
        weights += source.weight
        asked += source.weight * (first is None or wants_reply(first))
    return asked / weights


def predict(recipe: Recipe, config: dict[str, Any] | None) -> list[Work]:
    """The work of each stage. config: the teacher's config.json, if it is known; UserError for what it cannot do."""
    prompts = len(select(recipe.evaluate, recipe.prompts()))
    if config is None:
        return [
            Work("collect", _collection(recipe), recipe.collect.tokens * MOST_BYTES, None, None),
            Work("train", _training(recipe), None, None, None),
            Work("evaluate", _evaluation(recipe, prompts), None, None, None),
        ]
    teacher = Dimensions.of(config, f"config.json of {recipe.teacher}")
    recipe.check_for(config)
    if recipe.init is not None and (described := Path(recipe.init) / CONFIG).is_file():
        shape = read_shape(described)
    else:
        shape = recipe.train.shape_for(config, f"config.json of {recipe.teacher}", recipe.train.vocab)
    return [
        _collect(recipe, teacher),
        _train(recipe, teacher, shape),
        _evaluate(recipe, teacher, shape, prompts),
    ]


def _collect(recipe: Recipe, teacher: Dimensions) -> Work:
    """Replies are written in batches, their prompts counted like them, then everything is scored once."""
    settings = recipe.collect
    context = settings.seq_len / 2
    shards = bytes_per_token(teacher.vocab, settings)
    disk = settings.tokens * (shards + (2 if teacher.vocab <= 1 << 16 else 4))
    rows = settings.reply_batch
    writing = settings.tokens * answered(settings.sources) if settings.reply else 0
    reply = (
        writing * (read_bytes(teacher) / rows + teacher.cache_bytes(1) * context),
        writing * operations(teacher, context),
    )
    scored = settings.batch * settings.seq_len
    score = (settings.tokens * read_bytes(teacher) / scored, settings.tokens * operations(teacher, context))
    # Scoring has the head in float32 too. Replies hold a cache, and for a moment a part of it twice.
    weights = read_bytes(teacher) + 4 * teacher.head_weights
    caches = rows * settings.seq_len * teacher.cache_bytes(1) * (1 + 1 / teacher.layers) if writing else 0
    activations = 4 * scored * (4 * teacher.hidden + 3 * teacher.intermediate)
    logits = 7 * 4 * 512 * teacher.vocab  # they, negated and sorted, and their exponentials
    memory = weights + max(caches + 3 * 4 * rows * teacher.vocab, activations + logits)
    return Work("collect", _collection(recipe), disk, memory, (reply, score))


def _train(recipe: Recipe, teacher: Dimensions, shape: DraftConfig) -> Work:
    """Forward and backward are three times the forward's operations; AdamW reads four numbers a parameter and
    writes three, in float32."""
    settings = recipe.train
    rows, seq_len = settings.batch, recipe.collect.seq_len
    steps = -(-settings.tokens // (rows * seq_len))
    reads = bool(shape.taps)
    layers = shape.parameters - (0 if reads else shape.vocab_size * shape.hidden)
    head = shape.head_size * (shape.teacher_hidden or shape.hidden)
    attention = 4 * shape.layers * shape.hidden * seq_len / 2
    work = (settings.unroll if reads else 1) * 3 * (2 * (layers + head) + attention)
    work += operations(teacher, seq_len / 2) if reads else 0  # its body runs over every batch
    optimizer = 28.0 * shape.parameters * steps
    # While it runs there are also its state, the weights and two moments, and the best weights.
    disk = shape.parameters * ((settings.bits or 16) / 8 + 16)
    memory: float = estimate_memory(
        shape,
        rows,
        seq_len,
        narrow=settings.dtype != "float32",
        teacher_hidden=teacher.hidden if settings.teacher_embedding or reads else 0,
        unroll=settings.unroll,
    )
    memory += read_bytes(teacher) if reads or settings.live_prompts else 0
    return Work("train", _training(recipe), disk, memory, ((0.0, work * settings.tokens), (optimizer, 0.0)))


def _evaluate(recipe: Recipe, teacher: Dimensions, shape: DraftConfig, prompts: int) -> Work:
    """Plain decoding of every prompt to the last token, and as much again for the speculative one."""
    tokens = 2 * prompts * recipe.evaluate.max_tokens
    moved = tokens * (read_bytes(teacher) + teacher.cache_bytes(1) * recipe.evaluate.max_tokens / 2)
    # While a model is loaded its ternary weights are there up to three times: as in the file, as the kernels read them,
    # and put together for kernels of a fused step. A draft is read in bfloat16 and rounded to int8.
    memory = read_bytes(teacher) + 2 * teacher.weights / 4 + 5 * shape.parameters
    return Work("evaluate", _evaluation(recipe, prompts), 0, memory, ((moved, 0.0),))


def _collection(recipe: Recipe) -> str:
    settings = recipe.collect
    kept = f"top {settings.top_k}" if settings.sampled is None else f"{settings.sampled} draws"
    return f"{settings.tokens:,} tokens, {kept}{', teacher replies' if settings.reply else ''}"


def _training(recipe: Recipe) -> str:
    settings = recipe.train.for_teacher({})
    kind = f"{'ternary ' if settings.ternary else ''}{'reader' if settings.reads_teacher else 'draft'}"
    width = "the teacher's width" if settings.reads_teacher and recipe.train.hidden is None else settings.hidden
    layers = "1 layer" if settings.layers == 1 else f"{settings.layers} layers"
    return f"{kind} of {layers} x {width}, {settings.tokens:,} tokens"


def _evaluation(recipe: Recipe, prompts: int) -> str:
    return f"{prompts:,} prompts, {recipe.evaluate.max_tokens} tokens at most"


def teacher_bytes(config: dict[str, Any]) -> float:
    """Bytes of a teacher's weights, on disk as in memory."""
    return read_bytes(Dimensions.of(config, "config.json"))


def report(works: list[Work]) -> list[dict[str, Any]]:
    """The predictions as JSON."""
    return [
        {
            "stage": work.stage,
            "what": work.what,
            "disk_bytes": work.disk,
            "memory_bytes": work.memory,
            "macs": [
                {
                    "name": mac.name,
                    "memory": mac.memory,
                    "bandwidth": mac.bandwidth,
                    "flops": mac.flops,
                    "seconds": work.seconds(mac),
                    "fits": work.fits(mac),
                }
                for mac in MACS
            ],
        }
        for work in works
    ]


def table(works: list[Work]) -> str:
    """The predictions for a terminal, with how they come about."""
    lines = [["", "disk", "memory", *(mac.name for mac in MACS)]]
    for work in [*works, _sum(works)]:
        times = [duration(work.seconds(mac)) if work.fits(mac) else "too large" for mac in MACS]
        lines.append([work.stage, size(work.disk), size(work.memory), *times])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
    return (
        f"{rows}\n"
        "Predictions: bytes over memory bandwidth or operations over the GPU's float32 peak, as Apple published them\n"
        "for these chips, whichever is longer. Real runs reach neither and take longer. None was measured on a Mac."
    )


def _sum(works: list[Work]) -> Work:
    disk = None if any(work.disk is None for work in works) else sum(work.disk or 0 for work in works)
    memory = None if any(work.memory is None for work in works) else max(work.memory or 0 for work in works)
    known = [work.parts for work in works if work.parts is not None]
    parts = tuple(part for group in known for part in group) if len(known) == len(works) else None
    return Work("all", "", disk, memory, parts)


def size(count: float | None) -> str:
    """Bytes, for a reader."""
    if count is None:
        return "?"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, for a reader."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
