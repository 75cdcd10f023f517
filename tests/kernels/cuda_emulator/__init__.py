"""Runs the CUDA backend's launches on this machine's processor: the kernels' text compiled as C++.

`Emulator.cuda_kernel` stands in for `mx.fast.cuda_kernel`, so `kernels.cuda` runs whole, with what it asks MLX for.
For each kernel, set of constants and types a file is written that holds the emulator's header, the kernels' header and
a function whose signature is made as MLX makes it. Instead of `ptx.cuh`, which is for GPUs only, the one of this folder
is compiled.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from emulation import Libraries, storage

from kernels.cuda.launch import HEADERS, text

FOLDER = Path(__file__).parent
# Traps: indices outside of arrays, addresses that are not aligned, overflow, wide shifts.
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-U_FORTIFY_SOURCE", "-w", "-pthread"),
    *("-fsanitize=bounds,alignment,signed-integer-overflow,shift", "-fsanitize-undefined-trap-on-error"),
]
TYPES = {
    mx.float32: "float",
    mx.bfloat16: "__nv_bfloat16",
    mx.int8: "int8_t",
    mx.uint8: "uint8_t",
    mx.int32: "int32_t",
    mx.uint32: "uint32_t",
}
GUARD = 1024  # bytes behind dynamic shared memory, as in cuda_emulator.cpp
# Inputs that the whole step changes in place: its packets and the caches.
IN_PLACE = re.compile(r"packets|[kv]\d+")


class Emulator:
    """Compiled kernels, kept in a folder.

    multiprocessors: what the backend is told of. resident: blocks that run at once, if not one on each of these.
    seed: of the order in which blocks, warps and lanes run; 0: one after another, each as far as it gets.
    """

    def __init__(self, folder: Path, multiprocessors: int = 4) -> None:
        self.multiprocessors = multiprocessors
        self.resident: int | None = None
        self.seed = 0
        self.launches: list[str] = []
        self.libraries = Libraries(folder, FOLDER / "cuda_emulator.cpp", FLAGS, ["-O2"])

    def cuda_kernel(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> Callable[..., list[mx.array]]:
        """As `mx.fast.cuda_kernel`. What it returns raises RuntimeError for what CUDA leaves undefined, and for
        blocks that wait for each other."""
        assert ensure_row_contiguous
        kernel = name.removeprefix("bitdraft_")
        head, body = with_places(header, HEADERS), with_places(source, [f"{kernel}.cu"])

        def call(
            *,
            inputs: Sequence[mx.array],
            template: Sequence[tuple[str, int | bool | mx.Dtype]],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            types = [f"const {TYPES[array.dtype]}*" for array in inputs] + [f"{TYPES[d]}*" for d in output_dtypes]
            names = [*input_names, *output_names]
            for array in input_names:
                for suffix in ("_shape", "_strides", "_ndim"):
                    assert array + suffix not in source, f"{array + suffix} would become a parameter"
            library = self.libraries.load(kernel, generated(head, body, names, types, template, shared_memory))
            self.launches.append(kernel)
            arrays = [in_memory(array) for array in inputs]
            arrays += [np.empty(s, storage(d)) for s, d in zip(output_shapes, output_dtypes, strict=True)]
            written = [IN_PLACE.fullmatch(name) is not None for name in input_names] + [True] * len(output_names)
            count, why = len(arrays), ctypes.create_string_buffer(1000)
            assert threadgroup[1:] == (1, 1)
            failed = library.run_emulated(
                (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
                (ctypes.c_size_t * count)(*[array.nbytes for array in arrays]),
                (ctypes.c_bool * count)(*written),
                len(inputs),
                count,
                (ctypes.c_uint32 * 3)(-(-grid[0] // threadgroup[0]), *grid[1:]),
                threadgroup[0],
                ctypes.c_size_t(shared_memory),
                self.resident or self.multiprocessors,
                self.seed,
                why,
            )
            if failed:
                raise RuntimeError(f"{kernel}: {why.value.decode()}")
            results = zip(arrays[len(inputs) :], output_dtypes, strict=True)
            return [mx.array(array).view(dtype).reshape(array.shape) for array, dtype in results]

        return call


def with_places(source: str, files: Sequence[str]) -> str:
    """The text of some files, with the emulator's ptx.cuh, in which the compiler knows each line's file and number."""
    for file in files:
        before, found, after = source.partition(text(file))
        assert found, f"the kernel's source does not hold {file}"
        replaced = (FOLDER / file).read_text() if file == "ptx.cuh" else found
        source = f'{before}\n#line 1 "{file}"\n{replaced}{after}'
    return source


def generated(
    header: str,
    body: str,
    names: Sequence[str],
    types: Sequence[str],
    template: Sequence[tuple[str, int | bool | mx.Dtype]],
    shared_memory: int,
) -> str:
    """The C++ of a kernel: its text between a signature like MLX's and a function that unpacks the buffers."""
    constants = [
        f"using {key} = {TYPES[value]};"
        if isinstance(value, mx.Dtype)
        else f"constexpr bool {key} = {str(value).lower()};"
        if isinstance(value, bool)
        else f"constexpr int {key} = {value};"
        for key, value in template
    ]
    parameters = [f"{kind} {name}" for kind, name in zip(types, names, strict=True)]
    arguments = [f"static_cast<{kind}>(buffers[{i}])" for i, kind in enumerate(types)]
    return "\n".join(
        [
            '#include "cuda_emulator.h"',
            re.sub(r"#include <cuda_\w+\.h>", "", header),
            "namespace mlx::core::cu {",
            f"alignas(128) thread_local uint8_t work[{shared_memory + GUARD}];",
            f"__global__ void custom_kernel({', '.join(parameters)}) {{",
            *constants,
            body,
            "}",
            "}",
            "unsigned char* emulator::emulated_shared_memory() { return mlx::core::cu::work; }",
            "void emulator::emulated_kernel(void* const* buffers) {",
            "bitdraft::copies.erase(emulator::running);",
            f"mlx::core::cu::custom_kernel({', '.join(arguments)});",
            "}\n",
        ]
    )


def in_memory(array: mx.array) -> np.ndarray:
    """The array's own memory where it is row-contiguous, else a copy, as MLX makes one for a kernel."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.require(np.array(bits, copy=False), requirements="C")


def attribute(emulator: Emulator, name: int) -> int:
    """As `kernels.cuda.step.device_attribute`: an H100's shared memory, the emulator's multiprocessors."""
    return {16: emulator.multiprocessors, 97: 227 * 1024}[name]
