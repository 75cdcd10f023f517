"""Draws from the teacher's distribution: that they are its own; on disk and back; what a collection makes of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Command
from test_shards import _set, reseal

from decode.models.checkpoint import find_teacher
from distill.data.codec import SampledBlock
from distill.data.collect import Collector, plan_collection, plan_scoring
from distill.data.draws import draw, draw_on_host, tally, uniforms
from distill.data.inspection import inspect_dataset, table, verify
from distill.data.manifest import DatasetSettings
from distill.data.settings import CollectSettings
from distill.data.shards import Dataset, ShardWriter
from kernels.errors import UserError

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]
VOCAB, DRAWS = 300, 8


def on_device(logits: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    z = mx.array(logits)
    return np.array(draw(z, mx.logsumexp(z, axis=-1, keepdims=True), mx.array(uniform)))


def random_logits(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return (2.5 * np.random.default_rng(seed).standard_normal((rows, n))).astype(np.float32)


def deviations(drawn: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """How far the share of each id lies from its probability, in standard deviations of as many independent draws.

    Stratified draws vary less, so that 5 of them happen to no id in a million runs. What is expected less than 10 times
    is one bucket.
    """
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    share = np.bincount(drawn.ravel(), minlength=len(p)) / drawn.size
    rare = p * drawn.size < 10
    p, share = (np.append(x[~rare], x[rare].sum()) for x in (p, share))
    return np.abs(share - p) / np.sqrt(p * (1 - p) / drawn.size)


@pytest.mark.parametrize("how", [draw_on_host, on_device])
def test_the_mean_over_many_draws_is_the_teachers_distribution(how: Draw) -> None:
    logits = random_logits(1, VOCAB)
    many = np.repeat(logits, 4096, axis=0)
    uniform = np.concatenate([uniforms(0, row, 512, DRAWS) for row in range(8)])
    assert deviations(how(many, uniform), logits[0]).max() < 5
    # Without chance the same draws are the likely ids alone, which this finds.
    assert deviations(how(many, np.full_like(uniform, 0.5)), logits[0]).max() > 50


@pytest.mark.parametrize(("n", "draws"), [(1, 3), (97, 32), (300, 1), (16_384, 50), (70_001, 32)])
def test_the_device_draws_what_the_definition_draws(n: int, draws: int) -> None:
    rows = 200 if n < 1000 else 16
    logits = random_logits(rows, n)
    logits[0] += 80 * (np.arange(n) == n // 2)  # one id is certain
    logits[1, : n // 3] = -np.inf
    uniform = np.random.default_rng(1).random((rows, draws), np.float32)
    uniform[2] = 0
    uniform[3] = np.nextafter(np.float32(1), np.float32(0))
    here, there = on_device(logits, uniform), draw_on_host(logits, uniform)
    for drawn in (here, there):
        assert (drawn >= 0).all() and (drawn < n).all() and (np.diff(drawn, axis=1) >= 0).all()
        assert (drawn[0] == n // 2).all() and (drawn[1] >= n // 3).all()
    # They differ only where a point lies within float32's rounding of the border between two ids.
    sums = np.cumsum(np.exp(logits.astype(np.float64)), axis=-1)
    points = (np.arange(draws) + uniform.astype(np.float64)) / draws
    for row, column in np.argwhere(here != there):
        border = sums[row, min(here[row, column], there[row, column])] / sums[row, -1]
        assert abs(points[row, column] - border) < 1e-5


def test_draws_vary_less_than_independent_ones() -> None:
    """Of the count of every id, and of a sum over the vocabulary."""
    logits = random_logits(1, VOCAB, seed=2)
    p = np.exp(logits[0].astype(np.float64))
    p /= p.sum()
    drawn = draw_on_host(np.repeat(logits, 4096, axis=0), uniforms(1, 0, 4096, DRAWS))
    counts = np.stack([np.bincount(line, minlength=VOCAB) for line in drawn])
    likely = p > 0.01
    assert (counts.var(axis=0)[likely] < 1.1 * DRAWS * (p * (1 - p))[likely]).all()
    value = np.random.default_rng(3).standard_normal(VOCAB)
    independent = ((p * value**2).sum() - (p * value).sum() ** 2) / DRAWS
    assert (counts @ value / DRAWS).var() < 1.1 * independent


def test_random_numbers_follow_from_the_row_alone() -> None:
    assert np.array_equal(uniforms(5, 3, 64, 8), uniforms(5, 3, 64, 8))
    others = [uniforms(5, 3, 64, 8), uniforms(5, 4, 64, 8), uniforms(6, 3, 64, 8), uniforms(2**70, 3, 64, 8)]
    assert len(np.unique(np.stack(others).ravel())) > 2000
    assert 0.45 < np.mean(others) < 0.55 and np.max(others) < 1


def test_tally_counts() -> None:
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.integers(0, 12, (200, DRAWS)), axis=1).astype(np.int32)
    first, trained = rng.integers(0, 14, 200).astype(np.int32), rng.random(200) < 0.8
    ids, counts = tally(first, drawn, trained)
    for i in range(200):
        there = ids[i] >= 0
        assert counts[i][~there].sum() == 0
        if not trained[i]:
            assert not there.any()
            continue
        found = Counter(drawn[i].tolist())
        others = sorted(found.keys() - {first[i]})
        assert ids[i][there].tolist() == [first[i], *others]
        assert counts[i][there].tolist() == [found[token] for token in (first[i], *others)]


# --- on disk


def draws_settings(**more: Any) -> DatasetSettings:
    values = {"teacher": {"name": "t", "hash": "h"}, "tokenizer_hash": "x", "vocab_size": VOCAB, "seq_len": 61}
    return DatasetSettings({**values, "sampled": DRAWS, "temperatures": [1.0], **more})


def draws_block(settings: DatasetSettings, rows: int = 4, seed: int = 0) -> SampledBlock:
    n, draws = settings.seq_len, settings.sampled
    assert draws is not None
    logits = random_logits(rows * n, settings.vocab_size, seed)
    uniform = np.concatenate([uniforms(seed, row, n, draws) for row in range(rows)])
    segments = np.ones((rows, n), np.uint8)
    segments[0, n // 2 :] = 0
    trained = (np.random.default_rng(seed).random((rows, n)) < 0.7) & (segments > 0)
    ids, counts = tally(logits.argmax(axis=1).astype(np.int32), draw_on_host(logits, uniform), trained.ravel())
    tokens = np.random.default_rng(seed).integers(0, settings.vocab_size, (rows, n)).astype(np.int32)
    return SampledBlock(tokens, trained, segments, ids.reshape(rows, n, -1), counts.reshape(rows, n, -1))


def written(folder: Path, settings: DatasetSettings, *blocks: SampledBlock) -> Dataset:
    with ShardWriter.open(folder, settings) as writer:
        for block in blocks:
            writer.write(block)
        writer.finish()
    return Dataset.open(folder)


@pytest.mark.parametrize(("vocab_size", "draws"), [(300, 1), (2, 3), (70_000, 254)])
def test_round_trip(tmp_path: Path, vocab_size: int, draws: int) -> None:
    settings = draws_settings(vocab_size=vocab_size, sampled=draws)
    block = draws_block(settings)
    nothing = SampledBlock(*(getattr(block, name)[:0] for name in vars(block)))
    read = written(tmp_path, settings, block, nothing)
    for i, one in enumerate((block, nothing)):
        again = read.read(i)
        for name, array in vars(one).items():
            assert np.array_equal(getattr(again, name), array) and getattr(again, name).dtype == array.dtype, name
    assert verify(tmp_path) == []


def test_writer_refuses_impossible_draws(tmp_path: Path) -> None:
    settings = draws_settings()
    good = draws_block(settings)
    row, place = np.argwhere((good.ids[..., 2] >= 0) & (good.ids[..., 3] < 0))[0]

    def changed(name: str, column: int, value: int) -> SampledBlock:
        array = getattr(good, name).copy()
        array[row, place, column] = value
        return replace(good, **{name: array})

    bad = {
        "ids is int32": replace(good, ids=good.ids[..., :5]),
        "ids has an id outside the vocabulary": changed("ids", 2, VOCAB),
        "first choice twice": changed("ids", 1, int(good.ids[row, place, 0])),
        "ids does not rise": changed("ids", 2, int(good.ids[row, place, 1])),
        "an id that was not drawn": changed("counts", 1, 0),
        "do not sum to the number of draws": changed("counts", 0, DRAWS + 1),
        "not there where they should be": replace(good, loss_mask=good.segments > 0),
    }
    with ShardWriter.open(tmp_path, settings) as writer:
        for message, block in bad.items():
            with pytest.raises(ValueError, match=message):
                writer.write(block)
        writer.write(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("drawn", (3, 0), DRAWS + 2), "drawn|expected"),
        (lambda tensors: tensors.update(drawn=np.full_like(tensors["drawn"], 200)), "drawn|expected"),
        (lambda tensors: tensors.update(drawn=tensors["drawn"].astype(np.float32)), "drawn is float32"),
        (lambda tensors: tensors.pop("drawn"), "tensor drawn is missing"),
        (_set("drawn_ids", (0, slice(None)), 255), "ids has an id outside the vocabulary"),
        (_set("drawn_counts", 0, 0), "counts"),
        (lambda tensors: tensors.update(drawn_ids=tensors["drawn_ids"][:2]), "drawn_ids is uint8"),
        (_set("loss_mask", (2, 0), 0), "ids are not there"),
    ],
)
def test_verify_looks_at_draws(tmp_path: Path, change: Any, message: str) -> None:
    settings = draws_settings()
    written(tmp_path, settings, draws_block(settings), draws_block(settings, seed=1))
    reseal(tmp_path, 1, change)
    problems = verify(tmp_path)
    assert {problem.file for problem in problems} == {"shard-00001.safetensors"}
    assert any(word in str(problem) for problem in problems for word in message.split("|")), problems


def test_draws_of_too_many_ids_are_named(tmp_path: Path) -> None:
    """The lengths agree, but one position has more ids than can be drawn there."""
    settings = draws_settings()
    block = draws_block(settings)
    written(tmp_path, settings, block)
    drawn = (block.ids >= 0).sum(axis=2).astype(np.uint8)
    rest = int(drawn.sum()) - 200
    moved = np.zeros_like(drawn)
    moved[1, 0], moved[1, 1] = 200, rest % DRAWS
    moved[2:].ravel()[: rest // DRAWS] = DRAWS
    reseal(tmp_path, 0, lambda tensors: tensors.update(drawn=moved))
    with pytest.raises(UserError, match=rf"shard-00000\.safetensors: drawn has more than {DRAWS + 1} ids"):
        Dataset.open(tmp_path).read(0)


# --- collecting


@pytest.fixture(scope="module", autouse=True)
def short_shards() -> Iterator[None]:
    """So that a small dataset has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distill.data.collect.ROWS_PER_SHARD", 4)
        yield


