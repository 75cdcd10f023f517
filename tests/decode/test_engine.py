"""Speculative decoding says what the teacher says, and counts honestly."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import ROOT, SHIPPED, TEACHER, changed_copy, environment

from decode.drafters import Hidden, Proposal
from decode.drafters.model import ModelDrafter
from decode.drafters.ngram import NgramDrafter
from decode.engine import Request, generate, logit_margin
from decode.metrics import Metrics, Round
from decode.models.cache import KVCache
from decode.models.checkpoint import find_model, find_teacher
from decode.models.transformer import Forward, Precision, Transformer
from decode.prompts import Prompt, make_prompt
from decode.sampling import Sampling
from decode.session import Session
from decode.tokenizer import Tokenizer
from kernels import UserError
from kernels.ops import SMALL_ROWS, DenseWeight, Int8Weight

TEXTS = (
    "Explain in two sentences why the sky is blue.",
    "The old man",
    "Write a Python function that adds two numbers.",
    "1, 2, 3, 4, 5,",
)
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Transformer:
    return find_teacher(str(small_teacher)).load()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TEACHER)


@pytest.fixture(scope="module")
def weak(weak_draft: Path) -> Transformer:
    return find_model(str(weak_draft), "--draft").load()


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode_prompt(make_prompt(text, "1"), raw=i % 2 == 1) for i, text in enumerate(TEXTS)]


def speak(
    teacher: Transformer,
    prompt: list[int],
    draft: Transformer | None = None,
    *,
    k: int = 0,
    max_tokens: int = 40,
    end_tokens: frozenset[int] = NEVER,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Round]:
    request = Request(prompt, max_tokens, end_tokens, sampling or Sampling(), seed)
    drafter = ModelDrafter(draft, request.sampling, end_tokens, seed) if draft else None
    return list(generate(teacher, request, drafter, k))


def said(rounds: list[Round]) -> list[int]:
    return [token for step in rounds for token in step.tokens]


class Oracle:
    """A drafter that knows the reply, and errs at chosen places of it."""

    context = 1 << 20
    taps: tuple[int, ...] = ()

    def __init__(self, prompt: list[int], reply: list[int], wrong: set[int]) -> None:
        self.prompt = len(prompt)
        self.reply = [token + 1 if i in wrong else token for i, token in enumerate(reply)]

    def start(self, prompt: list[int], hidden: Hidden) -> None:
        pass

    def propose(self, sequence: list[int], k: int) -> Proposal:
        at = len(sequence) - self.prompt
        return Proposal(mx.array(self.reply[at : at + k], mx.uint32))

    def accept(self, sequence: list[int], accepted: int, hidden: Hidden) -> None:
        pass


class Reader(Oracle):
    """One that also keeps what it is given of the teacher's states, row by row."""

    def __init__(self, prompt: list[int], reply: list[int], wrong: set[int], taps: tuple[int, ...]) -> None:
        super().__init__(prompt, reply, wrong)
        self.taps = taps
        self.read: dict[int, list[mx.array]] = {}

    def start(self, prompt: list[int], hidden: Hidden) -> None:
        self.read = {layer: [hidden[layer]] for layer in self.taps}
        assert all(len(rows[0]) == len(prompt) - 1 for rows in self.read.values())

    def accept(self, sequence: list[int], accepted: int, hidden: Hidden) -> None:
        for layer in self.taps:
            assert len(hidden[layer]) == accepted + 1
            self.read[layer].append(hidden[layer])


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_greedy_speculation_changes_nothing(
    teacher: Transformer, weak: Transformer, prompts: list[list[int]], k: int
) -> None:
    for prompt in prompts[: 4 if k in (3, 8) else 2]:
        plain = said(speak(teacher, prompt))
        assert len(plain) == 40
        assert said(speak(teacher, prompt, weak, k=k)) == plain


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_steps_queued_before_their_tokens_are_known_change_nothing(
    teacher: Transformer,
    weak: Transformer,
    prompts: list[list[int]],
    fused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on GPUs, with a fused step or with single operations."""
    for model in (teacher, weak):
        monkeypatch.setattr(model, "async_decode", False)
        if not fused:
            monkeypatch.setattr(model, "fused_step", None)
    expected = [said(speak(teacher, prompt)) for prompt in prompts[:2]]
    rounds = speak(teacher, prompts[0], weak, k=3)
    for model in (teacher, weak):
        monkeypatch.setattr(model, "async_decode", True)
    for prompt, plain in zip(prompts, expected, strict=False):
        assert said(speak(teacher, prompt)) == plain
        for end in (plain[-1], plain[7]):  # a reply that ends while the next step runs, or inside of a proposal
            upto = plain[: plain.index(end) + 1]
            assert said(speak(teacher, prompt, end_tokens=frozenset({end}))) == upto
            assert said(speak(teacher, prompt, teacher, k=4, end_tokens=frozenset({end}))) == upto
    assert [(r.tokens, r.drafted, r.accepted) for r in speak(teacher, prompts[0], weak, k=3)] == [
        (r.tokens, r.drafted, r.accepted) for r in rounds
    ]


@pytest.mark.parametrize("k", [1, 3, 7, 12])
def test_partly_right_drafts_change_nothing(teacher: Transformer, prompts: list[list[int]], k: int) -> None:
    """Rounds that accept some and reject others are where a cache rewound wrongly shows."""
    plain = said(speak(teacher, prompts[0], max_tokens=60))
    wrong = set(np.random.default_rng(k).choice(60, 15, replace=False).tolist())
    oracle = Oracle(prompts[0], plain, wrong)
    rounds = list(generate(teacher, Request(prompts[0], 60), oracle, k))
    assert said(rounds) == plain
    assert 0 < sum(r.accepted for r in rounds) < sum(r.drafted for r in rounds)
    for step in rounds:
        assert len(step.tokens) == step.accepted + 1 and step.accepted <= step.drafted <= k


@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_drafter_reads_the_states_of_what_is_kept(teacher: Transformer, prompts: list[list[int]], k: int) -> None:
    """Of every token but the last, each once, and the bits of a plain run."""
    prompt = prompts[0]
    plain = said(speak(teacher, prompt))
    taps = (2, len(teacher.layers) - 1)
    drafter = Reader(prompt, plain, {3, 9, 10, 20}, taps)
    assert said(list(generate(teacher, Request(prompt, 40), drafter, k))) == plain
    cache = teacher.new_cache()
    expected = teacher.prefill(prompt[:-1], cache, taps)
    steps = [teacher.step([token], cache, taps).hidden for token in [prompt[-1], *plain[:-1]]]
    for layer in taps:
        found = mx.concatenate(drafter.read[layer])
        rows = mx.concatenate([expected[layer], *(step[layer] for step in steps)])
        assert mx.array_equal(found, rows[: len(found)]).item() and len(found) == len(rows)


@pytest.mark.slow
def test_lookup_in_the_text_changes_nothing(teacher: Transformer, prompts: list[list[int]]) -> None:
    repeated = prompts[3] + prompts[0] + prompts[0]
    for prompt in (*prompts, repeated):
        rounds = list(generate(teacher, Request(prompt, 60), NgramDrafter(), 4))
        assert said(rounds) == said(speak(teacher, prompt, max_tokens=60))
        assert len(rounds) > 1 and all(step.drafted <= 4 for step in rounds)
    assert sum(step.accepted for step in rounds) > 0  # the reply says again what the prompt said twice


def test_the_teacher_as_its_own_draft_accepts_everything(teacher: Transformer, prompts: list[list[int]]) -> None:
    for k, prompt in zip((1, 3, 8, 12), prompts, strict=True):
        metrics = Metrics()
        rounds = speak(teacher, prompt, teacher, k=k, max_tokens=50)
        for step in rounds:
            metrics.add(step, 0.0, 0.0)
        assert metrics.acceptance_rate == 1.0 and metrics.drafted > 0
        # Full rounds emit k + 1 tokens; nothing is drafted for the place of the very last token.
        assert [len(step.tokens) for step in rounds[:-1]] == [k + 1] * (len(rounds) - 1)
        assert metrics.tokens == 50 and metrics.accepted == 50 - len(rounds)


def test_the_teacher_as_its_own_draft_when_sampling(teacher: Transformer, prompts: list[list[int]]) -> None:
    rounds = speak(teacher, prompts[0], teacher, k=4, sampling=Sampling(1.0), seed=5)
    assert sum(r.accepted for r in rounds) == sum(r.drafted for r in rounds) > 0


@pytest.mark.slow
def test_reference_kernels_are_lossless_too(small_teacher: Path) -> None:
    """In a process of its own, as the backend is chosen once."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from pathlib import Path
from decode.models.checkpoint import find_model, find_teacher
from decode.drafters.model import ModelDrafter
from decode.engine import Request, generate
from decode.tokenizer import Tokenizer
from decode.prompts import make_prompt
from kernels import backend
assert backend().NAME == "reference"
teacher = find_teacher({str(small_teacher)!r}).load()
draft = find_model({str(SHIPPED)!r}, "--draft").load()
tokenizer = Tokenizer(Path({str(TEACHER)!r}))
def say(text, drafter=None):
    prompt = tokenizer.encode_text(text)
    rounds = list(generate(teacher, Request(prompt, 10), drafter, 4))
    return [token for step in rounds for token in step.tokens], [step.accepted for step in rounds]
for text in {TEXTS[:3]!r}:
    plain = say(text)[0]
    assert say(text, ModelDrafter(draft))[0] == plain
    assert say(text, ModelDrafter(teacher)) == (plain, [4, 4])
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(BITDRAFT_KERNELS="reference"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "same\n", done.stderr


def test_end_token_stops_and_nothing_behind_it_counts(teacher: Transformer, prompts: list[list[int]]) -> None:
    prompt = prompts[0]
    plain = said(speak(teacher, prompt))
    at = next(i for i in range(6, 40) if plain[i] not in plain[:i])
    ends = frozenset({plain[at]})
    assert said(speak(teacher, prompt, end_tokens=ends)) == plain[: at + 1]

    # A drafter that goes on behind the end: the round's proposals there count in neither number.
    for k in (at, at + 1, at + 6):
        rounds = list(generate(teacher, Request(prompt, 40, ends), Oracle(prompt, plain, set()), k))
        assert said(rounds) == plain[: at + 1]
        assert sum(r.drafted for r in rounds) == sum(r.accepted for r in rounds) == min(k, at + 1)

    # The end token as the teacher's correction: the wrong proposal before it was drafted, those behind were not.
    rounds = list(generate(teacher, Request(prompt, 40, ends), Oracle(prompt, plain, {at}), at + 6))
    assert said(rounds) == plain[: at + 1]
    assert (rounds[0].drafted, rounds[0].accepted) == (at + 1, at)


def test_a_draft_that_samples_stops_at_an_end_token(teacher: Transformer, prompts: list[list[int]]) -> None:
    drafter = ModelDrafter(teacher, Sampling(temperature=1.0))
    drafter.start(prompts[0], {})
    drafted = drafter.propose(list(prompts[0]), 9).tokens
    assert isinstance(drafted, list) and len(drafted) == 9
    end = drafted[4]
    drafter = ModelDrafter(teacher, Sampling(temperature=1.0), frozenset({end}))
    drafter.start(prompts[0], {})
    assert drafter.propose(list(prompts[0]), 9).tokens == drafted[: drafted.index(end) + 1]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 8])
