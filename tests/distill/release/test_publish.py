"""Publishing by the real command through the real Hub client, to a Hub on loopback that can be made to fail."""

from __future__ import annotations

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
from conftest import TEACHER, Command, arguments, environment
from drafts import ON_HUB, REPO, UPLOADED, evaluated, local_files, make_draft, with_recipe
from loopback_hub import Hub

from decode.models.checkpoint import find_teacher
from distill.recipe import RECIPE_FILE
from distill.release.card import EVALUATION
from distill.release.publish import prepare

pytest_plugins = ("publish_fixtures",)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path).running() as running:
        yield running


def publish(command: Command, hub: Hub, folder: Path, *options: object, token: str | None = "hf_alice") -> Any:
    return command("distill", "publish", "--draft", folder, "--repo", REPO, *options, **hub.environment(token))


def snapshot(home: Path, name: str) -> dict[str, bytes]:
    """What a client has in its cache of a repository."""
    folders = list((home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())
    assert len(folders) == 1
    return {path.name: path.read_bytes() for path in folders[0].iterdir()}


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
