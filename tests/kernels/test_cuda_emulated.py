"""The operations of the CUDA backend without a GPU: the very text of their kernels run by cuda_emulator."""

from __future__ import annotations

from typing import Any

import cuda_emulator
import mlx.core as mx
import numpy as np
import pytest
from arrays import close, normal, same_bits
from attention_checks import (
    FEW,
    SEVERAL,
    attention_shape,
    caches,
    check_definition,
    check_rounding,
    check_rows_alone,
    qkv_rows,
)
from choice_checks import (
    SIZES,
    SOFTMAXES,
    TOPS,
    check_choice,
    check_greedy_choice,
    check_temperatures_of_rows,
    check_top,
)
from cuda_runs import EMULATED, weights_of

from kernels import cuda, reference
from kernels.cuda import attend, products
from kernels.ops import Epilogue, Spans
from kernels.self_test import CHECKS, operation_faults

if not EMULATED:
    pytest.skip("no g++ 12 or newer on Linux to emulate CUDA with", allow_module_level=True)

pytest_plugins = ("cuda_fixtures",)
pytestmark = pytest.mark.usefixtures("emulated")


# Single operations


@pytest.mark.slow
def test_it_passes_the_self_test() -> None:
    assert dict(operation_faults(cuda)) == dict.fromkeys(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("k", [20, 576, 2560])
def test_quantised_rows_equal_the_reference_by_bits(k: int) -> None:
    halves = mx.array(np.resize(np.arange(-127, 128) + 0.5, k).astype(np.float32))
    rows = [normal(k), mx.zeros(k), mx.full((k,), 1e-9), normal(k, seed=1) * 1e30, halves]
    for ours, theirs in zip(cuda.quantize_rows(mx.stack(rows)), reference.quantize_rows(mx.stack(rows)), strict=True):
        assert same_bits(ours, theirs)


def test_quantised_rows_behind_a_norm_are_close_to_the_reference() -> None:
    x, norm = normal(3, 576), normal(576)
    (q, s), (q_defined, s_defined) = cuda.quantize_rows(x, norm, 1e-5), reference.quantize_rows(x, norm, 1e-5)
    np.testing.assert_allclose(np.array(s), np.array(s_defined), rtol=1e-6)
    assert np.abs(np.array(q).astype(int) - np.array(q_defined)).max() <= 1
    assert (np.array(q) != np.array(q_defined)).mean() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ternary", "int8"])
@pytest.mark.parametrize("m", [1, 3, 8, 70])
def test_products_with_whole_numbers_equal_the_reference_by_bits(kind: str, m: int) -> None:
    for n, k in ((960, 576), (24, 68), (40, 4), (144, 2560)):
        ours, theirs = weights_of(kind, n, k)
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        product, defined = (getattr(b, "bitlinear" if kind == "ternary" else "int8_linear") for b in (cuda, reference))
        assert same_bits(product(xq, s, ours), defined(xq, s, theirs)), (n, k)


@pytest.mark.parametrize("m", [3, 13])
@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_sums(m: int, value: int) -> None:
    n, k = 48, 8192
    xq, s = mx.full((m, k), value, mx.int8), mx.full((m,), 3.0)
    y = cuda.bitlinear(xq, s, cuda.prepare_ternary(np.full((n, k), -1, np.int8), np.ones(n, np.float32)))
    assert (np.array(y) == np.float32(-value * k) * (np.float32(1) / np.float32(3))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "epilogue"),
    [("ternary", "relu2_mul"), ("int8", "silu_mul"), ("bfloat16", None), ("bfloat16", "silu_mul"), ("float32", None)],
)
def test_linear_gives_a_row_the_same_bits_alone_and_among_others(kind: str, epilogue: Epilogue | None) -> None:
    n, k, m = 96, 160, 8
    ours, theirs = weights_of(kind, n, k)
    width = n if epilogue is None else n // 2
    x, norm, residual = normal(m, k), normal(k), normal(m, width, seed=3)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-5, "epilogue": epilogue}
    y = cuda.linear(x, ours, residual=residual, **options)
    alone = [cuda.linear(x[i : i + 1], ours, residual=residual[i : i + 1], **options) for i in range(m)]
    assert same_bits(y, mx.concatenate(alone))
    # Rounding to int8 may fall the other way after a norm that differs in its last bit.
    assert close(y, reference.linear(x, theirs, residual=residual, **options), 2e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n", "k", "epilogue"),
    [
        ("ternary", 960, 136, "relu2_mul"),
        ("ternary", 72, 20, None),
        ("int8", 288, 260, "silu_mul"),
        ("bfloat16", 75, 592, None),
        ("bfloat16", 84, 264, "silu_mul"),
        ("bfloat16", 40, 132, "relu2_mul"),
        ("float32", 75, 132, None),
    ],
)
def test_many_rows_have_the_bits_that_they_have_alone(
    kind: str, n: int, k: int, epilogue: Epilogue | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = weights_of(kind, n, k)
    most, width = 65, n if epilogue is None else n // 2
    x, residual = normal(most, k), normal(most, width, seed=3)
    y = mx.concatenate(
        [cuda.linear(x[i : i + 1], ours, epilogue=epilogue, residual=residual[i : i + 1]) for i in range(most)]
    )
    for large, ms in ((256, (9, 64, 65)), (0, (65,))):  # in small blocks, and in large ones
        monkeypatch.setattr(products, "_BLOCKS", large)
        products._large_block.cache_clear()
        for m in ms:
            many = cuda.linear(x[:m], ours, epilogue=epilogue, residual=residual[:m])
            assert same_bits(many, y[:m]), m
    defined = reference.linear(x, theirs, epilogue=epilogue, residual=residual)
    if kind == "ternary":
        assert same_bits(y, defined)
    assert close(y, defined, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "spans"),
    [
        (4, 2, 32, SEVERAL),
        (4, 2, 32, Spans((2042, 0, 31), (8, 1, 11))),
        (3, 1, 64, FEW),
        (5, 1, 128, Spans((30, 0, 500), (4, 9, 1))),
    ],
)
def test_attention_gives_a_row_the_same_bits_alone_and_among_others(
    heads: int, kv_heads: int, d: int, spans: Spans, emulated: cuda_emulator.Emulator
) -> None:
    emulated.seed = d
    check_rows_alone(cuda.attention, attention_shape(heads, kv_heads, d), spans)


