"""Kernels from the `.cu` files of this folder, compiled when first used and kept on disk for later processes.

MLX could compile them too (`mx.fast.cuda_kernel`), but behind headers of its own, which take twenty times as long as
the kernels, and anew in every process.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from kernels.cuda import nvrtc
from kernels.device import cache_folder
from kernels.errors import UserError
from kernels.files import replacing

FOLDER = Path(__file__).parent
HEADERS = ("ptx.cuh", "rows.cuh", "products.cuh", "attention.cuh", "choices.cuh", "exchange.cuh", "fused_step.cuh")
TYPES = {  # ptx.cuh defines those that are no words of CUDA C++
    mx.float32: "float",
    mx.bfloat16: "bfloat16",
    mx.int8: "int8_t",
    mx.uint8: "uint8_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}

Constant = int | bool | mx.Dtype
ConstantItems = tuple[tuple[str, Constant], ...]
Constants = dict[str, Constant]  # what a body uses by name
Parameters = tuple[tuple[str, mx.Dtype], ...]
Outputs = dict[str, tuple[tuple[int, ...], mx.Dtype]]  # shapes and dtypes by name
Bounds = tuple[int, int]  # threads a block, and blocks that a multiprocessor's registers are shared by


@cache
def text(name: str) -> str:
    """A file of this folder, without the headers it names: a kernel's text holds them all."""
    return re.sub(r'#include "\w+\.cuh"|#pragma once', "", (FOLDER / name).read_text())


@cache
def kernel(
    name: str,
    inputs: Parameters,
    outputs: Parameters,
    constants: ConstantItems,
    prelude: str,
    bounds: Bounds | None,
) -> tuple[str, bytes]:
    """The symbol and the machine code of the kernel that `kernel_text` writes."""
    symbol, whole = kernel_text(name, inputs, outputs, constants, prelude, bounds)
    return symbol, machine_code(symbol, whole)


def kernel_text(
    name: str,
    inputs: Parameters,
    outputs: Parameters,
    constants: ConstantItems,
    prelude: str,
    bounds: Bounds | None,
) -> tuple[str, str]:
    """The symbol and the text of the kernel whose body is NAME.cu, behind `prelude`.

    The symbol names all that the machine code depends on.
    """
    parameters = [f"const {TYPES[dtype]}* {key}" for key, dtype in inputs]
    parameters += [f"{TYPES[dtype]}* {key}" for key, dtype in outputs]
    lines = [_constant(key, value) for key, value in constants]

    def whole(symbol: str) -> str:
        bound = f"__launch_bounds__({bounds[0]}, {bounds[1]}) " if bounds else ""
        head = f"{bound}{symbol}({', '.join(parameters)})"
        body = [f'extern "C" __global__ void {head} {{', *lines, prelude, text(f"{name}.cu"), "}"]
        return "\n".join([*map(text, HEADERS), "namespace bitdraft {", *body, "}\n"])

    digest = hashlib.sha256("\n".join([*nvrtc.OPTIONS, whole("")]).encode()).hexdigest()
    symbol = f"bitdraft_{name}_{digest[:16]}"
    return symbol, whole(symbol)


def _constant(key: str, value: Constant) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {key} = {TYPES[value]};"
    return f"constexpr {'bool' if isinstance(value, bool) else 'int'} {key} = {int(value)};"


