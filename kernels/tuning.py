"""What `python -m kernels tune` found best on a device, kept for later processes.

A backend with something to choose says so with `TUNABLE`, each parameter's choices, and takes values by
`set_tuning`. On the CPU the choice is the number of threads, by what decoding likes best. A setting must not
change a row's bits: `tune` passes each through the self-test before it is timed.

One JSON file in the user's cache folder holds an object of integers for each device, MLX version, backend and version
of its kernels: others would need another self-test.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from kernels.device import cache_folder, device_name, processors
from kernels.errors import UserError
from kernels.files import check_writable, real_path, replacing
from kernels.ops import Backend, TernaryWeight, Tunable
from kernels.self_test import self_test

Settings = dict[str, int]

LAYERS = 4  # of each model, so that the chain is longer than what starts it
ROUNDS = 7
# (hidden, qkv, feed-forward) of the embedded teacher and of BitNet-2B.
MODELS = ((576, 960, 1536), (2560, 3840, 6912))
ROWS = (1, 4)


def path() -> Path:
    """Where tunings are kept."""
    return cache_folder() / "tuning.json"


def key(candidate: Backend) -> str:
    """What a tuning is valid for: device, MLX version, backend and the files that it is made of."""
    version: str = mx.__version__  # type: ignore[attr-defined]
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / candidate.NAME).rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            digest.update(file.read_bytes())
    return f"{device_name()}, MLX {version}, {candidate.NAME} {digest.hexdigest()[:12]}"


def load() -> dict[str, Settings]:
    """Every stored tuning by its `key`. A file that cannot be understood counts as none, with one warning."""
    file = path()
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return _ignored(file, str(error))
    if not isinstance(stored, dict) or not all(isinstance(entry, dict) for entry in stored.values()):
        return _ignored(file, "not an object of objects")
    if any(type(value) is not int for entry in stored.values() for value in entry.values()):
        return _ignored(file, "holds other values than integers")
    return stored


def _ignored(file: Path, why: str) -> dict[str, Settings]:
    warnings.warn(f"{file} is ignored: {why}; `python -m kernels tune` writes it anew", stacklevel=4)
    return {}


def store(device: str, settings: Settings) -> None:
    """Keep settings under a `key`, beside those of other devices. Raises UserError naming the file."""
    file = path()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged file is replaced
        everything = load()
    everything[device] = settings
    check_store()
    with replacing(real_path(file), shared=True) as temporary:
        temporary.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_store() -> None:
    """UserError where `store` would fail."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}") from error
    check_writable(file)


def tunable(candidate: Backend) -> dict[str, tuple[int, ...]]:
    """The parameters of a backend and their choices; empty where there is nothing to tune."""
    if candidate.NAME == "cpu":
        from kernels.cpu import _native

        return {"threads": thread_counts(min(processors(), _native.max_threads))}
    return candidate.TUNABLE if isinstance(candidate, Tunable) else {}


def grid(candidate: Backend) -> list[Settings]:
    """Every setting to try; empty where there is nothing to choose."""
    choices = tunable(candidate)
    settings = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return settings if len(settings) > 1 else []


def thread_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... and the number of cores itself."""
    counts = {cores} | {count for power in range(cores.bit_length()) for count in (2**power, 3 * 2**power)}
    return tuple(sorted(count for count in counts if count <= cores))


def use(candidate: Backend, settings: Settings) -> None:
    """Let a backend run with these settings from now on."""
    if candidate.NAME == "cpu":
        from kernels.cpu import _native

        _native.set_threads(settings["threads"])
    elif isinstance(candidate, Tunable):
        candidate.set_tuning(settings)


def stored_for(candidate: Backend) -> Settings:
    """The stored settings that this backend still offers: choices may go with a new version."""
    choices = tunable(candidate)
    if not choices:
        return {}
    stored = load()
    found = stored.get(key(candidate), {}) if stored else {}  # most have none, and a key takes reading files
    return {name: value for name, value in found.items() if value in choices.get(name, ())}


def apply(candidate: Backend) -> None:
    """Let a backend run as it was tuned on this device. BITDRAFT_THREADS, which a user set, goes first."""
    settings = stored_for(candidate)
    if settings and not (candidate.NAME == "cpu" and os.environ.get("BITDRAFT_THREADS")):
        use(candidate, settings)


@dataclass(frozen=True)
class Trial:
    """One setting: seconds of a decoding step's products, the geometric mean over MODELS and ROWS."""

    settings: Settings
    seconds: float


