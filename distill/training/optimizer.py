"""AdamW, and the learning rate over a run."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from distill.training.tensors import Tensors

BETAS = (0.9, 0.95)
EPS = 1e-8


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then a cosine down to a tenth of the peak.

    step: 0 for the first.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def schedule(step: int, rate: float) -> mx.array:
    """What `adamw` must be told of a step: float32 [3], the learning rate, 1 - beta1^t and 1 - beta2^t.

    step: 1 for the first.
    """
    return mx.array(np.array([rate, *(1 - beta**step for beta in BETAS)], np.float32))


def adamw(
    weights: Tensors, gradients: Tensors, m: Tensors, v: Tensors, scheduled: mx.array, decay: float, clip: float
) -> tuple[Tensors, Tensors, Tensors, mx.array]:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) with bias correction, after clipping the
    gradient's global norm. Vectors (norms) do not decay.

    scheduled: as `schedule` returns it. Returns new weights, m and v, and the norm before clipping.
    """
    # In the order of their names: a run that is resumed has its weights in another order, which the sum would show.
    norm = mx.sqrt(sum((mx.square(gradients[name]).sum() for name in sorted(gradients)), start=mx.array(0.0)))
    factor = mx.minimum(1.0, clip / (norm + 1e-6))
    rate, c1, c2 = scheduled[0], scheduled[1], scheduled[2]
    new: tuple[Tensors, Tensors, Tensors] = ({}, {}, {})
    for name, w in weights.items():
        g = gradients[name] * factor
        first = BETAS[0] * m[name] + (1 - BETAS[0]) * g
        second = BETAS[1] * v[name] + (1 - BETAS[1]) * mx.square(g)
        decayed = w * (1 - rate * decay) if w.ndim > 1 else w
        new[0][name] = decayed - rate * (first / c1) / (mx.sqrt(second / c2) + EPS)
        new[1][name], new[2][name] = first, second
    return *new, norm