@pytest.fixture(scope="module")
def collected(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Collector, Dataset]:
    """Of texts and a few replies."""
    folder = tmp_path_factory.mktemp("draws")
    lines = [{"prompt": f"Tell me about the number {n}{n + 3}."} for n in range(5)]
    lines += [{"text": f"Paragraph {i}. " + "The ship sailed on over the grey sea. " * 9} for i in range(20)]
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = CollectSettings(
        sources=(str(folder / "all.jsonl"),), tokens=1500, seq_len=128, batch=2, max_reply=16, top_k=None, sampled=DRAWS
    )
    collector = Collector(plan_collection(find_teacher(str(small_teacher)), settings, folder / "d"))
    return collector, collector.run()


def scored(collected: tuple[Collector, Dataset], out: Path, **changes: Any) -> Collector:
    plan = collected[0].plan
    settings = replace(plan.settings, **changes)
    return Collector(plan_scoring(plan.teacher, plan.replies, settings, set(), out))


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("shard-*"))]


def test_draws_are_of_the_same_teacher_as_the_top_logits(collected: tuple[Collector, Dataset], tmp_path: Path) -> None:
    """First choices are equal. The first 32 ids are drawn as often as their probabilities say: over thousands of draws,
    to within 5 standard deviations of independent ones."""
    top = scored(collected, tmp_path / "d", top_k=32, sampled=None).run()
    expected = variance = found = 0.0
    for one, other in zip(collected[1], top, strict=True):
        assert isinstance(one, SampledBlock) and np.array_equal(one.loss_mask, other.loss_mask)
        where = one.loss_mask
        assert np.array_equal(one.ids[where][:, 0], other.top_ids[where][:, 0])
        p = np.exp(other.top_logprobs[where].astype(np.float64))
        in_top = (one.ids[where][:, :, None] == other.top_ids[where][:, None]).any(axis=2)
        found += (one.counts[where] * in_top).sum()
        expected += DRAWS * p.sum()
        variance += DRAWS * (p.sum(axis=1) * (1 - p.sum(axis=1))).sum()
    assert found > 2000 and variance > 100
    assert abs(found - expected) < 5 * variance**0.5


