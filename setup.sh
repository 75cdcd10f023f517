#!/bin/sh
# Makes a Python environment and installs bitdraft into it, editable, with its C++ extension.
# Called by make as: sh setup.sh .venv
# PYTHON chooses the Python; otherwise the newest suitable one on the PATH is taken.
set -eu

venv=$1
log=$venv/install.log

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# Prints why a Python will not do, or nothing. Runs under any Python 2.7 or 3.
judge='
import platform, sys
from sysconfig import get_paths
import os
def why():
    if sys.version_info < (3, 11):
        return "is Python %d.%d; 3.11 or newer is needed" % sys.version_info[:2]
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            return "is an x86 Python (under Rosetta, or on an Intel Mac); MLX needs an arm64 Python on Apple Silicon"
        if int(platform.mac_ver()[0].split(".")[0]) < 14:
            return "sees macOS %s; MLX needs macOS 14 or newer" % platform.mac_ver()[0]
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

found= spare= reasons=
for candidate in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3 python}; do
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
  die "no suitable Python (3.11 or newer) on the PATH.$reasons
Install one (python.org, Homebrew, uv, pyenv), or name it: PYTHON=/path/to/python make setup"
fi

extras=dev
[ "$(uname -s)" = Darwin ] || extras=cpu,dev

say "$("$found" --version) at $found"
rm -rf "$venv"
"$found" -m venv "$venv"
say "installing (a minute or more; about 1 GB in $venv; details in $log)"
export PIP_DISABLE_PIP_VERSION_CHECK=1
"$venv/bin/python" -m pip install -qq --progress-bar off --log "$log" --editable ".[$extras]"

if [ "$extras" = cpu,dev ] && ! "$venv/bin/python" -c 'import kernels.cpu' 2>/dev/null; then
  say "the C++ extension was not built (no C++ compiler?): decoding works, but slowly; see $log"
fi
say "done: $venv/bin holds the commands distill and decode"