def test_max_tokens_is_never_exceeded(teacher: Transformer, prompts: list[list[int]], max_tokens: int) -> None:
    plain = said(speak(teacher, prompts[0], max_tokens=max_tokens))
    oracle = Oracle(prompts[0], said(speak(teacher, prompts[0])), set())
    rounds = list(generate(teacher, Request(prompts[0], max_tokens), oracle, 4))
    assert said(rounds) == plain and len(plain) == max_tokens
    # The last token of all is the teacher's own: a proposal for it could not have been emitted.
    assert sum(r.drafted for r in rounds) == sum(r.accepted for r in rounds) == max_tokens - len(rounds)


def test_the_context_ends_generation(
    teacher: Transformer, weak: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "context", len(prompts[0]) + 6)
    plain = said(speak(teacher, prompts[0]))
    assert len(plain) == 6
    assert said(speak(teacher, prompts[0], weak, k=4)) == plain


def test_a_draft_with_a_shorter_context_falls_silent(
    teacher: Transformer, weak: Transformer, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weak, "context", len(prompts[0]) + 10)
    rounds = speak(teacher, prompts[0], weak, k=4)
    assert said(rounds) == said(speak(teacher, prompts[0]))
    at = len(prompts[0])
    for step in rounds:
        assert step.drafted == (4 if at + 4 <= weak.context else 0)
        at += len(step.tokens)


