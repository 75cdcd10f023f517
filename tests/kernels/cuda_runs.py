"""Where the CUDA backend's kernels are run by cuda_emulator, and weights for its tests."""

from __future__ import annotations

import platform
import sys
from typing import Any

import emulation
import mlx.core as mx
from arrays import normal, random_ternary

from kernels import cuda, reference

EMULATED = platform.system() == "Linux" and emulation.compiler() is not None
LAUNCH = sys.modules["kernels.cuda.launch"]  # in the package, its name stands for the function


def weights_of(kind: str, n: int, k: int) -> tuple[Any, Any]:
    """Ours and the reference's."""
    if kind == "ternary":
        pair = random_ternary(n, k)
        return cuda.prepare_ternary(*pair), reference.prepare_ternary(*pair)
    data = normal(n, k, seed=3)
    if kind == "int8":
        return cuda.prepare_int8(data), reference.prepare_int8(data)
    data = data.astype(getattr(mx, kind))
    return cuda.prepare_dense(data), reference.prepare_dense(data)
