"""`distill evaluate` on real models: what it counts, writes, and takes up again."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import Command, arguments, changed_copy, environment

from decode.metrics import Metrics
from decode.models.checkpoint import find_model, find_teacher
from decode.prompts import Prompt
from decode.session import Completion, Session
from distill.release import evaluate as evaluation
from distill.release.evaluate import evaluate, figures, finished_report, without_looping
from distill.release.settings import EvaluateSettings
from kernels import UserError

SHIPPED = Path(__file__).resolve().parents[3] / "checkpoints" / "bitnet-smol-116m-draft"
LENGTH = 12
MATHS = "$\\maths$"  # no formula, which pictures cannot write


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    texts = [("chat", "Why is the sky blue?"), (MATHS, "What is 12 times 12?"), (None, "Tell me a story.")]
    texts += [("chat", "How do I boil an egg?"), (MATHS, "What is 7 plus 8?"), ("chat", "Name three rivers.")]
    lines = [
        {"id": f"p{i}", "prompt": text} | ({} if kind is None else {"category": kind})
        for i, (kind, text) in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_evaluation_counts_what_decoding_counts(inside: Command, work: Path, prompts: Path, tmp_path: Path) -> None:
    """The totals are those of `decode spec` on the same prompts, and the categories add up to them."""
    draft = work / "runs" / "mine"
    shutil.copytree(SHIPPED, draft)  # under runs/: the results go beside it
    options = ("--draft", "runs/mine", "--prompts", prompts, "--max-tokens", LENGTH)
    done = inside("distill", "evaluate", *options, "--json", "-")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report == json.loads((draft / "evaluation.json").read_text(encoding="utf-8"))
    decoded = inside("decode", "spec", *options, "--compare", "-q", "--json", tmp_path / "spec.json")
    assert decoded.code == 0, decoded.err
    spec = json.loads((tmp_path / "spec.json").read_text(encoding="utf-8"))
    counts = ("prompts", "tokens", "rounds", "drafted", "accepted", "acceptance_rate", "acceptance_per_position")
    assert [report[name] for name in counts] == [spec[name] for name in counts] and spec["accepted"] > 0
    assert [o["token_ids"] for o in report["outputs"]] == [o["token_ids"] for o in spec["outputs"]]
    assert spec.keys() <= report.keys() and report["complete"] is True and report["identical"] is True

    rows = report["categories"]
    assert [(row["category"], row["prompts"]) for row in rows] == [("chat", 3), (MATHS, 2), ("uncategorised", 1)]
    for name in ("tokens", "rounds", "drafted", "accepted", "looping"):
        assert sum(row[name] for row in rows) == report[name]
    of_chat = [output for output in spec["outputs"] if output["category"] == "chat"]
    assert rows[0]["acceptance_rate"] == sum(o["accepted"] for o in of_chat) / sum(o["drafted"] for o in of_chat)
    for row in (report, *rows):
        assert row["tok_per_s"] > 0 and row["speedup"] == row["tok_per_s"] / row["baseline_tok_per_s"]
        assert row["without_looping"]["prompts"] == row["prompts"] - row["looping"]

    names = {path.name for path in draft.glob("evaluation*")}
    assert names == {f"evaluation{end}" for end in (".json", ".md", "-categories.png", "-positions.png")}
    for picture in draft.glob("evaluation*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    page = (draft / "evaluation.md").read_text(encoding="utf-8")
    assert f"| {MATHS} | 2 | {rows[1]['acceptance_rate']:.3f} |" in page and "6 of 6" in page and "**all**" in page
    shutil.rmtree(draft)


def test_no_results_are_put_beside_another_model_or_into_a_dataset(
    small_teacher: Path, weak_draft: Path, text_dataset: Path, prompts: Path, tmp_path: Path, inside: Command
) -> None:
    """Publishing would refuse a draft with the evaluation of another; a link to the draft's own folder is its own."""
    (training := tmp_path / "training" / "state").mkdir(parents=True)
    (training / "run.json").write_text('{"identity": {}}')
    (tmp_path / "link").symlink_to(weak_draft)
    options = ("--teacher", small_teacher, "--prompts", prompts, "--limit", 1, "--max-tokens", 2, "-q")
    evaluate_it = ("distill", "evaluate", "--draft", weak_draft, *options, "--out")
    for out in (shutil.copytree(weak_draft, tmp_path / "other"), small_teacher, text_dataset, tmp_path / "training"):
        before = sorted(out.iterdir())
        inside(*evaluate_it, out).refused("distill", f"--out {out}: ")
        assert sorted(out.iterdir()) == before
    own = inside(*evaluate_it, tmp_path / "link")
    written = sorted(weak_draft.glob("evaluation*"))
    for path in written:
        path.unlink()
    assert own.code == 0 and len(written) == 4, own.err


