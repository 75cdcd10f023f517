"""A token of each row of logits, and its highest logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import mlx.core as mx
import numpy as np

from kernels import reference
from kernels.cuda.launch import launch, on_device, sizes_of

_CHOICE_THREADS = 512
_MOST_TOP = 128  # logits that `top_k` has room for


def choose(logits: mx.array, temperature: mx.array, uniform: mx.array) -> mx.array:
    """As `reference.choose`, with sums in another order."""
    m, n = logits.shape
    if not m:
        return reference.choose(logits, temperature, uniform)
    return launch(
        "choose",
        {"logits": logits, "temperature": temperature, "uniform": uniform, "sizes": sizes_of(n)},
        {"out": ((m,), mx.uint32)},
        (m, 1, 1),
        _CHOICE_THREADS,
        {"THREADS": _CHOICE_THREADS},
        shared_memory=4 * -(-n // 32),
    )[0]


def top_k(logits: mx.array, k: int, temperatures: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    """As `reference.top_k`; more than 128 are left to it."""
    m, n = logits.shape
    if not m or not 0 < k <= min(n, _MOST_TOP):
        return reference.top_k(logits, k, temperatures)
    ids, values, lse = launch(
        "top_k",
        {"logits": logits, "temperatures": _floats(*temperatures), "sizes": sizes_of(n)},
        {
            "ids": ((m, k), mx.uint32),
            "values": ((m, k), mx.float32),
            "lse": ((m, len(temperatures)), mx.float32),
        },
        (m, 1, 1),
        _CHOICE_THREADS,
        {
            "K": k,
            "THREADS": _CHOICE_THREADS,
            "ROOM": 2 * _CHOICE_THREADS,
            "TEMPERATURES": len(temperatures),
        },
    )
    return ids, values, lse


@lru_cache(maxsize=16)
def _floats(*values: float) -> mx.array:
    return on_device(np.array(values, np.float32))
