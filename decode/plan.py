"""Predictions from bytes alone: what a teacher reads for a token, and what a draft can save.

Decoding is bound by memory: a step takes the bytes it reads over the bandwidth. A verification of k + 1 tokens
reads the weights once, as a step does. With a probability `a` that a drafted token is accepted, each alike,
a verification emits 1 + a + ... + a^k tokens (Leviathan et al. 2023, equation 1), and k draft steps came before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decode.models import formats
from decode.models.checkpoint import embedded_teacher
from decode.models.dimensions import Dimensions
from decode.models.hub import fetch_by_name
from kernels import UserError
from kernels.files import expanded, own_name, read_json

MOST_K = 8
ACCEPTANCES = (0.5, 0.6, 0.7, 0.8)
# Layers and hidden size of the drafts that are compared where none is given.
DRAFTS = ((1, 256), (2, 256), (2, 512), (4, 512), (4, 768), (6, 768), (8, 768), (6, 1024), (8, 1024), (12, 1024))
WORTH = 0.8  # of the speed-up of a draft that costs nothing: what the best draft size has to keep


@dataclass(frozen=True)
class Costs:
    """What a step of the draft, and verifications, cost in steps of the teacher."""

    draft: float
    verify4: float = 1.0  # a verification of four tokens; others in proportion

    def verify(self, m: int) -> float:
        """A verification of m tokens."""
        return 1 + (self.verify4 - 1) * (m - 1) / 3

    def speedup(self, acceptance: float, k: int) -> float:
        """Over plain decoding."""
        return tokens_per_verification(acceptance, k) / (self.verify(k + 1) + k * self.draft)

    def best_k(self, acceptance: float) -> int:
        """Of 1..8."""
        return max(range(1, MOST_K + 1), key=lambda k: self.speedup(acceptance, k))

    def best_speedup(self, acceptance: float) -> float:
        return self.speedup(acceptance, self.best_k(acceptance))


def tokens_per_verification(acceptance: float, k: int) -> float:
    """1 + a + ... + a^k."""
    return sum(acceptance**i for i in range(k + 1))


def break_even(costs: Costs) -> float | None:
    """The least acceptance that makes speculative decoding as fast as plain; None if none does."""
    low, high = 0.0, 1.0
    if costs.best_speedup(high) < 1:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if costs.best_speedup(middle) >= 1 else (middle, high)
    return high


def teacher_bytes(shape: Dimensions, head: str, context: int) -> dict[str, int]:
    """Bytes that a BitNet teacher reads for a token, by part and in total.

    Ternary weights take two bits; a scale of an output is float32, and so are keys and values.
    """
    head_bytes = 2 * shape.head_weights if head == "bf16" else shape.head_weights + 4 * shape.head_rows
    return _total(
        ternary=shape.weights // 4 + 4 * shape.outputs,
        head=head_bytes,
        embedding=2 * shape.hidden,
        cache=shape.cache_bytes(context),
    )


def draft_bytes(shape: Dimensions, context: int) -> dict[str, int]:
    """The same of a draft. When it decodes, its matrices are int8, and ternary where they are in its checkpoint."""
    return _total(
        layers=shape.weights * shape.layer_bits // 8 + 4 * shape.outputs,
        head=shape.head_weights + 4 * shape.head_rows,
        embedding=2 * shape.hidden,
        cache=shape.cache_bytes(context),
    )


def _total(**parts: int) -> dict[str, int]:
    return {**parts, "total": sum(parts.values())}


def make_plan(
    teacher: Dimensions,
    draft: Dimensions | None,
    *,
    bandwidth: float,
    acceptances: Sequence[float] = ACCEPTANCES,
    head: str = "bf16",
    context: int = 512,
    verify_ratio: float = 1.0,
) -> dict[str, Any]:
    """The JSON object of `decode plan`. bandwidth in GB/s; context in tokens; verify_ratio: of four tokens.

    `predictions` and `best_k` are those of the draft, or without one of the best size at each acceptance.
    """
    if not 0 < bandwidth < math.inf:
        raise UserError(f"--bandwidth {bandwidth:g}: must be a number above 0")
    if any(not 0 <= a <= 1 for a in acceptances):
        raise UserError(f"--acceptance {next(a for a in acceptances if not 0 <= a <= 1):g}: must lie in 0..1")
    if context < 0:
        raise UserError(f"--context {context}: must not be negative")
    if not 1 <= verify_ratio < math.inf:
        raise UserError(f"--verify-ratio {verify_ratio:g}: must be at least 1, the cost of a step")
    read = teacher_bytes(teacher, head, context)
    plain = bandwidth * 1e9 / read["total"]
    plan: dict[str, Any] = {
        "bandwidth_gb_per_s": bandwidth,
        "head": head,
        "context": context,
        "verify_ratio": verify_ratio,
        "bytes_per_token": read,
        "plain_tok_per_s": plain,
    }
    sizes = _sizes(teacher, read["total"], context, verify_ratio, acceptances)
    best = {a: _best(sizes, f"{a:g}", Costs(0.0, verify_ratio).best_speedup(a)) for a in acceptances}
    if draft is not None:
        drafted = draft_bytes(draft, context)
        costs = Costs(drafted["total"] / read["total"], verify_ratio)
        planned = dict.fromkeys(acceptances, costs)
        plan["draft_bytes_per_token"] = drafted
        plan["break_even_acceptance"] = break_even(costs)
    else:
        planned = {a: Costs(size["cost"], verify_ratio) for a, size in best.items() if size is not None}
    plan["predictions"] = [
        _prediction(costs, plain, a, k) for a, costs in planned.items() for k in range(1, MOST_K + 1)
    ]
    plan["best_k"] = {f"{a:g}": costs.best_k(a) for a, costs in planned.items()}
    plan["best_draft"] = {f"{a:g}": size for a, size in best.items()}
    plan["drafts"] = sizes
    return plan


def _prediction(costs: Costs, plain: float, acceptance: float, k: int) -> dict[str, float]:
    speedup = costs.speedup(acceptance, k)
    return {
        "acceptance": acceptance,
        "k": k,
        "tokens_per_verification": tokens_per_verification(acceptance, k),
        "speedup": speedup,
        "tok_per_s": plain * speedup,
    }


def _sizes(
    teacher: Dimensions, read: int, context: int, verify_ratio: float, acceptances: Sequence[float]
) -> list[dict[str, Any]]:
    """Drafts of several sizes, each with the whole head and with a quarter of it, as far as they can pay."""
    sizes = []
    for layers, hidden in DRAFTS:
        for rows in (teacher.vocab, teacher.vocab // 4):
            shape = Dimensions.of_draft(layers, hidden, kv_ratio=teacher.kv_ratio, vocab=teacher.vocab, head_rows=rows)
            drafted = draft_bytes(shape, context)
            costs = Costs(drafted["total"] / read, verify_ratio)
            if costs.draft >= 1:
                continue
            sizes.append(
                {
                    "layers": layers,
                    "hidden": hidden,
                    "vocab": rows,
                    "parameters": shape.parameters,
                    "layer_parameters": shape.weights,
                    "bytes_per_token": drafted,
                    "cost": costs.draft,
                    "break_even_acceptance": break_even(costs),
                    "speedup": {f"{a:g}": costs.best_speedup(a) for a in acceptances},
                    "k": {f"{a:g}": costs.best_k(a) for a in acceptances},
                }
            )
    return sizes


def _best(sizes: list[dict[str, Any]], acceptance: str, ideal: float) -> dict[str, Any] | None:
    """The largest draft that pays and keeps WORTH of the ideal speed-up, that of a draft which costs nothing; else the
    fastest that pays."""
    pay = [size for size in sizes if size["speedup"][acceptance] > 1]
    worth = [size for size in pay if size["speedup"][acceptance] >= WORTH * ideal]
    if worth:
        best = max(worth, key=lambda size: (size["layer_parameters"], -size["cost"]))
    elif pay:
        best = max(pay, key=lambda size: size["speedup"][acceptance])
    else:
        return None
    return {name: best[name] for name in ("layers", "hidden", "vocab", "cost")}


def check_teacher(config: dict[str, Any], where: str) -> None:
    """UserError, naming `where`, for the config.json of a model that is no BitNet: its bytes would be counted wrong."""
    try:
        known = "model_type" not in config or formats.is_bitnet(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not known:
        raise UserError(f"{where}: not a BitNet checkpoint (model_type is {config['model_type']!r})")


def find_config(name: str | None, option: str) -> tuple[str, dict[str, Any]]:
    """Name and config.json of a model by folder, file or Hub name; the embedded teacher's by default.

    Nothing but the config is looked at, or fetched.
    """
    if name is None:
        folder = embedded_teacher(option)
        return folder.name, read_json(folder / "config.json")
    path = expanded(name)
    if path.is_file():
        return str(path), read_json(path)
    if path.exists():
        return own_name(path), read_json(path / "config.json")

    def fetch(repo: str, revision: str | None) -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repo, "config.json", revision=revision)

    return name, read_json(fetch_by_name(name, option, "file or folder", fetch))


def table(plan: dict[str, Any]) -> str:
    """The plan for a reader. `chip`, where the plan has it, is named."""
    chip = f" ({plan['chip']}, as published)" if plan.get("chip") else ""
    lines = [
        f"predicted from bytes alone, at {plan['bandwidth_gb_per_s']:g} GB/s{chip}"
        f" and with {plan['context']} tokens in the cache; not measured",
        "",
        "read for a token" + _parts(plan["bytes_per_token"]),
    ]
    if "draft_bytes_per_token" in plan:
        even = plan["break_even_acceptance"]
        lines += [
            "draft reads     " + _parts(plan["draft_bytes_per_token"]),
            f"plain decoding at most {plan['plain_tok_per_s']:.0f} tok/s",
            "no acceptance pays" if even is None else f"the draft pays from an acceptance of {even:.2f} on",
            "",
            *_speed_table(plan, "with the draft"),
            *_best_sizes(plan),
        ]
    else:
        lines += [
            f"plain decoding at most {plan['plain_tok_per_s']:.0f} tok/s",
            "",
            *_draft_table(plan),
            *_best_sizes(plan),
        ]
        if plan["predictions"]:
            lines += ["", *_speed_table(plan, "with the best size at each acceptance")]
    return "\n".join(lines)


def _parts(read: dict[str, int]) -> str:
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in read.items() if name != "total")
    return f" {read['total'] / 1e6:.1f} MB: {parts}"


def _speed_table(plan: dict[str, Any], what: str) -> list[str]:
    """k by acceptance, and the best k of each."""
    acceptances = list(dict.fromkeys(entry["acceptance"] for entry in plan["predictions"]))
    lines = [
        f"tok/s (speed-up) {what}, by acceptance of each drafted token",
        "  k " + "".join(f"{f'a = {a:g}':>16}" for a in acceptances),
    ]
    for k in range(1, MOST_K + 1):
        row = [entry for entry in plan["predictions"] if entry["k"] == k]
        cells = [f"{entry['tok_per_s']:.0f} ({entry['speedup']:.2f})" for entry in row]
        lines.append(f"  {k} " + "".join(f"{cell:>16}" for cell in cells))
    return [*lines, "best k: " + ", ".join(f"{k} at a = {a}" for a, k in plan["best_k"].items())]


def _best_sizes(plan: dict[str, Any]) -> list[str]:
    """The best draft size, acceptances that share it together."""
    groups: dict[str, list[str]] = {}
    for acceptance, size in plan["best_draft"].items():
        name = "none pays"
        if size is not None:
            name = f"{size['layers']} x {size['hidden']} with {size['vocab']:,} head rows"
        groups.setdefault(name, []).append(acceptance)
    return ["best draft size: " + "; ".join(f"{name} at a = {', '.join(group)}" for name, group in groups.items())]


def _draft_table(plan: dict[str, Any]) -> list[str]:
    names = list(plan["best_draft"])
    lines = [
        "speed-up at the best k of drafts of several sizes, by acceptance;",
        f"* the largest that keeps {WORTH:g} of what a draft that costs nothing would give, else the fastest",
        "  layers x hidden   head rows   MB a token   pays from " + "".join(f"{f'a = {name}':>13}" for name in names),
    ]
    for size in plan["drafts"]:
        cells = []
        for name in names:
            best = plan["best_draft"][name]
            mark = "*" if best and all(best[part] == size[part] for part in ("layers", "hidden", "vocab")) else " "
            cells.append(f"{size['speedup'][name]:6.2f} k={size['k'][name]}{mark}")
        even = "never" if size["break_even_acceptance"] is None else f"{size['break_even_acceptance']:.2f}"
        megabytes = f"{size['bytes_per_token']['total'] / 1e6:.1f}"
        lines.append(
            f"  {size['layers']:>6} x {size['hidden']:<6}  {size['vocab']:>10,}   {megabytes:>10}   {even:>10} "
            + "".join(f"{cell:>13}" for cell in cells)
        )
    return lines
