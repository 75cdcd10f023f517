"""The two expensive parts of a training step for CPUs, in numpy.

MLX's CPU backend takes exp and softmax element by element; numpy's are vectorised, and in-place operations keep a chunk
in cache. Products are the CPU backend's, or numpy's where that was not built. Both parts are differentiable by MLX
through explicit gradients, and tested equal to the plain ones: the head to `losses.FusedHead`, attention to
`drafts.layers.masked_attention`. Neither works under mx.compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from distill.training.drafts.layers import OwnKeys
from distill.training.losses import FusedHead
from kernels.backends import numpy_matmul as matmul

BLOCK = 128  # queries at a time: keys behind a block are never touched


def _view(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), copy=False)


class CpuHead(FusedHead):
    """`FusedHead`, its chunks computed in place in numpy."""

    def _run(
        self, hidden: mx.array, weight: mx.array, rows: mx.array, p: mx.array, weights: mx.array, gradient: bool
    ) -> tuple[mx.array, ...]:
        mx.eval(hidden, weight, rows, p, weights)
        x, w, ids, w8 = _view(hidden), _view(weight), np.array(rows), _view(weights)
        n, chunk = len(x), max(64, self.chunk_bytes // (4 * len(w)))
        share = w8 / max(float(w8.sum()), 1.0)
        value, stats = 0.0, np.zeros(3, np.float32)
        d_x, buffer = np.empty_like(x), np.empty((min(chunk, n), len(w)), np.float32)
        d_w, product = (np.zeros_like(w), np.empty_like(w)) if gradient and not self.frozen else (None, None)
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            z = buffer[: part.stop - start]
            matmul(x[part], w.T, z)
            if self.temperature != 1.0:
                z /= np.float32(self.temperature)
            valid = ids[part] >= 0
            line, column = np.nonzero(valid)
            at = ids[part][line, column]
            first = z.argmax(axis=1)
            z_s = np.full(valid.shape, -np.inf, np.float32)
            z_s[line, column] = z[line, at]
            z[line, at] = -np.inf
            top = z.max(axis=1, keepdims=True)
            top[np.isneginf(top)] = 0.0
            z -= top
            np.exp(z, out=z)
            total = z.sum(axis=1, keepdims=True)
            with np.errstate(divide="ignore"):
                z_tail = top + np.log(total)
            loss, overlap, d = self._buckets(
                mx.array(np.concatenate([z_s, z_tail], axis=1)), p[part], mx.array(share[part]), gradient
            )
            value += float(loss)
            used = w8[part] > 0
            agree = (first == ids[part][:, 0]) & used
            stats += np.array([agree.sum(), (_view(overlap) * used).sum(), used.sum()], np.float32)
            if d is None:
                continue
            slope = _view(d)
            z *= np.divide(slope[:, -1:], total, out=np.zeros_like(total), where=total > 0)
            z[line, at] = slope[line, column]
            matmul(z, w, d_x[part])
            if d_w is not None and product is not None:
                matmul(z.T, x[part], product)
                d_w += product
        outputs = (mx.array(value), mx.array(stats), *([mx.array(d_x)] if gradient else []))
        return outputs if d_w is None else (*outputs, mx.array(d_w))


def _segments(document: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(row, begin, end) of each document; document: integer [b, t]."""
    for row, line in enumerate(document):
        borders = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        for begin, end in pairwise(borders):
            yield row, begin, end


