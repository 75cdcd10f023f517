"""The draft that reads its teacher: trained as it is used, on the right targets, saved and gone on with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import readers
from collected import collect_into
from conftest import Command, changed_copy

from decode.models.checkpoint import find_teacher
from decode.models.transformer import Transformer
from distill.data.shards import Dataset
from distill.release.publish import prepare
from distill.training import checkpoint
from distill.training.cpu import attention as numpy_attention
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama, reader
from distill.training.drafts.layers import Attention, OwnKeys, linear, masked_attention
from distill.training.loader import Batch
from distill.training.run import train
from distill.training.settings import TrainSettings
from kernels.errors import UserError
from kernels.packing import quantize_ternary

STEPS = 4
SETTINGS = TrainSettings(
    reads_teacher=True, hidden=64, vocab=200, tokens=500, batch=4, evals=2, unroll=2, live_prompts=1
)


@pytest.fixture(scope="module")
def teacher(small_teacher: Path) -> Transformer:
    return find_teacher(str(small_teacher)).load()


def text(length: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(16384, size=(rows, length)).astype(np.int32)


@pytest.mark.parametrize(("hidden", "layers", "ternary"), [(64, 2, False), (576, 1, False), (64, 1, True)])
def test_what_is_trained_is_what_decoding_computes(
    small_teacher: Path, teacher: Transformer, tmp_path: Path, hidden: int, layers: int, ternary: bool
) -> None:
    """At every index of a text and in every step, one token after the other through the loaded draft and its cache."""
    folder = readers.make(tmp_path / "d", small_teacher, hidden, layers=layers, ternary=ternary)
    config, draft = checkpoint.load(folder).config, readers.load(folder, small_teacher, teacher)
    tokens = text(14)
    segments = np.ones_like(tokens)
    features = reader.Features(teacher, config.taps).of(tokens, segments)
    weights = readers.lively(config)  # what was saved, but that ternary matrices are not rounded yet
    steps = reader.unroll(config, weights, teacher.embedding, features, mx.array(tokens), mx.array(segments), STEPS)
    head = teacher.embedding.astype(mx.float32).T
    trained = [np.array(hidden @ head)[0] for hidden in steps]

    cache = teacher.new_cache()
    states = draft.fuse(teacher.forward(tokens[0], cache, config.taps).hidden)
    for t in range(len(tokens[0]) - STEPS - 1):
        rows = draft.new_cache()
        following = mx.array(tokens[0, 1 : t + 2], mx.uint32)
        state = draft.forward(following, states[: t + 1], rows)[-1:]
        for step in range(STEPS):
            found = np.array(draft.logits(state))[0]
            scale = np.abs(trained[step][t]).max()
            # Decoding rounds keys and values to bfloat16, which may tip the rounding of activations over.
            assert np.abs(found - trained[step][t]).max() < (0.1 if ternary else 0.02) * scale, (t, step)
            state = draft.forward(mx.array(tokens[0, t + 2 + step : t + 3 + step], mx.uint32), state, rows)


def test_no_index_sees_what_decoding_does_not_know(small_teacher: Path, teacher: Transformer) -> None:
    """States of the teacher's later than the index, later tokens, and other documents."""
    config = DraftConfig.for_teacher(small_teacher, 1, 64, None, readers.TAPS)
    weights, tokens, segments, at = readers.lively(config), text(24), np.array([[1] * 9 + [2] * 15]), 14
    features = reader.Features(teacher, config.taps).of(tokens, segments)

    def run(tokens: np.ndarray, features: mx.array, attention: Attention = masked_attention) -> list[np.ndarray]:
        arrays = mx.array(tokens), mx.array(segments)
        steps = reader.unroll(config, weights, teacher.embedding, features, *arrays, STEPS, attention)
        return [np.array(hidden)[0, at] for hidden in steps]

    plain = run(tokens, features)
    for attention in (masked_attention, numpy_attention):
        seen = np.ones((1, 24, 1), bool)
        seen[0, at + 1 :] = seen[0, :9] = False
        changed = mx.where(mx.array(seen), features, 9.0)
        for step, (one, other) in enumerate(zip(plain, run(tokens, changed, attention), strict=True)):
            assert np.allclose(one, other, atol=1e-4), step
        for step in range(STEPS):
            later = tokens.copy()
            later[0, at + 2 + step :] = later[0, :9] = 7
            assert np.allclose(plain[step], run(later, features, attention)[step], atol=1e-4)
            later[0, at + 1 + step] = (later[0, at + 1 + step] + 1) % 16384
            assert not np.allclose(plain[step], run(later, features, attention)[step], atol=1e-4)


