"""The tail-bucket losses: the definition against float64 numpy, the fused head against the definition."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from distill.data.draws import draw_on_host, tally
from distill.training.cpu import CpuHead
from distill.training.losses import (
    LOSSES,
    FusedHead,
    bucket_loss,
    drawn_buckets,
    head_rows,
    reference_loss,
    tail_bucket_kl,
    teacher_buckets,
)
from kernels.errors import UserError

N, V, K, H = 37, 150, 6, 16


def teacher(seed: int = 0, temperature: float = 1.0, spread: float = 3.0) -> dict[str, np.ndarray]:
    """A random teacher's whole logits, and what shards keep of them."""
    logits = spread * np.random.default_rng(seed).standard_normal((N, V))
    ids = np.argsort(-logits, axis=-1)[:, :K]
    lse_one = np.log(np.exp(logits).sum(-1))
    lse = np.log(np.exp(logits / temperature).sum(-1))
    top = np.take_along_axis(logits, ids, -1) - lse_one[:, None]
    return {"logits": logits, "ids": ids, "top": top, "lse_one": lse_one, "lse": lse}


def numpy_kl(
    z: np.ndarray, known: dict[str, np.ndarray], mask: np.ndarray, temperature: float, kept: np.ndarray
) -> float:
    """The formula of docs/how-it-works.md, a position at a time in float64; z: [n, len(kept)]."""
    total = 0.0
    for i in np.flatnonzero(mask):
        q = np.exp(z[i] / temperature - np.log(np.exp(z[i] / temperature).sum()))
        place = {int(token): j for j, token in enumerate(kept)}
        chosen, kl, p_sum = [], 0.0, 0.0
        for token, logprob in zip(known["ids"][i], known["top"][i], strict=True):
            if int(token) not in place:
                continue
            p = np.exp((logprob + known["lse_one"][i]) / temperature - known["lse"][i])
            chosen.append(place[int(token)])
            kl += p * (np.log(p) - np.log(q[chosen[-1]]))
            p_sum += p
        r = min(max(1 - p_sum, 0.0), 1.0)
        tail = np.delete(q, chosen).sum()
        total += kl + (r * (np.log(r) - np.log(tail)) if r > 0 else 0.0)
    return total / mask.sum()


def as_mlx(known: dict[str, np.ndarray]) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    return (
        mx.array(known["ids"].astype(np.int32)),
        *(mx.array(known[name].astype(np.float32)) for name in ("top", "lse_one", "lse")),
    )


KEPT = np.sort(np.random.default_rng(5).permutation(V)[:90])


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "trimmed"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_definition_equals_numpy(kept: np.ndarray | None, temperature: float) -> None:
    known = teacher(temperature=temperature)
    every = np.arange(V) if kept is None else kept
    rng = np.random.default_rng(1)
    z, mask = rng.standard_normal((N, len(every))), rng.random(N) < 0.7
    ours = tail_bucket_kl(mx.array(z.astype(np.float32)), *as_mlx(known), mx.array(mask), temperature, kept, V)
    assert ours.item() == pytest.approx(numpy_kl(z, known, mask, temperature, every), rel=1e-5)


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "trimmed"])
def test_gradient_equals_finite_differences(kept: np.ndarray | None) -> None:
    known, temperature = teacher(2, 0.6), 0.6
    every = np.arange(V) if kept is None else kept
    rng = np.random.default_rng(3)
    z, mask = rng.standard_normal((N, len(every))), rng.random(N) < 0.7
    gradient = np.array(
        mx.grad(lambda x: tail_bucket_kl(x, *as_mlx(known), mx.array(mask), temperature, kept, V))(
            mx.array(z.astype(np.float32))
        )
    )
    row = int(np.flatnonzero(mask)[0])
    head = {int(t): j for j, t in enumerate(every)}
    in_s = [head[int(t)] for t in known["ids"][row] if int(t) in head]
    for j in {*in_s, 0, 1, 2, len(every) - 1}:
        step = np.zeros_like(z)
        step[row, j] = 1e-5
        up, down = (numpy_kl(z + s * step, known, mask, temperature, every) for s in (1, -1))
        assert gradient[row, j] == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-7)
    assert not gradient[~mask].any()


def test_zero_at_the_teacher_itself_and_positive_elsewhere() -> None:
    known = teacher(4)
    own = tail_bucket_kl(mx.array(known["logits"].astype(np.float32)), *as_mlx(known), mx.ones(N) > 0)
    assert abs(own.item()) < 1e-5
    other = mx.array((known["logits"] + np.random.default_rng(0).standard_normal((N, V))).astype(np.float32))
    assert tail_bucket_kl(other, *as_mlx(known), mx.ones(N) > 0).item() > 0.05


