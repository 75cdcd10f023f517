"""The coding of shards: packed integers and stored probabilities."""

import numpy as np
import pytest

from distill.data import codec

BIG = 128_256


@pytest.mark.parametrize("width", [1, 3, 7, 8, 9, 12, 16, 17, 18, 24, 25])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 32])
def test_packing_is_exact(width: int, k: int) -> None:
    values = np.random.default_rng(width).integers(0, 2**width, (301, k)).astype(np.int32)
    values[0], values[-1] = 0, 2**width - 1
    packed = codec.pack(values, width)
    assert packed.shape == (301, codec.packed_bytes(k, width)) and packed.dtype == np.uint8
    assert np.array_equal(codec.unpack(packed, k, width), values)
    # The definition: bit i of the stream is bit i % 8 of byte i // 8.
    stream = ((values[:, :, None] >> np.arange(width)) & 1).reshape(301, -1).astype(np.uint8)
    assert np.array_equal(packed, np.packbits(stream, axis=1, bitorder="little"))


def test_packing_refuses_what_does_not_fit() -> None:
    for bad in (np.array([[8]]), np.array([[-1]])):
        with pytest.raises(ValueError, match="fit"):
            codec.pack(bad, 3)
    assert codec.unpack(codec.pack(np.zeros((0, 5), np.int32), 17), 5, 17).shape == (0, 5)
    assert [codec.id_bits(v) for v in (1, 2, 3, 256, 257, 65536, BIG)] == [1, 1, 2, 8, 9, 16, 17]


def test_error_of_stored_probabilities() -> None:
    """The figure that docs state: at most 6.7e-4 in any probability, everywhere in [0, 1]."""
    assert 6e-4 < codec.probability_error() < 6.7e-4
    logprobs = -np.linspace(0, 60, 100_001, dtype=np.float32)
    stored = codec.decode_logprobs(codec.encode_logprobs(logprobs))
    assert (np.diff(stored) <= 0).all() and stored.max() == 0 and stored.min() == -40
    assert np.array_equal(codec.encode_logprobs(stored), codec.encode_logprobs(logprobs))
    extremes = np.array([1e-6, 0, -np.inf], np.float32)
    assert codec.encode_logprobs(extremes).tolist() == [0, 0, 4095]
