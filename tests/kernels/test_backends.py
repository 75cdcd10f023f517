"""Which backend is chosen, what happens without one, and that a wrong one is found out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from conftest import ROOT, SHIPPED, environment

from kernels import reference
from kernels.backends import CHOICES, FALLBACKS, device_backend, with_fallbacks
from kernels.ops import Backend
from kernels.self_test import CHECKS, operation_faults, self_test

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


def backend_with(**replaced: Any) -> Any:
    """The reference, some of its operations replaced."""
    operations = {name: getattr(reference, name) for name in dir(reference) if not name.startswith("_")}
    return SimpleNamespace(**{**operations, "NAME": "spoiled", **replaced})


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

    found: Backend = backend_with(**{operation: wrong})
    return found


@pytest.mark.parametrize("operation", ["bitlinear", "int8_linear", "linear", "attention"])
def test_one_wrong_bit_is_found(operation: str) -> None:
    fault = self_test(spoiled(operation))
    assert fault is not None and operation in fault


def linear_that(**changed: Any) -> Callable[..., mx.array]:
    """The reference's, that takes an option for another."""
    return lambda x, weight, **options: reference.linear(x, weight, **{**options, **changed})


def only_few(operation: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """An operation that is wrong for more than eight rows."""
    return lambda x, *rest, **options: operation(x, *rest, **options) * (1 if x.shape[0] <= 8 else 1.05)


def without_square(x: mx.array, weight: Any, **options: Any) -> mx.array:
    if options.get("epilogue") != "relu2_mul":
        return reference.linear(x, weight, **options)
    y = reference.linear(x, weight, **{**options, "epilogue": None})
    return mx.maximum(y[:, :12], 0) * y[:, 12:]


@pytest.mark.parametrize(
    ("operation", "wrong", "fault"),
    [
        ("attention", lambda qkv, *rest: reference.attention(qkv * 1.01, *rest), "attention differs"),
        ("linear", linear_that(residual=None), "linear, ternary differs"),
        ("linear", linear_that(eps=0.0), "linear, ternary differs"),
        ("linear", linear_that(norm=None), "linear, ternary differs"),
        ("linear", without_square, "linear, ternary differs"),
        ("linear", only_few(reference.linear), "linear, ternary differs"),
        ("bitlinear", only_few(reference.bitlinear), "bitlinear differs"),
        ("int8_linear", only_few(reference.int8_linear), "int8_linear differs"),
        ("argmax", lambda x: mx.argmin(x, axis=-1), "argmax differs"),
    ],
)
def test_a_wrong_result_is_found_though_it_is_the_same_for_all_rows(
    operation: str, wrong: Callable[..., Any], fault: str
) -> None:
    assert fault in (self_test(backend_with(**{operation: wrong})) or "")


def forgets(step: Any, tokens: Any, keys: list[mx.array], values: list[mx.array], offset: int) -> mx.array:
    """Begins with empty caches."""
    return step(tokens, [0 * k for k in keys], [0 * v for v in values], offset)


@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"epilogue": "relu2_mul"}, "of int8 layers differs from the reference"),  # where SiLU is asked for
        ({"call": forgets}, "gives a row other bits among others than alone"),
        ({"greedy": lambda step, *rest: step.greedy_tokens(*rest[:-1], None)}, "of int8 layers chooses other tokens"),
    ],
)
def test_a_wrong_fused_step_is_found(changed: dict[str, Any], fault: str) -> None:
    from kernels import cpu

    class Wrong(cpu.CpuFusedStep):
        def __init__(self, **model: Any) -> None:
            super().__init__(**model | {name: changed[name] for name in changed.keys() & {"epilogue"}})

        def __call__(self, *arguments: Any) -> mx.array:
            if "call" in changed:
                return changed["call"](super().__call__, *arguments)
            return super().__call__(*arguments)

        def greedy_tokens(self, *arguments: Any) -> mx.array:
            if "greedy" in changed:
                return changed["greedy"](super(), *arguments)
            return super().greedy_tokens(*arguments)

    operations = {name: getattr(cpu, name) for name in dir(cpu) if not name.startswith("__")}
    faults = dict(operation_faults(SimpleNamespace(**{**operations, "fused_step": Wrong})))  # type: ignore[arg-type]
    assert f"fused step {fault}" in (faults.pop("fused step") or "")
    assert not any(faults.values())


@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (lambda model: {"epilogue": "relu2_mul"}, "differs from the reference"),
        (lambda model: {"feature_norms": model["feature_norms"][::-1]}, "differs from the reference"),
        (lambda model: {"embedding_norm": 1.1 * model["embedding_norm"]}, "differs from the reference"),
        (lambda model: {"final_norm": mx.ones(64)}, "proposes other tokens"),
    ],
)
def test_a_wrong_fused_reader_is_found(changed: Callable[[dict[str, Any]], dict[str, Any]], fault: str) -> None:
    from kernels import cpu

    operations = {name: getattr(cpu, name) for name in dir(cpu) if not name.startswith("__")}
    operations["fused_reader"] = lambda **model: cpu.CpuFusedReader(**model | changed(model))
    faults = dict(operation_faults(SimpleNamespace(**operations)))  # type: ignore[arg-type]
    assert f"fused reader {fault}" in (faults.pop("fused reader") or "")
    assert not any(faults.values())


