"""The loop of a training run: steps, evaluations, the state that it goes on from, and the draft that comes out."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from decode.tokenizer import Tokenizer
from distill.provenance import (
    check_same_teacher,
    data_metadata,
    made_with,
    teacher_metadata,
)
from distill.training.checkpoint import rounded, save
from distill.training.draft_config import DraftConfig
from distill.training.live import Live
from distill.training.loader import DataLoader
from distill.training.optimizer import learning_rate
from distill.training.plots import training_curves
from distill.training.settings import TrainSettings
from distill.training.state import CURVES, LOG, State, discard
from distill.training.step import Measured, Sharing, Step, measure
from distill.training.tensors import Tensors
from distill.training.vocabulary import DraftVocabulary
from kernels.console import progress
from kernels.errors import UserError
from kernels.files import (
    append_line,
    cannot_write,
    real_path,
    replacing,
    write_atomic,
)

if TYPE_CHECKING:
    from tqdm import tqdm

DRAW_SECONDS = 20.0  # between pictures, each of which takes part of a second; the last comes at the end
READ_EVERY = 20  # most steps that run before the host looks at their losses
LIVE = "tokens_per_verification"
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
    tokens_per_verification: float | None  # of the best checkpoint on held-out prompts, where it was measured
    log: Path
    plot: Path
    done_before: bool = False  # the same command had finished, and nothing was trained now


class Run:
    """One training run: the loop, and what it writes."""

    def __init__(
        self,
        loader: DataLoader,
        teacher_folder: Path,
        other: dict[str, Any] | None,
        out: Path,
        settings: TrainSettings,
        config: DraftConfig,
        step: Step,
        shared: Sharing | None,
        live: Live | None,
        state: State,
        vocabulary: DraftVocabulary | None,
        progress: Progress | None,
        quiet: bool,
    ) -> None:
        """other: the teacher in teacher_folder, where it is not the one whose logits the loader reads; shared: computes
        the gradients together with others."""
        self.loader, self.teacher_folder, self.other, self.out = loader, teacher_folder, other, out
        self.settings, self.config, self.live, self.state = settings, config, live, state
        self.step, self.shared = step, shared
        self.vocabulary, self.progress, self.quiet = vocabulary, progress, quiet
        self.step_tokens = loader.batch * loader.dataset.settings.seq_len
        self.steps = math.ceil(settings.tokens / self.step_tokens)
        self.every = max(1, math.ceil(self.steps / settings.evals))
        self.log = out / LOG
        self.seconds = 0.0
        self.live_figure: float | None = None  # the last one
        self.init: dict[str, Any] = {}  # what is known of the draft that it goes on from
        self.drawn = time.perf_counter()

    def go(self, start: Tensors | None = None) -> Summary:
        """start: the weights to begin with, float32; fresh ones by default."""
        self.held_out = [self.step.draft.arrays(batch) for batch in self.loader.held_out_batches()]
        mx.eval(self.held_out)
        first = self._restore(start)
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
                pending.append(self.step(state.tensors, next(batches), number + 1, rate, self.shared))
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

    def _restore(self, start: Tensors | None) -> int:
        """Weights from the state, or those to start with; returns the number of steps already done."""
        self._write(self.log.touch)
        lines = []
        if self.state.step:
            lines = [
                line for line in self.log.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.state.step
            ]
            self.state.read()
        else:
            self.state.begin(self.step.draft.create() if start is None else start)
        text = "".join(line + "\n" for line in lines).encode()
        write_atomic(real_path(self.log), text)
        self.state.write_run(text)
        self._line({"kind": "start", "step": self.state.step, "steps": self.steps} | self.loader.row_counts())
        return self.state.step

    def _note_steps(self, done: int, rate: float, figures: np.ndarray, speed: float, bar: tqdm) -> None:
        """figures: float32 [steps, 4 + unrolled] as `Step` returns them."""
        counts = figures[:, 2]
        if not np.isfinite(figures).all():
            raise UserError(f"the loss is not finite at step {done}: a smaller --lr than {self.settings.lr:g} may help")
        weights = counts / max(counts.sum(), 1.0)
        loss, overlap, _, _, *agreements = (float(column @ weights) for column in figures.T)
        agreement = agreements[0]
        live = {} if self.live_figure is None else {"live": f"{self.live_figure:.2f}"}
        bar.set_postfix(loss=f"{loss:.3f}", agree=f"{agreement:.1%}", refresh=False, **live)
        self._line(
            {
                "kind": "step",
                "step": done,
                "tokens": done * self.step_tokens,
                "loss": loss,
                "agreement": agreement,
                "expected_acceptance": overlap,
                "lr": rate,
                "grad_norm": float(figures[-1, 3]),
                "tok_per_s": speed,
            }
            | _by_step(agreements)
        )

    def _measure(self, weights: dict[str, mx.array]) -> Measured:
        return measure(self.step.draft, self.step.head, weights, self.held_out, self.step.trimmed)

    def _evaluate(self, done: int) -> None:
        found = self._measure(self.state.weights)
        line: dict[str, Any] = {"kind": "eval", "step": done, "tokens": done * self.step_tokens} | _figures(found)
        if self.live is not None:
            self.live_figure = line[LIVE] = self.live.tokens_per_verification(self.state.weights)
        self._line(line)
        self.state.offer(done, found.loss, line.get(LIVE))
        if time.perf_counter() - self.drawn > DRAW_SECONDS or done == self.steps:
            self._draw()

    def _draw(self) -> None:
        self.drawn = time.perf_counter()

        c = self.config
        kind = f"{'ternary ' if c.ternary else ''}{'reader' if c.taps else 'draft'}"
        title = f"{c.layers} x {c.hidden} {kind} for {self.loader.dataset.settings.teacher_name}"
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
        figures = _figures(self._measure(rounded(best, self.config, self.settings.bits)))
        source = self.loader.dataset.settings
        save(
            self.out,
            best,
            self.config,
            self.teacher_folder,
            {
                "complete": complete,
                "teacher": teacher_metadata(self.teacher_folder, source),
                "tokenizer_hash": source.tokenizer_hash,
                "training": {
                    "settings": self.settings.record(),
                    "teacher_files": self.state.fingerprint["teacher_files"],
                    "data": data_metadata(self.loader.dataset),
                    "steps": steps,
                    "tokens": steps * self.step_tokens,
                    "batch": self.loader.batch,
                    "best_step": best_step,
                }
                | figures
                | ({} if self.state.best_live is None else {LIVE: self.state.best_live})
                | self._begun_from()
                # Whose embedding and tokenizer files these are, where they are not the teacher's.
                | ({} if self.other is None else {"started_from": self.other}),
                "made_with": made_with(),
            }
            | ({} if self.vocabulary is None else {"vocabulary": self.vocabulary.metadata()}),
            self.settings.bits,
            d2t=None if self.vocabulary is None else self.vocabulary.d2t,
        )
        return figures

    def _begun_from(self) -> dict[str, Any]:
        """The draft that was gone on from."""
        digest = self.state.fingerprint.get("init")
        return {} if digest is None else {"init": {"sha256": digest} | self.init}

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
            tokens_per_verification=self.state.best_live,
            log=self.log,
            plot=self.out / CURVES,
            vocabulary=None if self.vocabulary is None else self.vocabulary.metadata(),
            **{name: figures[name] for name in MEASURED},
        )


def _figures(found: Measured) -> dict[str, Any]:
    """As logs and draft.json name them."""
    values = dict(zip(MEASURED, (found.loss, found.agreement[0], found.expected_acceptance), strict=True))
    return values | _by_step(found.agreement)


def _by_step(agreement: Sequence[float]) -> dict[str, Any]:
    """The agreement in each step of a draft that is unrolled; nothing for one that is not."""
    return {"agreement_by_step": list(agreement)} if len(agreement) > 1 else {}


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