def test_finite_where_the_tail_vanishes() -> None:
    """A draft sure of an id in S has a tail below float32's range: the loss stays right in logs."""
    known = teacher(6)
    z = np.zeros((N, V), np.float32)
    np.put_along_axis(z, known["ids"], 200.0, axis=-1)
    ids, top, lse_one, lse = as_mlx(known)
    value, gradient = mx.value_and_grad(lambda x: tail_bucket_kl(x, ids, top, lse_one, lse, mx.ones(N) > 0))(
        mx.array(z)
    )
    p = teacher_buckets(top, lse_one, lse, mx.ones(ids.shape) > 0)
    log_q = np.array([-np.log(K)] * K + [np.log(V - K) - 200 - np.log(K)])
    expected = (np.array(p) * (np.log(np.array(p)) - log_q)).sum(-1).mean()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(np.array(gradient)).all()


CASES = [
    (name, kept, how)
    for name in LOSSES
    for kept in (None, KEPT, "none of S")
    for how in ("eager", "numpy", "compiled")
    if how != "compiled" or (name == "kl" and kept is KEPT)  # compiling takes seconds on a CPU
]


@pytest.mark.parametrize(("name", "kept", "how"), CASES)
def test_fused_equals_reference(name: str, kept: np.ndarray | str | None, how: str) -> None:
    temperature = 0.6
    known = teacher(7, temperature)
    if isinstance(kept, str):
        kept = np.setdiff1d(np.arange(V), known["ids"][0])  # all of S is outside for the first row
    size = V if kept is None else len(kept)
    rng = np.random.default_rng(8)
    hidden = mx.array(rng.standard_normal((N, H)).astype(np.float32))
    weight = mx.array((0.5 * rng.standard_normal((size, H))).astype(np.float32))
    weights = mx.array((rng.random(N) < 0.6).astype(np.float32))
    ids, top, lse_one, lse = as_mlx(known)
    rows = head_rows(kept, V)[ids]
    p = teacher_buckets(top, lse_one, lse, rows >= 0, temperature)

    def plain(hidden: mx.array, weight: mx.array) -> mx.array:
        return reference_loss(name, hidden @ weight.T / temperature, rows, p, weights)

    # The smallest chunk is 64 positions: repeat them, so that there are several, the last one ragged.
    kind = CpuHead if how == "numpy" else FusedHead
    head = kind(name, temperature, chunk_bytes=1, eager=how != "compiled")
    many = [mx.concatenate([a] * 5) for a in (rows, p, weights)]

    def fused(hidden: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        return head(mx.concatenate([hidden] * 5), weight, *many)

    run = mx.value_and_grad(fused, argnums=(0, 1))
    (value, stats), gradients = (mx.compile(run) if how == "compiled" else run)(hidden, weight)
    expected, expected_gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-6)
    assert not np.array(gradients[0])[np.array(weights) == 0].any()

    evaluated, stats_again = head.evaluate(mx.concatenate([hidden] * 5), weight, *many)
    assert evaluated.item() == pytest.approx(expected.item(), rel=1e-5)
    assert np.allclose(np.array(stats), np.array(stats_again), rtol=1e-6)
    choices = (hidden @ weight.T).argmax(axis=-1) == rows[:, 0]
    assert stats[0].item() == 5 * (choices * weights).sum().item()
    assert stats[2].item() == 5 * weights.sum().item()


@pytest.mark.parametrize("head_type", [FusedHead, CpuHead])
def test_a_frozen_head_gives_the_same_gradient_of_what_it_reads(head_type: type[FusedHead]) -> None:
    known, rng = teacher(3), np.random.default_rng(4)
    hidden, weight = (mx.array(rng.standard_normal((size, H)).astype(np.float32)) for size in (N, V))
    ids, top, lse_one, lse = as_mlx(known)
    p = teacher_buckets(top, lse_one, lse, mx.ones(ids.shape) > 0)

    def gradient(frozen: bool) -> np.ndarray:
        head = head_type("kl", chunk_bytes=1, eager=True, frozen=frozen)
        return np.array(mx.grad(lambda hidden: head(hidden, weight, ids, p, mx.ones(N))[0])(hidden))

    assert np.array_equal(gradient(True), gradient(False)) and gradient(True).any()


def test_other_divergences_equal_numpy_and_mix() -> None:
    """Where the teacher has no tail, the reverse KL takes it for one of 1e-6."""
    rng = np.random.default_rng(6)
    p, q = (x / x.sum(-1, keepdims=True) for x in rng.random((2, N, K + 1)))
    p[0, :-1] /= 1 - p[0, -1]
    p[0, -1] = 0
    middle = (p + q) / 2
    js = 0.5 * (np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / middle), 0) + q * np.log(q / middle)).sum(-1)
    reverse = (q * np.log(q / np.maximum(p, 1e-6))).sum(-1)
    given = mx.array(np.log(q).astype(np.float32)), mx.array(p.astype(np.float32))
    for name, expected in (("js", js), ("reverse_kl", reverse), ("js=3,reverse_kl=1", 0.75 * js + 0.25 * reverse)):
        assert np.allclose(np.array(bucket_loss(name)(*given)), expected, rtol=1e-4, atol=1e-6), name


