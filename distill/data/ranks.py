"""The processes that work on one dataset: who they are, and how they speak with one another.

`mlx.launch` starts *ranks*, one a machine or GPU. On a GPU rank 0, or a collection that is one's own, starts a *worker*
besides: it computes as a rank does, while rank 0 reads, judges and writes, which would keep the GPU waiting.

Rank 0 listens where MLX's own backend would meet, ring or NCCL, and the others connect to it; each speaks with rank 0
only. MLX's collectives are not used: they hold all ranks to one step, NCCL has no others, and whoever waits in one of
them for a rank that has died hears no signal and may wait for ever. A connection that ends says which rank has.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import mlx.core as mx

from kernels.console import Interrupted, lacks_memory
from kernels.errors import UserError

PATIENCE = 120.0  # seconds for all ranks to come
GOODBYE = 5.0  # seconds for them to go
HEARD = 1.0  # seconds in which a rank's end is heard of, also where processes wait for a core
# A machine that is switched off, or a cable that is pulled, is found out within minutes. Systems know some of these.
NOTICE = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 90_000}
LARGEST = 1 << 31  # bytes of one part of a message; a rank that says more is not one of ours
_SIZES = struct.Struct("<QQ")
WORKER = 0  # its number among the connections: it computes in rank 0's place
KEPT = "what is finished is kept; the same command goes on from there, on any number of ranks"

Message = dict[str, Any]


class Gone(Exception):
    """The other end of a connection has ended."""


class Ended(Exception):
    """Rank 0 says that all is over, and with which exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(frozen=True)
class Launch:
    """What mlx.launch tells a process: its rank, how many there are, and where rank 0 is."""

    rank: int
    size: int
    host: str
    port: int

    @classmethod
    def found(cls) -> Self | None:
        """That of this process; None where it was started alone. UserError where mlx.launch says what cannot be."""
        values = os.environ
        if "MLX_RANK" not in values:
            return None
        try:
            if "MLX_WORLD_SIZE" in values:  # --backend nccl
                size, address = int(values["MLX_WORLD_SIZE"]), f"{values['NCCL_HOST_IP']}:{values['NCCL_PORT']}"
            else:
                size, address = _from_hostfile(values)
            host, _, port = address.rpartition(":")
            launch = cls(int(values["MLX_RANK"]), size, host, int(port))
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, OSError) as error:
            raise UserError(
                f"MLX_RANK={values['MLX_RANK']}: is set as mlx.launch does, without what belongs to its backends ring,"
                f" nccl and jaccl ({type(error).__name__}: {error})"
            ) from None
        if not 0 <= launch.rank < launch.size:
            raise UserError(f"MLX_RANK={launch.rank}: there are {launch.size} ranks, counted from 0")
        return launch if launch.size > 1 else None


def _from_hostfile(values: Mapping[str, str]) -> tuple[int, str]:
    """How many ranks there are, and the address of rank 0, as the backends ring and jaccl are told them."""
    if "MLX_JACCL_COORDINATOR" in values:
        return len(json.loads(Path(values["MLX_IBV_DEVICES"]).read_text())), values["MLX_JACCL_COORDINATOR"]
    text = Path(values["MLX_HOSTFILE"]).read_text()
    hosts = json.loads(text) if text.strip() else [[":0"]]  # of a single process it is empty
    return len(hosts), hosts[0][0]


