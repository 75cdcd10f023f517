"""Attention of the Metal backend: see metal_runs for what runs it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from arrays import same_bits, stored
from attention_checks import (
    FEW,
    LONG,
    SEVERAL,
    attention_shape,
    caches,
    check_definition,
    check_rounding,
    check_rows_alone,
    qkv_rows,
)
from metal_runs import EMULATED, REAL, defined

from kernels import metal, reference
from kernels.ops import Spans

if not (REAL or EMULATED):
    pytest.skip("no Metal here, and no g++ 12 or newer on Linux to emulate it with", allow_module_level=True)

pytest_plugins = ("metal_fixtures",)
pytestmark = pytest.mark.usefixtures("launches")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "spans"),
    [(6, 2, 32, SEVERAL), (6, 2, 32, LONG), (3, 1, 64, FEW), (9, 1, 128, FEW), (4, 1, 128, Spans((2041,), (8,)))],
)
def test_attention_gives_a_row_the_same_bits_alone_and_among_others(
    heads: int, kv_heads: int, d: int, spans: Spans
) -> None:
    check_rows_alone(metal.attention, attention_shape(heads, kv_heads, d), spans)


def test_any_number_of_rows_of_a_sequence_has_the_bits_of_single_ones() -> None:
    shape, qkv = attention_shape(), qkv_rows(attention_shape(), 8)
    for offset in (0, 24, 62):
        cache, alone = caches(shape, (offset,), offset + 8), []
        for i in range(8):
            out, *cache = metal.attention(qkv[i : i + 1], *cache, Spans((offset + i,), (1,)), shape)
            alone.append(out)
        for m in range(2, 9):
            together = metal.attention(qkv[:m], *caches(shape, (offset,), offset + 40), Spans((offset,), (m,)), shape)
            assert same_bits(together[0], mx.concatenate(alone[:m])), (offset, m)


def test_few_rows_beside_a_prefill_have_the_bits_that_they_have_alone() -> None:
    shape, spans = attention_shape(), Spans((40, 3, 0, 7), (2, 12, 0, 8))
    qkv = qkv_rows(shape, spans.rows)
    out, keys, _ = metal.attention(qkv, *caches(shape, spans.offsets, 60), spans, shape)
    for sequence, rows in ((0, slice(0, 2)), (3, slice(14, 22))):
        offset, count = spans.offsets[sequence], spans.counts[sequence]
        cache = caches(shape, (offset,), 60, sequence)
        alone, k, _ = metal.attention(qkv[rows], *cache, Spans((offset,), (count,)), shape)
        assert same_bits(out[rows], alone) and same_bits(keys[sequence], k[0])
    check_definition(metal.attention, shape, spans)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (20, 5, 128), (4, 4, 96), (8, 1, 256), (3, 1, 20)])
def test_attention_is_close_to_its_definition(heads: int, kv_heads: int, d: int) -> None:
    shape = attention_shape(heads, kv_heads, d)
    check_definition(metal.attention, shape, Spans((0, 100, 9, 0, 305), (1, 4, 0, 8, 5)))


def test_keys_and_values_are_rounded() -> None:
    check_rounding(metal.attention, attention_shape())


def test_large_scores_make_no_infinities() -> None:
    """A key that wins by hundreds: its value is the output, all others weigh nothing."""
    shape, spans = attention_shape(2, 1, 32), Spans((40,), (1,))
    qkv = qkv_rows(shape, 1) * 300
    out, _, _ = metal.attention(qkv, *caches(shape, (40,), 60), spans, shape)
    expected, _, _ = defined(reference.attention, qkv, *caches(shape, (40,), 60), spans, shape)
    np.testing.assert_allclose(np.array(out), np.array(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spans", [Spans((5,), (2,)), Spans((5, 1), (1, 2))])
def test_a_cache_that_someone_else_holds_is_not_overwritten(spans: Spans) -> None:
    shape = attention_shape()
    k_cache, v_cache = caches(shape, spans.offsets, 9)
    before = stored(k_cache), stored(v_cache)
    mx.eval(*metal.attention(qkv_rows(shape, spans.rows), mx.array(k_cache), mx.array(v_cache), spans, shape))
    assert (stored(k_cache), stored(v_cache)) == before
