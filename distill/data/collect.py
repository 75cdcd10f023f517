"""`distill collect`: a teacher reads text, answers prompts, and its logits become shards.

Three passes, one after the other. `prompts`: which documents, in which order. `reply_pass`: the teacher answers, and
all that will be scored is kept as tokens in a reply dataset with settings of its own. `scoring`: those tokens, packed
into rows, become shards; it reads nothing but the reply dataset, so it can be repeated with other settings, or
elsewhere. The last two can be stopped at any instant and go on.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from decode.batching import Batch, Job
from decode.metal import limit_memory
from decode.models.checkpoint import RUNS, Checkpoint, has_tokenizer
from decode.models.dimensions import Dimensions
from decode.models.transformer import Transformer
from decode.tokenizer import Tokenizer, check_tokenizer
from distill.data.codec import token_type
from distill.data.documents import LeftOut
from distill.data.exclusion import Excluded, load_excluded
from distill.data.manifest import MANIFEST, DatasetSettings, Manifest, Omission, ScoredFrom, folder_name
from distill.data.packing import MIN_SEGMENT
from distill.data.prompts import Chosen, choose_documents, wants_reply
from distill.data.ranks import WORKER, Ranks
from distill.data.reply_dataset import Replies, ReplyWriter
from distill.data.reply_pass import Progress, ReplyPass
from distill.data.rows import Rows
from distill.data.scoring import Scorer, bytes_per_token, check_memory
from distill.data.settings import OF_REPLIES, OF_SCORES, CollectSettings, complete_settings
from distill.data.shards import Dataset, ShardWriter
from distill.data.sharing import Part, SharedBatch, score
from distill.data.sources import (
    Source,
    Watch,
    at_commit,
    describe,
    parse_source,
    read_source,
    shown_name,
    source_fingerprint,
)
from distill.provenance import check_same_teacher, teacher_files
from kernels import UserError
from kernels.files import check_room, real_path, sha256, stored_bytes
from kernels.memory import check_fits

ROWS_PER_SHARD = 64
ESTIMATE_SECONDS = 5.0  # that an estimate of how long scoring takes may take, about


@dataclass
class Plan:
    """Everything about a collection that is known before the teacher runs.

    folder, replies: of the shards and of the reply dataset; sources: what is read for the latter, each dataset of the
    Hub at its commit; None where the reply dataset was given and only scoring is to be done. watch: its local files.
    """

    teacher: Checkpoint
    settings: CollectSettings
    folder: Path
    manifest: DatasetSettings
    replies: Path
    reply_manifest: DatasetSettings
    sources: tuple[Source, ...] | None
    excluded: Excluded = field(default_factory=Excluded, repr=False)
    watch: Watch = field(default_factory=lambda: Watch(()), repr=False)


@dataclass(frozen=True)
class Estimate:
    """What a collection will take. seconds is extrapolated from a short run on this machine."""

    tokens: int
    bytes: int
    seconds: float
    tok_per_s: float


def plan_collection(teacher: Checkpoint, settings: CollectSettings, out: Path | None) -> Plan:
    """Check the settings, read the sources once for faults, hash what is named, and choose the folders.

    The reply dataset lies beside the shards, under a name made of what decides it: other shards there are scored from
    the same replies. A dataset of the Hub is read at the commit that an earlier manifest names, else at the one it has
    now: what was begun goes on whatever is uploaded meanwhile, and asks the Hub nothing that it was told before.
    """
    settings.check(teacher.config)
    check_tokenizer(teacher.folder)
    named = tuple(map(parse_source, settings.sources))
    if any(one.kind == "self" for one in named):
        before, behind = Tokenizer(teacher.folder).open_turn
        if len(before) + len(behind) > settings.seq_len - settings.max_reply - MIN_SEGMENT:
            raise UserError(f"--source self: --seq-len {settings.seq_len} leaves no room for a user's turn")
    watch = Watch(named)
    for source in named:
        if source.kind in ("file", "folder"):  # a fault in the last line must not show after hours of work
            for _ in read_source(source):
                pass
    values: dict[str, Any] = {
        **of_teacher(teacher),
        **settings.recorded(OF_REPLIES),
        "sources": [
            {"name": one.name, "kind": "hub"} if one.kind == "hub" else source_fingerprint(one) for one in named
        ],
        "exclude": [source_fingerprint(name) for name in settings.exclude],
    }
    values |= _named_as({} if out is None else _begun(out), teacher)
    scores = settings.recorded(OF_SCORES)
    folder = out or RUNS / folder_name("data", DatasetSettings(values | scores))
    replies = real_path(folder).parent / folder_name("replies", DatasetSettings(values))
    begun = [_begun(place) for place in (replies, folder)]
    known = [source for one in begun if isinstance(one.get("sources"), list) for source in one["sources"]]
    sources = tuple(at_commit(one, known) for one in named)
    values["sources"] = list(map(source_fingerprint, sources))
    if "template_time" in values:
        times = [one["template_time"] for one in begun if "template_time" in one]
        values["template_time"] = next(iter(times), values["template_time"])
    manifest, reply_manifest = DatasetSettings(values | scores), DatasetSettings(values)
    excluded = load_excluded(settings.exclude)
    return Plan(teacher, settings, folder, manifest, replies, reply_manifest, sources, excluded, watch)


def plan_scoring(
    teacher: Checkpoint, folder: Path, settings: CollectSettings, given: Collection[str], out: Path | None
) -> Plan:
    """The plan to score the reply dataset in a folder, as `plan_collection` would where it is the collection's own.

    given: the options of `distill collect` that were named; none may decide replies, which are there, but `seq_len`.
    """
    for setting in settings.schema():
        if setting.key in given and setting.name not in OF_SCORES:
            raise UserError(f"--replies {folder}: these are written; {setting.flag} would decide new ones")
    replies = Replies.open(folder)
    if replies.format < 3:
        raise UserError(f"--replies {folder}: is of the older format {replies.format}, and cannot be scored again")
    if not replies.complete:
        raise UserError(f"--replies {folder}: is not complete; the command that began it goes on with it")
    mine, values = of_teacher(teacher), complete_settings(replies.settings.values)
    if replies.settings.teacher_hash != teacher.weights_hash:
        raise UserError(f"--replies {folder}: was written by {replies.settings.teacher_name}, not by {teacher.name}")
    mine |= _named_as(values, teacher)
    here = {name: value for name, value in mine.items() if name in values and name != "template_time"}
    if difference := replies.settings.difference(DatasetSettings(values | here)):
        raise UserError(f"--replies {folder}: was written with another {difference[0]} than that of {teacher.folder}")
    try:
        known = {name: values[name] for name in OF_REPLIES}
        settings = CollectSettings(
            **known
            | {name: tuple(entry["name"] for entry in known[name]) for name in ("sources", "exclude")}
            | {"reply_temperatures": tuple(known["reply_temperatures"])}
            | {name: getattr(settings, name) for name in OF_SCORES if name != "seq_len" or name in given},
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST}: is damaged (settings: {error})") from None
    replace(settings, max_reply=1).check(teacher.config)
    pinned = {name: values[name] for name in mine if name in values}
    manifest = DatasetSettings(pinned | known | settings.recorded(OF_SCORES))
    return Plan(
        teacher, settings, out or RUNS / folder_name("data", manifest), manifest, folder, replies.settings, sources=None
    )


def of_teacher(teacher: Checkpoint) -> dict[str, Any]:
    """What decides replies of a teacher: its weights, what forms its prompts, and where it ends."""
    tokenizer = Tokenizer(teacher.folder)
    values = {
        "teacher": {"name": teacher.name, "hash": teacher.weights_hash},
        "tokenizer_hash": teacher.tokenizer_hash,
        "chat_template_hash": tokenizer.template_hash,
        "end_tokens": sorted(tokenizer.end_tokens),
        "teacher_files": teacher_files(tokenizer),
        "vocab_size": int(teacher.config["vocab_size"]),
    }
    time = tokenizer.template_time
    return values if time is None else values | {"template_time": time}


def _named_as(begun: dict[str, Any], teacher: Checkpoint) -> dict[str, Any]:
    """What names a teacher and its tokenizer in the settings of a dataset that was begun with them: models move, and
    until 0.2.0 a tokenizer's hash was another."""
    if not begun or begun["teacher"]["hash"] != teacher.weights_hash:
        return {}
    known = has_tokenizer(teacher.folder, begun["tokenizer_hash"])
    return {name: begun[name] for name in (("teacher", "tokenizer_hash") if known else ("teacher",))}


