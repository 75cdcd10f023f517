"""Recipes: what is refused and where, what the shipped ones say, and `distill run` on a small one."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import weakref
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TEACHER, Command, arguments, changed_copy, environment, unsealed

from decode.models.checkpoint import find_teacher
from decode.tokenizer import Tokenizer
from distill.data.collect import plan_collection
from distill.pipeline import Pipeline, free_memory
from distill.predict import MACS, predict, table, teacher_bytes
from distill.provenance import teacher_files
from distill.recipe import RECIPES, find_recipe, keys, read_recipe
from distill.release.evaluate import evaluate
from distill.training.checkpoint import FORMAT
from distill.training.draft_config import DraftConfig
from distill.training.memory import estimate_memory
from distill.training.settings import TrainSettings
from distill.training.state import State
from kernels import UserError
from kernels.signals import take_signals

TINY = """# Kept with the draft, comments and all.
[collect]
source = ["prompts.jsonl"]
tokens = 1500
seq_len = 64
max_reply = 16
reply_batch = 8
batch = 4
[train]
layers = 1
hidden = 64
tokens = 640
evals = 2
live_prompts = 0
[evaluate]
prompts = "prompts.jsonl"
limit = 2
max_tokens = 8
"""
BITNET_2B = {
    "model_type": "bitnet",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "vocab_size": 128256,
    "rope_theta": 5e5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}


def test_folders_of_a_recipe_may_be_under_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.toml").write_text('out = "~/x"\n' + TINY.replace("[train]", '[train]\nout = "~/y"'))
    recipe = read_recipe(tmp_path / "r.toml")
    assert (recipe.dataset, recipe.draft) == (tmp_path / "x" / "dataset", tmp_path / "y")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds no settings"),
        ("# only a remark\n", "holds no settings"),
        ("[train]\nlayres = 2\n", "line 2: [train] layres: no such key; did you mean layers?"),
        ('tokens = 5\n[collect]\n[train]\ntoken = "x"', "line 1: tokens: no such key; it belongs into [collect]"),
        ("\n[trian]\nlayers = 2\n", "line 2: trian: no such key; did you mean train?"),
        ('[collect]\n# x\nteacher = "a"\n', "line 3: [collect] teacher: no such key; it belongs above all sections"),
        ('[train]\nlayers = "two"\n', "line 2: [train] layers must be a whole number, not 'two'"),
        ("[train]\nlayers = true\n", "[train] layers must be a whole number, not True"),
        ("[train]\nlr = false\n", "[train] lr must be a number, not False"),
        ("[train]\nteacher_embedding = 1\n", "[train] teacher_embedding must be true or false, not 1"),
        ('[collect]\nsource = "a.txt"\n', "[collect] source must be a list of strings, not 'a.txt'"),
        ("[collect]\nsource = []\n", "[collect] source must be a list of strings"),
        ('[collect]\ntemperature = [1, "a"]\n', "[collect] temperature must be a list of numbers"),
        ('[collect]\nsource = ["a\\u0000"]\n', "line 2: [collect] source must be without null characters"),
        ('out = "\\u0000"\n', "line 1: out must be without null characters"),
        ('teacher = ""\n', "line 1: teacher must be a name, not ''"),
        ('[collect]\nsource = ["a.txt", ""]\n', "line 2: [collect] source must be a name"),
        ("train = 3\n", "line 1: train must be a section, not 3"),
        ("[train]\nhidden = 100\n", "line 2: [train] hidden 100: must be a multiple of 64"),
        ("[train]\nlayers = 2\nlr = -1\n", "line 3: [train] lr -1: must be above 0"),
        ('[train]\nloss = "mse"\n', "[train] loss mse: known are"),
        ("[train]\nvocab = 0\n", "line 2: [train] vocab 0"),
        ("[train]\ntemperature = 0.5\n", "line 2: [train] temperature 0.5: must be 1 or one of [collect] temperature"),
        ("[collect]\nseq_len = 1\n", "line 2: [collect] seq_len 1: must be at least 16"),
        ("[collect]\nseed = -1\n", "line 2: [collect] seed -1: must be at least 0"),
        ("[evaluate]\nk = 0\n", "line 2: [evaluate] k 0: must be 1 to 1024"),
        (f"[train]\nseed = {1 << 63}\n", "line 2: [train] seed 9223372036854775808: must be below 2^63"),
        ("[collect]\ntemperature = [1e-300]\n", "line 2: [collect] temperature 1e-300: must be 0.01 to 100"),
        ('[collect]\nout = "a"\n[train]\nout = "a"\n', "line 4: [train] out: the folders of [train] (a) and"),
        ('out = "a"\n[train]\nout = "a/dataset/b"\n', "line 3: [train] out: the folders of [train] (a/dataset/b)"),
        ('[evaluate]\nout = "../x"\n[collect]\nout = "../x/y"\n', "line 2: [evaluate] out: the folders of"),
        ('[evaluate]\nhead = "int4"\n', "[evaluate] head int4"),
        ("[train\n", "is not TOML: "),
        ("a=" + "[" * 100_000, "is not TOML: "),
        ("[train]\nlayers = 2\nlayers = 3\n", "is not TOML: "),
    ],
)
def test_a_wrong_recipe_is_refused_where_it_is_wrong(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_recipe(path)
    assert str(refused.value).startswith(f"{path}: ") and named in str(refused.value)


def test_defaults_are_those_of_the_commands(tmp_path: Path) -> None:
    text = "\ufeff[collect]\nseq_len = 256\n[train]\nlr = 1\n"  # behind a byte order mark
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    recipe = read_recipe(tmp_path / "mine.toml")
    assert recipe.collect.max_reply == 128 and recipe.collect.temperatures == (1.0,)
    assert [Path(name).name for name in recipe.collect.exclude] == ["eval.jsonl"]
    assert len(recipe.collect.sources) == 3 and all(Path(name).exists() for name in recipe.collect.sources)
    assert recipe.train.lr == 1 and recipe.train.for_teacher({}).layers == 2 and recipe.teacher is None
    assert (recipe.dataset, recipe.draft) == (Path("runs/mine/dataset"), Path("runs/mine/draft"))
    assert recipe.evaluation == recipe.draft


@pytest.mark.parametrize("name", ["bitnet-smol-116m-draft", "bitnet-smol-116m-reader"])
def test_the_shipped_drafts_have_their_recipes(name: str) -> None:
    """Every setting that a draft.json names is the recipe's; what it does not name is what was done before."""
    recipe = read_recipe(find_recipe(name))
    about = json.loads((ROOT / "checkpoints" / name / "draft.json").read_text())
    for setting, value in TrainSettings.filled_up(about["training"]["settings"]).items():
        assert getattr(recipe.train, setting) == value, setting
    assert recipe.collect.tokens == about["training"]["data"]["tokens"]
    assert about["teacher"]["name"] == TEACHER.name


