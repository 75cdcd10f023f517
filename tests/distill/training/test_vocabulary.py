"""Drafts with a trimmed head: which tokens it keeps, training on it, and what reads the result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from synthetic import VOCAB, dataset, teacher_folder

from decode.models.checkpoint import find_model
from distill.data.shards import Dataset
from distill.training import checkpoint
from distill.training.drafts import llama
from distill.training.loader import DataLoader
from distill.training.loop import Summary
from distill.training.losses import tail_bucket_kl
from distill.training.run import train
from distill.training.settings import TrainSettings
from distill.training.vocabulary import most_frequent, select_draft_vocabulary, special_tokens, target_counts
from kernels.errors import UserError

SETTINGS = TrainSettings(live_prompts=0, layers=1, hidden=64, vocab=60, tokens=20_000, batch=4, lr=5e-3, evals=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, teacher)"""
    root = tmp_path_factory.mktemp("vocabulary")
    teacher = teacher_folder(root / "teacher")
    return dataset(root / "data", teacher), teacher


@pytest.fixture(scope="module")
def trained(
    made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Summary, list[dict[str, float]]]:
    lines: list[dict[str, float]] = []
    out = tmp_path_factory.mktemp("runs") / "trimmed"
    return train(*made, out, SETTINGS, progress=lines.append, quiet=True), lines


def test_counts_are_of_what_follows_a_trained_position(made: tuple[Path, Path]) -> None:
    data = Dataset.open(made[0])
    expected = np.zeros(VOCAB, int)
    for block in data:
        for tokens, trained, document in zip(block.tokens, block.loss_mask, block.segments, strict=True):
            for t in range(len(tokens) - 1):
                if trained[t] and document[t] > 0 and document[t] == document[t + 1]:
                    expected[tokens[t + 1]] += 1
    assert np.array_equal(target_counts(data), expected) and expected.sum() > 500


def test_the_most_frequent_are_kept_and_those_that_must_be() -> None:
    counts = np.array([5, 0, 7, 5, 5, 0, 1])
    for n, always, kept in [(1, [], [2]), (3, [], [0, 2, 3]), (2, [6], [0, 2, 6]), (6, [0], [0, 1, 2, 3, 4, 6])]:
        found = most_frequent(counts, n, always)
        assert found.dtype == np.int32 and found.tolist() == kept, n


def test_special_tokens_are_never_trimmed(made: tuple[Path, Path], tmp_path: Path) -> None:
    data, teacher = made
    assert special_tokens(teacher, VOCAB) == {2}  # what ends a text
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [
        {"id": i, "content": f"w{i}", "special": special, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, special in ((90, True), (91, False))
    ]  # fmt: skip
    other = teacher_folder(tmp_path / "teacher")
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 8], "bos_token_id": 9}))
    assert special_tokens(other, VOCAB) == {2, 7, 8, 9, 90}
    assert {2, 7, 8, 9, 90} <= set(select_draft_vocabulary(Dataset.open(data), 1, other).d2t.tolist())


@pytest.mark.slow
def test_a_trimmed_head_learns(made: tuple[Path, Path], trained: tuple[Summary, list[dict[str, float]]]) -> None:
    summary, lines = trained
    counts = target_counts(Dataset.open(made[0]))
    kept = most_frequent(counts, 60, [2])
    assert summary.vocabulary == {
        "kept": len(kept),
        "size": VOCAB,
        "coverage": pytest.approx(counts[kept].sum() / counts.sum()),
    }
    assert 0.5 < summary.vocabulary["coverage"] < 0.999
    evals = [line for line in lines if line["kind"] == "eval"]
    assert evals[-1]["held_out_loss"] < 0.3 * evals[0]["held_out_loss"]
    assert evals[-1]["agreement"] > 0.6
    about = json.loads((summary.out / "draft.json").read_text())
    assert about["vocabulary"] == summary.vocabulary and about["training"]["settings"]["vocab"] == 60
    assert about["config"]["kept"] == len(kept) and about["config"]["vocab_size"] == VOCAB
    again = checkpoint.load(summary.out)
    assert again.d2t is not None and np.array_equal(again.d2t, kept)
    assert again.weights["model.embed_tokens.weight"].shape == (VOCAB, 64)  # the input knows every token


