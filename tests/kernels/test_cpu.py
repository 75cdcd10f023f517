"""The native CPU backend against the reference, for every instruction set of this processor."""

import importlib.util
import os
import platform
import subprocess
import sys
from functools import partial
from typing import Any

import arrays
import mlx.core as mx
import numpy as np
import pytest
from arrays import normal, random_ternary, same_bits

from kernels import reference
from kernels.ops import Epilogue, Int8Weight, TernaryWeight

if platform.system() != "Linux":
    pytest.skip("the native CPU backend is built on Linux only", allow_module_level=True)

from kernels import cpu
from kernels.cpu import _native

pytest_plugins = ("cpu_fixtures",)

EPILOGUES: list[Epilogue | None] = [None, "relu2_mul", "silu_mul"]
# Shapes of the embedded teacher (fused QKV, output, fused gate and up, down), and odd ones: less than a
# tile, no whole tiles or blocks, gates whose halves are no whole tiles.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (12, 20), (33, 70), (40, 1)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 64, 130]


# BitLinear


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_bitlinear_equals_the_reference_by_bits(isa: str, threads: int, n: int, k: int) -> None:
    ternary, scale = random_ternary(n, k)
    ours, theirs = cpu.prepare_ternary(ternary, scale), reference.prepare_ternary(ternary, scale)
    assert (ours.n, ours.k) == (n, k)
    for m in ROWS:
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        assert same_bits(cpu.bitlinear(xq, s, ours), reference.bitlinear(xq, s, theirs)), m


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(2560, 6912), (6912, 2560)])
def test_products_of_bitnet_2b_equal_the_reference_by_bits(isa: str, n: int, k: int) -> None:
    ternary, scale = random_ternary(n, k)
    ours, theirs = cpu.prepare_ternary(ternary, scale), reference.prepare_ternary(ternary, scale)
    for m in (1, 4, 8):
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        assert same_bits(cpu.bitlinear(xq, s, ours), reference.bitlinear(xq, s, theirs)), m


@pytest.mark.parametrize("m", [1, 3, 8, 13])
@pytest.mark.parametrize("value", [127, -127, -128])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_overflow(isa: str, m: int, value: int, sign: int) -> None:
    n, k = 48, 8192  # longer than any stretch of 16-bit sums
    ternary = np.full((n, k), sign, np.int8)
    xq = mx.full((m, k), value, mx.int8)
    s = mx.full((m,), 3.0)
    y = cpu.bitlinear(xq, s, cpu.prepare_ternary(ternary, np.ones(n, np.float32)))
    expected = np.float32(sign * value * k) * (np.float32(1) / np.float32(3))
    assert (np.array(y) == expected).all()


def test_sums_are_exact_at_the_longest_k_that_the_definition_allows(isa: str) -> None:
    k = 132_096
    xq = mx.full((1, k), 127, mx.int8)
    y = cpu.bitlinear(xq, mx.ones((1,)), cpu.prepare_ternary(np.ones((16, k), np.int8), np.ones(16, np.float32)))
    assert (np.array(y) == 127 * k).all()


# int8 weights


def int8_pair(n: int, k: int, seed: int = 0) -> tuple[Int8Weight, Int8Weight]:
    """Ours and the reference's."""
    data = normal(n, k, seed=seed)
    return cpu.prepare_int8(data), reference.prepare_int8(data)


