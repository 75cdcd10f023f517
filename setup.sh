#!/bin/sh
# Makes a Python environment and installs bitdraft into it, editable, on Linux with its C++ extension.
# Called by make as: sh setup.sh .venv
# PYTHON chooses the Python; otherwise the newest suitable one is taken, from the PATH first.
# Written for the shells that are /bin/sh on macOS and Linux (bash 3.2, zsh, dash), and for BSD tools.
set -eu

venv=$1
log=$venv/install.log
system=$(uname -s)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# A Mac that MLX has no wheels for needs no Python to be told so.
if [ "$system" = Darwin ]; then
  # Under Rosetta `uname -m` says x86_64 on Apple silicon too; the kernel knows.
  [ "$(sysctl -n hw.optional.arm64 2>/dev/null || :)" = 1 ] ||
    die "this is an Intel Mac; MLX, which bitdraft is written in, needs Apple silicon (M1 or newer)"
  macos=$(sw_vers -productVersion)
  [ "${macos%%.*}" -ge 14 ] || die "this is macOS $macos; MLX needs macOS 14 or newer"
  [ "$(sysctl -n sysctl.proc_translated 2>/dev/null || :)" != 1 ] ||
    die "this shell runs as x86 under Rosetta, and so would Python; start one that does not: arch -arm64 zsh
(or in the Finder: Get Info on the Terminal's app, and 'Open using Rosetta' off)"
fi

# Prints why a Python will not do, or nothing. Runs under any Python 2.7 or 3.
judge='
import os, platform, sys
from sysconfig import get_paths
def why():
    if sys.version_info < (3, 11):
        return "is Python %d.%d" % sys.version_info[:2]
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return "is an x86 Python, which runs under Rosetta; MLX needs an arm64 one"
    elif sys.platform.startswith("linux"):
        name, version = platform.libc_ver()
        if name != "glibc":
            return "does not use glibc; the Linux wheels of MLX need glibc 2.35 or newer"
        if tuple(map(int, version.split(".")[:2])) < (2, 35):
            return "uses glibc %s; the Linux wheels of MLX need 2.35 or newer (Ubuntu 22.04, Debian 12)" % version
    else:
        return "runs on %s; MLX runs on macOS and Linux" % sys.platform
    try:
        import ensurepip, venv
    except ImportError:
        return "lacks the modules venv and ensurepip (on Debian and Ubuntu: the package python3-venv)"
    return ""
reason = why()
if not reason and sys.platform != "darwin" and not os.path.exists(os.path.join(get_paths()["include"], "Python.h")):
    reason = "headers"
print(reason)
'

if [ -n "${PYTHON:-}" ]; then
  set -- "$PYTHON"
else
  set -- python3.14 python3.13 python3.12 python3.11 python3 python
  # Not on the PATH of every shell: Homebrew's, python.org's, and what uv and pyenv have installed.
  for minor in 14 13 12 11; do
    set -- "$@" \
      "/opt/homebrew/bin/python3.$minor" \
      "/opt/homebrew/opt/python@3.$minor/bin/python3.$minor" \
      "/Library/Frameworks/Python.framework/Versions/3.$minor/bin/python3.$minor" \
      "/usr/local/bin/python3.$minor" \
      "${HOME:-}/.local/bin/python3.$minor"
    for program in "${HOME:-}/.local/share/uv/python/cpython-3.$minor."*"/bin/python3.$minor" \
      "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/3.$minor."*"/bin/python3.$minor"; do
      set -- "$@" "$program" # where nothing matches, a name that does not exist
    done
  done
fi

found= spare= reasons=
for candidate; do
  path=$(command -v "$candidate" 2>/dev/null) || continue
  reason=$("$path" -c "$judge" 2>/dev/null) || continue # a launcher of a version that is not installed
  case $reason in
    '') found=$path; break ;;
    # Without its headers the C++ extension cannot be built: take it only if there is no better one.
    headers) [ -n "$spare" ] || spare=$path ;;
    *) reasons="$reasons
  $path $reason" ;;
  esac
done
if [ -z "$found" ] && [ -n "$spare" ]; then
  found=$spare
  say "$found has no Python.h: the C++ extension will not be built, and everything will be slow"
fi
if [ -z "$found" ]; then
  [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON cannot be used:${reasons:- it cannot be run}"
  if [ "$system" = Darwin ]; then
    get="brew install python@3.13     with Homebrew
  uv python install 3.13       with uv
  the macOS installer of https://www.python.org/downloads/"
  else
    get="sudo apt install python3 python3-venv python3-dev     on Ubuntu 24.04 and Debian 12 or newer
  sudo dnf install python3 python3-devel                on Fedora
  uv python install 3.13                                with uv, on any"
  fi
  die "no suitable Python (3.11 or newer) was found.$reasons
Get one, and run make again:
  $get
or name the one that you have: PYTHON=/path/to/python3 make setup"
fi

extras=dev
[ "$system" = Darwin ] || extras=cpu,dev

say "$("$found" --version) at $found"
rm -rf "$venv"
"$found" -m venv "$venv"
say "installing (a minute or more; about 1 GB in $venv; details in $log)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install -qq --progress-bar off --log "$log" --editable ".[$extras]"

if [ "$extras" = cpu,dev ] && ! "$venv/bin/python" -c 'import kernels.cpu' 2>/dev/null; then
  say "the C++ extension was not built (no C++ compiler?): decoding works, but slowly; see $log"
fi
say "done: $venv/bin holds the commands distill and decode; to see whether all is well: $venv/bin/decode doctor"
