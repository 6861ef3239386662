"""Philox4x32-10, the counter-based generator behind every random number of the project.

A pure function from a 128-bit counter and a 64-bit key to 128 random bits, so element ``i`` of a
basis can be drawn anywhere, in any order, without drawing the elements before it.

References
----------
Salmon, Moraes, Dror, Shaw: *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.
"""

from __future__ import annotations

import numpy as np

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10

LOW_32 = np.uint64(0xFFFFFFFF)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return the four output words of Philox4x32-10 for each counter.

    Parameters
    ----------
    counter
        ``(..., 4)`` uint32.
    key
        Two integers below 2³².

    Returns
    -------
    numpy.ndarray
        ``(..., 4)`` uint32.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    key_0, key_1 = key
    for _ in range(ROUNDS):
        product_0 = c0 * np.uint64(MULTIPLIER_0)
        product_1 = c2 * np.uint64(MULTIPLIER_1)
        c0, c1, c2, c3 = (
            (product_1 >> np.uint64(32)) ^ c1 ^ np.uint64(key_0),
            product_1 & LOW_32,
            (product_0 >> np.uint64(32)) ^ c3 ^ np.uint64(key_1),
            product_0 & LOW_32,
        )
        key_0 = (key_0 + WEYL_0) & 0xFFFFFFFF
        key_1 = (key_1 + WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def split_key(seed: int) -> tuple[int, int]:
    """Return the low and the high 32 bits of a 64-bit ``seed`` as Philox's key."""
    return seed & 0xFFFFFFFF, seed >> 32


def derive_seed(seed: int, *path: int) -> int:
    """Return a seed below 2⁶³ that is a pure function of ``seed`` and up to two integers.

    Parameters
    ----------
    seed
        The parent, ``0 <= seed < 2**63``.
    path
        What the child is for, each ``0 <= p < 2**63``: a round; or a round and a node.
    """
    for p in path:
        counter = np.array([p & 0xFFFFFFFF, p >> 32, 0, 0x5EED], dtype=np.uint32)
        low, high = (int(word) for word in philox4x32(counter, split_key(seed))[:2])
        seed = (low | high << 32) & (2**63 - 1)
    return seed
