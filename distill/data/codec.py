"""The settings of a dataset, and how a block of rows becomes bytes under them.

Token ids are packed to the vocabulary's width, log-probabilities to 12 bits.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]  # what tensors should be: dtype and shape by name

CODE_BITS = 12
CODE_MAX = 2**CODE_BITS - 1
CODE_RANGE = 40.0  # nats; exp(-40) is 4e-18, far below what float32 training can tell from zero
MAX_BITS = 25  # a value and the up to seven bits before it have to fit one 32-bit window
FLOAT_SLACK = 1e-3  # what float32 may do to a sum of probabilities; a wrong log-sum-exp does more
_CHUNK = 2048  # positions worked on at once, so that a chunk of every column stays in the L2 cache

# Nats below certainty for every code: d = 40 (c / 4095)^2. Squaring spends the codes where
# probabilities are large; the error of p = exp(-d) peaks at d = 1/2, with 6.7e-4.
_NATS = CODE_RANGE * (np.arange(CODE_MAX + 1, dtype=np.float64) / CODE_MAX) ** 2
_LOGPROBS = (0.0 - _NATS).astype(np.float32)


@dataclass(frozen=True)
class Settings:
    """All that decides a dataset's content, as plain JSON; two datasets with equal settings are equal.

    Every dataset has `teacher` {name, hash}, `tokenizer_hash` and `vocab_size`; shards of logits also
    have `k`, `temperatures` (1.0 first) and `seq_len`. Whoever collects adds the rest: sources,
    seeds, exclusions, budgets. Raises ValueError where one of these is missing or impossible.
    """

    values: dict[str, Any]

    def __post_init__(self) -> None:
        # A copy as JSON has it: tuples become lists, and later changes by the caller stay outside.
        object.__setattr__(self, "values", json.loads(json.dumps(self.values, allow_nan=False)))
        values = self.values
        teacher = values.get("teacher")
        if not isinstance(teacher, dict) or not all(isinstance(teacher.get(x), str) for x in ("name", "hash")):
            raise ValueError("settings: teacher must have a name and a hash")
        if not isinstance(values.get("tokenizer_hash"), str):
            raise ValueError("settings: tokenizer_hash is missing")
        whole = [name for name in ("vocab_size", "k", "seq_len") if name in values or name == "vocab_size"]
        for name in whole:
            if type(values.get(name)) is not int or not 1 <= values[name] < 2**MAX_BITS:
                raise ValueError(f"settings: {name} is {values.get(name)!r}")
        if "k" in values:
            heat = values.get("temperatures")
            if "seq_len" not in values or self.k > self.vocab_size:
                raise ValueError("settings: k needs a seq_len and a vocabulary of at least k tokens")
            if not isinstance(heat, list) or heat[:1] != [1.0] or not all(_positive(t) for t in heat):
                raise ValueError(f"settings: temperatures are {heat!r}, expected 1.0 and then others above 0")

    @property
    def teacher_name(self) -> str:
        return self.values["teacher"]["name"]

    @property
    def teacher_hash(self) -> str:
        return self.values["teacher"]["hash"]

    @property
    def tokenizer_hash(self) -> str:
        return self.values["tokenizer_hash"]

    @property
    def vocab_size(self) -> int:
        return self.values["vocab_size"]

    @property
    def k(self) -> int:
        return self.values["k"]

    @property
    def temperatures(self) -> tuple[float, ...]:
        return tuple(float(t) for t in self.values["temperatures"])

    @property
    def seq_len(self) -> int:
        return self.values["seq_len"]

    def difference(self, other: "Settings") -> tuple[str, Any, Any] | None:
        """The first setting that differs, as (dotted name, value here, value there); None if none does."""
        here, there = _flat("", self.values), _flat("", other.values)
        for name in [*here, *(name for name in there if name not in here)]:
            if here.get(name, "absent") != there.get(name, "absent"):
                return name, here.get(name, "absent"), there.get(name, "absent")
        return None


def _positive(number: Any) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0


def _flat(name: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b[0]": 1}, with empty containers kept as values."""
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts = [(f"{name}.{key}" if name else key, value[key]) for key in sorted(value)]
    elif isinstance(value, list):
        parts = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    return {key: leaf for part in parts for key, leaf in _flat(*part).items()} if parts else {name: value}


