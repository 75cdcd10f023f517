"""Steps of many sequences by one token each, and the choice behind each, as one graph of single kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.cuda.attend import Rows, attend_cached, is_supported, nothing
from kernels.cuda.choices import choose
from kernels.cuda.fused import CudaFusedStep
from kernels.cuda.products import linear
from kernels.ops import AttentionShape, Epilogue, Layer, Weight

Step = Callable[..., tuple[mx.array, mx.array, list[mx.array], list[mx.array]]]


class CudaSteps(CudaFusedStep):
    """The fused step of one model, and its steps of many sequences, which have the bits of single operations.

    Putting such a step together takes Python longer than the GPU takes for a thousand rows, so MLX keeps it compiled,
    for some numbers of rows and each capacity of the caches. The last row is repeated up to such a number: what that
    writes is what the row itself writes.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._steps: dict[tuple[int, tuple[int, ...]], Step] = {}  # by rows, and the shape of a cache
        self._model: dict[str, Any] = {}

    @classmethod
    def of(cls, **model: Any) -> CudaSteps | None:
        made = super().of(**model)
        if made is not None:
            made._model = model
        return made

    def share_weights(self, layers: Sequence[Layer]) -> list[Layer]:
        self._model["layers"] = super().share_weights(layers)
        return self._model["layers"]

    def choose_tokens(
        self,
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        sequences: Sequence[int],
        offsets: Sequence[int],
        temperature: np.ndarray,
        uniform: np.ndarray,
    ) -> mx.array:
        """As `kernels.ops.ChoosesTokens` says; new keys and values go into the caches in place."""
        m, shape = len(sequences), keys[0].shape
        at = np.array([sequences, np.arange(m), np.ones(m, int), offsets], np.int32).T
        if len(set(sequences)) < m or not 0 <= at[:, 0].min() <= at[:, 0].max() < shape[0]:
            raise ValueError(f"sequences {sequences}: each token needs one of another of the caches'")
        if not 0 <= at[:, 3].min() <= at[:, 3].max() < shape[2]:
            raise ValueError(f"caches of {shape} do not fit rows at {offsets}")
        rows = rows_for(m)
        which = np.minimum(np.arange(rows), m - 1)
        if not isinstance(tokens, mx.array):
            tokens = mx.array(list(tokens), mx.uint32)
        at = at[which]
        at[:, 1] = np.arange(rows)
        if (rows, shape) not in self._steps:
            self._steps[rows, shape] = self._compiled(shape[2])
        chosen, CudaFusedStep.after, keys[:], values[:] = self._steps[rows, shape](
            tokens if rows == m else tokens[mx.array(which)],
            mx.array(at),
            mx.array(temperature[which]),
            mx.array(uniform[which]),
            nothing() if CudaFusedStep.after is None else CudaFusedStep.after,
            keys,
            values,
        )
        return chosen[:m]

    def _compiled(self, capacity: int) -> Step:
        model = self._model
        embedding, eps, epilogue, shape = model["embedding"], model["eps"], model["epilogue"], model["shape"]

        def step(
            tokens: mx.array,
            at: mx.array,
            temperature: mx.array,
            uniform: mx.array,
            after: mx.array,
            keys: list[mx.array],
            values: list[mx.array],
        ) -> tuple[mx.array, mx.array, list[mx.array], list[mx.array]]:
            """The tokens, what to wait for, and the caches. at: as `Rows.of_step`."""
            rows, keys, values = Rows.of_step(at, capacity), list(keys), list(values)

            def attend(i: int, qkv: mx.array) -> mx.array:
                nonlocal after
                after, keys[i], values[i] = attend_cached(qkv, keys[i], values[i], rows, shape, after)
                return after

            x = embedding[tokens].astype(mx.float32)
            for i, layer in enumerate(model["layers"]):
                x = layer.run(x, linear, partial(attend, i), epilogue, eps)
            logits = linear(x, model["head"], norm=model["final_norm"], eps=eps)
            return choose(logits, temperature, uniform), after, keys, values

        compiled: Step = mx.compile(step)
        return compiled


def rows_for(m: int) -> int:
    """How many rows a step of m is computed with: m up to eight, then one of four numbers for each power of two."""
    unit = 1 << max(m.bit_length() - 3, 0)
    return -(-m // unit) * unit


def fused_step(
    *,
    layers: Sequence[Layer],
    embedding: mx.array,
    final_norm: mx.array,
    head: Weight,
    shape: AttentionShape,
    epilogue: Epilogue,
    eps: float,
) -> CudaFusedStep | None:
    """As a backend has it. With shapes that attention is not written for, these are no `CudaSteps`."""
    return (CudaSteps if is_supported(shape) else CudaFusedStep).of(
        layers=layers, embedding=embedding, final_norm=final_norm, head=head, shape=shape, epilogue=epilogue, eps=eps
    )