def exact_product(xq: np.ndarray, s: np.ndarray, weight: Int8Weight) -> np.ndarray:
    """The definition in whole numbers: one rounding of the sum, one of scale / s and one of their product."""
    sums = xq.astype(np.int64) @ np.array(weight.data).astype(np.int64).T
    assert np.abs(sums).max() < 2**31
    return sums.astype(np.float32) * (np.array(weight.scale)[None] / s[:, None])


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [*SHAPES, (16, 8192), (2, 6912)])
def test_int8_products_equal_the_reference_by_bits(isa: str, threads: int, n: int, k: int) -> None:
    ours, theirs = int8_pair(n, k)
    assert (ours.n, ours.k) == (n, k) and same_bits(ours.scale, theirs.scale)
    for m in ROWS:
        xq, s = reference.quantize_rows(normal(m, k, seed=m))
        y = cpu.int8_linear(xq, s, ours)
        assert same_bits(y, reference.int8_linear(xq, s, theirs)), m
        assert same_bits(y, mx.array(exact_product(np.array(xq), np.array(s), theirs))), m


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("k", [37, 576, 8192, 65536])
def test_int8_sums_are_exact_and_rounded_once(isa: str, m: int, k: int) -> None:
    """Extreme codes reach 2^30, where float32 has steps of 64, and saturate any sum of pairs in int16."""
    rng = np.random.default_rng(k)
    rows = rng.choice(np.array([-128, -127, 127], np.int8), (m, k))
    rows[0] = 127
    rows[-1] = rows[-1] if m == 1 else -128
    if m > 2:
        rows[1] = 0
    data = rng.choice(np.array([-127, 126, 127], np.int8), (40, k)).astype(np.float32)
    data[0], data[1], data[2] = 127, -127, np.where(np.arange(k) % 2, 127, -127)
    data[3] = 0
    data[4:, 0] = 127  # so that every scale is one
    s = rng.uniform(0.5, 2, m).astype(np.float32)
    theirs = reference.prepare_int8(mx.array(data))
    y = cpu.int8_linear(mx.array(rows), mx.array(s), cpu.prepare_int8(mx.array(data)))
    assert same_bits(y, mx.array(exact_product(rows, s, theirs)))


def test_rows_of_zeros_have_products_of_zero(isa: str) -> None:
    ours, _ = int8_pair(40, 100)
    assert (np.array(cpu.linear(mx.zeros((3, 100)), ours)) == 0).all()
    assert (np.array(cpu.linear(normal(3, 100), cpu.prepare_int8(mx.zeros((40, 100))))) == 0).all()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_rounding_part_by_part_gives_the_same_weight(monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype) -> None:
    data = normal(100, 70).astype(dtype)
    whole = cpu.prepare_int8(data)
    monkeypatch.setattr(cpu, "ROUNDED_AT_ONCE", 33)
    parts = cpu.prepare_int8(data)
    assert same_bits(whole.data, parts.data) and same_bits(whole.scale, parts.scale)


# Both kinds of rounded weights


