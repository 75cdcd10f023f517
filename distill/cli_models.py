"""`distill`'s commands on models that exist: evaluate a draft, convert a teacher, publish a draft."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from decode.keep_awake import keep_awake
from decode.models.checkpoint import RUNS, find_teacher
from decode.options import TeacherOption
from decode.settings import takes_settings
from distill.release.settings import EvaluateSettings
from kernels.console import Interrupted, JsonOption, QuietOption, check_json_target, progress, say, write_json
from kernels.errors import printable_lines


@takes_settings
def evaluate(
    *,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="PATH|REPO",
            help="Draft model. Default: the newest one trained for this teacher under runs/, else the shipped one.",
        ),
    ] = None,
    teacher: TeacherOption = None,
    settings: EvaluateSettings,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where the results go. Default: the draft's folder if it is under runs/, else one named after it"
            " there.",
        ),
    ] = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a draft on prompts: real acceptance by category and position, and the speed-up, decoding greedily.

    Every prompt is also decoded plainly, in turn; exit 1 if an output is not identical. Writes evaluation.json,
    evaluation.md and pictures. Ctrl-C writes what is done; the same command goes on where it stopped.
    """
    from distill.release.evaluate import default_folder, draft_to_evaluate
    from distill.release.evaluate import evaluate as run_evaluation

    check_json_target(json_file, [settings.prompts])
    teacher_checkpoint = find_teacher(teacher)
    draft_checkpoint = draft_to_evaluate(draft, teacher_checkpoint)
    folder = out or default_folder(draft_checkpoint)
    check_json_target(json_file, folders=[folder])
    try:
        with keep_awake():
            report = run_evaluation(teacher_checkpoint, draft_checkpoint, settings, folder, quiet)
    except KeyboardInterrupt as error:
        raise Interrupted(str(error)) from None
    write_json(json_file, report)
    _show_evaluation(report, folder, json_file, quiet)
    if not report["complete"]:
        raise Interrupted(f"{report['prompts']} prompts are done; the same command goes on from there")
    if not report["identical"]:
        raise typer.Exit(1)


def _show_evaluation(report: dict[str, Any], folder: Path, json_file: str | None, quiet: bool) -> None:
    from distill.release.evaluate import POSITION_PLOT, REPORT, TABLE, overview

    if json_file != "-" and not quiet:
        print(printable_lines(overview(report)))
    same = sum(entry["identical"] for entry in report["outputs"])
    say(quiet)(
        f"identical to plain decoding: {same} of {report['prompts']}\n"
        f"written: {folder}/{REPORT}, {TABLE}, {POSITION_PLOT.replace('positions', '*')}"
    )


def convert(
    teacher: TeacherOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder to write. Default: a name in runs/.")
    ] = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write any BitNet checkpoint that loads in the packing of Microsoft's: same logits, a quarter byte a weight.

    Reads packed weights with scales to multiply by or to divide by (the Falcon models), float master weights
    (Microsoft's -bf16, 1bitLLM) and what `mlx_lm.convert` made of a BitNet.
    """
    from distill.release.convert import check_converted_folder
    from distill.release.convert import convert as run_conversion

    check_json_target(json_file, folders=[out])
    began = time.perf_counter()
    checkpoint = find_teacher(teacher)
    out = out or RUNS / f"{Path(checkpoint.name).name}-packed"
    check_converted_folder(out, checkpoint)
    bar = progress(sum(array.nbytes for array in checkpoint.arrays().values()), "convert", "B", quiet)
    try:
        converted = run_conversion(checkpoint, out, bar.update)
    except KeyboardInterrupt:
        raise Interrupted(f"nothing was written to {out}") from None
    finally:
        bar.close()
    result = {"teacher": checkpoint.name, "out": str(out), **vars(converted), "seconds": time.perf_counter() - began}
    write_json(json_file, result)
    files = f"{converted.files} file{'s' if converted.files > 1 else ''}"
    size = f"{converted.tensors} tensors in {files}, {converted.bytes / 1e6:.1f} MB"
    say(quiet)(f"{out}: {size} (was {converted.family})")


def publish(
    repo: Annotated[str, typer.Option("--repo", metavar="OWNER/NAME", help="Repository on the Hub; made if missing.")],
    draft: Annotated[
        Path | None, typer.Option("--draft", metavar="DIR", help="Draft. Default: the newest complete one in runs/.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and print the card; needs no login and no network.")
    ] = False,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who can see it. Default: a new repository is private, an existing one stays as it is.",
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence as the Hub names it. Default: the teacher's, if known."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", metavar="OWNER/NAME", help="The teacher's name on the Hub, if it was read from a folder."
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also replace another teacher's draft, or a card edited on the Hub, or publish an unfinished draft, or"
            " one that was not identical.",
        ),
    ] = False,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Upload a draft with its model card to the Hugging Face Hub, in one commit.

    Uploads the weights, tokenizer, settings, log and evaluation, and nothing else in the folder.
    Needs `hf auth login` once. Interrupted, the same command goes on.
    """
    from distill.release.publish import draft_to_publish, prepare
    from distill.release.publish import publish as upload

    check_json_target(json_file)
    note, show = say(quiet), json_file != "-" and not quiet
    if draft is None:
        draft = draft_to_publish()
        note(f"draft: {draft}")
    package = prepare(draft, repo, licence=licence, base_model=base_model, force=force)
    sizes = package.sizes()
    if not package.licence:
        note(f"{repo}: the teacher's licence is not known, so the card states none; give it with --license")
    result: dict[str, Any] = {"repo": repo, "draft": str(draft), "dry_run": dry_run, "teacher": package.teacher}
    result |= {"files": [{"name": name, "bytes": size} for name, size in sizes.items()], "bytes": sum(sizes.values())}
    if dry_run:
        if show:
            for name, size in sizes.items():
                print(f"{size:>13,}  {name}")
            print(f"{sum(sizes.values()):>13,}  bytes to {repo}\n\n{package.card}", end="")
    else:
        note(f"{draft}: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB to {repo}")
        try:
            done = upload(package, private=private, force=force)
        except KeyboardInterrupt:
            raise Interrupted(f"the same command goes on from what {repo} has") from None
        result |= vars(done)
        if show:
            print(done.url)
        what = "commit" if done.changed else "nothing had changed since commit"
        note(f"{what} {done.commit}, {'private' if done.private else 'public'}")
        if done.deleted:
            note(f"deleted there: {', '.join(done.deleted)}")
        if done.card_kept:
            note(f"{repo}: README.md was written or edited there and is kept; --force replaces it by the new card")
    write_json(json_file, result | {"card": package.card})
