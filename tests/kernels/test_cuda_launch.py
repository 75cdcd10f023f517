"""How the CUDA backend's kernels are compiled and kept, without a GPU: what the compiler gives back is made up here."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kernels import cuda
from kernels.cuda import nvrtc
from kernels.cuda.launch import kernel_text, machine_code
from kernels.ops import Spans

assert cuda.NAME == "cuda"
LAUNCH = sys.modules["kernels.cuda.launch"]  # in the package, its name stands for the function


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The symbols of the kernels that were compiled, in order, for an H100; the cache folder is `tmp_path`/cache."""
    symbols: list[str] = []

    def compile_text(text: str, name: str, target: str) -> bytes:
        symbols.append(name)
        return f"{text} for {target}".encode()

    monkeypatch.setattr(nvrtc, "architecture", lambda: "sm_90")
    monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "compile_text", compile_text)
    monkeypatch.setattr(LAUNCH, "cache_folder", lambda: tmp_path / "cache")
    return symbols


def test_a_kernel_is_compiled_once_for_all_processes(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = machine_code("a", "text")
    assert machine_code("a", "text") == code == b"text for sm_90" and compiled == ["a"]
    assert machine_code("b", "other") == b"other for sm_90" and compiled == ["a", "b"]
    monkeypatch.setattr(nvrtc, "version", lambda: "13.1")
    machine_code("a", "text")
    monkeypatch.setattr(nvrtc, "architecture", lambda: "sm_100")
    assert machine_code("a", "text") == b"text for sm_100" and compiled == ["a", "b", "a", "a"]


def test_damaged_machine_code_is_compiled_anew(compiled: list[str], tmp_path: Path) -> None:
    code = machine_code("a", "text")
    (file,) = (tmp_path / "cache" / "cuda").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], whole[:-1] + b"?"):
        file.write_bytes(damaged)
        assert machine_code("a", "text") == code
        assert file.read_bytes() == whole
    assert compiled == ["a"] * 5


def test_a_cache_that_cannot_be_written_costs_time_only(compiled: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    for _ in range(2):
        assert machine_code("a", "text") == b"text for sm_90"
    assert compiled == ["a", "a"]


def test_a_symbol_stands_for_all_that_a_kernel_depends_on() -> None:
    inputs, outputs = (("x", mx.float32), ("norm", mx.float32), ("sizes", mx.int32)), (("y", mx.float32),)
    constants = (("EPS", 1), ("THREADS", 256))
    symbol, text = kernel_text("rms_norm", inputs, outputs, constants, "", None)
    assert f"void {symbol}(const float* x, const float* norm, const int32_t* sizes, float* y) {{" in text
    others = [
        kernel_text("combine", inputs, outputs, constants, "", None),
        kernel_text("rms_norm", (("x", mx.bfloat16), *inputs[1:]), outputs, constants, "", None),
        kernel_text("rms_norm", inputs, outputs, (("EPS", 2), ("THREADS", 256)), "", None),
        kernel_text("rms_norm", inputs, outputs, constants, "// more", None),
        kernel_text("rms_norm", inputs, outputs, constants, "", (256, 1)),
        kernel_text("rms_norm", inputs, outputs, constants, "", (256, 2)),
    ]
    assert len({symbol, *(other for other, _ in others)}) == 7


@pytest.mark.parametrize(
    ("device", "best"), [(90, "sm_90"), (75, "sm_75"), (93, "compute_90"), (130, "compute_120"), (60, None)]
)
def test_a_gpu_that_the_compiler_does_not_know_gets_ptx(
    device: int, best: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [75, 80, 90, 100, 120]
    if best is None:
        monkeypatch.setattr(nvrtc, "version", lambda: "13.0")
        with pytest.raises(RuntimeError, match=r"NVRTC 13.0 knows no GPU as old as compute capability 6.0"):
            nvrtc.best_architecture(device, known)
    else:
        assert nvrtc.best_architecture(device, known) == best


def test_without_a_compiler_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "LIBRARIES", ("libnvrtc-of-nobody.so.1",))
    nvrtc.library.cache_clear()
    with pytest.raises(OSError, match="libnvrtc-of-nobody"):
        nvrtc.library()


def test_rows_are_grouped_by_sequence() -> None:
    spans = Spans((4, 0, 7, 30, 2), (3, 0, 20, 9, 1))
    assert np.array(spans.positions).tolist() == [4, 5, 6, *range(7, 27), *range(30, 39), 2]
    assert np.array(spans.sequences).tolist() == [0] * 3 + [2] * 20 + [3] * 9 + [4]
    groups = [[0, 0, 3, 4], [2, 3, 8, 7], [2, 11, 8, 15], [2, 19, 4, 23], [3, 23, 8, 30], [3, 31, 1, 38], [4, 32, 1, 2]]
    assert np.array(spans.groups).tolist() == groups
    assert np.array(spans.groups_of(64))[:, 1:3].tolist() == [[0, 3], [3, 20], [23, 9], [32, 1]]
    assert np.array(Spans((5, 0), (0, 0)).groups).shape == (0, 4)
