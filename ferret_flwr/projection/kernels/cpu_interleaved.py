"""The kernels for interleaved blocks on processors: one read, or one read and write, of the model.

The segments of `kernels.segments` are walked in tiles as in `kernels.cpu`. A tile meets the blocks
in runs, each within one row of the index space, so adding to the blocks and reading from them are
plain loops over memory that stays in the cache for K up to some 10⁵. A run costs a counter of the
generator: with far fewer than `GROUP` blocks that is most of the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from ferret_flwr.projection.families import GROUP
from ferret_flwr.projection.kernels.reference import ROTATION
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.kernels.signs import signed_copy, signed_subtract
from ferret_flwr.projection.kernels.tiles import (
    ELEMENTS,
    SIGNS,
    TILE,
    addresses_of,
    at,
    difference,
    family_code,
    jit,
    jit_parallel,
    kinds_of,
    normal_elements,
    philox,
    sign_words,
    subtract_tile,
    tile_of,
)
from ferret_flwr.projection.plan import RoundPlan

MOST_PARTS = 64  # of the work of a projection, each with K sums of its own
SUMS = 2**23  # of all parts together, 64 MiB; more only if K alone is
ELEMENTS_PER_SUM = 8  # at least, or clearing and adding the sums would be most of the work


@jit
def _run(index, stop, num_blocks, key_0, key_1):  # type: ignore[no-untyped-def]
    """Return the block of element ``index``, and how many from there on lie side by side."""
    row = index // num_blocks
    column = index - row * num_blocks
    word = philox(
        np.uint32(row),
        np.uint32(np.uint64(row) >> np.uint64(32)),
        np.uint32(0),
        np.uint32(ROTATION),
        key_0,
        key_1,
    )[0]
    block = column + np.int64(np.uint64(word) * np.uint64(num_blocks) >> np.uint64(32))
    if block >= num_blocks:
        block -= num_blocks
    return block, min(stop - index, num_blocks - column, num_blocks - block)


@jit_parallel
def _project(before, after, dtype, start, length, num_blocks, sums, bounds, code):  # type: ignore[no-untyped-def]
    family, key_0, key_1, scale = code
    for part in numba.prange(len(bounds) - 1):
        words, flat = np.empty((4, TILE), np.uint32), np.empty(4 * TILE, np.uint32)
        x, y = np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)
        own = sums[part]
        for s in range(bounds[part], bounds[part + 1]):
            stop = start[s] + length[s]
            group = start[s] // GROUP
            while group * GROUP < stop:
                groups, first, count = tile_of(start[s], stop, group)
                offset = group * GROUP + first - start[s]
                delta = difference(
                    x, y, before[s], after[s], dtype[s], offset, groups, first, count
                )
                if family == SIGNS:
                    sign_words(flat, words, group, groups, 0, key_0, key_1)
                    signed_copy(
                        np.int64(y.ctypes.data),
                        delta,
                        np.int64(flat.ctypes.data),
                        np.int64(4 * groups),
                    )
                else:
                    normal_elements(y, group, groups, 0, key_0, key_1, scale)
                    values = numba.carray(at(delta, numba.float32), (groups * GROUP,))
                    for i in range(groups * GROUP):
                        y[i] *= values[i]
                index = group * GROUP + first
                high = index + count
                while index < high:
                    block, run = _run(index, high, num_blocks, key_0, key_1)
                    terms, into = y[index - group * GROUP :], own[block:]
                    for i in range(run):
                        into[i] += np.float64(terms[i])
                    index += run
                group += TILE


@jit_parallel
def _subtract(address, start, length, num_blocks, coefficients, bounds, code):  # type: ignore[no-untyped-def]
    family, key_0, key_1, scale = code
    for thread in numba.prange(len(bounds) - 1):
        words, flat = np.empty((4, TILE), np.uint32), np.empty(4 * TILE, np.uint32)
        c, v = np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)
        for s in range(bounds[thread], bounds[thread + 1]):
            stop = start[s] + length[s]
            group = start[s] // GROUP
            while group * GROUP < stop:
                groups, first, count = tile_of(start[s], stop, group)
                index = group * GROUP + first
                tile, high = address[s] + (index - start[s]) * 4, index + count
                while index < high:
                    block, run = _run(index, high, num_blocks, key_0, key_1)
                    into, published = c[index - group * GROUP :], coefficients[block:]
                    for i in range(run):
                        into[i] = published[i]
                    index += run
                in_place = family == SIGNS and count == groups * GROUP
                if family == SIGNS:
                    sign_words(flat, words, group, groups, 0, key_0, key_1)
                    bits, values = np.int64(flat.ctypes.data), np.int64(c.ctypes.data)
                    if in_place:
                        signed_subtract(tile, values, bits, np.int64(4 * groups))
                    else:
                        signed_copy(values, values, bits, np.int64(4 * groups))
                else:
                    normal_elements(v, group, groups, 0, key_0, key_1, scale)
                    for i in range(first, first + count):
                        c[i] *= v[i]
                if not in_place:
                    subtract_tile(tile, c, first, count)
                group += TILE


def project(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray] | None,
    segments: Segments,
    plan: RoundPlan,
) -> np.ndarray:
    """Return γ of ``before − after``, or of ``before``, as `cpu.project` does: float64, ``(K,)``.

    The sums are added up over a number of parts that K and the number of elements decide, so no bit
    depends on the threads. They take at most 64 MiB, or 8 K bytes where that is more.
    """
    affordable = min(SUMS, int(segments.length.sum()) // ELEMENTS_PER_SUM)
    parts = min(MOST_PARTS, max(1, affordable // plan.num_bases))
    bounds = segments.divide(segments.length, parts)
    sums = np.zeros((parts, plan.num_bases), dtype=np.float64)
    ends = np.zeros_like(segments.start) if after is None else addresses_of(after, segments)
    _project(
        addresses_of(before, segments),
        ends,
        kinds_of(before, segments),
        segments.start,
        segments.length,
        plan.num_bases,
        sums,
        bounds,
        family_code(plan),
    )
    return sums.sum(axis=0)


def subtract(
    arrays: Sequence[np.ndarray], coefficients: np.ndarray, segments: Segments, plan: RoundPlan
) -> None:
    """Subtract Δ̂ from ``arrays`` in place, as `cpu.subtract` does."""
    _subtract(
        addresses_of(arrays, segments),
        segments.start,
        segments.length,
        plan.num_bases,
        coefficients,
        segments.divide(segments.length, numba.get_num_threads()),
        family_code(plan),
    )