def junk(cache_arrays: list[mx.array], offset: int) -> list[mx.array]:
    """Arrays whose rows from `offset` on are finite nonsense, as a rewind leaves them."""
    return [
        mx.concatenate([a[..., :offset, :], mx.full(a[..., offset:, :].shape, 1e4, a.dtype)], axis=-2)
        for a in cache_arrays
    ]


@pytest.fixture(scope="module")
def int8_teacher(small_teacher: Path) -> Transformer:
    return find_teacher(str(small_teacher)).load("int8")


@pytest.fixture(scope="module")
def int8_draft(weak_draft: Path) -> Transformer:
    return find_model(str(weak_draft), "--draft").load("int8", "int8")


@pytest.mark.parametrize("prefix", [1, 7, 64, 255, 300])
@pytest.mark.parametrize("name", ["teacher", "int8_teacher", "int8_draft"])
def test_rows_together_have_the_bits_of_rows_alone(request: pytest.FixtureRequest, name: str, prefix: int) -> None:
    teacher: Transformer = request.getfixturevalue(name)
    tokens = np.random.default_rng(prefix).integers(3, 16000, prefix + 8).tolist()
    cache = teacher.new_cache()
    teacher.prefill(tokens[:prefix], cache)
    alone = [np.array(teacher.step([token], cache).logits) for token in tokens[prefix:]]
    for m in range(1, 9):
        cache.offset = prefix  # what stands behind is junk now
        if m % 2:
            cache.keys, cache.values = junk(cache.keys, prefix), junk(cache.values, prefix)
        together = np.array(teacher.step(tokens[prefix : prefix + m], cache).logits)
        assert cache.offset == prefix + m
        assert together.dtype == np.float32 and together.shape == (m, teacher.vocab_size)
        assert np.array_equal(together.view(np.uint32), np.concatenate(alone[:m]).view(np.uint32)), m


