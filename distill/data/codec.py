"""How a block of rows becomes the tensors of a shard.

Token ids are packed to the vocabulary's width, log-probabilities to 12 bits.
"""

from dataclasses import dataclass

import numpy as np

from distill.data.manifest import MAX_BITS, DatasetSettings

Tensors = dict[str, np.ndarray]
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]  # what tensors should be: dtype and shape by name

SEGMENTS = "document"  # the name on disk of the tensor of segment ids
CODE_BITS = 12
CODE_MAX = 2**CODE_BITS - 1
CODE_RANGE = 40.0  # nats; exp(-40) is 4e-18, far below what float32 training can tell from zero
FLOAT_SLACK = 1e-3  # what float32 may do to a sum of probabilities; a wrong log-sum-exp does more
_CHUNK = 2048  # positions worked on at once, so that a chunk of every column stays in the L2 cache

# Nats below certainty for every code: d = 40 (c / 4095)^2. Squaring spends the codes where
# probabilities are large; the error of p = exp(-d) peaks at d = 1/2, with 6.7e-4.
_NATS = CODE_RANGE * (np.arange(CODE_MAX + 1, dtype=np.float64) / CODE_MAX) ** 2
_LOGPROBS = (0.0 - _NATS).astype(np.float32)


@dataclass(frozen=True)
class Block:
    """Rows of `seq_len` tokens with the teacher's predictions, decoded.

    `top_*[t]` and `lse[t]` belong to the prediction of token t+1. Where `loss_mask[t]` is set, that
    prediction is trained on. Padding stands only at the end of a row; what it holds has no meaning.
    """

    tokens: np.ndarray  # int32 [rows, seq_len]
    loss_mask: np.ndarray  # bool [rows, seq_len]
    segments: np.ndarray  # uint8 [rows, seq_len], segment ids: from 1 in each row; 0 is padding
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


def layout(rows: int, settings: DatasetSettings) -> Layout:
    """Name -> (dtype, shape) of the tensors that a shard of `rows` rows holds."""
    seq_len, k, vocab_size = settings.seq_len, settings.k, settings.vocab_size
    return {
        "tokens": (token_type(vocab_size), (rows, seq_len)),
        "loss_mask": (np.dtype(np.uint8), (rows, packed_bytes(seq_len, 1))),
        SEGMENTS: (np.dtype(np.uint8), (rows, seq_len)),
        "top_ids": (np.dtype(np.uint8), (rows, seq_len, packed_bytes(k, id_bits(vocab_size)))),
        "top_logits": (np.dtype(np.uint8), (rows, seq_len, packed_bytes(k, CODE_BITS))),
        "lse": (np.dtype(np.float32), (rows, seq_len, len(settings.temperatures))),
    }


def encode(block: Block, settings: DatasetSettings) -> Tensors:
    """Block -> the tensors of its shard, as `layout` describes them."""
    rows, seq_len, k = block.top_ids.shape
    vocab_size = settings.vocab_size
    ids = pack(block.top_ids.reshape(-1, k), id_bits(vocab_size))
    codes = pack(encode_logprobs(block.top_logprobs).reshape(-1, k), CODE_BITS)
    return {
        "tokens": block.tokens.astype(token_type(vocab_size)),
        "loss_mask": np.packbits(block.loss_mask, axis=1, bitorder="little"),
        SEGMENTS: np.ascontiguousarray(block.segments),
        "top_ids": ids.reshape(rows, seq_len, ids.shape[1]),
        "top_logits": codes.reshape(rows, seq_len, codes.shape[1]),
        "lse": np.ascontiguousarray(block.lse),
    }


def decode_text(tensors: Tensors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens, loss mask and segment ids of a shard, as a Block has them."""
    seq_len = tensors["tokens"].shape[1]
    mask = np.unpackbits(tensors["loss_mask"].view(np.uint8), axis=1, count=seq_len, bitorder="little")
    return tensors["tokens"].astype(np.int32), mask.view(np.bool_), tensors[SEGMENTS].view(np.uint8)


def decode(tensors: Tensors, settings: DatasetSettings) -> Block:
    """The tensors of a shard -> Block; the inverse of `encode` up to the coding of probabilities."""
    rows, seq_len = tensors["tokens"].shape
    k, vocab_size = settings.k, settings.vocab_size
    positions = rows * seq_len

    def values(name: str, bits: int) -> np.ndarray:
        flat = tensors[name].reshape(positions, packed_bytes(k, bits)).view(np.uint8)
        return unpack(flat, k, bits).reshape(rows, seq_len, k)

    tokens, loss_mask, segments = decode_text(tensors)
    return Block(
        tokens=tokens,
        loss_mask=loss_mask,
        segments=segments,
        top_ids=values("top_ids", id_bits(vocab_size)),
        top_logprobs=decode_logprobs(values("top_logits", CODE_BITS)),
        lse=tensors["lse"].view(np.float32),
    )


def faults(block: Block, settings: DatasetSettings, coded: bool) -> list[str]:
    """What is wrong with a block's shapes, dtypes and values, one line each; empty if nothing is.

    `coded`: the block was read from a shard, so that its probabilities have the error of coding.
    """
    rows, seq_len, k, vocab_size = block.rows, settings.seq_len, settings.k, settings.vocab_size
    expected = {
        "tokens": (np.int32, (rows, seq_len)),
        "loss_mask": (np.bool_, (rows, seq_len)),
        "segments": (np.uint8, (rows, seq_len)),
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
    real = block.segments != 0
    step = np.diff(block.segments.astype(np.int16), axis=1)
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
        "document does not start at 1": (block.segments[:, 0] > 1).any(),
        "document does not count up by one with padding last": (
            real[:, 1:] & ((step < 0) | (step > 1) | ~real[:, :-1])
        ).any(),
        "loss_mask trains on padding": (block.loss_mask & ~real).any(),
    }
    return [message for message, wrong in checks.items() if wrong]
