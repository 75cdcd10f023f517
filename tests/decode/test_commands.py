"""`decode` as its users meet it: a process, its output, its exit code."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import SHIPPED, TEACHER, Command, arguments, changed_copy, environment, in_background, mounted

from decode.system import begin

PLAIN_KEYS = {
    "teacher", "draft", "k", "prompts", "tokens", "rounds", "drafted", "accepted", "acceptance_rate",
    "mean_acceptance_length", "acceptance_per_position", "tok_per_s", "prefill_seconds", "decode_seconds",
    "draft_seconds", "verify_seconds", "looping", "backend", "device", "versions", "outputs",
}  # fmt: skip
OUTPUT_KEYS = {
    "id", "category", "prompt_tokens", "token_ids", "text", "finish_reason", "looping",
    "prefill_seconds", "decode_seconds", "draft_seconds", "verify_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    lines = [
        {"id": "sky", "category": "chat", "prompt": "Why is the sky blue?"},
        {"messages": [{"role": "user", "content": "Count to ten, Zoë 🙂"}]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_two_processes_say_the_same(command: Command, weak_draft: Path, prompts: Path, tmp_path: Path) -> None:
    plain = command("decode", "plain", "--prompts", prompts, "--max-tokens", 24, "--json", tmp_path / "plain.json")
    assert plain.code == 0, plain.err
    a = json.loads((tmp_path / "plain.json").read_text(encoding="utf-8"))
    spec = command(
        "decode", "spec", "--draft", weak_draft, "--prompts", prompts, "--max-tokens", 24, "--compare", "--json", "-"
    )  # fmt: skip
    assert spec.code == 0, spec.err
    b = json.loads(spec.out)  # nothing else is there
    assert [o["token_ids"] for o in a["outputs"]] == [o["token_ids"] for o in b["outputs"]]
    assert [o["text"] for o in a["outputs"]] == [o["text"] for o in b["outputs"]]
    for output in a["outputs"]:
        assert output["text"] in plain.out

    assert a.keys() >= PLAIN_KEYS and all(output.keys() >= OUTPUT_KEYS for output in a["outputs"])
    assert b.keys() >= PLAIN_KEYS | {"baseline_tok_per_s", "speedup", "identical"}
    assert all(o.keys() >= OUTPUT_KEYS | {"rounds", "drafted", "accepted", "identical"} for o in b["outputs"])
    assert b["identical"] is True and b["k"] == 3 and b["draft"] == "weak" and a["draft"] is None
    assert b["teacher"] == TEACHER.name and b["prompts"] == 2 and len(b["acceptance_per_position"]) <= 3
    assert [o["id"] for o in b["outputs"]] == ["sky", "2"]
    assert [o["category"] for o in b["outputs"]] == ["chat", None]
    assert a["head"] == b["head"] == "bf16"
    assert {"mlx", "mlx-lm", "bitdraft", "python"} <= b["versions"].keys()
    for words in ("acceptance rate", "tok/s", "speed-up", "identical to plain decoding: 2 of 2", str(weak_draft)):
        assert words in spec.err


@pytest.mark.slow
def test_an_int8_head_is_lossless_too(
    command: Command, inside: Command, small_teacher: Path, weak_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    """Against plain decoding with the same head, in another process."""
    options = ("--teacher", small_teacher, "--prompts", prompts, "--max-tokens", 40, "--head", "int8", "-q", "--json")
    plain = command("decode", "plain", *options, tmp_path / "plain.json")
    spec = inside("decode", "spec", "--draft", weak_draft, "--compare", *options, "-")
    assert (plain.code, spec.code) == (0, 0), plain.err + spec.err
    a, b = json.loads((tmp_path / "plain.json").read_text(encoding="utf-8")), json.loads(spec.out)
    assert a["head"] == b["head"] == "int8" and b["identical"] is True
    assert [o["token_ids"] for o in a["outputs"]] == [o["token_ids"] for o in b["outputs"]]


@pytest.mark.slow
def test_quiet_and_raw(command: Command, small_teacher: Path) -> None:
    options = ("--teacher", small_teacher, "--raw", "--quiet", "--max-tokens", 4)
    done = command("decode", "plain", *options, stdin="Once upon a time, Zoë\n")
    assert done.code == 0 and done.err == "" and done.out.strip()


def test_a_terminal_without_unicode(command: Command) -> None:
    """Characters it lacks must not end the program."""
    done = command("decode", "plain", "--prompts", "gone-🙂", PYTHONIOENCODING="ascii")
    done.refused("decode", "gone-?")


@pytest.mark.parametrize("at", ["decode.system.importlib.import_module", "decode.cli.app"])
def test_ctrl_c_before_the_work_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], at: str
) -> None:
    """While modules are imported, which takes a second, or a command line is looked at."""

    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["decode", "plain"])
    monkeypatch.setattr(at, interrupted)
    with pytest.raises(SystemExit, match="130"):
        begin("decode")
    assert capfd.readouterr() == ("", "\ndecode: interrupted\n")


@pytest.mark.slow
def test_few_open_files_and_no_current_folder(command: Command, small_teacher: Path, tmp_path: Path) -> None:
    """mlx-lm asks for more files than a system may allow."""
    options = ("plain", "--teacher", small_teacher, "--prompt", "Hi", "--max-tokens", 2, "-q")
    run = shlex.join(arguments("decode", *options))
    shell = ["bash", "-c", f"ulimit -n 512; {run}; mkdir gone; cd gone; rmdir ../gone; {run}"]
    done = subprocess.run(shell, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() and done.returncode == 2
    assert done.stderr.startswith("decode: error: the current folder is not there") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_locale_without_unicode(command: Command, small_teacher: Path, tmp_path: Path) -> None:
    """Where Python would take names for ASCII, and MLX find none of the files."""
    teacher, report = changed_copy(small_teacher, tmp_path / "Lehrer für 東京"), tmp_path / "ö.json"
    (tmp_path / "ä.txt").write_text("Zoë 🙂\n", encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = ("--teacher", teacher, "--prompts", tmp_path / "ä.txt", "--max-tokens", 4, "-q", "--json", report)
    done = command("decode", "plain", *options, **ascii_only)
    assert done.code == 0, done.err
    assert json.loads(report.read_text(encoding="utf-8"))["teacher"] == teacher.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["plain", "--nope"], ["--nope"]),
        (["frob"], ["frob"]),
        (["plain", "--max-tokens", "many"], ["--max-tokens", "integer"]),
        (["plain", "--max-tokens", 0, "--prompt", "a"], ["--max-tokens 0"]),
        (["plain", "--prompt", ""], ["--prompt is empty"]),
        (["plain", "--prompt", "a", "--prompts", "b"], ["--prompt or --prompts"]),
        (["plain", "--prompt", "a", "--prompt=b"], ["--prompt is given twice"]),
        (["spec", "--draft", "a", "--k", 3, "--k", 4, "--draft", "b", "--prompt", "c"], ["--draft is given twice"]),
        (["plain", "--prompts", "gone.jsonl"], ["gone.jsonl"]),
        (["plain", "--prompts", "-"], ["standard input", "holds no prompt"]),
        (["plain", "--prompts", "b\udcff.txt"], ["b?.txt: is not valid UTF-8"]),  # a byte of a name
        (["plain", "--prompts", "bad.jsonl"], ["bad.jsonl: line 2 is not JSON"]),
        (["plain", "--prompts", "latin1.txt"], ["latin1.txt: line 1 (byte 3) is not valid UTF-8"]),
        (["plain", "--prompts", "long.txt"], ["long.txt: line 1", "2048"]),
        (["plain", "--prompt", "a", "--json", "no/such/x.json"], ["--json no/such/x.json", "no/such"]),
        (["plain", "--prompt", "a", "--json", "."], ["--json .", "folder"]),
        (["plain", "--prompt", "a", "--temperature", "-1"], ["--temperature -1.0"]),
        (["plain", "--prompt", "a", "--seed", "-1"], ["--seed"]),
        (["plain", "--prompt", "a", "--teacher", "gone"], ["--teacher gone"]),
        (["plain", "--prompt", "a", "--teacher", ""], ["--teacher is empty"]),  # an empty variable names none
        (["plain", "--prompt", "a", "--teacher", "owner/not-there"], ["--teacher owner/not-there", "Hub"]),
        (["plain", "--prompt", "a", "--teacher", "cut"], ["cut/model.safetensors", "cut short"]),
        (["spec", "--prompt", "a", "--draft", TEACHER, "--k", 0], ["--k 0"]),
        (["plain", "--prompt", "a", "--head", "int4"], ["--head", "int4"]),
        (["spec", "--prompt", "a", "--draft", "gone"], ["--draft gone"]),
        (["spec", "--prompt", "a", "--draft", "other"], ["token 9000", "other"]),
    ],
)
def test_bad_input_is_one_line(
    command: Command, inside: Command, work: Path, options: list[object], named: list[str]
) -> None:
    """In this process, but what is read from standard input."""
    if not (work / "cut").exists():
        (work / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
        (work / "latin1.txt").write_bytes("caf\xe9\n".encode("latin-1"))
        (work / "long.txt").write_text("word " * 3000 + "\n")
        tokenizer = (TEACHER / "tokenizer.json").read_text()
        for old, new in ((9000, -1), (9001, 9000), (-1, 9001)):
            tokenizer = tokenizer.replace(f": {old},", f": {new},")
        changed_copy(TEACHER, work / "other", tokenizer__json=tokenizer.encode())
        changed_copy(TEACHER, work / "cut", model__safetensors=(TEACHER / "model.safetensors").read_bytes()[:9999])
    before = sorted(work.rglob("*"))
    run = command if options[-1] == "-" else inside
    run("decode", *options).refused("decode", *named)
    assert sorted(work.rglob("*")) == before


def test_no_command_shows_help(command: Command) -> None:
    done = command("decode")
    assert done.code == 2 and "Usage: decode" in done.out + done.err and "error" not in done.err
    for words in ("plain", "spec"):
        assert words in done.out + done.err


@pytest.mark.slow
def test_help(inside: Command) -> None:
    for options, words in (
        ([], ("plain", "spec")),
        (
            ["plain"],
            ("--teacher", "--prompt", "--prompts", "--raw", "--max-tokens", "--temperature", "--json", "--seed"),
        ),
        (["spec"], ("--draft", "--k", "--compare", "--top-p", "--top-k", "default: 3")),
    ):
        done = inside("decode", *options, "--help")
        assert done.code == 0 and done.err == ""
        assert "Usage: decode" in done.out
        for word in words:
            assert word in done.out, word


@pytest.mark.slow
def test_closed_streams(work: Path, small_teacher: Path) -> None:
    """`<&-` and `>&-`: files opened later must not be mistaken for the streams."""
    start = arguments("decode", "plain", "--teacher", small_teacher, "--prompt", "a", "--raw", "--max-tokens", 2)
    quoted = " ".join("'" + part.replace("'", "'\\''") + "'" for part in start)
    for closed in ("<&-", ">&-"):
        done = subprocess.run(
            ["sh", "-c", f"{quoted} {closed}"], env=environment(), cwd=work, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and "error" not in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("plain", "--prompt", "Tell me a story", "--max-tokens", 200, "-q"), ("doctor",), ("--help",)]
)
def test_a_reader_that_goes_away_ends_it_as_it_ends_other_programs(work: Path, options: tuple[object, ...]) -> None:
    """`| head`: what a shell says of a program that SIGPIPE ended, and not the 1 of a check that failed."""
    process = subprocess.Popen(
        arguments("decode", *options),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=work,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    if options[0] != "--help":  # which is printed at once
        process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_shell_can_complete(command: Command) -> None:
    done = command("decode", _DECODE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="decode spec --max")
    assert done.code == 0 and "--max-tokens" in done.out and "--draft" not in done.out, done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_below_the_output_is_named(work: Path) -> None:
    for more in ((), ("--json", "-")):
        with Path("/dev/full").open("w") as full:
            options = arguments("decode", "plan", "--chip", "M1", *more)
            done = subprocess.run(options, stdout=full, stderr=subprocess.PIPE, env=environment(), cwd=work, text=True)
        assert done.returncode == 2 and done.stderr.splitlines() == [
            "decode: error: standard output: No space left on device"
        ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt(work: Path, small_teacher: Path, number: int) -> None:
    """SIGTERM is as good as Ctrl-C, and both do the same in the background of scripts, where that one is ignored."""
    many = work / "many.txt"
    many.write_text("Why is the sky blue?\n" * 200, encoding="utf-8")
    options = ("--prompts", many, "--max-tokens", 500)
    process = subprocess.Popen(
        arguments("decode", "plain", "--teacher", small_teacher, *options, "-q", "--json", "out.json"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), cwd=work,
        preexec_fn=in_background,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err.decode()) == (130, "\ndecode: interrupted\n")
    assert not (work / "out.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_not_lost_where_python_raises_nothing(work: Path, number: int) -> None:
    """In a `__del__`, here of a weak reference's callback, as imports have them too, it is printed and forgotten."""
    late = (
        "import signal, sys, weakref"
        "\nclass Last:"
        f"\n    def __del__(self): signal.raise_signal({int(number)})"
        "\nclass Part: pass"
        "\ndef hook(event, arguments):"
        "\n    if event == 'open' and str(arguments[0]).endswith('config.json') and not met:"
        "\n        met.append(Part()); met.append(weakref.ref(met[0], lambda _: Last())); del met[0]"
        "\nmet = []; sys.addaudithook(hook); sys.argv[0] = 'decode'"
        "\nfrom decode.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", late, "plain", "--prompt", "Hi", "--max-tokens", "2"],
        stdin=subprocess.DEVNULL, env=environment(), cwd=work, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ndecode: interrupted\n")