@dataclass(frozen=True)
class Block:
    """Rows of `seq_len` tokens with the teacher's predictions, decoded.

    `top_*[t]` and `lse[t]` belong to the prediction of token t+1. Where `loss_mask[t]` is set, that
    prediction is trained on. Padding stands only at the end of a row; what it holds has no meaning.
    """

    tokens: np.ndarray  # int32 [rows, seq_len]
    loss_mask: np.ndarray  # bool [rows, seq_len]
    document: np.ndarray  # uint8 [rows, seq_len], numbered from 1 in each row; 0 is padding
    top_ids: np.ndarray  # int32 [rows, seq_len, k], by falling logit, then by id
    top_logprobs: np.ndarray  # float32 [rows, seq_len, k] = logit - lse at temperature 1, <= 0
    lse: np.ndarray  # float32 [rows, seq_len, temperatures], over the whole vocabulary

    @property
    def rows(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def top_logits(self) -> np.ndarray:
        """Logits float32 [rows, seq_len, k]; at temperature T, log p = logit / T - lse[..., T's place]."""
        return self.top_logprobs + self.lse[..., :1]


def id_bits(vocab_size: int) -> int:
    """The width of a token id: ceil(log2(vocab_size)), at least 1."""
    return max(1, (vocab_size - 1).bit_length())


def token_type(vocab_size: int) -> np.dtype:
    """The narrowest type for a token id that safetensors has: uint16 or uint32."""
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def packed_bytes(k: int, bits: int) -> int:
    """Bytes for k values of `bits` bits, padded to a whole byte."""
    return (k * bits + 7) // 8


def _windows(packed: np.ndarray, column: int, bits: int) -> tuple[np.ndarray, int]:
    """The 32-bit little-endian word of every row that holds value `column`, and its bit offset there.

    The word is moved left at the end of a row so that it never leaves it: rows need at least 4 bytes.
    """
    width = packed.shape[1]
    start = min(column * bits // 8, width - 4)
    view: np.ndarray = np.ndarray(packed.shape[0], dtype="<u4", buffer=packed.data, offset=start, strides=(width,))
    return view, column * bits - 8 * start


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [n, k] below 2^bits -> uint8 [n, packed_bytes(k, bits)], lowest bit first."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"cannot pack {bits} bits, only 1 to {MAX_BITS}")
    n, k = values.shape
    if values.size and (int(values.min()) < 0 or int(values.max()) >> bits):
        raise ValueError(f"a value does not fit {bits} bits")
    width = packed_bytes(k, bits)
    packed = np.zeros((n, max(width, 4)), np.uint8)  # see _windows
    for start in range(0, n, _CHUNK):
        chunk = packed[start : start + _CHUNK]
        part = values[start : start + _CHUNK].astype(np.uint32)
        for column in range(k):
            words, shift = _windows(chunk, column, bits)
            words |= part[:, column] << np.uint32(shift)
    return packed if width >= 4 else np.ascontiguousarray(packed[:, :width])


def unpack(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    """uint8 [n, packed_bytes(k, bits)] -> int32 [n, k]; the inverse of `pack`."""
    n, width = packed.shape
    if width != packed_bytes(k, bits) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{width} bytes do not hold {k} values of {bits} bits")
    packed = np.ascontiguousarray(packed if width >= 4 else np.pad(packed, ((0, 0), (0, 4 - width))))
    values = np.empty((n, k), np.int32)
    mask = np.uint32(2**bits - 1)
    for start in range(0, n, _CHUNK):
        chunk, part = packed[start : start + _CHUNK], values[start : start + _CHUNK]
        for column in range(k):
            words, shift = _windows(chunk, column, bits)
            part[:, column] = (words >> np.uint32(shift)) & mask
    return values


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities (nats, <= 0) -> 12-bit codes; anything below -40 is stored as -40."""
    nats = np.clip(-logprobs.astype(np.float32, copy=False), 0, CODE_RANGE)
    return np.rint(np.sqrt(nats / np.float32(CODE_RANGE)) * np.float32(CODE_MAX)).astype(np.uint16)


def decode_logprobs(codes: np.ndarray) -> np.ndarray:
    """12-bit codes -> log-probabilities, float32 <= 0."""
    return np.take(_LOGPROBS, codes)


def probability_error() -> float:
    """The largest absolute error of a stored probability, measured over a fine grid of [0, 1]."""
    p = np.concatenate([np.linspace(1e-7, 1, 1_000_001), np.exp(-np.linspace(0, 60, 1_000_001))])
    stored = decode_logprobs(encode_logprobs(np.log(p).astype(np.float32)))
    return float(np.abs(np.exp(stored.astype(np.float64)) - p).max())


def sum_tolerance(k: int) -> float:
    """How far coding may lift the sum of k probabilities.

    To first order the sum gains at most sum p_i sqrt(40 d_i) / 4095 with d_i = -log p_i, which is
    at most sqrt(40 log(k + 1)) / 4095 (Jensen; the tail is one more bucket). A tenth more is for
    the higher orders.
    """
    return 1.1 * float(np.sqrt(CODE_RANGE * np.log(k + 1))) / CODE_MAX


def layout(rows: int, settings: Settings) -> Layout:
    """Name -> (dtype, shape) of the tensors that a shard of `rows` rows holds."""
    seq_len, k, vocab_size = settings.seq_len, settings.k, settings.vocab_size
    return {
        "tokens": (token_type(vocab_size), (rows, seq_len)),
        "loss_mask": (np.dtype(np.uint8), (rows, packed_bytes(seq_len, 1))),
        "document": (np.dtype(np.uint8), (rows, seq_len)),
        "top_ids": (np.dtype(np.uint8), (rows, seq_len, packed_bytes(k, id_bits(vocab_size)))),
        "top_logits": (np.dtype(np.uint8), (rows, seq_len, packed_bytes(k, CODE_BITS))),
        "lse": (np.dtype(np.float32), (rows, seq_len, len(settings.temperatures))),
    }


def encode(block: Block, settings: Settings) -> Tensors:
    """Block -> the tensors of its shard, as `layout` describes them."""
    rows, seq_len, k = block.top_ids.shape
    vocab_size = settings.vocab_size
    ids = pack(block.top_ids.reshape(-1, k), id_bits(vocab_size))
    codes = pack(encode_logprobs(block.top_logprobs).reshape(-1, k), CODE_BITS)
    return {
        "tokens": block.tokens.astype(token_type(vocab_size)),
        "loss_mask": np.packbits(block.loss_mask, axis=1, bitorder="little"),
        "document": np.ascontiguousarray(block.document),
        "top_ids": ids.reshape(rows, seq_len, ids.shape[1]),
        "top_logits": codes.reshape(rows, seq_len, codes.shape[1]),
        "lse": np.ascontiguousarray(block.lse),
    }


def decode_text(tensors: Tensors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens, loss mask and documents of a shard, as a Block has them."""
    seq_len = tensors["tokens"].shape[1]
    mask = np.unpackbits(tensors["loss_mask"].view(np.uint8), axis=1, count=seq_len, bitorder="little")
    return tensors["tokens"].astype(np.int32), mask.view(np.bool_), tensors["document"].view(np.uint8)


def decode(tensors: Tensors, settings: Settings) -> Block:
    """The tensors of a shard -> Block; the inverse of `encode` up to the coding of probabilities."""
    rows, seq_len = tensors["tokens"].shape
    k, vocab_size = settings.k, settings.vocab_size
    positions = rows * seq_len

    def values(name: str, bits: int) -> np.ndarray:
        flat = tensors[name].reshape(positions, packed_bytes(k, bits)).view(np.uint8)
        return unpack(flat, k, bits).reshape(rows, seq_len, k)

    tokens, loss_mask, document = decode_text(tensors)
    return Block(
        tokens=tokens,
        loss_mask=loss_mask,
        document=document,
        top_ids=values("top_ids", id_bits(vocab_size)),
        top_logprobs=decode_logprobs(values("top_logits", CODE_BITS)),
        lse=tensors["lse"].view(np.float32),
    )


def faults(block: Block, settings: Settings, coded: bool) -> list[str]:
    """What is wrong with a block's shapes, dtypes and values, one line each; empty if nothing is.

    `coded`: the block was read from a shard, so that its probabilities have the error of coding.
    """
    rows, seq_len, k, vocab_size = block.rows, settings.seq_len, settings.k, settings.vocab_size
    expected = {
        "tokens": (np.int32, (rows, seq_len)),
        "loss_mask": (np.bool_, (rows, seq_len)),
        "document": (np.uint8, (rows, seq_len)),
        "top_ids": (np.int32, (rows, seq_len, k)),
        "top_logprobs": (np.float32, (rows, seq_len, k)),
        "lse": (np.float32, (rows, seq_len, len(settings.temperatures))),
    }
    found = []
    for name, (dtype, shape) in expected.items():
        array = getattr(block, name)
        if array.dtype != dtype or array.shape != shape:
            wanted = f"{np.dtype(dtype)} {list(shape)}"
            found.append(f"{name} is {array.dtype} {list(array.shape)}, expected {wanted}")
    if found or not rows:
        return found  # values are worth a look only in arrays of the right shape
    real = block.document != 0
    step = np.diff(block.document.astype(np.int16), axis=1)
    ids = np.sort(block.top_ids, axis=2)
    logprobs = block.top_logprobs[real]
    most = 1 + FLOAT_SLACK + (sum_tolerance(k) if coded else 0)
    checks = {
        "tokens has an id outside the vocabulary": block.tokens.min() < 0 or block.tokens.max() >= vocab_size,
        "top_ids has an id outside the vocabulary": ids.min() < 0 or ids.max() >= vocab_size,
        "top_ids names an id twice": (ids[real][:, 1:] == ids[real][:, :-1]).any(),
        "top_logprobs is not a number": np.isnan(block.top_logprobs).any(),
        "top_logprobs does not fall": (logprobs[:, 1:] > logprobs[:, :-1]).any(),
        "probabilities sum to more than 1": (np.exp(logprobs).sum(1) > most).any(),
        "lse is not finite": not np.isfinite(block.lse).all(),
        "document does not start at 1": (block.document[:, 0] > 1).any(),
        "document does not count up by one with padding last": (
            real[:, 1:] & ((step < 0) | (step > 1) | ~real[:, :-1])
        ).any(),
        "loss_mask trains on padding": (block.loss_mask & ~real).any(),
    }
    return [message for message, wrong in checks.items() if wrong]
