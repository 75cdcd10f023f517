"""The reference against plain numpy in double precision: it is the definition, so it must be right."""

import mlx.core as mx
import numpy as np
import pytest
from attention_checks import FEW, LONG, SEVERAL, attention_shape, check_definition, check_rows_alone

from kernels import reference
from kernels.ops import Epilogue, Spans


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
def test_gate_halves(epilogue: Epilogue) -> None:
    rng = np.random.default_rng(1)
    w, x = rng.normal(0, 1, (6, 4)), rng.normal(0, 1, (2, 4))
    dense = reference.prepare_dense(mx.array(w.astype(np.float32)))
    y = np.array(reference.linear(mx.array(x.astype(np.float32)), dense, epilogue=epilogue))
    gate, up = np.split(x @ w.T, 2, axis=1)
    gate = np.maximum(gate, 0) ** 2 if epilogue == "relu2_mul" else gate / (1 + np.exp(-gate))
    np.testing.assert_allclose(y, gate * up, rtol=1e-4, atol=1e-6)


def test_attention_is_what_it_is_defined_as() -> None:
    spans = Spans((0, 990, 3, 40, 7), (8, 5, 20, 1, 0))
    check_definition(reference.attention, attention_shape(4, 2, 8), spans, tolerance=1e-5)
    check_definition(reference.attention, attention_shape(9, 3, 64), Spans((30,), (4,)), tolerance=1e-5)


@pytest.mark.parametrize(("d", "spans"), [(32, SEVERAL), (64, FEW), (128, LONG)])
def test_attention_gives_a_row_the_same_bits_alone_and_among_others(d: int, spans: Spans) -> None:
    check_rows_alone(reference.attention, attention_shape(d=d), spans)


def test_spans_know_their_rows() -> None:
    spans = Spans((5, 0, 90, 2), (2, 0, 11, 1))
    assert (spans.rows, spans.longest, spans.end) == (14, 11, 101)
    assert spans.positions.tolist() == [5, 6, *range(90, 101), 2]
    assert spans.sequences.tolist() == [0, 0, *[2] * 11, 3]
    assert spans.groups.tolist() == [[0, 0, 2, 5], [2, 2, 8, 90], [2, 10, 3, 98], [3, 13, 1, 2]]
    for offsets, counts in (((1, 2), (1,)), ((-1,), (1,)), ((0,), (-1,))):
        with pytest.raises(ValueError, match="no spans"):
            Spans(offsets, counts)


def test_the_top_by_sorting() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (5, 200)).astype(np.float32)
    logits[0, [7, 90, 150]] = 11.0
    ids, top, lse = reference.top_k(mx.array(logits), 8, (1.0, 0.5))
    expected = np.lexsort((np.broadcast_to(np.arange(200), logits.shape), -logits), axis=-1)[:, :8]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_array_equal(top, np.take_along_axis(logits, expected, -1))
    np.testing.assert_allclose(np.array(lse)[:, 0], np.log(np.exp(logits.astype(np.float64)).sum(-1)), rtol=1e-6)
    np.testing.assert_allclose(np.array(lse)[:, 1], np.log(np.exp(2 * logits.astype(np.float64)).sum(-1)), rtol=1e-6)


def test_choosing_inverts_the_distribution() -> None:
    logits = mx.log(mx.array([[0.1, 0.6, 0.3]] * 5))
    temperature = mx.array(np.array([0, 1, 1, 1, 1], np.float32))
    uniform = mx.array(np.array([0.99, 0.05, 0.15, 0.71, 1.0], np.float32))
    assert reference.choose(logits, temperature, uniform).tolist() == [1, 0, 1, 2, 2]
