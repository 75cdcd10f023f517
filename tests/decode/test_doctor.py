"""`decode doctor`: what is well passes, and what is spoilt is found and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEACHER, Command, Result, arguments, changed_copy, environment

from decode import doctor
from kernels.backends import select

NATIVE = select()[0].NAME == "cpu"


def spoiled(code: str, cwd: Path, *options: object) -> Result:
    """`decode doctor` in a process that runs `code` first."""
    start = arguments("decode", "doctor", *options)
    done = subprocess.run(
        [start[0], "-c", f"{code}\n{start[2]}", *start[3:]], stdin=subprocess.DEVNULL, env=environment(), cwd=cwd,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


def statuses(result: Result) -> dict[str, str]:
    return {check["name"]: check["status"] for check in json.loads(result.out)["checks"]}


@pytest.mark.slow
def test_all_is_well(command: Command, tmp_path: Path) -> None:
    done = command("decode", "doctor", "--json", tmp_path / "d.json")
    assert done.code == 0 and done.err == "", done.out + done.err
    report = json.loads((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert report["ok"] is True and report["failed"] == []
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names)) == len(done.out.splitlines())
    for name in ("python", "system", "mlx", "packages", "source", "backend", "self-test bitlinear",
                 "self-test attention", "name clash", "memory",
                 "teacher", "tokenizer", "perplexity", "disk", "hub", "compiler"):  # fmt: skip
        assert name in names
    for check, line in zip(report["checks"], done.out.splitlines(), strict=True):
        assert check["status"] in ("ok", "warning")
        assert line.split()[0] == check["status"] and check["name"] in line and check["detail"] in line
    perplexity = report["checks"][names.index("perplexity")]
    assert perplexity["value"] == pytest.approx(doctor.EXPECTED[TEACHER_HASH], rel=doctor.MARGIN)


TEACHER_HASH = next(iter(doctor.EXPECTED))


def test_the_recorded_weights_are_the_shipped_ones() -> None:
    from decode.models.checkpoint import find_teacher

    assert find_teacher(None).weights_hash == TEACHER_HASH


@pytest.mark.slow
def test_json_alone_and_quiet(inside: Command, small_teacher: Path) -> None:
    done = inside("decode", "doctor", "--teacher", small_teacher, "--json", "-")
    assert done.code == 0 and json.loads(done.out)["ok"] is True
    done = inside("decode", "doctor", "--teacher", small_teacher, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="the native CPU kernels do not run here")
def test_a_wrong_kernel_is_found(work: Path, small_teacher: Path) -> None:
    spoil = (
        "import mlx.core as mx; from kernels import cpu; right = cpu.bitlinear\n"
        "cpu.bitlinear = lambda *args: right(*args) + mx.array(1e-3)"
    )
    done = spoiled(spoil, work, "--teacher", small_teacher, "--json", "-")
    assert done.code == 1
    found = statuses(done)
    assert found["self-test bitlinear"] == "FAILED" and found["backend"] == "warning"
    assert found["self-test attention"] == found["perplexity"] == "ok"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the native kernels are looked for on Linux only")
def test_without_the_extension_it_says_how_to_build_it(work: Path, small_teacher: Path) -> None:
    done = spoiled("import sys; sys.modules['kernels.cpu._native'] = None", work, "--teacher", small_teacher)
    assert done.code == 0, done.out + done.err
    line = next(line for line in done.out.splitlines() if " backend " in line)
    assert line.startswith("warning") and "pip install" in line


@pytest.mark.slow
def test_a_wrong_step_shows_in_the_perplexity(work: Path) -> None:
    """Kernels that pass, and a model that is wrong all the same."""
    spoil = (
        "import mlx.core as mx; from decode.models.transformer import Forward, Transformer; right = Transformer.step\n"
        "Transformer.step = lambda *args: Forward({{}}, lambda: {})"
    )
    done = spoiled(spoil.format("right(*args).logits * 0.3"), work, "--json", "-")
    assert done.code == 1 and json.loads(done.out)["failed"] == ["perplexity"]
    done = spoiled(spoil.format("right(*args).logits * mx.array(float('nan'))"), work)
    assert done.code == 1 and "not a number" in done.out


def test_without_mlx_it_says_so(work: Path) -> None:
    code = "import sys; sys.modules['mlx.core'] = None\nfrom decode.doctor import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=work, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("FAILED   mlx ")


@pytest.mark.slow
def test_a_broken_teacher_is_named(command: Command, tmp_path: Path) -> None:
    weights = (TEACHER / "model.safetensors").read_bytes()
    cut = changed_copy(TEACHER, tmp_path / "cut", model__safetensors=weights[:9999])
    done = command("decode", "doctor", "--teacher", cut)
    assert done.code == 1 and done.err == ""
    failed = [line for line in done.out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and str(cut / "model.safetensors") in failed[0]
    assert "compiler" in done.out  # the other checks go on

    gone = command("decode", "doctor", "--teacher", tmp_path / "gone")
    assert gone.code == 1 and str(tmp_path / "gone") in gone.out

    speechless = changed_copy(TEACHER, tmp_path / "speechless", tokenizer__json=b"{}")
    done = command("decode", "doctor", "--teacher", speechless, "--json", "-")
    assert done.code == 1 and json.loads(done.out)["failed"] == ["tokenizer"]


@pytest.mark.parametrize("template", ["", "{% for m in messages %}{{ m.content.split('\\n')[0] }}{% endfor %}"])
def test_a_template_that_writes_nothing_is_named(small_teacher: Path, tmp_path: Path, template: str) -> None:
    """Empty, or of the first line of a turn only."""
    teacher = changed_copy(small_teacher, tmp_path / "teacher", chat_template__jinja=template.encode())
    failed = [check for check in doctor._teacher(str(teacher)) if check.status == "FAILED"]
    assert [check.name for check in failed] == ["tokenizer"]
    assert str(teacher) in failed[0].detail and "template" in failed[0].detail


@pytest.mark.slow
def test_no_network_is_asked(work: Path) -> None:
    """A Hub name that was never downloaded is named, and nothing is fetched."""
    spoil = (
        "import os, socket; os.environ['HF_HUB_OFFLINE'] = '0'\n"
        "def refuse(*args, **options): print('NETWORK', args)\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse"
    )
    done = spoiled(spoil, work, "--teacher", "nobody/nothing")
    assert done.code == 1 and "NETWORK" not in done.out + done.err
    failed = [line for line in done.out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and "--teacher nobody/nothing" in failed[0]
    assert "was never downloaded, which this command leaves to others" in failed[0]
    assert "others are downloaded" in done.out  # by the other commands


@pytest.mark.slow
def test_another_teacher_has_no_expected_perplexity(command: Command, tmp_path: Path) -> None:
    import mlx.core as mx

    weights = mx.load(str(TEACHER / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 0.9
    other = changed_copy(TEACHER, tmp_path / "other", model__safetensors=None)
    mx.save_safetensors(str(other / "model.safetensors"), weights, {"format": "mlx"})
    done = command("decode", "doctor", "--teacher", other, "--json", "-")
    assert done.code == 0
    perplexity = next(check for check in json.loads(done.out)["checks"] if check["name"] == "perplexity")
    assert perplexity["value"] > 0 and "expected" not in perplexity["detail"]


def test_another_package_called_kernels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.status for check in doctor._name_clash()] == ["ok"]
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.12.1")
    (check,) = doctor._name_clash()
    assert check.status == "warning" and "kernels 0.12.1" in check.detail
    monkeypatch.setattr("kernels.__file__", "/elsewhere/kernels/__init__.py")
    (check,) = doctor._name_clash()
    assert check.status == "FAILED" and "/elsewhere/kernels" in check.detail


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "version", "translated", "said"),
    [
        ("arm64", "15.1", False, None),
        ("x86_64", "15.1", True, "Rosetta"),
        ("x86_64", "15.1", False, "Intel Mac"),
        ("arm64", "13.7", False, "macOS 14"),
    ],
)
def test_macs(work: Path, tmp_path: Path, machine: str, version: str, translated: bool, said: str | None) -> None:
    """In a process that takes itself for one, with a `sysctl` of our own: doctor, and commands of both programs."""
    stub = tmp_path / "sysctl"
    stub.write_text(f'#!/bin/sh\n[ "$*" = "-n sysctl.proc_translated" ] && echo {int(translated)}\n', encoding="utf-8")
    stub.chmod(0o755)
    fake = f"""
