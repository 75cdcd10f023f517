"""`decode`: text from a BitNet teacher, plain or speculative."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from decode.metal import capture, check_trace
from decode.models.checkpoint import ROOT, find_teacher
from decode.models.drafts import find_draft
from decode.options import HeadSettings, PlainSettings, SpecSettings, TeacherOption
from decode.prompts import Prompt, gather_prompts
from decode.session import Completion, Session
from decode.settings import takes_settings
from kernels import UserError
from kernels.console import JsonOption, QuietOption, check_json_target, run, say, text_sink, write_json

app = typer.Typer(
    help="Decode with a BitNet teacher, plainly or speculatively with a draft, without changing its words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


SAMPLES = ROOT / "data" / "prompts-sample.jsonl"

PromptOption = Annotated[str | None, typer.Option("--prompt", help="One prompt.")]
PromptsOption = Annotated[
    Path | None,
    typer.Option("--prompts", metavar="FILE", help="JSON with `prompt` or `messages`, or plain lines; - is stdin."),
]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the bare text: no chat template.")]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE.gputrace",
        help="Record what the GPU does, for Xcode; on a Mac, with MTL_CAPTURE_ENABLED=1 and few tokens.",
    ),
]


@app.command()
@takes_settings
def plain(
    *,
    teacher: TeacherOption = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    raw: Raw = False,
    settings: PlainSettings,
    trace: TraceOption = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Generate with the teacher alone, one token a step.

    Prompts come from --prompt, --prompts or standard input, else from data/.
    """
    settings.check()
    check_json_target(json_file, [prompts or SAMPLES])
    check_trace(trace)
    texts = gather_prompts(prompt, prompts, SAMPLES)
    session = Session(
        find_teacher(teacher),
        max_tokens=settings.max_tokens,
        sampling=settings.sampling,
        raw=raw,
        seed=settings.seed,
        head=settings.precision,
    )
    _answer_all(session, texts, compare=False, json_file=json_file, quiet=quiet, trace=trace)


@app.command()
@takes_settings
def spec(
    *,
    teacher: TeacherOption = None,
    draft: Annotated[
        str | None,
        typer.Option(
            "--draft",
            metavar="PATH|REPO",
            help="Draft model. Default: the fastest one by `distill evaluate` on this device, else the shipped one.",
        ),
    ] = None,
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    raw: Raw = False,
    settings: SpecSettings,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Decode plainly too, in turn: speed-up, and whether greedy outputs are identical."
        ),
    ] = False,
    trace: TraceOption = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Generate speculatively: a draft proposes K tokens, the teacher verifies them in one pass.

    Greedy output is the same, token for token, as that of `decode plain` with the same --head. Prompts come from
    --prompt, --prompts or standard input, else from data/.
    """
    settings.check()
    check_json_target(json_file, [prompts or SAMPLES])
    check_trace(trace)
    texts = gather_prompts(prompt, prompts, SAMPLES)
    teacher_checkpoint = find_teacher(teacher)
    chosen = find_draft(draft, teacher_checkpoint)
    session = Session(
        teacher_checkpoint,
        chosen.draft,
        k=settings.k,
        max_tokens=settings.max_tokens,
        sampling=settings.sampling,
        raw=raw,
        seed=settings.seed,
        head=settings.precision,
    )
    say(quiet)(f"draft: {chosen.draft.folder} ({chosen.reason})")
    report = _answer_all(session, texts, compare=compare, json_file=json_file, quiet=quiet, trace=trace)
    if compare and not report.get("identical", True):  # samples are not compared
        raise typer.Exit(1)


@app.command()
@takes_settings
def plan(
    *,
    teacher: TeacherOption = None,
    draft: Annotated[
        str | None,
        typer.Option("--draft", metavar="PATH|REPO", help="Draft. Default: drafts of several sizes are compared."),
    ] = None,
    chip: Annotated[
        str | None,
        typer.Option("--chip", help="Whose bandwidth: M1 to M5, Pro, Max, Ultra, H100... Default: this machine's."),
    ] = None,
    bandwidth: Annotated[float | None, typer.Option("--bandwidth", help="GB/s, in place of a chip's.")] = None,
    acceptance: Annotated[
        float | None,
        typer.Option("--acceptance", help="Probability that a drafted token is accepted. Default: 0.5 to 0.8."),
    ] = None,
    settings: HeadSettings,
    context: Annotated[int, typer.Option("--context", help="Tokens in the cache.")] = 512,
    verify_ratio: Annotated[
        float,
        typer.Option(
            "--verify-ratio", help="Cost of verifying 4 tokens, in plain steps; `decode spec --compare` measures it."
        ),
    ] = 1.0,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Predict speeds from config.json and bandwidth: plain, speculative for k = 1..8, and which draft size pays.

    A folder that holds no more than config.json will do, or the file itself. Bytes alone are counted: these are
    ceilings, not measurements.
    """
    from decode.chips import BANDWIDTH, find_chip, this_chip
    from decode.models.dimensions import Dimensions
    from decode.plan import ACCEPTANCES, check_teacher, find_config, make_plan, table

    settings.check()
    check_json_target(json_file, [name for name in (teacher, draft) if name and Path(name).is_file()])
    if bandwidth is None:
        chip = find_chip(chip) if chip is not None else this_chip()
        bandwidth = BANDWIDTH[chip]
    elif chip is not None:
        raise UserError(f"--chip {chip}: --bandwidth is given too; give one of them")
    teacher_name, config = find_config(teacher, "--teacher")
    check_teacher(config, f"--teacher {teacher_name}")
    teacher_shape, draft_shape = Dimensions.of(config, f"--teacher {teacher_name}"), None
    if draft is not None:
        draft, config = find_config(draft, "--draft")
        draft_shape = Dimensions.of(config, f"--draft {draft}")
        if draft_shape.head_width not in (0, teacher_shape.hidden):
            raise UserError(
                f"--draft {draft}: reads a teacher of width {draft_shape.head_width};"
                f" {teacher_name} has {teacher_shape.hidden}"
            )
    plan_ = make_plan(
        teacher_shape,
        draft_shape,
        bandwidth=bandwidth,
        acceptances=ACCEPTANCES if acceptance is None else (acceptance,),
        head=settings.head,
        context=context,
        verify_ratio=verify_ratio,
    )
    report = {"teacher": teacher_name, "draft": draft, "chip": chip, **plan_}
    write_json(json_file, report)
    if json_file != "-" and not quiet:
        print(table(report))


