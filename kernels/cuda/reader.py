"""The greedy proposals of a draft that reads its teacher's states, as one launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from kernels.cuda.fused import CudaFusedStep, Reading
from kernels.ops import AttentionShape, Epilogue, Layer, Weight


@dataclass(frozen=True)
class CudaFusedReader:
    """kernels.ops.FusedReader, by a chain of steps that read."""

    step: CudaFusedStep

    def greedy_tokens(
        self,
        tokens: Sequence[int],
        states: Sequence[mx.array],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """As the protocol says; new keys and values go into the caches in place."""
        expected = [(len(tokens), self.step.constants["EMBEDDED"])] * self.step.constants["READS"]
        if [x.shape for x in states] != expected or any(x.dtype != mx.float32 for x in states):
            raise ValueError(f"states {[(x.shape, x.dtype) for x in states]} are not float32 {expected}")
        return self.step.chain(tokens, states, keys, values, offset, count, d2t)

    def with_head(self, head: Weight) -> CudaFusedReader:
        """As the protocol says; compiled code is shared by heads of one size."""
        return CudaFusedReader(self.step.with_head(head))


def fused_reader(
    *,
    fusion: Weight,
    feature_norms: Sequence[mx.array],
    input: Weight,
    embedding_norm: mx.array,
    state_norm: mx.array,
    layers: Sequence[Layer],
    final_norm: mx.array,
    output: Weight | None,
    head: Weight,
    embedding: mx.array,
    shape: AttentionShape,
    epilogue: Epilogue,
    eps: float,
) -> CudaFusedReader | None:
    """As a backend has it; None where its shapes or weights are not those that the fused step is written for."""
    step = CudaFusedStep.of(
        layers=layers,
        embedding=embedding,
        final_norm=final_norm,
        head=head,
        shape=shape,
        epilogue=epilogue,
        eps=eps,
        reading=Reading(fusion, feature_norms, input, embedding_norm, state_norm, output),
    )
    return None if step is None else CudaFusedReader(step)
