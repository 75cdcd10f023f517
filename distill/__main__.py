"""The command `distill`, also as `python -m distill`: looks whether MLX can run here before anything needs it."""

from __future__ import annotations

from decode.system import require_mlx


def main() -> None:
    """Entry point of the console script."""
    require_mlx("distill")
    from distill.cli import main as run

    run()


if __name__ == "__main__":
    main()
