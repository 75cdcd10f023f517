"""setup.sh with the programs of a Mac it asks (uname, sw_vers, sysctl, Pythons) replaced by scripts.

That is the nearest thing to a Mac that runs anywhere: the shell is real, what it finds is made up.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

SHELLS = [shell for name in ("sh", "bash") if (shell := shutil.which(name))]
TOOLS = ("cat", "cp", "mkdir", "rm")
REAL = Path(sys.executable).resolve()

# A Python of some version, processor and system: it judges itself by the real one's words, and notes what it is told.
PYTHON = """#!/bin/sh
case $1 in
  -c) exec "{real}" -c 'import ensurepip, platform, sys, venv
sys.platform, sys.version_info = "{system}", ({version})
platform.machine, platform.libc_ver = lambda: "{machine}", lambda: ("glibc", "2.39")
exec(sys.argv[1])' "$2" ;;
  --version) echo "Python {version}" ;;
  -m) echo "$0 $*" >> "{log}"; [ "$2" != venv ] || {{ mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; }} ;;
esac
"""


@dataclass
class Machine:
    """A folder for its root, and what setup.sh says there."""

    root: Path
    system: str = "Darwin"
    macos: str = "15.1"
    apple_silicon: bool = True
    translated: bool = False

    def program(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        file.chmod(0o755)
        return file

    def python(self, path: str, version: str = "3, 13", machine: str = "arm64") -> Path:
        system = "darwin" if self.system == "Darwin" else "linux"
        values = {"real": REAL, "system": system, "version": version, "machine": machine, "log": self.root / "log"}
        return self.program(path, PYTHON.format(**values))

    def setup(self, shell: str = SHELLS[0], **variables: str) -> subprocess.CompletedProcess[str]:
        """Run it. Paths that are absolute in the script lead into this machine's root."""
        self.program("bin/uname", f"#!/bin/sh\necho {self.system}\n")
        if self.system == "Darwin":
            self.program("bin/sw_vers", f'#!/bin/sh\n[ "$1" = -productVersion ] && echo {self.macos}\n')
            known = {"hw.optional.arm64": self.apple_silicon, "sysctl.proc_translated": self.translated}
            cases = "".join(f"  {name}) echo 1 ;;\n" for name, yes in known.items() if yes)
            self.program("bin/sysctl", f'#!/bin/sh\n[ "$1" = -n ] || exit 1\ncase $2 in\n{cases}  *) exit 1 ;;\nesac\n')
        for tool in TOOLS:
            (self.root / "bin" / tool).unlink(missing_ok=True)
            (self.root / "bin" / tool).symlink_to(shutil.which(tool) or tool)
        text = (ROOT / "setup.sh").read_text(encoding="utf-8")
        for place in ("/opt/homebrew", "/Library/Frameworks", "/usr/local"):
            assert place in text
            text = text.replace(f'"{place}', f'"{self.root}{place}')
        script = self.program("setup.sh", text)
        env = {"PATH": str(self.root / "bin"), "HOME": str(self.root / "home"), **variables}
        return subprocess.run(
            [shell, str(script), ".venv"], cwd=self.root, env=env,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def told(self) -> list[str]:
        """What Pythons were told to do."""
        log = self.root / "log"
        return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.fixture
def mac(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "path",
    [
        "bin/python3.12",
        "bin/python3",
        "opt/homebrew/bin/python3.13",
        "opt/homebrew/opt/python@3.11/bin/python3.11",
        "Library/Frameworks/Python.framework/Versions/3.12/bin/python3.12",
        "home/.local/share/uv/python/cpython-3.12.8-macos-aarch64-none/bin/python3.12",
        "home/.pyenv/versions/3.11.9/bin/python3.11",
    ],
)
def test_a_python_is_found_where_macs_have_them(mac: Machine, path: str, shell: str) -> None:
    python = mac.python(path)
    done = mac.setup(shell)
    assert done.returncode == 0, done.stderr
    assert f"at {python}" in done.stderr and "decode doctor" in done.stderr and done.stdout == ""
    venv, pip = mac.told()
    assert venv == f"{python} -m venv .venv"
    assert pip.startswith(".venv/bin/python -m pip install") and pip.endswith(
        "--editable .[dev]"
    )  # no extra of Linux's


def test_what_will_not_do_is_passed_over(mac: Machine) -> None:
    """An old one, an x86 one, and a pyenv launcher of a version that is not installed."""
    mac.python("bin/python3", "3, 9")
    mac.python("usr/local/bin/python3.14", "3, 14", "x86_64")
    mac.program("bin/python3.14", "#!/bin/sh\necho 'pyenv: python3.14: command not found' >&2\nexit 127\n")
    python = mac.python("opt/homebrew/bin/python3.12", "3, 12")
    done = mac.setup()
    assert done.returncode == 0 and f"at {python}" in done.stderr and "pyenv" not in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_without_a_python_it_says_how_to_get_one(mac: Machine, shell: str) -> None:
    mac.python("bin/python3", "3, 9")
    mac.python("usr/local/bin/python3.12", "3, 12", "x86_64")
    done = mac.setup(shell)
    assert done.returncode == 1 and not mac.told()
    assert f"{mac.root}/bin/python3 is Python 3.9\n" in done.stderr
    assert f"{mac.root}/usr/local/bin/python3.12 is an x86 Python, which runs under Rosetta" in done.stderr
    assert "brew install python" in done.stderr and "python.org" in done.stderr and "apt" not in done.stderr
    linux = Machine(mac.root / "linux", "Linux")
    (mac.root / "linux").mkdir()
    done = linux.setup(shell)
    assert done.returncode == 1 and "apt install python3" in done.stderr and "brew" not in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"apple_silicon": False}, "Intel Mac"),
        ({"macos": "13.7.1"}, "macOS 13.7.1; MLX needs macOS 14"),
        ({"translated": True}, "under Rosetta"),
    ],
)
def test_a_mac_that_mlx_does_not_run_on_is_refused(
    mac: Machine, facts: dict[str, bool | str], said: str, shell: str
) -> None:
    mac.python("bin/python3.13")
    (mac.root / ".venv").mkdir()
    done = Machine(mac.root, **facts).setup(shell)  # type: ignore[arg-type]
    assert done.returncode == 1 and said in done.stderr and done.stdout == ""
    assert not mac.told() and (mac.root / ".venv").is_dir()  # nothing was begun


def test_a_named_python_is_the_only_one(mac: Machine) -> None:
    other = mac.python("bin/python3.13")
    named = mac.python("my pythons/python", "3, 11")
    assert mac.setup(PYTHON=str(named)).returncode == 0
    assert mac.told()[0] == f"{named} -m venv .venv"
    old = mac.python("old/python", "3, 10")
    for refused, reason in ((old, "is Python 3.10"), (mac.root / "none", "cannot be run")):
        done = mac.setup(PYTHON=str(refused))
        assert done.returncode == 1 and str(refused) in done.stderr and reason in done.stderr
        assert str(other) not in done.stderr


def test_on_linux_the_cpu_build_is_installed(tmp_path: Path) -> None:
    linux = Machine(tmp_path, "Linux")
    linux.python("bin/python3.12", machine="x86_64")
    done = linux.setup()
    assert done.returncode == 0, done.stderr
    assert linux.told()[-1].endswith("--editable .[cpu,dev]")
