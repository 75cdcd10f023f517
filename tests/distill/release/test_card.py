"""What of a draft is published, and what its card says, without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import readers
from conftest import SHIPPED, TEACHER, Command, changed_copy
from drafts import DATA, ON_HUB, REPO, evaluated, local_files, make_draft, with_recipe

from distill.recipe import RECIPE_FILE
from distill.release.card import EVALUATION
from distill.release.publish import prepare
from distill.training import checkpoint
from distill.training.draft_config import DraftConfig
from distill.training.drafts import llama
from kernels import UserError

pytest_plugins = ("publish_fixtures",)


def metadata(card: str, tmp_path: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    (tmp_path / "README.md").write_text(card)
    found = metadata_load(tmp_path / "README.md")
    assert isinstance(found, dict)
    return found


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
        "distill train --data runs/data --layers 1 --hidden 64 --lr 0.002 --live-prompts 0",
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
    weights = llama.create(dataclasses.replace(config, draft_vocab_size=None), seed=0)
    folder, kept = tmp_path / "d", np.arange(100, dtype=np.int32)
    checkpoint.save(
        folder, weights, config, TEACHER, {"complete": True, "teacher": {"name": "x", "hash": "0"}}, d2t=kept
    )
    card = prepare(folder, REPO).card
    facts = metadata(card, tmp_path)
    assert facts["library_name"] == "bitdraft" and "license" not in facts
    assert "of which its head proposes 100" in card and "mlx-lm and transformers cannot load it" in card
    assert "from_pretrained" not in card and "mlx_lm.generate" not in card and "Not stated." in card


def test_card_of_a_draft_that_reads_its_teacher(small_teacher: Path, tmp_path: Path) -> None:
    card = prepare(readers.make(tmp_path / "d", small_teacher, 576, ternary=True, kept=500), REPO).card
    assert metadata(card, tmp_path)["library_name"] == "bitdraft"
    for part in ("1 decoder layer", "BitNet's ternary weights", "of which its head proposes 500", "layers 0, 2, 3"):
        assert part in card, part
    assert "mlx-lm and transformers cannot load it: it reads" in card and "from_pretrained" not in card


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


def test_a_report_of_others_is_not_published(inside: Command, tmp_path: Path) -> None:
    """An evaluation.json that another program wrote would stand beside a card that says there was none."""
    folder = make_draft(tmp_path / "d")
    (folder / EVALUATION).write_text("{}")
    done = inside("distill", "publish", "--draft", folder, "--repo", REPO, "--dry-run", "--force")
    done.refused("distill", str(folder / EVALUATION))


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
