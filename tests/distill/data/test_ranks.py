"""Several ranks collect one dataset: the bytes of one process, and none that hangs where another is wrong or gone."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_bitnets
from conftest import ROOT, Command, arguments, environment
from launched import ended, free_port, start

from decode.models.checkpoint import find_teacher
from distill.data.inspection import inspect_dataset, table, verify
from distill.data.manifest import DatasetSettings, Manifest
from distill.data.ranks import Connection, Gone, Launch, Ranks, connect
from distill.data.scoring import Scorer
from distill.data.sharing import Part, score
from kernels import UserError
from kernels.console import Interrupted

OPTIONS = ("--tokens", 1500, "--seq-len", 128, "--max-reply", 16, "--reply-batch", 4, "--batch", 2, "--quiet")


@pytest.fixture(scope="module")
def command_line(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """`distill collect` of a small dataset: prompts, and what the teacher says to itself."""
    prompts = tmp_path_factory.mktemp("sources") / "prompts.jsonl"
    asked = [f"Tell me of the number {hashlib.sha256(b'%d' % i).hexdigest()[:12]}." for i in range(60)]
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked))
    return ["collect", "--teacher", small_teacher, "--source", prompts, "--source", "self", *OPTIONS]


@pytest.fixture(scope="module")
def whole(command_line: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(arguments("distill", *command_line, "--out", folder / "d"), env=environment(), check=True)
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_ranks_write_the_bytes_of_one_process(
    command_line: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    others = [[*command_line, "--reply-batch", slots, "--json", "-"] for slots in (1, 9)]
    zero, *rest = ended(start(tmp_path / "three", [*command_line, "--json", out], *others))
    assert zero == (0, "", "") and rest == [(0, "", "")] * 2  # rank 0 alone speaks
    assert files(tmp_path / "three") == whole
    assert json.loads(out.read_text())["tokens"] == 1500


@pytest.mark.slow
def test_under_mlx_launch_a_rank_that_dies_is_named_and_the_same_command_goes_on(
    command_line: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip("mlx.launch is not installed beside this Python")
    command = arguments("distill", *command_line, "--out", tmp_path / "two" / "d")
    (tmp_path / "two").mkdir()

    def launched(before: str) -> str:
        options = ["-n", "2", "--backend", "ring", "-p", str(free_port()), "--"]
        done = subprocess.run(
            [launcher, *options, *command[:2], before + command[2], *command[3:]],
            env=environment(), input="", capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        return done.stderr

    said = launched(
        f"""import os, pathlib, threading, time

def die():
    while not pathlib.Path({str(tmp_path / "two" / "d" / "manifest.json")!r}).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), 9)

if os.environ["MLX_RANK"] == "1":
    threading.Thread(target=die, daemon=True).start()