def test_expected_acceptance_bounds_the_true_one() -> None:
    """sum over S of min(p, q) is below sum over the vocabulary, and 1 - tv is above it."""
    known = teacher(9, spread=1.5)
    z = known["logits"] + np.random.default_rng(1).standard_normal((N, V))
    p = np.exp(known["logits"] - known["lse"][:, None])
    q = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    true = np.minimum(p, q).sum(-1).mean()
    ids, top, lse_one, lse = as_mlx(known)
    buckets = teacher_buckets(top, lse_one, lse, mx.ones(ids.shape) > 0)
    eye = mx.eye(V)
    loss, stats = FusedHead("tv").evaluate(mx.array(z.astype(np.float32)), eye, ids, buckets, mx.ones(N))
    assert (stats[1] / stats[2]).item() < true < 1 - loss.item()


def drawn(logits: np.ndarray, draws: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids and counts of draws from softmax(logits), as shards have them. logits: [n, v]."""
    uniform = np.random.default_rng(seed).random((len(logits), draws), np.float32)
    first = logits.argmax(axis=1).astype(np.int32)
    return tally(first, draw_on_host(logits.astype(np.float32), uniform), np.ones(len(logits), bool))


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "trimmed"])
@pytest.mark.parametrize("head_type", [FusedHead, CpuHead])
def test_the_gradient_of_draws_is_without_bias(kept: np.ndarray | None, head_type: type[FusedHead]) -> None:
    """Over many draws it comes to that of the KL over the whole of the head's vocabulary, to within what chance
    explains (5 standard deviations of independent draws); that of the top 6 with their tail does not."""
    many, draws = 2000, 5
    logits = teacher(11, spread=1.5)["logits"][:1]
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    every = np.arange(V) if kept is None else kept
    z = np.random.default_rng(3).standard_normal(len(every)).astype(np.float32)
    q = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum()
    exact = p[every].sum() * q - p[every]
    deviation = np.sqrt(p[every] * (1 - p[every]) / (many * draws)) + q * np.sqrt(0.25 / (many * draws))

    def gradient(rows: mx.array, p: mx.array) -> np.ndarray:
        """By the logits, the identity being the head; a mean over positions that are all the same."""
        head, weights = head_type("kl", eager=True), mx.ones(len(rows))
        by_position = mx.grad(lambda x: head(x, mx.eye(len(every)), rows, p, weights)[0])
        return np.array(by_position(mx.array(np.tile(z, (len(rows), 1))))).sum(axis=0)

    ids, counts = drawn(np.repeat(logits, many, axis=0), draws)
    rows = mx.where(mx.array(ids) < 0, -1, head_rows(kept, V)[mx.maximum(mx.array(ids), 0)])
    found = gradient(rows, drawn_buckets(mx.array(counts.astype(np.int32)), rows >= 0))
    assert (np.abs(found - exact) < 5 * deviation).all()
    top = np.argsort(-logits[0])[:K].astype(np.int32)
    rows = head_rows(kept, V)[mx.array(top)][None]
    of_top = gradient(rows, mx.array(np.append(p[top], 1 - p[top].sum())[None].astype(np.float32)))
    assert (np.abs(of_top - exact) > 5 * deviation).sum() > 20


@pytest.mark.parametrize("name", ["kl", "ce"])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "trimmed"])
def test_losses_of_draws_equal_numpy(name: str, kept: np.ndarray | None) -> None:
    """A position at a time; the fused heads give what the reference gives."""
    ids, counts = drawn(teacher(12)["logits"], 7)
    ids[-1], counts[-1] = -1, 0  # padding
    every = np.arange(V) if kept is None else kept
    z = np.random.default_rng(4).standard_normal((N, len(every))).astype(np.float32)
    weights = np.append(np.ones(N - 1, np.float32), np.float32(0))
    rows = np.where(ids < 0, -1, np.array(head_rows(kept, V))[ids])
    log_q = z.astype(np.float64) - np.log(np.exp(z.astype(np.float64)).sum(-1, keepdims=True))
    total = agree = overlap = 0.0
    for i in range(N - 1):
        known = {int(row): c / 7 for row, c in zip(rows[i], counts[i], strict=True) if row >= 0}
        if name == "kl":
            total += sum(p * (np.log(p) - log_q[i, row]) for row, p in known.items() if p > 0)
        elif rows[i, 0] >= 0:
            total -= log_q[i, rows[i, 0]]
        else:
            total -= np.log(1 - sum(np.exp(log_q[i, row]) for row in known))
        agree += int(z[i].argmax() == rows[i, 0])
        overlap += sum(min(p, np.exp(log_q[i, row])) for row, p in known.items())
    buckets = drawn_buckets(mx.array(counts.astype(np.int32)), mx.array(rows) >= 0)
    given = (mx.array(rows), buckets, mx.array(weights))
    assert reference_loss(name, mx.array(z), *given).item() == pytest.approx(total / (N - 1), rel=1e-5)
    for head_type in (FusedHead, CpuHead):
        value, stats = head_type(name, eager=True).evaluate(mx.array(z), mx.eye(len(every)), *given)
        assert value.item() == pytest.approx(total / (N - 1), rel=1e-5)
        assert stats.tolist() == pytest.approx([agree, overlap, N - 1], rel=1e-5)


def test_unknown_loss_is_named() -> None:
    with pytest.raises(UserError, match="--loss kld: known are kl, ce, tv, reverse_kl, js"):
        bucket_loss("kld")
