"""Training by several processes that `mlx.launch` starts: each computes the gradients of its part of a step's rows.

Rank 0 reads the data, holds the state and writes everything. With each step it sends the weights, and to each rank its
rows, and adds up what comes back, in the order of ranks: the same sums as of one process with the whole batch, but for
rounding. Others hold nothing between steps, so ranks may differ in speed and kind, and a run goes on with any number of
them. How they speak with one another, and what is heard of one that dies, is `distill.data.ranks`'s.
"""

from __future__ import annotations

import signal
import threading
from dataclasses import asdict
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
from safetensors.numpy import load as unpacked
from safetensors.numpy import save as packed

from decode.keep_awake import keep_awake
from decode.metal import limit_memory
from decode.models.checkpoint import Checkpoint
from distill.data.ranks import Connection, Ended, Gone, Launch, Ranks, serve
from distill.training.assembly import LoadedTeacher, make_step
from distill.training.draft_config import DraftConfig
from distill.training.loader import Batch
from distill.training.settings import TrainSettings
from distill.training.step import Gradients, Step
from distill.training.tensors import Tensors
from kernels.backends import use_fast_blas
from kernels.device import versions

WEIGHTS, ROWS, D2T = "weights:", "rows:", "d2t"
END = "told_to_end"  # in a message: the rank was sent SIGTERM


def introduction(teacher: Checkpoint) -> dict[str, dict[str, Any]]:
    """What ranks must have in common; all else rank 0 tells them."""
    return {"teacher": {"teacher": teacher.weights_hash}, "version": {"bitdraft": versions()["bitdraft"]}}


class Shared:
    """The gradients of a step, from all ranks."""

    def __init__(self, ranks: Ranks, settings: TrainSettings, config: DraftConfig, d2t: np.ndarray | None) -> None:
        self.ranks = ranks
        begin = {"settings": settings.record(), "config": asdict(config)}
        for rank in ranks.connections:
            ranks.send(rank, begin, packed({} if d2t is None else {D2T: d2t}))

    def gradients(self, step: Step, weights: Tensors, batch: Batch) -> Gradients:
        """As `Step.gradients` of the whole batch."""
        size, rows = self.ranks.size, len(batch.tokens)
        borders = [rank * rows // size for rank in range(size + 1)]
        state = {WEIGHTS + name: _contiguous(array) for name, array in weights.items()}
        asked = [rank for rank in self.ranks.connections if borders[rank] < borders[rank + 1]]
        for rank in asked:
            part = batch.part(borders[rank], borders[rank + 1])
            arrays = {ROWS + name: array for name, array in vars(part).items() if array is not None}
            self.ranks.send(rank, {"step": True}, packed(state | arrays))
        parts = {}
        if borders[1]:
            parts[0] = step.gradients(weights, step.draft.arrays(batch.part(0, borders[1])))
            mx.async_eval(parts[0])
        while len(parts) < len(asked) + bool(borders[1]):
            for rank, message, data in self.ranks.received(wait=True):
                parts[rank] = _from_bytes(data)
                if message.get(END):
                    signal.raise_signal(signal.SIGINT)  # as if this one had been told
        return Gradients.total([parts[rank] for rank in sorted(parts)], step.draft.step_weights)


def assist(launch: Launch, teacher: Checkpoint) -> NoReturn:
    """Be a rank other than 0, and end this process with rank 0's exit code."""

    def work(rank_0: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for rank 0, which ends its step and then the others
        told_to_end = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: told_to_end.set())  # may be for this rank alone: rank 0 is told
        rank_0.send({"introduction": introduction(teacher), "slots": 0})
        begin, data = _next(rank_0)
        settings = TrainSettings(**begin["settings"])
        config = DraftConfig.from_record(begin["config"])
        if mx.default_device() == mx.Device(mx.cpu):
            use_fast_blas()
        limit_memory()
        loaded = LoadedTeacher.load(teacher.folder) if config.taps else None
        step = make_step(settings, config, teacher.folder, loaded, unpacked(data).get(D2T))
        with keep_awake():
            while True:
                found = _as_bytes(_computed(step, _next(rank_0)[1]))
                rank_0.send({END: True} if told_to_end.is_set() else {}, found)
                told_to_end.clear()

    serve(launch, work)


def _next(rank_0: Connection) -> tuple[dict[str, Any], bytes]:
    message, data = rank_0.receive()
    if "end" in message:
        raise Ended(message["end"])
    return message, data


def _computed(step: Step, data: bytes) -> Gradients:
    arrays = unpacked(data)
    weights = {name.removeprefix(WEIGHTS): mx.array(a) for name, a in arrays.items() if name.startswith(WEIGHTS)}
    rows = {name.removeprefix(ROWS): array for name, array in arrays.items() if name.startswith(ROWS)}
    batch = Batch(positions=rows.pop("positions", None), **rows)
    return step.gradients(weights, step.draft.arrays(batch))


def _as_bytes(found: Gradients) -> bytes:
    arrays = {WEIGHTS + name: _contiguous(array) for name, array in found.weights.items()}
    return packed(arrays | {"loss": _contiguous(found.loss), "stats": _contiguous(found.stats)})


def _contiguous(array: mx.array) -> np.ndarray:
    """safetensors packs the memory of an array as it is, be it another array's transpose."""
    return np.array(np.array(array), order="C")


def _from_bytes(data: bytes) -> Gradients:
    """Raises Gone for what is none."""
    try:
        arrays = {name: mx.array(array) for name, array in unpacked(data).items()}
        loss, stats = arrays.pop("loss"), arrays.pop("stats")
    except (KeyError, ValueError) as error:
        raise Gone from error
    return Gradients(loss, stats, {name.removeprefix(WEIGHTS): array for name, array in arrays.items()})
