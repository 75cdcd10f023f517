"""Published memory bandwidths, for predictions (`decode plan`)."""

from __future__ import annotations

import difflib
import re

from kernels import UserError

# GB/s as the makers publish them. Of chips sold with two bandwidths the lower is the plain name.
BANDWIDTH = {
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
    "A100": 2039.0,
    "H100": 3350.0,
    "H200": 4800.0,
}


def find_chip(name: str) -> str:
    """The chip that a name means: `M4 Pro`, `m4-pro`, `Apple M4 Pro`. UserError, naming the nearest, for no chip."""
    chips = {_letters(chip): chip for chip in BANDWIDTH}
    wanted = _letters(name).removeprefix("apple")
    if wanted in chips:
        return chips[wanted]
    near = difflib.get_close_matches(wanted, chips, 1)
    hint = f"did you mean {chips[near[0]]}? " if near else ""
    raise UserError(f"--chip {name}: not known; {hint}Known are {', '.join(BANDWIDTH)}; or give --bandwidth")


def this_chip() -> str:
    """The chip that MLX computes on; UserError where its bandwidth is not published."""
    from kernels.device import device_name

    name = device_name()
    known = [chip for chip in BANDWIDTH if _letters(chip) in _letters(name)]
    if not known:
        raise UserError(
            f"--chip: the bandwidth of this machine's {name} is not known; give --chip or --bandwidth"
            " (`python -m kernels bench` measures it)"
        )
    return max(known, key=len)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
