"""A reader's chain of proposals as one native operation, beside its plain operations (decode.models.reader)."""

import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import readers
from arrays import normal, same_bits, stored
from conftest import Command

if platform.system() != "Linux":
    pytest.skip("the native CPU backend is built on Linux only", allow_module_level=True)

from decode.drafters.reader import ReaderDrafter
from decode.models import reader
from decode.models.cache import KVCache
from decode.models.checkpoint import find_teacher
from decode.models.draft_vocabulary import OF_TEXT
from decode.models.reader import Reader
from decode.models.transformer import Transformer
from kernels import cpu
from kernels.cpu import _native

pytest_plugins = ("cpu_fixtures",)

WIDTH = 576  # of the teacher
ROUNDS = ((1, 7), (2, 3), (3, 1), (4, 2), (5, 4), (6, 5), (7, 6), (8, 7))  # rows, and proposals behind them


@dataclass(frozen=True)
class Case:
    weights: str
    hidden: int
    layers: int
    kept: int = 0  # tokens of a trimmed head


CASES = [
    Case("float", WIDTH, 1),
    Case("float", 64, 2, 100),
    Case("int8", WIDTH, 2, 100),
    Case("int8", 64, 1),
    Case("ternary", WIDTH, 1, 4096),
    Case("ternary", 64, 2),
]


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Transformer:
    return find_teacher(str(small_teacher)).load()


@pytest.fixture(scope="module", params=CASES, ids=str)
def draft(
    request: pytest.FixtureRequest, small_teacher: Path, teacher: Transformer, tmp_path_factory: pytest.TempPathFactory
) -> Reader:
    case = request.param
    options = {"layers": case.layers, "kept": case.kept, "ternary": case.weights == "ternary"}
    folder = readers.make(tmp_path_factory.mktemp("reader") / "d", small_teacher, case.hidden, **options)
    return readers.load(folder, small_teacher, teacher, "float" if case.weights == "float" else "int8")


@pytest.fixture
def native_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain operations take the norm out of a native product, by the identity: its sums have an order of theirs."""

    def norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        identity = cpu.prepare_dense(mx.eye(x.shape[-1]))
        few = [cpu.linear(x[i : i + 8], identity, norm=weight, eps=eps) for i in range(0, len(x), 8)]
        return mx.concatenate(few)

    monkeypatch.setattr(reader, "rms_norm", norm)


def read(rows: int, seed: int = 0) -> tuple[list[int], dict[int, mx.array]]:
    """Tokens, and the teacher's states in front of them."""
    tokens = np.random.default_rng([seed, rows]).integers(0, 16_384, rows).tolist()
    return tokens, {tap: 3 * normal(rows, WIDTH, seed=seed + tap) for tap in readers.TAPS}


def filled(draft: Reader) -> KVCache:
    cache = draft.new_cache()
    tokens, hidden = read(20)
    draft.prefill(mx.array(tokens, mx.uint32), hidden, cache)
    return cache


def both(draft: Reader, monkeypatch: pytest.MonkeyPatch, rows: int, count: int) -> list[list[mx.array]]:
    """Proposals and caches, by the one operation and by many."""
    results = []
    before = filled(draft)
    for fused in (draft.fused, None):
        with monkeypatch.context() as patch:
            patch.setattr(draft, "fused", fused)
            cache = draft.new_cache()
            cache.keys, cache.values, cache.offset = list(before.keys), list(before.values), before.offset
            tokens = draft.greedy_tokens(*read(rows, seed=9), cache, count)
            assert tokens.dtype == mx.uint32 and cache.offset == 20 + rows + count - 1
            results.append([tokens, *(array[:, :, : cache.offset] for array in (*cache.keys, *cache.values))])
    return results