def extreme_rows(k: int) -> mx.array:
    rng = np.random.default_rng(k)
    rows = rng.normal(0, 1, (8, k)).astype(np.float32)
    rows[0] = 0
    rows[1, k // 2] = 1e30  # all others round to zero
    rows[2] = np.arange(k) % 254 - 126.5  # halves: s is nearly 1
    rows[2, 0] = 127
    rows[3] = np.where(np.arange(k) % 2, 127, -127)
    rows[4] = 1e-7  # below the smallest divisor
    rows[5] *= 1e-30
    rows[6] = 3e38
    rows[7, k - 1] = -1e4  # the largest magnitude is negative, and last
    return mx.array(rows)


@pytest.mark.parametrize("k", [1, 15, 16, 20, 63, 576, 1536])
def test_quantised_rows_equal_the_reference_by_bits(isa: str, k: int) -> None:
    for x in (extreme_rows(k), normal(40, k), normal(k, 9).T):  # the last is strided
        ours, theirs = cpu.quantize_rows(x), reference.quantize_rows(x)
        assert same_bits(ours[0], theirs[0])
        assert same_bits(ours[1], theirs[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ternary", "int8"])
def test_linear_without_a_norm_equals_the_reference_by_bits(isa: str, threads: int, kind: str) -> None:
    n, k = 3072, 576
    ours, theirs = weights_of(kind, n, k)
    for x in (extreme_rows(k)[:6], normal(64, k)):
        assert same_bits(cpu.linear(x, ours), reference.linear(x, theirs))
        residual = normal(x.shape[0], n)
        assert same_bits(cpu.linear(x, ours, residual=residual), reference.linear(x, theirs, residual=residual))
        relu2: dict[str, Any] = {"epilogue": "relu2_mul"}
        assert same_bits(cpu.linear(x, ours, **relu2), reference.linear(x, theirs, **relu2))


def test_packing_refuses_what_is_not_ternary() -> None:
    for wrong in (2, -2, 127, -128):
        ternary = np.zeros((4, 20), np.int8)
        ternary[3, 19] = wrong
        with pytest.raises(ValueError, match="-1, 0 or 1"):
            cpu.prepare_ternary(ternary, np.ones(4, np.float32))


def test_shapes_that_do_not_fit_are_refused() -> None:
    weight = cpu.prepare_ternary(*random_ternary(32, 64))
    with pytest.raises(ValueError, match="weight's k"):
        cpu.linear(normal(1, 63), weight)
    with pytest.raises(ValueError, match="residual"):
        cpu.linear(normal(1, 64), weight, residual=normal(1, 31))
    with pytest.raises(ValueError, match="size"):
        cpu.linear(normal(1, 64), TernaryWeight(weight.data[:-1], weight.scale, 32, 64))
    with pytest.raises(ValueError, match="even"):
        cpu.linear(normal(1, 64), cpu.prepare_ternary(*random_ternary(33, 64)), epilogue="silu_mul")
    eight, _ = int8_pair(32, 64)
    with pytest.raises(ValueError, match="size"):
        cpu.linear(normal(1, 64), Int8Weight(weight.data, weight.scale, 32, 64))  # ternary data
    with pytest.raises(ValueError, match="weight's k"):
        cpu.int8_linear(mx.zeros((1, 63), mx.int8), mx.ones((1,)), eight)
    with pytest.raises(ValueError, match="at least one row"):
        cpu.linear(mx.zeros((0, 64)), weights_of("float32", 32, 64)[0])
    with pytest.raises(ValueError, match="not exact"):
        cpu.linear(mx.zeros((1, 65_537)), cpu.prepare_int8(mx.zeros((1, 65_537))))


# The fused linear, whatever the weights are


weights_of = partial(arrays.weights_of, cpu)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("kind", ["ternary", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize(("n", "k"), [(960, 576), (36, 70), (2, 1)])
def test_linear_gives_a_row_the_same_bits_alone_and_among_others(
    isa: str, threads: int, kind: str, n: int, k: int, epilogue: Epilogue | None
) -> None:
    ours, theirs = weights_of(kind, n, k)
    x, norm = normal(70, k), normal(k)
    residual = normal(70, n if epilogue is None else n // 2, seed=5)
    options: dict[str, Any] = {"norm": norm, "eps": 1e-5, "epilogue": epilogue}
    alone = [cpu.linear(x[i : i + 1], ours, residual=residual[i : i + 1], **options) for i in range(70)]
    for m in (*range(1, 10), 33, 70):
        for first in {0, max(8, m) - m, 70 - m}:
            rows = slice(first, first + m)
            together = cpu.linear(x[rows], ours, residual=residual[rows], **options)
            assert same_bits(together, mx.concatenate(alone[rows])), (m, first)
    expected = np.array(reference.linear(x, theirs, residual=residual, **options))
    close_to_reference(np.concatenate([np.array(a) for a in alone]), expected, kind)


def close_to_reference(y: np.ndarray, expected: np.ndarray, kind: str) -> None:
    """Ternary and int8 products follow an int8 rounding, which may fall the other way after a norm that
    differs in its last bit: one step of one input. Float ones are within float32's own error."""
    top = np.abs(expected).max()
    error = np.abs(y - expected).max() / top
    assert error < (0.02 if kind in ("ternary", "int8") else 1e-5), error
    if kind in ("ternary", "int8") and y.size > 1000:
        assert np.median(np.abs(y - expected)) < 1e-6 * top


@pytest.mark.parametrize("kind", ["ternary", "int8", "bfloat16", "float32"])
@pytest.mark.parametrize("m", [9, 130])
def test_many_rows_are_close_to_the_reference(isa: str, kind: str, m: int) -> None:
    ours, theirs = weights_of(kind, 960, 576)
    options: dict[str, Any] = {"norm": normal(576), "eps": 1e-5, "epilogue": "silu_mul", "residual": normal(m, 480)}
    x = normal(m, 576)
    y, expected = cpu.linear(x, ours, **options), reference.linear(x, theirs, **options)
    close_to_reference(np.array(y), np.array(expected), kind)


def test_inputs_may_be_slices_transposes_and_broadcasts(isa: str) -> None:
    weight, _ = weights_of("ternary", 48, 64)
    eight, _ = weights_of("int8", 48, 64)
    dense, _ = weights_of("bfloat16", 48, 64)
    wide = normal(4, 200)
    for x in (wide[:, 40:104], wide[:, :128:2], normal(64, 4).T, mx.broadcast_to(wide[:1, :64], (4, 64))):
        for w in (weight, eight, dense):
            residual = normal(48, 4).T
            copied = cpu.linear(mx.array(np.array(x)), w, residual=mx.array(np.array(residual)))
            assert same_bits(cpu.linear(x, w, residual=residual), copied)


# Threads, processes, BLAS


def test_results_from_several_streams_at_once_are_right() -> None:
    weight, theirs = weights_of("ternary", 3072, 576)
    x = normal(8, 576)
    expected = reference.linear(x, theirs)
    mx.eval(expected)
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    results = []
    for _ in range(20):
        for stream in streams:
            with mx.stream(stream):
                results.append(cpu.linear(x, weight))
    mx.eval(results)
    assert all(same_bits(y, expected) for y in results)


def test_a_forked_child_has_helpers_of_its_own() -> None:
    """Helper threads do not survive a fork: the child must make new ones, and not wait for the old."""
    script = """
import os, signal
from kernels.cpu import _native
_native.set_threads(4)
expected = sum(range(1, 2001))
assert _native.parallel_sum(2000) == expected
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = all(_native.parallel_sum(2000) == expected for _ in range(200))
        os._exit(0 if right and len(os.listdir("/proc/self/task")) == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert _native.parallel_sum(2000) == expected
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_helpers_that_are_not_wanted_sleep_on() -> None:
    """They would take a core from those that are, and these might not wake."""
    script = """
import os, time
from kernels.cpu import _native
others = set(os.listdir("/proc/self/task"))
def slept():
    times = {}
    for helper in set(os.listdir("/proc/self/task")) - others:
        with open(f"/proc/self/task/{helper}/status") as status:
            times[helper] = int(next(line for line in status if line.startswith("voluntary")).split()[1])
    return times
_native.set_threads(8)
assert _native.parallel_sum(2000) == 2001000
before = None
while before != (before := slept()):
    time.sleep(0.1)
_native.set_threads(2)
for _ in range(30):
    assert _native.parallel_sum(2000) == 2001000
    time.sleep(0.001)
print(len(before), sum(count != before[helper] for helper, count in slept().items()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["7", "1"]


def test_a_limit_on_threads_costs_speed_only() -> None:
    """Without room for all their stacks some helpers cannot be started, as under a limit on processes."""
    script = """
import os, resource
from kernels.cpu import _native
with open("/proc/self/statm") as sizes:
    used = int(sizes.read().split()[0]) * resource.getpagesize()
before = len(os.listdir("/proc/self/task"))
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)
_native.set_threads(64)
for _ in range(100):
    assert _native.parallel_sum(2000) == 2001000
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert 0 < int(done.stdout) < 63


def test_environment_variables_choose_instructions_and_threads() -> None:
    script = "from kernels.cpu import _native; print(_native.isa(), _native.threads())"
    environment = {**os.environ, "BITDRAFT_ISA": "portable", "BITDRAFT_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["portable", "3"]
    with pytest.raises(ValueError, match="not available here"):
        _native.select_isa("z80")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_fast_blas_gives_the_same_products(threads: int) -> None:
    """Of every shape, turned and not, whole and cut into tiles for several threads."""
    script = """
import sys
import mlx.core as mx, numpy as np
from kernels import cpu
from kernels.cpu import _native
_native.set_threads(int(sys.argv[1]))
rng = np.random.default_rng(0)
pairs = [((m, 70), (70, n)) for m in (1, 2, 33) for n in (1, 2, 40)] + [((3, 5, 7), (3, 7, 6))]
pairs += [((513, 129), (129, 1001)), ((1, 1500), (1500, 3001)), ((3001, 1500), (1500, 1)), ((40, 999), (999, 2050)),
          ((2050, 333), (333, 37)), ((2, 257, 130), (2, 130, 301)), ((1700, 64), (64, 1300))]
def normal(shape):
    return rng.normal(0, 1, shape).astype(np.float32)
def turned(x):
    return np.ascontiguousarray(np.swapaxes(x, -1, -2)).swapaxes(-1, -2)
def close(got, want):
    np.testing.assert_allclose(np.array(got), want, rtol=1e-4, atol=2e-4)
def products():
    for left, right in pairs:
        a, b = normal(left), normal(right)
        want, c = a.astype(np.float64) @ b, normal((*left[:-1], right[-1]))
        for x in (a, turned(a)):
            for y in (b, turned(b)):
                close(mx.array(x) @ mx.array(y), want)
        close(mx.addmm(mx.array(c), mx.array(a), mx.array(b), alpha=0.5, beta=-2.0), 0.5 * want - 2.0 * c)
products()
assert not _native.blas_installed()
installed = cpu.use_fast_blas()
assert installed == _native.blas_installed()
assert cpu.use_fast_blas() == installed
products()
if installed:
    wide = np.full((700, 500), 9.0, np.float32)  # what lies beside a result stays
    for x in (normal((300, 90)), turned(normal((300, 90))), normal((400, 200))[50:350, 60:150]):
        for y in (normal((90, 401)), turned(normal((90, 401))), normal((100, 500))[5:95, 3:404]):
            cpu.matmul(x, y, wide[100:400, 20:421])
            close(wide[100:400, 20:421], x.astype(np.float64) @ y)
    wide[100:400, 20:421] = 9.0
    assert (wide == 9.0).all()
    for bad in ((normal((3, 4)), normal((5, 6)), np.empty((3, 6), np.float32)),
                (normal((6, 8))[::2, ::2], normal((4, 6)), np.empty((3, 6), np.float32)),
                (normal((3, 4)), normal((4, 6)), np.empty((6, 3), np.float32).T)):
        try:
            cpu.matmul(*bad)
        except ValueError:
            continue
        raise AssertionError(bad)
print(installed)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(threads)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == "True") == (importlib.util.find_spec("scipy_openblas32") is not None)


def test_memory_that_is_not_there_is_an_error() -> None:
    """As under `ulimit -v`: MLX's allocator hands out a null pointer, and the process would be gone without a word."""
    script = """
import resource
import mlx.core as mx
from kernels import cpu
x = mx.zeros((4096, 4096))
mx.eval(x, cpu.quantize_rows(x[:1]))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 8_000_000,) * 2)
try:
    mx.eval(cpu.quantize_rows(x))
except MemoryError:
    print("told")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def test_programs_that_are_started_keep_their_time_slices() -> None:
    """A backend asks for short ones for its own threads only."""
    script = """
import ctypes, struct, subprocess, sys
def slice_of_this_thread():
    call = {"x86_64": 315, "aarch64": 275}[__import__("platform").machine()]  # sched_getattr
    data = ctypes.create_string_buffer(48)
    assert ctypes.CDLL(None).syscall(call, 0, data, 48, 0) == 0
    return struct.unpack("IIQiIQQQ", data.raw)[5]
before = slice_of_this_thread()
if sys.argv[1] == "parent":
    import kernels.cpu
    from kernels.cpu import _native
    _native.parallel_sum(100)
    subprocess.run([sys.executable, "-c", sys.argv[2], "child", ""], check=True)
print(before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "parent", script], capture_output=True, text=True, timeout=60, check=True
    )
    child, parent = done.stdout.split()
    assert child == parent