@pytest.mark.slow
def test_evaluations_of_other_drafts_stay(
    small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(weak_draft, tmp_path / "other" / weak_draft.name)
    arrays = mx.load(str(weak_draft / "model.safetensors"))
    name = next(name for name in arrays if name.endswith("norm.weight"))
    mx.save_safetensors(str(other / "model.safetensors"), arrays | {name: arrays[name] * 1.5})
    teacher, one, two = find_teacher(str(small_teacher)), *(find_model(str(d), "--draft") for d in (weak_draft, other))
    assert evaluation.default_folder(one) != evaluation.default_folder(two)
    settings, out = EvaluateSettings(prompts=str(prompts), max_tokens=4, limit=1), tmp_path / "out"
    evaluate(teacher, one, settings, out)
    before = (out / "evaluation.json").read_bytes()
    with pytest.raises(UserError, match=f"--out {out}: holds the evaluation of another draft"):
        evaluate(teacher, two, settings, out)
    assert (out / "evaluation.json").read_bytes() == before
    assert "is replaced" not in capfd.readouterr().err
    evaluate(teacher, one, replace(settings, max_tokens=5), out)
    assert f"{out / 'evaluation.json'}: is replaced; it has another max_tokens" in capfd.readouterr().err
    # A draft's own folder keeps the evaluation of what is there now.
    shutil.copytree(out, other, dirs_exist_ok=True)
    evaluate(teacher, two, settings, other)
    assert json.loads((other / "evaluation.json").read_text())["identity"]["draft"] == two.weights_hash


@pytest.mark.slow
def test_both_ways_take_turns_in_being_first(
    small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that gets slower from second to second must not favour one of them."""
    order: list[tuple[str, bool]] = []
    answer = Session.answer

    def noted(session: Session, prompt: Prompt, *others: Any, speculative: bool, **options: Any) -> Completion:
        order.append((prompt.id, speculative))
        return answer(session, prompt, *others, speculative=speculative, **options)

    monkeypatch.setattr(Session, "answer", noted)
    settings = EvaluateSettings(prompts=str(prompts), max_tokens=4)
    evaluate(
        find_teacher(str(small_teacher)), find_model(str(weak_draft), "--draft"), settings, tmp_path / "out", quiet=True
    )
    turns = [[speculative for name, speculative in order if name == f"p{i}"] for i in range(6)]
    assert turns == [[False, True], [True, False]] * 3


def test_looping_replies_are_set_apart() -> None:
    def pair(tokens: list[int], drafted: int, accepted: int, seconds: float) -> tuple[Completion, Completion]:
        spec = Metrics(len(tokens), 4, drafted, accepted, [accepted], 0.0, 0.0, seconds)
        plain = Metrics(len(tokens), len(tokens), verify_seconds=2 * seconds)
        prompt = Prompt([{"role": "user", "content": "a"}], "1")
        return Completion(prompt, [1], tokens, spec), Completion(prompt, [1], tokens, plain)

    loop, fine = pair([7] * 12, 12, 12, 0.5), pair(list(range(12)), 10, 4, 1.0)
    both = figures([loop, fine])
    assert (both["looping"], both["prompts"], both["acceptance_rate"]) == (1, 2, 16 / 22)
    apart = figures(without_looping([loop, fine]))
    assert (apart["looping"], apart["prompts"], apart["acceptance_rate"]) == (0, 1, 0.4)
    assert (apart["tok_per_s"], apart["baseline_tok_per_s"], apart["speedup"]) == (12, 6, 2)
    assert figures([])["acceptance_rate"] is None and figures([])["speedup"] == 0


@pytest.mark.slow
def test_nothing_drafted_is_no_acceptance_of_zero(inside: Command, tmp_path: Path) -> None:
    """In the report, its table, its pictures, on the screen and on the card: the only token is the teacher's own."""
    draft = tmp_path / "runs" / "mine"
    shutil.copytree(SHIPPED, draft)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "Why is the sky blue?", "category": "chat"}) + "\n")
    options = ("--draft", draft, "--prompts", prompts, "--max-tokens", 1)
    done = inside("distill", "evaluate", *options, cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((draft / "evaluation.json").read_text(encoding="utf-8"))
    for row in (report, report["without_looping"], *report["categories"]):
        assert row["acceptance_rate"] is row["mean_acceptance_length"] is None and row["rounds"] == 0
    assert "| chat | 1 | none | none | - |" in (draft / "evaluation.md").read_text(encoding="utf-8")
    assert any(line.split()[:4] == ["chat", "1", "none", "none"] for line in (done.out + done.err).splitlines())
    shown = inside("distill", "publish", "--draft", draft, "--repo", "a/b", "--dry-run", "--json", "-", cwd=tmp_path)
    assert shown.code == 0, shown.err
    card = json.loads(shown.out)["card"]
    assert "| acceptance rate (accepted / drafted) | none |" in card and "| chat | 1 | none | none |" in card


@pytest.mark.slow
def test_interrupted_it_goes_on_and_tells_a_difference(
    inside: Command, work: Path, small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    out, unfinished = tmp_path / "out", tmp_path / "out" / "evaluation-unfinished.jsonl"
    models = ("--teacher", small_teacher, "--draft", weak_draft)
    options = ("evaluate", *models, "--prompts", prompts, "--max-tokens", 48, "--out", out)
    process = subprocess.Popen(
        arguments("distill", *options), cwd=work, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    # On a busy machine this process may look too late: between two looks the other never runs for long.
    until = time.monotonic() + 120
    while not (unfinished.exists() and unfinished.read_bytes().count(b"\n") >= 3) and time.monotonic() < until:
        process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
        process.send_signal(signal.SIGSTOP)
    inside("distill", *options, "-q").refused("distill", str(out), "another process")
    process.send_signal(signal.SIGTERM)  # as Ctrl-C
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    report = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert report["complete"] is False and 2 <= report["prompts"] < 6
    assert b"same command goes on" in errors and "**Incomplete**" in (out / "evaluation.md").read_text()

    # What is taken up is what was kept: a token changed there is a difference to be told.
    lines = unfinished.read_text().splitlines()
    changed = json.loads(lines[2])
    changed["plain"]["tokens"][1] += 1
    header = json.loads(lines[0])
    del header["identity"]["seed"]  # as an older version would have begun it that has no such setting
    lines[0] = json.dumps(header)
    # What a full disk cut short in the middle costs that prompt alone: the others keep their own replies.
    unfinished.write_text("\n".join([lines[0], lines[1][:-9], json.dumps(changed), *lines[3:]]) + '\n{"cut sho')
    elsewhere = unfinished.rename(tmp_path / "kept.jsonl")  # what is kept stays behind the user's link
    unfinished.symlink_to(elsewhere)
    rest = inside("distill", *options, "-q", "--json", "-")
    assert rest.code == 1, rest.err
    assert elsewhere.read_text().count("\n") == 1 + 6
    whole = json.loads(rest.out)
    assert whole["complete"] is True and whole["prompts"] == 6 and whole["identical"] is False
    assert [entry["identical"] for entry in whole["outputs"]] == [True, False, True, True, True, True]
    assert whole["outputs"][1]["first_difference"] == 1 and not unfinished.exists()
    (out / "evaluation.json").write_text(json.dumps(whole | {"identity": header["identity"]}))
    assert finished_report(out, whole["identity"]) and not finished_report(out, whole["identity"] | {"seed": 1})
    kept = report["prompts"]
    assert [entry["id"] for entry in whole["outputs"]] == [f"p{i}" for i in range(6)]
    for before, after in zip(report["outputs"][1:kept], whole["outputs"][1:kept], strict=True):
        assert (before["token_ids"], before["decode_seconds"]) == (after["token_ids"], after["decode_seconds"])

    # Other settings begin anew: one prompt of each category, shorter, and nothing of what was kept before.
    unfinished.write_text("\n".join(lines) + "\n")
    short = inside("distill", *options[:-4], "--max-tokens", 4, "--limit", 1, "--out", out, "-q", "--json", "-")
    assert short.code == 0, short.err
    assert [o["id"] for o in json.loads(short.out)["outputs"]] == ["p0", "p1", "p2"]
    assert all(len(o["token_ids"]) <= 4 for o in json.loads(short.out)["outputs"])


@pytest.mark.slow
def test_what_forms_the_prompts_belongs_to_an_evaluation(
    small_teacher: Path,
    weak_draft: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A template that prints the time is told that of the run that began; another generation config begins anew."""
    config = json.loads((small_teacher / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%H:%M:%S') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = changed_copy(small_teacher, tmp_path / "t", tokenizer_config__json=json.dumps(config).encode())
    teacher, draft, out = find_teacher(str(folder)), find_model(str(weak_draft), "--draft"), tmp_path / "out"
    settings = EvaluateSettings(prompts=str(prompts), max_tokens=2, limit=1)
    answer = evaluation._answer

    def stop(session: Session, prompt: Prompt, ids: list[int], index: int) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return answer(session, prompt, ids, index)

    for picture in ("acceptance_by_category", "acceptance_by_position"):
        monkeypatch.setattr(evaluation, picture, lambda *arguments: None)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_answer", stop)
        begun = evaluate(teacher, draft, settings, out, quiet=True)
        evaluate(teacher, draft, settings, tmp_path / "other", quiet=True)
    time.sleep(1.1)
    whole = evaluate(teacher, draft, settings, out, quiet=True)
    assert (begun["prompts"], whole["prompts"]) == (1, 3)
    assert begun["template_time"] == whole["template_time"] == whole["identity"]["template_time"] is not None
    assert begun["outputs"] == whole["outputs"][:1]
    assert finished_report(out, evaluation.fingerprint(settings, prompts.read_bytes(), teacher, draft))
    helper = {"normalizer": {"type": "Replace", "pattern": {"String": "assistant"}, "content": "helper"}}
    for name in ("generation_config.json", "config.json", "chat_template.jinja", "tokenizer.json"):
        file = folder / name
        data = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        file.write_text(json.dumps(json.loads(data or b"{}") | (helper if name == "tokenizer.json" else {"added": 1})))
        assert not finished_report(out, evaluation.fingerprint(settings, prompts.read_bytes(), teacher, draft))
        file.unlink()
        if data:
            file.write_bytes(data)
    assert finished_report(out, evaluation.fingerprint(settings, prompts.read_bytes(), teacher, draft))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}Q: {{ m.content }}{% endfor %}")
    evaluate(teacher, draft, settings, tmp_path / "other")  # what was kept is of the other template: it is said
    told = [line for line in capsys.readouterr().err.splitlines() if "again" in line]
    assert len(told) == 1 and all(part in told[0] for part in (str(tmp_path / "other"), "chat template", "1 of its 1"))


@pytest.mark.slow
def test_prompts_from_a_pipe(
    command: Command, small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    """Which are there once only: they make the evaluation that the file makes."""
    options = ("evaluate", "--teacher", small_teacher, "--draft", weak_draft, "--max-tokens", 2, "--out", tmp_path)
    data, names = prompts.read_bytes(), ("-", "/dev/stdin")
    piped = [command("distill", *options, "--prompts", name, "--json", "-", stdin=data) for name in names]
    assert [done.code for done in piped] == [0, 0], piped[0].err + piped[1].err
    of = evaluation.fingerprint(
        EvaluateSettings(prompts=str(prompts), max_tokens=2), data, find_teacher(str(small_teacher)),
        find_model(str(weak_draft), "--draft"),
    )  # fmt: skip
    for done in piped:
        report = json.loads(done.out)
        assert [entry["id"] for entry in report["outputs"]] == [f"p{i}" for i in range(6)]
        assert report["identity"] == of | {"template_time": None}


@pytest.mark.slow
def test_what_an_older_version_began_is_not_taken_up(weak_draft: Path, prompts: Path, tmp_path: Path) -> None:
    """Its first line has no format; what it measured does not mix with what this version measures."""
    unfinished = tmp_path / "evaluation-unfinished.jsonl"
    identity = {"prompts": "0" * 64, "k": 3, "max_tokens": 4, "head": "bf16", "limit": None, "seed": 0}
    text = json.dumps({"identity": identity, "backend": "cpu"}) + "\n[]\n"
    unfinished.write_text(text)
    models = find_teacher(None), find_model(str(weak_draft), "--draft")
    with pytest.raises(UserError, match=r"evaluation-unfinished\.jsonl: was begun by another version .* begin anew"):
        evaluate(*models, EvaluateSettings(prompts=str(prompts), max_tokens=4), tmp_path, quiet=True)
    assert unfinished.read_text() == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--k", 0], ["--k 0"]),
        (["--limit", 0], ["--limit 0"]),
        (["--head", "int4"], ["--head int4", "int8"]),
        (["--prompts", "gone.jsonl"], ["gone.jsonl"]),
        (["--prompts", "/dev/stdin"], ["/dev/stdin", "holds no prompt"]),
        (["--out", "taken/sub"], ["taken"]),
    ],
)
def test_bad_input_is_one_line(
    inside: Command, work: Path, weak_draft: Path, options: list[object], named: list[str]
) -> None:
    (work / "taken").write_text("a file")
    before = sorted(work.rglob("*"))
    inside("distill", "evaluate", "--draft", weak_draft, *options).refused("distill", *named)
    assert sorted(work.rglob("*")) == before


def test_files_of_others_stay(
    inside: Command, small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    """Results have their names, and replace nothing that `distill evaluate` did not write."""
    options = ("evaluate", "--teacher", small_teacher, "--draft", weak_draft, "--prompts", prompts, "--max-tokens", 4)
    for name, text in (
        ("evaluation.json", '{"mine": 1}'),
        ("evaluation.md", "# mine"),
        ("evaluation-positions.png", "mine"),
        ("evaluation-unfinished.jsonl", '{"prompt": "mine"}\n'),
    ):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text(text)
        inside("distill", *options, "--out", out, "-q").refused("distill", str(out / name))
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: text}


def test_results_that_were_edited_stay(
    small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused before the work; results that a kill kept from their places are not, whichever it was."""
    models = find_teacher(str(small_teacher)), find_model(str(weak_draft), "--draft")
    names = ("evaluation.md", "evaluation-categories.png", "evaluation-positions.png")

    def run(limit: int) -> dict[str, Any]:
        settings = EvaluateSettings(prompts=str(prompts), max_tokens=2, limit=limit)
        return evaluate(*models, settings, tmp_path, quiet=True)

    def picture(_: object, path: Path, title: str) -> None:
        path.write_bytes(title.encode() + bytes(len(drawn)))
        drawn.append(path.name)

    class Killed(BaseException):
        pass

    drawn: list[str] = []
    for draw in ("acceptance_by_category", "acceptance_by_position"):
        monkeypatch.setattr(evaluation, draw, picture)
    report = run(1)
    for name in names:
        written = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(written + b"mine")
        with pytest.raises(UserError, match=f"{name}: was changed"):
            run(2)
        assert (tmp_path / name).read_bytes() == written + b"mine"
        (tmp_path / name).write_bytes(written)
    replace = Path.replace
    for left in range(4):
        allowed = iter(range(left))

        def replaced(path: Path, target: Path, allowed: Iterator[int] = allowed) -> Path:
            if path.parent.name.startswith(".tmp-whole") and next(allowed, None) is None:
                raise Killed
            return replace(path, target)

        (tmp_path / evaluation.UNFINISHED).write_text('{"identity": {}}\n')  # goes with the report of all replies
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replaced)
            with pytest.raises(Killed):
                evaluation._write(tmp_path, report)
        evaluation.check_evaluation_folder(tmp_path)  # as the same command begins
    assert {path.name for path in tmp_path.iterdir()} == {*names, "evaluation.json"}
    assert json.loads((tmp_path / "evaluation.json").read_text()).keys() == report.keys()
    del report["files"]  # as an older version left it
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    assert run(2)["complete"]


def test_a_full_disk_is_named(
    inside: Command, small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    """A limit on file sizes stands in for it, too small for the prompts that are done."""
    options = ("evaluate", "--teacher", small_teacher, "--draft", weak_draft, "--prompts", prompts, "--max-tokens", 4)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        full = inside("distill", *options, "--out", tmp_path / "out", "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    full.refused("distill", f"no room left in {tmp_path / 'out'}")