@pytest.mark.slow
def test_a_check_that_fails_gives_one(weak_draft: Path, work: Path) -> None:
    """--compare with a teacher that errs in rows among others: exit code 1, and where it differs."""
    spoil = (
        "from decode.models.transformer import Forward, Transformer; right = Transformer.step"
        "\ndef step(self, tokens, cache, taps=()):"
        "\n    y = right(self, tokens, cache, taps)"
        "\n    return Forward({}, lambda: -y.logits) if len(tokens) > 1 and len(self.layers) > 1 else y"
        "\nTransformer.step = step\n"
    )
    start = arguments("decode", "spec", "--draft", weak_draft, "--prompt", "Hi", "--max-tokens", 8, "--compare")
    done = subprocess.run(
        [start[0], "-c", spoil + start[2], *start[3:]], stdin=subprocess.DEVNULL, env=environment(), cwd=work,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "identical to plain decoding: 0 of 1" in done.stderr and "prompt 1 differs at token 0" in done.stderr


def test_nothing_drafted_is_no_acceptance_of_zero(inside: Command, weak_draft: Path, small_teacher: Path) -> None:
    """The only token of a reply is the teacher's own."""
    models = ("--teacher", small_teacher, "--draft", weak_draft)
    for options in (("plain", "--teacher", small_teacher), ("spec", *models), ("spec", *models, "--compare")):
        done = inside("decode", *options, "--prompt", "Hi", "--max-tokens", 1, "--json", "-")
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["acceptance_rate"] is report["mean_acceptance_length"] is None
        assert report["tokens"] == 1 and report["rounds"] == report["drafted"] == 0
        assert ("acceptance rate none: nothing was drafted" in done.err) is (options[0] == "spec")


def test_what_is_compared_is_printed_too(
    inside: Command, weak_draft: Path, small_teacher: Path, tmp_path: Path
) -> None:
    models, report = ("--teacher", small_teacher, "--draft", weak_draft), tmp_path / "r.json"
    options = ("--prompt", "Hi", "--max-tokens", 8, "--json", report)
    streamed = inside("decode", "spec", *models, *options)
    compared = inside("decode", "spec", *models, *options, "--compare")
    assert compared.code == 0, compared.err
    (output,) = json.loads(report.read_text(encoding="utf-8"))["outputs"]
    assert streamed.out == compared.out == output["text"] + "\n" != "\n"


def test_a_byte_order_mark_before_a_models_files(
    inside: Command, weak_draft: Path, small_teacher: Path, tmp_path: Path
) -> None:
    """As an editor on Windows leaves it; a template would send it to the model."""
    options = ("--prompt", "Hi", "--max-tokens", 4, "-q", "--json", "-")
    plain = inside("decode", "spec", "--teacher", small_teacher, "--draft", weak_draft, *options)
    assert plain.code == 0, plain.err
    template = json.loads((small_teacher / "tokenizer_config.json").read_text())["chat_template"]
    folders = []
    for source in (small_teacher, weak_draft):
        texts = {path.name.replace(".", "__"): b"\xef\xbb\xbf" + path.read_bytes() for path in source.glob("*.json")}
        texts["chat_template__jinja"] = b"\xef\xbb\xbf" + template.encode()
        folders.append(changed_copy(source, tmp_path / source.name, **texts))
    done = inside("decode", "spec", "--teacher", folders[0], "--draft", folders[1], *options)
    assert done.code == 0, done.err
    ids = [json.loads(result.out)["outputs"][0]["token_ids"] for result in (plain, done)]
    prompts = [json.loads(result.out)["outputs"][0]["prompt_tokens"] for result in (plain, done)]
    assert ids[0] == ids[1] and prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
    ],
)
def test_links_that_lead_nowhere_are_named(
    inside: Command, weak_draft: Path, small_teacher: Path, tmp_path: Path, name: str
) -> None:
    """Or round in a circle: what they stand for would be left out without a word, a chat template for one."""
    for i, (folder, target) in enumerate([(small_teacher, name), (weak_draft, "nowhere")]):
        broken = changed_copy(folder, tmp_path / f"m{i}", **{name.replace(".", "__"): None})
        (broken / name).symlink_to(target)
        option = ("plain", "--teacher", broken) if folder == small_teacher else ("spec", "--draft", broken)
        inside("decode", *option, "--prompt", "a").refused("decode", f"{broken / name}: is a link that leads nowhere")


