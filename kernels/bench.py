"""The microbenchmark of matrix products: ours beside MLX's, on decoding's shapes.

What is timed is a chain: each product needs the result of the one before, as in decoding, so that a queue
cannot hide latency. Weights rotate through more copies than caches hold, so that each product streams its
weights from memory. Within a shape every kernel, number of rows and thread count takes its turn in each round,
and medians over the rounds are reported: a machine that slows down slows all of them.

The dependence is a view, for which no kernel is launched: the first m numbers of a result are the next product's
row factors where a kernel takes int8 rows, and the first m * k numbers are the next x of MLX's products. Where a
result has fewer (n < k), its first column is written into x, one small operation that ours have not. `linear` has a
residual input for it, as decoding uses it. Nothing is subtracted; on a CPU the views take one to three microseconds
a product, where max(s, y[:, 0]) took five to ten.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.backends import backend, device_backend
from kernels.bandwidth import Bandwidth, CpuReader, GpuReader
from kernels.device import cache_bytes, device_name, processors, versions
from kernels.errors import UserError
from kernels.memory import memory_bytes
from kernels.ops import Backend
from kernels.plotting import drawing
from kernels.reference import quantize_rows

MOST_INPUTS = 65_536
KERNELS = ("bitlinear", "linear", "int8", "quantized_4bit", "quantized_2bit", "bf16")
OURS = ("bitlinear", "linear", "int8")
SHAPES = "3840x2560,2560x2560,13824x2560,2560x6912,6912x2560"  # BitNet-2B: qkv, o, gate and up, down, one of up
ROWS = "1,2,4,5,8,512"
GROUP = 64  # inputs that share a scale in MLX's quantised weights
MAX_ROUNDS, MIN_ROUNDS = 7, 3
MAX_CHAIN = 1000
MAX_COPIES = 4096
CLOCK = 0.01  # seconds: a shorter chain is no estimate
SLOW = 4  # times a row's budget: a product that takes longer is timed once

Chain = Callable[[int], mx.array]  # length -> the last result of a chain of that many products


@dataclass(frozen=True)
class Plan:
    """What to measure. shapes: (n outputs, k inputs); seconds: time for a row of the table, about."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    kernels: tuple[str, ...]
    seconds: float

    @classmethod
    def parse(cls, shapes: str, rows: str, kernels: str, seconds: float) -> Plan:
        """From the options of the command line; UserError names the one at fault."""
        sizes = []
        for text in _items("--shapes", shapes):
            match = re.fullmatch(r"(\d+)x(\d+)", text)
            n, k = map(int, match.groups()) if match else (0, 0)
            if n < 1 or k < 1:
                raise UserError(f"--shapes {text}: must be NxK, as 6912x2560 for 6912 outputs of 2560 inputs")
            if 16 * n * k > memory_bytes():
                raise UserError(f"--shapes {text}: needs more memory than there is")
            if k > MOST_INPUTS:
                raise UserError(f"--shapes {text}: int8 sums are exact up to {MOST_INPUTS} inputs")
            sizes.append((n, k))
        counts = []
        for text in _items("--rows", rows):
            if not text.isdecimal() or not 1 <= int(text) <= 65536:
                raise UserError(f"--rows {text}: must be numbers from 1 to 65536")
            counts.append(int(text))
        for name in _items("--kernels", kernels):
            if name not in KERNELS:
                raise UserError(f"--kernels {name}: choose from {', '.join(KERNELS)}")
        if not 0 < seconds <= 3600:
            raise UserError(f"--seconds {seconds:g}: must be more than 0, and at most 3600")
        return cls(tuple(dict.fromkeys(sizes)), tuple(dict.fromkeys(counts)), _items("--kernels", kernels), seconds)


def _items(option: str, text: str) -> tuple[str, ...]:
    items = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not items:
        raise UserError(f"{option} {text!r}: names nothing")
    return items


@dataclass
class Row:
    """One measurement. threads: of the CPU, None on a GPU; seconds: one product, in the median
    round; repetitions: products timed; gb_per_s: 10^9 bytes of weights a second."""

    kernel: str
    n: int
    k: int
    m: int
    threads: int | None
    seconds: float
    gb_per_s: float
    bandwidth_fraction: float
    ratio_to_m1: float | None
    repetitions: int