def test_an_int8_head_speaks_for_itself(
    teacher: Transformer, int8_teacher: Transformer, int8_draft: Transformer, prompts: list[list[int]]
) -> None:
    """Its logits are close to the float head's and not the same, and no draft changes what it says."""
    for model in (teacher, int8_teacher):
        assert isinstance(model.head, DenseWeight if model is teacher else Int8Weight)
    logits = [np.array(model.step(prompts[0][:8], model.new_cache()).logits) for model in (teacher, int8_teacher)]
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert 0 < error < 0.1, error
    plain = said(speak(int8_teacher, prompts[0]))
    assert said(speak(int8_teacher, prompts[0], int8_draft, k=4)) == plain
    assert said(speak(int8_teacher, prompts[0], int8_teacher, k=4)) == plain


@pytest.mark.slow
@pytest.mark.parametrize("head", ["float", "int8"])
def test_a_teacher_drafts_for_itself_with_its_own_head(head: Precision, small_teacher: Path) -> None:
    """However other drafts are rounded, every one of its proposals is accepted."""
    folder = str(small_teacher)
    session = Session(find_teacher(folder), find_model(folder, "--draft"), k=3, max_tokens=64, head=head)
    for text in TEXTS:
        prompt = make_prompt(text, "1")
        output = session.answer(prompt, session.encode([prompt])[0], 0, speculative=True)
        assert output.metrics.drafted == output.metrics.accepted > 0


