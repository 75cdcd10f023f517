"""`distill evaluate`: what a draft is worth, measured by decoding with it.

Every prompt is answered plainly and speculatively, in turn, by the engine of `decode spec`. Prompts that are done
are kept in a file of lines, so that an evaluation that was stopped goes on; one that is finished leaves
`evaluation.json`, `evaluation.md` and two pictures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from decode.metrics import VERSION, Metrics, in_words, is_looping
from decode.models.checkpoint import RUNS, Checkpoint
from decode.models.drafts import find_draft, is_unfinished, newest_draft
from decode.prompts import Prompt, parse_prompts, read_content
from decode.session import Completion, Session
from decode.tokenizer import Tokenizer
from distill.provenance import completed, config_hashes, teacher_files
from distill.release.plots import acceptance_by_category, acceptance_by_position
from distill.release.settings import EvaluateSettings
from kernels import UserError, backend
from kernels.console import progress, say
from kernels.device import device_name, versions
from kernels.files import (
    OF_MODELS,
    append_line,
    cannot_write,
    check_file,
    check_unchanged,
    finish_replacing,
    listed_files,
    read_json,
    read_json_lines,
    real_path,
    replacing_files,
    sha256,
    working_in,
    write_atomic,
)

REPORT, TABLE, UNFINISHED = "evaluation.json", "evaluation.md", "evaluation-unfinished.jsonl"
CATEGORY_PLOT, POSITION_PLOT = "evaluation-categories.png", "evaluation-positions.png"
NO_CATEGORY = "uncategorised"
OF_OTHERS = (*sorted(OF_MODELS), "state/run.json")  # what shows that a folder is a model's, a dataset's or in training

Pair = tuple[Completion, Completion]  # of one prompt: speculative, plain


def select(settings: EvaluateSettings, content: bytes) -> list[Prompt]:
    """The prompts of an evaluation, in the file's order. content: of the file."""
    selected, counts = [], dict[str, int]()
    for prompt in parse_prompts(content, settings.prompts):
        number = counts[category_of(prompt)] = counts.get(category_of(prompt), 0) + 1
        if settings.limit is None or number <= settings.limit:
            selected.append(prompt)
    return selected


def fingerprint(settings: EvaluateSettings, content: bytes, teacher: Checkpoint, draft: Checkpoint) -> dict[str, Any]:
    """What two evaluations have in common that measure the same in the same way; files count by their content.
    content: of the prompts file."""
    hashes = {
        "metrics_version": VERSION,
        "teacher": teacher.weights_hash,
        "draft": draft.weights_hash,
        "prompts": hashlib.sha256(content).hexdigest(),
        "tokenizer": teacher.tokenizer_hash,
        "teacher_files": teacher_files(Tokenizer(teacher.folder)),
        "draft_files": config_hashes(draft.folder),
    }
    return settings.record() | hashes


def draft_to_evaluate(name: str | None, teacher: Checkpoint) -> Checkpoint:
    """The draft that was named; else the newest one trained for this teacher under runs/, which is likely the one that
    was not measured yet; else the default one."""
    newest = newest_draft(teacher) if name is None else None
    return find_draft(str(newest) if newest else name, teacher).draft


def default_folder(draft: Checkpoint) -> Path:
    """Where the results go: beside a draft under runs/, else into a folder there that has its name, and digits of its
    weights' hash, as many drafts are named alike."""
    if draft.folder.resolve().is_relative_to(RUNS.resolve()):
        return draft.folder
    return RUNS / f"evaluation-{Path(draft.name).name}-{draft.weights_hash[:8]}"


def finished_report(folder: Path, of: dict[str, Any]) -> dict[str, Any] | None:
    """The report in a folder, if it is a whole one of the evaluation with this fingerprint."""
    try:
        report = read_json(folder / REPORT)
    except UserError:
        return None
    whole = report.get("complete") is True and _same(report.get("identity"), of)
    return report if whole else None