@dataclass
class Variant:
    """A chain to be timed with a number of threads, and its times so far: seconds a product."""

    kernel: str
    m: int
    threads: int | None
    weight_bytes: int
    chain: Chain
    length: int = 1
    rounds: int = MIN_ROUNDS
    samples: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Seconds a product."""
        y = self.chain(self.length)
        start = time.perf_counter()
        mx.eval(y)
        return (time.perf_counter() - start) / self.length

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


class Bench:
    """The measurements of a plan on the backend that runs here."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ops: Backend = backend()
        self.on_cpu = device_backend() == "cpu"
        self.all_threads = self._all_threads()
        # Weights of one kernel: several times the last-level cache, and all kernels' within memory.
        wanted = max(256 << 20, 4 * cache_bytes()) if self.on_cpu else 1 << 30
        self.streamed = min(wanted, memory_bytes() // (4 * len(plan.kernels)))
        self.bandwidth: dict[str, Bandwidth] = {}
        self.notes: list[str] = []

    def _all_threads(self) -> int | None:
        """Every thread of our CPU kernels; None where they don't run (the reference's BLAS decides for itself)."""
        if self.ops.NAME != "cpu":
            return None
        from kernels.cpu import default_threads

        return default_threads()

    def threads_of(self, kernel: str) -> tuple[int | None, ...]:
        """Thread counts a kernel is tried with. MLX's CPU products have one thread."""
        if kernel not in OURS:
            return (1,) if self.on_cpu else (None,)
        return (None,) if self.all_threads is None else tuple(sorted({1, self.all_threads}))

    @property
    def total(self) -> int:
        """How often `run` ticks: when a timing is calibrated, and when it is done."""
        each = 2 * sum(len(self.threads_of(kernel)) for kernel in self.plan.kernels)
        return len(self.plan.shapes) * len(self.plan.rows) * each

    def run(self, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """The JSON object of `python -m kernels bench`."""
        rows: list[Row] = []
        self._measure_bandwidth()
        for n, k in self.plan.shapes:
            rows += self._shape(n, k, tick)
            self._measure_bandwidth()
        if not rows:
            raise UserError("; ".join(self.notes))
        for row in rows:
            row.bandwidth_fraction = row.gb_per_s / self._read_rate(row.threads)
        return {
            "device": device_name(),
            "backend": self.ops.NAME,
            "versions": versions(),
            "read_gb_per_s": {name: found.gb_per_s for name, found in self.bandwidth.items()},
            "read_method": {name: found.method for name, found in self.bandwidth.items()},
            "streamed_bytes": self.streamed,
            "rows": [asdict(row) for row in rows],
        }

    def _measure_bandwidth(self) -> None:
        """Between the shapes, since a shared machine is not always equally fast; the best one counts."""
        if not self.on_cpu:
            self.bandwidth["gpu"] = GpuReader(self.streamed).measure().best(self.bandwidth.get("gpu"))
            return
        reader = CpuReader(self.streamed)
        for threads in sorted({1, self.all_threads or processors()}):
            name = str(threads)
            self.bandwidth[name] = reader.measure(threads).best(self.bandwidth.get(name))

    def _read_rate(self, threads: int | None) -> float:
        known = self.bandwidth.get(str(threads))
        return known.gb_per_s if known else max(found.gb_per_s for found in self.bandwidth.values())

    def _shape(self, n: int, k: int, tick: Callable[[], object]) -> list[Row]:
        variants = list(self._variants(n, k))
        for variant in variants:
            self._calibrate(variant)
            tick()
            if variant.samples:
                tick()
        for turn in range(MAX_ROUNDS):
            for variant in variants[:: -1 if turn % 2 else 1]:
                if len(variant.samples) < variant.rounds:
                    self._use_threads(variant.threads)
                    variant.samples.append(variant.time())
                    if len(variant.samples) == variant.rounds:
                        tick()
        self._use_threads(self.all_threads)
        return rows_of(variants, n, k)

    def _calibrate(self, variant: Variant) -> None:
        """How long a chain may be, and how many rounds there is time for; a very slow one is timed here, once."""
        self._use_threads(variant.threads)
        if not self.on_cpu:
            variant.time()  # compiles
        seconds = variant.time()
        while seconds * variant.length < CLOCK and variant.length < MAX_CHAIN:
            variant.length = min(MAX_CHAIN, max(2 * variant.length, int(CLOCK / seconds)))
            seconds = variant.time()
        budget = self.plan.seconds / len(self.threads_of(variant.kernel))
        if seconds > SLOW * budget:
            variant.samples, variant.rounds = [seconds], 1
        else:
            variant.rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(budget / seconds)))
            variant.length = min(MAX_CHAIN, max(1, int(budget / variant.rounds / seconds)))

    def _use_threads(self, count: int | None) -> None:
        if self.all_threads is not None and count is not None:
            from kernels.cpu import _native

            _native.set_threads(count)

    def _variants(self, n: int, k: int) -> Iterator[Variant]:
        """Every kernel, number of rows and thread count; those of a kernel take weights from one rotation."""
        dense = mx.random.normal((n, k), scale=k**-0.5, key=mx.random.key(0))
        ternary = np.random.default_rng(0).integers(-1, 2, (n, k), np.int8)
        rotations: dict[str, Rotation] = {}
        for kernel in self.plan.kernels:
            if kernel.startswith("quantized") and k % GROUP:
                self.notes.append(f"{kernel} is left out for {n}x{k}: MLX wants K to be a multiple of {GROUP}")
                continue
            stored = "ternary" if kernel in ("bitlinear", "linear") else kernel
            if stored not in rotations:
                rotations[stored] = Rotation(partial(self._weight, stored, dense, ternary), self.streamed)
            weights = rotations[stored]
            for m in self.plan.rows:
                chain = self._chain(kernel, weights, m, n, k)
                for threads in self.threads_of(kernel):
                    yield Variant(kernel, m, threads, weights.bytes, chain)

    def _weight(self, stored: str, dense: mx.array, ternary: np.ndarray) -> Any:
        """dense: float32 [n, k]; ternary: int8 [n, k]. A kernel's weight, as it takes it."""
        if stored == "ternary":
            return self.ops.prepare_ternary(ternary, np.full(len(ternary), 0.02, np.float32))
        if stored == "int8":
            return self.ops.prepare_int8(dense)
        if stored == "bf16":
            return (dense.astype(mx.bfloat16),)
        bits = int(stored.removeprefix("quantized_").removesuffix("bit"))
        return mx.quantize(dense.astype(self._float), GROUP, bits)

    @property
    def _float(self) -> mx.Dtype:
        """Of MLX's quantised products: on CPUs they are several times faster in float32 than in bfloat16."""
        return mx.float32 if self.on_cpu else mx.bfloat16

    def _chain(self, kernel: str, weights: Rotation, m: int, n: int, k: int) -> Chain:
        ops, x = self.ops, mx.random.normal((m, k), key=mx.random.key(1))
        if kernel == "bitlinear":
            return _over_int8_rows(ops.bitlinear, weights, x)
        if kernel == "int8":
            return _over_int8_rows(ops.int8_linear, weights, x)
        if kernel == "linear":
            norm, zero = mx.ones((k,)), mx.zeros((m, n))
            mx.eval(x, norm, zero)

            def fused(length: int) -> mx.array:
                y = zero
                for _ in range(length):
                    y = ops.linear(x, weights.next(), norm=norm, eps=1e-5, residual=y)
                return y

            return fused
        if kernel == "bf16":
            return _over_float_rows(lambda x, w: x @ w[0].T, weights, x.astype(mx.bfloat16))
        bits = int(kernel.removeprefix("quantized_").removesuffix("bit"))
        return _over_float_rows(
            lambda x, w: mx.quantized_matmul(x, w[0], w[1], w[2], True, GROUP, bits),
            weights,
            x.astype(self._float),
        )


