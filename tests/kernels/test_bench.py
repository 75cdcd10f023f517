"""`python -m kernels` as its users meet it. What it measures is never judged here, only what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Result, environment

from kernels.backends import device_backend
from kernels.bench import KERNELS, Plan, Variant, rows_of
from kernels.errors import UserError

ROW_KEYS = {
    "kernel", "n", "k", "m", "threads", "seconds", "gb_per_s", "bandwidth_fraction", "ratio_to_m1", "repetitions",
}  # fmt: skip
# `python -m kernels` on a machine with little memory, of which it would stream gigabytes.
SMALL_MACHINE = """
import runpy
from kernels import bench
bench.memory_bytes = lambda: 1 << 25
runpy.run_module("kernels", run_name="__main__")
"""
SMALL = ("--shapes", "96x64,40x128", "--seconds", 0.001)


def kernels(cwd: Path, *options: object, small: bool = False) -> Result:
    done = subprocess.run(
        [sys.executable, *(("-c", SMALL_MACHINE) if small else ("-m", "kernels")), *map(str, options)],
        env=environment(XDG_CACHE_HOME=str(cwd / "cache")), cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_bench_has_a_row_for_everything_asked(tmp_path: Path) -> None:
    done = kernels(
        tmp_path, "bench", *SMALL, "--rows", "4,1", "--json", "-", "--plot", tmp_path / "cost.png", "-q", small=True
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)  # nothing else is there
    assert report.keys() >= {"device", "backend", "versions", "read_gb_per_s", "rows"}
    assert {"mlx", "python"} <= report["versions"].keys()
    assert report["read_gb_per_s"] and all(rate > 0 for rate in report["read_gb_per_s"].values())
    expected = {(name, n, k, m) for name in KERNELS for n, k in ((96, 64), (40, 128)) for m in (4, 1)}
    rows = {(row["kernel"], row["n"], row["k"], row["m"]): row for row in report["rows"]}
    assert rows.keys() == expected and len(report["rows"]) == len(expected)
    for (name, n, k, _), row in rows.items():
        assert row.keys() == ROW_KEYS
        assert row["seconds"] > 0 and row["gb_per_s"] > 0 and row["bandwidth_fraction"] > 0
        assert row["repetitions"] >= 1
        assert row["ratio_to_m1"] == pytest.approx(row["seconds"] / rows[name, n, k, 1]["seconds"])
        if device_backend() == "cpu" and report["backend"] == "cpu":
            assert row["threads"] >= 1
    weight_bytes = {
        name: rows[name, 96, 64, 1]["gb_per_s"] * rows[name, 96, 64, 1]["seconds"] * 1e9 for name in KERNELS
    }
    assert weight_bytes["bf16"] == pytest.approx(2 * 96 * 64)
    assert weight_bytes["quantized_4bit"] > weight_bytes["quantized_2bit"] > 96 * 64 / 4
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bench_prints_a_table_without_what_mlx_cannot_quantise(tmp_path: Path) -> None:
    options = ("--rows", 2, "--seconds", 0.001, "--kernels", "bitlinear,quantized_4bit")
    done = kernels(tmp_path, "bench", *options, "--shapes", "96x64,32x68", "--json", "out.json", small=True)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["kernel"], row["n"]) for row in rows] == [("bitlinear", 96), ("quantized_4bit", 96), ("bitlinear", 32)]
    assert [row["ratio_to_m1"] for row in rows] == [None] * 3
    lines = [line.split() for line in done.out.splitlines()]
    for row in rows:
        assert [row["kernel"], str(row["n"]), str(row["k"]), "2"] in [line[:4] for line in lines]
    assert "quantized_4bit is left out for 32x68" in done.err
    options = (*options[:4], "--shapes", "32x68", "--kernels", "quantized_4bit")
    done = kernels(tmp_path, "bench", *options, "-q", small=True)
    done.refused("python -m kernels", "quantized_4bit", "32x68")


def test_of_several_thread_counts_the_best_is_reported() -> None:
    def variant(m: int, threads: int, *samples: float) -> Variant:
        return Variant("bitlinear", m, threads, 1000, lambda length: None, 5, 3, list(samples))  # type: ignore[arg-type, return-value]

    variants = [variant(1, 1, 3.0, 2.0, 9.0), variant(1, 2, 2.0, 2.0, 2.0), variant(4, 1, 4.0, 5.0, 6.0)]
    one, four = rows_of([*variants, variant(4, 2, 7.0, 8.0, 1.0)], 10, 20)
    assert (one.m, one.threads, one.seconds, one.ratio_to_m1, one.repetitions) == (1, 2, 2.0, 1.0, 15)
    assert (four.m, four.threads, four.seconds, four.ratio_to_m1) == (4, 1, 5.0, 2.5)
    assert one.gb_per_s == pytest.approx(500e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shapes", "12"], ["--shapes 12", "NxK"]),
        (["--shapes", "0x64"], ["--shapes 0x64"]),
        (["--shapes", "-4x64"], ["--shapes -4x64"]),
        (["--shapes", ","], ["--shapes"]),
        (["--shapes", "9999999x9999999"], ["--shapes 9999999x9999999", "memory"]),
        (["--shapes", "1x70000"], ["--shapes 1x70000", "65536 inputs"]),
        (["--rows", "1,x"], ["--rows x"]),
        (["--rows", "0"], ["--rows 0"]),
        (["--kernels", "bitlinear,fast"], ["--kernels fast", "quantized_4bit"]),
        (["--seconds", "0"], ["--seconds 0"]),
        (["--seconds", "nan"], ["--seconds nan"]),
        (["--plot", "a.png", "--rows", "2,4"], ["--plot", "--rows"]),
        (["--plot", "no/such/a.png"], ["--plot no/such/a.png", "no/such"]),
        (["--plot", "/dev/null"], ["--plot /dev/null"]),
        (["--plot", "./a.png", "--json", "a.png"], ["--plot a.png", "--json"]),
        (["--json", "no/such/a.json"], ["--json no/such/a.json"]),
        (["--nope"], ["--nope"]),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, options: list[str], named: list[str]) -> None:
    kernels(tmp_path, "bench", *options).refused("python -m kernels", *named)
    assert list(tmp_path.iterdir()) == []


def test_pictures_and_results_replace_nothing_that_is_read(tmp_path: Path) -> None:
    """Neither files of a draft, nor the tunings, which `tune` itself writes."""
    for name in ("d/model.safetensors", "d/log.jsonl", "d/curves.png", "cache/bitdraft/tuning.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for command, option, name in (
        ("bench", "--plot", "d/curves.png"),
        ("bench", "--plot", "cache/bitdraft/tuning.json"),
        ("bench", "--json", "d/log.jsonl"),
        ("tune", "--json", "cache/bitdraft/tuning.json"),
    ):
        kernels(tmp_path, command, option, name).refused("python -m kernels", f"{option} {name}: ")
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"{}"}


def test_plan_drops_repetitions() -> None:
    plan = Plan.parse("8x4, 8x4", "1,2,1", "bf16,bf16", 1)
    assert (plan.shapes, plan.rows, plan.kernels) == (((8, 4),), (1, 2), ("bf16",))
    with pytest.raises(UserError, match="--rows"):
        Plan.parse("8x4", "", "bf16", 1)


@pytest.mark.slow
def test_info(tmp_path: Path) -> None:
    done = kernels(tmp_path, "info", "--json", "-")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    assert facts["runs_on"] == device_backend()
    assert {"bitlinear", "int8_linear", "attention"} <= facts["self_test"].keys()
    assert facts["tuning"]["file"].endswith("tuning.json")
    text = kernels(tmp_path, "info").out
    for part in (facts["backend"], facts["device"], facts["versions"]["mlx"], facts["tuning"]["file"], "bitlinear: "):
        assert part in text
    done = subprocess.run(
        [sys.executable, "-m", "kernels", "info"], env=environment(BITDRAFT_KERNELS="reference"), cwd=tmp_path,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert "reference: asked for by BITDRAFT_KERNELS" in done.stdout
