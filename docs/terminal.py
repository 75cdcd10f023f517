"""Draws captured terminal output as an SVG.

    make demo 2>&1 | tee demo.log; .venv/bin/python docs/terminal.py demo.log docs/demo.svg

Of a progress bar its last state is kept, and of the generated text one prompt a draft; everything
else is what the terminal showed.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

WIDTH, LINE, CHAR = 118, 17, 7.8  # characters a line; pixels a line and a character


def screen(log: str) -> list[str]:
    """The lines that a terminal would still show."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in log.split("\n")]
    kept: list[str] = []
    skipping = False
    for line in lines:
        if re.match(r"\[(\d+)/\d+\] ", line):
            skipping = not line.startswith("[1/")
            if skipping and kept and kept[-1] != "...":
                kept.append("...")
        elif re.match(r"\d+ tokens, ", line):
            skipping = False
            kept.append("")
        if not skipping and not (line == "" and kept and kept[-1] == ""):
            kept += [line[i : i + WIDTH] for i in range(0, len(line), WIDTH)] or [""]
    return kept


def svg(lines: list[str]) -> str:
    """The picture: headings and commands bright, the rest plain."""
    width, height = round(WIDTH * CHAR + 32), LINE * len(lines) + 32
    rows = []
    for i, line in enumerate(lines):
        colour = "#e5c07b" if line.startswith("==") else "#98c379" if line.startswith("$ ") else "#d0d4dc"
        rows.append(f'<text x="16" y="{30 + LINE * i}" fill="{colour}" xml:space="preserve">{escape(line)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="ui-monospace, SFMono-Regular, Menlo, DejaVu Sans Mono, Consolas, monospace" font-size="13">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e2127"/>\n' + "\n".join(rows) + "\n</svg>\n"
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    target.write_text(svg(screen(source.read_bytes().decode().strip("\n"))), encoding="utf-8")
