"""Runs the CUDA backend's launches on this machine's processor: the kernels' text compiled as C++.

`Emulator.machine_code` stands in for the compiler and `Emulator.precompiled_cuda_kernel` for MLX's function of that
name, so `kernels.cuda` runs whole, with what it asks MLX for. For each kernel a file is written that holds the
emulator's header, the kernel's whole text and a function that calls it. Instead of `ptx.cuh`, which is for GPUs only,
the one of this folder is compiled.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from emulation import Libraries, storage

from kernels.cuda.launch import HEADERS, text

FOLDER = Path(__file__).parent
# Traps: indices outside of arrays, addresses that are not aligned, overflow, wide shifts.
FLAGS = [
    *("-std=c++20", "-Og", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"),
    *("-U_FORTIFY_SOURCE", "-w", "-pthread"),
    *("-fsanitize=bounds,alignment,signed-integer-overflow,shift", "-fsanitize-undefined-trap-on-error"),
]
GUARD = 1024  # bytes behind dynamic shared memory, as in cuda_emulator.cpp
# Inputs that change in place: the fused step's packets, and the caches, of which it and rope know.
IN_PLACE = {"fused_step": re.compile(r"packets|[kv]\d+"), "rope": re.compile(r"keys|values")}


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
        self.texts: dict[str, str] = {}  # of kernels by their symbols
        self.libraries = Libraries(folder, FOLDER / "cuda_emulator.cpp", FLAGS, ["-O2"])

    def machine_code(self, symbol: str, whole: str) -> bytes:
        """As `kernels.cuda.launch.machine_code`: takes note of the text, to compile it when it is launched."""
        self.texts[symbol] = whole
        return symbol.encode()

    def precompiled_cuda_kernel(
        self,
        *,
        name: str,
        compiled_source: bytes,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
        scalars: Sequence[object],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        shared_memory: int,
        ensure_row_contiguous: bool,
    ) -> list[mx.array]:
        """As `mx.fast.precompiled_cuda_kernel`. Raises RuntimeError for what CUDA leaves undefined, and for blocks that
        wait for each other."""
        assert ensure_row_contiguous and not scalars
        assert compiled_source == name.encode()
        kernel = name.removeprefix("bitdraft_").rpartition("_")[0]
        parameters = parameters_of(name, self.texts[name])
        library = self.libraries.load(kernel, generated(name, self.texts[name], kernel, parameters, shared_memory))
        self.launches.append(kernel)
        arrays = [in_memory(array) for array in inputs]
        arrays += [np.empty(s, storage(d)) for s, d in zip(output_shapes, output_dtypes, strict=True)]
        in_place = IN_PLACE.get(kernel)
        written = [
            not kind.startswith("const ") or (in_place is not None and in_place.fullmatch(name) is not None)
            for kind, name in parameters
        ]
        count, why = len(arrays), ctypes.create_string_buffer(1000)
        assert count == len(parameters) and threadgroup[1:] == (1, 1)
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


def parameters_of(symbol: str, source: str) -> list[tuple[str, str]]:
    """Types and names of a kernel's parameters."""
    signature = re.search(rf"{symbol}\((.*)\) {{", source)
    assert signature, f"no kernel {symbol}"
    parameters = [parameter.rpartition(" ") for parameter in signature[1].split(", ")]
    return [(kind, name) for kind, _, name in parameters]


def with_places(source: str, files: Sequence[str]) -> str:
    """The text of some files, with the emulator's ptx.cuh, in which the compiler knows each line's file and number."""
    for file in files:
        before, found, after = source.partition(text(file))
        assert found, f"the kernel's source does not hold {file}"
        replaced = (FOLDER / file).read_text() if file == "ptx.cuh" else found
        source = f'{before}\n#line 1 "{file}"\n{replaced}{after}'
    return source


def generated(symbol: str, source: str, kernel: str, parameters: Sequence[tuple[str, str]], shared_memory: int) -> str:
    """The C++ of a kernel: its text between the emulator's header and a function that unpacks the buffers."""
    arguments = [f"static_cast<{kind}>(buffers[{i}])" for i, (kind, _) in enumerate(parameters)]
    return "\n".join(
        [
            '#include "cuda_emulator.h"',
            f"namespace bitdraft {{ alignas(128) thread_local uint8_t work[{shared_memory + GUARD}]; }}",
            with_places(source, [*HEADERS, f"{kernel}.cu"]),
            "unsigned char* emulator::emulated_shared_memory() { return bitdraft::work; }",
            "void emulator::emulated_kernel(void* const* buffers) {",
            "using namespace bitdraft;",
            "copies.erase(emulator::running);",
            f"{symbol}({', '.join(arguments)});",
            "}\n",
        ]
    )


def in_memory(array: mx.array) -> np.ndarray:
    """The array's own memory where it is row-contiguous, else a copy, as MLX makes one for a kernel."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.require(np.array(bits, copy=False), requirements="C")


def attribute(emulator: Emulator, name: int) -> int:
    """As `kernels.cuda.nvrtc.device_attribute`: an H100, but for the emulator's multiprocessors."""
    return {16: emulator.multiprocessors, 75: 9, 97: 227 * 1024}[name]