"""
    )
    assert "distill: error: rank 1 of 2" in said and said.count("distill: ") == 1 and "Traceback" not in said
    assert launched("") == ""
    assert files(tmp_path / "two") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "variables", "name"),
    [
        (["--top-k", 16], {}, "top_k is 16, not 32"),
        (["--teacher", ROOT / "checkpoints" / "bitnet-smol-116m-draft"], {}, "bitnet-smol-116m-draft"),
        ([], {"BITDRAFT_KERNELS": "reference"}, "(reference), not "),
    ],
)
def test_a_rank_that_differs_is_named_before_the_work(
    command_line: list[object], tmp_path: Path, more: list[object], variables: dict[str, str], name: str
) -> None:
    other = [*command_line, *more] if "--teacher" not in more else [command_line[0], *more, *command_line[3:]]
    zero, one = ended(start(tmp_path / "two", command_line, other, **variables))
    assert one == (2, "", "")
    assert zero[:2] == (2, "") and len(zero[2].splitlines()) == 1
    assert zero[2].startswith("distill: error: rank 1 of 2 (process ") and name in zero[2]
    assert ("--mixed" in zero[2]) == bool(variables)
    assert files(tmp_path / "two") == {}


@pytest.mark.slow
def test_mixed_ranks_are_named_in_the_manifest(command_line: list[object], tmp_path: Path) -> None:
    command = [*command_line, "--mixed", "--tokens", 400]
    both = ended(start(tmp_path / "two", command, command, BITDRAFT_KERNELS="reference"))
    assert both == [(0, "", "")] * 2
    for folder in (tmp_path / "two").iterdir():
        assert verify(folder) == []
        devices = [entry.device for entry in Manifest.read(folder).entries.values()]
        assert all(device.endswith(")") for device in devices)
        assert folder.name == "d" or ("(reference)" in devices[0] and " and " in devices[0])


@pytest.mark.slow
def test_what_was_begun_elsewhere_is_not_gone_on_with(command: Command, small_teacher: Path, tmp_path: Path) -> None:
    """Other kernels compute other bits: refused, or with --mixed named in the manifest, as ranks are."""
    (tmp_path / "p.txt").write_text("".join(json.dumps({"prompt": f"Add {n} to {n * n}."}) + "\n" for n in range(9)))
    run: list[object] = ["collect", "--teacher", small_teacher, "--tokens", 300, "--seq-len", 64, "--max-reply", 8]
    run += ["--source", tmp_path / "p.txt", "--quiet", "--out", tmp_path / "d"]
    assert command("distill", *run).code == 0
    (replies,) = tmp_path.glob("replies-*")
    other = {"BITDRAFT_KERNELS": "reference"}
    next((tmp_path / "d").glob("shard-00000.*")).unlink()
    left = files(tmp_path)
    command("distill", *run, **other).refused("distill", str(tmp_path / "d"), "device", "(reference)", "--mixed")
    assert files(tmp_path) == left
    assert command("distill", *run, "--mixed", **other).code == 0
    manifest = Manifest.read(tmp_path / "d")
    assert "(reference)" in manifest.entries[0].device and "(reference)" not in manifest.machine["device"]
    assert manifest.machine["device"] in table(inspect_dataset(tmp_path / "d"))
    # Replies, for other shards of them.
    next(replies.glob("reply-00000.*")).unlink()
    refused = command("distill", *run[:-1], tmp_path / "e", **other)
    refused.refused("distill", str(replies), "device", "(reference)", "--mixed")


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_is_stopped_stops_the_others(command_line: list[object], tmp_path: Path, which: int) -> None:
    processes = start(tmp_path / "two", command_line, command_line)
    deadline = time.monotonic() + 60
    while not (tmp_path / "two" / "d" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[which].send_signal(signal.SIGTERM)
    zero, one = ended(processes)
    assert one == (130, "", "")
    assert zero[:2] == (130, ""), zero[2]
    assert zero[2].strip().startswith("distill: interrupted")
    assert which == 0 or "rank 1 of 2" in zero[2]


@pytest.mark.slow
def test_ten_kills_change_no_byte(tmp_path: Path) -> None:
    teacher = small_bitnets.microsoft(tmp_path / "teacher")
    options = ["--kills", "10", "--tokens", "1500", "--json", tmp_path / "kills.json"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--teacher", teacher, *options],
        env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())["found"]
    assert [(one["ranks"], one["kills"], one["faults"]) for one in found] == [(1, 5, []), (2, 5, [])]


# --- the worker, which rank 0 has on a GPU

AS_ON_A_GPU = """from distill.data.ranks import Ranks
gather = Ranks.gather

def with_worker(*given, **named):
    ranks = gather(*given, **named)
    ranks.start_worker()
    return ranks

