"""Random numbers as a value: a key made of integers and names in, the same bits out, always.

Only the raw 64-bit words of Philox are used. NumPy keeps those stable across versions, which it
does not promise for `Generator.permutation` or `Generator.normal`; and no transcendental function
is involved, so that two machines get the same model and the same order of examples, bit by bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def _philox(*key: int | str) -> np.random.Philox:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """Return the permutation of ``range(n)`` that ``key`` stands for, shape ``(n,)``, int64."""
    return np.argsort(_philox(*key).random_raw(n), kind="stable")


def uniform(n: int, *key: int | str) -> np.ndarray:
    """Return ``n`` float32 values, uniform on (-1, 1), each an exact multiple of 2**-23."""
    odd = 2 * (_philox(*key).random_raw(n) >> np.uint64(41)).astype(np.int64) + 1  # 1 .. 2**24 - 1
    return ((odd - 2**23) * 2.0**-23).astype(np.float32)


class Draws:
    """Small random choices, one after the other, from the stream that ``key`` stands for."""

    def __init__(self, *key: int | str) -> None:
        self._philox = _philox(*key)

    def below(self, n: int) -> int:
        """Return an integer in ``0 .. n - 1`` (the bias of the remainder is below n / 2**64)."""
        return int(self._philox.random_raw()) % n

    def choice(self, items: Sequence[T]) -> T:
        """Return one of ``items``."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """Return ``k`` different positions' items, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(k)]
