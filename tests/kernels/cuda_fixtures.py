"""Fixtures of the CUDA backend's emulated tests."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_emulator
import mlx.core as mx
import pytest
from cuda_runs import LAUNCH

from kernels.cuda import attend, fused, products
from kernels.cuda.launch import kernel


@pytest.fixture(scope="session")
def session_emulator(tmp_path_factory: pytest.TempPathFactory) -> cuda_emulator.Emulator:
    return cuda_emulator.Emulator(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def emulated(
    session_emulator: cuda_emulator.Emulator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[cuda_emulator.Emulator]:
    """All launches go to the emulator: in a fixed order on four multiprocessors, until a test says otherwise."""
    session_emulator.seed, session_emulator.multiprocessors, session_emulator.resident = 0, 4, None
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", session_emulator.precompiled_cuda_kernel)
    monkeypatch.setattr(LAUNCH, "machine_code", session_emulator.machine_code)
    for module in (products, fused):
        monkeypatch.setattr(module, "device_attribute", lambda name: cuda_emulator.attribute(session_emulator, name))
    monkeypatch.setattr(LAUNCH, "_prepared", {})
    # Views would hide where buffers end, and what MLX compiles holds nothing to compute with.
    monkeypatch.setattr(attend, "beginning", lambda cache: cache)
    monkeypatch.setattr(mx, "compile", lambda step: step)
    products._large_block.cache_clear()
    kernel.cache_clear()
    with mx.stream(mx.cpu):
        yield session_emulator
    kernel.cache_clear()
