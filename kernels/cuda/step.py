"""A whole decoding step of 1..8 rows as one launch: see step.cuh for how it works."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Protocol

import mlx.core as mx

from kernels.cuda.launch import float_bits, launch
from kernels.reference import SMALL_ROWS, AttentionShape, DenseWeight, Epilogue, Int8Weight, TernaryWeight, Weight

THREADS = 512
TILE, SPAN = 16, 128  # outputs and inputs, as in products.cuh
CHUNK = 32  # keys, as in attention.cuh
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_STATIC_SHARED = 12 * 1024  # what a block uses beside the part asked for, and a little room


class Layer(Protocol):
    """A transformer layer's fused weights, as `decode.model.Layer` has them."""

    qkv: Weight
    o: Weight
    gate_up: Weight
    down: Weight
    input_norm: mx.array
    attention_sub_norm: mx.array | None
    post_norm: mx.array
    ffn_sub_norm: mx.array | None


@cache
def device_attribute(attribute: int) -> int:
    """An attribute of the GPU that MLX runs on (device 0), as the driver reports it."""
    value = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDeviceGetAttribute(ctypes.byref(value), attribute, 0) != 0:
        raise OSError("the CUDA driver does not answer")
    return value.value


@dataclass
class WholeStep:
    """The step of one model. Make it with `WholeStep.of`, which knows which models it can run."""

    weights: mx.array  # all layers' matrices, uint32
    floats: mx.array  # all layers' norms and scales, then the final norm
    embedding: mx.array
    head: DenseWeight | Int8Weight
    shape: AttentionShape
    constants: dict[str, int]  # of step.cu

    # All launches wait for each other through this. MLX does not know that they write to the caches; and two models'
    # at once, each on a part of the multiprocessors, would wait for the other part for ever.
    after: ClassVar[mx.array | None] = None

    def __post_init__(self) -> None:
        # MLX would gladly reuse a small buffer that the host has written to, whose pages move between both sides:
        # blocks that wait at a barrier would fault for them. A new one lies in the GPU's own memory.
        mx.clear_cache()
        # The barrier's two counters and one for each key/value head; every launch leaves zeros.
        self.state = mx.zeros((2 + self.shape.kv_heads,), mx.uint32)
        # The last tile of an int8 head is whole: its scales are read, though not used, beyond the vocabulary.
        self.head_scale = self.floats
        if isinstance(self.head, Int8Weight):
            self.head_scale = mx.pad(self.head.scale, (0, -self.head.n % TILE))
        mx.eval(self.state, self.head_scale)

    @staticmethod
    def of(
        *,
        layers: Sequence[Layer],
        embedding: mx.array,
        final_norm: mx.array,
        head: Weight,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
    ) -> WholeStep | None:
        """The whole step of a model, or None where its shapes or weights are not those it is written for.

        The layers' matrices are copied into one array; let go of the others where memory counts.
        """
        first = layers[0]
        kind = type(first.qkv)
        hidden, q, ffn = first.qkv.k, shape.heads * shape.head_dim, first.down.k
        matrices = [m for layer in layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        if (
            kind is DenseWeight
            or any(type(m) is not kind for m in matrices)
            or any(size % 16 for size in (hidden, q, ffn, first.qkv.n))
            or shape.head_dim not in (32, 64, 128)
            or isinstance(head, TernaryWeight)
        ):
            return None
        sub_norm = first.attention_sub_norm is not None
        floats: list[mx.array] = []
        for layer in layers:
            none = mx.ones((q,)), mx.ones((ffn,))
            norms = [layer.input_norm, layer.attention_sub_norm, layer.post_norm, layer.ffn_sub_norm]
            floats += [
                layer.input_norm,
                none[0] if norms[1] is None else norms[1],
                layer.post_norm,
                none[1] if norms[3] is None else norms[3],
            ]
            floats += [
                m.scale for m in (layer.qkv, layer.o, layer.gate_up, layer.down) if not isinstance(m, DenseWeight)
            ]
        made = WholeStep(
            weights=mx.concatenate([m.data for m in matrices]),
            floats=mx.concatenate([*(f.astype(mx.float32) for f in floats), final_norm.astype(mx.float32)]),
            embedding=mx.contiguous(embedding),
            head=head,
            shape=shape,
            constants={
                "KIND": int(kind is Int8Weight),
                "LAYERS": len(layers),
                "HIDDEN": hidden,
                "FFN": ffn,
                "HEADS": shape.heads,
                "KV_HEADS": shape.kv_heads,
                "DIM": shape.head_dim,
                "SUB_NORM": sub_norm,
                "RELU2": epilogue == "relu2_mul",
                "VOCAB": head.n,
                "INT8_HEAD": isinstance(head, Int8Weight),
                "EPS": float_bits(eps),
                "SCALE": float_bits(shape.scale),
            },
        )
        mx.eval(made.weights, made.floats, made.embedding)
        limit = device_attribute(_SHARED_MEMORY) - _STATIC_SHARED
        return made if made.shared_memory(SMALL_ROWS) <= limit else None

    def share_weights(self, layers: Sequence[Layer]) -> list[Layer]:
        """The same layers with their matrices' data as views of the one array, so that memory holds them once."""
        at, shared = 0, []
        for layer in layers:
            parts = {}
            for name in ("qkv", "o", "gate_up", "down"):
                weight = getattr(layer, name)
                data = self.weights[at : at + weight.data.size]
                mx.eval(data)
                parts[name] = replace(weight, data=data)
                at += weight.data.size
            shared.append(replace(layer, **parts))  # type: ignore[type-var]
        return shared

    def shared_memory(self, m: int) -> int:
        """Bytes of dynamic shared memory a block needs for m rows: the largest of its stages."""
        c, blocks = self.constants, device_attribute(_MULTIPROCESSORS)

        def product(n: int, k: int, sets: int = 1) -> int:
            tiles = -(-n // sets // TILE // blocks) + 1
            return m * (-(-k // SPAN) * SPAN + 16) + sets * tiles * TILE * m * 4

        q, group = c["HEADS"] * c["DIM"], c["HEADS"] // c["KV_HEADS"]
        lines = m * group
        stages = [
            product(q + 2 * c["KV_HEADS"] * c["DIM"], c["HIDDEN"]),
            product(c["HIDDEN"], q),
            product(2 * c["FFN"], c["HIDDEN"], 2),
            product(c["HIDDEN"], c["FFN"]),
            product(c["VOCAB"], c["HIDDEN"]) if c["INT8_HEAD"] else 4 * m * c["HIDDEN"],
            4 * (lines * c["DIM"] + CHUNK * (2 * c["DIM"] + 4) + lines * CHUNK),
        ]
        # MLX lifts the limit of 48 KB for those who ask for more, and counts the dynamic part only.
        return max(*stages, 48 * 1024)

    def __call__(self, tokens: Sequence[int], keys: list[mx.array], values: list[mx.array], offset: int) -> mx.array:
        """Logits of m new tokens, float32 [m, vocab]; their keys and values go into the caches in place.

        tokens: m <= 8 ids; keys, values: a layer's float32 [kv_heads, capacity, head_dim] each, of
        which nobody else may hold a part, with offset + m <= capacity.
        """
        m, c = len(tokens), self.constants
        capacity, layers = keys[0].shape[1], len(keys)
        caches = {f"k{i}": k for i, k in enumerate(keys)} | {f"v{i}": v for i, v in enumerate(values)}
        prelude = "".join(
            f"const float* const {name}_caches[] = {{{', '.join(f'{name}{i}' for i in range(layers))}}};\n"
            for name in "kv"
        )
        q, group = self.shape.heads * self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        widths = c["HIDDEN"] + q + 2 * self.shape.kv_heads * self.shape.head_dim + q + c["FFN"]
        chunks = -(-capacity // CHUNK)
        scratch = m * widths + self.shape.kv_heads * chunks * m * group * (self.shape.head_dim + 2)
        logits, WholeStep.after = launch(
            "step",
            {
                "request": mx.array([offset, capacity, *tokens], mx.int32),
                "after": mx.zeros((1,)) if WholeStep.after is None else WholeStep.after,
                "state": self.state,
                "weights": self.weights.view(mx.uint8),
                "floats": self.floats,
                "frequency": self.shape.inverse_frequency,
                "embedding": self.embedding,
                "head": self.head.data,
                "head_scale": self.head_scale,
                **caches,
            },
            {"logits": ((m, c["VOCAB"]), mx.float32), "scratch": ((scratch,), mx.float32)},
            (device_attribute(_MULTIPROCESSORS), 1, 1),
            THREADS,
            {**c, "M": m, "HEAD": mx.float32 if isinstance(self.head, Int8Weight) else self.head.data.dtype},
            shared_memory=self.shared_memory(m),
            prelude=prelude,
            alone=True,
        )
        return logits