@app.command()
def doctor(
    teacher: TeacherOption = None,
    json_file: JsonOption = None,
    quiet: QuietOption = False,
) -> None:
    """Look whether all is well here: device, kernels by bits, teacher, versions; exit 1 if something is wrong."""
    from decode.doctor import examine, report

    check_json_target(json_file)
    checks = []
    for check in examine(teacher):
        checks.append(check)
        if json_file != "-" and not quiet:
            print(check.line(), flush=True)
    found = report(checks)
    write_json(json_file, found)
    if not found["ok"]:
        raise typer.Exit(1)


def _answer_all(
    session: Session,
    prompts: list[Prompt],
    *,
    compare: bool,
    json_file: str | None,
    quiet: bool,
    trace: Path | None,
) -> dict[str, Any]:
    """Answer every prompt, with --compare plainly and speculatively in turn, and report."""
    encoded = session.encode(prompts)
    speculative = session.draft is not None
    sink, note = text_sink(json_file), say(quiet)
    silent = quiet and json_file == "-"
    if session.tokenizer.template_hash is None and not session.raw:
        note(f"{session.teacher_checkpoint.name} has no chat template: prompts are given as they are, as with --raw")
    session.warm_up()

    def show(text: str) -> None:
        print(text, end="", file=sink, flush=True)

    outputs: list[Completion] = []
    baselines: list[Completion] = []
    with capture(trace):  # after warming up: what compiles once is not what to look at
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            if len(prompts) > 1:
                note(f"\n[{index + 1}/{len(prompts)}] {prompt.title}")
            order = [True, False] if index % 2 else [False, True]  # so that a machine that slows down slows both
            for way in order if compare else [speculative]:
                streamed = None if compare or silent else show  # printing would slow one of the two ways
                output = session.answer(prompt, ids, index, speculative=way, show=streamed)
                (outputs if way is speculative else baselines).append(output)
            if not silent:
                show((session.text(outputs[-1]) if compare else "") + "\n")
    report = session.report(outputs, baselines)
    write_json(json_file, report)
    note("\n" + summary(report))
    return report


def summary(report: dict[str, Any]) -> str:
    """A few lines for a reader."""
    lines = [f"{report['tokens']} tokens, {report['tok_per_s']:.1f} tok/s ({report['backend']}, {report['device']})"]
    if report["draft"] is not None:
        positions = " ".join(f"{share:.2f}" for share in report["acceptance_per_position"])
        lines.append(
            f"acceptance rate {report['acceptance_rate']:.3f} ({report['accepted']} of {report['drafted']} drafted),"
            f" {report['mean_acceptance_length']:.2f} tokens a verification, by position: {positions}"
            if report["drafted"]
            else "acceptance rate none: nothing was drafted"
        )
    if "speedup" in report:
        lines.append(
            f"plain {report['baseline_tok_per_s']:.1f} tok/s: speed-up {report['speedup']:.2f}, a verification costs"
            f" {report['verify_ratio']:.2f} steps"
        )
        if "identical" in report:
            same = sum(entry["identical"] for entry in report["outputs"])
            lines.append(f"identical to plain decoding: {same} of {report['prompts']}")
        else:
            lines.append("not compared with the text of plain decoding: samples differ, from the same distribution")
        for entry in report["outputs"]:
            if "first_difference" in entry:
                lines.append(
                    f"  prompt {entry['id']} differs at token {entry['first_difference']}"
                    f" (logit margin {entry['logit_margin']:.3g})"
                )
    if report["looping"]:
        lines.append(f"{report['looping']} of {report['prompts']} replies end in a loop, which flatters acceptance")
    return "\n".join(lines)


def main() -> None:
    """Entry point of the console script."""
    run(app, "decode")
