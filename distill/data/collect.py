"""Stage 1: a teacher reads text, answers prompts, and its logits become shards.

Three passes, each resumable by itself: the teacher writes replies (tokens only, a dataset of its
own in `replies-N/`); everything is cut and packed into rows; the rows are scored into shards. Which
documents form which row, and which rows which batch, follows from the settings alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from decode.metal import limit_memory
from decode.models.cache import Packed
from decode.models.checkpoint import RUNS, Checkpoint
from decode.models.dimensions import Shape
from decode.models.transformer import Transformer
from decode.prompts import Prompt
from decode.tokenizer import Tokenizer
from distill.data.codec import Settings
from distill.data.dataset import Replies, Reply, ReplyWriter
from distill.data.packing import MIN_PIECE, Piece, Row, cut, pack, split_text, wants_reply
from distill.data.replies import write_replies
from distill.data.settings import CollectSettings
from distill.data.shards import Block, Dataset, ShardWriter
from distill.data.sources import Document, Skipped, at_commit, identity, is_excluded, is_hub, load_excluded, read_source
from distill.training.checkpoint import check_tokenizer
from kernels import UserError
from kernels.memory import check_fits

FORMAT = 2
ROWS_PER_SHARD = 64
LOGIT_ROWS = 512
SORTED_BYTES = 32 << 20  # of logits that numpy works on at a time: its copies of them stay this small

Progress = Callable[[str, int, int | None], None]


@dataclass
class Turn:
    """One source's turn to give tokens: how many it should and did. `writers` are of all replies of a collection."""

    quota: int = 0
    taken: int = 0
    announced: bool = False
    writers: list[ReplyWriter] = field(default_factory=list)

    def begin(self, quota: int) -> None:
        self.quota, self.taken, self.announced = quota, 0, False

    def take(self, source: Iterator[Piece]) -> tuple[list[Piece], bool]:
        """Pieces of `quota` tokens, the last one cut to fit, and whether the source ended before."""
        pieces: list[Piece] = []
        while (room := self.quota - self.taken) >= MIN_PIECE:
            piece = next(source, None)
            if piece is None:
                return pieces, True
            pieces.append(Piece(piece.tokens[:room], piece.mask[:room]))
            self.taken += len(pieces[-1].tokens)
        return pieces, False


@dataclass
class Plan:
    """Everything about a collection that is known before the teacher runs.

    sources: what is read: the settings' sources, each dataset of the Hub at its commit.
    """

    teacher: Checkpoint
    settings: CollectSettings
    manifest: Settings
    folder: Path
    sources: tuple[str, ...]
    excluded: frozenset[str] = field(repr=False)


@dataclass(frozen=True)
class Estimate:
    """What a collection will take. seconds is extrapolated from a short run on this machine."""

    tokens: int
    bytes: int
    seconds: float
    tok_per_s: float


