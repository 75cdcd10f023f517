"""Pictures of evaluations with many categories, and with long names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from distill.release import plots
from kernels.plotting import drawing


def row(name: str) -> dict[str, Any]:
    return {
        "category": name,
        "prompts": 3,
        "acceptance_rate": 0.5,
        "without_looping": {"acceptance_rate": 0.4, "prompts": 2},
        "acceptance_per_position": [0.9, 0.5],
    }


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that are drawn, with the places of what they show."""
    drawn: list[Any] = []

    @contextmanager
    def kept(picture: Path, width: float, height: float) -> Iterator[Any]:
        with drawing(picture, width, height) as figure:
            yield figure
        figure.draw_without_rendering()  # a picture has its own resolution
        drawn.append(figure)

    monkeypatch.setattr(plots, "drawing", kept)
    return drawn


def test_all_of_many_categories_are_in_the_legend(figures: list[Any], tmp_path: Path) -> None:
    names = [f"{i} is the name of a category of some forty letters" for i in range(57)]
    all_of_them = row("") | {"k": 2, "without_looping": row(""), "categories": [row(name) for name in names]}
    plots.acceptance_by_position(all_of_them, tmp_path / "p.png", "Acceptance")
    legend = figures[0].axes[0].get_legend()
    assert len(legend.get_texts()) == 59
    assert legend.get_window_extent().y0 >= 0 and legend.get_window_extent().x1 <= figures[0].bbox.x1


def test_long_names_do_not_cover_each_other(figures: list[Any], tmp_path: Path) -> None:
    names = [f"{i} is the name of a category of some forty letters" for i in range(12)]
    plots.acceptance_by_category([row(name) for name in names], tmp_path / "c.png", "Acceptance")
    labels = figures[0].axes[0].get_xticklabels()
    boxes = [label.get_window_extent() for label in labels]
    assert all(label.get_rotation() == 30 for label in labels) and min(box.y0 for box in boxes) >= 0
    plots.acceptance_by_category([row("maths"), row("chat")], tmp_path / "c.png", "Acceptance")
    assert all(label.get_rotation() == 0 for label in figures[1].axes[0].get_xticklabels())