def test_names_with_glob_characters(inside: Command, weak_draft: Path, small_teacher: Path, tmp_path: Path) -> None:
    """Beside the names that they would find as patterns: what is decoded, converted and drafted is the named model."""
    options = ("--prompt", "Hi", "--max-tokens", 6, "-q", "--json", "-")
    whole: dict[str, mx.array] = mx.load(str(small_teacher / "model.safetensors"))  # type: ignore[assignment]
    other = whole | {"model.embed_tokens.weight": whole["model.embed_tokens.weight"][::-1]}
    changed_copy(small_teacher, tmp_path / "m[1]")
    changed_copy(small_teacher, tmp_path / "m1", model__safetensors=None)
    mx.save_safetensors(str(tmp_path / "m1" / "model.safetensors"), other, {"format": "mlx"})
    changed_copy(weak_draft, tmp_path / "d[1]")
    changed_copy(SHIPPED, tmp_path / "d1")

    def decoded(teacher: Path, draft: Path) -> tuple[list[int], int]:
        done = inside("decode", "spec", "--teacher", teacher, "--draft", draft, *options, cwd=tmp_path)
        assert done.code == 0, done.err
        report = json.loads(done.out)
        return report["outputs"][0]["token_ids"], report["accepted"]

    expected = decoded(small_teacher, weak_draft)
    assert decoded(Path("m[1]"), Path("d[1]")) == expected != decoded(Path("m1"), Path("d1"))
    done = inside("distill", "convert", "--teacher", "m[1]", "--out", "c[1]/m", "-q", cwd=tmp_path)
    assert done.code == 0, done.err
    assert decoded(Path("c[1]/m"), Path("d[1]")) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value"), [("TQDM_MININTERVAL", "abc"), ("TQDM_BAR_FORMAT", "{foo}"), ("TERMINAL_WIDTH", "abc")]
)
def test_what_libraries_cannot_read_in_the_environment(command: Command, variable: str, value: str) -> None:
    command("decode", "--help", **{variable: value}).refused("decode", f"{variable}={value}")


