"""Draft models: documents kept apart, saving and loading, faults named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TEACHER
from synthetic import VOCAB, teacher_folder

from distill.training import checkpoint
from distill.training.cpu import BLOCK, attention
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama
from distill.training.memory import check_memory, estimate_memory
from kernels.errors import UserError


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teacher_folder(tmp_path / "teacher")


@pytest.fixture
def config(teacher: Path) -> DraftConfig:
    return DraftConfig.for_teacher(teacher, layers=2, hidden=128)


def provenance() -> dict[str, object]:
    return {"teacher": {"name": "synthetic", "hash": "0" * 64}, "complete": True}


def hidden(model: object, tokens: np.ndarray, document: np.ndarray) -> np.ndarray:
    return np.array(llama.forward(model, mx.array(tokens), mx.array(document)))


def test_config_follows_the_teacher(teacher: Path, config: DraftConfig) -> None:
    assert (config.heads, config.kv_heads, config.head_dim, config.intermediate) == (2, 1, 64, 384)
    assert (config.vocab_size, config.rope_theta, config.eos) == (VOCAB, 10_000.0, 2)
    assert DraftConfig.from_json(config.to_json()) == config
    for hidden_size in range(64, 2048, 64):
        c = DraftConfig.for_teacher(teacher, 1, hidden_size)
        assert c.heads % c.kv_heads == 0
        assert c.intermediate % 64 == 0
    parameters = sum(w.size for w in llama.named_weights(llama.create(config, 0)).values())
    assert parameters == config.parameters


@pytest.mark.parametrize(
    ("layers", "size", "message"), [(0, 64, "--layers 0"), (2, 100, "--hidden 100: must be a multiple of 64")]
)
def test_impossible_shapes_are_named(teacher: Path, layers: int, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DraftConfig.for_teacher(teacher, layers, size)


def test_too_deep_is_refused_with_figures(teacher: Path) -> None:
    deep = DraftConfig.for_teacher(teacher, 100_000, 576)
    assert estimate_memory(deep) > 16 * deep.parameters
    with pytest.raises(UserError, match=r"100000 layers x 576 .* needs about [\d,.]+ GB .* has [\d,.]+ GB"):
        check_memory(deep, 8, 512)


def test_same_seed_same_weights(config: DraftConfig) -> None:
    one, two, other = (llama.named_weights(llama.create(config, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_documents_do_not_see_each_other_and_positions_restart(config: DraftConfig) -> None:
    model = llama.create(config, 0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCAB, size=(2, 24)).astype(np.int32)
    document = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * 24], np.int32)
    before = hidden(model, tokens, document)
    changed = tokens.copy()
    changed[0, :9] = (changed[0, :9] + 1) % VOCAB
    after = hidden(model, changed, document)
    assert not np.allclose(after[0, :9], before[0, :9], atol=1e-3)
    assert np.allclose(after[0, 9:], before[0, 9:], atol=1e-6)
    # The second document has the same states as if it stood alone, so its positions begin at 0.
    alone = hidden(model, tokens[:1, 9:20], np.ones((1, 11), np.int32))
    assert np.allclose(alone[0], before[0, 9:20], atol=1e-5)
    mask, positions = llama.segment_mask(mx.array(document))
    assert positions[0].tolist() == [*range(9), *range(11), *range(4)]
    assert mask[0, 0, 12, 8].item() is False
    # Causal: a later token changes nothing before it.
    changed = tokens.copy()
    changed[1, 15] = (changed[1, 15] + 1) % VOCAB
    assert np.allclose(hidden(model, changed, document)[1, :15], before[1, :15], atol=1e-6)


def test_numpy_attention_equals_the_plain_one() -> None:
    """In value and gradient, over documents shorter and longer than a block of queries."""
    rng = np.random.default_rng(0)
    t = 2 * BLOCK + 30
    document = mx.array([[1] * 40 + [2] * (t - 50) + [0] * 10, [1] * t])
    q, k, v, given = (mx.array(rng.standard_normal((2, heads, t, 16)).astype(np.float32)) for heads in (4, 2, 2, 4))

    def run(attention: llama.Attention) -> list[np.ndarray]:
        def total(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (attention(q, k, v, document) * given).sum()

        value, gradients = mx.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
        return [np.array(x) for x in (attention(q, k, v, document), value, *gradients)]

    for ours, plain in zip(run(attention), run(llama.masked_attention), strict=True):
        assert np.allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_forward_equals_mlx_lm(config: DraftConfig) -> None:
    model = llama.create(config, 3)
    tokens = mx.array(np.random.default_rng(1).integers(VOCAB, size=(1, 20)))
    ours = llama.forward(model, tokens, mx.ones((1, 20), dtype=mx.int32)) @ llama.head_weight(model).T
    assert np.allclose(np.array(ours), np.array(model(tokens)), atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_stock_mlx_lm_loads_it(tmp_path: Path, teacher: Path, config: DraftConfig, bits: int | None) -> None:
    from mlx_lm import load

    model = llama.create(config, 0)
    out = tmp_path / "draft"
    checkpoint.save(out, model, config, teacher, provenance(), bits)
    stock, tokenizer = load(str(out))
    assert tokenizer.encode("w5 w7") == [5, 7]
    tokens = mx.array(np.random.default_rng(1).integers(VOCAB, size=(1, 20)))
    logits = np.array(stock(tokens).astype(mx.float32))
    again = checkpoint.load(out)
    assert again.config == config
    assert again.provenance["teacher"]["name"] == "synthetic"
    assert np.array_equal(np.array(again.model(tokens).astype(mx.float32)), logits)

    stock.set_dtype(mx.float32)  # bfloat16 activations would hide small differences
    model.load_weights(list(checkpoint.rounded(llama.named_weights(model), bits).items()))
    ours = llama.forward(model, tokens, mx.ones((1, 20), dtype=mx.int32)) @ llama.head_weight(model).T
    assert np.allclose(np.array(ours), np.array(stock(tokens)), atol=1e-4)


def test_save_replaces_drafts_and_nothing_else(tmp_path: Path, teacher: Path, config: DraftConfig) -> None:
    model = llama.create(config, 0)
    out = tmp_path / "draft"
    checkpoint.save(out, model, config, teacher, provenance())
    (out / "log.jsonl").write_text("kept\n")
    checkpoint.save(out, model, config, teacher, provenance() | {"note": "second"}, preserve=["log.jsonl", "none"])
    assert checkpoint.load(out).provenance["note"] == "second"
    assert (out / "log.jsonl").read_text() == "kept\n"
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").write_text("important")
    with pytest.raises(UserError, match=r"holds chapter1\.tex"):
        checkpoint.save(foreign, model, config, teacher, provenance())
    assert [p.name for p in foreign.iterdir()] == ["chapter1.tex"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["draft", "teacher", "thesis"]
    # Killed between its two renames, a replacement is undone by the next reader.
    out.rename(tmp_path / ".draft.replaced")
    assert checkpoint.load(out).provenance["note"] == "second"
    # What saves that were killed left beside it is cleared, unless whoever writes it still runs.
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number in (ended.pid, os.getppid()):
        (tmp_path / f".draft.{number}.tmp").mkdir()
    checkpoint.save(out, model, config, teacher, provenance())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [f".draft.{os.getppid()}.tmp"]


@pytest.mark.parametrize("name", [".", "..", "", "/", "../draft/."])
def test_the_current_folder_is_never_replaced(
    tmp_path: Path, teacher: Path, config: DraftConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that holds it, though it be an older draft's."""
    out = tmp_path / "draft"
    checkpoint.save(out, llama.create(config, 0), config, teacher, provenance())
    monkeypatch.chdir(out)
    with pytest.raises(UserError, match="is the current folder or holds it"):
        checkpoint.check_draft_folder(Path(name))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: not there"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bitnet"}'), "'bitnet', not 'llama'"),
        (lambda f: (f / "config.json").unlink(), "config.json: missing"),
        (lambda f: _cut(f / "model.safetensors"), "model.safetensors: differs"),
        (lambda f: (_cut(f / "model.safetensors"), (f / "draft.json").unlink()), "not a readable safetensors"),
        (lambda f: _edit(f, hidden_size=64), "config.json: differs|asks for"),
        (lambda f: (_edit(f, intermediate_size=64), (f / "draft.json").unlink()), "asks for"),
        *(
            (lambda f, files=files: _edit(f, "draft.json", files=files), r"draft\.json: is damaged \(`files`")
            for files in (None, "abc", ["x"])
        ),
        (lambda f: _edit(f, "draft.json", files={"../draft/gone": ""}), r"names a file outside its folder: '\.\./"),
    ],
)
def test_damaged_drafts_are_named(
    tmp_path: Path, teacher: Path, config: DraftConfig, damage: object, message: str
) -> None:
    out = tmp_path / "draft"
    checkpoint.save(out, llama.create(config, 0), config, teacher, provenance())
    damage(out)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        checkpoint.load(out)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _edit(folder: Path, name: str = "config.json", **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))


