"""The command `decode`, also as `python -m decode`: looks whether MLX can run here before anything needs it."""

from __future__ import annotations

from decode.system import require_mlx


def main() -> None:
    """Entry point of the console script."""
    require_mlx("decode")
    from decode.cli import main as run

    run()


if __name__ == "__main__":
    main()