def attention(q: mx.array, k: mx.array, v: mx.array, document: mx.array, own: OwnKeys | None = None) -> mx.array:
    """Causal attention within documents, as `layers.masked_attention` defines it.

    q: float32 [b, heads, t, d]; k, v: float32 [b, kv_heads, t, d]; document: integer [b, t]; own: s keys and values
    that a position sees besides. Returns float32 [b, heads, t, d]. With P = softmax(q k^T / sqrt(d)) and O = P v the
    gradient is dv = P^T dO, dS = P (dP - rowsum(dP P)) for dP = dO v^T, dq = dS k / sqrt(d), dk = dS^T q / sqrt(d);
    a position's own keys are more columns of P.
    """
    segments = list(_segments(np.array(document)))
    scale = np.float32(q.shape[-1] ** -0.5)

    def blocks(group: int, kv_heads: int) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...], np.ndarray]]:
        """Indices of a block of queries (all heads of a group), of its keys, and what is masked."""
        for row, begin, end in segments:
            for start in range(begin, end, BLOCK):
                stop = min(start + BLOCK, end)
                later = np.arange(begin, stop)[None] > np.arange(start, stop)[:, None]
                later = np.tile(later, (group, 1))
                for head in range(kv_heads):
                    heads = slice(head * group, (head + 1) * group)
                    yield (row, heads, slice(start, stop)), (row, head, slice(begin, stop)), later

    def probabilities(q: np.ndarray, k: np.ndarray, later: np.ndarray, own_keys: np.ndarray) -> np.ndarray:
        """Of queries [group, n, d] over keys [m, d], and over [n, s, d] of their own: [group * n, m + s]."""
        group, n, d = q.shape
        s = np.empty((group * n, len(k) + own_keys.shape[1]), np.float32)
        s[:, : len(k)] = matmul(q.reshape(-1, d), k.T)
        s[:, : len(k)][later] = -np.inf
        s[:, len(k) :] = np.einsum("gnd,nsd->gns", q, own_keys).reshape(group * n, -1)
        s *= scale
        s -= s.max(axis=1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=1, keepdims=True)
        return s

    def compute(*inputs: mx.array) -> mx.array:
        mx.eval(*inputs)
        qs, ks, vs, own_ks, own_vs = map(_view, inputs)
        out = np.empty(qs.shape, np.float32)
        for at, keys, later in blocks(qs.shape[1] // ks.shape[1], ks.shape[1]):
            queries, mine = qs[at], (*keys[:2], at[2])
            p = probabilities(queries, ks[keys], later, own_ks[mine])
            seen = len(vs[keys])
            attended = matmul(p[:, :seen], vs[keys]).reshape(queries.shape)
            if own_vs.shape[3]:
                attended += np.einsum("gns,nsd->gnd", p[:, seen:].reshape(*queries.shape[:2], -1), own_vs[mine])
            out[at] = attended
        return mx.array(out)

    def vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        mx.eval(*primals, cotangent)
        qs, ks, vs, own_ks, own_vs = map(_view, primals)
        d_out = _view(cotangent)
        d_q, d_k, d_v, d_own_k, d_own_v = (np.zeros(x.shape, np.float32) for x in primals)
        d = qs.shape[-1]
        for at, keys, later in blocks(qs.shape[1] // ks.shape[1], ks.shape[1]):
            mine = (*keys[:2], at[2])
            queries, given = qs[at], d_out[at]
            flat_queries, flat_given = queries.reshape(-1, d), given.reshape(-1, d)
            p = probabilities(queries, ks[keys], later, own_ks[mine])
            seen = len(vs[keys])
            d_s = np.empty_like(p)
            d_s[:, :seen] = matmul(flat_given, vs[keys].T)
            d_s[:, seen:] = np.einsum("gnd,nsd->gns", given, own_vs[mine]).reshape(len(p), -1)
            d_v[keys] += matmul(p[:, :seen].T, flat_given)
            d_own_v[mine] += np.einsum("gns,gnd->nsd", p[:, seen:].reshape(*given.shape[:2], -1), given)
            d_s -= (d_s * p).sum(axis=1, keepdims=True)
            d_s *= p
            d_s *= scale
            d_own = d_s[:, seen:].reshape(*given.shape[:2], -1)
            d_q[at] = matmul(d_s[:, :seen], ks[keys]).reshape(queries.shape)
            d_q[at] += np.einsum("gns,nsd->gnd", d_own, own_ks[mine])
            d_k[keys] += matmul(d_s[:, :seen].T, flat_queries)
            d_own_k[mine] += np.einsum("gns,gnd->nsd", d_own, queries)
        return tuple(map(mx.array, (d_q, d_k, d_v, d_own_k, d_own_v)))

    if own is None:
        nothing = mx.zeros((*k.shape[:3], 0, k.shape[3]))
        own = OwnKeys(nothing, nothing)
    run: Any = mx.custom_function(compute)
    run.vjp(vjp)
    result: mx.array = run(q, k, v, own.keys, own.values)
    return result
