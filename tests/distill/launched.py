"""Processes of `distill` that are started as mlx.launch starts them."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

from conftest import arguments, environment


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def start(folder: Path, *commands: list[object], **variables: str) -> list[subprocess.Popen[str]]:
    """A command for each rank, all with `--out folder/d`. variables: of the last one."""
    folder.mkdir(exist_ok=True)
    hosts = folder.with_suffix(".json")
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"]] * len(commands)))
    return [
        subprocess.Popen(
            arguments("distill", *command, "--out", folder / "d"),
            env=environment(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts), **(variables if rank else {})),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank, command in enumerate(commands)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit codes, and what each said."""
    said = [process.communicate(timeout=100) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]
