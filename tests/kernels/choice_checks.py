"""What the tests of every GPU backend find out about choosing tokens: its `choose` and `top_k`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from arrays import normal, same_bits

from kernels.ops import Backend

SIZES = [1, 31, 700, 5003]  # of vocabularies
# A vocabulary, a temperature.
SOFTMAXES = [(1, 1.0), (33, 0.8), (1025, 1.0), (4100, 2.0), (40000, 0.01)]
TOPS = [(32, 32), (600, 32), (5003, 64), (3000, 128), (1100, 1)]  # a vocabulary, and how many of it


def check_greedy_choice(backend: Backend, n: int, rows: int = 6) -> None:
    """At temperature zero the lowest of the highest."""
    x = np.array(mx.round(normal(rows, n)))
    x[1], x[2], x[3, :] = 2.5, np.nan, -np.inf
    x[4, n // 2] = np.nan
    expected = [int(np.nanargmax(np.where(np.isnan(row), -np.inf, row))) for row in x]
    chosen = backend.choose(mx.array(x), mx.zeros(rows), mx.full((rows,), 0.7))
    assert chosen.dtype == mx.uint32 and chosen.tolist() == expected, n


def check_choice(backend: Backend, n: int, temperature: float) -> None:
    """The softmax is inverted, and a row's choice is its own."""
    last = np.nextafter(np.float32(1), np.float32(0))
    uniform = np.array([0, 1e-9, 0.25, 0.5, 0.999, last, last, 0.3], np.float32)
    x = np.repeat(np.array(normal(1, n, seed=n)) * 3, len(uniform), axis=0)
    x[-2], x[-1] = np.round(x[-2]), 1.5  # equals
    x[:, ::3][:, 1:] = -np.inf  # tokens without probability
    rows = mx.array(x), mx.full((len(x),), temperature), mx.array(uniform)
    chosen = np.array(backend.choose(*rows))
    p = np.exp((x - x.max(-1, keepdims=True)).astype(np.float64) / temperature)
    sums = np.cumsum(p, axis=-1) / p.sum(-1, keepdims=True)
    for i, token in enumerate(chosen.tolist()):
        assert p[i, token] > 0
        assert (sums[i, token - 1] if token else 0) - 1e-5 <= uniform[i] <= sums[i, token] + 1e-5, (n, i)
    for i in range(len(x)):
        assert backend.choose(*[part[i : i + 1] for part in rows]).tolist() == [chosen[i]]


def check_temperatures_of_rows(backend: Backend) -> None:
    x = mx.array(np.tile(np.array(normal(1, 300)), (64, 1)))
    temperature = mx.array(np.tile([0, 1.0], 32).astype(np.float32))
    uniform = mx.array(np.random.default_rng(0).random(64, np.float32))
    chosen = np.array(backend.choose(x, temperature, uniform))
    assert (chosen[::2] == np.argmax(np.array(x[0]))).all() and len(set(chosen[1::2].tolist())) > 20


def check_top(backend: Backend, n: int, k: int, rows: int = 5) -> None:
    """The highest by falling logit and then by id, log-sum-exps, and that a row's bits are its own."""
    x = np.array(normal(rows, n, seed=k))
    x[1] = np.round(x[1])  # many equals
    x[2] = 1.5  # too many
    x[3] = np.sort(x[3])[::-1]
    if n > 5000:  # what is highest belongs to one thread of 512
        x[4, ::512] += 100
    ids, values, lse = backend.top_k(mx.array(x), k, (1.0, 0.5))
    order = np.argsort(-x, axis=-1, kind="stable")[:, :k]
    assert ids.dtype == mx.uint32 and np.array_equal(np.array(ids), order)
    assert np.array_equal(np.array(values), np.take_along_axis(x, order, axis=-1))
    for t, temperature in enumerate((1.0, 0.5)):
        expected = np.log(np.exp(x.astype(np.float64) / temperature).sum(-1))
        np.testing.assert_allclose(np.array(lse)[:, t], expected, rtol=1e-6, atol=1e-5)
    alone = [backend.top_k(mx.array(x[i : i + 1]), k, (1.0, 0.5)) for i in range(rows)]
    for together, parts in zip((ids, values, lse), zip(*alone, strict=True), strict=True):
        assert same_bits(together, mx.concatenate(parts))
