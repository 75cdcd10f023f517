"""When things were done: of what a generator yields, and of arrays that a device computes meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import mlx.core as mx
import numpy as np

from kernels.ops import Backend

T = TypeVar("T")


def timed(items: Iterator[T]) -> Iterator[tuple[T, float, float]]:
    """Each item with when it was asked for and when it came (`time.perf_counter`)."""
    while True:
        began = time.perf_counter()
        try:
            item = next(items)
        except StopIteration:
            return
        yield item, began, time.perf_counter()


@contextmanager
def noticing_stops() -> Iterator[threading.Event]:
    """An event that is set where the process was stopped in the block and went on, as by Ctrl-Z and `fg`.

    The clock runs on meanwhile; while a machine sleeps it stands still.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals belong to the main thread
        return
    before = signal.signal(signal.SIGCONT, lambda number, frame: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGCONT, before)


class ComputedAt:
    """When tokens had been computed, without keeping the device waiting.

    A CPU says so by an operation behind them: a host without an idle core would learn of it late.
    """

    def __init__(self, ops: Backend, tokens: list[int] | mx.array) -> None:
        self._seconds: float | None = None
        self._tokens = tokens
        self._clock: mx.array | None = None
        if isinstance(tokens, mx.array):
            self._clock = ops.clock(tokens)
            mx.async_eval(tokens if self._clock is None else self._clock)
        else:
            self._seconds = time.perf_counter()

    def before(self, following: mx.array) -> None:
        """Find it out while, or once, what is queued behind them is computed."""
        if self._seconds is not None:
            return
        if self._clock is None:
            mx.eval(self._tokens)
            self._seconds = time.perf_counter()
        else:
            mx.eval(following)

    @property
    def seconds(self) -> float:
        """As `time.perf_counter` has it."""
        if self._seconds is None:
            self._seconds = 1e-9 * int(np.array(self._clock)) if self._clock is not None else time.perf_counter()
        return self._seconds
