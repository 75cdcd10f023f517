"""Packing of ternary weights as BitNet checkpoints have it."""

import numpy as np
import pytest

from kernels.errors import UserError
from kernels.packing import pack_ternary, quantize_ternary, unpack_ternary


@pytest.mark.parametrize(("n", "k"), [(4, 1), (12, 20), (576, 1536)])
def test_round_trip(n: int, k: int) -> None:
    ternary = np.random.default_rng(n).integers(-1, 2, (n, k)).astype(np.int8)
    packed = pack_ternary(ternary)
    assert packed.dtype == np.uint8
    assert packed.shape == (n // 4, k)
    np.testing.assert_array_equal(unpack_ternary(packed), ternary)


def test_bits_of_a_byte_are_rows_a_quarter_apart() -> None:
    ternary = np.zeros((8, 1), np.int8)
    ternary[1], ternary[3], ternary[7] = 1, -1, 1  # rows 1, 3, 5 and 7 share byte 1
    assert pack_ternary(ternary)[1, 0] == 2 | 0 << 2 | 1 << 4 | 2 << 6


@pytest.mark.parametrize("place", range(4))
def test_code_three_is_refused_by_name(place: int) -> None:
    packed = pack_ternary(np.zeros((8, 5), np.int8))
    packed[1, 4] |= 3 << 2 * place
    with pytest.raises(UserError, match=r"layers\.3\.weight"):
        unpack_ternary(packed, "layers.3.weight")


def test_what_is_not_ternary_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        pack_ternary(np.zeros((6, 4), np.int8))
    for wrong in (2, -2):
        with pytest.raises(UserError, match="-1, 0 or 1"):
            pack_ternary(np.full((4, 4), wrong, np.int8))


def test_mean_magnitude_decides_what_becomes_zero() -> None:
    weight = np.array([[3.0, -1.0, 0.9, 0.0], [-1.1, 0.5, -1.5, 0.0]], np.float32)  # the mean magnitude is 1
    ternary, scale = quantize_ternary(weight)
    assert scale == 1 and ternary.dtype == np.int8
    np.testing.assert_array_equal(ternary, [[1, -1, 1, 0], [-1, 0, -1, 0]])  # half is rounded to even
    ternary, scale = quantize_ternary(np.zeros((4, 4), np.float32))
    assert not ternary.any() and scale == pytest.approx(1e-5)
    for wrong in (np.nan, np.inf):
        with pytest.raises(UserError, match="q_proj: holds a value that is not finite"):
            quantize_ternary(np.full((4, 4), wrong, np.float32), "q_proj")