def test_int8_layers_are_close_to_float_ones(
    weak: Transformer, int8_draft: Transformer, prompts: list[list[int]]
) -> None:
    for layer in int8_draft.layers:
        assert all(isinstance(w, Int8Weight) for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
    a, b = (np.array(model.step(prompts[0][:8], model.new_cache()).logits) for model in (weak, int8_draft))
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()
    # A prefill's many rows take another path.
    caches = [model.new_cache() for model in (weak, int8_draft)]
    for model, cache in zip((weak, int8_draft), caches, strict=True):
        model.prefill(prompts[0], cache)
    a, b = (np.array(cache.keys[0][:, :, : cache.offset].astype(mx.float32)) for cache in caches)
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_margin(teacher: Transformer, prompts: list[list[int]]) -> None:
    plain = said(speak(teacher, prompts[0], max_tokens=4))
    cache = teacher.new_cache()
    teacher.prefill(prompts[0][:-1], cache)
    logits = np.sort(np.array(teacher.step([prompts[0][-1], *plain[:2]], cache).logits)[-1])
    assert logit_margin(teacher, prompts[0], plain[:2]) == pytest.approx(logits[-1] - logits[-2])


@pytest.mark.slow
def test_sampling_follows_the_seed(teacher: Transformer, weak: Transformer, prompts: list[list[int]]) -> None:
    sampling = Sampling(1.0, top_p=0.95)
    replies = [said(speak(teacher, prompts[1], weak, k=3, sampling=sampling, seed=seed)) for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]


# --- sessions


@pytest.fixture(scope="module")
def session(weak_draft: Path, small_teacher: Path) -> Session:
    return Session(find_teacher(str(small_teacher)), find_model(str(weak_draft), "--draft"), k=3, max_tokens=24)


def test_report(session: Session) -> None:
    assert session.draft is not None and isinstance(session.draft.head, Int8Weight)
    assert isinstance(session.draft.layers[0].down, Int8Weight) and isinstance(session.teacher.head, DenseWeight)
    prompts = [make_prompt(text, str(i)) for i, text in enumerate(TEXTS[:2])]
    encoded = session.encode(prompts)
    pairs = list(zip(prompts, encoded, strict=True))
    outputs = [session.answer(p, ids, i, speculative=True) for i, (p, ids) in enumerate(pairs)]
    baselines = [session.answer(p, ids, i, speculative=False) for i, (p, ids) in enumerate(pairs)]
    report = session.report(outputs, baselines)
    assert report["identical"] is True and all(entry["identical"] for entry in report["outputs"])
    assert report["tokens"] == sum(len(entry["token_ids"]) for entry in report["outputs"])
    assert report["drafted"] == sum(entry["drafted"] for entry in report["outputs"])
    assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
    assert report["speedup"] == pytest.approx(report["tok_per_s"] / report["baseline_tok_per_s"])

    baselines[0].tokens = [*baselines[0].tokens[:5], 7, *baselines[0].tokens[6:]]
    broken = session.report(outputs, baselines)
    assert broken["identical"] is False
    assert [entry["identical"] for entry in broken["outputs"]] == [False, True]
    assert broken["outputs"][0]["first_difference"] == 5
    assert broken["outputs"][0]["logit_margin"] > 0


@pytest.mark.parametrize("queues", [False, True])
def test_printing_is_time_that_a_user_waits(session: Session, queues: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device computes the next token meanwhile: it would seem to take no time at all."""
    monkeypatch.setattr(session.teacher, "async_decode", queues)
    pause = 0.02
    for speculative in (False, True):
        texts: list[str] = []

        def show(text: str, texts: list[str] = texts) -> None:
            texts.append(text)
            time.sleep(pause)

        ids = session.encode([make_prompt("Hi", "1")])[0]
        began = time.perf_counter()
        found = session.answer(Prompt([], "1"), ids, 0, speculative=speculative, show=show, limit=6).metrics
        whole = time.perf_counter() - began
        waited = pause * (len(texts) - 2)  # what is printed behind the last token keeps nobody waiting
        assert waited > 0 and waited <= found.decode_seconds < whole - found.prefill_seconds
        assert found.tok_per_s == found.tokens / found.decode_seconds


@pytest.mark.parametrize(("k", "context", "rows"), [(200, 2048, 201), (3, 2048, 4), (400, 150, 150)])
def test_a_verification_is_measured_with_all_its_rows(
    k: int, context: int, rows: int, small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where the teacher's context ends before them, with as many as it takes."""
    config = json.loads((small_teacher / "config.json").read_text()) | {"max_position_embeddings": context}
    folder = changed_copy(small_teacher, tmp_path / "teacher", config__json=json.dumps(config).encode())
    teacher = find_teacher(str(folder))
    session = Session(teacher, teacher, k=k)
    taken: list[tuple[int, int]] = []
    step = Transformer.step

    def noted(model: Transformer, tokens: list[int], cache: KVCache, taps: tuple[int, ...] = ()) -> Forward:
        taken.append((len(tokens), cache.offset + len(tokens)))
        return step(model, tokens, cache, taps)

    monkeypatch.setattr(Transformer, "step", noted)
    assert session.verify_ratio > 0
    assert {count for count, _ in taken} == {1, rows} and max(end for _, end in taken) <= context


def test_finish_reason_and_streamed_text(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = make_prompt(TEXTS[0], "1")
    (ids,) = session.encode([prompt])
    monkeypatch.setattr(session.tokenizer, "end_tokens", NEVER)
    shown: list[str] = []
    whole = session.answer(prompt, ids, 0, speculative=True, show=shown.append)
    assert whole.finish_reason == "length" and len(whole.tokens) == 24
    assert "".join(shown) == session.tokenizer.decode(whole.tokens)
    at = next(i for i in range(3, 24) if whole.tokens[i] not in whole.tokens[:i])
    monkeypatch.setattr(session.tokenizer, "end_tokens", frozenset({whole.tokens[at]}))
    ended = session.answer(prompt, ids, 0, speculative=True)
    assert ended.finish_reason == "stop" and ended.tokens == whole.tokens[: at + 1]


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 12])
def test_warming_up_leaves_no_number_of_rows_to_the_timings(
    weak_draft: Path, small_teacher: Path, prompts: list[list[int]], k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs compile a kernel for each: also for the few rows with which a reply ends."""
    taken: set[tuple[int, int]] = set()  # models and rows
    step = Transformer.step

    def noted(model: Transformer, tokens: list[int], cache: KVCache, taps: tuple[int, ...] = ()) -> Forward:
        groups = range(0, len(tokens), SMALL_ROWS)
        taken.update((id(model), len(tokens[start : start + SMALL_ROWS])) for start in groups)
        return step(model, tokens, cache, taps)

    monkeypatch.setattr(Transformer, "step", noted)
    for draft in (weak_draft, small_teacher):
        session = Session(find_teacher(str(small_teacher)), find_model(str(draft), "--draft"), k=k)
        session.warm_up()
        warm = set(taken)
        for limit in range(1, 20):
            session.answer(Prompt([], "1"), prompts[0], 0, speculative=limit % 3 > 0, limit=limit)
        assert taken == warm
        taken.clear()


def test_prompts_are_checked_before_the_first_is_answered(session: Session) -> None:
    long = make_prompt("word " * 5000, "long-one")
    with pytest.raises(UserError, match=r"prompt long-one: 50\d\d tokens .* context of 2048"):
        session.encode([make_prompt("short", "1"), long])


def test_bad_sessions(weak_draft: Path) -> None:
    draft = find_model(str(weak_draft), "--draft")
    for k in (0, -1):
        with pytest.raises(UserError, match=f"--k {k}"):
            Session(find_teacher(None), draft, k=k)
    with pytest.raises(UserError, match="--max-tokens 0"):
        Session(find_teacher(None), max_tokens=0)
