"""Bases per block as bytes: seven bits a byte, lowest first, the top bit meaning "more follows".

Nearly every K_l is below 128, so a plan costs about one byte per block.
"""

from __future__ import annotations

import numpy as np

from ferret_flwr.projection.plan import PlanError

BITS = 7


def packed_nbytes(counts: np.ndarray) -> int:
    """Return the number of bytes that `pack_counts` makes of ``counts``."""
    return int(sum(np.count_nonzero(counts >> shift) for shift in range(0, 63, BITS)))


def pack_counts(counts: np.ndarray) -> np.ndarray:
    """Pack positive integers into uint8."""
    counts = np.asarray(counts, dtype=np.int64)
    shifts = np.arange(0, 63, BITS)
    digits = (counts[:, None] >> shifts) & 0x7F
    more = (counts[:, None] >> shifts >> BITS) > 0
    used = (counts[:, None] >> shifts) > 0
    return (digits | more << BITS)[used].astype(np.uint8)


def unpack_counts(packed: np.ndarray) -> np.ndarray:
    """Return the integers behind ``packed``: int64.

    Raises
    ------
    PlanError
        If the bytes are not what `pack_counts` makes.
    """
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size == 0 or packed[-1] >= 0x80:
        raise PlanError("bases per block are not packed as expected")
    last = np.flatnonzero(packed < 0x80)
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > 9 or (packed[last] == 0).any():
        raise PlanError("bases per block are not packed as expected")
    place = np.arange(packed.size) - np.repeat(first, lengths)
    digits = (packed.astype(np.int64) & 0x7F) << (BITS * place)
    return np.add.reduceat(digits, first)
