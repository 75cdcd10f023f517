"""How the Metal backend's tests run its kernels: on a Mac as they are, elsewhere their very text by metal_emulator.

Equality by bits is against the reference on the CPU: a GPU's library may use fewer bits than float32 has.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import arrays
import emulation
import mlx.core as mx

from kernels import metal

REAL = mx.metal.is_available() and mx.default_device() == mx.gpu
EMULATED = not REAL and platform.system() == "Linux" and emulation.compiler() is not None


def defined(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the reference gives on the CPU."""
    with mx.stream(mx.cpu):
        result = operation(*arguments, **options)
        mx.eval(result)
    return result


weights_of = partial(arrays.weights_of, metal)