@pytest.mark.slow
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
@pytest.mark.parametrize("operation", ["bitlinear", "int8_linear", "attention", "argmax", "fused_step", "fused_reader"])
def test_what_fails_is_the_references_and_the_rest_stays_native(operation: str) -> None:
    from kernels import cpu

    def wrong(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("does not compile here")

    operations = {name: getattr(cpu, name) for name in dir(cpu) if not name.startswith("_")} | {operation: wrong}
    native: Any = SimpleNamespace(**operations)
    failed = [name for name, fault in operation_faults(native) if fault is not None]
    assert failed == [operation.replace("fused_", "fused ")]
    found = with_fallbacks(native, failed)
    assert self_test(found) is None
    assert getattr(found, operation) is getattr(reference, operation) and found.fused_step is reference.fused_step
    weight = found.prepare_int8(mx.ones((16, 16)))
    assert (weight.data.dtype == mx.uint8) == (operation != "int8_linear")  # tiles, or the reference's layout
    assert (found.attention is cpu.attention) == (operation != "attention")


def test_every_check_says_what_it_takes_along() -> None:
    assert FALLBACKS.keys() == CHECKS.keys()


SPOIL = """
import mlx.core as mx
from kernels import backend, cpu
def spoil(name, right):
    setattr(cpu, name, lambda x, *args, **options: right(x * 1.5, *args, **options))
"""


@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
def test_where_no_product_is_right_the_reference_is_used_with_one_warning() -> None:
    done = shell(SPOIL + "spoil('linear', cpu.linear); backend(); " + SHOW, BITDRAFT_KERNELS="")
    assert done.stdout == "reference\n"
    assert done.stderr.count("UserWarning") == 1 and "linear, float differs from the reference" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
def test_speculation_changes_nothing_where_some_kernels_are_replaced_with_one_warning(small_teacher: Path) -> None:
    script = f"""
spoil("attention", cpu.attention)
spoil("bitlinear", lambda x, *rest: cpu.int8_linear(x, *rest))
from decode.models.checkpoint import find_model
from decode.drafters.model import ModelDrafter
from decode.engine import Request, generate
teacher = find_model({str(small_teacher)!r}, "--teacher").load("int8")
draft = find_model({str(SHIPPED)!r}, "--draft").load()
def say(drafter):
    rounds = list(generate(teacher, Request([5, 6, 7], 8), drafter, 3))
    return [token for step in rounds for token in step.tokens]
assert say(ModelDrafter(draft)) == say(None)
"""
    done = shell(SPOIL + script + SHOW, BITDRAFT_KERNELS="")
    assert done.stdout == "cpu\n", done.stderr
    assert done.stderr.count("UserWarning") == 1, done.stderr
    assert "attention differs" in done.stderr and "bitlinear" in done.stderr and "for these" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
@pytest.mark.parametrize(
    ("before", "complaint"),
    [
        ("import mlx.core as mx; mx.__version__ = '0.1.2'", "was built for MLX"),
        (
            "from kernels.cpu import _native as n; n.sources = 'other'; del sys.modules['kernels.cpu']",
            "other sources",
        ),
        ("sys.modules['kernels.cpu._native'] = None", "cannot be loaded"),
    ],
)
def test_an_extension_that_does_not_fit_is_not_used_and_says_how_to_build_it(before: str, complaint: str) -> None:
    start = f"import sys; {before}; "
    done = shell(start + SHOW, BITDRAFT_KERNELS="")
    assert done.stdout == "reference\n", done.stderr
    assert complaint in done.stderr and "pip install" in done.stderr and done.stderr.count("UserWarning") == 1
    forced = shell(start + SHOW, BITDRAFT_KERNELS="cpu")
    assert forced.stdout == "" and "UserError: BITDRAFT_KERNELS=cpu: " in forced.stderr and complaint in forced.stderr


@pytest.mark.slow
@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
@pytest.mark.parametrize(
    ("variable", "value"),
    [("BITDRAFT_ISA", "sse9"), *(("BITDRAFT_THREADS", value) for value in ("two", "0", "257"))],
)
def test_a_variable_that_makes_no_sense_is_refused(variable: str, value: str) -> None:
    done = shell(SHOW, BITDRAFT_KERNELS="", **{variable: value})
    assert done.stdout == "" and f"UserError: {variable}={value}: " in done.stderr


@pytest.mark.skipif(len(candidates()) == 1, reason="the native kernels are not built here")
def test_a_damaged_blas_costs_speed_only(tmp_path: Path) -> None:
    (tmp_path / "libscipy_openblas.so").write_bytes(b"\x7fELF, or not")
    damage = f"from kernels import cpu; cpu.find_openblas = lambda: {str(tmp_path / 'libscipy_openblas.so')!r}; "
    done = shell(damage + SHOW, BITDRAFT_KERNELS="")
    assert done.stdout == "cpu\n" and "libscipy_openblas.so" in done.stderr and "slow" in done.stderr