Ranks.gather = with_worker
"""


def with_worker(command_line: list[object], folder: Path, **variables: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = arguments("distill", *command_line, "--out", folder / "d")
    return subprocess.Popen(
        [*command[:2], AS_ON_A_GPU + command[2], *command[3:]], env=environment(**variables),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def worker_of(process: subprocess.Popen[str]) -> int:
    """Its process, once there is a dataset to work on."""
    folder = Path(process.args[process.args.index("--out") + 1])  # type: ignore[call-overload, union-attr]
    found: list[int] = []

    def is_there() -> bool:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if b"distill.data.assistant" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
        return bool(found) and (folder / "manifest.json").exists()

    wait_until(is_there)
    return found[0]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_worker_writes_the_bytes_of_one_process(
    command_line: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert ended([with_worker(command_line, tmp_path / "one")]) == [(0, "", "")]
    assert files(tmp_path / "one") == whole
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"]] * 2))
    zero = with_worker(command_line, tmp_path / "two", MLX_RANK="0", MLX_HOSTFILE=str(hosts))
    one = subprocess.Popen(
        arguments("distill", *command_line), env=environment(MLX_RANK="1", MLX_HOSTFILE=str(hosts)),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert ended([zero, one]) == [(0, "", "")] * 2
    assert files(tmp_path / "two") == whole


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="says nothing of a process's children")
def test_a_worker_and_its_rank_end_together(
    command_line: list[object], whole: dict[str, bytes], tmp_path: Path
) -> None:
    process = with_worker(command_line, tmp_path / "d")
    os.kill(worker_of(process), signal.SIGKILL)
    ((code, _, said),) = ended([process])
    assert code == 2 and said.startswith("distill: error: the process that computes (") and said.count("\n") == 1
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = with_worker(command_line, tmp_path / "d")
        worker = worker_of(process)
        if number == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, number)
        else:
            process.kill()
        ((found, _, said),) = ended([process])
        assert found == code and "Traceback" not in said
        wait_until(lambda worker=worker: not Path(f"/proc/{worker}/cmdline").exists())  # type: ignore[misc]
    assert ended([with_worker(command_line, tmp_path / "d")]) == [(0, "", "")]
    assert files(tmp_path / "d") == whole


# --- where they meet


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": '[["10.0.0.1:5000", "10.0.1.1:5001"], ["10.0.0.2:5002"]]'}, (1, 2, 5000)),
        ({"MLX_RANK": "0", "MLX_HOSTFILE": "\n"}, None),
        (
            {"MLX_RANK": "2", "MLX_WORLD_SIZE": "4", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345"},
            (2, 4, 12345),
        ),
        (
            {"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "10.0.0.1:32323", "MLX_IBV_DEVICES": "[[null, 1], [1, null]]"},
            (0, 2, 32323),
        ),
        ({"MLX_RANK": "1"}, "MLX_RANK=1"),
        ({"MLX_RANK": "x", "MLX_HOSTFILE": '[["10.0.0.1:1"], ["10.0.0.2:2"]]'}, "MLX_RANK=x"),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": "{"}, "MLX_RANK=1"),
        ({"MLX_RANK": "1", "MLX_HOSTFILE": '[["10.0.0.1"], ["10.0.0.2"]]'}, "MLX_RANK=1"),
        ({"MLX_RANK": "3", "MLX_HOSTFILE": '[["10.0.0.1:1"], ["10.0.0.2:2"]]'}, "MLX_RANK=3: there are 2"),
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}, "MLX_RANK=1"),
    ],
)
def test_what_mlx_launch_says_of_a_process(
    variables: dict[str, str],
    expected: tuple[int, int, int] | str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MLX_RANK", "MLX_WORLD_SIZE", "MLX_HOSTFILE", "MLX_JACCL_COORDINATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        if name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
            (tmp_path / name).write_text(value)
            value = str(tmp_path / name)
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            Launch.found()
    else:
        found = Launch.found()
        assert (found and (found.rank, found.size, found.port)) == expected
        assert found is None or found.host == "10.0.0.1"


def meet(*others: Callable[[Launch], object]) -> Ranks:
    """Rank 0 of as many as there are, each of which does this."""
    port, size = free_port(), 1 + len(others)
    for rank, other in enumerate(others, 1):
        threading.Thread(target=other, args=(Launch(rank, size, "127.0.0.1", port),), daemon=True).start()
    return Ranks.gather(Launch(0, size, "127.0.0.1", port), {}, mixed=False)


def test_strangers_are_turned_away() -> None:
    def strange(launch: Launch) -> None:
        header = struct.Struct("<QQ").pack
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 16, header(2, 0) + b"[]", header(10, 0) + b'{"rank":7}'):
            while True:
                try:
                    with socket.create_connection((launch.host, launch.port), timeout=10) as stranger:
                        stranger.sendall(text)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        connect(launch).send({"here": True}, b"\x00\xff")

    ranks = meet(strange)
    assert next(ranks.received(wait=True)) == (1, {"here": True}, b"\x00\xff")
    with pytest.raises(UserError, match=r"rank 1 of 2 \(process \d+ on .*\): has ended"):
        next(ranks.received(wait=True))


def test_a_shard_that_comes_last_is_kept(small_teacher: Path) -> None:
    """When rank 0 has scored its own, and nothing is left to give."""
    told = DatasetSettings(
        {"teacher": {"name": "t", "hash": "h"}, "tokenizer_hash": "h", "vocab_size": 49152, "k": 4, "seq_len": 32}
        | {"temperatures": [1.0]}
    )
    counts, scored = {"rows": 1, "tokens": 1, "trained_tokens": 1, "documents": 1}, threading.Event()

    def assist(launch: Launch) -> None:
        connection = connect(launch)
        given, _ = connection.receive()
        scored.wait(60)
        connection.send({"shard": given["shard"], "counts": counts}, b"scored there")
        connection.receive()  # until rank 0 ends it

    row = (np.arange(32, dtype=np.int32), np.ones(32, bool), np.ones(32, np.uint8))
    scorer = Scorer(find_teacher(str(small_teacher)).load(), 4, (1.0,), 1)
    with meet(assist) as ranks:
        done = {}
        for index, coded in score(
            ranks, scorer, told, lambda index: Part(index, index, [row]), range(2), lambda tokens: None
        ):
            done[index] = coded.data
            scored.set()
            while 0 not in done and ranks._inbox.empty():
                time.sleep(0.01)
    assert done.keys() == {0, 1} and done[0] == b"scored there"


@pytest.mark.parametrize(
    ("last", "expected", "said"),
    [
        ({"error": "no room"}, UserError, "rank 1 of 2 .*: no room"),
        ({"interrupted": True}, Interrupted, "rank 1 of 2 "),
    ],
)
def test_what_a_rank_says_last_is_passed_on(last: dict[str, object], expected: type[Exception], said: str) -> None:
    def speak(launch: Launch) -> None:
        connection = connect(launch)
        connection.send(last)
        connection.close()

    ranks = meet(speak)
    for _ in range(3):  # however often it is asked; also where it is found out by sending
        with pytest.raises(expected, match=said):
            while True:
                ranks.send(1, {"jobs": []}, bytes(1 << 20))


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} .*--starting-port"):
            Ranks.gather(Launch(0, 2, "127.0.0.1", port), {}, mixed=False)


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.ranks.PATIENCE", 0.3)
    monkeypatch.setattr("distill.data.ranks.GOODBYE", 0.1)
    monkeypatch.setattr("distill.data.ranks.ignore_signals", lambda: None)
    with pytest.raises(UserError, match=r"rank 2 of 3: has not come to 127\.0\.0\.1:"):
        meet(connect, lambda launch: None)
    with pytest.raises(UserError, match=r"rank 1 of 2: cannot reach rank 0 at 127\.0\.0\.1:"):
        connect(Launch(1, 2, "127.0.0.1", free_port()))


def test_messages_arrive_whole() -> None:
    here, there = pair()
    data = bytes(range(256)) * 20_000
    sender = threading.Thread(target=lambda: [here.send({"number": i}, data[i:]) for i in range(3)])
    sender.start()
    for i in range(3):
        assert there.receive() == ({"number": i}, data[i:])
    sender.join()
    here.close()
    with pytest.raises(Gone):
        there.receive()


def pair() -> tuple[Connection, Connection]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return Connection(here), Connection(server.accept()[0])