def test_stopped_or_divided_it_has_the_same_bytes(
    collected: tuple[Collector, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shards(collected[1].folder)
    assert len(whole) >= 3
    stopped = scored(collected, tmp_path / "stopped")
    add = ShardWriter.add

    def killed(writer: ShardWriter, coded: Any, index: int | None = None) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return add(writer, coded, index)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    stopped.run()
    assert shards(tmp_path / "stopped") == whole
    with ShardWriter.open(tmp_path / "stopped", stopped.plan.manifest) as writer:
        writer.drop([0, 1])  # the others had been written by another process
    stopped.run()
    assert shards(tmp_path / "stopped") == whole
    # A row's draws follow from its own number, not from what it is scored with.
    scored(collected, tmp_path / "batch", batch=3).run()
    assert shards(tmp_path / "batch") == whole


def test_a_gpu_draws_the_same_ids(
    collected: tuple[Collector, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued for a device is not what numpy does on a CPU: but for points near a border the draws are equal."""
    collector = scored(collected, tmp_path / "d")
    monkeypatch.setattr(collector.model, "async_decode", True)
    for one, other in zip(collected[1], collector.run(), strict=True):
        assert isinstance(one, SampledBlock) and isinstance(other, SampledBlock)
        same = (one.ids == other.ids).all(axis=-1) & (one.counts == other.counts).all(axis=-1)
        assert same.mean() > 0.995


def test_inspect_and_verify(collected: tuple[Collector, Dataset]) -> None:
    folder = collected[1].folder
    assert verify(folder) == []
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert settings["sampled"] == DRAWS and "k" not in settings
    summary = inspect_dataset(folder)
    assert (summary["sampled"], summary["k"], summary["mean_tail_mass"]) == (DRAWS, None, None)
    counts = np.concatenate([block.counts[block.loss_mask] for block in collected[1]])  # type: ignore[union-attr]
    assert summary["mean_different_ids"] == pytest.approx((counts > 0).sum(axis=1).mean())
    assert summary["mean_top1_probability"] == pytest.approx(counts[:, 0].mean() / DRAWS)
    assert f"{DRAWS} draws" in table(summary) and "outside the top" not in table(summary)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--sampled", 0), "--sampled 0"),
        (("--sampled", -3), "--sampled -3"),
        (("--sampled", 255), "--sampled 255"),
        (("--sampled", 8, "--top-k", 32), "--sampled 8"),
        (("--sampled", 8, "--temperature", 0.7), "--temperature 0.7"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_work(
    inside: Command, small_teacher: Path, tmp_path: Path, options: tuple[object, ...], named: str
) -> None:
    found = inside("distill", "collect", "--teacher", small_teacher, "--out", tmp_path / "d", *options)
    found.refused("distill", named)
    assert not list(tmp_path.iterdir())


def test_other_scores_do_not_go_into_the_same_folder(collected: tuple[Collector, Dataset]) -> None:
    for changes in ({"sampled": DRAWS + 1}, {"sampled": None, "top_k": 32}):
        with pytest.raises(UserError, match=f"was begun with sampled = {DRAWS}, not"):
            scored(collected, collected[1].folder, **changes).run()