@pytest.mark.slow
def test_a_stop_is_not_measured(work: Path, small_teacher: Path, weak_draft: Path, prompts: Path) -> None:
    """As by Ctrl-Z and `fg`, while the first prompt is answered one way."""
    models = ("--teacher", small_teacher, "--draft", weak_draft)
    options = (*models, "--prompts", prompts, "--max-tokens", 128, "--compare", "--json", "-")
    process = subprocess.Popen(
        arguments("decode", "spec", *options), cwd=work, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    while not process.stderr.readline().startswith("[1/2]"):
        assert process.poll() is None
    time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2)
    process.send_signal(signal.SIGCONT)
    report = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 0
    for way in (report["tok_per_s"], report["baseline_tok_per_s"]):
        assert report["tokens"] / way < 2


@pytest.mark.slow
def test_samples_are_not_compared(inside: Command, weak_draft: Path) -> None:
    """Those of two ways of decoding are of one distribution, not the same text."""
    options = ("--prompt", "Hi", "--max-tokens", 8, "--temperature", 1, "--compare", "--json", "-")
    done = inside("decode", "spec", "--draft", weak_draft, *options)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["speedup"] > 0 and "identical" not in report and "identical" not in report["outputs"][0]
    assert "identical" not in done.err and "not compared with the text of plain decoding" in done.err


