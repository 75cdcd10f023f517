"""`python -m kernels`: how fast the kernels are here, which ones run and why, and what suits this device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kernels import bench as benchmark
from kernels import info as information
from kernels import tuning
from kernels.backends import select
from kernels.console import JsonOption, QuietOption, check_json_target, progress, run, say, write_json
from kernels.errors import UserError
from kernels.files import check_output

app = typer.Typer(
    help="The kernels on this device: measure them, see which ones run and why, tune them.",
    no_args_is_help=True,
    add_completion=False,  # shells complete commands, not modules
    pretty_exceptions_enable=False,
)


@app.command()
def bench(
    shapes: Annotated[
        str, typer.Option("--shapes", metavar="NxK,...", help="Products to time: N outputs of K inputs.")
    ] = benchmark.SHAPES,
    rows: Annotated[str, typer.Option("--rows", metavar="M,...", help="Numbers of rows.")] = benchmark.ROWS,
    kernels: Annotated[str, typer.Option("--kernels", metavar="NAME,...", help="What to time.")] = ",".join(
        benchmark.KERNELS
    ),
    seconds: Annotated[float, typer.Option("--seconds", help="Time for each row of the table, about.")] = 0.5,
    picture: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw costs relative to one row, as PNG.")
    ] = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Time matrix products: ours (bitlinear, linear with its norm, int8) beside MLX's.

    Dependent chains over rotating weights, so that neither queues nor caches flatter; medians.
    """
    plan = benchmark.Plan.parse(shapes, rows, kernels, seconds)
    check_json_target(json_file, [tuning.path()])
    if picture is not None:
        _check_picture(picture, plan, json_file)
    work = benchmark.Bench(plan)
    with progress(work.total, "bench", "step", quiet) as bar:
        report = work.run(bar.update)
    for note in work.notes:
        say(quiet)(note)
    write_json(json_file, report)
    if picture is not None:
        benchmark.plot(report, picture)
        say(quiet)(f"plot: {picture}")
    if json_file != "-" and not quiet:
        print(benchmark.table(report))


def _check_picture(picture: Path, plan: benchmark.Plan, json_file: str | None) -> None:
    if 1 not in plan.rows:
        raise UserError("--plot: draws costs relative to one row, so --rows must have 1")
    if picture.exists() and not picture.is_file():
        raise UserError(f"--plot {picture}: is no file")
    check_output("--plot", picture, [tuning.path()])
    if json_file and os.path.realpath(picture) == os.path.realpath(json_file):
        raise UserError(f"--plot {picture}: is the file of --json too; give another name")
    if not picture.parent.is_dir():
        raise UserError(f"--plot {picture}: the folder {picture.parent} does not exist")
    if not os.access(picture.parent, os.W_OK):
        raise UserError(f"--plot {picture}: cannot be written: no permission")


@app.command()
def tune(
    seconds: Annotated[float, typer.Option("--seconds", help="Time for each setting, about.")] = 1.0,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Try the kernels' block shapes, or the CPU's thread counts, and keep the best for this device."""
    if not 0 < seconds <= 3600:
        raise UserError(f"--seconds {seconds:g}: must be more than 0, and at most 3600")
    check_json_target(json_file, [tuning.path()])
    chosen, reason = select()
    settings, trials, best = tuning.grid(chosen), [], {}
    if settings:
        tuning.check_store()
        with progress(len(settings) * tuning.ROUNDS, "tune", "step", quiet) as bar:
            trials = tuning.tune(chosen, settings, seconds, bar.update)
        best = trials[0].settings
        tuning.store(tuning.key(chosen), best)
    write_json(
        json_file,
        {
            "backend": chosen.NAME,
            "reason": reason,
            "key": tuning.key(chosen),
            "file": str(tuning.path()),
            "best": best,
            "trials": [vars(trial) for trial in trials],
        },
    )
    if json_file == "-" or quiet:
        return
    for trial in trials:
        print(
            f"{trial.seconds * 1e6:>10.1f} us  " + ", ".join(f"{key} {value}" for key, value in trial.settings.items())
        )
    if best:
        print(f"{tuning.path()}: the first one, for {tuning.key(chosen)}")
    else:
        print(f"nothing to tune in the {chosen.NAME} kernels" + (f": {reason}" if reason else ""))


@app.command()
def info(json_file: JsonOption = None, quiet: QuietOption = False) -> None:
    """Say which backend runs here and why, and test its operations."""
    check_json_target(json_file, [tuning.path()])
    found = information.kernel_info()
    write_json(json_file, found)
    if json_file != "-" and not quiet:
        print("\n".join(information.lines(found)))


if __name__ == "__main__":
    run(app, "python -m kernels")