def _same(identity: Any, of: dict[str, Any]) -> bool:
    """Whether a fingerprint is this one."""
    return isinstance(identity, dict) and not _differences(identity, of)


def _differences(identity: dict[str, Any], of: dict[str, Any]) -> list[str]:
    """What in a fingerprint is other than in this one, by name. What one of an older version does not know was as
    that did it; the time that a chat template was told may be another."""
    identity = EvaluateSettings.filled_up(identity)
    if isinstance(files := identity.get("teacher_files"), dict) and "teacher_files" in of:
        identity |= {"teacher_files": completed(files, of["teacher_files"])}
    was, now = _flat(identity), _flat(of)
    names = sorted((was.keys() | now.keys()) - {"template_time"})
    return [name for name in names if was.get(name) != now.get(name)]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"k": 3, "teacher_files": {"a": 1}} -> {"k": 3, "a of teacher": 1}"""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        parts = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key} of {name.removesuffix('_files')}": part for key, part in parts} or {name: value}
    return flat


def _begun_time(path: Path, measured: dict[str, Any]) -> str | None:
    """The time that the chat template was told when this evaluation was begun, if it was."""
    lines: list[Any] = read_json_lines(path) if path.is_file() else []
    identity: Any = lines[0].get("identity") if lines and isinstance(lines[0], dict) else None
    time = identity.get("template_time") if _same(identity, measured) else None
    return time if isinstance(time, str) else None


def evaluate(
    teacher: Checkpoint, draft: Checkpoint, settings: EvaluateSettings, out: Path, quiet: bool = False
) -> dict[str, Any]:
    """Measure, write the results into `out`, and return the content of evaluation.json.

    Interrupted, it reports on the prompts that are done, with `complete` false, and the same call goes on from
    there; KeyboardInterrupt where none is.
    """
    settings.check()
    content = read_content(Path(settings.prompts))  # once: it may be a pipe
    prompts = select(settings, content)
    measured = fingerprint(settings, content, teacher, draft)
    note = say(quiet)
    with working_in(out, room=1e6 + 2e4 * len(prompts)):  # the pictures, and a line and an entry a prompt
        _check_own(out)
        if differences := check_report(out, draft.folder, measured):
            note(f"{out / REPORT}: is replaced; it has another {', another '.join(differences)}")
        session = Session(
            teacher,
            draft,
            k=settings.k,
            max_tokens=settings.max_tokens,
            seed=settings.seed,
            head=settings.precision,
            template_time=_begun_time(out / UNFINISHED, measured),
        )
        measured |= {"template_time": session.tokenizer.template_time}
        encoded = session.encode(prompts)
        here = {"backend": backend().NAME, "device": device_name(), "versions": versions()}
        unfinished = Unfinished(out / UNFINISHED, {"identity": measured, **here}, note)
        done = unfinished.read(prompts, encoded)
        note(f"draft: {draft.folder}{' (its training is not finished)' if is_unfinished(draft) else ''}")
        if done:
            note(f"going on after {len(done)} of {len(prompts)} prompts")
        bar = progress(len(prompts), "evaluate", " prompts", quiet, initial=len(done), scale=False)
        try:
            if len(done) < len(prompts):
                session.warm_up()
            total, plain = totals(list(done.values()))
            for index, prompt in enumerate(prompts):
                if index in done:
                    continue
                pair = _answer(session, prompt, encoded[index], index)
                unfinished.add(index, pair)
                done[index] = pair
                total.merge(pair[0].metrics)
                plain.merge(pair[1].metrics)
                bar.set_postfix(acceptance=in_words(total.acceptance_rate), speedup=f"{total.speedup(plain):.2f}")
                bar.update()
        except KeyboardInterrupt:
            if not done:
                raise KeyboardInterrupt("before the first prompt was done") from None
        finally:
            bar.close()
        pairs = [done[index] for index in sorted(done)]
        report = _report(session, pairs, settings, measured, complete=len(pairs) == len(prompts))
        report = _write(out, report)
        if report["complete"]:
            unfinished.path.unlink(missing_ok=True)
    return report


def check_evaluation_folder(out: Path) -> None:
    """UserError for a folder that results cannot be written to, or that has files of their names which are not ours."""
    with working_in(out):
        _check_own(out)


def _check_own(out: Path) -> None:
    """Refuse files with the names of results that are not ours, or not as we wrote them: the report lists the page and
    the pictures by their hashes. Beside a report of an older version, which does not, they are taken as ours. Refuse
    what another version began, too."""
    placed = finish_replacing(out, REPORT)
    for name, key in ((REPORT, "acceptance_rate"), (UNFINISHED, "identity")):
        if (out / name).exists() and key not in _first_object(out / name):
            raise _in_the_way(out / name)
    listed = listed_files(out / REPORT)
    older = (out / REPORT).exists() and not listed
    for path in (out / name for name in (TABLE, CATEGORY_PLOT, POSITION_PLOT)):
        if path.name in listed and path.exists():
            check_unchanged(path, listed[path.name])
        elif path.exists() and not (older and path.is_file()):
            raise _in_the_way(path)
    if placed and _first_object(out / REPORT).get("complete") is True:  # a kill kept its replies from going
        (out / UNFINISHED).unlink(missing_ok=True)
    if (out / UNFINISHED).exists() and _version(_first_object(out / UNFINISHED)) != VERSION:
        raise UserError(f"{out / UNFINISHED}: was begun by another version of bitdraft; delete it to begin anew")


def check_report(out: Path, draft: Path, of: dict[str, Any] | None) -> list[str]:
    """In what the report in a folder is not of the evaluation with this fingerprint, by name; nothing without a report.

    UserError where it is on another draft, or by another teacher, but beside a draft that was trained anew, and where
    the folder is one of another model or of a dataset. draft: its folder; of: None before it is trained, when every
    report is on another.
    """
    own = out.resolve() == draft.resolve()
    if not own and (found := next((name for name in OF_OTHERS if (out / name).exists()), None)):
        raise UserError(f"--out {out}: holds {found}, so it is a model's or a dataset's; give another folder")
    report = read_json(out / REPORT) if (out / REPORT).exists() else {}
    identity = report.get("identity")
    if not isinstance(identity, dict):
        return []
    other = of is None or any(identity.get(name) != of[name] for name in ("draft", "teacher"))
    if other and not own:
        raise UserError(
            f"--out {out}: holds the evaluation of another draft, or by another teacher; give another folder, or delete"
            f" {REPORT} there"
        )
    return [] if of is None else _differences(identity, of)


def _in_the_way(path: Path) -> UserError:
    return UserError(f"{path}: is in the way: it was not written by `distill evaluate`; move it elsewhere")


def _first_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file is, or that is on its first line; an empty one where there is none."""
    check_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        value = json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _answer(session: Session, prompt: Prompt, ids: list[int], index: int) -> Pair:
    """Both ways in turn, the first one alternating, so that a machine that slows down slows both."""
    first = index % 2 == 1
    answers = {
        speculative: session.answer(prompt, ids, index, speculative=speculative) for speculative in (first, not first)
    }
    return answers[True], answers[False]


