"""BitLinear and the other operations of a decoding step, on whatever MLX runs on.

`backend()` returns the fastest backend that passes its self-test here; `kernels.reference` is the
definition that every backend equals. Checkpoints are packed as `kernels.packing` says.
"""

from kernels.backends import backend
from kernels.errors import UserError
from kernels.module import BitLinear, swap_bitlinear

__all__ = ["BitLinear", "UserError", "backend", "swap_bitlinear"]
