"""Fixtures of the Metal backend's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import metal_emulator
import mlx.core as mx
import pytest
from metal_runs import REAL

from kernels import metal


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> metal_emulator.Emulator:
    return metal_emulator.Emulator(tmp_path_factory.mktemp("metal"))


@pytest.fixture
def launches(emulator: metal_emulator.Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels launched, in order; emulated where there is no Metal."""
    names: list[str] = []
    launch: Callable[..., list[mx.array]] = metal.launch if REAL else emulator.launch

    def noted(name: str, *arguments: Any) -> list[mx.array]:
        names.append(name)
        return launch(name, *arguments)

    monkeypatch.setattr(metal, "launch", noted)
    yield names
