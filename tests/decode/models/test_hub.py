"""Models fetched by name: the real commands and Hub client against a Hub on loopback, and what they say of faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import TEACHER, Command, arguments, environment
from loopback_hub import Files, Hub

NAME = "maker/teacher"
ASK = ("--prompt", "Hello", "--max-tokens", 3, "--json", "-", "--quiet")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path).running() as running:
        yield running


@pytest.fixture(scope="module")
def files() -> Files:
    """The embedded teacher's, and one that nobody asks for."""
    return {path.name: path.read_bytes() for path in TEACHER.iterdir()} | {"pytorch_model.bin": b"pickle"}


@pytest.mark.slow
def test_a_plan_fetches_the_config_only(command: Command, hub: Hub, files: Files, tmp_path: Path) -> None:
    hub.add(NAME, files)
    done = command("decode", "plan", "--teacher", NAME, "--chip", "M1", "--json", "-", **hub.environment(token=None))
    assert done.code == 0, done.err
    assert json.loads(done.out)["teacher"] == NAME
    (snapshot,) = (tmp_path / "home" / "hub" / "models--maker--teacher" / "snapshots").iterdir()
    assert [path.name for path in snapshot.iterdir()] == ["config.json"]


def plain(command: Command, hub: Hub, name: str = NAME, **variables: str) -> Any:
    return command("decode", "plain", "--teacher", name, *ASK, **(hub.environment(token=None) | variables))


def reason(result: Any) -> str:
    """The last line on standard error, which says what is wrong; the client may have logged above it."""
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err, result.err
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("decode: error: --teacher "), result.err
    return line


@pytest.mark.slow
def test_a_teacher_by_name_and_revision(command: Command, hub: Hub, files: Files, tmp_path: Path) -> None:
    repository = hub.add(NAME, files)
    repository.tags["v1"] = repository.head
    repository.commit({"README.md": b"moved"})
    done = plain(command, hub, f"{NAME}@v1")
    assert done.code == 0 and done.err == "", done.err  # quiet, and so is the Hub's client
    assert json.loads(done.out)["teacher"] == f"{NAME}@v1"
    (snapshot,) = (tmp_path / "home" / "hub" / "models--maker--teacher" / "snapshots").iterdir()
    assert snapshot.name == repository.tags["v1"]
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == {
        name: content for name, content in files.items() if name != "pytorch_model.bin"
    }
    # Offline afterwards; the card is fetched for its licence only, and a download without it serves as well.
    (snapshot / "README.md").unlink()
    count = len(hub.requests)
    offline = plain(command, hub, f"{NAME}@v1", HF_HUB_OFFLINE="1")
    assert offline.code == 0, offline.err
    assert json.loads(offline.out)["outputs"][0]["token_ids"] == json.loads(done.out)["outputs"][0]["token_ids"]
    assert len(hub.requests) == count
    assert "it has no such revision" in reason(plain(command, hub, f"{NAME}@v2"))
    assert "it was never downloaded, and HF_HUB_OFFLINE is set" in reason(plain(command, hub, HF_HUB_OFFLINE="1"))


@pytest.mark.slow
def test_a_cut_download_goes_on_where_it_was_cut(command: Command, hub: Hub, files: Files) -> None:
    hub.add(NAME, files)
    hub.fail("GET /objects/", after=25_000_000)
    done = plain(command, hub)
    assert done.code == 0, done.err
    # The client takes whole chunks of 10 MiB from a connection.
    assert hub.ranges == [f"bytes={2 * 10 * 2**20}-"]


@pytest.mark.slow
def test_half_a_download_is_told_apart_and_completed(command: Command, hub: Hub, files: Files, work: Path) -> None:
    hub.add(NAME, files)
    hold = threading.Event()
    fault = hub.fail("GET /objects/", after=15_000_000, hold=hold)
    process = subprocess.Popen(
        arguments("decode", "plain", "--teacher", NAME, *ASK),
        cwd=work,
        env=environment(**hub.environment(token=None)),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    assert fault.reached.wait(60)
    while hub.asked("GET .*/resolve/.*/tokenizer_config.json") == 0:
        assert process.poll() is None
        os.sched_yield()
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    hold.set()
    said = reason(plain(command, hub, HF_HUB_OFFLINE="1"))
    assert "only a part of it was downloaded, and HF_HUB_OFFLINE is set" in said
    assert plain(command, hub).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "fault", "said"),
    [
        ("GET /api", {"status": 401}, "the login is not valid (401): log in with `hf auth login`"),
        ("GET /api", {"status": 403}, "the login has no right to it (403"),
        ("GET /api", {"status": 429, "Retry_After": "60"}, "(429): try again in 60 s"),
        ("GET /api", {"status": 503}, "the Hub failed (503"),
        ("GET /api", {}, "the connection to http://127.0.0.1"),
        ("HEAD .*model.safetensors", {"status": 403}, "the login has no right to it (403"),
        ("GET /objects/", {"status": 404}, "the Hub refused it (404"),
    ],
)
def test_faults(command: Command, hub: Hub, pattern: str, fault: dict[str, Any], said: str) -> None:
    hub.add(NAME, {"config.json": b"{}", "model.safetensors": b"x"})
    hub.fail(pattern, times=9, **fault)
    line = reason(plain(command, hub))
    assert f"--teacher {NAME}: no such folder, and not to be had from the Hub: " in line and said in line, line


@pytest.mark.slow
def test_who_may_not(command: Command, hub: Hub) -> None:
    hub.add(NAME, {"config.json": b"{}"}).gated = True
    assert f"it is gated: ask for access at {hub.url}/{NAME}" in reason(plain(command, hub))
    for name, token in (("maker/none", ""), ("maker/none", "hf_alice")):
        said = "there is no such repository, or it is private: check the name, or log in with `hf auth login`"
        assert said in reason(plain(command, hub, name, HF_TOKEN=token))
    hub.server.shutdown()
    hub.server.server_close()
    assert "the connection to http://127.0.0.1" in reason(plain(command, hub))


def test_a_hub_teacher_leaves_its_revision_and_licence_in_the_draft(tmp_path: Path) -> None:
    """What distill.training.run writes of a teacher, where the folder is in the Hub client's cache."""
    from decode.models.checkpoint import find_teacher
    from distill.data.manifest import DatasetSettings
    from distill.provenance import made_with, teacher_metadata
    from distill.release.publish import hub_name

    folder = tmp_path / "models--maker--a--b" / "snapshots" / ("0a" * 20)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(TEACHER)
    teacher = {"name": "maker/a--b@main", "hash": find_teacher(None).weights_hash}
    values = {"teacher": teacher, "tokenizer_hash": "x", "vocab_size": 16384}
    facts = teacher_metadata(folder, DatasetSettings(values))
    assert facts == {**teacher, "repo": "maker/a--b", "revision": "0a" * 20, "license": "apache-2.0"}
    assert hub_name(facts) == hub_name({"name": "maker/a--b@main"}) == "maker/a--b"
    other = {"name": "other", "hash": "0" * 64}  # trained with this folder's tokenizer, on another teacher's logits
    assert teacher_metadata(folder, DatasetSettings({**values, "teacher": other})) == other
    about = made_with()
    assert about["versions"]["mlx"] == mx.__version__
    assert about["commit"] is None or len(about["commit"].split(",")[0]) == 40
