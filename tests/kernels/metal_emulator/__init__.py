"""Runs the Metal backend's launches on this machine's processor: the kernels' text compiled as C++.

`launch` stands in for `kernels.metal.launch`. For each kernel, set of constants and types it writes a file that
holds the emulator's header, the kernels' header and a function whose signature is made as MLX makes it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import mlx.core as mx
import numpy as np
from emulation import Libraries, storage

from kernels import metal

FOLDER = Path(__file__).parent
# Contraction stays off, as common.metal asks of Metal. Traps: indices outside of arrays, overflow, wide shifts.
FLAGS = [
    *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-U_FORTIFY_SOURCE", "-w"),
    *("-fsanitize=bounds,signed-integer-overflow,shift", "-fsanitize-undefined-trap-on-error"),
]
TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int8: "int8_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_threadgroup": "uint3",
}


class Emulator:
    """Compiled kernels, kept in a folder; `definitions` go to the compiler."""

    def __init__(self, folder: Path, *definitions: str) -> None:
        self.libraries = Libraries(folder, FOLDER / "metal_emulator.cpp", [*FLAGS, *definitions])

    def launch(
        self,
        name: str,
        inputs: metal.Inputs,
        outputs: metal.Outputs,
        grid: tuple[int, int, int],
        threads: int,
        template: metal.Template,
    ) -> list[mx.array]:
        """As `kernels.metal.launch`. Raises RuntimeError for what Metal leaves undefined."""
        text = generated(name, inputs, outputs, template)
        arrays = [to_numpy(array) for array in inputs.values()]
        arrays += [np.empty(shape, storage(dtype)) for shape, dtype in outputs.values()]
        pointers = (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays])
        sizes = (ctypes.c_size_t * len(arrays))(*[array.nbytes for array in arrays])
        why = ctypes.create_string_buffer(200)
        triple = ctypes.c_uint32 * 3
        failed = self.libraries.load(name, text).run_emulated(
            pointers, sizes, len(inputs), len(arrays), triple(*grid), triple(threads, 1, 1), why
        )
        if failed:
            raise RuntimeError(f"{name}: {why.value.decode()}")
        results = zip(arrays[len(inputs) :], outputs.values(), strict=True)
        return [mx.array(array).view(dtype).reshape(shape) for array, (shape, dtype) in results]


def generated(
    name: str,
    inputs: metal.Inputs,
    outputs: metal.Outputs,
    template: metal.Template,
) -> str:
    """The C++ of a kernel: its text between a signature like MLX's and a function that unpacks the buffers.

    Template arguments are constants and types of the file, behind the header, which must not see them.
    """
    header, body = metal.source("common"), metal.source(name)
    assert body.isascii() and header.isascii(), "MLX hands the text to Metal as ASCII"
    for array in inputs:
        for suffix in ("_shape", "_strides", "_ndim"):
            assert array + suffix not in body, f"{array + suffix} would become a parameter"
    constants = [
        f"using {key} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {key} = {value};"
        for key, value in template.items()
    ]
    parameters = [f"const device {TYPES[array.dtype]}* {key}" for key, array in inputs.items()]
    parameters += [f"device {TYPES[dtype]}* {key}" for key, (_, dtype) in outputs.items()]
    types = [parameter.rpartition(" ")[0].replace("device ", "") for parameter in parameters]
    arguments = [f"static_cast<{kind}>(buffers[{i}])" for i, kind in enumerate(types)]
    attributes = [key for key in ATTRIBUTES if key in body]
    parameters += [f"{ATTRIBUTES[key]} {key}" for key in attributes]
    arguments += [f"at.{key}" for key in attributes]
    return "\n".join(
        [
            '#include "metal_emulator.h"',
            header,
            *constants,
            f"void custom_kernel({', '.join(parameters)}) {{",
            body,
            "}",
            "void emulated_kernel(void* const* buffers, const emulator::Attributes& at) {",
            f"custom_kernel({', '.join(arguments)});",
            "}\n",
        ]
    )


def to_numpy(array: mx.array) -> np.ndarray:
    """A row-contiguous copy, as MLX makes one for a kernel."""
    bits = mx.contiguous(array)
    return np.array(bits.view(mx.uint16) if array.dtype == mx.bfloat16 else bits)