def test_attention_in_numpy_equals_the_plain_one() -> None:
    """In value and gradient, with keys that only their own position sees."""
    rng = np.random.default_rng(0)
    t = 300
    document = mx.array([[1] * 40 + [2] * (t - 50) + [0] * 10, [1] * t])
    shapes = [(2, 4, t, 16), *[(2, 2, t, 16)] * 2, *[(2, 2, t, 3, 16)] * 2, (2, 4, t, 16)]
    *inputs, given = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)

    def run(attention: Attention) -> list[np.ndarray]:
        def total(q: mx.array, k: mx.array, v: mx.array, own_k: mx.array, own_v: mx.array) -> mx.array:
            return (attention(q, k, v, document, OwnKeys(own_k, own_v)) * given).sum()

        value, gradients = mx.value_and_grad(total, argnums=tuple(range(5)))(*inputs)
        return [np.array(x) for x in (value, *gradients)]

    for ours, plain in zip(run(numpy_attention), run(masked_attention), strict=True):
        assert np.allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_ternary_products_round_as_bitlinear_does_and_learn_straight_through() -> None:
    rng = np.random.default_rng(0)
    x, w, g = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in ((2, 5, 64), (8, 64), (2, 5, 8)))
    codes, scale = quantize_ternary(np.array(w))
    s = 127 / np.abs(np.array(x)).max(axis=-1, keepdims=True)
    rows, weight = np.rint(np.array(x) * s) / s, codes * scale
    assert np.allclose(np.array(linear(x, w, True)), rows @ weight.T, atol=1e-4)
    d_x, d_w = mx.grad(lambda x, w: (linear(x, w, True) * g).sum(), argnums=(0, 1))(x, w)
    assert np.allclose(np.array(d_x), np.array(g) @ weight, atol=1e-4)
    assert np.allclose(np.array(d_w), np.einsum("bto,bti->oi", np.array(g), rows), atol=1e-3)


def test_every_step_has_the_target_of_the_token_it_proposes() -> None:
    """Two rows, of two documents and of one with a user's turn in between."""
    trained = np.zeros((2, 12), bool)
    trained[0, 2:5] = trained[0, 6:10] = trained[1, 1:4] = trained[1, 7:12] = True
    segments = np.array([[1] * 5 + [2] * 7, [1] * 12])
    where = np.flatnonzero(trained)
    positions = np.concatenate([where, np.zeros(2, where.dtype)]).astype(np.int32)  # padded
    weights = (np.arange(len(positions)) < len(where)).astype(np.float32)
    batch = Batch(text(12, 2), segments, positions, weights, np.zeros((len(positions), 1), np.int32))
    index, counts = reader.unrolled_targets(batch, 3)
    for step in (1, 2, 3):
        for slot, position in enumerate(positions):
            at = position - step
            span = range(position - step + 1, position + 1)  # the positions whose next tokens are proposed
            inside = at // 12 == position // 12 and at >= 0
            fits = inside and segments.flat[at] == segments.flat[position] and all(trained.flat[i] for i in span)
            fits = bool(fits and weights[slot])
            assert counts[step - 1, slot] == fits, (step, slot)
            assert index[step - 1, slot] == (at if fits else 0)
    assert counts.sum(axis=1).tolist() == [15.0, 11.0, 7.0]