def category_of(prompt: Prompt) -> str:
    return prompt.category or NO_CATEGORY


def totals(pairs: Sequence[Pair]) -> tuple[Metrics, Metrics]:
    """Of all prompts together: speculative, plain."""
    return Metrics.of(output.metrics for output, _ in pairs), Metrics.of(baseline.metrics for _, baseline in pairs)


def figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The metrics of decode.metrics over some prompts."""
    total, plain = totals(pairs)
    return {
        "prompts": len(pairs),
        "tokens": total.tokens,
        **total.acceptance(),
        "tok_per_s": total.tok_per_s,
        "baseline_tok_per_s": plain.tok_per_s,
        "speedup": total.speedup(plain),
        "looping": sum(is_looping(output.tokens) for output, _ in pairs),
    }


def without_looping(pairs: Sequence[Pair]) -> list[Pair]:
    """The prompts whose replies do not end in a loop, which is easy to foresee and flatters a draft."""
    return [pair for pair in pairs if not is_looping(pair[0].tokens)]


def _report(
    session: Session, pairs: list[Pair], settings: EvaluateSettings, measured: dict[str, Any], complete: bool
) -> dict[str, Any]:
    outputs, baselines = ([pair[i] for pair in pairs] for i in range(2))
    report = session.report(outputs, baselines)
    entries = report.pop("outputs")
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(category_of(pair[0].prompt), []).append(pair)
    return {
        "complete": complete,
        **report,
        "prompts_file": Path(settings.prompts).name,
        "limit": settings.limit,
        "identity": measured,
        "without_looping": figures(without_looping(pairs)),
        "categories": [
            {"category": name, **figures(group), "without_looping": figures(without_looping(group))}
            for name, group in groups.items()
        ],
        "outputs": entries,
    }


class Unfinished:
    """The prompts that an evaluation has done so far: a first line that says which evaluation on which machine, then
    one line a prompt, with its place in the file and its token ids: what was kept of one is never taken for another."""

    def __init__(self, path: Path, header: dict[str, Any], note: Callable[[str], None]) -> None:
        self.path, self.header, self.note = path, header, note

    def read(self, prompts: list[Prompt], encoded: list[list[int]]) -> dict[int, Pair]:
        """What an earlier run of the same evaluation on the same machine has done, by the prompts' places; else a file
        begun anew, which is noted with the reason."""
        lines: list[Any] = read_json_lines(self.path) if self.path.is_file() else []
        done: dict[int, Pair] = {}
        kept = lines[1:]
        others = self._others(lines[0]) if lines else []
        for line in [] if others else kept:
            try:
                index, ids = line["prompt"], line["prompt_ids"]
                if encoded[index] == ids:
                    done[index] = (
                        _completion(line["speculative"], prompts[index], ids),
                        _completion(line["plain"], prompts[index], ids),
                    )
            except (LookupError, TypeError, ValueError):
                continue  # it is answered anew
        if len(done) < len(kept):
            why = f"was begun with another {', '.join(others)}" if others else "is damaged"
            self.note(f"{self.path}: {why}: {len(kept) - len(done)} of its {len(kept)} prompts are done again")
        whole = "".join(json.dumps(line) + "\n" for line in [self.header, *(_line(*one) for one in done.items())])
        write_atomic(real_path(self.path), whole.encode())  # without a last line that a kill cut short
        return done

    def _others(self, header: dict[str, Any]) -> list[str]:
        """The names of what was other when the file was begun, as its first line says."""
        begun, now = (one | one["identity"] | {"identity": None} for one in (header, self.header))
        return _differences(begun, now)

    def add(self, index: int, pair: Pair) -> None:
        append_line(self.path, _line(index, pair))


def _version(header: dict[str, Any]) -> Any:
    """The version of the metrics that the first line of an unfinished evaluation names, if any."""
    measured = header.get("identity")
    return measured.get("metrics_version") if isinstance(measured, dict) else None


def _line(index: int, pair: Pair) -> dict[str, Any]:
    answers = {
        name: {"tokens": output.tokens, "metrics": asdict(output.metrics), "finish_reason": output.finish_reason}
        for name, output in zip(("speculative", "plain"), pair, strict=True)
    }
    return {"prompt": index, "prompt_ids": pair[0].prompt_ids, **answers}


def _completion(line: dict[str, Any], prompt: Prompt, ids: list[int]) -> Completion:
    metrics = Metrics(**{field.name: line["metrics"][field.name] for field in fields(Metrics)})
    return Completion(prompt, ids, [int(token) for token in line["tokens"]], metrics, str(line["finish_reason"]))


def _write(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """All of it or nothing. Returns the report with the hashes of the other files, as evaluation.json has it."""
    title = f"{report['draft']}, k = {report['k']}"
    try:
        with replacing_files(out, REPORT) as new:
            (new / TABLE).write_text(markdown(report), encoding="utf-8")
            acceptance_by_category(report["categories"], new / CATEGORY_PLOT, title)
            acceptance_by_position(report, new / POSITION_PLOT, title)
            report = report | {"files": {path.name: sha256(path) for path in sorted(new.iterdir())}}
            (new / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{cannot_write(error)} {out} (the results: {error.strerror})") from error
    return report


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: a table by category, with and without looping replies, and what was measured where."""
    rows = [*report["categories"], {"category": "**all**", **report}]
    return (
        f"# {report['draft']}, a draft for {report['teacher']}\n\n"
        + ("" if report["complete"] else "**Incomplete**: interrupted, and measured on the prompts done before.\n\n")
        + "".join(f"{line}\n" for line in _table(rows))
        + f"\n{report['prompts']} prompts of `{report['prompts_file']}`, at most {report['max_tokens']} tokens each,"
        f" greedy, k = {report['k']}, {report['head']} head; plain and speculative decoding in turn, with"
        f" {report['backend']} kernels on {report['device']}, {report['date']}. A verification costs"
        f" {report['verify_ratio']:.2f} plain steps. Outputs identical to plain decoding:"
        f" {sum(entry['identical'] for entry in report['outputs'])} of {report['prompts']}.\n\n"
        "Acceptance rate: accepted / drafted tokens. By position: the share of verifications that accepted draft"
        " position 1, 2, ...; a step before which nothing was drafted is none. Looping: replies that end in a loop,"
        " which flatters acceptance; the last three columns leave them out.\n"
    )


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    heads = (
        "category", "prompts", "acceptance rate", "tokens a verification", "by position", "tok/s", "plain tok/s",
        "speed-up", "looping", "acceptance rate, no loops", "tokens a verification, no loops", "speed-up, no loops",
    )  # fmt: skip
    yield f"| {' | '.join(heads)} |"
    yield f"| --- |{' ---: |' * (len(heads) - 1)}"
    for row in rows:
        other = row["without_looping"]
        cells = [
            row["category"], f"{row['prompts']}", *_rates(row),
            " ".join(f"{share:.2f}" for share in row["acceptance_per_position"]) or "-",
            f"{row['tok_per_s']:.0f}", f"{row['baseline_tok_per_s']:.0f}", f"{row['speedup']:.2f}",
            f"{row['looping']}", *(_rates(other) if other["prompts"] else ("-", "-")),
            f"{other['speedup']:.2f}" if other["prompts"] else "-",
        ]  # fmt: skip
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _rates(row: dict[str, Any]) -> tuple[str, str]:
    return in_words(row["acceptance_rate"]), in_words(row["mean_acceptance_length"], 2)


def overview(report: dict[str, Any]) -> str:
    """The table for a terminal: a line a category, its columns aligned, and one line for all."""
    heads = (
        "category", "prompts", "acceptance", "tokens/verify", "by position", "tok/s", "plain", "speed-up", "loops",
        "acceptance without",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = [heads]
    for row in [*report["categories"], {"category": "all", **report}]:
        other = row["without_looping"]
        positions = " ".join(f"{share:.2f}" for share in row["acceptance_per_position"])
        lines.append(
            (
                row["category"], f"{row['prompts']}", *_rates(row), positions, f"{row['tok_per_s']:.0f}",
                f"{row['baseline_tok_per_s']:.0f}", f"{row['speedup']:.2f}", f"{row['looping']}",
                _rates(other)[0] if other["prompts"] else "-",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )
