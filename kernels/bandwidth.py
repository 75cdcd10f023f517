"""How fast this machine reads memory: what a product that streams its weights is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

PIECE = 1 << 20  # bytes a call: numpy's own cost of one is small beside it
GPU_READS = 8
TRIES = 4


@dataclass(frozen=True)
class Bandwidth:
    """gb_per_s: 10^9 bytes read a second; method: which of several ways read fastest."""

    gb_per_s: float
    method: str

    def best(self, other: Bandwidth | None) -> Bandwidth:
        return self if other is None or self.gb_per_s > other.gb_per_s else other


class CpuReader:
    """Reads `size` bytes with a number of threads, in several ways, none of them this project's."""

    def __init__(self, size: int) -> None:
        self.source = np.ones(max(size, PIECE) // PIECE * PIECE // 4, np.float32)

    def measure(self, threads: int) -> Bandwidth:
        """The fastest of all tries."""
        found: Bandwidth | None = None
        with ThreadPoolExecutor(threads) as pool:
            for method, work in self._methods():
                for _ in range(TRIES):
                    start = time.perf_counter()
                    list(pool.map(work, range(threads), [threads] * threads))
                    rate = self.source.nbytes / (time.perf_counter() - start) / 1e9
                    found = Bandwidth(rate, method).best(found)
        assert found is not None
        return found

    def _methods(self) -> Iterator[tuple[str, Callable[[int, int], None]]]:
        """Name, and what thread i of n does."""
        floats, integers = self.source.reshape(-1, PIECE // 4), self.source.view(np.int32).reshape(-1, PIECE // 4)

        def share(pieces: np.ndarray, i: int, n: int) -> np.ndarray:
            return pieces[i * len(pieces) // n : (i + 1) * len(pieces) // n]

        def largest(i: int, n: int) -> None:
            for piece in share(integers, i, n):
                np.max(piece)

        def dot(i: int, n: int) -> None:
            for piece in share(floats, i, n):
                np.dot(piece, piece)

        yield "max int32", largest
        yield "dot float32", dot


class GpuReader:
    """Reads `size` bytes through MLX's own reductions."""

    def __init__(self, size: int) -> None:
        self.source = mx.ones((max(size, PIECE) // 4,))
        mx.eval(self.source)

    def measure(self) -> Bandwidth:
        found: Bandwidth | None = None
        for method, reduce in (("mx.max", mx.max), ("mx.sum", mx.sum)):
            for _ in range(TRIES):
                # Several in one evaluation: what starting it costs is spread over them.
                results = [reduce(self.source) for _ in range(GPU_READS)]
                start = time.perf_counter()
                mx.eval(results)
                rate = GPU_READS * self.source.nbytes / (time.perf_counter() - start) / 1e9
                found = Bandwidth(rate, method).best(found)
        assert found is not None
        return found