from types import SimpleNamespace
from decode import system
system.sys = SimpleNamespace(platform="darwin", stderr=system.sys.stderr)
system.platform = SimpleNamespace(machine=lambda: "{machine}", mac_ver=lambda: ("{version}", (), ""))
"""
    for program in ("decode", "distill", "decode.doctor"):
        call = f"import sys; sys.argv = ['x', '--help']; from {program} import main as m; m()"
        if program != "decode.doctor":
            call = call.replace(f"from {program} ", f"from {program}.__main__ ")
        done = subprocess.run(
            [sys.executable, "-c", fake + call], env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}"), cwd=work,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        if program == "decode.doctor":
            assert ("FAILED   system" in done.stdout) is (said is not None)
            assert (said or "ok       system") in done.stdout
        elif said is None:
            assert done.returncode == 0 and "Usage" in done.stdout, done.stderr
        else:
            Result(done.returncode, done.stdout, done.stderr).refused(program, said)


def test_commands_say_that_mlx_is_missing(work: Path) -> None:
    """As on Linux where no extra of it was installed."""
    code = "import sys; sys.modules['mlx.core'] = None; from decode.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=work, capture_output=True, text=True)
    Result(done.returncode, done.stdout, done.stderr).refused("decode", "MLX cannot be imported")


def test_what_is_known_of_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Mac's programs replaced by ones that answer as an M4's do."""
    values = {
        "machdep.cpu.brand_string": "Apple M4",
        "hw.model": "Mac16,12",
        "hw.perflevel0.physicalcpu": "4",
        "hw.perflevel1.physicalcpu": "6",
        "vm.swapusage": "total = 2048.00M  used = 1096.25M  free = 951.75M  (encrypted)",
    }
    cases = "".join(f'  {name}) echo "{value}" ;;\n' for name, value in values.items())
    for name, text in (
        ("sysctl", f'[ "$1" = -n ] || exit 1\ncase $2 in\n{cases}esac'),
        ("ioreg", "echo '  |   \"gpu-core-count\" = 10'"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._chip() == "Apple M4 (Mac16,12), 4 performance, 6 efficiency and 10 GPU cores"
    monkeypatch.setattr(
        "kernels.device.device_info",
        lambda: {"memory_size": 17_179_869_184, "max_recommended_working_set_size": 12_000_000_000},
    )
    (check,) = doctor._memory()
    assert check.detail == (
        "17.2 GB, of which the GPU should use 12.0 (cache: 3.0);"
        " swap: total = 2048.00M used = 1096.25M free = 951.75M (encrypted)"
    )
    monkeypatch.setenv("PATH", "/nowhere")
    assert "unknown chip" in doctor._chip()  # and no traceback