def test_the_teachers_embedding_is_read_without_a_copy() -> None:
    """As float32, that of a vocabulary of 128,256 takes 1.3 GB."""
    tracemalloc.start()
    embedding = llama.teacher_embedding(TEACHER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert embedding is not None and embedding.shape == (16384, 576) and embedding.dtype == np.float32
    assert peak < embedding.nbytes / 2
    weights = mx.load(str(TEACHER / "model.safetensors"))
    assert np.array_equal(embedding, np.array(weights["model.embed_tokens.weight"].astype(mx.float32)))


def test_embedding_from_the_teacher_keeps_its_geometry() -> None:
    rng = np.random.default_rng(0)
    low = rng.standard_normal((500, 12)).astype(np.float32)
    wide = low @ rng.standard_normal((12, 96)).astype(np.float32)
    for size in (64, 128):
        ours = np.array(llama.init_embedding_from(wide, size))
        assert ours.shape == (500, size)
        assert np.sqrt((ours**2).mean()) == pytest.approx(size**-0.5, rel=1e-4)
        cosine = [x @ x.T / np.outer(*[np.linalg.norm(x, axis=1)] * 2) for x in (ours, wide)]
        assert np.allclose(*cosine, atol=1e-3)  # rank 12: nothing is lost in 64 dimensions
        assert np.array_equal(ours, np.array(llama.init_embedding_from(wide, size)))