@pytest.mark.slow
def test_its_loss_is_the_one_defined(made: tuple[Path, Path], trained: tuple[Summary, list[dict[str, float]]]) -> None:
    """What training reports of the saved draft, against the formula over the trimmed vocabulary."""
    summary, _ = trained
    saved = checkpoint.load(summary.out)
    loader = DataLoader(Dataset.open(made[0]), 1.0, SETTINGS.batch, 0, SETTINGS.eval_share, SETTINGS.eval_rows)
    loss = count = 0.0
    for batch in loader.held_out_batches():
        hidden = llama.forward(saved.config, saved.weights, mx.array(batch.tokens), mx.array(batch.segments)).reshape(
            -1, 64
        )
        hidden = hidden if batch.positions is None else hidden[mx.array(batch.positions)]
        assert saved.d2t is not None
        logits = hidden @ llama.head_weight(saved.config, saved.weights, mx.array(saved.d2t)).T
        known = [mx.array(x) for x in (batch.top_ids, batch.top_logprobs, batch.lse_one, batch.lse, batch.weights > 0)]
        here = float(batch.weights.sum())
        loss += here * tail_bucket_kl(logits, *known, d2t=saved.d2t, vocab_size=VOCAB).item()
        count += here
    assert loss / count == pytest.approx(summary.held_out_loss, rel=1e-3)


@pytest.mark.parametrize("n", [0, -3, VOCAB, VOCAB + 1])
def test_impossible_sizes_are_refused(made: tuple[Path, Path], tmp_path: Path, n: int) -> None:
    with pytest.raises(UserError, match=f"--vocab {n}: must be 1 to {VOCAB - 1}"):
        train(*made, tmp_path / "out", dataclasses.replace(SETTINGS, vocab=n), quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_decode_computes_with_it(
    trained: tuple[Summary, list[dict[str, float]]], made: tuple[Path, Path], tmp_path: Path, bits: int | None
) -> None:
    saved = checkpoint.load(trained[0].out)
    out = tmp_path / "draft"
    checkpoint.save(out, saved.weights, saved.config, made[1], {"complete": True}, bits, d2t=saved.d2t)
    model = find_model(str(out), "--draft").load()
    assert saved.d2t is not None and model.d2t is not None and np.array_equal(model.d2t, saved.d2t)
    weights = checkpoint.rounded(saved.weights, saved.config, bits)
    tokens = np.arange(3, 20) * 5 % VOCAB
    hidden = llama.forward(saved.config, weights, mx.array(tokens[None]), mx.ones((1, len(tokens)), mx.int32))[0]
    expected = hidden @ llama.head_weight(saved.config, weights, mx.array(saved.d2t)).T
    found = model.step(tokens, model.new_cache()).logits
    assert found.shape == (len(tokens), len(saved.d2t))
    # Decoding takes dequantised weights, keys and values as bfloat16.
    assert np.allclose(np.array(found), np.array(expected), rtol=1e-3, atol=0.03 if bits is None else 0.06)


@pytest.mark.slow
def test_stock_loaders_refuse_it(trained: tuple[Summary, list[dict[str, float]]]) -> None:
    """They would take the whole embedding for the head."""
    from mlx_lm import load

    with pytest.raises(ValueError, match="bitdraft_trimmed_llama not supported"):
        load(str(trained[0].out))


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "kept|Missing 1 parameters"),
        (mx.array([3, 2, 5, *range(6, 63)], mx.int32), "ascending"),
        (mx.array([2, *range(2, 61)], mx.int32), "ascending"),
        (mx.arange(VOCAB - 59, VOCAB + 1), "ascending ids of a vocabulary of 96"),
        (mx.arange(2, 62).astype(mx.float32), "not int32"),
        (mx.arange(2, 12), "kept"),
    ],
)
@pytest.mark.slow
def test_a_damaged_list_of_tokens_is_named(
    trained: tuple[Summary, list[dict[str, float]]],
    made: tuple[Path, Path],
    tmp_path: Path,
    kept: mx.array | None,
    message: str,
) -> None:
    saved, out = checkpoint.load(trained[0].out), tmp_path / "draft"
    config = dataclasses.replace(saved.config, draft_vocab_size=60)
    checkpoint.save(out, saved.weights, config, made[1], {}, d2t=np.arange(60))
    (out / "draft.json").unlink()
    path = out / "model.safetensors"
    weights = dict(mx.load(str(path)))  # type: ignore[arg-type]
    weights.pop("kept")
    mx.save_safetensors(str(path), weights | ({} if kept is None else {"kept": kept}), {"format": "mlx"})
    with pytest.raises(UserError, match=message):
        checkpoint.load(out)
    with pytest.raises(UserError, match=message) as caught:
        find_model(str(out), "--draft").load()
    assert str(out) in str(caught.value)
