"""The picture of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kernels.files import read_json_lines
from kernels.plotting import drawing


def training_curves(log: Path, picture: Path, title: str) -> None:
    """Loss, agreement and learning rate over tokens, as PNG.

    log: log.jsonl with `step` and `eval` lines; picture: where to write, replaced if there.
    """
    lines = read_json_lines(log)
    steps = [line for line in lines if line.get("kind") == "step"]
    evals = [line for line in lines if line.get("kind") == "eval"]

    def draw(axis: Any, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
        if rows:
            axis.plot([row["tokens"] / 1e6 for row in rows], [row[key] for row in rows], **style)

    live = [line for line in evals if line.get("tokens_per_verification") is not None]
    with drawing(picture, 17 if live else 13, 3.8) as figure:
        axes = figure.subplots(1, 4 if live else 3)
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
        if live:
            draw(axes[3], live, "tokens_per_verification", color="C3", marker="o", markersize=3)
            axes[3].set_ylabel("tokens a verification, held-out prompts")
        for axis in axes:
            axis.set_xlabel("million tokens")
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False)
        figure.suptitle(title)