class Connection:
    """Messages between two processes: a JSON object each, and bytes behind it."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        connected.settimeout(None)
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in NOTICE.items():
                if hasattr(socket, name):
                    connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._reader: threading.Thread | None = None

    def send(self, message: Message, data: bytes = b"") -> None:
        """Raises Gone."""
        text = json.dumps(message).encode()
        try:
            self._socket.sendall(_SIZES.pack(len(text), len(data)) + text)
            self._socket.sendall(data)
        except OSError:
            raise Gone from None

    def receive(self, timeout: float | None = None) -> tuple[Message, bytes]:
        """The next message. Raises Gone, also for what is none, and when nothing comes within `timeout` seconds."""
        try:
            self._socket.settimeout(timeout)
            sizes = _SIZES.unpack(self._read(_SIZES.size))
            if max(sizes) > LARGEST:
                raise Gone
            message, data = json.loads(self._read(sizes[0])), self._read(sizes[1])
        except (OSError, ValueError):
            raise Gone from None
        if not isinstance(message, dict):
            raise Gone
        return message, data

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise Gone
            parts += part
        return bytes(parts)

    def listen(self, inbox: queue.SimpleQueue[tuple[int, Message | None, bytes]], rank: int) -> None:
        """From now on put what comes into a queue: the sender's rank, the message or None at the end, and its bytes.

        So whoever sends never waits for one who sends too.
        """

        def read() -> None:
            try:
                while True:
                    inbox.put((rank, *self.receive()))
            except Gone:
                inbox.put((rank, None, b""))

        self._reader = threading.Thread(target=read, daemon=True)
        self._reader.start()

    def close(self, wait: float = 0) -> None:
        """wait: seconds for the other end to close too. What was sent before then arrives there."""
        with suppress(OSError):  # it is closed there
            self._socket.shutdown(socket.SHUT_WR)
        if self._reader is not None and wait:
            self._reader.join(wait)
        self._socket.close()


def connect(launch: Launch) -> Connection:
    """Rank 0, for another rank. UserError where it is not to be found."""
    deadline, address = time.monotonic() + PATIENCE, (launch.host, launch.port)
    while True:
        try:
            found = socket.create_connection(address, timeout=PATIENCE)
            if found.getsockname() != found.getpeername():  # a port of this machine may connect to itself
                connection = Connection(found)
                connection.send({"rank": launch.rank, "process": os.getpid(), "host": socket.gethostname()})
                return connection
            found.close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {launch.rank} of {launch.size}: cannot reach rank 0 at {launch.host}:{launch.port}"
                    f" ({error.strerror or error})"
                ) from None
        except Gone:
            pass
        time.sleep(0.1)


def serve(launch: Launch, work: Callable[[Connection], object]) -> NoReturn:
    """Be a rank other than 0, and end this process: with rank 0's exit code, and without a word, which it has.

    work: ends by Ended, when rank 0 says so.
    """
    try:
        rank_0 = connect(launch)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    has_ended = f"rank 0 of {launch.size} (at {launch.host}) has ended; {KEPT}"
    serve_over(rank_0, lambda: work(rank_0), has_ended if launch.rank == 1 else None)  # one line is enough


def serve_over(rank_0: Connection, work: Callable[[], object], has_ended: str | None = None) -> NoReturn:
    """As `serve`, with a connection that there is. has_ended: what is said where rank 0 has."""
    code = 0
    try:
        work()
    except BaseException as error:
        ignore_signals()
        with suppress(Gone):
            if isinstance(error, Ended):
                code = error.code
            elif isinstance(error, UserError):
                code = 2
                rank_0.send({"error": str(error)})
            elif lacking := lacks_memory(error):
                code = 2
                rank_0.send({"error": lacking})
            elif isinstance(error, KeyboardInterrupt):
                code = 130
                rank_0.send({"interrupted": True})
            elif isinstance(error, Gone):
                if has_ended:
                    raise UserError(has_ended) from None
                code = 2
            else:
                raise
    rank_0.close()
    with suppress(Exception):  # a process that exits while MLX's threads run is aborted
        mx.synchronize()
    raise SystemExit(code)


@dataclass
class Ranks:
    """The other ranks and the worker, as rank 0 sees them; none where it works alone. To be closed as a context, which
    ends them."""

    connections: dict[int, Connection] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)  # prompts that each answers at a time
    machine: dict[str, str] = field(default_factory=dict)  # rank 0's, as far as it decides bits
    mixed: bool = False  # whether machines of several kinds may work on one dataset
    devices: dict[int, str] = field(default_factory=dict)  # of all ranks, where they may be of several kinds
    _inbox: queue.SimpleQueue[tuple[int, Message | None, bytes]] = field(default_factory=queue.SimpleQueue)
    _ends: dict[int, UserError | Interrupted] = field(default_factory=dict)  # of those that have: how
    _worker: subprocess.Popen[bytes] | None = None

    @property
    def size(self) -> int:
        """How many processes compute."""
        return len(self.connections.keys() | {0})

    @property
    def has_worker(self) -> bool:
        """Whether another process computes in rank 0's place."""
        return self._worker is not None

    def start_worker(self) -> None:
        """Start the worker. It waits to be told what there is to do."""
        here, there = socket.socketpair()
        with there:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", "-m", "distill.data.assistant", str(there.fileno())],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is for rank 0, also while this one starts
            )
        self.connections[WORKER] = Connection(here)
        self.names[WORKER] = f"the process that computes ({self._worker.pid})"
        self.connections[WORKER].listen(self._inbox, WORKER)

    @classmethod
    def gather(cls, launch: Launch | None, machine: dict[str, str], mixed: bool) -> Self:
        """Wait until all have come. UserError names one that has not."""
        ranks = cls(machine=machine, mixed=mixed, devices={0: machine["device"]} if mixed else {})
        if launch is None:
            return ranks
        where = f"{launch.host}:{launch.port}"
        try:
            listener = socket.create_server((launch.host, launch.port), backlog=launch.size)
        except OSError as error:
            raise UserError(
                f"rank 0 cannot wait at {where} for the others ({error.strerror or error}); mlx.launch chooses another"
                " port with --starting-port or --nccl-port"
            ) from None
        deadline = time.monotonic() + PATIENCE
        with listener, ExitStack() as failing:
            failing.push(ranks)
            while missing := sorted(set(range(1, launch.size)) - ranks.connections.keys()):
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                not_here = f"rank {missing[0]} of {launch.size}: has not come to {where}"
                try:
                    ranks._welcome(Connection(listener.accept()[0]), launch.size)
                except TimeoutError:
                    raise UserError(not_here) from None
                except KeyboardInterrupt:  # as mlx.launch does where one has ended
                    raise Interrupted(not_here) from None
            failing.pop_all()
        for rank, connection in ranks.connections.items():
            connection.listen(ranks._inbox, rank)
        return ranks

    def _welcome(self, connection: Connection, size: int) -> None:
        """Take in one that has connected, if it is a rank that is awaited."""
        try:
            hello, _ = connection.receive(timeout=GOODBYE)
            rank = hello["rank"]
            name = f"rank {rank} of {size} (process {hello['process']} on {hello['host']})"
        except (Gone, KeyError):
            rank = None
        if type(rank) is int and 0 < rank < size and rank not in self.connections:
            self.connections[rank], self.names[rank] = connection, name
        else:
            connection.close()

    def admit(self, mine: Mapping[str, Mapping[str, Any]]) -> None:
        """Hear from all what they are (`sharing.introduction`). UserError names one that is not what rank 0 is; where
        machines may be mixed the part `machine` may differ."""
        for _ in self.connections.keys() - {WORKER}:
            rank, message, _ = next(self.received(wait=True))
            theirs = message["introduction"]
            for part, values in mine.items():
                for name in () if self.mixed and part == "machine" else dict.fromkeys([*values, *theirs[part]]):
                    here, there = (json.loads(json.dumps(one.get(name, "none"))) for one in (values, theirs[part]))
                    if here != there:
                        raise UserError(
                            f"{self.names[rank]}: its {part} differs from rank 0's: {name} is {there}, not {here}"
                            + ("; --mixed lets it take part" if part == "machine" else "")
                        )
            self.slots[rank] = message["slots"]
            if self.mixed:
                self.devices[rank] = theirs["machine"]["device"]

    @property
    def device(self) -> str:
        """All kinds of devices, in words; empty where they are of one kind."""
        return " and ".join(sorted(set(self.devices.values())))

    def send(self, rank: int, message: Message, data: bytes = b"") -> None:
        """UserError where it has ended, Interrupted where it was stopped."""
        try:
            self.connections[rank].send(message, data)
        except Gone:
            while True:  # until what it said last, or that it said nothing
                for _ in self.received(wait=True):
                    pass

    def received(self, wait: bool = False) -> Iterator[tuple[int, Message, bytes]]:
        """What others have sent since the last call; wait: for a first message, where there is none yet.

        UserError where one has ended, or says that it cannot go on; Interrupted where it was stopped.
        """
        while wait or not self._inbox.empty():
            rank, message, data = self._inbox.get()
            wait = False
            if message is None:
                self._inbox.put((rank, None, b""))  # for whoever asks again, since nothing comes after it
                raise self._ends.setdefault(
                    rank, UserError(f"{self.names[rank]}: has ended before its work was done; {KEPT}")
                )
            if "error" in message:
                self._ends[rank] = UserError(f"{'' if rank == WORKER else f'{self.names[rank]}: '}{message['error']}")
            if "interrupted" in message:
                self._ends[rank] = Interrupted(f"{self.names[rank]} was; {KEPT}")
            if rank in self._ends:
                raise self._ends[rank]
            yield rank, message, data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self.connections:
            return
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | Interrupted)
        at_fault: UserError | None = None
        if kind is not None:
            ignore_signals()
        others = self.connections.keys() != {WORKER}
        if stopped and others:  # perhaps by mlx.launch, because another rank has ended: say which, once that is heard
            until = time.monotonic() + HEARD
            try:
                while time.monotonic() < until:
                    for _ in self.received():
                        pass
                    time.sleep(0.01)
            except (UserError, Interrupted) as error:
                at_fault = error if isinstance(error, UserError) else None
        code = 0 if kind is None else 130 if stopped and at_fault is None else 2
        for connection in self.connections.values():
            with suppress(Gone):  # which is what is being told, or comes too late to matter
                connection.send({"end": code})
        deadline = time.monotonic() + GOODBYE
        for connection in self.connections.values():
            connection.close(max(0.01, deadline - time.monotonic()))
        if self._worker is not None:
            with suppress(subprocess.TimeoutExpired):  # its memory is free for what follows
                self._worker.wait(max(0.01, deadline - time.monotonic()))
        if at_fault is not None:
            raise at_fault


def ignore_signals() -> None:
    """Let nothing disturb an end that has begun: where one rank ends, mlx.launch interrupts the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
