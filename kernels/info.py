"""Which backend runs here and why, for `python -m kernels info` and `decode doctor`."""

from __future__ import annotations

import importlib
import os
from typing import Any

from kernels import tuning
from kernels.backends import device_backend, select
from kernels.device import device_name, versions
from kernels.ops import Backend
from kernels.self_test import operation_faults


def kernel_info() -> dict[str, Any]:
    """backend, reason (why it is the reference, in whole or in part, where nobody asked for that, else None),
    runs_on, device, versions; instruction_sets and threads of the native CPU kernels, else None; self_test:
    operation -> None or its fault; tuning: its file and what applies here.

    The self-test is that of the kernels made for this device, also where they were not chosen for failing it.
    """
    chosen, reason = select()
    tested = chosen
    if reason is not None:
        try:
            tested = importlib.import_module(f"kernels.{device_backend()}")  # type: ignore[assignment]
        except ImportError:  # the reason says so
            tested = chosen
    return {
        "backend": chosen.NAME,
        "reason": reason,
        "forced": bool(os.environ.get("BITDRAFT_KERNELS")),
        "runs_on": device_backend(),
        "device": device_name(),
        "versions": versions(),
        "cpu": _processor(chosen),
        "tested": tested.NAME,
        "self_test": dict(operation_faults(tested)),
        "tuning": {"file": str(tuning.path()), "settings": tuning.stored_for(chosen)},
    }


def _processor(chosen: Backend) -> dict[str, Any] | None:
    if chosen.NAME != "cpu":
        return None
    from kernels.cpu import _native

    tuning.apply(chosen)
    return {
        "instruction_set": _native.isa(),
        "instruction_sets": _native.available_isas(),
        "threads": _native.threads(),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """For a reader."""
    asked = "asked for by BITDRAFT_KERNELS" if found["forced"] else f"made for {found['runs_on']}"
    text = [
        f"backend    {found['backend']}: {found['reason'] or asked}",
        f"device     {found['device']} ({found['runs_on']})",
        "versions   " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    ]
    if found["cpu"]:
        sets = ", ".join(found["cpu"]["instruction_sets"])
        text.append(f"processor  {found['cpu']['instruction_set']} of {sets}; {found['cpu']['threads']} threads")
    for operation, fault in found["self_test"].items():
        text.append(f"self-test  {found['tested']} {operation}: {fault or 'ok'}")
    settings = ", ".join(f"{name} {value}" for name, value in found["tuning"]["settings"].items())
    text.append(f"tuning     {settings or 'none'} ({found['tuning']['file']})")
    return text
