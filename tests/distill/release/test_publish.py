"""Publishing by the real command through the real Hub client, to a Hub on loopback that can be made to fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SHIPPED, TEACHER, Command, arguments, changed_copy, environment
from loopback_hub import Hub

from decode.models.checkpoint import find_model, find_teacher
from distill.recipe import RECIPE_FILE
from distill.release.card import EVALUATION
from distill.release.publish import prepare
from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama
from kernels import UserError

REPO = "alice/small-draft"
UPLOADED = {"README.md", "config.json", "draft.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
UPLOADED |= {"generation_config.json", "log.jsonl", "curves.png"}
ON_HUB = UPLOADED | {"published.json"}
DATA = {
    "sources": [{"name": "a|b.jsonl", "sha256": "ab" * 32, "kind": "file"}],
    "exclude": [{"name": "eval.jsonl", "sha256": "cd" * 32, "kind": "file"}],
    "tokens": 1000,
    "seq_len": 32,
    "k": 8,
    "temperatures": [1.0],
    "reply": True,
    "reply_temperatures": [0.0, 0.8],
}


def make_draft(folder: Path, teacher: dict[str, Any] | None = None, bits: int | None = None, **about: Any) -> Path:
    """A random draft for the embedded teacher, as `distill train` leaves one."""
    config = DraftConfig.for_teacher(TEACHER, layers=1, hidden=64)
    named = {"name": TEACHER.name, "hash": find_teacher(None).weights_hash, "license": "apache-2.0"}
    provenance = {
        "complete": True,
        "teacher": teacher or named,
        "tokenizer_hash": "ef" * 32,
        "training": {
            "settings": {"layers": 1, "hidden": 64, "lr": 0.002},
            "data": {"sha256": "12" * 32, "tokens": 1024, "settings": DATA},
            "steps": 2,
        },
        "made_with": {"device": "a device", "commit": "f00d", "versions": {"mlx": "1.2.3"}},
    }
    checkpoint.save(folder, llama.create(config, seed=0), config, TEACHER, provenance | about, bits)
    lines = [{"kind": "eval", "step": i, "tokens": i * 64, "held_out_loss": 1.5 / i} for i in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "curves.png").write_bytes(b"\x89PNG\r\n" + bytes(3000))
    # What must stay at home.
    (folder / "state").mkdir()
    (folder / "state" / "step-7.safetensors").write_bytes(b"optimiser state")
    for name in ("notes.txt", ".env", "model-old.safetensors.bak", "pytorch_model.bin"):
        (folder / name).write_text("mine")
    return folder


def evaluated(folder: Path, **found: Any) -> Path:
    """A draft with an evaluation of its own beside it, as far as publishing looks at one."""
    teacher = json.loads((folder / "draft.json").read_text())["teacher"]["hash"]
    identity = {"draft": find_model(str(folder), "--draft").weights_hash, "teacher": teacher}
    (folder / EVALUATION).write_text(json.dumps({"identity": identity, "identical": True} | found))
    return folder


def with_recipe(folder: Path, text: str) -> Path:
    """A draft with the recipe that made it, as `distill run` leaves one."""
    (folder / RECIPE_FILE).write_text(text)
    named = {"name": "mine", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    about = json.loads((folder / "draft.json").read_text())
    (folder / "draft.json").write_text(json.dumps(about | {"recipe": named}))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_draft(tmp_path_factory.mktemp("drafts") / "small")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path).running() as running:
        yield running


def publish(command: Command, hub: Hub, folder: Path, *options: object, token: str | None = "hf_alice") -> Any:
    return command("distill", "publish", "--draft", folder, "--repo", REPO, *options, **hub.environment(token))


def local_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in UPLOADED - {"README.md"}}


def snapshot(home: Path, name: str) -> dict[str, bytes]:
    """What a client has in its cache of a repository."""
    folders = list((home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())
    assert len(folders) == 1
    return {path.name: path.read_bytes() for path in folders[0].iterdir()}


# --- without a network


def test_dry_run_lists_and_prints(command: Command, inside: Command, small: Path, tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}
    options = ("--draft", small, "--repo", REPO, "--dry-run")
    shown = command("distill", "publish", *options, **nowhere)
    assert shown.code == 0, shown.err
    listing, _, card = shown.out.partition("\n\n")
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in listing.splitlines()[:-1]}
    assert sizes.keys() == ON_HUB
    assert all(sizes[name] == len(content) for name, content in local_files(small).items())
    assert sizes["README.md"] == len(card.encode())
    result = json.loads(inside("distill", "publish", *options, "--json", "-").out)
    assert result["card"] == card and result["dry_run"] and result["bytes"] == sum(sizes.values())
    assert {entry["name"] for entry in result["files"]} == ON_HUB


def test_the_newest_finished_draft_is_published(inside: Command, small: Path, tmp_path: Path) -> None:
    run = ("distill", "publish", "--repo", REPO, "--dry-run", "--json", "-")
    inside(*run, cwd=tmp_path).refused("distill", "no finished draft under runs/")
    about = json.loads((small / "draft.json").read_text())
    facts = {"old": about, "new": about, ".new.replaced": about, "begun": {**about, "complete": False}}
    for age, (name, fact) in enumerate(facts.items()):
        folder = tmp_path / "runs" / name
        shutil.copytree(small, folder)
        (folder / "draft.json").write_text(json.dumps(fact))
        os.utime(folder / "draft.json", (age, age))
    assert json.loads(inside(*run, cwd=tmp_path).out)["draft"] == "runs/new"


def metadata(card: str, tmp_path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    (tmp_path / "README.md").write_text(card)
    found = metadata_load(tmp_path / "README.md")
    assert isinstance(found, dict)
    return found


def test_card(small: Path, tmp_path: Path) -> None:
    card = prepare(small, REPO).card
    facts = metadata(card, tmp_path)
    assert facts["license"] == "apache-2.0" and facts["library_name"] == "mlx"
    assert facts["pipeline_tag"] == "text-generation" and "speculative-decoding" in facts["tags"]
    assert "base_model" not in facts  # the embedded teacher is not on the Hub
    for part in (
        f"decode spec --draft {REPO} --compare",
        f"--draft-model {REPO}",
        f'load("checkpoints/bitnet-smol-116m"), load("{REPO}")',
        "Not evaluated.",
        "| a\\|b.jsonl | file | `" + "ab" * 32,
        "| eval.jsonl | file |",
        "| lr | 0.002 |",
        "| bitdraft's commit | `f00d` |",
        "| mlx | 1.2.3 |",
        "| 2 | 128 | 0.750 |",
        "![Loss, agreement and learning rate",
        "distill collect --source 'a|b.jsonl' --exclude eval.jsonl",
        "distill train --data runs/data --layers 1 --hidden 64 --lr 0.002",
    ):
        assert part in card, part


def test_card_of_a_hub_teacher_with_an_evaluation(tmp_path: Path) -> None:
    teacher = {"name": "maker/bitnet@v1", "hash": "0" * 64, "revision": "12" * 20}
    teacher |= {"license": "other", "license_name": "our-terms", "license_link": "https://example.org/terms"}
    folder = make_draft(tmp_path / "d", teacher, bits=8)
    values = {"acceptance_rate": 0.5875, "mean_acceptance_length": 2.7, "acceptance_per_position": [0.72, 0.5, 0.4]}
    whole = {**values, "prompts": 50, "k": 3, "speedup": 1.08, "device": "AMD <EPYC>", "looping": 16}
    category = {**values, "category": "code", "prompts": 9, "acceptance_rate": 0.25, "speedup": 0.9, "looping": 0}
    whole |= {"prompts_file": "ours.jsonl", "limit": 7, "max_tokens": 96, "head": "int8"}
    outputs = [{"identical": True}] * 50
    evaluated(folder, **whole, categories=[category], outputs=outputs)
    package = prepare(folder, REPO)
    assert EVALUATION in package.files
    facts = metadata(package.card, tmp_path)
    assert facts["base_model"] == "maker/bitnet" and facts["base_model_relation"] == "finetune"
    assert [facts[key] for key in ("license", "license_name")] == ["other", "our-terms"]
    for part in (
        f"decode spec --teacher maker/bitnet --draft {REPO}",
        "| its revision on the Hub | `" + "12" * 20,
        "| acceptance rate (accepted / drafted) | 0.588 |",
        "| accepted, by position | 0.72 0.50 0.40 |",
        "| device | AMD &lt;EPYC> |",
        "| prompts | 50 |\n| their file | ours.jsonl |\n| of each category, at most | 7 |",
        "| new tokens a prompt, at most | 96 |\n| the teacher's head | int8 |",
        "| outputs identical to plain decoding | 50 of 50 |",
        "| code | 9 | 0.250 | 2.70 | 0.72 0.50 0.40 | 0.90 | 0 |",
        "transformers cannot load it: its weights are in MLX's 8-bit format",
        "[our-terms](https://example.org/terms)",
    ):
        assert part in package.card, part
    assert "from_pretrained" not in package.card and "Not evaluated" not in package.card
    other = metadata(prepare(folder, REPO, licence="mit", base_model="x/y").card, tmp_path)
    assert other["license"] == "mit" and other["base_model"] == "x/y" and "license_name" not in other


def test_card_of_a_recipe_and_an_evaluation_that_was_stopped(tmp_path: Path) -> None:
    folder = make_draft(tmp_path / "d", {"name": "maker/bitnet", "hash": "0" * 64})
    evaluated(folder, prompts=3, k=3, acceptance_rate=0.5, complete=False)
    with_recipe(folder, 'teacher = "maker/bitnet"\n[train]\nlr = 0.003\n')
    package = prepare(folder, REPO)
    assert "recipe.toml" in package.files
    for part in ("stopped before its last prompt", "```toml", "lr = 0.003", "distill run recipe.toml"):
        assert part in package.card, part


def test_card_of_a_trimmed_draft_and_an_unknown_licence(tmp_path: Path) -> None:
    import numpy as np

    config = dataclasses.replace(DraftConfig.for_teacher(TEACHER, layers=1, hidden=64), draft_vocab_size=100)
    model = llama.create(dataclasses.replace(config, draft_vocab_size=None), seed=0)
    folder, kept = tmp_path / "d", np.arange(100, dtype=np.int32)
    checkpoint.save(folder, model, config, TEACHER, {"complete": True, "teacher": {"name": "x", "hash": "0"}}, d2t=kept)
    card = prepare(folder, REPO).card
    facts = metadata(card, tmp_path)
    assert facts["library_name"] == "bitdraft" and "license" not in facts
    assert "of which its head proposes 100" in card and "mlx-lm and transformers cannot load it" in card
    assert "from_pretrained" not in card and "mlx_lm.generate" not in card and "Not stated." in card


def test_what_is_not_published(small: Path, tmp_path: Path) -> None:
    def refused(match: str, folder: Path = small, repo: str = REPO, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            prepare(folder, repo, **options)

    refused("--repo small: a name on the Hub is owner/name", repo="small")
    refused("--repo a/b/c: ", repo="a/b/c")
    refused(r"--repo alice/\.\.: ", repo="alice/..")
    refused("--base-model x: a name on the Hub", base_model="x")
    refused("no such folder", tmp_path / "nowhere")
    refused("draft.json: missing", TEACHER)
    about = json.loads((small / "draft.json").read_text())
    for i, (match, change) in enumerate(
        (
            ("draft.json: not a draft of bitdraft's", {"draft__json": b"{}"}),
            ("its training is not finished", {"draft__json": json.dumps(about | {"complete": False}).encode()}),
            (
                "config.json: differs from what draft.json lists",
                {"config__json": (TEACHER / "config.json").read_bytes()},
            ),
            ("model.safetensors: missing", {"model__safetensors": None}),
            ("generation_config.json: not there", {"generation_config__json": None}),
        )
    ):
        refused(match, changed_copy(small, tmp_path / str(i), **change))
    shutil.copytree(small, tmp_path / "begun")
    (tmp_path / "begun" / "draft.json").write_text(json.dumps(about | {"complete": False}))
    unfinished = prepare(tmp_path / "begun", REPO, force=True)
    assert "**Its training was stopped before its end.**" in unfinished.card


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """But for those whose content is known by its hash."""
    folder = make_draft(tmp_path / "d")
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    (tmp_path / "secret").write_text("{}")
    prepare(folder, REPO)
    for name in ("LICENSE", "log.jsonl", "curves.png", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")
        with pytest.raises(UserError, match=f"{name}: is a link out of its folder"):
            prepare(folder, REPO, force=True)
        (folder / name).unlink()
    (folder / "LICENSE").symlink_to("notes.txt")
    package = prepare(folder, REPO)
    assert "LICENSE" in package.files and "log.jsonl" not in package.card  # which is not there any more


@pytest.mark.slow
def test_what_distill_evaluate_finds_is_published(inside: Command, tmp_path: Path) -> None:
    """The two commands on the shipped draft: one's evaluation.json is what the other reads."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(SHIPPED, folder)
    (folder / EVALUATION).unlink(missing_ok=True)
    lines = [{"prompt": "Why is the sky blue?", "category": name} for name in ("chat", "code", "code")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--prompts", "p.jsonl", "--limit", 1, "--max-tokens", 8, "-q")
    done = inside("distill", "evaluate", "--draft", folder, *options, cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((folder / EVALUATION).read_text())
    shown = inside("distill", "publish", "--draft", folder, "--repo", REPO, "--dry-run", "--json", "-", cwd=tmp_path)
    assert shown.code == 0, shown.err
    result = json.loads(shown.out)
    assert EVALUATION in {entry["name"] for entry in result["files"]}
    for part in (
        "| prompts | 2 |",
        "| outputs identical to plain decoding | 2 of 2 |",
        f"| acceptance rate (accepted / drafted) | {report['acceptance_rate']:.3f} |",
        f"| speed-up | {report['speedup']:.2f} |",
        f"| device | {report['device']} |",
        "| chat | 1 |",
    ):
        assert part in result["card"], part


def test_card_of_a_draft_that_learned_from_another_teacher(tmp_path: Path) -> None:
    """It is the draft of whose logits it has seen, and says what else it was made with."""
    training = {"settings": {"layers": 1}, "data": {"settings": DATA}}
    teacher = {"name": "maker/bitnet", "hash": "1" * 64, "converted_from": "2" * 64}
    started = {"started_from": {"name": "snapshot", "repo": "maker/tuned", "hash": "3" * 64}}
    card = prepare(make_draft(tmp_path / "d", teacher, training=training | started), REPO).card
    assert metadata(card, tmp_path)["base_model"] == "maker/bitnet"
    for part in (
        "distill collect --teacher maker/bitnet",
        "distill train --teacher maker/tuned",
        f"| that of the weights they were converted from | `{'2' * 64}` |",
        "| given to `distill train` in its place, for its embedding | maker/tuned |",
    ):
        assert part in card, part


def test_what_belongs_to_another_draft_is_not_published(tmp_path: Path) -> None:
    folder = evaluated(with_recipe(make_draft(tmp_path / "d"), "[train]\nlr = 0.003\n"))
    prepare(folder, REPO)
    for name in ("draft", "teacher"):
        report = json.loads((folder / EVALUATION).read_text())
        changed = report["identity"] | {name: "0" * 64}
        (folder / EVALUATION).write_text(json.dumps(report | {"identity": changed}))
        with pytest.raises(UserError, match=f"{EVALUATION}: was measured with another {name}"):
            prepare(folder, REPO, force=True)
        (folder / EVALUATION).write_text(json.dumps(report))
    outputs = [{"identical": True}, {"identical": False}]
    evaluated(folder, prompts=2, identical=False, outputs=outputs)
    with pytest.raises(UserError, match=f"{EVALUATION}: its text was not identical to plain decoding"):
        prepare(folder, REPO)
    assert "| outputs identical to plain decoding | 1 of 2 |" in prepare(folder, REPO, force=True).card
    (folder / EVALUATION).unlink()
    (folder / RECIPE_FILE).write_text("[train]\nlr = 0.004\n")
    with pytest.raises(UserError, match=f"{RECIPE_FILE}: is not the recipe that draft.json names"):
        prepare(folder, REPO, force=True)


@pytest.mark.parametrize(
    ("name", "changed", "complaint"),
    [
        ("draft.json", {"training": {"settings": []}}, r"draft\.json: is damaged \(training.settings is \[\]\)"),
        ("draft.json", {"training": {"data": {"settings": [1]}}}, r"is damaged \(training.data.settings is \[1\]\)"),
        ("draft.json", {"training": {"data": {"settings": {"sources": 3}}}}, r"training.data.settings.sources is 3"),
        (
            "draft.json",
            {"training": {"data": {"settings": DATA | {"temperatures": ["a"]}}, "settings": {"lr": 1}}},
            "no card can be",
        ),
        ("draft.json", {"vocabulary": 3}, "vocabulary is 3"),
        ("draft.json", {"made_with": {"versions": ["mlx"]}}, r"made_with.versions is \['mlx'\]"),
        ("draft.json", {"teacher": "me"}, "teacher is 'me'"),
        ("log.jsonl", [1], r"log\.jsonl: is damaged \(holds \[1\], not an object\)"),
        ("log.jsonl", b"\xff\n", r"log\.jsonl: cannot be read"),
        ("log.jsonl", b"", r"log\.jsonl: ends at step 0, the training of draft\.json at 2"),
        ("log.jsonl", b'{"kind": "step", "step": 1}\n{"kind": "st', r"log\.jsonl: ends at step 1"),
        ("recipe.toml", b"# caf\xe9", r"recipe\.toml: is not valid UTF-8 \(byte 5\)"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, name: str, changed: Any, complaint: str) -> None:
    folder = make_draft(tmp_path / "d")
    if name == "draft.json":
        changed = json.loads((folder / name).read_text()) | changed
    content = changed if isinstance(changed, bytes) else json.dumps(changed).encode() + b"\n"
    (folder / name).write_bytes(content)
    if name == "recipe.toml":
        about = json.loads((folder / "draft.json").read_text())
        recipe = {"sha256": hashlib.sha256(content).hexdigest()}
        (folder / "draft.json").write_text(json.dumps(about | {"recipe": recipe}))
    with pytest.raises(UserError, match=complaint) as refused:
        prepare(folder, REPO)
    assert str(folder) in str(refused.value) and name in str(refused.value) and "\n" not in str(refused.value)


# --- to a Hub


@pytest.mark.slow
def test_a_published_draft_comes_back_byte_for_byte(
    command: Command, hub: Hub, small: Path, small_teacher: Path
) -> None:
    done = publish(command, hub, small, "--json", hub.home / "result.json")
    assert done.code == 0, done.err
    assert done.out == f"{hub.url}/{REPO}\n"
    repository = hub.repositories[REPO]
    assert repository.private and len(repository.commits) == 2
    card = repository.files["README.md"].decode()
    first = next(iter(repository.commits.values()))
    record = {"published.json": repository.files["published.json"]}
    assert repository.files == {**first, **local_files(small), **record, "README.md": card.encode()}
    listed = {name: hashlib.sha256(content).hexdigest() for name, content in local_files(small).items()}
    assert json.loads(record["published.json"]) == {"files": listed}
    result = json.loads((hub.home / "result.json").read_text())
    assert result["commit"] == repository.head and result["private"] and result["card"] == card
    assert result["changed"] and result["url"] == f"{hub.url}/{REPO}"

    def decode(**variables: str) -> Any:
        options = ("--teacher", small_teacher, "--draft", REPO, "--prompt", "Hello", "--max-tokens", 4)
        return command(
            "decode", "spec", *options, "--json", "-", "--quiet", **(hub.environment(home="other") | variables)
        )

    used = decode()
    assert used.code == 0, used.err
    assert json.loads(used.out)["draft"] == REPO
    got = snapshot(hub.home / "other", REPO)
    assert got.keys() == ON_HUB - {"log.jsonl", "curves.png"}
    assert all(content == repository.files[name] for name, content in got.items())
    before = len(hub.requests)
    offline = decode(HF_HUB_OFFLINE="1")
    assert offline.code == 0 and json.loads(offline.out)["outputs"][0]["token_ids"]
    assert len(hub.requests) == before
    # A private draft is hidden from everyone else.
    other = ("--teacher", small_teacher, "--draft", REPO, "--prompt", "Hello")
    for token in ("hf_bob", None):
        refused = command("decode", "spec", *other, **hub.environment(token, home=f"of {token}"))
        refused.refused("decode", f"--draft {REPO}", "hf auth login")


@pytest.mark.slow
def test_again_sends_nothing_and_changes_nothing(command: Command, hub: Hub, small: Path, tmp_path: Path) -> None:
    assert publish(command, hub, small, "--public", "--quiet").code == 0
    assert not hub.repositories[REPO].private
    uploads, head = hub.asked("PUT /upload"), hub.repositories[REPO].head
    again = publish(command, hub, small, "--json", "-")
    assert json.loads(again.out)["commit"] == head and not json.loads(again.out)["changed"]
    assert hub.asked("PUT /upload") == uploads == 2 and hub.repositories[REPO].head == head
    assert not hub.repositories[REPO].private  # nobody asked for that
    # Trained on: what changed is replaced, what is gone goes, what others put there stays.
    repository = hub.repositories[REPO]
    repository.commit({**repository.files, "picture.jpg": b"theirs"})
    between = shutil.copytree(small, tmp_path / "between")
    (between / "chat_template.jinja").write_text("old")
    assert publish(command, hub, between).code == 0 and "chat_template.jinja" in repository.files
    after = evaluated(with_recipe(make_draft(tmp_path / "after", bits=4), "[train]\nbits = 4\n"), prompts=3)
    assert publish(command, hub, after, "--private").code == 0
    for name in (EVALUATION, RECIPE_FILE):
        assert repository.files[name] == (after / name).read_bytes()
    assert repository.private and "chat_template.jinja" not in repository.files
    assert repository.files["picture.jpg"] == b"theirs"
    assert repository.files["model.safetensors"] == (after / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_card_that_was_edited_stays(command: Command, hub: Hub, small: Path, tmp_path: Path) -> None:
    """And so does a licence that was put there; both are told or left alone, and --force replaces the card."""
    assert publish(command, hub, small, "-q").code == 0
    repository = hub.repositories[REPO]
    ours = repository.files["README.md"]
    after = make_draft(tmp_path / "after", bits=4)
    assert publish(command, hub, after, "-q").code == 0  # as it was written: replaced
    card = repository.files["README.md"]
    assert card != ours and b"4 bits" in card
    edited = card.replace(b"# small-draft", b"# small-draft\n\nDo not use this in a hospital.")
    repository.commit({**repository.files, "README.md": edited, "LICENSE": b"by hand"})
    kept = publish(command, hub, small, "--json", hub.home / "kept.json")
    assert kept.code == 0 and f"{REPO}: README.md" in kept.err and "--force" in kept.err
    assert json.loads((hub.home / "kept.json").read_text())["card_kept"] is True
    assert repository.files["README.md"] == edited and repository.files["LICENSE"] == b"by hand"
    assert repository.files["model.safetensors"] == (small / "model.safetensors").read_bytes()
    assert publish(command, hub, small, "-q", "--force").code == 0
    assert repository.files["README.md"] == ours and repository.files["LICENSE"] == b"by hand"


@pytest.mark.slow
def test_files_that_were_edited_or_put_on_the_hub_stay(command: Command, hub: Hub, small: Path, tmp_path: Path) -> None:
    """Small files and a large one, what a draft is and what stands beside it: refused, and replaced with --force."""
    assert publish(command, hub, small, "-q").code == 0
    repository, published = hub.repositories[REPO], dict(hub.repositories[REPO].files)
    theirs = b'{"merged": 1}\n'
    for name in ("config.json", "model.safetensors", "log.jsonl", "draft.json", "chat_template.jinja", "LICENSE"):
        content = published["draft.json"].replace(b"{", b'{"note": 1,', 1) if name == "draft.json" else theirs
        repository.commit({**published, name: content})
        draft = small
        if name == "LICENSE":
            draft = shutil.copytree(small, tmp_path / "licensed")
            (draft / name).write_text("of the draft")
        publish(command, hub, draft, "-q").refused("distill", REPO, name, "--force")
        assert repository.files[name] == content
    assert publish(command, hub, small, "-q", "--force").code == 0
    assert repository.files == published | {"LICENSE": theirs}
    # Of a version that kept no record the draft's own files are known, and what is beside them is taken for its.
    older = {**published, "log.jsonl": b"of another draft\n"}
    del older["published.json"]
    repository.commit(older)
    assert publish(command, hub, small, "-q").code == 0 and repository.files == published
    repository.commit({**older, "config.json": theirs})
    publish(command, hub, small, "-q").refused("distill", REPO, "config.json", "--force")
    # A licence of ours comes and goes.
    repository.commit({name: content for name, content in published.items() if name != "LICENSE"})
    licensed = tmp_path / "licensed"
    for text in ("of the draft", "another"):
        (licensed / "LICENSE").write_text(text)
        assert publish(command, hub, licensed, "-q").code == 0 and repository.files["LICENSE"] == text.encode()
        assert publish(command, hub, small, "-q").code == 0 and "LICENSE" not in repository.files
    # Where there was no model: what a user put there for one.
    own = hub.add("alice/own", {"log.jsonl": theirs, "notes.md": theirs})
    options = ("--draft", small, "--repo", "alice/own", "-q")
    command("distill", "publish", *options, **hub.environment()).refused("distill", "alice/own", "log.jsonl")
    assert len(own.commits) == 1


def test_a_licence_travels_with_its_link(tmp_path: Path) -> None:
    """Or the link leads to where the file is; one that leads nowhere is left out."""
    terms = {"license": "other", "license_name": "our-terms", "license_link": "TERMS.md"}
    teacher = {"name": TEACHER.name, "hash": find_teacher(None).weights_hash, **terms}
    folder = make_draft(tmp_path / "d", teacher)
    without = prepare(folder, REPO)
    assert "TERMS.md" not in without.files and "TERMS.md" not in without.card and "our-terms" in without.card
    known = prepare(folder, REPO, base_model="maker/bitnet")
    assert 'license_link: "https://huggingface.co/maker/bitnet/blob/main/TERMS.md"' in known.card
    (folder / "TERMS.md").write_text("the terms")
    package = prepare(folder, REPO)
    assert package.files["TERMS.md"] == folder / "TERMS.md" and 'license_link: "TERMS.md"' in package.card
    for link in ("../TERMS.md", "/etc/hostname", "state/step-7.safetensors"):
        elsewhere = make_draft(tmp_path / str(len(link)), teacher | {"license_link": link})
        assert prepare(elsewhere, REPO).files.keys() <= UPLOADED and link not in prepare(elsewhere, REPO).card


@pytest.mark.slow
def test_large_files_go_in_parts(command: Command, hub: Hub, small: Path) -> None:
    hub.part_size = 300_000
    done = publish(command, hub, small)
    assert done.code == 0, done.err
    size = (small / "model.safetensors").stat().st_size
    assert hub.asked("PUT /upload/[0-9a-f]+/") == -(-size // hub.part_size) > 5
    assert hub.repositories[REPO].files["model.safetensors"] == (small / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_another_model_is_not_overwritten(command: Command, hub: Hub, small: Path) -> None:
    theirs = {"draft.json": json.dumps({"teacher": {"name": "other", "hash": "1" * 64}}).encode()}
    repository = hub.add(REPO, {**theirs, "model-00001-of-00002.safetensors": b"old", "picture.jpg": b"mine"})
    publish(command, hub, small, "-q").refused("distill", REPO, "draft for another teacher (other", "--force")
    foreign = hub.add("alice/foreign", {"config.json": b"{}"})
    options = ("--draft", small, "--repo", "alice/foreign", "-q")
    refused = command("distill", "publish", *options, **hub.environment())
    refused.refused("distill", "alice/foreign", "holds config.json and is no draft", "--force")
    assert len(repository.commits) == len(foreign.commits) == 1
    # Weights of any format are a model, also without a config.json beside them.
    for name in ("model.i2_s.gguf", "old/pytorch_model.bin"):
        foreign.commit({"README.md": b"theirs", name: b"weights"})
        refused = command("distill", "publish", *options, **hub.environment())
        refused.refused("distill", "alice/foreign", f"holds {name} and is no draft")
    assert command("distill", "publish", *options, "--force", **hub.environment()).code == 0
    assert foreign.files.keys() == ON_HUB
    assert publish(command, hub, small, "--force").code == 0
    assert repository.files.keys() == ON_HUB | {"picture.jpg"}  # no weights of the other model beside ours


@pytest.mark.slow
def test_a_draft_that_does_not_say_for_whom_is_not_overwritten(hub: Hub, command: Command, tmp_path: Path) -> None:
    """Two that do not say it need not be for the same teacher; and one that cannot be read is someone's."""
    nameless = make_draft(tmp_path / "d", {"name": "mine"})
    repository = hub.add(REPO, {"draft.json": json.dumps({"teacher": {"name": "other"}}).encode()})
    publish(command, hub, nameless, "-q").refused("distill", REPO, "does not say which teacher", "--force")
    repository.commit({"draft.json": b"<html>"})
    refused = publish(command, hub, nameless, "-q")
    refused.refused("distill", f"{REPO}: holds a draft.json that is damaged (cannot be read", "--force")
    assert str(hub.home) not in refused.err
    assert publish(command, hub, nameless, "-q", "--force").code == 0
    assert repository.files["draft.json"] == (nameless / "draft.json").read_bytes()


@pytest.mark.slow
def test_who_may_not(command: Command, hub: Hub, small: Path) -> None:
    publish(command, hub, small, "-q", token=None).refused("distill", REPO, "needs a login", "hf auth login")
    options = ("publish", "--draft", small, "--repo", REPO)
    offline = command("distill", *options, **(hub.environment() | {"HF_HUB_OFFLINE": "1"}))
    assert offline.err.splitlines()[-1].startswith(f"distill: error: {REPO}: publishing needs a connection")
    assert offline.code == 2 and not hub.requests
    publish(command, hub, small, "-q", token="hf_stale").refused("distill", REPO, "login is not valid", "HF_TOKEN")
    publish(command, hub, small, "-q", token="hf_bob").refused(
        "distill", REPO, "no right to write", "--repo of your own"
    )
    hub.add(REPO, {})
    publish(command, hub, small, "-q", token="hf_bob").refused("distill", REPO, "no right to write")
    hub.repositories[REPO].private = True
    publish(command, hub, small, "-q", token="hf_bob").refused("distill", REPO, "no right to write")
    assert len(hub.repositories[REPO].commits) == 1 and not hub.objects


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "fault", "parts"),
    [
        ("repos/create", {"status": 409}, ("name is taken", "another --repo")),
        ("repos/create", {"status": 429, "Retry_After": "77"}, ("429", "try again in 77 s")),
        ("GET /api/models", {"status": 500}, ("the Hub failed (500", "try again later")),
        ("/commit/", {"status": 409}, ("changed meanwhile", "run the same command again")),
        ("/commit/", {"status": 500}, ("the Hub failed (500", "try again later")),
        ("/commit/", {}, ("the connection to", "the same command tries again")),
    ],
)
def test_faults_leave_nothing_half_done_and_the_same_command_ends_it(
    command: Command, hub: Hub, small: Path, pattern: str, fault: dict[str, Any], parts: tuple[str, ...]
) -> None:
    hub.fail(pattern, **fault)
    publish(command, hub, small, "-q").refused("distill", REPO, *parts)
    assert REPO not in hub.repositories or len(hub.repositories[REPO].commits) == 1
    if "commit" in pattern:  # the weights are there already
        assert hub.asked("PUT /upload") == 2
        assert publish(command, hub, small, "-q").code == 0
        assert hub.asked("PUT /upload") == 2
        assert hub.repositories[REPO].files["config.json"] == (small / "config.json").read_bytes()


@pytest.mark.slow
def test_a_cut_upload_and_a_busy_hub_are_tried_again(command: Command, hub: Hub, small: Path) -> None:
    digest = hashlib.sha256((small / "model.safetensors").read_bytes()).hexdigest()
    hub.fail("preupload", status=429, Retry_After="0")
    hub.fail(f"PUT /upload/{digest}", after=100_000)
    done = publish(command, hub, small)
    assert done.code == 0, done.err
    assert hub.asked(f"PUT /upload/{digest}") == hub.asked("preupload") == 2
    assert hub.repositories[REPO].files["model.safetensors"] == (small / "model.safetensors").read_bytes()


def start(hub: Hub, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments("distill", "publish", "--draft", folder, "--repo", REPO),
        env=environment(**hub.environment()),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_change_by_someone_else_meanwhile_is_not_lost(hub: Hub, small: Path) -> None:
    repository = hub.add(REPO, {})
    hold = threading.Event()
    fault = hub.fail("PUT /upload", hold=hold)
    process = start(hub, small)
    assert fault.reached.wait(60)
    repository.commit({"draft.json": b"theirs"})
    hold.set()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err.splitlines()[-1].endswith(f"{REPO}: the repository changed meanwhile: run the same command again")
    assert repository.files == {"draft.json": b"theirs"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_uploading_and_resumed(command: Command, hub: Hub, small: Path, number: int) -> None:
    weights, picture = (
        hashlib.sha256((small / name).read_bytes()).hexdigest() for name in ("model.safetensors", "curves.png")
    )
    hold = threading.Event()
    fault = hub.fail(f"PUT /upload/{weights}", after=100_000, hold=hold)
    process = start(hub, small)
    assert fault.reached.wait(60)
    while picture not in hub.objects:  # the small file passes meanwhile
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait(30)
    hold.set()
    out, err = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130, err
        assert f"interrupted: the same command goes on from what {REPO} has" in err and "Traceback" not in err
    assert out == "" and len(hub.repositories[REPO].commits) == 1
    before = hub.asked(f"PUT /upload/{weights}")
    assert publish(command, hub, small).code == 0
    assert hub.asked(f"PUT /upload/{picture}") == 1
    assert hub.asked(f"PUT /upload/{weights}") <= before + 1
    assert hub.repositories[REPO].files["model.safetensors"] == (small / "model.safetensors").read_bytes()
