"""The CUDA backend: the operations of `kernels.reference` as kernels of our own, through MLX's CUDA build.

Products use the tensor cores; those of 1..8 rows read the weights once for all rows; BitLinear equals the
reference bit for bit. A row's bits are its own however many there are, in float products too. Attention works in chunks
of keys that are combined in order, for any number of rows and sequences, so that no library plans anew for every length
of context. `fused` runs a decoding step of a whole model as one launch, `reader` the proposals of a draft that reads
its teacher's states, `steps` a step of many sequences.
"""

from __future__ import annotations

from kernels import reference
from kernels.cuda.attend import attention, attention_packed
from kernels.cuda.choices import choose, top_k
from kernels.cuda.products import (
    TUNABLE,
    bitlinear,
    int8_linear,
    linear,
    prepare_dense,
    prepare_int8,
    prepare_ternary,
    quantize_rows,
    set_tuning,
)
from kernels.cuda.reader import fused_reader
from kernels.cuda.steps import fused_step

__all__ = [
    "NAME",
    "TUNABLE",
    "argmax",
    "attention",
    "attention_packed",
    "bitlinear",
    "choose",
    "clock",
    "fused_reader",
    "fused_step",
    "int8_linear",
    "linear",
    "prepare_dense",
    "prepare_int8",
    "prepare_ternary",
    "quantize_rows",
    "set_tuning",
    "top_k",
]

NAME = "cuda"
argmax = reference.argmax
clock = reference.clock