class Rotation:
    """Copies of a weight, handed out in turn; together they exceed the caches."""

    def __init__(self, make: Callable[[], Any], streamed: int) -> None:
        """make: a tuple of arrays, or a dataclass that holds some; streamed: bytes that the copies have together.

        Ours are prepared one by one, as a model's are: a backend chooses pages and alignment for what it lays out.
        """
        weight = make()
        self.bytes = sum(part.nbytes for part in _arrays(weight))
        count = max(1, min(MAX_COPIES, -(-streamed // self.bytes)))
        again = partial(_copy, weight) if isinstance(weight, tuple | list) else make
        self._copies = [weight, *(again() for _ in range(count - 1))]
        self._next = 0

    def next(self) -> Any:
        weight = self._copies[self._next]
        self._next = (self._next + 1) % len(self._copies)
        return weight


def _arrays(weight: Any) -> list[mx.array]:
    parts = weight if isinstance(weight, tuple | list) else vars(weight).values()
    return [part for part in parts if isinstance(part, mx.array)]


def _copy(weight: Sequence[mx.array]) -> tuple[mx.array, ...]:
    copied = tuple(part + 0 for part in weight)
    mx.eval(copied)
    return copied


def _over_int8_rows(product: Callable[..., mx.array], weights: Rotation, x: mx.array) -> Chain:
    """x: float32 [m, k]. product(int8 [m, k], float32 [m], weight) -> float32 [m, n]."""
    xq, factors = quantize_rows(x)
    mx.eval(xq, factors)

    m = len(factors)

    def chain(length: int) -> mx.array:
        y = product(xq, factors, weights.next())
        for _ in range(length - 1):
            y = product(xq, y.reshape(-1)[:m], weights.next())
        return y

    return chain


def _over_float_rows(product: Callable[..., mx.array], weights: Rotation, x: mx.array) -> Chain:
    """x: float [m, k]. product(x, weight) -> float [m, n]."""
    mx.eval(x)
    m, k = x.shape

    def chain(length: int) -> mx.array:
        changed = mx.array(x)
        y = product(changed, weights.next())
        for _ in range(length - 1):
            # A random matrix of variance 1/k hardly changes the size of what passes through it a thousand times.
            if y.size >= x.size:
                changed = y.reshape(-1)[: m * k].reshape(m, k)
            else:
                changed[:, 0] = y[:, 0]
            y = product(changed, weights.next())
        return y

    return chain


def rows_of(variants: Sequence[Variant], n: int, k: int) -> list[Row]:
    """The table's rows of one shape: each kernel and number of rows at its best thread count.

    `bandwidth_fraction` is left at 0, to be filled in when the bandwidth is known.
    """
    best: dict[tuple[str, int], Variant] = {}
    for variant in variants:
        at = variant.kernel, variant.m
        if at not in best or variant.seconds < best[at].seconds:
            best[at] = variant
    rows = []
    for (kernel, m), variant in best.items():
        single = best.get((kernel, 1))
        rows.append(
            Row(
                kernel=kernel,
                n=n,
                k=k,
                m=m,
                threads=variant.threads,
                seconds=variant.seconds,
                gb_per_s=variant.weight_bytes / variant.seconds / 1e9,
                bandwidth_fraction=0.0,
                ratio_to_m1=variant.seconds / single.seconds if single else None,
                repetitions=variant.length * len(variant.samples),
            )
        )
    return rows


def table(report: dict[str, Any]) -> str:
    """A report for a reader."""
    reads = ", ".join(
        f"{rate:.1f} GB/s"
        + (f" with {name} thread{'s' if name != '1' else ''}" if name.isdecimal() else "")
        + f" ({report['read_method'][name]})"
        for name, rate in report["read_gb_per_s"].items()
    )
    lines = [
        f"{report['device']}, {report['backend']} kernels, MLX {report['versions']['mlx']}; memory reads {reads}",
        "",
        f"{'kernel':<15}{'n':>7}{'k':>7}{'m':>6}{'threads':>9}{'us':>12}{'GB/s':>9}{'of read':>9}{'of m=1':>9}",
    ]
    shape = None
    for row in report["rows"]:
        if shape not in (None, (row["n"], row["k"])):
            lines.append("")
        shape = row["n"], row["k"]
        threads = "-" if row["threads"] is None else row["threads"]
        ratio = "-" if row["ratio_to_m1"] is None else f"{row['ratio_to_m1']:.2f}"
        lines.append(
            f"{row['kernel']:<15}{row['n']:>7}{row['k']:>7}{row['m']:>6}{threads:>9}{row['seconds'] * 1e6:>12.1f}"
            f"{row['gb_per_s']:>9.2f}{row['bandwidth_fraction']:>9.0%}{ratio:>9}"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any], picture: Path) -> None:
    """A kernel's cost relative to one row over the number of rows, a panel for each shape, as PNG."""
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in report["rows"]))
    kernels = list(dict.fromkeys(row["kernel"] for row in report["rows"]))
    with drawing(picture, 1.5 + 3.5 * len(shapes), 4) as figure:
        axes = figure.subplots(1, len(shapes), sharey=True, squeeze=False)
        for axis, (n, k) in zip(axes[0], shapes, strict=True):
            for i, kernel in enumerate(kernels):
                rows = [row for row in report["rows"] if (row["kernel"], row["n"], row["k"]) == (kernel, n, k)]
                rows.sort(key=lambda row: row["m"])
                ratios = [row["ratio_to_m1"] for row in rows]
                axis.plot([row["m"] for row in rows], ratios, color=f"C{i}", marker="o", markersize=3, label=kernel)
            axis.set(title=f"{n} x {k}", xlabel="rows m", xscale="log", yscale="log")
            ticks = sorted({row["m"] for row in report["rows"]})
            axis.set_xticks(ticks, [str(m) for m in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel("cost relative to m = 1")
        axes[0][-1].legend(frameon=False)
        figure.suptitle(f"{report['device']}, {report['backend']} kernels, MLX {report['versions']['mlx']}")
