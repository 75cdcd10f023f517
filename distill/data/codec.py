"""How a block of rows becomes the tensors of a shard.

Token ids are packed to the vocabulary's width, log-probabilities to 12 bits. Of draws only the ids that were drawn are
there, one position's after the other's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from distill.data.manifest import MAX_BITS, DatasetSettings

Tensors = dict[str, np.ndarray]
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]  # what tensors should be: dtype and shape by name

SEGMENTS = "document"  # the name on disk of the tensor of segment ids
CODE_BITS = 12
CODE_MAX = 2**CODE_BITS - 1
CODE_RANGE = 40.0  # nats; exp(-40) is 4e-18, far below what float32 training can tell from zero
FLOAT_SLACK = 1e-3  # what float32 may do to a sum of probabilities; a wrong log-sum-exp does more
GROUP = 8  # drawn values that are packed together: whatever their width, they fill whole bytes
_CHUNK = 2048  # positions worked on at once, so that a chunk of every column stays in the L2 cache

# Nats below certainty for every code: d = 40 (c / 4095)^2. Squaring spends the codes where
# probabilities are large; the error of p = exp(-d) peaks at d = 1/2, with 6.7e-4.
_NATS = CODE_RANGE * (np.arange(CODE_MAX + 1, dtype=np.float64) / CODE_MAX) ** 2
_LOGPROBS = (0.0 - _NATS).astype(np.float32)


@dataclass(frozen=True)
class TokenRows:
    """Rows of `seq_len` tokens, decoded.

    Where `loss_mask[t]` is set, the teacher's prediction of token t+1 is trained on. Padding stands only at the end of
    a row; what it holds has no meaning.
    """

    tokens: np.ndarray  # int32 [rows, seq_len]
    loss_mask: np.ndarray  # bool [rows, seq_len]
    segments: np.ndarray  # uint8 [rows, seq_len], segment ids: from 1 in each row; 0 is padding

    @property
    def rows(self) -> int:
        return int(self.tokens.shape[0])


@dataclass(frozen=True)
class Block(TokenRows):
    """Rows with the teacher's top logits. `top_*[t]` and `lse[t]` belong to the prediction of token t+1."""

    top_ids: np.ndarray  # int32 [rows, seq_len, k], by falling logit, then by id
    top_logprobs: np.ndarray  # float32 [rows, seq_len, k] = logit - lse at temperature 1, <= 0
    lse: np.ndarray  # float32 [rows, seq_len, temperatures], over the whole vocabulary

    @property
    def top_logits(self) -> np.ndarray:
        """Logits float32 [rows, seq_len, k]; at temperature T, log p = logit / T - lse[..., T's place]."""
        return self.top_logprobs + self.lse[..., :1]


@dataclass(frozen=True)
class SampledBlock(TokenRows):
    """Rows with ids drawn from the teacher's distribution (distill.data.draws), at the positions that are trained on.

    `ids[t]` belong to the prediction of token t+1: the teacher's first choice, whether it was drawn or not, then the
    others by rising id, then -1.
    """

    ids: np.ndarray  # int32 [rows, seq_len, sampled + 1]; -1 everywhere where `loss_mask` is not set
    counts: np.ndarray  # uint8 [rows, seq_len, sampled + 1], how often each was drawn: `sampled` times in all


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


