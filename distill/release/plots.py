"""Pictures of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decode.metrics import in_words
from kernels.plotting import drawing

LONGEST_NAME = 32  # letters of a category that a picture shows


def acceptance_by_category(categories: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Acceptance rates as bars, with and without looping replies, as PNG; categories: as in evaluation.json."""
    names = [_shortened(row["category"]) for row in categories]
    long = max(map(len, names), default=0) > 14  # more than a pair of bars is wide
    with drawing(picture, max(5.0, 1.1 * len(categories) + 2), 5 if long else 4) as figure:
        axis = figure.subplots()
        at = list(range(len(categories)))
        for shift, colour, label, rows in (
            (-0.2, "C0", "all replies", categories),
            (0.2, "C1", "without looping replies", [row["without_looping"] for row in categories]),
        ):
            heights = [row["acceptance_rate"] or 0.0 for row in rows]  # none where nothing was drafted
            axis.bar([x + shift for x in at], heights, width=0.38, color=colour, label=label)
            for x, height, row in zip(at, heights, rows, strict=True):
                text = in_words(row["acceptance_rate"], 2) + (f"\nn={row['prompts']}" if row["prompts"] else "")
                axis.annotate(text, (x + shift, height), ha="center", va="bottom", fontsize=7)
        axis.set_xticks(at, names, **({"rotation": 30, "ha": "right"} if long else {}))
        axis.set_ylabel("acceptance rate")
        axis.set_ylim(0, 1.1)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_title(title)


def _shortened(name: str) -> str:
    """A name as there is room for it."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _label(name: str) -> str:
    """A name as a legend takes it: it leaves out those that begin with an underscore."""
    return _shortened(f" {name}" if name.startswith("_") else name)


def acceptance_by_position(report: dict[str, Any], picture: Path, title: str) -> None:
    """The share of verifications that accepted each draft position, by category and for all, as PNG.

    report: the content of evaluation.json.
    """
    lines = len(report["categories"]) + 2
    with drawing(picture, 7, max(4.0, 0.2 * lines + 0.5)) as figure:
        axis = figure.subplots()

        def draw(shares: list[float], **style: Any) -> None:
            axis.plot(range(1, len(shares) + 1), shares, marker="o", markersize=3, **style)

        for row in report["categories"]:
            draw(row["acceptance_per_position"], linewidth=1, alpha=0.7, label=_label(row["category"]))
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
