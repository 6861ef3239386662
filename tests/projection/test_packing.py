"""Bases per block as bytes: a round trip, of the size that is promised."""

import numpy as np
import pytest

from ferret_flwr.projection.packing import pack_counts, packed_nbytes, unpack_counts
from ferret_flwr.projection.plan import PlanError

COUNTS = {
    "ones": np.ones(4096, dtype=np.int64),
    "edges": np.array([1, 127, 128, 2**14 - 1, 2**14, 2**32, 2**62, 2**63 - 1]),
    "one": np.array([300]),
    "random": np.random.default_rng(0).integers(1, 512, 1000),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_round_trip_of_the_promised_size(kind):
    packed = pack_counts(COUNTS[kind])
    assert packed.dtype == np.uint8
    assert packed.nbytes == packed_nbytes(COUNTS[kind])
    np.testing.assert_array_equal(unpack_counts(packed), COUNTS[kind])


def test_a_small_count_costs_a_byte():
    assert packed_nbytes(np.full(1000, 127)) == 1000
    assert packed_nbytes(np.full(1000, 128)) == 2000


@pytest.mark.parametrize(
    "packed",
    [
        np.array([], dtype=np.uint8),
        np.array([1, 0x81], dtype=np.uint8),
        np.array([0x80] * 9 + [1], dtype=np.uint8),
        np.array([0x81, 0x00, 1], dtype=np.uint8),
        np.array([1, 0, 1], dtype=np.uint8),
        np.array([1, 2], dtype=np.int64),
        np.ones((2, 2), dtype=np.uint8),
    ],
    ids=["empty", "cut off", "ten bytes", "too long", "zero", "dtype", "shape"],
)
def test_bytes_that_no_packing_makes(packed):
    with pytest.raises(PlanError, match="not packed as expected"):
        unpack_counts(packed)