RECIPE = """
[collect]
source = ["fd=2"]
exclude = ["x.jsonl"]
out = "ds"
[train]
out = "d"
[evaluate]
prompts = "p.jsonl"
out = "ev"
"""


@pytest.fixture
def work_place(weak_draft: Path, tmp_path: Path) -> Path:
    """A folder with prompts, a folder of sources, a recipe, a draft `d` with all that may lie beside one, a dataset
    `ds`, and an empty folder `ev`."""
    for name in ("p.jsonl", "x.jsonl", "fd/a.jsonl", "other/b.jsonl", "c.json", "m/draft.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "Hi"}\n')
    (tmp_path / "link").symlink_to("p.jsonl")
    (tmp_path / "log").symlink_to("d/log.jsonl")
    (tmp_path / "fd" / "linked").symlink_to("../other")
    (tmp_path / "r.toml").write_text(RECIPE)
    shutil.copytree(weak_draft, tmp_path / "d")
    for name in ("log.jsonl", "curves.png", "recipe.toml", "evaluation.json", "evaluation.md", "README.md"):
        (tmp_path / "d" / name).write_text("of the draft")
    (tmp_path / "ds").mkdir()
    for name in ("manifest.json", "shard-00000.safetensors"):
        (tmp_path / "ds" / name).write_text("of the dataset")
    (tmp_path / "ev").mkdir()
    return tmp_path


def test_results_do_not_replace_what_is_read(
    inside: Command, small_teacher: Path, work_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own name or a link's, named by an option, by a recipe or by nobody: what a command reads, what it writes,
    and the files of models and datasets. It is found out before any work."""
    monkeypatch.setattr("decode.cli.SAMPLES", work_place / "x.jsonl")
    monkeypatch.setattr("distill.recipe.RECIPES", work_place)
    before = {path: path.read_bytes() for path in work_place.rglob("*") if path.is_file()}
    teacher = ("--teacher", small_teacher)
    decode = ("decode", "plain", *teacher, "--max-tokens", 1)
    collect = ("distill", "collect", *teacher, "--tokens", 300, "--out", "ev")
    for command, targets in (
        ((*decode, "--prompts", "p.jsonl"), "p.jsonl link d/log.jsonl d/curves.png d/evaluation.json d/README.md"),
        (decode, "x.jsonl log d/draft.json d/tokenizer.json ds/shard-00000.safetensors m/draft.json"),
        (decode, "d/chat_template.jinja d/special_tokens_map.json d/merges.txt d/added_tokens.json"),  # not there yet
        (("decode", "plan", "--bandwidth", 100, "--teacher", "c.json"), "c.json"),
        ((*collect, "--source", "p.jsonl=2"), "link ev/manifest.json ev/shard-00000.safetensors"),
        ((*collect, "--source", "fd#prompt=2"), "fd/a.jsonl fd/new.json other/b.jsonl"),
        ((*collect, "--source", "p.jsonl", "--exclude", "fd"), "fd/a.jsonl fd/new.json"),
        (("distill", "train", *teacher, "--data", "ds", "--out", "ev"), "ds/manifest.json ev/log.jsonl ev/curves.png"),
        (("distill", "train", *teacher, "--data", "ds", "--out", "d"), "d/log.jsonl d/recipe.toml"),
        (
            ("distill", "evaluate", *teacher, "--prompts", "link", "--draft", "d", "--out", "ev"),
            "p.jsonl ev/evaluation.md",
        ),
        (("distill", "convert", *teacher, "--out", "ev"), "ev/config.json ev/model.safetensors ev/merges.txt"),
        (("distill", "publish", "--draft", "d", "--repo", "a/b", "--dry-run"), "d/evaluation.md d/log.jsonl"),
        (("distill", "run", "r.toml"), "r.toml link x.jsonl fd/a.jsonl other/b.jsonl d/recipe.toml ev/evaluation.json"),
        (("distill", "run", "r"), "r.toml ds/manifest.json d/log.jsonl ev/evaluation-positions.png"),
        (("distill", "inspect", "ds"), "ds/manifest.json"),
        (("distill", "verify", "ds"), "ds/shard-00000.safetensors"),
    ):
        for target in targets.split():
            inside(*command, "--json", target, cwd=work_place).refused(command[0], f"--json {target}: ")
    with (work_place / "p.jsonl").open("rb") as prompts:
        piped = subprocess.run(
            arguments(*decode, "--json", "link"), stdin=prompts, env=environment(), cwd=work_place, capture_output=True
        )
    assert piped.returncode == 2 and b"--json link: " in piped.stderr
    assert before == {path: path.read_bytes() for path in work_place.rglob("*") if path.is_file()}


def test_results_may_lie_beside_models_under_other_names(
    inside: Command, small_teacher: Path, work_place: Path
) -> None:
    """And the same command again replaces them."""
    run = ("decode", "spec", "--teacher", small_teacher, "--draft", "d", "--prompt", "Hi", "--max-tokens", 1, "-q")
    for target in ("d/spec.json", "d/spec.json", "evaluation.json", "evaluation.json", "ev/log.jsonl"):
        done = inside(*run, "--json", target, cwd=work_place)
        assert done.code == 0, done.err
        assert json.loads((work_place / target).read_text())["prompts"] == 1


def test_a_folder_whose_own_name_is_not_utf8_is_refused(inside: Command, small_teacher: Path, tmp_path: Path) -> None:
    """Before the work, be it reached as `.` or through a link: no manifest or report could hold its name."""
    folder, link = changed_copy(small_teacher, tmp_path / "t\udcff"), tmp_path / "link"
    link.symlink_to(folder)
    for place in (".", link):
        for command in (
            ("decode", "plain", "--prompt", "a", "--teacher", place, "--json", tmp_path / "r.json"),
            ("decode", "plan", "--bandwidth", 100, "--teacher", place, "--json", tmp_path / "r.json"),
            ("distill", "collect", "--teacher", place, "--out", tmp_path / "d"),
            ("distill", "collect", "--teacher", small_teacher, "--source", place, "--out", tmp_path / "d"),
        ):
            inside(*command, cwd=folder).refused(command[0], "UTF-8")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, "link"}


def test_a_json_file_that_could_not_be_written_is_refused_before_the_work(inside: Command, tmp_path: Path) -> None:
    """Any name that the file system takes is written; a longer one, and one on a full disk, are refused at once."""
    longest = tmp_path / ("n" * 250 + ".json")
    assert inside("decode", "plain", "--prompt", "a", "--max-tokens", 1, "-q", "--json", longest).code == 0
    assert json.loads(longest.read_text())["tokens"] == 1 and list(tmp_path.iterdir()) == [longest]
    longer = tmp_path / ("n" * 251 + ".json")
    inside("decode", "plain", "--prompt", "a", "--json", longer).refused("decode", str(longer))
    program = """
import shutil, sys
from pathlib import Path
from kernels.console import check_json_target
disk = Path(sys.argv[1])
check_json_target(str(disk / "r.json"))
(disk / "filled").write_bytes(bytes(shutil.disk_usage(disk).free))
try:
    check_json_target(str(disk / "r.json"))
except Exception as error:
    print(error, [path.name for path in disk.iterdir()])
"""
    (tmp_path / "disk").mkdir()
    done = mounted(tmp_path / "disk", "1m", program)
    assert "r.json" in done.stdout and "No space left" in done.stdout and "['filled']" in done.stdout, done.stderr


@pytest.mark.slow
def test_json_file_is_replaced_whole_or_not_at_all(
    inside: Command, work: Path, small_teacher: Path, tmp_path: Path
) -> None:
    target = tmp_path / "r.json"
    target.write_text("old")
    options = ("plain", "--teacher", small_teacher, "--prompt", "a", "--raw", "--max-tokens", 2, "-q", "--json", target)
    start = arguments("decode", *options)
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); {start[2]}"
    full = subprocess.run(
        [start[0], "-c", code, *start[3:]], stdin=subprocess.DEVNULL, env=environment(), cwd=work, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert full.returncode == 2
    assert full.stderr.strip() == f"decode: error: --json {target}: cannot be written: File too large"
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]
    assert inside("decode", *options).code == 0
    assert json.loads(target.read_text())["tokens"] == 2
