"""`decode plan`: bytes against loaded models, predictions against their formula, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import readers
from conftest import ROOT, TEACHER, Command

from decode.chips import APPLE, chip_of
from decode.models.checkpoint import find_model, find_teacher
from decode.models.dimensions import Dimensions
from decode.plan import DRAFTS, Costs, break_even, draft_bytes, make_plan, teacher_bytes, tokens_per_verification
from kernels.ops import DenseWeight, TernaryWeight

DRAFT = ROOT / "checkpoints" / "bitnet-smol-116m-draft"
LINEARS_2B = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]
BITNET_2B = {
    "num_hidden_layers": 30, "hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 5,
    "intermediate_size": 6912, "vocab_size": 128256,
}  # fmt: skip


def shape_of(folder: Path) -> Dimensions:
    return Dimensions.of(json.loads((folder / "config.json").read_text()), "here")


def planned(inside: Command, *options: object) -> dict[str, Any]:
    done = inside("decode", "plan", *options, "--json", "-")
    assert done.code == 0, done.err
    value: dict[str, Any] = json.loads(done.out)
    return value


@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_a_teachers_bytes_are_those_of_the_loaded_model(head: Any) -> None:
    model = find_model(str(TEACHER), "--teacher").load("int8" if head == "int8" else "float")
    weights = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    read = teacher_bytes(shape_of(TEACHER), head, 0)
    scales = 4 * sum(w.n for w in weights)
    assert read["ternary"] == sum(w.n * w.k for w in weights) // 4 + scales
    scale = 0 if isinstance(model.head, DenseWeight) else 4 * model.head.n
    assert read["head"] == model.head.n * model.head.k * (2 if head == "bf16" else 1) + scale
    cache = model.new_cache()
    cache.reserve(256)
    assert teacher_bytes(shape_of(TEACHER), head, 256)["cache"] == sum(a.nbytes for a in [*cache.keys, *cache.values])


@pytest.mark.parametrize(("folder", "bits"), [(DRAFT, 8), (TEACHER, 2)])
def test_a_drafts_bytes_are_those_of_the_loaded_model(folder: Path, bits: int) -> None:
    model = find_model(str(folder), "--draft").load("int8", "int8")  # a ternary one stays ternary
    weights = [w for layer in model.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    assert {isinstance(w, TernaryWeight) for w in weights} == {bits == 2}
    read = draft_bytes(shape_of(folder), 0)
    assert read["layers"] == sum(w.n * w.k * bits // 8 + 4 * w.n for w in weights)
    assert read["head"] == model.head.n * model.head.k + 4 * model.head.n
    assert read["total"] == sum(size for part, size in read.items() if part != "total")


@pytest.mark.parametrize(("hidden", "ternary"), [(64, False), (576, True)])
def test_a_readers_bytes_are_those_of_the_loaded_draft(
    small_teacher: Path, tmp_path: Path, hidden: int, ternary: bool
) -> None:
    folder = readers.make(tmp_path / "d", small_teacher, hidden, ternary=ternary, kept=300)
    teacher = find_teacher(str(small_teacher)).load()
    draft = readers.load(folder, small_teacher, teacher, "int8")
    weights = [w for layer in draft.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    weights += [draft.fusion, draft.input, *([] if draft.output is None else [draft.output])]
    read = draft_bytes(shape_of(folder), 0)
    expected = sum(w.n * w.k * (2 if ternary else 8) // 8 + 4 * w.n for w in weights)
    assert read["layers"] == expected
    head = draft.for_text([1, 2]).head
    assert read["head"] == head.n * head.k + 4 * head.n


def test_bitnet_2b(inside: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BITNET_2B))
    shape = Dimensions.of(BITNET_2B, "here")
    assert shape.weights == 30 * sum(n * k for n, k in LINEARS_2B)
    plan = planned(inside, "--teacher", tmp_path, "--chip", "M5", "--context", 0)
    read = plan["bytes_per_token"]
    assert read["total"] == pytest.approx(1.18e9, rel=0.01) and read["head"] == 2 * 128256 * 2560
    assert read["ternary"] == pytest.approx(521e6, rel=0.01)
    assert plan["plain_tok_per_s"] == pytest.approx(130, rel=0.01)  # 1.18 GB a token at 153 GB/s
    assert planned(inside, "--teacher", tmp_path / "config.json", "--chip", "m5", "--head", "int8", "--context", 0)[
        "plain_tok_per_s"
    ] == pytest.approx(180, rel=0.01)


def test_predictions_of_a_draft(inside: Command) -> None:
    plan = planned(
        inside, "--draft", DRAFT / "config.json", "--bandwidth", 50, "--acceptance", 0.7, "--verify-ratio", 1.3
    )
    assert [entry["k"] for entry in plan["predictions"]] == list(range(1, 9))
    cost = plan["draft_bytes_per_token"]["total"] / plan["bytes_per_token"]["total"]
    third = plan["predictions"][2]
    assert third["tokens_per_verification"] == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    assert third["speedup"] == pytest.approx(2.533 / (1.3 + 3 * cost))
    assert third["tok_per_s"] == pytest.approx(plan["plain_tok_per_s"] * third["speedup"])
    best = max(plan["predictions"], key=lambda entry: entry["speedup"])
    assert plan["best_k"] == {"0.7": best["k"]}
    alone = planned(inside, "--bandwidth", 50, "--acceptance", 0.7, "--verify-ratio", 1.3)
    assert plan["best_draft"] == alone["best_draft"] and set(plan["best_draft"]) == {"0.7"}
    even = plan["break_even_acceptance"]
    assert Costs(cost, 1.3).best_speedup(even) == pytest.approx(1, abs=1e-6)


def test_a_draft_as_costly_as_its_teacher_never_pays() -> None:
    assert break_even(Costs(1.0)) is None or break_even(Costs(1.0)) == pytest.approx(1)
    assert break_even(Costs(1.5)) is None
    assert tokens_per_verification(1.0, 3) == 4 and tokens_per_verification(0.0, 3) == 1


def test_without_a_draft_sizes_are_compared() -> None:
    plan = make_plan(Dimensions.of(BITNET_2B, "here"), None, bandwidth=273, acceptances=(0.6, 0.8))
    by_size = {(size["layers"], size["hidden"], size["vocab"]): size for size in plan["drafts"]}
    whole, trimmed = by_size[6, 768, 128256], by_size[6, 768, 32064]
    assert trimmed["bytes_per_token"]["head"] < whole["bytes_per_token"]["head"] / 3.9
    assert trimmed["speedup"]["0.6"] > whole["speedup"]["0.6"] > 1
    for acceptance, best in plan["best_draft"].items():
        free = Costs(0.0).best_speedup(float(acceptance))
        kept = by_size[best["layers"], best["hidden"], best["vocab"]]["speedup"][acceptance] / free
        larger = [s for s in plan["drafts"] if s["layer_parameters"] > Dimensions.of_draft(
            best["layers"], best["hidden"], kv_ratio=0.25, vocab=128256).weights]  # fmt: skip
        assert kept >= 0.8 and all(s["speedup"][acceptance] < 0.8 * free for s in larger)
    assert {entry["acceptance"] for entry in plan["predictions"]} == {0.6, 0.8}
    for acceptance, k in plan["best_k"].items():  # predictions are those of the best size
        best = plan["best_draft"][acceptance]
        size = by_size[best["layers"], best["hidden"], best["vocab"]]
        fastest = max(
            (p for p in plan["predictions"] if p["acceptance"] == float(acceptance)), key=lambda p: p["speedup"]
        )
        assert (fastest["k"], fastest["speedup"]) == (k, size["speedup"][acceptance])


def test_what_does_not_pay_is_never_best(inside: Command) -> None:
    plan = planned(inside, "--bandwidth", 50, "--acceptance", 0)
    assert plan["best_draft"] == {"0": None} and plan["predictions"] == []
    assert plan["drafts"] and all(size["speedup"]["0"] < 1 for size in plan["drafts"])
    assert "none pays at a = 0" in inside("decode", "plan", "--bandwidth", 50, "--acceptance", 0).out


def test_sizes_are_those_that_training_makes() -> None:
    from distill.training.draft_config import DraftConfig

    for layers, hidden in ((2, 256), (6, 768)):
        config = DraftConfig.for_teacher(TEACHER, layers, hidden)
        assert Dimensions.of(config.to_json(), "here") == Dimensions.of_draft(
            layers, hidden, kv_ratio=shape_of(TEACHER).kv_ratio, vocab=16384
        )


def test_for_readers(inside: Command) -> None:
    done = inside("decode", "plan", "--chip", "Apple M4 Pro", "--draft", DRAFT)
    assert done.code == 0 and "273 GB/s (M4 Pro, as published)" in done.out and "not measured" in done.out
    for text in (done.out, inside("decode", "plan", "--chip", "m1").out):
        assert "read for a token" in text and "plain decoding at most" in text and "best draft size: 2 x 256" in text
        assert len(re.findall(r"^  [1-8] +\d+ \(", text, re.MULTILINE)) == 8  # a row of tok/s for each k


def test_devices_by_the_names_of_their_drivers() -> None:
    for device, chip in (
        ("Apple M4 Pro", "M4 Pro"), ("Apple M4 Max", "M4 Max"), ("Apple M1", "M1"), ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ):  # fmt: skip
        assert chip_of(device) == chip
    for unknown in ("Apple M10", "Apple A18 Pro", "Apple Paravirtual device", "Intel Core m3-7Y30", "AMD EPYC", "",
                    "NVIDIA RTX A1000", "NVIDIA GH200 480GB"):  # fmt: skip
        assert chip_of(unknown) is None


def test_the_tables_of_the_docs() -> None:
    """docs/plan.md, row by row, from the program."""
    text = (ROOT / "docs" / "plan.md").read_text()
    teacher, draft = (
        Dimensions.of(BITNET_2B, "here"),
        Dimensions.of_draft(6, 768, kv_ratio=0.25, vocab=128256, head_rows=32064),
    )

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.strip("| ").split("|")]

    chips = {row[0]: row[1:] for row in map(cells, re.findall(r"^\| M\d.*", text, re.MULTILINE))}
    assert list(chips) == list(APPLE)
    for chip, row in chips.items():
        wanted = [f"{APPLE[chip]:g}"]
        plans = {
            head: make_plan(teacher, draft, bandwidth=APPLE[chip], head=head)  # type: ignore[arg-type]
            for head in ("bf16", "int8")
        }
        wanted += [f"{plan['plain_tok_per_s']:.0f}" for plan in plans.values()]
        for head, acceptance in (("bf16", 0.6), ("bf16", 0.7), ("int8", 0.7)):
            speeds = [p["tok_per_s"] for p in plans[head]["predictions"] if p["acceptance"] == acceptance]
            wanted.append(f"{max(speeds):.0f}")
        assert row == wanted

    sizes = [cells(line) for line in re.findall(r"^\| \d+ x .*", text, re.MULTILINE)]
    plan = make_plan(teacher, None, bandwidth=100)
    assert len(sizes) == len(plan["drafts"]) == 2 * len(DRAFTS)
    for row, size in zip(sizes, plan["drafts"], strict=True):
        speedups = [f"{size['speedup'][a]:.2f} (k={size['k'][a]})" for a in size["speedup"]]
        megabytes, even = f"{size['bytes_per_token']['total'] / 1e6:.0f}", f"{size['break_even_acceptance']:.2f}"
        assert row == [f"{size['layers']} x {size['hidden']}", f"{size['vocab']:,}", megabytes, even, *speedups]


def test_bad_input(inside: Command, tmp_path: Path) -> None:
    def refused(*options: object, parts: tuple[str, ...]) -> None:
        inside("decode", "plan", *options).refused("decode", *parts)

    refused("--chip", "M4 Prro", parts=("--chip M4 Prro", "did you mean M4 Pro?"))
    refused("--chip", "M1", "--bandwidth", 10, parts=("--chip M1", "--bandwidth"))
    refused("--chip", "abacus", parts=("--chip abacus", "known are M1, ", "--bandwidth"))
    for number in (0, "nan", "inf"):
        refused("--bandwidth", number, parts=(f"--bandwidth {number}",))
    refused("--bandwidth", 50, "--acceptance", 1.5, parts=("--acceptance 1.5",))
    for number in (0.5, "nan", "inf"):
        refused("--bandwidth", 50, "--verify-ratio", number, parts=(f"--verify-ratio {number}",))
    refused("--bandwidth", 50, "--context", -1, parts=("--context -1",))
    refused("--bandwidth", 50, "--teacher", tmp_path / "none", parts=("--teacher", "no such file"))
    refused("--bandwidth", 50, "--teacher", "~nobody-here", parts=("--teacher ~nobody-here", "no such file"))
    refused("--bandwidth", 50, "--teacher", "maker/none", parts=("--teacher maker/none", "never downloaded"))
    refused("--bandwidth", 50, "--teacher", DRAFT, parts=("--teacher", "not a BitNet", "'llama'"))
    refused("--bandwidth", 50, "--teacher", tmp_path, parts=("config.json: missing",))
    (tmp_path / "config.json").write_text(json.dumps({**BITNET_2B, "hidden_size": "wide"}))
    refused("--bandwidth", 50, "--draft", tmp_path, parts=("--draft", "wide"))
    (tmp_path / "config.json").write_text(json.dumps({**BITNET_2B, "vocab_size": 0}))
    refused("--bandwidth", 50, "--draft", tmp_path, parts=("--draft", "vocab_size is 0, not positive"))
    (tmp_path / "config.json").write_text(
        json.dumps({**BITNET_2B, "num_attention_heads": 5, "num_key_value_heads": 20})
    )
    for option in ("--draft", "--teacher"):
        refused("--bandwidth", 50, option, tmp_path, parts=(option, "num_attention_heads is 5", "which is 20"))
    four_bits = {**BITNET_2B, "model_type": "llama", "weight_bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(four_bits))
    refused("--bandwidth", 50, "--teacher", tmp_path, parts=("--teacher", "weight_bits"))
