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
    """Reads `size` bytes with a number of threads, in several ways, none of them this project's.

    `copy` counts what it reads and what it writes.
    """

    def __init__(self, size: int) -> None:
        self.source = np.ones(max(size, PIECE) // PIECE * PIECE // 4, np.float32)
        self.target = np.ones_like(self.source)

    def measure(self, threads: int) -> Bandwidth:
        """The fastest of all tries."""
        found: Bandwidth | None = None
        with ThreadPoolExecutor(threads) as pool:
            for method, work, passes in self._methods():
                for _ in range(TRIES):
                    start = time.perf_counter()
                    list(pool.map(work, range(threads), [threads] * threads))
                    rate = passes * self.source.nbytes / (time.perf_counter() - start) / 1e9
                    found = Bandwidth(rate, method).best(found)
        assert found is not None
        return found

    def _methods(self) -> Iterator[tuple[str, Callable[[int, int], None], int]]:
        """Name, what thread i of n does, and how often a byte of the source's size crosses the bus."""
        floats, integers = self.source.reshape(-1, PIECE // 4), self.source.view(np.int32).reshape(-1, PIECE // 4)
        target = self.target.reshape(-1, PIECE // 4)

        def largest(i: int, n: int) -> None:
            for piece in integers[i::n]:
                np.max(piece)

        def dot(i: int, n: int) -> None:
            for piece in floats[i::n]:
                np.dot(piece, piece)

        def copy(i: int, n: int) -> None:
            for piece, to in zip(floats[i::n], target[i::n], strict=True):
                np.copyto(to, piece)

        yield "max int32", largest, 1
        yield "dot float32", dot, 1
        yield "copy", copy, 2


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
