"""Packing of ternary weights as BitNet checkpoints have it."""

import numpy as np
import pytest

from kernels.errors import UserError
from kernels.packing import pack_ternary, unpack_ternary


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
