"""The count sketch: a vector of any size as a table, from which its large elements can be read.

Row r adds element i, times a random sign, to one random column. Sign and column are a pure function
of ``(seed, r, i)``, so tables of equal seed add up wherever they were made. No vector of the
model's size is ever held.

References
----------
Charikar, Chen, Farach-Colton: *Finding frequent items in data streams*, ICALP 2002.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numba
import numpy as np

from ferret_flwr.projection.kernels.philox import philox4x32, split_key
from ferret_flwr.projection.kernels.tiles import jit, jit_parallel, philox

DRAWS = 256  # counters drawn at once
TILE = 4 * DRAWS  # elements that they are for, one word each
STREAM = 0xC5  # last word of a counter; bases use 0..32
BLOCK = 2**20  # elements estimated at once


@dataclass(frozen=True)
class CountSketch:
    """The random signs and columns of a table, and what can be done with it.

    A table is float32, ``(rows, columns)``; sketching is linear.

    Attributes
    ----------
    rows
        A median of so many estimates is taken.
    columns
        Below 2³¹. An estimate from one row is off by ‖x‖/√columns, as a standard deviation.
    seed
        Below 2⁶³.
    """

    rows: int
    columns: int
    seed: int

    def positions(self, row: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the column and the sign of each index in a row: the definition.

        Each tile of 1024 elements has 256 Philox counters ``(c, row, STREAM)``; the first 256
        elements take their first word, the next their second, and so on. Its lowest bit is the
        sign, 1 meaning −1; the others, as a fraction of 2³¹, are the share of the columns.

        Parameters
        ----------
        row
            Counted from 0.
        indices
            Integers of any type, ``(n,)``.

        Returns
        -------
        columns, signs
            int64 and float32, ``(n,)`` each.
        """
        indices = indices.astype(np.int64)
        counter = indices // TILE * DRAWS + indices % DRAWS
        parts = np.broadcast_arrays(counter & 0xFFFFFFFF, counter >> 32, row, STREAM)
        words = philox4x32(np.stack(parts, axis=-1), split_key(self.seed))
        which = indices // DRAWS % 4
        word = np.take_along_axis(words, which[:, None], axis=1)[:, 0].astype(np.int64)
        return (word >> 1) * self.columns >> 31, (1 - 2 * (word & 1)).astype(np.float32)

    def sketch(self, tensors: Iterable[np.ndarray]) -> np.ndarray:
        """Return the table of one vector that comes as float32 tensors, one after the other.

        Each row is added up by one thread, in order and in float64, so no result depends on the
        number of threads.
        """
        table = np.zeros((self.rows, self.columns))
        start = 0
        for tensor in tensors:
            flat = np.ascontiguousarray(tensor, dtype=np.float32).reshape(-1)
            _add(table, flat, start, *self._key())
            start += flat.size
        return table.astype(np.float32)

    def sketch_sparse(self, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Return the table of the vector that is ``values`` at ``indices`` and 0 elsewhere."""
        table = np.zeros((self.rows, self.columns))
        for row, into in enumerate(table):
            columns, signs = self.positions(row, indices)
            np.add.at(into, columns, signs * values)
        return table.astype(np.float32)

    def estimate(self, table: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return the median over rows of each estimate of elements ``start..stop-1``, unbiased.

        The mean of the two middle ones where rows are even. float32, ``(stop - start,)``.
        """
        estimates = np.empty(stop - start, dtype=np.float32)
        _estimate(estimates, table, start, *self._key())
        return estimates

    def top_k(
        self, table: np.ndarray, k: int, size: int, block: int = BLOCK
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k estimates that are largest in magnitude; of equals, the first ones.

        Parameters
        ----------
        table
            float32, ``(rows, columns)``, finite.
        k
            At most ``size``.
        size
            d, the length of the vector behind the table.
        block
            How many elements are estimated at once.

        Returns
        -------
        indices, values
            int64, increasing, and float32, ``(k,)`` each.
        """
        indices, values = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        least = -1.0  # the smallest magnitude of k candidates, which later ones must exceed
        for start in range(0, size, block):
            estimates = self.estimate(table, start, min(size, start + block))
            found = np.flatnonzero(np.abs(estimates) > least)
            indices = np.concatenate([indices, start + found])
            values = np.concatenate([values, estimates[found]])
            if len(values) > k:
                best = np.sort(np.argsort(-np.abs(values), kind="stable")[:k])
                indices, values = indices[best], values[best]
            if len(values) == k:
                least = float(np.abs(values).min())
        return indices, values

    def _key(self) -> tuple[np.uint32, np.uint32]:
        low, high = split_key(self.seed)
        return np.uint32(low), np.uint32(high)


@jit
def _draw(words, tile, row, key_0, key_1):  # type: ignore[no-untyped-def]
    """Fill ``words[4, DRAWS]`` with the random words of a tile."""
    for t in range(DRAWS):
        counter = np.uint64(tile * DRAWS + t)
        low, high = np.uint32(counter), np.uint32(counter >> np.uint64(32))
        w0, w1, w2, w3 = philox(low, high, np.uint32(row), np.uint32(STREAM), key_0, key_1)
        words[0, t] = w0
        words[1, t] = w1
        words[2, t] = w2
        words[3, t] = w3


@jit
def _split(columns, signs, words, width):  # type: ignore[no-untyped-def]
    """Divide random words into columns and the sign bits of float32.

    ``words`` is left alone: in its place the compiler would make no vector instructions.
    """
    for j in range(TILE):
        word = words[j]
        share = np.uint64(word >> np.uint32(1)) * np.uint64(width)
        columns[j] = np.uint32(share >> np.uint64(31))
        signs[j] = word << np.uint32(31)


@jit
def _flip(into, x, signs):  # type: ignore[no-untyped-def]
    """Write ``x`` with its signs flipped to ``into``, all of them the bits of float32."""
    for j in range(len(x)):
        into[j] = x[j] ^ signs[j]


@jit
def _scatter(row, columns, values):  # type: ignore[no-untyped-def]
    for j in range(len(values)):
        row[columns[j]] += values[j]


@jit
def _gather(into, row, columns):  # type: ignore[no-untyped-def]
    for j in range(len(into)):
        into[j] = row[columns[j]]


@jit
def _order(a, b):  # type: ignore[no-untyped-def]
    """Swap elements so that none of ``a`` is above that of ``b``."""
    for j in range(len(a)):
        x, y = a[j], b[j]
        a[j] = x if x < y else y
        b[j] = y if x < y else x


@jit
def _add_to_row(into, x, start, row, key_0, key_1):  # type: ignore[no-untyped-def]
    words, signs = np.empty((4, DRAWS), np.uint32), np.empty(TILE, np.uint32)
    columns, values = np.empty(TILE, np.uint32), np.empty(TILE, np.float32)
    bits, flipped = x.view(np.uint32), values.view(np.uint32)
    stop = start + len(x)
    for tile in range(start // TILE, (stop + TILE - 1) // TILE):
        _draw(words, tile, row, key_0, key_1)
        _split(columns, signs, words.reshape(-1), len(into))
        low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
        first, last = low - tile * TILE, high - tile * TILE
        _flip(flipped, bits[low - start : high - start], signs[first:last])
        _scatter(into, columns[first:last], values[: last - first])


@jit_parallel
def _add(table, x, start, key_0, key_1):  # type: ignore[no-untyped-def]
    for row in numba.prange(len(table)):
        _add_to_row(table[row], x, start, row, key_0, key_1)


@jit
def _estimate_tile(table, tile, key_0, key_1):  # type: ignore[no-untyped-def]
    rows, width = table.shape
    words, signs = np.empty((4, DRAWS), np.uint32), np.empty(TILE, np.uint32)
    columns, values = np.empty(TILE, np.uint32), np.empty((rows, TILE), np.float32)
    for row in range(rows):
        _draw(words, tile, row, key_0, key_1)
        _split(columns, signs, words.reshape(-1), width)
        _gather(values[row], table[row], columns)
        bits = values[row].view(np.uint32)
        _flip(bits, bits, signs)
    for turn in range(rows):  # odd-even transposition: sorts each element's estimates
        for row in range(turn % 2, rows - 1, 2):
            _order(values[row], values[row + 1])
    return np.float32(0.5) * values[(rows - 1) // 2] + np.float32(0.5) * values[rows // 2]


@jit_parallel
def _estimate(out, table, start, key_0, key_1):  # type: ignore[no-untyped-def]
    stop = start + len(out)
    for tile in numba.prange(start // TILE, (stop + TILE - 1) // TILE):
        low, high = max(start, tile * TILE), min(stop, (tile + 1) * TILE)
        median = _estimate_tile(table, tile, key_0, key_1)
        out[low - start : high - start] = median[low - tile * TILE : high - tile * TILE]
