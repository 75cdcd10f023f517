"""`distill train`: a dataset of teacher logits in, a draft model out.

While it runs, the output folder holds `log.jsonl`, `curves.png` and `state/`; the draft itself
appears at the end or when interrupted, all its files at once. What else lies there stays. Running
the same command again goes on from `state/`, and ends with the same weights as a run that was
never stopped; once it is finished, the same command says what came out.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from decode.metal import limit_memory
from decode.models.checkpoint import RUNS, Checkpoint, has_tokenizer
from decode.tokenizer import Tokenizer, check_tokenizer
from distill.data.shards import Dataset
from distill.provenance import (
    FORMS_PROMPTS,
    check_same_teacher,
    completed,
    dataset_metadata,
    made_with,
    origin,
    teacher_files,
    teacher_metadata,
)
from distill.training import cpu
from distill.training.checkpoint import check_draft_folder, check_files, rounded, save
from distill.training.cpu import CpuHead
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama
from distill.training.loader import DataLoader
from distill.training.losses import FusedHead, check_draws
from distill.training.memory import check_memory, disk_bytes, is_narrow
from distill.training.optimizer import learning_rate
from distill.training.plots import training_curves
from distill.training.settings import TrainSettings
from distill.training.state import CURVES, LOG, STATE, State, check_shown, difference, discard, of_finished
from distill.training.step import Step, TrimmedHead, measure
from distill.training.vocabulary import DraftVocabulary, select_draft_vocabulary
from kernels.backends import use_fast_blas
from kernels.console import progress, say
from kernels.errors import UserError
from kernels.files import (
    append_line,
    cannot_write,
    read_json,
    read_json_lines,
    real_path,
    replacing,
    stored_bytes,
    working_in,
    write_atomic,
)

if TYPE_CHECKING:
    from tqdm import tqdm

DRAW_SECONDS = 20.0  # a picture takes part of a second
READ_EVERY = 20  # most steps that run before the host looks at their losses
MEASURED = ("held_out_loss", "agreement", "expected_acceptance")
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Summary:
    """What came out. Losses in nats a position; agreement and acceptance as shares of positions."""

    out: Path
    parameters: int
    steps: int
    tokens: int
    batch: int  # rows a step: all that there are, where that is fewer than was asked for
    seconds: float  # of this process: less than the whole where it resumed
    tok_per_s: float
    best_step: int
    held_out_loss: float  # of the saved weights, quantised as they are
    agreement: float
    expected_acceptance: float  # lower bound: sum of min(p, q) over the top k, or over the ids that were drawn
    held_out_loss_float: float | None  # of the same weights in float32; None where the log of an earlier run is gone
    vocabulary: dict[str, Any] | None  # of a trimmed head: tokens kept, of how many, share of the targets
    log: Path
    plot: Path
    done_before: bool = False  # the same command had finished, and nothing was trained now


def train(
    data: Path,
    teacher_folder: Path,
    out: Path,
    settings: TrainSettings,
    progress: Progress | None = None,
    quiet: bool = False,
) -> Summary:
    """Train a draft for a teacher on a dataset and save it in `out`; where it is there already, say what it is.

    progress: called with every line that also goes to log.jsonl; quiet: no bar on standard error.
    Raises UserError for unusable input, KeyboardInterrupt when interrupted: what was learned so
    far is then saved as a draft, and the same command continues.
    """
    data, teacher_folder, out = Path(data), Path(teacher_folder), Path(out)
    dataset = Dataset.open(data)
    settings.check(dataset.settings.vocab_size)
    check_draws(settings.loss, dataset.settings.sampled)
    check_tokenizer(teacher_folder)
    other = other_teacher(dataset, teacher_folder)
    fingerprint = settings.record() | {"data": dataset.sha256}
    files = teacher_files(Tokenizer(teacher_folder))
    fingerprint["teacher_files"] = files
    _check_template(dataset, teacher_folder, files)
    if other is not None:
        fingerprint["teacher"] = other["hash"]
    if (summary := finished_run(out, fingerprint)) is not None:
        return summary
    tell = say(quiet)
    if other is not None:
        name = dataset.settings.teacher_name
        tell(
            f"{data}: was collected from {name}, not from {teacher_folder}, which has the same tokenizer: the draft"
            f" learns to agree with {name}, and is kept as a draft for it"
        )
    if not dataset.complete:
        asked = f" of {dataset.settings.values['tokens']:,}" if "tokens" in dataset.settings.values else ""
        tell(f"{data}: is not complete: trained on the {dataset.tokens:,}{asked} tokens that are there")
    if mx.default_device() == mx.Device(mx.cpu):
        use_fast_blas()
    limit_memory()
    vocabulary = None if settings.vocab is None else select_draft_vocabulary(dataset, settings.vocab, teacher_folder)
    size = None if vocabulary is None else len(vocabulary.d2t)
    config = DraftConfig.for_teacher(teacher_folder, settings.layers, settings.hidden, size)
    if config.vocab_size != dataset.settings.vocab_size:
        raise UserError(
            f"{data}: has a vocabulary of {dataset.settings.vocab_size},"
            f" {teacher_folder / 'config.json'} one of {config.vocab_size}"
        )
    teacher_hidden = int(read_json(teacher_folder / "config.json")["hidden_size"]) if settings.teacher_embedding else 0
    loader = DataLoader(
        dataset, settings.temperature, settings.batch, settings.seed, settings.eval_share, settings.eval_rows
    )
    if loader.batch < settings.batch:
        tell(f"{data}: has {loader.rows} rows to train on, so --batch {settings.batch} is {loader.batch}")
    check_memory(config, loader.batch, dataset.settings.seq_len, teacher_hidden, settings.dtype)
    with working_on_draft(out, config):
        if (summary := finished_run(out, fingerprint)) is not None:  # a kill had kept it from its place
            return summary
        state = State.open(out / STATE, fingerprint)
        return _Run(loader, teacher_folder, other, out, settings, config, state, vocabulary, progress, quiet).go()


@contextmanager
def working_on_draft(out: Path, config: DraftConfig) -> Iterator[None]:
    """Hold the folder of a draft that is to be trained, after all that can be found wrong with it before the work."""
    with working_in(out, room=disk_bytes(config) - stored_bytes(out / STATE)):
        check_draft_folder(out)
        check_shown(out)
        yield


def default_folder(settings: TrainSettings, data: Path, teacher: str, teacher_hash: str) -> Path:
    """Where a draft goes that was given no folder: the same command finds it again. teacher: its name."""
    name = repr((sorted(settings.naming().items()), str(data.resolve()), teacher_hash))
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return RUNS / f"draft-{Path(teacher).name}-{settings.layers}x{settings.hidden}-{digest}"


def other_teacher(dataset: Dataset, teacher_folder: Path) -> dict[str, Any] | None:
    """What is known of a teacher that the dataset was not collected from; None where it was.

    Refuses one with another tokenizer: the dataset's token ids are not its own.
    """
    if not has_tokenizer(teacher_folder, dataset.settings.tokenizer_hash):
        raise UserError(
            f"{dataset.folder}: was collected from {dataset.settings.teacher_name}, whose tokenizer"
            f" is not that of {teacher_folder}"
        )
    teacher = Checkpoint(teacher_folder, teacher_folder.resolve().name, {})
    if teacher.weights_hash == dataset.settings.teacher_hash:
        return None
    return {"name": teacher.name, "hash": teacher.weights_hash} | origin(teacher_folder)


def _check_template(dataset: Dataset, teacher_folder: Path, files: dict[str, str]) -> None:
    """Refuse a teacher that writes prompts in another way than those of the dataset: its draft gets its template."""
    recorded = dataset.settings.values.get("teacher_files")
    collected = completed(recorded, files) if recorded else {}
    for name in FORMS_PROMPTS if collected else ():
        if collected.get(name) != files.get(name):
            raise UserError(f"{dataset.folder}: was collected with another {name} than that of {teacher_folder}")


def finished_run(out: Path, fingerprint: dict[str, Any]) -> Summary | None:
    """What an earlier run with the same settings, data and teacher has finished in a folder; None if nothing is.

    UserError where the finished draft there is another's, or damaged.
    """
    path = out / "draft.json"
    about = read_json(path) if path.is_file() else {}
    if not about.get("complete"):
        return None
    try:
        training = about["training"]
        begun = of_finished(training) | {"data": training["data"]["sha256"]}
        if "started_from" in training:
            begun["teacher"] = training["started_from"]["hash"]
        parameters = DraftConfig.from_record(about["config"]).parameters
        figures = {name: training[name] for name in ("steps", "tokens", "best_step", *MEASURED)}
    except (KeyError, TypeError):
        raise UserError(f"{out}: holds a finished draft of another make; give another --out or delete it") from None
    if text := difference(begun, fingerprint):
        raise UserError(f"{out}: holds a finished draft that was trained with {text}; give another --out or delete it")
    check_files(out, about)
    discard(out / STATE)
    log = out / LOG
    lines = read_json_lines(log) if log.is_file() else []
    evals = [line for line in lines if isinstance(line, dict) and line.get("kind") == "eval"]
    best = [line for line in evals if line.get("step") == figures["best_step"]]
    return Summary(
        out=out,
        parameters=parameters,
        batch=training.get("batch", training["settings"].get("batch")),  # an older version kept what was asked for
        seconds=0.0,
        tok_per_s=0.0,
        held_out_loss_float=best[-1].get("held_out_loss") if best else None,
        vocabulary=about.get("vocabulary"),
        log=log,
        plot=out / CURVES,
        done_before=True,
        **figures,
    )


class _Run:
    """One training run: the loop, and what it writes."""

    def __init__(
        self,
        loader: DataLoader,
        teacher_folder: Path,
        other: dict[str, Any] | None,
        out: Path,
        settings: TrainSettings,
        config: DraftConfig,
        state: State,
        vocabulary: DraftVocabulary | None,
        progress: Progress | None,
        quiet: bool,
    ) -> None:
        """other: the teacher in teacher_folder, where it is not the one whose logits the loader reads."""
        self.loader, self.teacher_folder, self.other, self.out = loader, teacher_folder, other, out
        self.settings, self.config, self.state = settings, config, state
        self.vocabulary, self.progress, self.quiet = vocabulary, progress, quiet
        self.step_tokens = loader.batch * loader.dataset.settings.seq_len
        self.steps = math.ceil(settings.tokens / self.step_tokens)
        self.every = max(1, math.ceil(self.steps / settings.evals))
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        narrow = is_narrow(settings.dtype)
        self.model = llama.build(config)
        plain = on_gpu or narrow
        head_type = FusedHead if plain else CpuHead
        self.head = head_type(
            settings.loss, settings.temperature, chunk_bytes=(256 if on_gpu else 32) << 20, eager=not on_gpu
        )
        self.step = Step(
            self.model,
            self.head,
            weight_decay=settings.weight_decay,
            clip=settings.clip,
            dtype=mx.bfloat16 if narrow else mx.float32,
            attention=llama.masked_attention if plain else cpu.attention,
            trimmed=None if vocabulary is None else TrimmedHead(vocabulary.d2t, vocabulary.size),
        )
        self.log = out / LOG
        self.seconds = 0.0
        self.drawn = -math.inf

    def go(self) -> Summary:
        self.held_out = self.loader.held_out_batches()
        first = self._restore()
        state, begun, total = self.state, time.perf_counter(), self.steps * self.step_tokens
        with (
            _interruptible() as interrupted,
            closing(self.loader.batches(first)) as batches,
            progress(total, "train", "tok", self.quiet, initial=first * self.step_tokens) as bar,
        ):
            pending: list[mx.array] = []
            sync_interval, read_at = 1, begun
            for number in range(first, self.steps):
                rate = learning_rate(number, self.steps, self.settings.lr, self.settings.warmup)
                pending.append(self.step(state.tensors, next(batches), number + 1, rate))
                done = number + 1
                due = done % self.every == 0 or done == self.steps
                if len(pending) < sync_interval and not due and not interrupted.is_set():
                    continue
                figures = np.array(mx.stack(pending))  # waits for the steps
                now = time.perf_counter()
                speed = len(pending) * self.step_tokens / (now - read_at)
                # About two readings a second: often enough for the eye, rare enough for a GPU.
                sync_interval = min(READ_EVERY, max(1, round(0.5 * speed / self.step_tokens)))
                bar.update(len(pending) * self.step_tokens)
                self._note_steps(done, rate, figures, speed, bar)
                pending, read_at = [], now
                if due:
                    self._evaluate(done)
                    self._write(state.save, done)
                    read_at = time.perf_counter()
                if interrupted.is_set() and done < self.steps:
                    self._stop(done)
            self.seconds = time.perf_counter() - begun
        return self._finish((self.steps - first) * self.step_tokens)

    def _restore(self) -> int:
        """Weights from the state, or fresh ones; returns the number of steps already done."""
        self._write(self.log.touch)
        lines = []
        if self.state.step:
            lines = [
                line for line in self.log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.state.step
            ]
            self.state.read()
        else:
            embedding = None
            if self.settings.teacher_embedding:
                teacher = llama.teacher_embedding(self.teacher_folder)
                if teacher is not None and len(teacher) == self.config.vocab_size:
                    embedding = llama.init_embedding_from(teacher, self.config.hidden, self.settings.seed)
            model = llama.create(self.config, self.settings.seed, embedding)
            self.state.begin(llama.named_weights(model))
        text = "".join(line + "\n" for line in lines).encode()
        write_atomic(real_path(self.log), text)
        self.state.write_run(text)
        self._line({"kind": "start", "step": self.state.step, "steps": self.steps} | self.loader.row_counts())
        return self.state.step

    def _note_steps(self, done: int, rate: float, figures: np.ndarray, speed: float, bar: tqdm) -> None:
        """figures: float32 [steps, 5] as `Step` returns them."""
        counts = figures[:, 3]
        if not np.isfinite(figures).all():
            raise UserError(f"the loss is not finite at step {done}: a smaller --lr than {self.settings.lr:g} may help")
        weights = counts / max(counts.sum(), 1.0)
        loss, agreement, overlap = (float((figures[:, i] * weights).sum()) for i in range(3))
        bar.set_postfix(loss=f"{loss:.3f}", agree=f"{agreement:.1%}", refresh=False)
        self._line(
            {
                "kind": "step",
                "step": done,
                "tokens": done * self.step_tokens,
                "loss": loss,
                "agreement": agreement,
                "expected_acceptance": overlap,
                "lr": rate,
                "grad_norm": float(figures[-1, 4]),
                "tok_per_s": speed,
            }
        )

    def _measure(self, weights: dict[str, mx.array]) -> dict[str, float]:
        figures = measure(self.model, self.head, weights, self.held_out, self.step.attention, self.step.trimmed)
        return dict(zip(MEASURED, figures, strict=True))

    def _evaluate(self, done: int) -> None:
        figures = self._measure(self.state.weights)
        self._line({"kind": "eval", "step": done, "tokens": done * self.step_tokens} | figures)
        self.state.offer(done, figures["held_out_loss"])
        if time.perf_counter() - self.drawn > DRAW_SECONDS or done == self.steps:
            self._draw()

    def _draw(self) -> None:
        self.drawn = time.perf_counter()

        c = self.config
        title = f"{c.layers} x {c.hidden} draft for {self.loader.dataset.settings.teacher_name}"
        with replacing(real_path(self.out / CURVES)) as picture:
            self._write(lambda: training_curves(self.log, picture, title))
            self.state.note_picture(picture)

    def _line(self, line: dict[str, Any]) -> None:
        append_line(self.log, line)
        if self.progress is not None:
            self.progress(line)

    def _write(self, action: Callable[..., object], *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            raise UserError(f"{cannot_write(error)} {self.out} ({error.strerror or error})") from error

    def _stop(self, done: int) -> None:
        """Keep what an interrupted run has learned, as state and as a draft."""
        self._draw()
        self._write(self.state.save, done)
        self._save(done, complete=False)
        raise KeyboardInterrupt(
            f"stopped after step {done} of {self.steps}; the draft so far is in {self.out},"
            " the same command goes on from here"
        )

    def _save(self, steps: int, complete: bool) -> dict[str, Any]:
        """Write the best weights as a draft; returns how it does on the held-out rows as saved.

        Before the first evaluation those are the present ones, which the state doesn't learn: a run that is stopped
        has the evaluations of one that is not.
        """
        # The draft gets its teacher's tokenizer and template: those that the run was begun with.
        check_same_teacher(Tokenizer(self.teacher_folder), self.state.fingerprint["teacher_files"])
        best, best_step = self.state.best_weights, self.state.best_step
        if best is None:
            best, best_step = self.state.weights, steps
        as_saved = rounded(best, self.settings.bits)
        figures = self._measure(as_saved)
        self.model.load_weights(list(best.items()))
        source = self.loader.dataset.settings
        save(
            self.out,
            self.model,
            self.config,
            self.teacher_folder,
            {
                "complete": complete,
                "teacher": teacher_metadata(self.teacher_folder, source),
                "tokenizer_hash": source.tokenizer_hash,
                "training": {
                    "settings": self.settings.record(),
                    "teacher_files": self.state.fingerprint["teacher_files"],
                    "data": {"sha256": self.state.fingerprint["data"], "tokens": self.loader.dataset.tokens}
                    | ({} if self.loader.dataset.complete else {"complete": False})
                    | {"settings": dataset_metadata(source)},
                    "steps": steps,
                    "tokens": steps * self.step_tokens,
                    "batch": self.loader.batch,
                    "best_step": best_step,
                }
                | figures
                # Whose embedding and tokenizer files these are, where they are not the teacher's.
                | ({} if self.other is None else {"started_from": self.other}),
                "made_with": made_with(),
            }
            | ({} if self.vocabulary is None else {"vocabulary": self.vocabulary.metadata()}),
            self.settings.bits,
            d2t=None if self.vocabulary is None else self.vocabulary.d2t,
        )
        return figures

    def _finish(self, trained: int) -> Summary:
        figures = self._save(self.steps, complete=True)
        self._write(discard, self.state.folder)
        assert self.state.best_loss is not None
        return Summary(
            out=self.out,
            parameters=self.config.parameters,
            steps=self.steps,
            tokens=self.steps * self.step_tokens,
            batch=self.loader.batch,
            seconds=self.seconds,
            tok_per_s=trained / self.seconds if self.seconds else 0.0,
            best_step=self.state.best_step,
            held_out_loss_float=self.state.best_loss,
            log=self.log,
            plot=self.out / CURVES,
            vocabulary=None if self.vocabulary is None else self.vocabulary.metadata(),
            **figures,
        )


def _step_of(line: str) -> float:
    """The step of a log line; beyond all others where a kill cut the line short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, for the loop to end its step; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
