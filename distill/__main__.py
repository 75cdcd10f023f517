"""The command `distill`, also as `python -m distill`: looks whether MLX can run here before anything needs it."""

from __future__ import annotations

from decode.system import begin


def main() -> None:
    """Entry point of the console script."""
    begin("distill")


if __name__ == "__main__":
    main()