def tune(
    candidate: Backend, settings: list[Settings], seconds: float, tick: Callable[[], object] = lambda: None
) -> list[Trial]:
    """Time every setting that passes the self-test, best first; the best one stays in use.

    seconds: how long each setting is timed, about. tick is called ROUNDS times for each. Settings take
    turns, so that a machine that slows down slows all of them.
    """
    chains = _chains(candidate)
    sound: list[Settings] = []
    for setting in settings:
        use(candidate, setting)
        if self_test(candidate) is None and all(_runs(chain) for chain in chains):
            sound.append(setting)
        else:
            for _ in range(ROUNDS):
                tick()
    if not sound:
        raise UserError(f"the {candidate.NAME} kernels pass their self-test with none of {len(settings)} settings")
    times: list[list[list[float]]] = [[[] for _ in chains] for _ in sound]
    for turn in range(ROUNDS):
        for i in range(len(sound))[:: -1 if turn % 2 else 1]:
            use(candidate, sound[i])
            for chain, seen in zip(chains, times[i], strict=True):
                seen.append(_seconds(chain, seconds / ROUNDS / len(chains)))
            tick()
    trials = [
        Trial(setting, math.exp(statistics.mean(math.log(statistics.median(seen)) for seen in of_setting)))
        for setting, of_setting in zip(sound, times, strict=True)
    ]
    trials.sort(key=lambda trial: trial.seconds)
    use(candidate, trials[0].settings)
    return trials


def _chains(ops: Backend) -> list[Callable[[], mx.array]]:
    """For each model and number of rows, the products of its layers, each needing the one before; no attention."""
    rng = np.random.default_rng(0)

    def weight(n: int, k: int) -> TernaryWeight:
        return ops.prepare_ternary(rng.integers(-1, 2, (n, k), np.int8), np.full(n, 0.01, np.float32))

    def chain(layers: list[list[TernaryWeight]], start: mx.array, norm: mx.array, inner_norm: mx.array) -> mx.array:
        x = start
        for qkv, o, gate_up, down in layers:
            a = ops.linear(x, qkv, norm=norm, eps=1e-5)[:, : norm.size]
            x = ops.linear(a, o, norm=norm, eps=1e-5, residual=x)
            h = ops.linear(x, gate_up, norm=norm, eps=1e-5, epilogue="relu2_mul")
            x = ops.linear(h, down, norm=inner_norm, eps=1e-5, residual=x)
        return x

    chains: list[Callable[[], mx.array]] = []
    for hidden, qkv, inner in MODELS:
        shapes = ((qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
        layers = [[weight(n, k) for n, k in shapes] for _ in range(LAYERS)]
        norms = mx.ones((hidden,)), mx.ones((inner,))
        for rows in ROWS:
            start = mx.array(rng.normal(0, 1, (rows, hidden)).astype(np.float32))
            mx.eval(start, norms)
            chains.append(partial(chain, layers, start, *norms))
    return chains


def _runs(chain: Callable[[], mx.array]) -> bool:
    """Whether a setting works at real sizes too; compiles what it needs."""
    try:
        mx.eval(chain())
    except Exception:  # too many threads or too much shared memory for the device, in its own words
        return False
    return True


def _seconds(chain: Callable[[], mx.array], budget: float) -> float:
    """Seconds of one run, the median of those that fit in the budget; at least one."""
    seen: list[float] = []
    end = time.perf_counter() + budget
    while not seen or time.perf_counter() < end:
        y = chain()
        start = time.perf_counter()
        mx.eval(y)
        seen.append(time.perf_counter() - start)
    return statistics.median(seen)
