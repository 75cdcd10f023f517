"""Published memory bandwidths, for predictions (`decode plan`)."""

from __future__ import annotations

import difflib
import re

from kernels import UserError

# GB/s as the makers publish them. Of chips sold with two bandwidths the lower has the plain name.
APPLE = {
    "M1": 68.25,
    "M1 Pro": 200.0,
    "M1 Max": 400.0,
    "M1 Ultra": 800.0,
    "M2": 100.0,
    "M2 Pro": 200.0,
    "M2 Max": 400.0,
    "M2 Ultra": 800.0,
    "M3": 100.0,
    "M3 Pro": 150.0,
    "M3 Max": 300.0,
    "M3 Max 40-core": 400.0,
    "M3 Ultra": 819.0,
    "M4": 120.0,
    "M4 Pro": 273.0,
    "M4 Max": 410.0,
    "M4 Max 40-core": 546.0,
    "M5": 153.0,
    "M5 Pro": 307.0,
    "M5 Max": 460.0,
    "M5 Max 40-core": 614.0,
}
NVIDIA = {
    "A100": 2039.0,
    "A100 80GB PCIe": 1935.0,
    "A100 40GB": 1555.0,
    "H100": 3350.0,
    "H100 PCIe": 2000.0,
    "H100 NVL": 3900.0,
    "H200": 4800.0,
}
BANDWIDTH = APPLE | NVIDIA


def find_chip(name: str) -> str:
    """The chip that a name means: `M4 Pro`, `m4-pro`, `Apple M4 Pro`. UserError, naming the nearest, for no chip."""
    chips = {_letters(chip): chip for chip in BANDWIDTH}
    wanted = _letters(name).removeprefix("apple")
    if wanted in chips:
        return chips[wanted]
    near = difflib.get_close_matches(wanted, chips, 1)
    hint = f"did you mean {chips[near[0]]}? " if near else ""
    raise UserError(f"--chip {name}: not known; {hint}known are {', '.join(BANDWIDTH)}; or give --bandwidth")


def this_chip() -> str:
    """The chip that MLX computes on; UserError where its bandwidth is not published."""
    from kernels.device import device_name

    name = device_name()
    chip = chip_of(name)
    if chip is None:
        raise UserError(
            f"--chip: the bandwidth of this machine's {name} is not known; give --chip or --bandwidth"
            " (`python -m kernels bench` measures it)"
        )
    return chip


def chip_of(device: str) -> str | None:
    """The chip of a device by the name its driver gives it: `Apple M4 Pro`, `NVIDIA H100 80GB HBM3`; None if unknown.

    Metal's names don't tell chips apart that are sold with two bandwidths: they are taken for the slower.
    """
    maker, *words = _words(device) or [""]
    if maker == "apple":
        return next((chip for chip in APPLE if _words(chip) == words), None)
    known = [chip for chip in NVIDIA if set(_words(chip)) <= set(words)]
    return max(known, key=len) if known and maker == "nvidia" else None


def _words(name: str) -> list[str]:
    return re.findall("[a-z0-9]+", name.lower())


def _letters(name: str) -> str:
    return "".join(_words(name))
