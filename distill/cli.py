"""`distill`: from a BitNet teacher to a draft model."""

from __future__ import annotations

import os
import shlex
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from decode.keep_awake import keep_awake
from decode.metrics import in_words
from decode.models.checkpoint import DEFAULT_TEACHER, find_model, find_teacher
from decode.options import TeacherOption
from decode.settings import given_options, takes_settings
from distill.cli_models import convert, evaluate, publish
from distill.data.settings import CollectSettings
from distill.training.settings import TrainSettings
from kernels.console import Interrupted, JsonOption, QuietOption, check_json_target, progress, run, say, write_json
from kernels.errors import UserError, printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from decode.models.checkpoint import Checkpoint
    from distill.data.ranks import Ranks
    from distill.recipe import Recipe

app = typer.Typer(
    help="Train small draft models for BitNet b1.58 teachers by knowledge distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def command(context: typer.Context) -> None:
    from distill.data.ranks import Launch

    launch = Launch.found()
    if launch is not None and context.invoked_subcommand not in ("collect", "train"):
        if launch.rank:  # rank 0 has said it
            raise typer.Exit(2)
        raise UserError(
            f"{context.invoked_subcommand} is one process's work: only collect and train run under mlx.launch"
        )


class StageName(StrEnum):
    """What `--from` takes."""

    collect = "collect"
    train = "train"
    evaluate = "evaluate"


@app.command()
@takes_settings
def collect(
    *,
    context: typer.Context,
    teacher: TeacherOption = None,
    settings: CollectSettings,
    replies: Annotated[
        Path | None,
        typer.Option(
            "--replies",
            metavar="DIR",
            help="Only score this reply dataset: its sources are not needed, and --seq-len is its own unless given.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Dataset folder. Default: a name made of the settings in runs/."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take; write nothing.")] = False,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed",
            help="Go on with what was begun on another device or version, and take such ranks; the manifest names each"
            " shard's device.",
        ),
    ] = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run the teacher over text and over its own replies, and keep its top logits, or draws from them, in shards.

    Killed or interrupted, the same command goes on where it stopped, and ends with the same bytes.

    Replies and texts are kept as tokens beside the dataset, in replies-TEACHER-DIGITS: with another --top-k, --sampled,
    --temperature or --batch they are found there and not made again; --replies scores them without their sources.

    Under mlx.launch all ranks work on the one dataset, which rank 0 writes.
    """
    from distill.data.assistant import assist, introduction
    from distill.data.ranks import Launch, Ranks
    from distill.provenance import this_machine
    from kernels.backends import device_backend

    launch = Launch.found()
    if launch is not None and launch.rank:
        assist(launch, teacher, settings, replies is not None)
    check_json_target(json_file, settings.inputs(), [out])
    with Ranks.gather(launch, this_machine(), mixed) as ranks:
        checkpoint = find_teacher(teacher)
        if device_backend() != "cpu" and not dry_run:
            ranks.start_worker()
        if launch is not None:
            ranks.admit(introduction(checkpoint, settings, replies is not None))
        _collect(context, checkpoint, ranks, settings, replies, out, dry_run, json_file, quiet)


def _collect(
    context: typer.Context,
    checkpoint: Checkpoint,
    ranks: Ranks,
    settings: CollectSettings,
    replies: Path | None,
    out: Path | None,
    dry_run: bool,
    json_file: str | None,
    quiet: bool,
) -> None:
    from distill.data.collect import Collector, plan_collection, plan_scoring, what_is_read
    from distill.predict import duration

    note = say(quiet)
    began = time.perf_counter()
    if replies is None:
        plan = plan_collection(checkpoint, settings, out)
    else:
        plan = plan_scoring(checkpoint, replies, settings, given_options(context), out)
    bars = Bars(quiet)
    collector = Collector(plan, bars, ranks)
    done = not dry_run and collector.check_folder()
    result: dict[str, Any] = {"out": str(plan.folder), "teacher": plan.teacher.name, "dry_run": dry_run}
    if dry_run:
        result["sources"] = what_is_read(plan)
        for one in result["sources"]:
            note(f"{one['source']}: {one['share']:.0%} of the tokens, {one['reads']}")
    if dry_run or not (quiet or done):
        estimate = collector.estimate()
        result["estimate"] = vars(estimate)
        note(
            f"{plan.folder}: about {estimate.tokens:,} tokens,"
            f" {'' if settings.sampled is None else 'at most '}{estimate.bytes / 1e6:.1f} MB,"
            f" {duration(estimate.seconds)} ({estimate.tok_per_s:,.0f} tok/s)"
        )
    if not dry_run:
        try:
            with keep_awake():
                dataset = collector.run()
        except KeyboardInterrupt:
            raise Interrupted("finished shards are kept; the same command goes on from there") from None
        finally:
            bars.close()
        size = sum(entry.bytes for entry in dataset.shards)
        result.update(
            tokens=dataset.tokens,
            trained_tokens=sum(entry.trained_tokens for entry in dataset.shards),
            shards=len(dataset.shards),
            bytes=size,
            seconds=time.perf_counter() - began,
        )
        result["left_out"] = [vars(omission) for omission in collector.left_out()]
        result["cut"] = [vars(omission) for omission in collector.cut()]
        for remark in collector.remarks(dataset):
            note(remark)
        shards = "1 shard" if len(dataset.shards) == 1 else f"{len(dataset.shards)} shards"
        note(f"{plan.folder}: {dataset.tokens:,} tokens in {shards}, {size / 1e6:.1f} MB")
    write_json(json_file, result)


@app.command()
def inspect(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.")],
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Say what is in a dataset, of shards or of replies, and where the replies are that shards were scored from."""
    from distill.data.inspection import inspect_dataset, table

    check_json_target(json_file)
    summary = inspect_dataset(dataset)
    write_json(json_file, summary)
    if json_file != "-" and not quiet:
        print(table(summary))


@app.command()
def verify(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop broken files; `distill collect` then writes them anew.")
    ] = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Check every hash, shape and value of a dataset, and of the replies it was scored from where they are here; exit 1
    if one is wrong."""
    from distill.data.inspection import unchecked
    from distill.data.inspection import verify as check
    from distill.data.manifest import Manifest

    check_json_target(json_file)
    problems = check(dataset, repair=repair)
    unfinished = not problems and not Manifest.read(dataset).complete
    missing = [] if problems else unchecked(dataset)
    write_json(
        json_file,
        {
            "dataset": str(dataset),
            "ok": not problems,
            "problems": [vars(p) for p in problems],
            "unchecked": missing,
        },
    )
    if json_file != "-" and not quiet:
        for problem in problems:
            print(printable(f"{os.path.normpath(dataset / problem.file)}: {problem.message}"))
        well = "all well so far, and not complete" if unfinished else "all well"
        print(f"{printable(str(dataset))}: {well if not problems else f'{len(problems)} problems'}")
        for replies in missing:
            print(printable(f"{replies}: went unchecked; the shards were scored from it, and it is not here"))
    if problems:
        raise typer.Exit(1)


@app.command()
@takes_settings
def train(
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Dataset; repeatable, for several of one teacher. Default: the newest complete one for it in runs/.",
        ),
    ] = None,
    teacher: TeacherOption = None,
    init: Annotated[
        str | None,
        typer.Option("--init", metavar="PATH|REPO", help="Go on from this draft, on new data. Default: a fresh one."),
    ] = None,
    settings: TrainSettings,
    cache_features: Annotated[
        bool,
        typer.Option(
            "--cache-features",
            help="Keep what the draft reads of its teacher for the next pass, as far as a third of memory holds it.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Draft folder. Default: a name made of the settings in runs/."),
    ] = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train a draft on a dataset: a Llama, or with --reads-teacher one that reads its teacher's hidden states. Kept is
    the checkpoint that emits most tokens a verification, of equal ones that with the lowest held-out loss.

    Ctrl-C leaves a usable draft; the same command goes on where it stopped, and trains nothing where it has finished.
    Under mlx.launch all ranks compute gradients, each of its part of a step's rows; rank 0 reads and writes.
    """
    from distill.data.ranks import Launch, Ranks
    from distill.data.shards import dataset_to_train_on
    from distill.provenance import this_machine
    from distill.training.checkpoint import read_shape
    from distill.training.parallel import assist, introduction
    from distill.training.run import default_folder
    from distill.training.run import train as run_training

    launch = Launch.found()
    if launch is not None and launch.rank:
        assist(launch, find_teacher(teacher))
    check_json_target(json_file, folders=[out])
    checkpoint = find_teacher(teacher)
    if not data:
        data = [dataset_to_train_on(checkpoint)]
        say(quiet)(f"data: {data[0]}")
    start = None if init is None else find_model(init, "--init").folder
    settings = (
        settings.for_teacher(checkpoint.config) if start is None else settings.like(read_shape(start / "config.json"))
    )
    out = out or default_folder(settings, data, checkpoint.name, checkpoint.weights_hash, start)
    try:
        with keep_awake(), Ranks.gather(launch, this_machine(), mixed=False) as ranks:
            if ranks.connections:
                ranks.admit(introduction(checkpoint))
            if cache_features and not settings.reads_teacher:
                raise UserError("--cache-features: is for drafts that read their teacher (--reads-teacher)")
            more: Any = {"init": start, "ranks": ranks, "cache_features": cache_features}
            summary = run_training(data, checkpoint.folder, out, settings, quiet=quiet, **more)
    except KeyboardInterrupt as error:
        raise Interrupted(str(error)) from None
    figures = {name: str(value) if isinstance(value, Path) else value for name, value in vars(summary).items()}
    write_json(
        json_file, {"teacher": checkpoint.name, "data": _one_or_all(data), **figures, "settings": settings.record()}
    )
    trimmed = summary.vocabulary
    if trimmed is not None:
        share = f"{trimmed['coverage']:.1%} of the dataset's targets"
        say(quiet)(f"head: {trimmed['kept']:,} of {trimmed['size']:,} tokens, {share}")
    before = " (done before)" if summary.done_before else ""
    live = summary.tokens_per_verification
    decoded = "" if live is None else f", {live:.2f} tokens a verification on held-out prompts"
    say(quiet)(
        f"{summary.out}{before}: {summary.parameters / 1e6:.2f} M parameters, held-out loss"
        f" {summary.held_out_loss:.3f} nats, agreement {summary.agreement:.3f}, expected acceptance"
        f" {summary.expected_acceptance:.3f}{decoded}\ncurves: {summary.plot}\n{_use_it(summary.out, teacher)}"
    )


def _one_or_all(data: list[Path]) -> str | list[str]:
    """As JSON has the datasets that a draft was trained on."""
    return str(data[0]) if len(data) == 1 else [str(folder) for folder in data]


def _use_it(draft: Path, teacher: str | None) -> str:
    """The command that decodes with a draft. teacher: as it was named, None for the embedded one."""
    named = ["--teacher", teacher] if teacher and Path(teacher).resolve() != DEFAULT_TEACHER.resolve() else []
    return f"use it: {shlex.join(['decode', 'spec', *named, '--draft', str(draft)])}"


app.command()(evaluate)


@app.command("run")
def run_recipe(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of one in recipes/.")],
    start: Annotated[
        StageName, typer.Option("--from", help="Begin with this stage; what those before it made is taken as it is.")
    ] = StageName.collect,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Predict disk, memory and time on Macs; write nothing."),
    ] = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Collect, train and evaluate as a recipe says, skipping what is done.

    A recipe holds every setting of a run, and is kept beside the draft. Interrupted, the same command goes on; exit 1
    if an output of the evaluation is not identical to plain decoding.
    """
    from distill.pipeline import Pipeline
    from distill.recipe import find_recipe, read_recipe

    plan = read_recipe(find_recipe(recipe))
    check_json_target(json_file, plan.inputs(), [plan.dataset, plan.draft, plan.evaluation])
    result = {"recipe": str(plan.path), "sha256": plan.sha256, "teacher": plan.teacher, "dry_run": dry_run}
    if dry_run:
        _predict(plan, result, json_file, quiet)
        return
    bars = Bars(quiet)
    try:
        with keep_awake():
            records = Pipeline(plan, find_teacher(plan.teacher), quiet, bars, bars.close).run(start.value)
    except KeyboardInterrupt as error:
        raise Interrupted(str(error) or "what is done is kept; the same command goes on from there") from None
    write_json(json_file, result | {"stages": records})
    report = records[-1]["report"]
    say(quiet)(
        f"{plan.draft}: acceptance rate {in_words(report['acceptance_rate'])},"
        f" {in_words(report['mean_acceptance_length'], 2)} tokens a verification, speed-up {report['speedup']:.2f},"
        f" identical: {'yes' if report['identical'] else 'NO'}"
        f"\n{_use_it(plan.draft, plan.teacher)}"
    )
    if not report["identical"]:
        raise typer.Exit(1)


def _predict(recipe: Recipe, result: dict[str, Any], json_file: str | None, quiet: bool) -> None:
    from distill.predict import predict, report, size, table, teacher_bytes, teacher_config

    config, why = teacher_config(recipe.teacher)
    works = predict(recipe, config)
    if why:
        say(quiet)(f"{why}\nwithout its config.json only the dataset's size can be told, at 128 bytes a token")
    folders = (recipe.dataset, recipe.draft, recipe.evaluation)
    stages = [{**work, "folder": str(folder)} for work, folder in zip(report(works), folders, strict=True)]
    write_json(json_file, result | {"stages": stages})
    if json_file != "-" and not quiet:
        if config is not None:
            print(f" teacher  {recipe.teacher or 'the embedded one'}: {size(teacher_bytes(config))} of weights")
        for work, folder in zip(works, folders, strict=True):
            print(f"{work.stage:>8}  {folder}: {work.what}")
        print(f"\n{table(works)}")


app.command()(convert)
app.command()(publish)


class Bars:
    """One progress bar a stage of a collection."""

    LABELS: ClassVar = {"replies": "teacher replies", "scoring": "teacher logits"}

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: tqdm | None = None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if total is not None:
            self._finish()
            self.bar = progress(total, self.LABELS[stage], "tok", self.quiet, initial=done)
        elif self.bar is not None:
            self.bar.total = max(self.bar.total, self.bar.n + done)
            self.bar.update(done)

    def _finish(self) -> None:
        """A stage is over with what it has brought, be it less than was asked for."""
        if self.bar is not None:
            self.bar.total = self.bar.n
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def main() -> None:
    """Entry point of the console script."""
    run(app, "distill")
