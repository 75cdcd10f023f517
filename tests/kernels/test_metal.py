"""The products of the Metal backend, and a whole model: see metal_runs for what runs them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import metal_emulator
import mlx.core as mx
import numpy as np
import pytest
from arrays import normal, random_ternary, same_bits
from choice_checks import (
    SIZES,
    SOFTMAXES,
    TOPS,
    check_choice,
    check_greedy_choice,
    check_temperatures_of_rows,
    check_top,
)
from metal_runs import EMULATED, REAL, defined, weights_of

from kernels import metal, reference
from kernels.ops import Epilogue, Int8Weight
from kernels.self_test import CHECKS, operation_faults

if not (REAL or EMULATED):
    pytest.skip("no Metal here, and no g++ 12 or newer on Linux to emulate it with", allow_module_level=True)

pytest_plugins = ("metal_fixtures",)
pytestmark = pytest.mark.usefixtures("launches")

# Of the embedded teacher: fused QKV, output, fused gate and up, down.
TEACHER_SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
BITNET_2B_SHAPES = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]
ODD_SHAPES = [(24, 68), (2, 1), (12, 20), (33, 70), (66, 15), (40, 1056)]
LARGE_ROWS = [9, 17, 33, 64]


def extreme_rows(k: int) -> mx.array:
    rng = np.random.default_rng(k)
    rows = rng.normal(0, 1, (8, k)).astype(np.float32)
    rows[0] = 0
    rows[1, k // 2] = 1e30  # all others round to zero
    rows[2] = np.arange(k) % 254 - 126.5  # halves: s is one
    rows[2, 0] = 127
    rows[3] = np.where(np.arange(k) % 2, 127, -127)
    rows[4] = 1e-7  # below the smallest divisor
    rows[5] *= 1e-30
    rows[6] *= 1e25
    rows[7, k - 1] = -1e4  # the largest magnitude is negative, and last
    return mx.array(rows)


@pytest.mark.slow
def test_it_passes_the_self_test() -> None:
    assert dict(operation_faults(metal)) == dict.fromkeys(CHECKS)


# Rows to int8


@pytest.mark.parametrize("k", [1, 15, 20, 576, 1536, 6912])
def test_quantised_rows_equal_the_reference_by_bits(k: int) -> None:
    for x in (extreme_rows(k), normal(20, k), normal(k, 3).T):  # the last is strided
        ours, theirs = metal.quantize_rows(x), defined(reference.quantize_rows, x)
        assert same_bits(ours[0], theirs[0])
        assert same_bits(ours[1], theirs[1])


def test_quantised_rows_behind_a_norm_are_close_to_the_reference() -> None:
    x, norm = normal(8, 576), normal(576)
    q, s = metal.quantize_rows(x, norm, 1e-5)
    q_defined, s_defined = defined(reference.quantize_rows, x, norm, 1e-5)
    np.testing.assert_allclose(np.array(s), np.array(s_defined), rtol=1e-6)
    assert np.abs(np.array(q).astype(int) - np.array(q_defined)).max() <= 1
    assert (np.array(q) != np.array(q_defined)).mean() < 1e-3
    assert same_bits(metal.quantize_rows(x[3:4], norm, 1e-5)[0], q[3:4])


@pytest.mark.slow
@pytest.mark.skipif(REAL, reason="about the emulator")
@pytest.mark.parametrize("error", [-1, 1])
def test_quotients_are_right_even_if_those_of_the_gpu_are_an_ulp_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: int
) -> None:
    coarse = metal_emulator.Emulator(tmp_path, f"-DEMULATED_DIVISION_ERROR={error}")
    monkeypatch.setattr(metal, "launch", coarse.launch)
    ours, theirs = weights_of("ternary", 576, 68)
    for x in (extreme_rows(68), normal(500, 68)):
        q, s = reference.quantize_rows(x)
        assert same_bits(metal.quantize_rows(x)[1], s)
        assert same_bits(metal.bitlinear(q, s, ours), reference.bitlinear(q, s, theirs))


# Products with whole numbers


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), TEACHER_SHAPES + ODD_SHAPES)
def test_bitlinear_equals_the_reference_by_bits(n: int, k: int) -> None:
    ours, theirs = weights_of("ternary", n, k)
    assert (ours.n, ours.k) == (n, k)
    for m in [*range(1, 9), *LARGE_ROWS]:
        xq, s = defined(reference.quantize_rows, normal(m, k, seed=m))
        assert same_bits(metal.bitlinear(xq, s, ours), defined(reference.bitlinear, xq, s, theirs)), m


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), BITNET_2B_SHAPES)
def test_bitlinear_of_bitnet_2b_equals_the_reference_by_bits(n: int, k: int) -> None:
    ours, theirs = weights_of("ternary", n, k)
    for m in (1, 4, 8):
        x = normal(m, k)
        assert same_bits(metal.linear(x, ours), defined(reference.linear, x, theirs)), m


@pytest.mark.slow
def test_many_rows_of_bitnet_2b_equal_the_reference_by_bits() -> None:
    ours, theirs = weights_of("ternary", 640, 6912)
    x = normal(40, 6912)
    assert same_bits(metal.linear(x, ours), defined(reference.linear, x, theirs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ternary", "int8"])
@pytest.mark.parametrize("m", [1, 3, 8, 13])
def test_the_largest_sums_are_exact(kind: str, m: int) -> None:
    n, k = 16, 40_000  # more than a lane may sum up in float
    rng = np.random.default_rng(m)
    rows = rng.choice(np.array([-128, -127, 127], np.int8), (m, k))
    rows[0] = 127
    rows[-1] = rows[-1] if m == 1 else -128
    largest = 1 if kind == "ternary" else 127
    data = rng.choice(np.array([-largest, 0, largest], np.int8), (n, k))
    data[0], data[1] = largest, -largest
    s = rng.uniform(0.5, 2, m).astype(np.float32)
    scale = np.ones(n, np.float32)
    exact = rows.astype(np.int64) @ data.astype(np.int64).T
    expected = exact.astype(np.float32) * (scale / s[:, None])
    if kind == "ternary":
        y = metal.bitlinear(mx.array(rows), mx.array(s), metal.prepare_ternary(data, scale))
    else:
        y = metal.int8_linear(mx.array(rows), mx.array(s), metal.prepare_int8(mx.array(data).astype(mx.float32)))
    assert same_bits(y, mx.array(expected))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [*ODD_SHAPES, (576, 1536), (2048, 2560)])
def test_int8_products_equal_the_reference_by_bits(n: int, k: int) -> None:
    ours, theirs = weights_of("int8", n, k)
    assert same_bits(ours.scale, theirs.scale)
    for m in (1, 2, 5, 8, 9, 19):
        xq, s = defined(reference.quantize_rows, normal(m, k, seed=m))
        assert same_bits(metal.int8_linear(xq, s, ours), defined(reference.int8_linear, xq, s, theirs)), m


def test_rounding_part_by_part_gives_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    data = normal(100, 70).astype(mx.bfloat16)
    whole = metal.prepare_int8(data)
    monkeypatch.setattr(metal, "ROUNDED_AT_ONCE", 33)
    parts = metal.prepare_int8(data)
    assert same_bits(whole.data, parts.data) and same_bits(whole.scale, parts.scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ternary", "int8"])
def test_epilogues_equal_the_reference_by_bits(kind: str) -> None:
    n, k = 72, 100
    ours, theirs = weights_of(kind, n, k)
    for x in (extreme_rows(k)[:6], normal(3, k), normal(40, k)):
        m = x.shape[0]
        cases: list[dict[str, Any]] = [
            {"residual": normal(m, n)},
            {"epilogue": "relu2_mul"},
            {"epilogue": "relu2_mul", "residual": normal(m, n // 2)},
        ]
        for options in cases:
            assert same_bits(metal.linear(x, ours, **options), defined(reference.linear, x, theirs, **options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ternary", "int8"])
def test_gate_and_up_of_bitnet_2b_equal_the_reference_by_bits(kind: str) -> None:
    n, k = 72, 2560  # of 13824 outputs
    ours, theirs = weights_of(kind, n, k)
    x, residual = normal(40, k), normal(40, n // 2)
    for m in (1, 2, 4, 8, 40):
        options: dict[str, Any] = {"epilogue": "relu2_mul", "residual": residual[:m]}
        assert same_bits(metal.linear(x[:m], ours, **options), defined(reference.linear, x[:m], theirs, **options)), m


# The fused linear, whatever the weights are


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", [None, "relu2_mul", "silu_mul"])
@pytest.mark.parametrize("kind", ["ternary", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize(("n", "k"), [(160, 576), (40, 2560), (36, 70), (2, 1)])
def test_linear_gives_a_row_the_same_bits_alone_and_among_others(
    kind: str, n: int, k: int, epilogue: Epilogue | None
) -> None:
    ours, theirs = weights_of(kind, n, k)
    x, norm = normal(20, k), normal(k)
    residual = normal(20, n if epilogue is None else n // 2, seed=5)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-5, "epilogue": epilogue}
    alone = [metal.linear(x[i : i + 1], ours, residual=residual[i : i + 1], **options) for i in range(20)]
    for m in (*range(2, 9), 11, 20):
        together = metal.linear(x[20 - m :], ours, residual=residual[20 - m :], **options)
        assert same_bits(together, mx.concatenate(alone[20 - m :])), m
    y, expected = np.concatenate(alone), np.array(defined(reference.linear, x, theirs, residual=residual, **options))
    # Rounding to int8 may fall the other way after a norm that differs in its last bit.
    limit = 0.02 if kind in ("ternary", "int8") else 1e-5
    assert np.abs(y - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_float_products_are_close_to_the_reference(dtype: mx.Dtype) -> None:
    data, x = normal(400, 2560).astype(dtype), normal(11, 2560)
    for m in (1, 5, 11):
        y = np.array(metal.linear(x[:m], metal.prepare_dense(data)))
        expected = np.array(x[:m]).astype(np.float64) @ np.array(data.astype(mx.float32)).T.astype(np.float64)
        assert np.abs(y - expected).max() <= 3e-6 * np.abs(expected).max()


def test_a_norm_gives_a_row_the_same_bits_alone_and_among_others() -> None:
    x, norm = normal(8, 100), normal(100)
    y = metal.rms_norm(x, norm, 1e-5)
    assert same_bits(y, mx.concatenate([metal.rms_norm(x[i : i + 1], norm, 1e-5) for i in range(8)]))
    np.testing.assert_allclose(np.array(y), np.array(reference.rms_norm(x, norm, 1e-5)), rtol=1e-6)


def test_inputs_may_be_slices_transposes_and_broadcasts() -> None:
    wide = normal(4, 200)
    for kind in ("ternary", "int8", "bfloat16"):
        weight, _ = weights_of(kind, 48, 64)
        for x in (wide[:, 40:104], wide[:, :128:2], normal(64, 4).T, mx.broadcast_to(wide[:1, :64], (4, 64))):
            residual = normal(48, 4).T
            copied = metal.linear(mx.array(np.array(x)), weight, residual=mx.array(np.array(residual)))
            assert same_bits(metal.linear(x, weight, residual=residual), copied)


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight, _ = weights_of("ternary", 33, 64)
    with pytest.raises(ValueError, match="weight's k"):
        metal.linear(normal(1, 63), weight)
    with pytest.raises(ValueError, match="weight's k"):
        metal.bitlinear(mx.zeros((1, 65), mx.int8), mx.ones((1,)), weight)
    with pytest.raises(ValueError, match="residual"):
        metal.linear(normal(1, 64), weight, residual=normal(1, 31))
    with pytest.raises(ValueError, match="even"):
        metal.linear(normal(1, 64), weight, epilogue="silu_mul")


def test_few_launches_make_a_product(launches: list[str]) -> None:
    ternary, _ = weights_of("ternary", 64, 64)
    dense, _ = weights_of("bfloat16", 64, 64)
    options: dict[str, Any] = {"norm": normal(64), "eps": 1e-5, "epilogue": "silu_mul", "residual": normal(4, 32)}
    metal.linear(normal(4, 64), ternary, **options)
    metal.linear(normal(4, 64), dense, **options)
    assert launches == ["quantize_rows", "product_small", "rms_norm", "dense_small"]


@pytest.mark.slow
@pytest.mark.parametrize("outputs", metal.TUNABLE["outputs"])
@pytest.mark.parametrize("simdgroups", metal.TUNABLE["simdgroups"])
def test_no_tuning_changes_bits(monkeypatch: pytest.MonkeyPatch, outputs: int, simdgroups: int) -> None:
    monkeypatch.setattr(metal, "_tuning", {})
    metal.set_tuning({"outputs": outputs, "simdgroups": simdgroups})
    cases: list[dict[str, Any]] = [{}, {"epilogue": "relu2_mul"}]
    for kind, m in (("ternary", 4), ("ternary", 8), ("int8", 3)):
        ours, theirs = weights_of(kind, 36, 70)
        x = normal(m, 70)
        for options in cases:
            assert same_bits(metal.linear(x, ours, **options), defined(reference.linear, x, theirs, **options))


def test_layouts_hold_what_they_are_said_to() -> None:
    """Bits 2i..2i+1 of a word are a ternary weight plus one, bytes of a word an int8 weight plus 128."""
    ternary, scale = random_ternary(9, 20)
    words = np.array(metal.prepare_ternary(ternary, scale).data)
    assert words.shape == (9, 2)
    codes = words[:, :, None] >> (2 * np.arange(16, dtype=np.uint32)) & 3
    assert (codes.reshape(9, 32)[:, :20].astype(int) - 1 == ternary).all()
    data = normal(9, 20)
    ours, theirs = metal.prepare_int8(data), reference.prepare_int8(data)
    assert isinstance(ours, Int8Weight)
    assert (np.array(ours.data).view(np.uint8)[:, :20].astype(int) - 128 == np.array(theirs.data)).all()


# Choosing tokens


@pytest.mark.parametrize("n", SIZES)
def test_the_choice_at_temperature_zero_is_the_lowest_of_the_highest(n: int) -> None:
    check_greedy_choice(metal, n)


@pytest.mark.parametrize(("n", "temperature"), SOFTMAXES)
def test_a_choice_inverts_the_softmax(n: int, temperature: float) -> None:
    check_choice(metal, n, temperature)


def test_rows_of_a_choice_have_their_own_temperatures() -> None:
    check_temperatures_of_rows(metal)


@pytest.mark.parametrize(("n", "k"), TOPS)
def test_the_top_of_logits(n: int, k: int) -> None:
    check_top(metal, n, k)


# A whole model


@pytest.mark.slow
def test_a_model_predicts_what_it_does_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded teacher's first layers: the same top-1 at every position, and the same bits whether tokens come one
    by one or in groups."""
    from decode.models import transformer as decode_model
    from decode.models.checkpoint import find_teacher

    tokens = np.random.default_rng(0).integers(3, 16000, 12).tolist()
    logits = {}
    for name, ops, groups in (("ours", metal, (12,)), ("split", metal, (3, 1, 5)), ("theirs", reference, (12,))):
        monkeypatch.setattr(decode_model, "backend", lambda ops=ops: ops)
        model = find_teacher(None).load()
        model.layers = model.layers[:4]
        cache = model.new_cache()
        starts = np.cumsum((0, *groups)).tolist()
        parts = [model.step(tokens[a:b], cache).logits for a, b in itertools.pairwise(starts)]
        logits[name] = np.array(mx.concatenate(parts))
    assert logits["ours"][:9].tobytes() == logits["split"].tobytes()
    assert (logits["ours"].argmax(axis=1) == logits["theirs"].argmax(axis=1)).mean() >= 11 / 12
