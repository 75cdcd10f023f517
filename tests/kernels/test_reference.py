"""The reference against plain numpy in double precision: it is the definition, so it must be right."""

import mlx.core as mx
import numpy as np
import pytest

from kernels import reference
from kernels.ops import AttentionShape


def test_quantised_rows_follow_the_formula_and_round_half_to_even() -> None:
    # The largest magnitude is 127, so s is 1 and the values are rounded as they stand.
    row = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    xq, s = reference.quantize_rows(mx.array(row))
    assert s.item() == 1.0
    assert np.array(xq).tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_an_all_zero_row_stays_zero() -> None:
    xq, s = reference.quantize_rows(mx.zeros((2, 8)))
    assert not np.array(xq).any()
    np.testing.assert_allclose(np.array(s), 127 / 1e-5, rtol=1e-6)


def test_bitlinear_is_the_integer_product_times_scale_over_s() -> None:
    rng = np.random.default_rng(0)
    ternary = rng.integers(-1, 2, (12, 20)).astype(np.int8)
    scale = rng.uniform(0.1, 1, 12).astype(np.float32)
    xq = rng.integers(-127, 128, (5, 20)).astype(np.int8)
    s = rng.uniform(1, 50, 5).astype(np.float32)
    y = reference.bitlinear(mx.array(xq), mx.array(s), reference.prepare_ternary(ternary, scale))
    exact = (xq.astype(np.int64) @ ternary.T.astype(np.int64)).astype(np.float32)
    np.testing.assert_array_equal(np.array(y), exact * (scale[None] / s[:, None]))


@pytest.mark.parametrize("epilogue", ["relu2_mul", "silu_mul"])
def test_gate_halves(epilogue: reference.Epilogue) -> None:
    rng = np.random.default_rng(1)
    w, x = rng.normal(0, 1, (6, 4)), rng.normal(0, 1, (2, 4))
    dense = reference.prepare_dense(mx.array(w.astype(np.float32)))
    y = np.array(reference.linear(mx.array(x.astype(np.float32)), dense, epilogue=epilogue))
    gate, up = np.split(x @ w.T, 2, axis=1)
    gate = np.maximum(gate, 0) ** 2 if epilogue == "relu2_mul" else gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(y, gate * up, rtol=1e-4, atol=1e-6)


def numpy_attention(qkv: np.ndarray, shape: AttentionShape) -> np.ndarray:
    """Causal attention over the rows of one sequence from position 0, in double precision."""
    m, d, half = len(qkv), shape.head_dim, shape.head_dim // 2
    angle = np.arange(m)[:, None] * np.array(shape.inverse_frequency, np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotated(x: np.ndarray) -> np.ndarray:
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    q, k, v = np.split(qkv.reshape(m, -1, d).astype(np.float64), [shape.heads, shape.heads + shape.kv_heads], axis=1)
    group = shape.heads // shape.kv_heads
    q, k, v = rotated(q), np.repeat(rotated(k), group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d)
    scores[:, np.triu_indices(m, 1)[0], np.triu_indices(m, 1)[1]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v).reshape(m, -1)


def test_attention_in_steps_and_in_a_batch_is_causal_attention() -> None:
    rng = np.random.default_rng(2)
    frequency = (1e4 ** (-np.arange(0, 8, 2) / 8)).astype(np.float32)
    shape = AttentionShape(4, 2, 8, mx.array(frequency))
    qkv = rng.normal(0, 1, (7, 8 * 8)).astype(np.float32)
    expected = numpy_attention(qkv, shape)
    k_cache, v_cache = mx.zeros((2, 10, 8)), mx.zeros((2, 10, 8))
    k_batch, v_batch = mx.zeros((1, 2, 10, 8)), mx.zeros((1, 2, 10, 8))
    for start, end in [(0, 3), (3, 4), (4, 7)]:
        out, k_cache, v_cache = reference.attention(mx.array(qkv[start:end]), k_cache, v_cache, start, shape)
        np.testing.assert_allclose(np.array(out), expected[start:end], rtol=1e-4, atol=1e-5)
    for i in range(7):
        out, k_batch, v_batch = reference.attention_batch(
            mx.array(qkv[i : i + 1]), k_batch, v_batch, mx.array([i], mx.int32), shape
        )
        np.testing.assert_allclose(np.array(out), expected[i : i + 1], rtol=1e-4, atol=1e-5)
