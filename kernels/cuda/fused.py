"""A decoding step of 1..8 rows, or a chain of greedy steps, as one launch: see fused_step.cuh for how it works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import mlx.core as mx

from kernels.cuda.launch import Launch, float_bits, prepare
from kernels.cuda.nvrtc import device_attribute
from kernels.ops import (
    CACHED,
    SMALL_ROWS,
    AttentionShape,
    DenseWeight,
    Epilogue,
    Int8Weight,
    Layer,
    TernaryWeight,
    Weight,
)

THREADS = 512
TILE, SPAN = 16, 128  # outputs and inputs, as in products.cuh
CHUNK = 32  # keys, as in attention.cuh
PIECE_BYTES = (512, 2048)  # of ternary and int8 weights, as in products.cuh
SLOTS = ((10, 3), (6, 2), (2, 1))  # pieces of them on their way to each warp: as many as there is shared memory for
FIXED = ("weights", "floats", "frequency", "embedding", "head", "head_scale")  # inputs of every launch
WHOLE = 8192  # values of rows up to which they are exchanged whole, see exchange.cuh
PAIRED = 256  # tiles of a row from which on two share a packet of statistics, as in exchange.cuh
_MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_SHARED_MEMORY = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_STATIC_SHARED = 12 * 1024  # what a block uses beside the part asked for, and a little room


@dataclass(frozen=True)
class Reading:
    """What a reader has around its layers, as `kernels.ops.Backend.fused_reader` names it."""

    fusion: Weight
    feature_norms: Sequence[mx.array]
    input: Weight
    embedding_norm: mx.array
    state_norm: mx.array
    output: Weight | None

    @property
    def matrices(self) -> list[Weight]:
        return [self.fusion, self.input, *([] if self.output is None else [self.output])]


@dataclass
class CudaFusedStep:
    """kernels.ops.FusedStep of one model. Make it with `CudaFusedStep.of`, which knows which models it can run."""

    weights: mx.array  # all layers' matrices, uint32
    floats: mx.array  # all layers' norms and scales, then the final norm
    embedding: mx.array
    head: DenseWeight | Int8Weight
    shape: AttentionShape
    constants: dict[str, int]  # of fused_step.cu

    EXACT: ClassVar[bool] = False  # sums are in another order than those of the single kernels
    TAPS: ClassVar[bool] = True
    # All launches wait for each other through this. MLX does not know that they write to the caches; and two models'
    # at once, each on a part of the multiprocessors, would wait for the other part for ever.
    after: ClassVar[mx.array | None] = None

    def __post_init__(self) -> None:
        self.packets = mx.zeros((0,), mx.uint32)  # for the caches' capacity, made by the first step
        self.exchanges = 0  # that packets were numbered for
        self.slots = SLOTS[0]
        self.launches: dict[tuple[int, int, bool, bool, bool], Launch] = {}  # by the head's size, and as `_prepared`
        self.no_ids = mx.zeros((1,), mx.uint32)
        head_scale = self.head.scale if isinstance(self.head, Int8Weight) else self.floats
        weights = self.weights.view(mx.uint8)
        self.fixed = [weights, self.floats, self.shape.inverse_frequency, self.embedding, self.head.data, head_scale]
        mx.eval(self.fixed, self.no_ids)

    @classmethod
    def of(
        cls,
        *,
        layers: Sequence[Layer],
        embedding: mx.array,
        final_norm: mx.array,
        head: Weight,
        shape: AttentionShape,
        epilogue: Epilogue,
        eps: float,
        reading: Reading | None = None,
    ) -> Self | None:
        """The fused step of a model, or None where its shapes or weights are not those it is written for. With
        `reading`, a reader's: for chains only.

        The layers' matrices are copied into one array; let go of the others where memory counts.
        """
        first = layers[0]
        kind = type(first.qkv)
        hidden, q, ffn, embedded = first.qkv.k, shape.heads * shape.head_dim, first.down.k, embedding.shape[1]
        matrices = [m for layer in layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        matrices += reading.matrices if reading else []
        if (
            kind is DenseWeight
            or any(type(m) is not kind for m in matrices)
            or any(size % 16 for size in (hidden, q, ffn, first.qkv.n, embedded))
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
        floats.append(final_norm)
        if reading:
            scales = [m.scale for m in reading.matrices if not isinstance(m, DenseWeight)]
            floats += [*reading.feature_norms, scales[0], reading.embedding_norm, reading.state_norm, *scales[1:]]
        made = cls(
            weights=mx.concatenate([m.data for m in matrices]),
            floats=mx.concatenate([f.astype(mx.float32) for f in floats]),
            embedding=mx.contiguous(embedding),
            head=head,
            shape=shape,
            constants={
                "KIND": int(kind is Int8Weight),
                "LAYERS": len(layers),
                "HIDDEN": hidden,
                "EMBEDDED": embedded,
                "READS": len(reading.feature_norms) if reading else 0,
                "WIDENS": reading is not None and reading.output is not None,
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
        return made if made._choose_slots() else None

    def _choose_slots(self) -> bool:
        """Take as many as a block's shared memory has room for; False where it has none for the fewest."""
        limit = device_attribute(_SHARED_MEMORY) - _STATIC_SHARED
        for self.slots in SLOTS:
            needed = max(map(self.shared_memory, range(1, SMALL_ROWS + 1)))
            if needed <= limit:
                return True
        return False

    def with_head(self, head: Weight) -> Self:
        """The same model with another head of the same kind; compiled code is shared by heads of one size."""
        if type(head) is not type(self.head) or head.k != self.head.k:
            raise ValueError(f"a {type(head).__name__} of {head.k} inputs instead of {self.head}")
        made = replace(self, head=head, constants=self.constants | {"VOCAB": head.n})
        if not made._choose_slots():
            raise ValueError(f"a head of {head.n} outputs is too large for a block's shared memory")
        made.launches = self.launches
        return made

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
            shared.append(replace(layer, **parts))
        return shared

    def most_tiles(self) -> dict[str, int]:
        """The most tiles that a block has: of the residual stream, of attention or the FFN's middle, of any outputs."""
        c, blocks = self.constants, device_attribute(_MULTIPROCESSORS)
        q, kv = c["HEADS"] * c["DIM"], c["KV_HEADS"] * c["DIM"]

        def of_rows(k: int) -> int:
            group = 2 if k // TILE > PAIRED and k % (2 * TILE) == 0 else 1
            return -(-(k // TILE // group) // blocks) * group

        stream, other = of_rows(c["HIDDEN"]), max(of_rows(q), of_rows(c["FFN"]), of_rows(c["EMBEDDED"]))
        most = max(stream, other, -(-((q + 2 * kv) // TILE) // blocks))
        return {"STREAM_TILES": stream, "OTHER_TILES": other, "MOST_TILES": most}

    def whole(self, m: int) -> bool:
        """Whether m rows are exchanged whole."""
        c = self.constants
        widest = max(c["HIDDEN"], c["HEADS"] * c["DIM"], c["FFN"], c["EMBEDDED"])
        return m * widest <= WHOLE and widest // TILE <= PAIRED

    def shared_memory(self, m: int) -> int:
        """Bytes of dynamic shared memory a block needs for m rows: its own values, and the largest of its stages."""
        c, tiles = self.constants, self.most_tiles()
        hidden, dim, group = c["HIDDEN"], c["DIM"], c["HEADS"] // c["KV_HEADS"]
        own = 4 * TILE * ((tiles["STREAM_TILES"] + tiles["OTHER_TILES"]) * (m + 1) + 4 * tiles["MOST_TILES"])
        kinds = {c["KIND"], int(c["INT8_HEAD"])}  # an int8 head's weights lie where the layers' do
        ring = max(self.slots[kind] * PIECE_BYTES[kind] for kind in kinds)

        def product(tiles: int, k: int) -> int:
            return m * (-(-k // SPAN) * SPAN + 16) + tiles * TILE * m * 4 + self.whole(m) * 4 * m * k

        lines = min(m, 2) * group
        stages = [
            *(product(2 * tiles["MOST_TILES"], k) for k in (hidden, c["HEADS"] * dim, c["FFN"])),
            4 * (lines * (2 * dim + 2 + CHUNK) + m * (group + 2) * dim) + 2 * CHUNK * (2 * dim + 8),
            4 * m * c["EMBEDDED"],  # the states in front of a float head
        ]
        if c["READS"]:  # rows that are put together, states as they are, and what is measured of each part
            widths = c["READS"] * c["EMBEDDED"], c["EMBEDDED"] + hidden
            parts = 8 * m * max(c["READS"], 2)
            stages.append(product(tiles["STREAM_TILES"], max(widths)) + 4 * m * hidden + parts)
        if c["INT8_HEAD"]:
            of_head = -(-((c["VOCAB"] + TILE - 1) // TILE) // device_attribute(_MULTIPROCESSORS))
            stages.append(product(of_head, c["EMBEDDED"]))
        # MLX lifts the limit of 48 KB for those who ask for more, and counts the dynamic part only.
        return max(own + THREADS // 32 * ring + max(stages), 48 * 1024)

    def _reserve_packets(self, capacity: int) -> None:
        """Room for the packets of up to eight rows and of every chunk of the caches, as ModelShape lays them out."""
        c = self.constants
        heads, kv_heads, dim = c["HEADS"], c["KV_HEADS"], c["DIM"]
        q, qkv = heads * dim, (heads + 2 * kv_heads) * dim
        row, values, part = SMALL_ROWS * _packets(TILE + 2), _packets(TILE * SMALL_ROWS), _packets(TILE + 2)
        widened = c["EMBEDDED"] if c["WIDENS"] else 0
        tiles = row * (c["HIDDEN"] + q + c["FFN"] + widened) + values * (qkv + c["HIDDEN"] + widened)
        tiles += part * SMALL_ROWS * q * -(-capacity // CHUNK)
        words = 4 * (tiles // TILE + device_attribute(_MULTIPROCESSORS))
        if self.packets.size < words:
            self.packets = mx.zeros((words,), mx.uint32)
            mx.eval(self.packets)

    def __call__(
        self,
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        taps: Sequence[int] = (),
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """As the protocol says; new keys and values go into the caches in place."""
        m, hidden = len(tokens), self.constants["HIDDEN"]
        shapes = [(m, self.constants["VOCAB"]), *([(len(taps), m, hidden)] if taps else [])]
        launch = self._prepared(m, taps=bool(taps))
        logits, *states = self._run(launch, shapes, tokens, keys, values, offset, taps=taps)
        return logits, {tap: states[0][i] for i, tap in enumerate(taps)}

    def greedy_tokens(
        self,
        tokens: Sequence[int],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """As the protocol says, by a chain of steps in one launch."""
        return self.chain(tokens, (), keys, values, offset, count, d2t)

    def chain(
        self,
        tokens: Sequence[int],
        read: Sequence[mx.array],
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int,
        d2t: mx.array | None,
    ) -> mx.array:
        """As `kernels.ops.FusedReader.greedy_tokens`; read: the teacher's states, of a reader only.

        The first step takes all tokens, in a kernel for 1, 2, 4 or 8 rows.
        """
        if not 1 <= len(tokens) <= SMALL_ROWS or count < 1:
            raise ValueError(f"{len(tokens)} tokens and {count} choices: 1 to {SMALL_ROWS}, and at least one")
        launch = self._prepared(1 << (len(tokens) - 1).bit_length(), chain=True, d2t=d2t is not None)
        return self._run(launch, [(count,)], tokens, keys, values, offset, count, d2t, read=read)[0]

    def _run(
        self,
        launch: Launch,
        shapes: list[tuple[int, ...]],
        tokens: Sequence[int] | mx.array,
        keys: list[mx.array],
        values: list[mx.array],
        offset: int,
        count: int = 1,
        d2t: mx.array | None = None,
        taps: Sequence[int] = (),
        read: Sequence[mx.array] = (),
    ) -> list[mx.array]:
        """The launch's outputs, of these shapes."""
        given, (sequences, _, capacity, _) = len(tokens), keys[0].shape
        if any(cache.dtype != CACHED for cache in (*keys, *values)):
            raise ValueError(f"caches must be of {CACHED}")
        if sequences != 1 or not 0 <= offset <= capacity - given - count + 1:
            raise ValueError(f"caches of {keys[0].shape} do not fit {given} tokens at {offset} and {count} choices")
        self._reserve_packets(capacity)
        number = 1 + self.exchanges % (1 << 30)
        self.exchanges += count * (2 * len(keys) + 1)
        places = [taps.index(i) if i in taps else -1 for i in range(len(keys))] if taps else []
        inputs = [
            tokens.astype(mx.uint32) if isinstance(tokens, mx.array) else mx.array(list(tokens), mx.uint32),
            mx.array([offset, capacity, number, given, count, *places], mx.int32),
            self.no_ids if CudaFusedStep.after is None else CudaFusedStep.after,
            self.no_ids if d2t is None else d2t,
            self.packets,
            *self.fixed,
            *keys,
            *values,
            *read,
        ]
        outputs = launch(inputs, shapes)
        CudaFusedStep.after = outputs[0]
        return outputs

    def _prepared(self, m: int, chain: bool = False, d2t: bool = False, taps: bool = False) -> Launch:
        """The launch of a step of m rows, or of a chain whose first step has up to m."""
        key = self.head.n, m, chain, d2t, taps
        if key not in self.launches:
            self.launches[key] = self._prepare(m, chain, d2t, taps)
        return self.launches[key]

    def _prepare(self, m: int, chain: bool, d2t: bool, taps: bool) -> Launch:
        caches, read = (
            [[f"{kind}{i}" for i in range(self.constants["LAYERS"])] for kind in "kv"],
            [f"tap{i}" for i in range(self.constants["READS"])],
        )
        prelude = "".join(
            f"const {kind}* const {name}[] = {{{', '.join(pointers) or 'nullptr'}}};\n"
            for kind, name, pointers in (
                ("bfloat16", "k_caches", caches[0]),
                ("bfloat16", "v_caches", caches[1]),
                ("float", "read", read),
            )
        ) + ("" if taps else "float* const states = nullptr;\n")
        return prepare(
            "fused_step",
            (
                *(("tokens", mx.uint32), ("request", mx.int32), ("after", mx.uint32), ("d2t", mx.uint32)),
                ("packets", mx.uint32),
                *zip(FIXED, (array.dtype for array in self.fixed), strict=True),
                *((name, CACHED) for name in (*caches[0], *caches[1])),
                *((name, mx.float32) for name in read),
            ),
            (("out", mx.uint32 if chain else mx.float32), *([("states", mx.float32)] if taps else [])),
            (device_attribute(_MULTIPROCESSORS), 1, 1),
            THREADS,
            {
                **self.constants,
                "M": m,
                "CHAIN": chain,
                "D2T": d2t,
                "TAPS": taps,
                "WHOLE": self.whole(m),
                **self.most_tiles(),
                "SLOTS": self.slots[self.constants["KIND"]],
                "HEAD_SLOTS": self.slots[1],
                "HEAD": mx.float32 if isinstance(self.head, Int8Weight) else self.head.data.dtype,
            },
            shared_memory=self.shared_memory(m),
            prelude=prelude,
            residents=1,
        )


def _packets(words: int) -> int:
    return -(-words // 3)