@pytest.mark.parametrize("changes", [{}, {"ternary": True, "loss": "kl=1,tv=0.5"}], ids=["float", "ternary"])
def test_it_learns_and_goes_on_where_it_was_stopped(
    text_dataset: Path, small_teacher: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    lines: list[dict[str, float]] = []
    whole = train(text_dataset, small_teacher, tmp_path / "whole", settings, progress=lines.append, quiet=True)
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert losses[-1] < losses[0] and whole.vocabulary is not None
    decoded = [line["tokens_per_verification"] for line in lines if line["kind"] == "eval"]
    assert min(decoded) >= 1 and whole.tokens_per_verification == max(decoded)
    about = json.loads((tmp_path / "whole" / "draft.json").read_text())
    assert len(about["training"]["agreement_by_step"]) == 2 and about["config"]["taps"] == [0, 1, 2]

    class Stop(Exception):
        pass

    def stop(line: dict[str, object]) -> None:
        if line["kind"] == "eval":
            raise Stop

    with pytest.raises(Stop):
        train(text_dataset, small_teacher, tmp_path / "again", settings, progress=stop, quiet=True)
    # What is read of the teacher may be kept, or computed again.
    train(text_dataset, small_teacher, tmp_path / "again", settings, quiet=True, cache_features=True)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again"))
    assert one == other
    saved = checkpoint.load(tmp_path / "whole")
    assert set(saved.weights) == set(reader.shapes(saved.config))


def test_a_draft_goes_on_with_other_data(text_dataset: Path, small_teacher: Path, tmp_path: Path) -> None:
    """On two datasets; it keeps its shape and the tokens of its head, and another is refused."""
    settings = dataclasses.replace(SETTINGS, evals=1, tokens=200)
    train(text_dataset, small_teacher, tmp_path / "one", settings, quiet=True)
    more = shutil.copytree(text_dataset, tmp_path / "more")
    with pytest.raises(UserError, match="more: is there twice"):
        train([text_dataset, more], small_teacher, tmp_path / "two", settings, quiet=True)
    collect_into(tmp_path / "new", small_teacher, "novels")
    seen: list[dict[str, Any]] = []
    data = [text_dataset, tmp_path / "new"]
    onwards = dataclasses.replace(settings, hidden=None, vocab=None, reads_teacher=False, lr=1e-9)
    out = tmp_path / "two"
    train(data, small_teacher, out, onwards, init=tmp_path / "one", progress=seen.append, quiet=True)
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    assert two.config == one.config and np.array_equal(two.d2t, one.d2t)  # type: ignore[arg-type]
    for name, weight in one.weights.items():  # hardly trained: it is the draft that it went on from
        assert np.allclose(np.array(weight), np.array(two.weights[name]), rtol=0.02, atol=1e-3), name
    rows = sum(shard.rows for folder in data for shard in Dataset.open(folder).shards)
    assert seen[0]["train_rows"] + seen[0]["held_out_rows"] == rows
    training = json.loads((out / "draft.json").read_text())["training"]
    about = json.loads((out / "draft.json").read_text())
    about["training"]["data"]["datasets"][1] |= {"complete": False}
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "draft.json").write_text(json.dumps(about))
    tokens = about["training"]["data"]["datasets"][1]["tokens"]
    assert f"| {tokens:,} of 3,000: its collection was not finished |" in prepare(copy, "maker/draft").card
    assert [part["tokens"] for part in training["data"]["datasets"]] == [Dataset.open(folder).tokens for folder in data]
    assert train(data, small_teacher, out, onwards, init=tmp_path / "one", quiet=True).done_before
    with pytest.raises(UserError, match="--layers 2: the draft of --init has 1 and stays"):
        deeper = dataclasses.replace(onwards, layers=2)
        train(data, small_teacher, tmp_path / "x", deeper, init=tmp_path / "one", quiet=True)
    with pytest.raises(UserError, match="holds a finished draft that was trained with another --init"):
        train(data, small_teacher, out, onwards, init=copy, quiet=True)