@pytest.mark.slow
def test_attention_is_close_to_its_definition(emulated: cuda_emulator.Emulator) -> None:
    for heads, kv_heads, d in ((4, 2, 32), (5, 1, 128), (2, 1, 16)):
        check_definition(cuda.attention, attention_shape(heads, kv_heads, d), Spans((0, 101, 3, 24), (9, 2, 0, 20)))


def test_keys_and_values_are_rounded() -> None:
    check_rounding(cuda.attention, attention_shape())


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(8, 7, 1, 0, 6, 5, 3, 8, 2), (1, 1, 1, 0, 1, 1, 1, 1, 1)])
def test_each_way_to_attention_gives_the_same_bits(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, emulated: cuda_emulator.Emulator
) -> None:
    shape, offsets = attention_shape(9, 3, 64), (95, 70, 15, 9, 128, 62, 31, 26, 63)
    qkv, spans = qkv_rows(shape, sum(counts)), Spans(offsets, counts)
    found, ways = [], []
    for warps, parts in ((1 << 20, 1 << 20), (0, 1 << 20), (1 << 20, 0)):
        monkeypatch.setattr(attend, "_FOLDING_WARPS", warps)
        monkeypatch.setattr(attend, "_PARTS_BYTES", parts)
        emulated.launches.clear()
        found.append(cuda.attention(qkv, *caches(shape, offsets, 140), spans, shape)[0])
        ways.append(emulated.launches[1:])
    assert same_bits(found[1], found[0]) and same_bits(found[2], found[0])
    split, whole = ["attend_few", "combine"], ["attend_few"]
    assert ways == ([split, whole, whole] if max(counts) == 1 else [split, split, ["attend_many"]])


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(9, 3, 64), (4, 1, 128), (2, 2, 256)])
def test_a_prefill_of_many_rows_has_the_bits_of_single_rows(
    heads: tuple[int, int, int], emulated: cuda_emulator.Emulator
) -> None:
    """Rows that fill several groups, behind keys or not, beside sequences of one row and of none."""
    emulated.seed = 1
    check_rows_alone(cuda.attention, attention_shape(*heads), Spans((33, 5, 0, 0), (35, 1, 0, 66)))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(4, 2, 32), (9, 3, 64), (4, 1, 128)])
def test_packed_rows_have_the_bits_of_sequences(heads: tuple[int, int, int]) -> None:
    shape = attention_shape(*heads)
    segments = np.zeros((3, 45), np.int32)
    segments[0, :7], segments[0, 7:40], segments[1, 44:], segments[2] = 5, 6, 6, 6
    counts = (7, 33, 5, 44, 1, 45)
    qkv = qkv_rows(shape, segments.size)
    packed = cuda.attention_packed(qkv.reshape(3, 45, -1), segments, shape)
    alone = cuda.attention(qkv, *caches(shape, (0,) * 6, 64), Spans((0,) * 6, counts), shape)[0]
    assert same_bits(packed, alone.reshape(3, 45, -1))
    defined = reference.attention_packed(qkv.reshape(3, 45, -1), segments, shape)
    assert close(packed, defined, 1e-2)  # a key may be turned to the other side of the middle of two bfloat16


# Choosing tokens


@pytest.mark.parametrize("n", SIZES)
def test_the_choice_at_temperature_zero_is_the_lowest_of_the_highest(n: int) -> None:
    check_greedy_choice(cuda, n)


@pytest.mark.parametrize(("n", "temperature"), SOFTMAXES)
def test_a_choice_inverts_the_softmax(n: int, temperature: float) -> None:
    check_choice(cuda, n, temperature)


def test_rows_of_a_choice_have_their_own_temperatures() -> None:
    check_temperatures_of_rows(cuda)


@pytest.mark.parametrize(("n", "k"), TOPS)
def test_the_top_of_logits(n: int, k: int, emulated: cuda_emulator.Emulator) -> None:
    emulated.seed = n
    check_top(cuda, n, k)


def test_rows_that_do_not_fit_the_caches_are_refused() -> None:
    shape = attention_shape()
    for spans in (Spans((8, 0), (2, 1)), Spans((0,), (3,)), Spans((0, 0), (2, 2))):
        with pytest.raises(ValueError, match=r"have no room|are not"):
            cuda.attention(qkv_rows(shape, 3), *caches(shape, (0, 0), 9), spans, shape)
