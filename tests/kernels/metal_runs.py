"""How the Metal backend's tests run its kernels: on a Mac as they are, elsewhere their very text by metal_emulator.

Equality by bits is against the reference on the CPU: a GPU's library may use fewer bits than float32 has.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import emulation
import mlx.core as mx
from arrays import normal, random_ternary

from kernels import metal, reference

REAL = mx.metal.is_available() and mx.default_device() == mx.gpu
EMULATED = not REAL and platform.system() == "Linux" and emulation.compiler() is not None


def defined(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the reference gives on the CPU."""
    with mx.stream(mx.cpu):
        result = operation(*arguments, **options)
        mx.eval(result)
    return result


def weights_of(kind: str, n: int, k: int) -> tuple[Any, Any]:
    """Ours and the reference's."""
    if kind == "ternary":
        pair = random_ternary(n, k)
        return metal.prepare_ternary(*pair), reference.prepare_ternary(*pair)
    data = normal(n, k, seed=3)
    if kind == "int8":
        return metal.prepare_int8(data), reference.prepare_int8(data)
    data = data.astype(getattr(mx, kind))
    return metal.prepare_dense(data), reference.prepare_dense(data)
