"""Kernels of another language as shared libraries of this machine's processor: what both emulators compile with."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx


@cache
def compiler() -> str | None:
    """A g++ that knows _Float16 (12 or newer on x86), or None. clang has other names for sections."""
    for name in ("g++", "g++-14", "g++-13", "g++-12"):
        path = shutil.which(name)
        probe = "#ifdef __clang__\n#error\n#endif\n_Float16 x;"
        command = [path or "", "-x", "c++", "-std=c++20", "-fsyntax-only", "-"]
        if path and subprocess.run(command, input=probe, text=True, capture_output=True).returncode == 0:
            return path
    return None


def native_flags() -> list[str]:
    """Hardware fma and half floats make the emulation many times faster."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return ["-mfma", "-mf16c"] if "fma" in flags and "f16c" in flags else []


class Libraries:
    """Compiled kernels, kept in a folder, each linked with the emulator's runtime.

    runtime: its C++ file, beside the header that kernels include; flags: of every compilation; runtime_flags: of the
    runtime's too.
    """

    def __init__(self, folder: Path, runtime: Path, flags: Sequence[str], runtime_flags: Sequence[str] = ()) -> None:
        self.folder, self.runtime = folder, runtime
        self.flags, self.runtime_flags = [*flags, *native_flags()], runtime_flags
        self.loaded: dict[str, ctypes.CDLL] = {}

    def load(self, name: str, text: str) -> ctypes.CDLL:
        """The library of a kernel's C++, compiled when it is first asked for. RuntimeError if it cannot be."""
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self.loaded:
            linked = self.folder / f"{self.runtime.stem}.o"
            if not linked.exists():
                self._compile(*self.runtime_flags, "-c", str(self.runtime), "-o", str(linked))
                # Compiled once too, the header costs each kernel half as much.
                header = self.runtime.with_suffix(".h")
                self._compile("-x", "c++-header", str(header), "-o", str(self.folder / f"{header.name}.gch"))
            file = self.folder / f"{name}_{key}.cpp"
            file.write_text(text)
            library = str(file.with_suffix(".so"))
            self._compile("-shared", f"-I{self.runtime.parent}", str(file), str(linked), "-o", library)
            self.loaded[key] = ctypes.CDLL(library)
        return self.loaded[key]

    def _compile(self, *arguments: str) -> None:
        program = compiler()
        assert program is not None
        done = subprocess.run([program, *self.flags, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)


def storage(dtype: mx.Dtype) -> str:
    """The NumPy type of a buffer's bits."""
    return {mx.bfloat16: "uint16"}.get(dtype) or str(dtype).rpartition(".")[2]
