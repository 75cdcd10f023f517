"""Kernels from the `.cu` files of this folder, made when first used and kept."""

from __future__ import annotations

import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

FOLDER = Path(__file__).parent
HEADERS = ("ptx.cuh", "rows.cuh", "products.cuh", "attention.cuh", "exchange.cuh", "step.cuh")


@cache
def text(name: str) -> str:
    """A file of this folder, without comments, indentation and what NVRTC has no folder for; lines keep their numbers.

    MLX copies and hashes a kernel's whole text at every launch.
    """
    blank = r'#include "\w+\.cuh"|#pragma once|#include <stdint.h>|//.*|^ +'
    return re.sub(blank, "", (FOLDER / name).read_text(), flags=re.MULTILINE)


@cache
def header() -> str:
    """The shared functions, in one piece."""
    return "".join(map(text, HEADERS))


@cache
def kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], prelude: str, shared_memory: int, bound: int
) -> Any:
    """The kernel whose body is NAME.cu, behind `prelude`; `bound`: threads a block, alone on its multiprocessor.

    MLX writes the signature, which has no place for launch bounds; the attribute they belong to has.
    """
    head = header()
    if bound:
        head += f"\n#undef __global__\n#define __global__ __attribute__((global)) __launch_bounds__({bound}, 1)\n"
    return mx.fast.cuda_kernel(
        name=f"bitdraft_{name}",
        input_names=list(inputs),
        output_names=list(outputs),
        source=prelude + text(f"{name}.cu"),
        header=head,
        shared_memory=shared_memory,
    )


def launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    grid: tuple[int, int, int],
    threads: int,
    constants: dict[str, int | bool | mx.Dtype],
    *,
    shared_memory: int = 0,
    prelude: str = "",
    alone: bool = False,
) -> list[mx.array]:
    """Run NAME.cu on `grid` blocks of `threads` threads; returns its outputs in order.

    constants: what the body uses by name. alone: a block may have a multiprocessor's registers to itself.
    """
    made = kernel(name, tuple(inputs), tuple(outputs), prelude, shared_memory, threads if alone else 0)
    result: list[mx.array] = made(
        inputs=list(inputs.values()),
        template=list(constants.items()),
        grid=(grid[0] * threads, grid[1], grid[2]),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )
    return result


def float_bits(value: float) -> int:
    """A float32's bits as the int that a constant can be."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits
