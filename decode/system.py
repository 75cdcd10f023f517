"""What MLX's wheels ask of a system, found out without importing any of them.

Where they are not to be had, an import fails with words that help nobody (`incompatible architecture`).
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys

from kernels.signals import take_signals

MACOS = 14
GLIBC = (2, 35)


def unsupported() -> str | None:
    """Why MLX cannot run in this process, or None."""
    if sys.platform == "darwin":
        return _unsupported_mac()
    if sys.platform.startswith("linux"):
        name, version = platform.libc_ver()
        if name != "glibc" or tuple(map(int, version.split(".")[:2])) < GLIBC:
            return "MLX's Linux wheels need glibc 2.35 or newer"
        return None
    return f"MLX runs on macOS and Linux, not on {platform.system()}"


def _unsupported_mac() -> str | None:
    if platform.machine() != "arm64":
        if translated():
            return (
                "this Python runs as x86 under Rosetta; MLX needs an arm64 one"
                " (in a Terminal that runs under Rosetta itself: start `arch -arm64 zsh`)"
            )
        return "this is an Intel Mac; MLX needs Apple silicon"
    version = platform.mac_ver()[0]
    if int(version.split(".")[0]) < MACOS:
        return f"this is macOS {version}; MLX needs macOS {MACOS} or newer"
    return None


def translated() -> bool:
    """Whether macOS translates this process from x86."""
    try:
        asked = subprocess.run(["sysctl", "-n", "sysctl.proc_translated"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.stdout.strip() == "1"


def begin(command: str) -> None:
    """Run a command line, `main` of COMMAND.cli. Importing it takes a second, in which Ctrl-C means what it does
    later."""
    take_signals()
    try:
        require_mlx(command)
        main = importlib.import_module(f"{command}.cli").main
    except KeyboardInterrupt:
        print(f"\n{command}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    main()


def require_mlx(command: str) -> None:
    """Exit with one line and code 2, as `command` does for its errors, where MLX cannot be imported."""
    reason = unsupported()
    if reason is None:
        try:
            import mlx.core  # noqa: F401
        except ImportError as error:
            hint = "; it needs one of its own extras here, see README.md" if sys.platform.startswith("linux") else ""
            reason = f"MLX cannot be imported ({' '.join(str(error).split())}){hint}"
    if reason is not None:
        print(f"{command}: error: {reason} (`python -m decode.doctor` says more)", file=sys.stderr)
        raise SystemExit(2)