def test_proposals_have_the_bits_of_single_operations(
    draft: Reader, isa: str, native_norm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert draft.fused is not None
    said: set[int] = set()
    rounds = ROUNDS if isa == _native.available_isas()[0] else ROUNDS[1:2]
    for rows, count in rounds:
        fused, plain = both(draft, monkeypatch, rows, count)
        assert all(same_bits(a, b) for a, b in zip(fused, plain, strict=True)), (rows, count)
        said |= set(fused[0].tolist())
    assert len(said) > 2 or rounds is not ROUNDS


def test_the_norms_are_the_references_but_for_rounding(draft: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may tip the rounding of an activation, or of a key, over to its neighbour."""
    for rows in (1, 8):
        (_, *fused), (_, *plain) = both(draft, monkeypatch, rows, 1)
        for ours, theirs in zip(fused, plain, strict=True):
            x, y = (np.array(array.astype(mx.float32)) for array in (ours, theirs))
            assert np.abs(x - y).max() < 0.05 * np.abs(y).max()


def test_threads_change_nothing(
    draft: Reader, threads: int, native_norm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain = both(draft, monkeypatch, 3, 4)
    assert all(same_bits(a, b) for a, b in zip(fused, plain, strict=True))


@pytest.mark.parametrize("draft", [CASES[1]], indirect=True, ids=str)
def test_states_may_be_parts_of_others(draft: Reader) -> None:
    tokens, hidden = read(4)
    expected = draft.greedy_tokens(tokens, hidden, filled(draft), 3).tolist()
    for part in (
        lambda x: mx.concatenate([x, x + 1])[:4],
        lambda x: mx.repeat(x, 2, axis=0)[::2],
        lambda x: mx.contiguous(x.T).T,
        lambda x: mx.concatenate([x - 1, x], axis=-1)[:, WIDTH:],
    ):
        apart = {tap: part(rows) for tap, rows in hidden.items()}
        assert draft.greedy_tokens(tokens, apart, filled(draft), 3).tolist() == expected


@pytest.mark.parametrize("draft", [CASES[4]], indirect=True, ids=str)
@pytest.mark.parametrize("length", [1, 5, 9, 40])
def test_a_drafter_reads_every_state_once(
    draft: Reader, length: int, native_norm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts of any length, rounds that accept some, all or none, and rounds without proposals between them."""
    results = []
    for fused in (draft.fused, None):
        monkeypatch.setattr(draft, "fused", fused)
        rng = np.random.default_rng(length)
        drafter, proposed = ReaderDrafter(draft), []
        sequence, hidden = read(length)
        drafter.start(list(sequence), {tap: rows[:-1] for tap, rows in hidden.items()})
        for turn in range(8):
            k = int(rng.integers(1, 5))
            tokens = np.array(drafter.propose(sequence, k).tokens).tolist() if turn not in (2, 3, 5) else []
            proposed.append(tokens)
            if tokens:
                assert len(tokens) == k and drafter.cache.offset == len(sequence) - 1 + k - 1
            accepted = int(rng.integers(0, len(tokens) + 1))
            drafter.accept(sequence, accepted, read(accepted + 1, seed=turn)[1])
            sequence += [*tokens[:accepted], int(rng.integers(16_384))]
        results.append(proposed)
    assert results[0] == results[1]
    assert sum(map(len, results[0])) > 8


@pytest.mark.parametrize("draft", [CASES[1], CASES[2], CASES[4]], indirect=True, ids=str)
def test_a_trimmed_head_takes_in_the_tokens_of_a_text(
    draft: Reader, teacher: Transformer, native_norm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are those of the whole head's rows; it proposes the best of them, by one operation and by many."""
    assert draft.d2t is not None
    text = [7, 16_000, 12_345, 7, *range(9000, 9010), 12_345, int(draft.d2t[0])]
    made = draft.for_text(text)
    assert made.d2t is not None and len(set(made.d2t.tolist())) == len(made.d2t) == made.head.n
    assert set(draft.d2t.tolist()) | set(text) <= set(made.d2t.tolist())
    monkeypatch.setattr(draft, "head", draft._prepare(teacher.embedding))  # of another head than ops has fused
    states = 3 * normal(5, draft.config.hidden)
    assert same_bits(made.logits(states), draft.logits(states)[:, mx.array(made.d2t)])
    other = draft.for_text([11]).d2t  # each text has its own
    assert other is not None and len(other) == len(made.d2t) and 16_000 not in other
    (fused, *_), (plain, *_) = both(made, monkeypatch, 3, 7)
    assert fused.tolist() == plain.tolist()


@pytest.mark.parametrize("draft", [CASES[4]], indirect=True, ids=str)
def test_of_a_long_text_the_last_tokens_are_taken_in(draft: Reader) -> None:
    assert draft.d2t is not None
    others = np.setdiff1d(np.arange(16_384), draft.d2t)
    text = np.random.default_rng(0).permutation(others)[:1000].tolist()
    found = draft.for_text([*text, *text[:10]]).d2t
    assert found is not None and len(found) == len(draft.d2t) + OF_TEXT
    assert set(found[len(draft.d2t) :].tolist()) == {*text[:10], *text[-246:]}


@pytest.mark.parametrize("draft", [CASES[1]], indirect=True, ids=str)
def test_proposals_write_to_one_cache(draft: Reader) -> None:
    cache = filled(draft)
    cache.reserve(1 << 16)
    mx.eval(cache.keys, cache.values)
    whole = sum(array.nbytes for array in (*cache.keys, *cache.values))
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    for _ in range(3):
        mx.eval(draft.greedy_tokens(*read(2), cache, 5))
    assert mx.get_peak_memory() - base < whole / 8


@pytest.mark.parametrize("draft", [CASES[1]], indirect=True, ids=str)
def test_a_cache_that_others_hold_stays_as_it_is(draft: Reader) -> None:
    cache = filled(draft)
    held = [*cache.keys, *cache.values]
    before = [stored(array) for array in held]
    mx.eval(draft.greedy_tokens(*read(2), cache, 2))
    assert [stored(array) for array in held] == before != [stored(array) for array in (*cache.keys, *cache.values)]


@pytest.mark.parametrize("draft", [CASES[1]], indirect=True, ids=str)
def test_what_does_not_fit_is_refused(draft: Reader) -> None:
    fused, cache = draft.fused, filled(draft)
    assert fused is not None and draft.d2t is not None
    room = cache.keys[0].shape[2]
    ids, states = mx.array(draft.d2t, mx.uint32), [mx.zeros((2, WIDTH))] * 3
    mx.eval(ids)
    mx.eval(fused.greedy_tokens([1, 2], states, cache.keys, cache.values, room - 4, 3, ids))
    for given, read, caches, offset, count, d2t, complaint in (
        ([1, 2], states, 2, room - 3, 3, ids, "do not fit the cache"),
        ([1, 2], states, 2, -1, 1, ids, "do not fit the cache"),
        ([1] * 9, [mx.zeros((9, WIDTH))] * 3, 2, 0, 1, ids, "1 to 8 tokens"),
        ([], [mx.zeros((0, WIDTH))] * 3, 2, 0, 1, ids, "1 to 8 tokens"),
        ([1, 2], states, 2, 0, 0, ids, "at least one token"),
        ([1, 2], states, 2, 0, 1, ids[:5], "one id a row"),
        ([1, 2], states, 1, 0, 1, ids, "two caches"),
        ([1, 2], states[:2], 2, 0, 1, ids, "all its taps"),
        ([1, 2], (), 2, 0, 1, ids, "all its taps"),
        ([1, 2], [*states[:2], mx.zeros((3, WIDTH))], 2, 0, 1, ids, "one a new row"),
        ([1, 2], [*states[:2], mx.zeros((2, WIDTH - 1))], 2, 0, 1, ids, "one a new row"),
        ([1, 2], [*states[:2], mx.zeros((2, WIDTH), mx.bfloat16)], 2, 0, 1, ids, "float32"),
    ):
        with pytest.raises(ValueError, match=complaint):
            fused.greedy_tokens(given, read, cache.keys[:caches], cache.values[:caches], offset, count, d2t)


@pytest.mark.parametrize("draft", [CASES[1]], indirect=True, ids=str)
def test_weights_that_do_not_fit_are_refused(draft: Reader) -> None:
    def made(**changed: object) -> cpu.CpuFusedReader:
        names = ("fusion", "feature_norms", "input", "embedding_norm", "state_norm", "layers", "final_norm", "output")
        parts = {name: getattr(draft, name) for name in (*names, "head", "embedding", "shape")}
        return cpu.CpuFusedReader(**parts | {"epilogue": "silu_mul", "eps": 1e-5} | changed)

    made()
    other = cpu.prepare_dense(mx.zeros((32, 32)))
    for changed in (
        {"fusion": other},
        {"feature_norms": draft.feature_norms[:2]},
        {"input": other},
        {"state_norm": draft.embedding_norm},
        {"layers": []},
        {"layers": [*draft.layers, dataclasses.replace(draft.layers[0], down=other, ffn_sub_norm=None)]},
        {"final_norm": draft.embedding_norm},
        {"output": None},
        {"head": other},
        {"embedding": draft.embedding[:, :100]},
    ):
        with pytest.raises(ValueError, match=r"fit|values|four products"):
            made(**changed)


def test_text_is_the_teachers(small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    folder = readers.make(tmp_path / "d", small_teacher, 64, layers=2, ternary=True, kept=3000)
    options = ("--teacher", small_teacher, "--prompt", "The old man", "--max-tokens", 40, "--k", 4, "-q")
    done = inside("decode", "spec", "--draft", folder, *options, "--compare", "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["identical"] is True and report["drafted"] > 0
