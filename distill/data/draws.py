"""Ids drawn from a teacher's distribution: what a dataset of `--sampled N` holds in place of the top logits.

How often an id is drawn, over N, estimates its probability without bias, and the mean of anything over the draws its
mean over the vocabulary: "Random Sampling Knowledge Distillation" (Anshumann et al., 2025, arXiv:2503.16870). Here the
draws are stratified: draw j inverts the cumulative sums of the probabilities at a random point of [j/N, (j+1)/N). Each
id is expected as often as with independent draws, and no such mean has a larger variance, most have a far smaller one.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np


def uniforms(seed: int, row: int, seq_len: int, draws: int) -> np.ndarray:
    """The random numbers of a row, float32 [seq_len, draws] in [0, 1): a function of the seed, the row's number in its
    dataset and the position alone, whatever is scored with it, on which device and by whom."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, row))))
    return generator.random((seq_len, draws), np.float32)


def draw(logits: mx.array, lse: mx.array, uniform: mx.array) -> mx.array:
    """Stratified draws from softmax(logits), each row's by rising id.

    logits: float32 [m, n]; lse: float32 [m, 1], their log-sum-exp; uniform: float32 [m, draws] in [0, 1). Returns int32
    [m, draws]. One pass over the vocabulary, whatever the number of draws: it sums blocks of probabilities; a draw then
    looks for its block, and in there for its id. Exact but for the rounding of float32 sums.
    """
    m, n = logits.shape
    draws = uniform.shape[1]
    size = 1 << ((n - 1).bit_length() // 2)  # about as many blocks as ids in a block
    blocks = -(-n // size)
    p = mx.pad(mx.exp(logits - lse), [(0, 0), (0, blocks * size - n)]).reshape(m, blocks, size)
    ends = mx.cumsum(p.sum(axis=-1), axis=-1)
    point = (mx.arange(draws) + uniform) / draws * ends[:, -1:]
    block = _place(ends[:, None], point)
    before = mx.where(block > 0, mx.take_along_axis(ends, mx.maximum(block - 1, 0), axis=-1), 0.0)
    inside = p.reshape(m * blocks, size)[mx.arange(m)[:, None] * blocks + block]
    return block * size + _place(mx.cumsum(inside, axis=-1), point - before)


def _place(sums: mx.array, point: mx.array) -> mx.array:
    """The first place whose sum exceeds the point, or, where rounding leaves none, the last with any probability.

    sums: float32 [m, draws or 1, n], rising; point: float32 [m, draws]. Returns int32 [m, draws].
    """
    return ((sums <= point[..., None]) & (sums < sums[..., -1:])).sum(axis=-1).astype(mx.int32)


def draw_on_host(logits: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """The definition of `draw`: cumulative sums, in float64, inverted at each point. Also the fast way on a CPU, where
    MLX takes exp element by element. float32 [m, n], [m, draws] -> int32 [m, draws]."""
    m, draws = uniform.shape
    shares = (np.arange(draws) + uniform.astype(np.float64)) / draws
    drawn, p, sums = np.empty((m, draws), np.int32), np.empty(logits.shape[1], np.float32), np.empty(logits.shape[1])
    for i, line in enumerate(logits):  # one after the other, so that all stays in the cache
        np.exp(np.subtract(line, line.max(), out=p), out=p)
        np.cumsum(p, out=sums)
        drawn[i] = np.searchsorted(sums, shares[i] * sums[-1], side="right")
    return drawn


def tally(first: np.ndarray, drawn: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often each id was drawn: ids and counts, int32 and uint8 [m, draws + 1].

    first: int32 [m], the teacher's first choices, which stand first whether they were drawn or not; the other ids
    follow by rising id, then -1 with count 0. drawn: int32 [m, draws], each row rising. trained: bool [m]; elsewhere
    nothing is kept.
    """
    m, draws = drawn.shape
    others = drawn != first[:, None]
    begins = others.copy()
    begins[:, 1:] &= drawn[:, 1:] != drawn[:, :-1]
    place = np.where(others, np.cumsum(begins, axis=1), 0)
    line = np.arange(m)[:, None]
    ids = np.full((m, draws + 1), -1, np.int32)
    ids[line, place] = drawn
    ids[:, 0] = first
    counts = np.bincount((line * (draws + 1) + place).ravel(), minlength=ids.size).astype(np.uint8).reshape(ids.shape)
    ids[~trained], counts[~trained] = -1, 0
    return ids, counts
