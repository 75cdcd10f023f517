"""The standalone draft as a model: documents kept apart, how it starts, its attention in numpy."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import TEACHER
from synthetic import VOCAB, teacher_folder

from distill.training.cpu import BLOCK, attention
from distill.training.draft_config import DraftConfig
from distill.training.drafts import layers, llama
from distill.training.tensors import Tensors


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return teacher_folder(tmp_path / "teacher")


@pytest.fixture
def config(teacher: Path) -> DraftConfig:
    return DraftConfig.for_teacher(teacher, layers=2, hidden=128)


def hidden(config: DraftConfig, weights: Tensors, tokens: np.ndarray, document: np.ndarray) -> np.ndarray:
    return np.array(llama.forward(config, weights, mx.array(tokens), mx.array(document)))


def test_same_seed_same_weights(config: DraftConfig) -> None:
    one, two, other = (llama.create(config, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_documents_do_not_see_each_other_and_positions_restart(config: DraftConfig) -> None:
    weights = llama.create(config, 0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(VOCAB, size=(2, 24)).astype(np.int32)
    document = np.array([[1] * 9 + [2] * 11 + [0] * 4, [1] * 24], np.int32)
    before = hidden(config, weights, tokens, document)
    changed = tokens.copy()
    changed[0, :9] = (changed[0, :9] + 1) % VOCAB
    after = hidden(config, weights, changed, document)
    assert not np.allclose(after[0, :9], before[0, :9], atol=1e-3)
    assert np.allclose(after[0, 9:], before[0, 9:], atol=1e-6)
    # The second document has the same states as if it stood alone, so its positions begin at 0.
    alone = hidden(config, weights, tokens[:1, 9:20], np.ones((1, 11), np.int32))
    assert np.allclose(alone[0], before[0, 9:20], atol=1e-5)
    mask, positions = layers.segment_mask(mx.array(document))
    assert positions[0].tolist() == [*range(9), *range(11), *range(4)]
    assert mask[0, 0, 12, 8].item() is False
    # Causal: a later token changes nothing before it.
    changed = tokens.copy()
    changed[1, 15] = (changed[1, 15] + 1) % VOCAB
    assert np.allclose(hidden(config, weights, changed, document)[1, :15], before[1, :15], atol=1e-6)


def test_numpy_attention_equals_the_plain_one() -> None:
    """In value and gradient, over documents shorter and longer than a block of queries."""
    rng = np.random.default_rng(0)
    t = 2 * BLOCK + 30
    document = mx.array([[1] * 40 + [2] * (t - 50) + [0] * 10, [1] * t])
    q, k, v, given = (mx.array(rng.standard_normal((2, heads, t, 16)).astype(np.float32)) for heads in (4, 2, 2, 4))

    def run(attention: layers.Attention) -> list[np.ndarray]:
        def total(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (attention(q, k, v, document) * given).sum()

        value, gradients = mx.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)
        return [np.array(x) for x in (attention(q, k, v, document), value, *gradients)]

    for ours, plain in zip(run(attention), run(layers.masked_attention), strict=True):
        assert np.allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_forward_equals_mlx_lm(config: DraftConfig) -> None:
    from mlx_lm.models.llama import Model, ModelArgs

    weights = llama.create(config, 3)
    stock = Model(ModelArgs.from_dict(config.to_json()))
    stock.load_weights(list(weights.items()))
    tokens = mx.array(np.random.default_rng(1).integers(VOCAB, size=(1, 20)))
    hidden = llama.forward(config, weights, tokens, mx.ones((1, 20), dtype=mx.int32))
    ours = hidden @ llama.head_weight(config, weights).T
    assert np.allclose(np.array(ours), np.array(stock(tokens)), atol=1e-4)


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
