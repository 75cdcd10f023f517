"""Answering prompts, plainly, speculatively or both in turn, and counting what happened."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx

from decode.drafters import Drafter
from decode.drafters.model import ModelDrafter
from decode.drafters.reader import ReaderDrafter
from decode.engine import Request, generate, logit_margin
from decode.metal import limit_memory
from decode.metrics import VERSION, Metrics, is_looping
from decode.models.checkpoint import Checkpoint, check_same_tokenizer
from decode.models.reader import Reader, is_reader, load_reader
from decode.models.transformer import Precision, Transformer
from decode.prompts import Prompt
from decode.sampling import Sampling
from decode.timing import noticing_stops, timed
from decode.tokenizer import Streamer, Tokenizer
from kernels import UserError, backend, reference
from kernels.device import device_name, versions
from kernels.ops import SMALL_ROWS

MEASURED_CONTEXT = 128  # tokens in the cache while a verification is measured
MEASURED_STEPS = 20
MEASURED_SECONDS = 1.0

Show = Callable[[str], None]


@dataclass
class Completion:
    """One answered prompt."""

    prompt: Prompt
    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    metrics: Metrics = field(default_factory=Metrics)
    finish_reason: str = "length"


class Session:
    """A loaded teacher, perhaps a draft, and how to decode with them."""

    def __init__(
        self,
        teacher: Checkpoint,
        draft: Checkpoint | None = None,
        *,
        k: int = 0,
        max_tokens: int = 128,
        sampling: Sampling | None = None,
        raw: bool = False,
        seed: int = 0,
        head: Precision = "float",
        template_time: str | None = None,
    ) -> None:
        """head: the teacher's. A draft only proposes, so where the kernels are native it is all int8. template_time:
        what a chat template that asks for the time is told, by default the time now."""
        if draft is not None:
            if k < 1:
                raise UserError(f"--k {k}: at least one token must be drafted (decode plain drafts none)")
            check_same_tokenizer(teacher, draft)
        if max_tokens < 1:
            raise UserError(f"--max-tokens {max_tokens}: must be at least 1")
        self.teacher_checkpoint, self.draft_checkpoint = teacher, draft
        self.tokenizer = Tokenizer(teacher.folder, template_time)
        self.k, self.max_tokens, self.raw, self.seed = k, max_tokens, raw, seed
        self.sampling = sampling or Sampling()
        self.head = head
        limit_memory()
        backend()  # what is wrong with it is no fault of the checkpoint's
        self.teacher: Transformer = teacher.load(head)
        self.draft = self._load_draft(draft) if draft is not None else None

    def _load_draft(self, draft: Checkpoint) -> Transformer | Reader:
        """The draft's model. A teacher that drafts for itself is the same one, so that all it drafts is accepted."""
        if draft.folder.resolve() == self.teacher_checkpoint.folder.resolve():
            return self.teacher
        rounded: Precision = "float" if backend() is reference else "int8"
        if is_reader(draft):
            return load_reader(draft, self.teacher_checkpoint, self.teacher, rounded)
        return draft.load(rounded, rounded)

    def encode(self, prompts: list[Prompt]) -> list[list[int]]:
        """Token ids of every prompt, checked before the first is answered."""
        encoded = []
        for prompt in prompts:
            ids = self.tokenizer.encode_prompt(prompt, raw=self.raw)
            if not ids:
                raise UserError(f"{prompt.place}: is empty")
            if len(ids) >= self.teacher.context:
                raise UserError(
                    f"{prompt.place}: {len(ids)} tokens leave no room in the teacher's context of"
                    f" {self.teacher.context}"
                )
            encoded.append(ids)
        return encoded

    def warm_up(self) -> None:
        """Run everything once, every number of rows too, so that what first use costs falls outside the timings.

        Kernels are compiled then, on GPUs one for each number of rows.
        """
        text = [self.end_token] * (2 * SMALL_ROWS)
        for speculative in (False, True) if self.draft else (False,):
            self.answer(Prompt([], "warm-up"), text, 0, speculative=speculative, limit=SMALL_ROWS)
        # A draft steps over its last proposal and the teacher's own token behind it where all were accepted.
        models = [(self.teacher, self.k + 1)]
        if isinstance(self.draft, Transformer):
            models.append((self.draft, 2))
        for model, most in models:
            for rows in range(1, min(most, SMALL_ROWS) + 1):
                mx.eval(model.step(text[:rows], model.new_cache()).logits)
        if isinstance(self.draft, Transformer):
            for rows in (1, 2):
                mx.eval(self.draft.greedy_tokens(text[:rows], self.draft.new_cache(), 1))
        if isinstance(self.draft, Reader):  # a row for each proposal that was accepted, and one
            reader = self.draft.for_text(text)
            for rows in range(1, min(self.k + 1, SMALL_ROWS) + 1):
                states = mx.zeros((rows, reader.config.teacher_hidden))
                hidden = dict.fromkeys(reader.taps, states)
                mx.eval(reader.greedy_tokens(text[:rows], hidden, reader.new_cache(), 1))

    @property
    def end_token(self) -> int:
        return min(self.tokenizer.end_tokens, default=0)

    def answer(
        self,
        prompt: Prompt,
        prompt_ids: list[int],
        index: int,
        *,
        speculative: bool,
        show: Show | None = None,
        limit: int | None = None,
    ) -> Completion:
        """Generate one reply, handing text to `show` as it comes.

        Where none is handed out, a reply in which the process was stopped and went on is made again, once: the stop is
        in its times.
        """
        with noticing_stops() as stopped:
            output = self._answer(prompt, prompt_ids, index, speculative, show, limit)
        if stopped.is_set() and show is None:
            output = self._answer(prompt, prompt_ids, index, speculative, show, limit)
        return output

    def _answer(
        self, prompt: Prompt, prompt_ids: list[int], index: int, speculative: bool, show: Show | None, limit: int | None
    ) -> Completion:
        output = Completion(prompt, prompt_ids)
        request = Request(
            prompt_ids, limit or self.max_tokens, self.tokenizer.end_tokens, self.sampling, self.seed + index
        )
        drafter = self._drafter(request) if speculative else None
        streamer = self._streamer(output)
        began = time.perf_counter()
        rounds = generate(self.teacher, request, drafter, self.k)
        before = time.perf_counter()
        output.metrics.prefill_seconds = before - began
        for found, asked, came in timed(rounds):
            output.metrics.add(found, asked, came)
            output.metrics.show_seconds += asked - before
            before = came
            output.tokens += found.tokens
            if show is not None:
                show(streamer.push(found.tokens))
        if show is not None:
            show(streamer.finish())
        if output.tokens and output.tokens[-1] in self.tokenizer.end_tokens:
            output.finish_reason = "stop"
        return output

    def text(self, output: Completion) -> str:
        """What a reply says, as it is handed to `show`."""
        streamer = self._streamer(output)
        return streamer.push(output.tokens) + streamer.finish()

    def _streamer(self, output: Completion) -> Streamer:
        bare = self.raw or self.tokenizer.template_hash is None  # a text that the reply goes on with
        return self.tokenizer.streamer(output.prompt_ids if bare else ())

    def _drafter(self, request: Request) -> Drafter | None:
        """What drafts one reply; None without a draft."""
        if self.draft is None:
            return None
        kind = ReaderDrafter if isinstance(self.draft, Reader) else ModelDrafter
        return kind(self.draft, request.sampling, request.end_tokens, request.seed)  # type: ignore[arg-type]

    def report(self, outputs: list[Completion], baselines: list[Completion]) -> dict[str, Any]:
        """The JSON object of `decode plain` and `decode spec`, as docs/commands.md explains it."""
        total = Metrics.of(output.metrics for output in outputs)
        speculative = self.draft is not None
        entries = [self._entry(output, speculative) for output in outputs]
        report: dict[str, Any] = {
            "teacher": self.teacher_checkpoint.name,
            "draft": self.draft_checkpoint.name if self.draft_checkpoint else None,
            "head": "int8" if self.head == "int8" else "bf16",
            "k": self.k,
            "prompts": len(outputs),
            "tokens": total.tokens,
            **total.acceptance(),
            "tok_per_s": total.tok_per_s,
            **total.times(),
            "looping": sum(entry["looping"] for entry in entries),
            "sampling": vars(self.sampling),
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "template_time": None if self.raw else self.tokenizer.template_time,
            "backend": backend().NAME,
            "device": device_name(),
            "versions": versions(),
            "metrics_version": VERSION,
            "date": time.strftime("%Y-%m-%d"),
            "outputs": entries,
        }
        if baselines:
            plain = Metrics.of(baseline.metrics for baseline in baselines)
            report["baseline_tok_per_s"] = plain.tok_per_s
            report["speedup"] = total.speedup(plain)
            report["verify_ratio"] = self.verify_ratio
            if self.sampling.greedy:  # samples of the same distribution need not be the same text
                for entry, output, baseline in zip(entries, outputs, baselines, strict=True):
                    entry.update(self._comparison(output, baseline))
                report["identical"] = all(entry["identical"] for entry in entries)
        return report

    def _entry(self, output: Completion, speculative: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "id": output.prompt.id,
            "category": output.prompt.category,
            "prompt_tokens": len(output.prompt_ids),
            "token_ids": output.tokens,
            "text": self.text(output),
            "finish_reason": output.finish_reason,
            "looping": is_looping(output.tokens),
            **output.metrics.times(),
        }
        if speculative:
            for name in ("rounds", "drafted", "accepted"):
                entry[name] = getattr(output.metrics, name)
        return entry

    def _comparison(self, output: Completion, baseline: Completion) -> dict[str, Any]:
        same = output.tokens == baseline.tokens
        result: dict[str, Any] = {"identical": same}
        if not same:
            pairs = zip(output.tokens, baseline.tokens, strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(output.tokens), len(baseline.tokens)))
            result["first_difference"] = at
            result["logit_margin"] = logit_margin(self.teacher, output.prompt_ids, baseline.tokens[:at])
        return result

    @cached_property
    def verify_ratio(self) -> float:
        """What verifying k proposals costs, in steps of one token: medians, in turn, the choice of tokens included.

        Measured by itself: in a round the verification is queued while the draft still runs.
        """
        most = min(self.k, *(model.context - 1 for model in (self.teacher, self.draft) if model)) + 1
        context = min(MEASURED_CONTEXT, self.teacher.context - most)
        cache = self.teacher.new_cache()
        text = [self.end_token] * max(context, most)
        self.teacher.prefill(text[:context], cache)
        times: dict[int, list[float]] = {1: [], most: []}
        began = time.perf_counter()
        while len(times[1]) < MEASURED_STEPS and (len(times[1]) < 3 or time.perf_counter() - began < MEASURED_SECONDS):
            for rows, seconds in times.items():
                cache.offset = context
                started = time.perf_counter()
                mx.eval(self.teacher.best_tokens(self.teacher.step(text[:rows], cache).logits))
                seconds.append(time.perf_counter() - started)
        return statistics.median(times[most]) / statistics.median(times[1])