def _begun(folder: Path) -> dict[str, Any]:
    """The settings in a folder's manifest; what is wrong with one is said when the folder is opened."""
    try:
        return Manifest.read(folder).settings.values
    except UserError:
        return {}


def what_is_read(plan: Plan) -> list[dict[str, Any]]:
    """What a collection will read: each source, its share of the tokens, and what of it is read, in words."""
    sources = plan.sources or ()
    whole = sum(source.weight for source in sources)
    return [
        {"source": one.name, "kind": one.kind, "share": one.weight / whole, "reads": describe(one)} for one in sources
    ]


class Collector:
    """Runs a plan."""

    def __init__(
        self, plan: Plan, progress: Progress = lambda stage, done, total: None, ranks: Ranks | None = None
    ) -> None:
        """ranks: those that help; they are told what there is to do.

        progress(stage, tokens more, total or None) is called as work is done.

        A total begins a stage, and ends the one before it. That of replies is what is asked for: the last batch may
        bring more, and prompts may run out before.
        """
        self.plan, self.settings, self.progress = plan, plan.settings, progress
        limit_memory()
        check_memory(plan.teacher.config, plan.settings.batch, plan.settings.seq_len)
        self.tokenizer = Tokenizer(plan.teacher.folder, plan.reply_manifest.values.get("template_time"))
        if plan.sources is not None:
            check_same_teacher(self.tokenizer, plan.reply_manifest.values["teacher_files"])
        self.ranks = ranks or Ranks()
        self._here: dict[str, Any] = {"machine": self.ranks.machine, "mixed": self.ranks.mixed}
        values = {name: getattr(self.settings, name) for name in (*OF_SCORES, "max_reply", "seed")}
        for rank in self.ranks.connections:
            slots = self.ranks.slots.setdefault(rank, self.settings.reply_batch)
            self.ranks.send(
                rank,
                {"settings": values | {"reply_batch": slots}, "dataset": plan.manifest.values}
                | {"teacher": str(plan.teacher.folder)},
            )
        self._model: Transformer | None = None if self.ranks.has_worker else plan.teacher.load()

    @property
    def model(self) -> Transformer:
        """The teacher, where this process computes."""
        assert self._model is not None
        return self._model

    def check_folder(self) -> bool:
        """Begin or take up the folder, so that one that cannot be used, or has no room for what is missing, is refused
        before any work; whether the dataset is there, whole."""
        check_room(self.plan.folder, self._missing_bytes())
        with ShardWriter.open(self.plan.folder, self.plan.manifest, **self._here) as writer:
            return writer.manifest.complete

    def run(self) -> Dataset:
        """Collect, or go on where an earlier run with the same settings stopped. Where the replies are whole, none is
        made; where the dataset is, none is read."""
        with ShardWriter.open(self.plan.folder, self.plan.manifest, **self._here) as writer:
            if writer.manifest.complete:
                return Dataset.open(self.plan.folder)
            replies = self.replies()
            name = folder_name("replies", replies.settings)
            writer.score_from(ScoredFrom(name, sha256(replies.folder / MANIFEST)))
            rows = self.rows(replies)
            if not rows:
                raise self._nothing(replies.left_out)
            shards = [slice(i, i + ROWS_PER_SHARD) for i in range(0, len(rows), ROWS_PER_SHARD)]
            missing = writer.missing(len(shards))
            total = int(rows.sizes.sum())
            done = total - sum(int(rows.sizes[shards[i]].sum()) for i in missing)
            self.progress("scoring", done, total)
            scored = score(
                self.ranks,
                None if self.ranks.has_worker else self.scorer(),
                self.plan.manifest,
                lambda index: Part(index, index * ROWS_PER_SHARD, rows[shards[index]]),
                missing,
                lambda tokens: self.progress("scoring", tokens, None),
            )
            for index, coded in scored:
                writer.add(coded, index)
            assert not writer.missing(len(shards))
            writer.finish()
        return Dataset.open(self.plan.folder)

    def replies(self) -> Replies:
        """The whole reply dataset, after the teacher has written what is missing of it."""
        if self.plan.sources is None:
            return Replies.open(self.plan.replies)
        with ReplyWriter.open(self.plan.replies, self.plan.reply_manifest, **self._here) as writer:
            if not writer.manifest.complete:
                chosen = self.choose()
                try:
                    cut = self.reply_pass().run(writer, chosen, self.plan.excluded)
                finally:
                    for one in chosen:
                        one.documents.close()
                omissions = self._omissions([one.left_out for one in chosen])
                if not writer.manifest.entries:
                    raise self._nothing(omissions)
                writer.note_omissions(omissions, self._omissions(cut))
                writer.finish()
        return Replies.open(self.plan.replies)

    def _check_sources(self) -> None:
        """Refuse what came of sources that were edited meanwhile, before it is written."""
        self.plan.watch.check(self.plan.reply_manifest.values["sources"])

    def _missing_bytes(self) -> float:
        """What is still to be written, of replies and of shards."""
        plan, tokens = self.plan, self._tokens()
        try:
            if Dataset.open(plan.folder).complete:
                return 0
        except UserError:
            pass  # it is not begun, or what is wrong with it is said when it is
        size = tokens * (self._bytes_per_token() + token_type(plan.manifest.vocab_size).itemsize)
        return size - stored_bytes(plan.folder) - stored_bytes(plan.replies)

    def _tokens(self) -> int:
        """How many the dataset will have: those of its replies, where they are whole, else what was asked for."""
        try:
            replies = Replies.open(self.plan.replies)
        except UserError:
            return self.settings.tokens
        return replies.tokens if replies.complete else self.settings.tokens

    def _bytes_per_token(self) -> int:
        """Of the shards."""
        return bytes_per_token(self.plan.manifest.vocab_size, self.settings)

    def choose(self) -> list[Chosen]:
        """The first pass: the documents of each source."""
        settings = self.settings
        return [
            choose_documents(
                source,
                excluded=self.plan.excluded,
                longest=4 * settings.seq_len,
                seed=(settings.seed, index),
            )
            for index, source in enumerate(self.plan.sources or ())
        ]

    def rows(self, replies: Replies) -> Rows:
        """What is scored."""
        return Rows(replies, self.settings.seq_len, self.settings.seed)

    def remarks(self, dataset: Dataset) -> list[str]:
        """What a user should know of a collection that is done: what was left out, and tokens that no source had."""
        remarks, asked = [omission.told("left out") for omission in self.left_out()], self.settings.tokens
        remarks += [omission.told("cut") for omission in self.cut()]
        if self.plan.sources is not None and dataset.tokens < asked - MIN_SEGMENT * len(self.settings.sources):
            remarks.append(
                f"{dataset.folder}: the sources had only {dataset.tokens:,} of the {asked:,} tokens asked for"
            )
        return remarks

    def left_out(self) -> tuple[Omission, ...]:
        """What of the sources is not in a collection that is done; nothing where its replies are not here."""
        try:
            return Replies.open(self.plan.replies).left_out
        except UserError:
            return ()

    def cut(self) -> tuple[Omission, ...]:
        """Which conversations of a collection that is done end early; nothing where its replies are not here."""
        try:
            return Replies.open(self.plan.replies).cut
        except UserError:
            return ()

    def _omissions(self, of_sources: Sequence[LeftOut]) -> tuple[Omission, ...]:
        return tuple(
            Omission(shown_name(source), reason, count, one.firsts[reason])
            for source, one in zip(self.settings.sources, of_sources, strict=True)
            for reason, count in one.counts.items()
        )

    def _nothing(self, omissions: Sequence[Omission]) -> UserError:
        reasons = "; ".join(omission.told("left out") for omission in omissions) or "nothing is there"
        if self.plan.sources is None:
            return UserError(f"--replies {self.plan.replies}: nothing to score ({reasons})")
        return UserError(f"{', '.join(self.settings.sources)}: nothing to collect from ({reasons})")

    def reply_pass(self) -> ReplyPass:
        """What fills the reply dataset."""
        batch = SharedBatch(None if self.ranks.has_worker else self.batch(), self.ranks)
        context = self.plan.teacher.config.get("max_position_embeddings") or 1 << 30
        return ReplyPass(batch, self.tokenizer, context, self.settings, self.progress, self._check_sources)

    def batch(self) -> Batch:
        """What answers prompts with these settings."""
        settings, shape = self.settings, Dimensions.of(self.plan.teacher.config, str(self.plan.teacher.folder))

        def check(rows: int) -> None:
            """Refuse, before it is allocated, a cache of so many rows a prompt that is more than there is memory."""
            check_fits(
                settings.reply_batch * shape.cache_bytes(rows),
                f"--reply-batch {settings.reply_batch}: the caches of so many prompts and their replies need {{}}",
                "choose a smaller one",
            )

        return Batch(self.model, settings.reply_batch, settings.max_reply, self.tokenizer.end_tokens, check)

    def scorer(self) -> Scorer:
        """What scores rows of these settings."""
        return Scorer(
            self.model,
            self.settings.top_k,
            self.settings.temperatures,
            self.settings.batch,
            sampled=self.settings.sampled or 0,
            seed=self.settings.seed,
        )

    def estimate(self) -> Estimate:
        """Time one batch of each kind of work that is still to do, and extrapolate."""
        firsts = [next(iter(read_source(source)), None) for source in self._unanswered()]
        weights = [source.weight for source in self.plan.sources or ()]
        asked = sum(
            weight for weight, first in zip(weights, firsts, strict=False) if first is not None and wants_reply(first)
        )
        share = asked / sum(weights) if asked else 0.0
        if self.ranks.has_worker:
            self.ranks.send(WORKER, {"replied": share})
            _, message, _ = next(self.ranks.received(wait=True))
            per_token = message["seconds"]
        else:
            per_token = self.seconds_per_token(share)
        per_token /= self.ranks.size
        total = self._tokens()
        return Estimate(total, total * self._bytes_per_token(), total * per_token, 1 / per_token)

    def seconds_per_token(self, replied: float) -> float:
        """That this process takes now. replied: the share of tokens that are replies."""
        settings = self.settings
        row = np.full(settings.seq_len, min(self.tokenizer.end_tokens, default=0), np.int32)
        prompt = row[: min(64, settings.seq_len // 2)].tolist()
        one = (row, np.ones_like(row, bool), np.ones_like(row, np.uint8))
        scorer, rows = self.scorer(), 1
        for _ in range(3):  # the first compiles, the second tells how many rows take a while, not minutes
            began = time.perf_counter()
            scorer.score([one] * rows)
            per_token = (time.perf_counter() - began) / (rows * settings.seq_len)
            rows = max(1, min(settings.batch, int(ESTIMATE_SECONDS / (per_token * settings.seq_len))))
        if replied:
            jobs = [Job([prompt], [1.0], (0, i), len(prompt) + 16) for i in range(settings.reply_batch)]
            began, written = time.perf_counter(), 0
            for _, replies in self.batch().run(iter(jobs)):
                written += sum(len(reply.tokens) for reply in replies)
            per_token += (time.perf_counter() - began) / written * replied
        return per_token

    def _unanswered(self) -> tuple[Source, ...]:
        """The sources whose prompts may still want replies."""
        try:
            there = Replies.open(self.plan.replies).complete
        except UserError:
            there = False
        return () if there or not self.settings.reply or self.plan.sources is None else self.plan.sources