@pytest.mark.parametrize("layers", [2, 4, 6, 8])
def test_recipes_of_the_2b_say_what_is_predicted(layers: int) -> None:
    """And all of them share one dataset."""
    path = find_recipe(f"bitnet-2b-4t-{layers}l")
    recipe = read_recipe(path)
    assert recipe.train.layers == layers and recipe.teacher == "microsoft/bitnet-b1.58-2B-4T"
    first = read_recipe(RECIPES / "bitnet-2b-4t-2l.toml")
    assert (recipe.collect, recipe.dataset) == (first.collect, first.dataset)
    comments = {line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")}
    works = predict(recipe, BITNET_2B)
    assert {line.strip() for line in table(works).splitlines()[:5]} <= comments
    assert all(work.fits(mac) for work in works for mac in MACS)


def test_recipes_say_every_setting() -> None:
    """So that another default some day does not change what they make. What may be left out is a choice of its own."""
    may_lack = {"out", "source", "exclude", "sampled", "vocab", "bits", "prompts", "limit", "ternary", "init"}
    of_readers = {"reads_teacher", "taps", "unroll", "step_decay"}
    for path in RECIPES.glob("*.toml"):
        values = tomllib.loads(path.read_text())
        may_lack_here = may_lack | (set() if values["train"].get("reads_teacher") else of_readers)
        for section in ("collect", "train", "evaluate"):
            missing = set(keys(section)) - values[section].keys() - may_lack_here
            assert path.stem in ("demo", "demo-continued") or not missing, f"{path}: [{section}] {missing}"


def test_predicted_memory_is_what_was_measured() -> None:
    """docs/full-size.md: a draft of 6 layers x 768 with a whole head, --batch 2. Resident memory counts Python too."""
    train = DraftConfig.for_config(BITNET_2B, "config.json", 6, 768)
    assert estimate_memory(train, 2, 512, gpu=True, teacher_hidden=2560) == pytest.approx(9.2e9, rel=0.05)
    assert estimate_memory(train, 2, 512, gpu=False, teacher_hidden=2560) == pytest.approx(5.2e9 - 0.3e9, rel=0.05)
    tiny = DraftConfig.for_config(BITNET_2B, "config.json", 1, 64)  # less than the teacher's embedding, twice
    assert estimate_memory(tiny, 1, 64, gpu=False, teacher_hidden=2560) > 6 * 128256 * 2560
    recipe = read_recipe(RECIPES / "bitnet-2b-4t-6l.toml")
    evaluate = predict(recipe, BITNET_2B)[2]
    assert evaluate.memory == pytest.approx(2.9e9, rel=0.05)


def test_predictions_are_bytes_and_operations() -> None:
    """1.18 GB read a token, 125 to 128 bytes of shards."""
    assert teacher_bytes(BITNET_2B) == pytest.approx(1.18e9, rel=0.01)
    recipe = read_recipe(RECIPES / "bitnet-2b-4t-2l.toml")
    collect, train, evaluate = predict(recipe, BITNET_2B)
    assert collect.disk is not None and 125 <= collect.disk / recipe.collect.tokens - 4 <= 128  # 4: its replies
    assert collect.parts is not None and train.parts is not None and evaluate.parts is not None
    replies, scores = collect.parts
    assert replies[1] == scores[1] == pytest.approx(2 * 2.41e9 * recipe.collect.tokens, rel=0.05)
    assert evaluate.parts[0][0] == pytest.approx(2 * 384 * 128 * 1.18e9, rel=0.02)


@pytest.mark.slow
def test_run(inside: Command, small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three stages, once; stopped and taken up; what was made under other settings stays."""
    lines = [{"prompt": f"Tell me about the number {i}.", "category": "ab"[i % 2]} for i in range(60)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiny = f'teacher = "{small_teacher}"\n{TINY}'
    (tmp_path / "tiny.toml").write_text(tiny)
    out = tmp_path / "runs" / "tiny"

    def run(*options: object) -> tuple[int, str, str]:
        done = inside("distill", "run", "tiny.toml", *options, cwd=tmp_path)
        return done.code, done.out, done.err

    dry = run("--dry-run", "--json", "-")
    assert dry[0] == 0 and json.loads(dry[1])["stages"][0]["folder"] == "runs/tiny/dataset"
    assert not (tmp_path / "runs").exists()
    code, _, told = run("--from", "train")
    assert code == 2 and "runs/tiny/dataset: no such dataset folder" in told and not (tmp_path / "runs").exists()

    process = subprocess.Popen(
        arguments("distill", "run", "tiny.toml"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while not (out / "draft" / "log.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)  # as Ctrl-C
    assert b"same command goes on" in process.communicate(timeout=60)[1] and process.returncode == 130
    shards = {path.name: path.stat().st_mtime_ns for path in (out / "dataset").iterdir()}

    code, text, told = run("--json", "-")
    assert code == 0 and told.endswith(f"\nuse it: decode spec --teacher {small_teacher} --draft runs/tiny/draft\n"), (
        told
    )
    result = json.loads(text)
    assert [stage["skipped"] for stage in result["stages"]] == [True, False, False]
    assert {path.name: path.stat().st_mtime_ns for path in (out / "dataset").iterdir()} == shards
    content = (out / "draft" / "recipe.toml").read_bytes()
    assert content == tiny.encode() and result["sha256"] == hashlib.sha256(content).hexdigest()
    about = json.loads((out / "draft" / "draft.json").read_text())
    assert about["complete"] and about["recipe"] == {"name": "tiny", "sha256": result["sha256"]}
    report = json.loads((out / "draft" / "evaluation.json").read_text())
    assert report["complete"] and [row["prompts"] for row in report["categories"]] == [2, 2]
    assert {**report, "outputs": None} == {**result["stages"][2]["report"], "outputs": None}

    (out / "draft" / "state").mkdir()
    (out / "draft" / "state" / "run.json").write_text('{"identity": {}}')  # of a run killed as its draft was whole
    again = json.loads(run("--quiet", "--json", "-")[1])
    assert [stage["skipped"] for stage in again["stages"]] == [True, True, True]
    assert not (out / "draft" / "state").exists()
    listed = out / "dataset" / "manifest.json"
    today = listed.read_bytes()  # of format 2 it is whole, too, where the same settings made it
    older = json.loads(today) | {"version": 1, "settings": json.loads(today)["settings"] | {"collection_format": 2}}
    listed.write_text(json.dumps(older))
    with chdir(tmp_path):
        teacher = find_teacher(str(small_teacher))
        pipeline = Pipeline(read_recipe(Path("tiny.toml")), teacher, True, lambda *_: None, lambda: None)
        assert pipeline.stages["collect"].done()
    listed.write_bytes(today)
    (out / "draft" / "evaluation.json").write_text(json.dumps(report | {"identical": False}))
    # Another recipe goes on from that draft, with the same data.
    fresh = "layers = 1\nhidden = 64\ntokens = 640\nevals = 2"
    onwards = tiny.replace("[collect]", 'out = "runs/more"\n[collect]\nout = "runs/tiny/dataset"', 1)
    (tmp_path / "more.toml").write_text(onwards.replace(fresh, 'init = "runs/tiny/draft"\ntokens = 128\nevals = 1'))
    for skipped in ([True, False, False], [True, True, True]):
        done = inside("distill", "run", "more.toml", "-q", "--json", "-", cwd=tmp_path)
        assert done.code == 0, done.err
        assert [stage["skipped"] for stage in json.loads(done.out)["stages"]] == skipped
    onto = json.loads((tmp_path / "runs" / "more" / "draft" / "draft.json").read_text())
    assert onto["config"] == about["config"] and "init" in onto["training"]
    (tmp_path / "more.toml").write_text(onwards.replace(fresh, 'init = "runs/more/draft"\ntokens = 128\nevals = 1'))
    refused = inside("distill", "run", "more.toml", cwd=tmp_path)
    refused.refused("distill", "[train] init runs/more/draft: is the folder of the new draft too")
    (tmp_path / "more.toml").write_text(onwards.replace(fresh, 'init = "runs/tiny/draft"\nlayers = 2'))
    other = shutil.copytree(tmp_path / "runs" / "tiny" / "draft", tmp_path / "other")
    table = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(table.replace('"content": "<|im_start|>"', '"content": "<|other|>"'))
    (other / "draft.json").unlink()
    beginning = onwards.replace('out = "runs/tiny/dataset"', 'out = "runs/none"').replace(fresh, 'init = "other"')
    (tmp_path / "other.toml").write_text(beginning)
    refused = inside("distill", "run", "other.toml", cwd=tmp_path)
    refused.refused("distill", "other.toml: line 13: [train] init other: its tokenizer is not that of")
    refused = inside("distill", "run", "more.toml", cwd=tmp_path)
    refused.refused("distill", "more.toml: line 14: [train] layers 2: the draft of --init has 1")
    code, text, _ = run("--from", "evaluate", "--quiet", "--json", "-")  # a check that failed is made again
    assert code == 0 and [stage["skipped"] for stage in json.loads(text)["stages"]] == [False]
    # Prompts that are edited while they are answered do not count in what is said of this run.
    report = json.loads((out / "draft" / "evaluation.json").read_text()) | {"identical": False}
    (out / "draft" / "evaluation.json").write_text(json.dumps(report))
    asked = (tmp_path / "prompts.jsonl").read_text()

    def edited(*arguments: Any) -> dict[str, Any]:
        made = evaluate(*arguments)
        (tmp_path / "prompts.jsonl").write_text(asked + '{"prompt": "One more?"}\n')
        return made

    with monkeypatch.context() as patch:
        patch.setattr("distill.pipeline.evaluate", edited)
        code, text, told = run("--from", "evaluate", "--quiet", "--json", "-")
    assert code == 0 and json.loads(text)["stages"][0]["report"]["prompts"] == 4, told
    (tmp_path / "prompts.jsonl").write_text(asked)
    # From a later stage on, what is before it must still be what the recipe says, though its sources be gone.
    (tmp_path / "prompts.jsonl").rename(tmp_path / "away.jsonl")
    elsewhere = tiny.replace('prompts = "prompts', 'prompts = "away')
    (tmp_path / "tiny.toml").write_text(elsewhere.replace("tokens = 1500", "tokens = 1600"))
    for away in (False, True):
        code, _, told = run("--from", "train")
        where = "runs/tiny/draft/draft.json" if away else "runs/tiny/dataset"
        assert code == 2 and f"{where}: was made with tokens = 1500, not 1600" in told, told
        (out / "dataset").rename(out / "away") if not away else (out / "away").rename(out / "dataset")
    (tmp_path / "away.jsonl").rename(tmp_path / "prompts.jsonl")
    (tmp_path / "tiny.toml").write_text(tiny.replace('["prompts.jsonl"]', '["other.jsonl"]'))
    assert 'was made with sources = ["prompts.jsonl"], not ["other.jsonl"]' in run("--from", "train")[2]
    (tmp_path / "tiny.toml").write_text(tiny)
    manifest, ours = out / "dataset" / "manifest.json", about["teacher"]["hash"]
    whole = manifest.read_bytes()
    manifest.write_text(unsealed(manifest).replace(ours, "0" * 64))
    (out / "draft").rename(out / "away")
    assert f"runs/tiny/dataset: was made with another teacher than {small_teacher.name}" in run("--from", "train")[2]
    manifest.write_bytes(whole)
    (out / "away").rename(out / "draft")
    for old, new, named in (
        ("hidden = 64", "hidden = 128", "runs/tiny/draft: holds a finished draft that was trained with hidden = 64"),
        ("tokens = 1500", "tokens = 1600", "runs/tiny/dataset: was begun with tokens = 1500, not 1600"),
        ("hidden = 64", "hidden = 64\nvocab = 99999", "vocab 99999: the teacher has 16384 tokens"),
        (
            "hidden = 64",
            'reads_teacher = true\ntaps = "0,4"',
            "tiny.toml: line 13: [train] taps 0,4: the teacher has layers 0 to 3",
        ),
        ("batch = 4", "batch = 4\ntop_k = 20000", "tiny.toml: line 10: [collect] top_k 20000: must be 1 to 16384"),
        (
            "batch = 4",
            "batch = 4\nsampled = 8\ntop_k = 32",
            "tiny.toml: line 10: [collect] sampled 8: takes the place of --top-k 32",
        ),
        ('prompts = "prompts', 'prompts = "gone', "gone.jsonl"),
    ):
        (tmp_path / "tiny.toml").write_text(tiny.replace(old, new))
        if "teacher has" in named or "top_k" in named:
            assert named in run("--dry-run")[2]
        code, _, told = run()
        assert code == 2 and named in told and len(told.splitlines()) == 1, told
    assert (out / "draft" / "recipe.toml").read_bytes() == content
    tokenizer = json.loads((small_teacher / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "Be brief. " + tokenizer["chat_template"]
    changed_copy(small_teacher, tmp_path / "brief", tokenizer_config__json=json.dumps(tokenizer).encode())
    (tmp_path / "tiny.toml").write_text(tiny.replace(str(small_teacher), str(tmp_path / "brief")))
    for options in ((), ("--from", "evaluate")):
        code, _, told = run(*options)
        assert code == 2 and "runs/tiny/draft: " in told and "chat template" in told, told


@pytest.mark.parametrize("finished", [False, True])
def test_what_would_end_a_run_is_found_before_the_work(finished: bool, inside: Command, tmp_path: Path) -> None:
    """Results of another draft in the place of its own, and a finished draft of other data."""
    made_by = (RECIPES / "bitnet-smol-116m-draft.toml").read_text().replace("runs/bitnet-smol-116m/", "")
    made_by = made_by.replace("tokens = 50_000_000", "tokens = 2_000").replace("source = ", "# source = ")
    if finished:
        shutil.copytree(ROOT / "checkpoints" / "bitnet-smol-116m-draft", tmp_path / "bitnet-smol-116m-draft")
        text, named = made_by, ("wiki.jsonl.xz", "draft.json")
    else:
        (tmp_path / "results").mkdir()
        report = {"acceptance_rate": 0.5, "identity": {"draft": "0" * 64, "teacher": "0" * 64}}
        (tmp_path / "results" / "evaluation.json").write_text(json.dumps(report))
        text, named = made_by.replace("[evaluate]", '[evaluate]\nout = "results"'), ("results", "another draft")
    (tmp_path / "r.toml").write_text(text)
    inside("distill", "run", "r.toml", cwd=tmp_path).refused("distill", *named)
    assert not (tmp_path / "dataset").exists()


def test_another_unfinished_training_is_found_before_the_work(
    inside: Command, small_teacher: Path, tmp_path: Path
) -> None:
    """By its settings, its teacher's files and what it went on from; by its data and its teacher's weights where an
    interrupted one left a draft, which tells of them."""
    recipe = f'teacher = "{small_teacher}"\n' + TINY.replace("[evaluate]", '[evaluate]\nout = "results"')
    (tmp_path / "r.toml").write_text(recipe)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n')
    (tmp_path / "results").mkdir()
    older = tmp_path / "results" / "evaluation-unfinished.jsonl"  # which is in the way too, and looked at later
    older.write_text('{"identity": {"metrics_version": 1}}\n')
    draft, teacher = tmp_path / "runs" / "r" / "draft", find_teacher(str(small_teacher))
    run = read_recipe(tmp_path / "r.toml").train.for_teacher(teacher.config).record()
    run |= {"data": "0" * 64, "teacher_files": teacher_files(Tokenizer(small_teacher))}
    with chdir(tmp_path):
        collected = plan_collection(teacher, read_recipe(tmp_path / "r.toml").collect, tmp_path / "none")

    def about(hash: str = teacher.weights_hash, **other: object) -> dict[str, Any]:
        data = {"sha256": "0" * 64, "settings": {**collected.manifest.values, **other}}
        return {"format": FORMAT, "complete": False, "teacher": {"hash": hash}, "training": {"data": data}}

    for begun, left, *named in (
        (run | {"hidden": 128}, None, "runs/r/draft: ", "hidden = 128, not 64"),
        (run | {"teacher_files": run["teacher_files"] | {"config.json": ""}}, None, "runs/r/draft: ", "config.json"),
        (run | {"init": "0" * 64}, None, "runs/r/draft: ", "--init"),
        (run, about(hash=""), "runs/r/draft: ", "another teacher"),
        (run, about(tokens=1600), "runs/r/draft/draft.json: ", "tokens = 1600, not 1500"),
        (run, {"format": FORMAT}, "runs/r/draft"),
        (run, about(), older.name),
        (run, None, older.name),
    ):
        shutil.rmtree(draft, ignore_errors=True)
        State.open(draft / "state", begun)
        if left is not None:
            (draft / "draft.json").write_text(json.dumps(left))
        inside("distill", "run", "r.toml", cwd=tmp_path).refused("distill", *named)
    assert not (tmp_path / "runs" / "r" / "dataset").exists()


def test_ctrl_c_while_a_stage_is_freed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints a KeyboardInterrupt of a garbage collection's callback and goes on."""
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    take_signals()

    class Model:
        pass

    model = Model()
    model.parts = [model]  # type: ignore[attr-defined]
    alive = weakref.ref(model, lambda _: signal.raise_signal(signal.SIGINT))
    del model
    with pytest.raises(KeyboardInterrupt):
        free_memory()
    assert alive() is None and sys.getprofile() is None


def test_dry_run_without_the_teacher(inside: Command, work: Path) -> None:
    """What needs no teacher is told all the same, and nothing is fetched or written."""
    before = sorted(work.rglob("*"))
    done = inside("distill", "run", RECIPES / "demo.toml", "--dry-run")
    assert done.code == 0 and "90,000 tokens" in done.out and "None was measured on a Mac" in done.out
    (work / "far.toml").write_text('teacher = "owner/not-there"\n[collect]\ntokens = 1_000_000\n')
    far = inside("distill", "run", "far.toml", "--dry-run", "--json", "-")
    assert far.code == 0 and "owner/not-there" in far.err
    stages = json.loads(far.out)["stages"]
    assert stages[0]["disk_bytes"] == 128e6 and stages[0]["memory_bytes"] is None
    assert stages[0]["macs"][0]["seconds"] is None
    (work / "far.toml").unlink()
    inside("distill", "run", "nope").refused("distill", "nope: no such recipe", "demo")
    assert sorted(work.rglob("*")) == before