def make_plan(teacher: Checkpoint, settings: CollectSettings, out: Path | None) -> Plan:
    """Check the settings, read the sources once for faults, hash what is named, and choose the folder.

    A dataset of the Hub is read at the commit that the folder's manifest names, else at the one it has now: what was
    begun goes on whatever is uploaded meanwhile, and asks the Hub nothing that it was told before.
    """
    settings.check(teacher.config)
    check_tokenizer(teacher.folder)
    for name in settings.sources:
        if Path(name).exists():  # a fault in a source's last line must not show after hours of work
            for _ in read_source(name):
                pass
    values: dict[str, Any] = {
        **asdict(settings),
        "collection_format": FORMAT,
        "teacher": {"name": teacher.name, "hash": teacher.weights_hash},
        "tokenizer_hash": teacher.tokenizer_hash,
        "vocab_size": int(teacher.config["vocab_size"]),
        "k": settings.top_k,
        "sources": [name if is_hub(name) else identity(name) for name in settings.sources],
        "exclude": [identity(name) for name in settings.exclude],
    }
    del values["top_k"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    folder = out or RUNS / f"data-{Path(teacher.name).name}-{digest}"
    begun = _begun_with(folder)
    sources = tuple(at_commit(name, begun) for name in settings.sources)
    values["sources"] = [identity(name, read) for name, read in zip(settings.sources, sources, strict=True)]
    return Plan(teacher, settings, Settings(values), folder, sources, load_excluded(settings.exclude))


def _begun_with(folder: Path) -> list[Any]:
    """The sources in a folder's manifest; what is wrong with one is said when the folder is opened."""
    try:
        sources = Dataset.open(folder).settings.values.get("sources")
    except UserError:
        return []
    return sources if isinstance(sources, list) else []


class Collector:
    """Runs a plan."""

    def __init__(self, plan: Plan, progress: Progress = lambda stage, done, total: None) -> None:
        """progress(stage, tokens more, total or None) is called as work is done.

        A total begins a stage, and ends the one before it. That of replies is what is asked for: the last batch may
        bring more, and prompts may run out before.
        """
        self.plan, self.settings, self.progress = plan, plan.settings, progress
        limit_memory()
        self.tokenizer = Tokenizer(plan.teacher.folder)
        self.model: Transformer = plan.teacher.load()
        self.skipped: dict[str, Skipped] = {}

    def check_folder(self) -> bool:
        """Begin or take up the folder, so that one that cannot be used is refused before any work; whether the
        dataset is there, whole."""
        with ShardWriter.open(self.plan.folder, self.plan.manifest) as writer:
            return writer.manifest.complete

    def run(self) -> Dataset:
        """Collect, or go on where an earlier run with the same settings stopped; of a whole dataset no source is read
        again."""
        with ShardWriter.open(self.plan.folder, self.plan.manifest) as writer:
            if writer.manifest.complete:
                return Dataset.open(self.plan.folder)
            rows = self.rows()
            if not rows:
                reasons = "; ".join(["empty or all excluded", *self._skips()])
                raise UserError(f"{', '.join(self.settings.sources)}: nothing to collect from ({reasons})")
            shards = [rows[i : i + ROWS_PER_SHARD] for i in range(0, len(rows), ROWS_PER_SHARD)]
            missing = writer.missing(len(shards))
            total = sum(int(np.count_nonzero(document)) for _, _, document in rows)
            done = total - sum(int(np.count_nonzero(doc)) for i in missing for _, _, doc in shards[i])
            self.progress("scoring", done, total)
            for index in missing:
                writer.write(self.score(shards[index]), index)
            writer.finish()
        return Dataset.open(self.plan.folder)

    def remarks(self, dataset: Dataset) -> list[str]:
        """What a user should know of a collection that is done: rows left out, and tokens that no source had."""
        remarks, asked = self._skips(), self.settings.tokens
        if dataset.tokens < asked - MIN_PIECE * len(self.settings.sources):
            remarks.append(
                f"{dataset.folder}: the sources had only {dataset.tokens:,} of the {asked:,} tokens asked for"
            )
        return remarks

    def _skips(self) -> list[str]:
        return [
            f"{name}: {skipped.count:,} {'row was' if skipped.count == 1 else 'rows were'} skipped: {skipped.first}"
            for name, skipped in self.skipped.items()
            if skipped.count
        ]

    def rows(self) -> list[Row]:
        """Packed rows: tokens int32, trained positions bool, document uint8, each [seq_len].

        Every source gives an equal share of the tokens; what one cannot give, the later ones do, and what is missing
        then is shared out among those that have more, until it is there or none has any.
        """
        turn, pieces, left = Turn(), list[Piece](), self.settings.tokens
        sources = [self._pieces(index, name, turn) for index, name in enumerate(self.plan.sources)]
        try:
            while sources:
                before, more = left, []
                for index, source in enumerate(sources):
                    turn.begin(left // (len(sources) - index))
                    taken, ended = turn.take(source)
                    pieces += taken
                    left -= turn.taken
                    more += [] if ended else [source]
                sources = more if left < before else []
            for writer in turn.writers:
                writer.finish()
        finally:
            for writer in turn.writers:
                writer.close()
        order = np.random.default_rng(self.settings.seed).permutation(len(pieces))
        return pack([pieces[i] for i in order], self.settings.seq_len)

    def _pieces(self, index: int, name: str, turn: Turn) -> Iterator[Piece]:
        """The pieces of one source, in an order shuffled by the seed; prompts are answered first, as far as asked."""
        skipped = self.skipped[self.settings.sources[index]] = Skipped()
        documents = [d for d in read_source(name, skipped) if not is_excluded(d, self.plan.excluded)]
        rng = np.random.default_rng([self.settings.seed, index])
        documents = [part for document in documents for part in split_text(document, 4 * self.settings.seq_len)]
        documents = [documents[i] for i in rng.permutation(len(documents))]
        asks = [wants_reply(document) for document in documents]
        if self.settings.reply and any(asks):
            replies = self._replies(index, [d for d, ask in zip(documents, asks, strict=True) if ask], turn)
            documents = [d for d, ask in zip(documents, asks, strict=True) if not ask]
            for reply in replies:
                yield from cut(self._masked(reply.tokens, reply.prompt_length), self.settings.seq_len)
        for document in documents:
            yield from cut(self._encode(document), self.settings.seq_len)

    def _encode(self, document: Document) -> Piece:
        if document.messages is None and document.kind == "text":
            return self._masked(np.array(self.tokenizer.encode_text(document.text or ""), np.int32), 1)
        messages = document.messages or [{"role": "user", "content": document.text or ""}]
        if messages[-1]["role"] == "assistant":
            ids, prompt_length = self.tokenizer.encode_conversation(messages)
            return self._masked(np.array(ids, np.int32), prompt_length)
        prompt = Prompt(messages, f"in line {document.line}")
        return self._masked(np.array(self.tokenizer.encode_prompt(prompt), np.int32), 1)

    @staticmethod
    def _masked(tokens: np.ndarray, prompt_length: int) -> Piece:
        """Train on the predictions of everything behind the prompt; the last has no target."""
        mask = np.zeros(len(tokens), bool)
        mask[max(prompt_length - 1, 0) : -1] = True
        return Piece(tokens, mask)

    def _replies(self, index: int, documents: list[Document], turn: Turn) -> Iterator[Reply]:
        """The answers to prompts. A batch is written when one of its replies is asked for, unless it is there."""
        room = min(self.model.context, self.settings.seq_len) - self.settings.max_reply
        folder = self.plan.folder / f"replies-{index}"
        writer = ReplyWriter.open(folder, self.plan.manifest)
        turn.writers.append(writer)
        finished = Replies(folder, writer.manifest)
        places = {entry.index: place for place, entry in enumerate(finished.shards)}
        for number, chunk in enumerate(self._reply_batches(documents, room)):
            if number in places:
                yield from finished.read(places[number])
                continue
            if not turn.announced:
                turn.announced = True
                self.progress("replies", turn.taken, turn.quota)
            self.progress("replies", sum(len(ids) for _, ids in chunk), None)  # the total counts them too
            replies = self._answer(chunk)
            writer.write(replies, number)
            yield from replies

    def _reply_batches(self, documents: list[Document], room: int) -> Iterator[list[tuple[int, list[int]]]]:
        """Batches of (number, ids); prompts too long for a row are left out.

        Lengths are sorted within a stretch of batches, so that little of a batch is padding.
        """
        stretch = 8 * self.settings.reply_batch
        pending: list[tuple[int, list[int]]] = []
        for number, document in enumerate(documents):
            messages = document.messages or [{"role": "user", "content": document.text or ""}]
            ids = self.tokenizer.encode_prompt(Prompt(messages, f"in line {document.line}"))
            if 1 <= len(ids) <= room:
                pending.append((number, ids))
            if len(pending) == stretch or (pending and number == len(documents) - 1):
                pending.sort(key=lambda entry: (len(entry[1]), entry[0]))
                for i in range(0, len(pending), self.settings.reply_batch):
                    yield pending[i : i + self.settings.reply_batch]
                pending = []

    def _answer(self, chunk: list[tuple[int, list[int]]]) -> list[Reply]:
        self._check_caches(chunk)
        heat = self.settings.reply_temperatures
        texts = write_replies(
            self.model,
            [ids for _, ids in chunk],
            [number for number, _ in chunk],
            temperatures=[heat[number % len(heat)] for number, _ in chunk],
            max_reply=self.settings.max_reply,
            end_tokens=self.tokenizer.end_tokens,
            seed=self.settings.seed,
            advance=lambda tokens: self.progress("replies", tokens, None),
        )
        pairs = zip(chunk, texts, strict=True)
        return [Reply(n, np.concatenate([np.array(ids, np.int32), text]), len(ids)) for (n, ids), text in pairs]

    def _check_caches(self, chunk: list[tuple[int, list[int]]]) -> None:
        """Refuse, before anything is allocated, a batch whose caches alone are more than there is memory."""
        longest = max(len(ids) for _, ids in chunk) + self.settings.max_reply
        shape = Shape.of(self.plan.teacher.config, str(self.plan.teacher.folder))
        check_fits(
            len(chunk) * shape.cache_bytes(longest),
            f"--reply-batch {self.settings.reply_batch}: the caches of {len(chunk)} prompts and replies need {{}}",
            "choose a smaller one",
        )

    def score(self, rows: list[Row]) -> Block:
        """Run the teacher over rows, `batch` at a time, and keep its top k and log-sum-exps."""
        parts = []
        for i in range(0, len(rows), self.settings.batch):
            tokens, mask, document = (
                np.stack(column) for column in zip(*rows[i : i + self.settings.batch], strict=True)
            )
            parts.append(self._score_batch(tokens, mask, document))
            self.progress("scoring", int(np.count_nonzero(document)), None)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        return Block(*columns)

    def _score_batch(self, tokens: np.ndarray, mask: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, ...]:
        last = len(self.model.layers) - 1
        flat = self.model.normed(self.model.forward(tokens, Packed(document), taps=[last]).hidden[last])
        ids, logprobs, lses = [], [], []
        for start in range(0, flat.shape[0], LOGIT_ROWS):
            top_ids, top, lse = top_of(
                self.model.logits(flat[start : start + LOGIT_ROWS]),
                self.settings.top_k,
                self.settings.temperatures,
            )
            ids.append(top_ids)
            logprobs.append(top - lse[:, :1])
            lses.append(lse)
        shape = tokens.shape
        return (
            tokens,
            mask,
            document,
            np.concatenate(ids).reshape(*shape, -1),
            np.concatenate(logprobs).reshape(*shape, -1),
            np.concatenate(lses).reshape(*shape, -1),
        )

    def estimate(self) -> Estimate:
        """Time one batch of each kind of work, and extrapolate."""
        settings = self.settings
        firsts = [next(iter(read_source(name)), None) for name in self.plan.sources] if settings.reply else []
        asked = [first is not None and wants_reply(first) for first in firsts]
        row = np.full(settings.seq_len, min(self.tokenizer.end_tokens, default=0), np.int32)
        prompt = row[: min(64, settings.seq_len // 2)].tolist()
        if any(asked):
            self._check_caches([(number, prompt) for number in range(settings.reply_batch)])
        rows = [(row, np.ones_like(row, bool), np.ones_like(row, np.uint8))] * settings.batch
        silent, self.progress = self.progress, lambda stage, done, total: None
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            block = self.score(rows)
            seconds.append(time.perf_counter() - began)
        per_token = seconds[-1] / block.tokens.size
        if any(asked):
            began = time.perf_counter()
            write_replies(
                self.model,
                [prompt] * settings.reply_batch,
                list(range(settings.reply_batch)),
                temperatures=[1.0] * settings.reply_batch,
                max_reply=16,
                end_tokens=frozenset(),
                seed=0,
            )
            written = settings.reply_batch * 16
            per_token += (time.perf_counter() - began) / written * sum(asked) / len(settings.sources)
        self.progress = silent
        total = settings.tokens
        size = bytes_per_token(self.plan.manifest.vocab_size, settings.top_k, len(settings.temperatures))
        return Estimate(total, total * size, total * per_token, 1 / per_token)


def bytes_per_token(vocab_size: int, top_k: int, temperatures: int) -> int:
    """Stored bytes a position, rounded up (docs/shards.md)."""
    bits = top_k * ((vocab_size - 1).bit_length() + 12)
    return -(-bits // 8) + (2 if vocab_size <= 1 << 16 else 4) + 4 * temperatures + 2


def top_of(logits: mx.array, k: int, temperatures: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k highest logits, by falling logit and then by id, and log-sum-exps over all of them.

    logits: float32 [n, vocab]. Returns int32 [n, k], float32 [n, k], float32 [n, temperatures].
    """
    if mx.default_device() == mx.cpu:
        # numpy's partition and exp are several times faster than MLX's on a CPU.
        whole = np.asarray(logits)
        rows = max(1, SORTED_BYTES // whole[:1].nbytes)
        parts = [_numpy_top_of(whole[i : i + rows], k, temperatures) for i in range(0, len(whole), rows)]
        ids, top, lse = (np.concatenate(column) for column in zip(*parts, strict=True))
    else:
        picked = mx.argpartition(-logits, k - 1, axis=-1)[:, :k]
        lse = np.array(mx.stack([mx.logsumexp(logits / t, axis=-1) for t in temperatures], axis=-1))
        ids, top = np.array(picked).astype(np.int32), np.array(mx.take_along_axis(logits, picked, axis=-1))
    order = np.lexsort((ids, -top), axis=-1)
    return np.take_along_axis(ids, order, -1), np.take_along_axis(top, order, -1), lse


def _numpy_top_of(
    logits: np.ndarray, k: int, temperatures: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`top_of` with the k in no order."""
    ids = np.argpartition(logits, logits.shape[1] - k, axis=-1)[:, -k:].astype(np.int32)
    top = np.take_along_axis(logits, ids, -1)
    highest = top.max(axis=-1, keepdims=True)
    sums = [np.exp((logits - highest) / np.float32(t)).sum(axis=-1) for t in temperatures]
    scaled = [highest[:, 0] / np.float32(t) for t in temperatures]
    lse = np.stack([peak + np.log(total) for peak, total in zip(scaled, sums, strict=True)], axis=-1)
    return ids, top, lse
