"""Runs the Metal backend's launches on this machine's processor: the kernels' text compiled as C++.

`launch` stands in for `kernels.metal.launch`. For each kernel, set of constants and types it writes a file that
holds the emulator's header, the kernels' header and a function whose signature is made as MLX makes it.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np
from emulation import Libraries, storage

from kernels import metal

FOLDER = Path(__file__).parent
STANDARD = "-std=c++14"  # Metal's before version 4, which MLX uses before macOS 26
# Contraction stays off, as common.metal asks of Metal. Traps: indices outside of arrays, overflow, wide shifts,
# vectors at odd addresses.
FLAGS = [
    *(STANDARD, "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-U_FORTIFY_SOURCE", "-w"),
    *("-fsanitize=bounds,signed-integer-overflow,shift,alignment", "-fsanitize-undefined-trap-on-error"),
]
TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int8: "int8_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
# All that MLX makes parameters where a body has their name in it; metal_emulator.h knows the values of some.
ATTRIBUTES = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}
CONSTANT_BELOW = 8  # elements: such inputs lie in another address space
# What Metal leaves out of C++, and g++ would take.
MISSING = "double goto new delete virtual noexcept register thread_local typeid dynamic_cast throw try catch asm"


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

    Executed is a function of the file's constants and types, because g++ 12 ignores the sections of a template's
    variables. The template that MLX makes is read too, before there are any: it must do without them.
    """
    constants = [
        f"using {key} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {key} = {value};"
        for key, value in template.items()
    ]
    types = [TYPES[array.dtype] for array in inputs.values()] + [TYPES[dtype] for _, dtype in outputs.values()]
    arguments = [f"static_cast<{kind}*>(buffers[{i}])" for i, kind in enumerate(types)]
    arguments += [f"at.{key}" for key in attributes(name)]
    text = "\n".join(
        [
            '#include "metal_emulator.h"',
            f"#pragma GCC poison {MISSING}",
            metal.source("common"),
            function("as_template", name, inputs, outputs, template) if template else "",
            *constants,
            function("custom_kernel", name, inputs, outputs, {}),
            "void emulated_kernel(void* const* buffers, const emulator::Attributes& at) {",
            f"custom_kernel({', '.join(arguments)});",
            "}\n",
        ]
    )
    # g++ does not tell them apart: with one, inputs of few elements need no compilation of their own.
    return text.replace("const constant ", "const device ")


def attributes(name: str) -> list[str]:
    return [key for key in ATTRIBUTES if key in metal.source(name)]


def function(called: str, name: str, inputs: metal.Inputs, outputs: metal.Outputs, template: metal.Template) -> str:
    """A kernel's function as MLX writes it (mlx/backend/common/metal_kernel.cpp), but for the buffers' numbers."""
    body = metal.source(name)
    assert body.isascii() and metal.source("common").isascii(), "MLX hands the text to Metal as ASCII"
    parameters = []
    for key, array in inputs.items():
        assert array.ndim > 0, f"MLX passes {key}, a scalar, by reference"
        for suffix in ("_shape", "_strides", "_ndim"):
            assert key + suffix not in body, f"{key + suffix} would become a parameter"
        space = "constant" if array.size < CONSTANT_BELOW else "device"
        parameters.append(f"const {space} {TYPES[array.dtype]}* {key}")
    parameters += [f"device {TYPES[dtype]}* {key}" for key, (_, dtype) in outputs.items()]
    parameters += [f"{ATTRIBUTES[key]} {key}" for key in attributes(name)]
    kinds = [f"{'typename' if isinstance(value, mx.Dtype) else 'int'} {key}" for key, value in template.items()]
    first = f"template <{', '.join(kinds)}>\n" if kinds else ""
    return f"{first}[[kernel]] void {called}(\n{', '.join(parameters)}) {{\n{body}\n}}\n"


def instantiation(called: str, template: metal.Template) -> str:
    """What MLX writes behind a template, but for its attributes."""
    values = ", ".join(TYPES[value] if isinstance(value, mx.Dtype) else str(value) for value in template.values())
    return f"template decltype({called}<{values}>) {called}<{values}>;\n" if template else ""


@cache
def clang() -> str | None:
    """A clang that knows what metal_spaces.h needs, or None."""
    path = shutil.which("clang++")
    return path if path and not complaints(path, "") else None


def complaints(compiler: str, text: str) -> str:
    """What clang says about errors in Metal text behind metal_spaces.h: "" if there are none."""
    command = [compiler, "-x", "c++", STANDARD, "-w", "-fsyntax-only", f"-I{FOLDER}", "-"]
    done = subprocess.run(command, input=f'#include "metal_spaces.h"\n{text}', capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def to_numpy(array: mx.array) -> np.ndarray:
    """A row-contiguous copy, as MLX makes one for a kernel."""
    bits = mx.contiguous(array)
    return np.array(bits.view(mx.uint16) if array.dtype == mx.bfloat16 else bits)
