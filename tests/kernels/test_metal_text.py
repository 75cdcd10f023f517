"""The text of the Metal kernels, as MLX would write it and as a Mac's compiler would read it, and what the tests would
notice in it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import metal_emulator
import mlx
import mlx.core as mx
import pytest
from arrays import normal
from attention_checks import attention_shape, caches, qkv_rows
from metal_runs import EMULATED, weights_of

from kernels import metal
from kernels.ops import Spans
from kernels.self_test import CHECKS, operation_faults

if not EMULATED:
    pytest.skip("about the emulator", allow_module_level=True)

pytest_plugins = ("metal_fixtures",)
pytestmark = pytest.mark.usefixtures("launches")


def broken(monkeypatch: pytest.MonkeyPatch, name: str, before: str, after: str) -> None:
    """Change the text of a kernel."""
    original = metal.source
    assert before in original(name)
    changed = {name: original(name).replace(before, after)}
    monkeypatch.setattr(metal, "source", lambda asked: changed.get(asked, original(asked)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "after", "fault"),
    [
        ("product_small", "+ Codes<BITS>::BIAS)", ")", "bitlinear differs"),
        ("product_small", "block < end", "block < end - 1", "bitlinear differs"),
        ("quantize_rows", "rint(value * factor)", "float(int(value * factor))", "linear, ternary differs"),
        ("quantize_rows", "i < stride", "i <= stride", "outside of a buffer"),
        ("quantize_rows", "values[i] * inverse * norm[i] : values", "values[i] * inverse : values", "ternary differs"),
        ("quantize_rows", "+ as_type<float>(dims[3])", "", "ternary differs"),
        ("ternary_large", "sums_of[2][4];", "sums_of[2][4]", "In function"),
        ("ternary_large", "& 3u) - 1", "& 3u)", "bitlinear differs"),
        ("dense_small", "partial[OUTPUTS][M];", "partial[OUTPUTS][M - 1];", "float differs"),
        ("attend", "offset + line / group + 1", "offset + lines / group", "attention gives a row other bits"),
        ("attend", "long(sequence * kv_heads + kv_head)", "long(kv_head)", "attention gives a row other bits"),
        ("attend", "* group + row * group", "* group", "attention gives a row other bits"),
        ("rope", "float(positions[row])", "float(positions[0] + row)", "attention gives a row other bits"),
        ("combine", "positions[row] / LANES", "positions[0] / LANES", "attention gives a row other bits"),
        ("attend", "min(first + l, lines - 1)", "first + l", "outside of a buffer"),
        ("attend", "if (key < seen[l]) {", "if (key < seen[l] - lane) {", "different operations"),
        ("common", "threadgroup_barrier(mem_flags::mem_threadgroup);\n  if", "if", "differs"),
        ("choose", "rest -= stretch_of.before;", "", "choose differs"),
        ("choose", "rest -= group_of.before;", "", "choose differs"),
        ("choose", "i < n ? weight_of", "i <= n ? weight_of", "outside of a buffer"),
        ("top_k", "counts[index - apart]", "counts[index]", "top_k"),
        ("top_k", "line[i] - top, temperatures", "line[i], temperatures", "top_k differs"),
        ("common", "logit == 0.0f ? 0u : as_type", "as_type", "top_k differs"),
    ],
)
def test_a_broken_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, before: str, after: str, fault: str
) -> None:
    broken(monkeypatch, name, before, after)
    first = sorted(CHECKS.items(), key=lambda check: not fault.startswith(check[0]))  # what shows it
    monkeypatch.setattr("kernels.self_test.CHECKS", dict(first))
    assert any(fault in found for _, found in operation_faults(metal) if found is not None)


@pytest.mark.parametrize(
    ("declared", "used"),
    [
        ("inline float divide(float a, float b) { return a / b; }", "divide(1.0f, 2.0f)"),
        ("inline int popcount(int a) { return a; }", "popcount(1)"),
        ("inline float simd_sum(float a) { return a; }", "simd_sum(1.0f)"),
        ("constant constexpr int level = 3;", "level"),
        ("inline float log1p(float a) { return a; }", "log1p(1.0f)"),  # MLX's own
        ("inline double twice(float a) { return 2 * a; }", "twice(1.0f)"),  # Metal has no such type
    ],
)
def test_words_that_metal_or_mlx_have_taken_are_noticed(
    monkeypatch: pytest.MonkeyPatch, declared: str, used: str
) -> None:
    before = "inline float gated("
    broken(monkeypatch, "common", before, f"{declared}\ninline float user() {{ return {used}; }}\n{before}")
    with pytest.raises(RuntimeError, match=r"ambiguous|redefinition|poisoned"):
        metal.rms_norm(normal(1, 8), normal(8), 0.5)


Launch = tuple[str, metal.Inputs, metal.Outputs, tuple[int, int, int], int, metal.Template]


@pytest.fixture
def every_launch(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Of every kernel, with inputs of few elements and of many, for few rows and many: none is run."""
    found: dict[str, Launch] = {}

    def note(*launch: Any) -> list[mx.array]:
        name, inputs, outputs, _, _, template = launch
        found.setdefault(as_mlx_writes_it("kernel", name, inputs, outputs, template), launch)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs.values()]

    monkeypatch.setattr(metal, "launch", note)
    kinds = ("ternary", "int8", "bfloat16", "float32")
    for kind, (n, k), m in itertools.product(kinds, ((2, 1), (24, 68)), (1, 2, 8, 40)):
        weight, x = weights_of(kind, n, k)[0], normal(m, k)
        metal.linear(x, weight)
        metal.linear(x, weight, norm=normal(k), eps=0.5, epilogue="silu_mul", residual=normal(m, n // 2))
        metal.quantize_rows(x)
    for m in (1, 9):
        metal.choose(normal(m, 40), normal(m), normal(m))
        metal.top_k(normal(m, 40), 3, (1.0, 0.5))
    for spans, d in itertools.product((Spans((40,), (1,)), Spans((40, 2), (8, 3))), (32, 64, 128)):
        shape = attention_shape(4, 2, d)
        metal.attention(qkv_rows(shape, spans.rows), *caches(shape, spans.offsets, 60), spans, shape)
    kernels = {path.stem for path in Path(metal.__file__).parent.glob("*.metal")} - {"common"}
    assert {name for name, *_ in found.values()} == kernels
    return list(found.values())


def as_mlx_writes_it(
    called: str, name: str, inputs: metal.Inputs, outputs: metal.Outputs, template: metal.Template
) -> str:
    text = metal_emulator.function(called, name, inputs, outputs, template)
    return text + metal_emulator.instantiation(called, template)


def test_the_emulator_writes_kernels_as_mlx_does(
    every_launch: list[Launch], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLX writes a kernel's text without Metal too, when a function with it is exported."""
    for name, inputs, outputs, grid, threads, template in every_launch:
        kernel = metal._kernel(name, tuple(inputs), tuple(outputs))
        options = {
            "template": list(template.items()),
            "grid": (grid[0] * threads, *grid[1:]),
            "threadgroup": (threads, 1, 1),
            "output_shapes": [shape for shape, _ in outputs.values()],
            "output_dtypes": [dtype for _, dtype in outputs.values()],
            "verbose": True,
        }
        mx.export_function(
            str(tmp_path / "one.mlxfn"), lambda *arrays, k=kernel, o=options: k(inputs=arrays, **o), *inputs.values()
        )
        written = capfd.readouterr().out.partition("```\n")[2].rpartition("```")[0]
        written = re.sub(r"custom_kernel_\w+", "kernel", re.sub(r"\[\[.*?\]\]", "", written))
        ours = metal.source("common") + as_mlx_writes_it("kernel", name, inputs, outputs, template)
        assert "".join(written.split()) == "".join(ours.replace("[[kernel]]", "").split()), name


def test_address_spaces_are_kept_apart(every_launch: list[Launch]) -> None:
    """A clang knows them, which is not on every machine; a Mac's compiler refuses what mixes them."""
    clang = metal_emulator.clang()
    if clang is None:
        pytest.skip("no clang++ that knows _Float16")
    text = metal.source("common")
    for i, (name, inputs, outputs, _, _, template) in enumerate(every_launch):
        text += as_mlx_writes_it(f"kernel_{i}", name, inputs, outputs, template)
    assert metal_emulator.complaints(clang, text) == ""
    for before, after in (
        ("const auto values = x", "const device float* values = x"),
        ("group_max(float value, Partial partial", "group_max(float value, float* partial"),
    ):
        assert before in text
        assert "error" in metal_emulator.complaints(clang, text.replace(before, after)), after


def test_the_names_that_mlx_takes_are_known() -> None:
    """Those of the headers that MLX puts before a kernel."""
    headers = Path(next(iter(mlx.__path__))) / "include/mlx/backend/metal/kernels"
    known = (metal_emulator.FOLDER / "metal_names.h").read_text()
    known += (metal_emulator.FOLDER / "metal_emulator.h").read_text()
    start = r"^(?:typedef \w+|using|struct|#define|(?:inline|METAL_FUNC|static|constexpr)\b[^({=;\n]*?)"
    declaration = re.compile(start + r"\s(\w+)(?=\s*[({=;\n]|$)", re.MULTILINE)
    names: set[str] = set()
    for file in ("utils", "bf16", "bf16_math", "complex", "defines", "logging"):
        names.update(declaration.findall((headers / f"{file}.h").read_text()))
    assert len(names) > 25
    assert [name for name in names - {"int64_t"} if not re.search(rf"\b{name}\b", known)] == []
