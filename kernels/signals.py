"""Ctrl-C and SIGTERM, which end a command wherever it is."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def take_signals() -> None:
    """SIGTERM does what Ctrl-C does, and neither is lost in a callback of Python's."""
    if not callable(signal.getsignal(signal.SIGINT)):  # ignored in a script's background; `kill -INT` shall end it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _as_ctrl_c)
    if not isinstance(sys.unraisablehook, _RaiseAgain):
        sys.unraisablehook = _RaiseAgain(sys.unraisablehook)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Do what Ctrl-C would do now."""
    handler = signal.getsignal(signal.SIGINT)
    if callable(handler):  # and not ignored, as where an end has begun
        handler(signal.SIGINT, frame)


class _RaiseAgain:
    """Python prints what is raised in a `__del__` or a weak reference's callback, and goes on. An interrupt is raised
    again instead, at the next call behind that; where this is such a callback too, once more."""

    def __init__(self, others: Callable[[Any], Any]) -> None:
        """others: is told of every other exception."""
        self.others = others

    def __call__(self, unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            sys.setprofile(self._at_next_call)
        else:
            self.others(unraisable)

    def _at_next_call(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code is not _RaiseAgain.__call__.__code__:
            sys.setprofile(None)
            _as_ctrl_c(signal.SIGINT, frame)