def test_a_draft_that_is_gone_on_from_keeps_its_architecture(
    text_dataset: Path, small_teacher: Path, inside: Command, tmp_path: Path
) -> None:
    """Be it another than `distill train` would make for the teacher; one that it cannot train is named."""
    own = DraftConfig.for_teacher(small_teacher, 1, 64)
    own = dataclasses.replace(own, rope_theta=5e5, intermediate=128, heads=2, kv_heads=1, head_dim=32, tied=False)
    folder = tmp_path / "own"
    checkpoint.save(folder, llama.create(own, 0), own, small_teacher, {"complete": False})
    options = ("train", "--teacher", small_teacher, "--tokens", 256, "--live-prompts", 1, "-q")
    done = inside("distill", *options, "--data", text_dataset, "--init", folder, "--out", tmp_path / "on")
    assert (done.code, done.err) == (0, "")
    again = checkpoint.load(tmp_path / "on")
    assert again.config == own
    begun = again.provenance["training"]["init"]
    assert begun["name"] == "own" and begun["complete"] is False
    card = prepare(tmp_path / "on", "maker/draft").card
    assert "whose training was not finished" in card and "--init own" in card
    # Its config.json decides too what comes of it.
    edited = shutil.copytree(folder, tmp_path / "edited")
    (edited / "draft.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"rope_theta": 1e4}))
    refused = inside("distill", *options, "--data", text_dataset, "--init", edited, "--out", tmp_path / "on")
    refused.refused("distill", str(tmp_path / "on"), "another --init")
    # A draft is not put in the place of the one it goes on from.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link"):
        refused = inside("distill", *options, "--data", text_dataset, "--init", folder, "--out", out)
        refused.refused("distill", f"--init {folder}", "give another")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    inside("distill", *options, "--init", folder, "--init", folder).refused("distill", "--init is given twice")
    for key, value in (("rope_scaling", {"type": "linear", "factor": 2}), ("attention_bias", True)):
        changed = shutil.copytree(folder, tmp_path / key)
        config = json.loads((folder / "config.json").read_text()) | {key: value}
        (changed / "config.json").write_text(json.dumps(config))
        (changed / "draft.json").unlink()
        refused = inside("distill", *options, "--data", text_dataset, "--init", changed, "--out", tmp_path / "no")
        refused.refused("distill", str(changed / "config.json"), key)


def test_what_cannot_be_trained_is_named(text_dataset: Path, small_teacher: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"taps": "0,4"}, r"--taps 0,4: .* has layers 0 to 3"),
        ({"taps": "2,1"}, r"--taps 2,1: must be ascending"),
        ({"taps": "a"}, r"--taps a: must be the numbers of layers"),
        ({"taps": "1", "reads_teacher": False}, r"--taps 1: is for drafts that read their teacher"),
        ({"unroll": 8, "reads_teacher": False}, r"--unroll 8: is for drafts that read their teacher"),
        ({"loss": "kl=0,tv=0"}, r"--loss kl=0,tv=0: the weights must sum"),
        ({"loss": "kl=1,kl=2"}, r"--loss kl=1,kl=2: kl is there twice"),
        ({"loss": "kl=x"}, r"--loss kl=x: 'x' is not a number"),
    ):
        with pytest.raises(UserError, match=message):
            train(text_dataset, small_teacher, tmp_path / "out", dataclasses.replace(SETTINGS, **changes), quiet=True)  # type: ignore[arg-type]
    other = changed_copy(small_teacher, tmp_path / "other", model__safetensors=None)
    weights = dict(mx.load(str(small_teacher / "model.safetensors")))  # type: ignore[arg-type]
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    mx.save_safetensors(str(other / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(UserError, match="was collected from small, not from"):
        train(text_dataset, other, tmp_path / "out", SETTINGS, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_commands(text_dataset: Path, small_teacher: Path, inside: Command, tmp_path: Path) -> None:
    """From dataset to text; a draft of another teacher's is refused."""
    collect_into(tmp_path / "more", small_teacher, "novels")
    data = ("--data", text_dataset, "--data", tmp_path / "more")
    options = ("--teacher", small_teacher, *data, "--reads-teacher", "--hidden", 64, "--vocab", 200)
    done = inside(
        "distill", "train", *options, "--tokens", 500, "--live-prompts", 1, "--out", tmp_path / "d", "-q", "--json", "-"
    )
    assert done.code == 0, done.err
    trained = json.loads(done.out)
    assert trained["data"] == [str(text_dataset), str(tmp_path / "more")]
    assert trained["settings"]["taps"] == "0,1,2" and trained["settings"]["layers"] == 1
    spec = ("decode", "spec", "--draft", tmp_path / "d", "--prompt", "The old man", "--max-tokens", 20, "-q")
    done = inside(*spec, "--teacher", small_teacher, "--compare", "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["identical"] is True and report["drafted"] > 0
    inside(*spec).refused("decode", str(tmp_path / "d"), "reads the states of small", "bitnet-smol-116m")
    plan = inside("decode", "plan", "--draft", tmp_path / "d", "--chip", "M1", "-q", "--json", "-")
    assert plan.code == 0
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    for key, value in (("rope_theta", -5), ("teacher_hidden_size", 320)):
        (tmp_path / "d" / "config.json").write_text(json.dumps(config | {key: value}))
        if key == "rope_theta":
            inside(*spec, "--teacher", small_teacher).refused("decode", str(tmp_path / "d"), "rope_theta is -5")
        else:
            inside("decode", "plan", "--draft", tmp_path / "d", "--chip", "M1").refused("decode", "width 320")
    inside("decode", "plain", "--teacher", tmp_path / "d", "--prompt", "x").refused(
        "decode", "a draft that reads its teacher"
    )
