"""Attention of the native CPU backend: rows' bits, its definition, and what becomes of caches."""

from __future__ import annotations

import platform

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

from kernels import reference
from kernels.ops import CACHED, Spans

if platform.system() != "Linux":
    pytest.skip("the native CPU backend is built on Linux only", allow_module_level=True)

from kernels import cpu

pytest_plugins = ("cpu_fixtures",)


@pytest.mark.parametrize(("d", "spans"), [(32, SEVERAL), (32, LONG), (64, FEW), (128, LONG)])
def test_attention_gives_a_row_the_same_bits_alone_and_among_others(
    isa: str, threads: int, d: int, spans: Spans
) -> None:
    check_rows_alone(cpu.attention, attention_shape(d=d), spans)


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 2043])
def test_any_number_of_rows_of_a_sequence_has_the_bits_of_single_ones(isa: str, threads: int, keys: int) -> None:
    shape = attention_shape()
    qkv, offset = qkv_rows(shape, 8), keys - 1
    alone, k_cache, v_cache = [], *caches(shape, (offset,), offset + 8)
    for i in range(8):
        out, k_cache, v_cache = cpu.attention(qkv[i : i + 1], k_cache, v_cache, Spans((offset + i,), (1,)), shape)
        alone.append(out)
    for m in range(1, 9):
        together = cpu.attention(qkv[:m], *caches(shape, (offset,), offset + 40), Spans((offset,), (m,)), shape)
        assert same_bits(together[0], mx.concatenate(alone[:m])), m


def test_many_rows_of_several_sequences_have_the_bits_of_each_sequence_alone(isa: str, threads: int) -> None:
    """A prefill of a batch, and what the others do meanwhile."""
    shape = attention_shape(9, 3, 64)
    spans = Spans((0, 70, 5, 300), (90, 1, 0, 33))
    qkv = qkv_rows(shape, spans.rows)
    together = cpu.attention(qkv, *caches(shape, spans.offsets, 400), spans, shape)[0]
    alone, first = [], 0
    for sequence, (offset, count) in enumerate(zip(spans.offsets, spans.counts, strict=True)):
        rows, first = qkv[first : first + count], first + count
        cache = caches(shape, (offset,), 400, sequence)
        alone.append(cpu.attention(rows, *cache, Spans((offset,), (count,)), shape)[0])
    assert same_bits(together, mx.concatenate(alone))


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (20, 5, 128), (3, 1, 20), (4, 4, 2)])
def test_attention_is_close_to_its_definition(isa: str, heads: int, kv_heads: int, d: int) -> None:
    spans = Spans((0, 1990, 3, 100, 7, 0), (1, 5, 40, 4, 0, 8))
    check_definition(cpu.attention, attention_shape(heads, kv_heads, d), spans)


def test_keys_and_values_are_rounded() -> None:
    check_rounding(cpu.attention, attention_shape())
    check_rounding(reference.attention, attention_shape())


def test_large_scores_make_no_infinities(isa: str) -> None:
    """A key that wins by hundreds: its value is the output, all others weigh nothing."""
    shape, spans = attention_shape(2, 1, 16), Spans((40,), (1,))
    qkv = qkv_rows(shape, 1) * 300
    out, _, _ = cpu.attention(qkv, *caches(shape, (40,), 60), spans, shape)
    expected, _, _ = reference.attention(qkv, *caches(shape, (40,), 60), spans, shape)
    np.testing.assert_allclose(np.array(out), np.array(expected), rtol=1e-4, atol=1e-4)


def test_a_cache_that_someone_else_holds_is_not_overwritten() -> None:
    shape = attention_shape()
    k_cache, v_cache = caches(shape, (5, 3), 9)
    before = stored(k_cache), stored(v_cache)
    spans, qkv = Spans((5, 3), (2, 1)), qkv_rows(shape, 3)
    mx.eval(*cpu.attention(qkv, k_cache, v_cache, spans, shape))
    mx.eval(*cpu.attention(qkv, k_cache[:, :, :8], v_cache[:, :, :8], spans, shape))
    assert (stored(k_cache), stored(v_cache)) == before


def test_a_cache_of_our_own_is_updated_in_place() -> None:
    """Twenty steps over a large cache must not copy it: no second one is ever allocated."""
    shape = attention_shape(4, 4, 128)
    k_cache, v_cache = mx.zeros((2, 4, 4096, 128), CACHED), mx.zeros((2, 4, 4096, 128), CACHED)
    qkv = qkv_rows(shape, 2)
    mx.eval(k_cache, v_cache, qkv)
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    for step in range(20):
        out, k_cache, v_cache = cpu.attention(qkv, k_cache, v_cache, Spans((step, 2 * step), (1, 1)), shape)
        mx.eval(out, k_cache, v_cache)
    assert mx.get_peak_memory() - base < k_cache.nbytes / 2


@pytest.mark.parametrize(
    ("offsets", "counts", "complaint"),
    [
        ((8, 0), (2, 1), "fit the cache"),
        ((0, 2**31 - 2), (2, 1), "fit the cache"),
        ((0, 0), (2, 2), "as many rows"),
        ((0,), (3,), "every sequence"),
    ],
)
def test_rows_that_do_not_fit_the_caches_are_refused(
    offsets: tuple[int, ...], counts: tuple[int, ...], complaint: str
) -> None:
    shape = attention_shape()
    with pytest.raises(ValueError, match=complaint):
        cpu.attention(qkv_rows(shape, 3), *caches(shape, (0, 0), 9), Spans(offsets, counts), shape)