def layout(rows: int, settings: DatasetSettings, tensors: Tensors) -> Layout:
    """Name -> (dtype, shape) of the tensors that a shard of `rows` rows holds. How long those of draws are is in one of
    the tensors themselves."""
    seq_len, vocab_size = settings.seq_len, settings.vocab_size
    text: Layout = {
        "tokens": (token_type(vocab_size), (rows, seq_len)),
        "loss_mask": (np.dtype(np.uint8), (rows, packed_bytes(seq_len, 1))),
        SEGMENTS: (np.dtype(np.uint8), (rows, seq_len)),
    }
    if settings.sampled is not None:
        drawn = tensors.get("drawn", np.zeros(0))
        groups = -(-int(drawn.sum(dtype=np.int64)) // GROUP) if drawn.dtype == np.uint8 else 0
        return text | {
            "drawn": (np.dtype(np.uint8), (rows, seq_len)),
            "drawn_ids": (np.dtype(np.uint8), (groups, packed_bytes(GROUP, id_bits(vocab_size)))),
            "drawn_counts": (np.dtype(np.uint8), (groups, packed_bytes(GROUP, settings.sampled.bit_length()))),
        }
    k = settings.k
    return text | {
        "top_ids": (np.dtype(np.uint8), (rows, seq_len, packed_bytes(k, id_bits(vocab_size)))),
        "top_logits": (np.dtype(np.uint8), (rows, seq_len, packed_bytes(k, CODE_BITS))),
        "lse": (np.dtype(np.float32), (rows, seq_len, len(settings.temperatures))),
    }


def encode(block: Block | SampledBlock, settings: DatasetSettings) -> Tensors:
    """Block -> the tensors of its shard, as `layout` describes them."""
    vocab_size = settings.vocab_size
    text = {
        "tokens": block.tokens.astype(token_type(vocab_size)),
        "loss_mask": np.packbits(block.loss_mask, axis=1, bitorder="little"),
        SEGMENTS: np.ascontiguousarray(block.segments),
    }
    if isinstance(block, SampledBlock):
        there = block.ids >= 0
        return text | {
            "drawn": there.sum(axis=2, dtype=np.uint8),
            "drawn_ids": _pack_groups(block.ids[there], id_bits(vocab_size)),
            "drawn_counts": _pack_groups(block.counts[there], (block.ids.shape[2] - 1).bit_length()),
        }
    rows, seq_len, k = block.top_ids.shape
    ids = pack(block.top_ids.reshape(-1, k), id_bits(vocab_size))
    codes = pack(encode_logprobs(block.top_logprobs).reshape(-1, k), CODE_BITS)
    return text | {
        "top_ids": ids.reshape(rows, seq_len, ids.shape[1]),
        "top_logits": codes.reshape(rows, seq_len, codes.shape[1]),
        "lse": np.ascontiguousarray(block.lse),
    }


def _pack_groups(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [n] -> uint8 [groups, bits]: GROUP values fill whole bytes, and zeros the last group."""
    return pack(np.pad(values, (0, -len(values) % GROUP)).reshape(-1, GROUP), bits)


def decode_text(tensors: Tensors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens, loss mask and segment ids of a shard, as a Block has them."""
    seq_len = tensors["tokens"].shape[1]
    mask = np.unpackbits(tensors["loss_mask"].view(np.uint8), axis=1, count=seq_len, bitorder="little")
    return tensors["tokens"].astype(np.int32), mask.view(np.bool_), tensors[SEGMENTS].view(np.uint8)


def decode(tensors: Tensors, settings: DatasetSettings) -> Block | SampledBlock:
    """The tensors of a shard -> Block; the inverse of `encode` up to the coding of probabilities. ValueError where more
    ids are drawn at a position than can be."""
    if settings.sampled is not None:
        return _decode_draws(tensors, settings, settings.sampled)
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


def _decode_draws(tensors: Tensors, settings: DatasetSettings, sampled: int) -> SampledBlock:
    drawn = tensors["drawn"].view(np.uint8)
    if (drawn > sampled + 1).any():
        raise ValueError(f"drawn has more than {sampled + 1} ids at a position")
    there = np.arange(sampled + 1) < drawn[..., None]
    count = int(drawn.sum(dtype=np.int64))

    def values(name: str, bits: int) -> np.ndarray:
        return unpack(tensors[name].view(np.uint8), GROUP, bits).ravel()[:count]

    ids, counts = np.full(there.shape, -1, np.int32), np.zeros(there.shape, np.uint8)
    ids[there] = values("drawn_ids", id_bits(settings.vocab_size))
    counts[there] = values("drawn_counts", sampled.bit_length())
    return SampledBlock(*decode_text(tensors), ids, counts)


def faults(block: Block | SampledBlock, settings: DatasetSettings, coded: bool) -> list[str]:
    """What is wrong with a block's shapes, dtypes and values, one line each; empty if nothing is.

    `coded`: the block was read from a shard, so that its probabilities have the error of coding.
    """
    rows, seq_len, vocab_size = block.rows, settings.seq_len, settings.vocab_size
    expected: dict[str, tuple[type, tuple[int, ...]]] = {
        "tokens": (np.int32, (rows, seq_len)),
        "loss_mask": (np.bool_, (rows, seq_len)),
        "segments": (np.uint8, (rows, seq_len)),
    }
    if isinstance(block, SampledBlock):
        assert settings.sampled is not None
        wide = (rows, seq_len, settings.sampled + 1)
        expected |= {"ids": (np.int32, wide), "counts": (np.uint8, wide)}
    else:
        expected |= {
            "top_ids": (np.int32, (rows, seq_len, settings.k)),
            "top_logprobs": (np.float32, (rows, seq_len, settings.k)),
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
    checks: dict[str, Any] = {
        "tokens has an id outside the vocabulary": block.tokens.min() < 0 or block.tokens.max() >= vocab_size,
        **(_wrong_draws(block, settings) if isinstance(block, SampledBlock) else _wrong_logits(block, settings, coded)),
        "document does not start at 1": (block.segments[:, 0] > 1).any(),
        "document does not count up by one with padding last": (
            real[:, 1:] & ((step < 0) | (step > 1) | ~real[:, :-1])
        ).any(),
        "loss_mask trains on padding": (block.loss_mask & ~real).any(),
    }
    return [message for message, wrong in checks.items() if wrong]


def _wrong_logits(block: Block, settings: DatasetSettings, coded: bool) -> dict[str, Any]:
    """What can be wrong with the values of top logits, and whether it is."""
    vocab_size, real = settings.vocab_size, block.segments != 0
    ids = np.sort(block.top_ids, axis=2)
    logprobs = block.top_logprobs[real]
    most = 1 + FLOAT_SLACK + (sum_tolerance(settings.k) if coded else 0)
    return {
        "top_ids has an id outside the vocabulary": ids.min() < 0 or ids.max() >= vocab_size,
        "top_ids names an id twice": (ids[real][:, 1:] == ids[real][:, :-1]).any(),
        "top_logprobs is not a number": np.isnan(block.top_logprobs).any(),
        "top_logprobs does not fall": (logprobs[:, 1:] > logprobs[:, :-1]).any(),
        "probabilities sum to more than 1": (np.exp(logprobs).sum(1) > most).any(),
        "lse is not finite": not np.isfinite(block.lse).all(),
    }


def _wrong_draws(block: SampledBlock, settings: DatasetSettings) -> dict[str, Any]:
    """What can be wrong with the values of draws, and whether it is."""
    there, trained = block.ids >= 0, block.loss_mask
    ids, counts = block.ids[trained], block.counts
    others, behind = ids[:, 1:], there[trained][:, 2:]
    return {
        "ids are not there where they should be": (
            (there[..., 0] != trained) | (there[..., 1:] & ~there[..., :-1]).any(axis=-1)
        ).any(),
        "ids has an id outside the vocabulary": (block.ids < -1).any() or (block.ids >= settings.vocab_size).any(),
        "ids names the first choice twice": (others == ids[:, :1]).any(),
        "ids does not rise": (behind & (others[:, 1:] <= others[:, :-1])).any(),
        "counts has an id that was not drawn": ((counts[..., 1:] > 0) != there[..., 1:]).any(),
        "counts do not sum to the number of draws": (
            counts.sum(axis=-1, dtype=np.int64) != trained * (settings.sampled or 0)
        ).any(),
    }
