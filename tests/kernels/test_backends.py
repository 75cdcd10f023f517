"""Which backend is chosen, what happens without one, and that a wrong one is found out."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from conftest import ROOT, environment

from kernels import reference
from kernels.backends import CHOICES, Backend, device_backend, self_test

SHOW = "from kernels import backend; print(backend().NAME)"
# The package as it is where no extension was built.
UNBUILT = "import sys; sys.modules['kernels.cpu._native'] = None; "


def shell(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def candidates() -> list[ModuleType]:
    try:
        from kernels import cpu
    except ImportError:
        return [reference]
    return [reference, cpu]


@pytest.mark.parametrize("candidate", candidates(), ids=lambda module: module.NAME)
def test_sound_backends_pass(candidate: Any) -> None:
    assert self_test(candidate) is None


def spoiled(operation: str) -> Backend:
    """A backend that is right but for the last bit of one value of one operation."""

    def wrong(*args: Any, **options: Any) -> Any:
        result = getattr(reference, operation)(*args, **options)
        y = result[0] if isinstance(result, tuple) else result
        m = y.shape[0]
        spoilt = mx.array(y)
        # For the float operations: only where rows stand among others.
        if operation in ("bitlinear", "int8_linear") or m > 1:
            bits = mx.array(y).view(mx.uint32)
            bits[m - 1, 3] = bits[m - 1, 3] ^ 1
            spoilt = bits.view(mx.float32)
        return (spoilt, *result[1:]) if isinstance(result, tuple) else spoilt

    names = ["prepare_ternary", "prepare_int8", "prepare_dense", "quantize_rows"]
    names += ["bitlinear", "int8_linear", "linear", "attention", "attention_batch"]
    operations = {name: getattr(reference, name) for name in names}
    return SimpleNamespace(NAME="spoiled", **{**operations, operation: wrong})  # type: ignore[return-value]


@pytest.mark.parametrize("operation", ["bitlinear", "int8_linear", "linear", "attention"])
def test_one_wrong_bit_is_found(operation: str) -> None:
    fault = self_test(spoiled(operation))
    assert fault is not None and operation in fault


def test_a_wrong_result_is_found_though_it_is_the_same_for_all_rows() -> None:
    operations = {name: getattr(reference, name) for name in dir(reference) if not name.startswith("_")}

    def no_scale(qkv: mx.array, k: mx.array, v: mx.array, offset: int, shape: Any) -> Any:
        return reference.attention(qkv * 1.01, k, v, offset, shape)

    wrong: Any = SimpleNamespace(**{**operations, "attention": no_scale})
    assert self_test(wrong) == "attention differs from the reference"

    def no_eps(x: mx.array, weight: Any, **options: Any) -> mx.array:
        return reference.linear(x, weight, **{**options, "residual": None})

    assert "linear" in (self_test(SimpleNamespace(**{**operations, "linear": no_eps})) or "")  # type: ignore[arg-type]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_backend_can_be_forced(choice: str) -> None:
    if choice not in ("reference", device_backend()):
        assert f"UserError: BITDRAFT_KERNELS={choice}: MLX runs on" in shell(SHOW, BITDRAFT_KERNELS=choice).stderr
        return
    if choice == "cpu" and len(candidates()) == 1:
        pytest.skip("the native kernels are not built here")
    done = shell(SHOW, BITDRAFT_KERNELS=choice)
    assert (done.stdout, done.stderr) == (f"{choice}\n", "")


def test_unknown_choice() -> None:
    done = shell(SHOW, BITDRAFT_KERNELS="cuda9")
    assert "UserError: BITDRAFT_KERNELS=cuda9: choose one of reference, cpu" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the native kernels are looked for on Linux only")
def test_without_the_extension_the_reference_is_used_with_one_warning() -> None:
    done = shell(UNBUILT + "from kernels import backend; backend(); " + SHOW, BITDRAFT_KERNELS="")
    assert done.stdout == "reference\n"
    assert done.stderr.count("UserWarning") == 1
    assert "native cpu kernels cannot be loaded" in done.stderr and "slow reference" in done.stderr


@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
def test_a_wrong_backend_is_replaced_with_one_warning() -> None:
    spoil = (
        "import mlx.core as mx; from kernels import cpu; right = cpu.bitlinear; "
        "cpu.bitlinear = lambda *args: right(*args) + mx.array(1e-3); "
    )
    done = shell(spoil + "from kernels import backend; backend(); " + SHOW, BITDRAFT_KERNELS="")
    assert done.stdout == "reference\n"
    assert done.stderr.count("UserWarning") == 1 and "bitlinear differs from the reference" in done.stderr