def machine_code(symbol: str, whole: str) -> bytes:
    """What a kernel's whole text compiles to here, from the user's cache folder where a process before had the same.

    A file there begins with the SHA-256 of what follows; one that was damaged is written anew. A folder that cannot be
    written to costs the compilation in every process, no more.
    """
    target = nvrtc.architecture()
    file = cache_folder() / "cuda" / f"{symbol}-{target}-nvrtc{nvrtc.version()}"
    with contextlib.suppress(OSError):
        stored = file.read_bytes()
        if hashlib.sha256(stored[32:]).digest() == stored[:32]:
            return stored[32:]
    code = nvrtc.compile_text(whole, symbol, target)
    with contextlib.suppress(OSError, UserError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, shared=True) as temporary:
            temporary.write_bytes(hashlib.sha256(code).digest() + code)
    return code


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and its grid, to be run many times. Make it with `prepare`."""

    symbol: str
    code: bytes
    blocks: tuple[int, int, int]
    threads: int
    shared_memory: int
    dtypes: tuple[mx.Dtype, ...]  # of the outputs

    def __call__(
        self,
        inputs: Sequence[mx.array],
        shapes: Sequence[tuple[int, ...]],
        blocks: tuple[int, int, int] | None = None,
    ) -> list[mx.array]:
        """The outputs, of these shapes, for inputs of the dtypes that it was prepared for; blocks: of another grid."""
        x, y, z = blocks or self.blocks
        result: list[mx.array] = mx.fast.precompiled_cuda_kernel(
            name=self.symbol,
            compiled_source=self.code,
            inputs=inputs,
            output_shapes=shapes,
            output_dtypes=self.dtypes,
            scalars=[],
            grid=(x * self.threads, y, z),
            threadgroup=(self.threads, 1, 1),
            shared_memory=self.shared_memory,
            ensure_row_contiguous=True,
        )
        return result


def prepare(
    name: str,
    inputs: Parameters,
    outputs: Parameters,
    blocks: tuple[int, int, int],
    threads: int,
    constants: Constants,
    *,
    shared_memory: int = 0,
    prelude: str = "",
    residents: int = 0,
) -> Launch:
    """NAME.cu on a grid of `blocks`. residents: how many of them a multiprocessor's registers are shared by; 0: any.

    constants: what the body uses by name.
    """
    bounds = (threads, residents) if residents else None
    symbol, code = kernel(name, inputs, outputs, tuple(constants.items()), prelude, bounds)
    return Launch(symbol, code, blocks, threads, shared_memory, tuple(dtype for _, dtype in outputs))


_prepared: dict[tuple[object, ...], Launch] = {}


def launch(
    name: str,
    inputs: dict[str, mx.array],
    outputs: Outputs,
    blocks: tuple[int, int, int],
    threads: int,
    constants: Constants,
    *,
    shared_memory: int = 0,
    residents: int = 0,
) -> list[mx.array]:
    """Run NAME.cu once, as `prepare` has it; returns its outputs in order.

    A generation step launches hundreds of kernels, so what they are is looked up by as little as tells them apart:
    names and types of inputs and outputs follow from NAME, its constants and the types of the arrays.
    """
    arrays = list(inputs.values())
    shapes = [shape for shape, _ in outputs.values()]
    key = (name, threads, shared_memory, *constants.values(), *[array.dtype for array in arrays])
    if key in _prepared:
        return _prepared[key](arrays, shapes, blocks)
    prepared = prepare(
        name,
        tuple((key, array.dtype) for key, array in inputs.items()),
        tuple((key, dtype) for key, (_, dtype) in outputs.items()),
        blocks,
        threads,
        constants,
        shared_memory=shared_memory,
        residents=residents,
    )
    _prepared[key] = prepared
    return prepared(arrays, shapes)


def on_device(array: np.ndarray) -> mx.array:
    """A copy in the GPU's own memory: what comes from NumPy stays in memory that both sides share.

    Not evaluated: that would wait for all that is queued.
    """
    return mx.contiguous(mx.array(array) + 0)


@lru_cache(maxsize=4096)
def sizes_of(*values: int) -> mx.array:
    """Sizes as an input: constants would make MLX compile a kernel for every one."""
    array = on_device(np.array(values, np.int32))
    mx.async_eval(array)  # or a compiled step would make it anew each time
    return array


@cache
def float_bits(value: float) -> int:
    """A float32's bits as the int that a constant can be."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits
