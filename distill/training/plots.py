"""Pictures of training runs and of evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kernels.files import replacing


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def training_curves(log: Path, picture: Path, title: str) -> None:
    """Loss, agreement and learning rate over tokens, as PNG.

    log: log.jsonl with `step` and `eval` lines; picture: where to write, replaced if there.
    """
    pyplot = _pyplot()
    lines = read_log(log)
    steps = [line for line in lines if line.get("kind") == "step"]
    evals = [line for line in lines if line.get("kind") == "eval"]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    def draw(axis: Any, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
        if rows:
            axis.plot([row["tokens"] / 1e6 for row in rows], [row[key] for row in rows], **style)

    draw(axes[0], steps, "loss", color="0.7", linewidth=1, label="training")
    draw(axes[0], evals, "held_out_loss", color="C0", marker="o", markersize=3, label="held out")
    axes[0].set_ylabel("loss (nats a token)")
    draw(axes[1], steps, "agreement", color="0.7", linewidth=1, label="agreement, training")
    draw(axes[1], evals, "agreement", color="C0", marker="o", markersize=3, label="agreement, held out")
    draw(axes[1], evals, "expected_acceptance", color="C1", marker="s", markersize=3, label="sum min(p, q)")
    axes[1].set_ylabel("share of positions")
    axes[1].set_ylim(0, 1)
    draw(axes[2], steps, "lr", color="C2", label="learning rate")
    axes[2].set_ylabel("learning rate")
    for axis in axes:
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.suptitle(title)
    _save(pyplot, figure, picture)


def acceptance_by_category(categories: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Acceptance rates as bars, with and without looping replies, as PNG; categories: as in evaluation.json."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(max(5.0, 1.1 * len(categories) + 2), 4), layout="constrained")
    at = list(range(len(categories)))
    for shift, colour, label, rows in (
        (-0.2, "C0", "all replies", categories),
        (0.2, "C1", "without looping replies", [row["without_looping"] for row in categories]),
    ):
        heights = [row["acceptance_rate"] for row in rows]
        axis.bar([x + shift for x in at], heights, width=0.38, color=colour, label=label)
        for x, row in zip(at, rows, strict=True):
            text = f"{row['acceptance_rate']:.2f}\nn={row['prompts']}" if row["prompts"] else "none"
            axis.annotate(text, (x + shift, row["acceptance_rate"]), ha="center", va="bottom", fontsize=7)
    axis.set_xticks(at, [row["category"] for row in categories])
    axis.set_ylabel("acceptance rate")
    axis.set_ylim(0, 1.1)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(title)
    _save(pyplot, figure, picture)


def acceptance_by_position(report: dict[str, Any], picture: Path, title: str) -> None:
    """The share of verifications that accepted each draft position, by category and for all, as PNG.

    report: the content of evaluation.json.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")

    def draw(shares: list[float], **style: Any) -> None:
        axis.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3, **style)

    for row in report["categories"]:
        draw(row["acceptance_per_position"], linewidth=1, alpha=0.7, label=row["category"])
    draw(report["acceptance_per_position"], linewidth=2.5, color="black", label="all")
    apart = report["without_looping"]["acceptance_per_position"]
    draw(apart, linewidth=2.5, color="black", linestyle=":", label="all, without looping replies")
    axis.set_xticks(range(1, report["k"] + 1))
    axis.set_xlabel("draft position")
    axis.set_ylabel("share of verifications that accept it")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(title)
    _save(pyplot, figure, picture)


def _pyplot() -> Any:
    import matplotlib  # slow, and needed only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(pyplot: Any, figure: Any, picture: Path) -> None:
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
