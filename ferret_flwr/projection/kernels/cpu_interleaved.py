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
from ferret_flwr.projection.kernels.signs import signed_subtract, signed_sums
from ferret_flwr.projection.kernels.tiles import (
    BFLOAT16,
    ELEMENTS,
    FLOAT16,
    FLOAT32,
    SIGNS,
    TILE,
    addresses_of,
    at,
    difference,
    family_code,
    family_codes,
    itemsize,
    jit,
    jit_parallel,
    kinds_of,
    masters,
    normal_elements,
    philox,
    sign_words,
    store,
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


@jit
def _add_run(sums, before, after, dtype, bits, first, count):  # type: ignore[no-untyped-def]
    """Add ±(before − after), or ±before if ``after`` is 0, to ``count`` sums; see `signed_sums`."""
    if dtype == FLOAT32:
        old, new = at(before, numba.float32), at(after, numba.float32)
        if after == 0:
            signed_sums(sums, old, None, bits, first, count)
        else:
            signed_sums(sums, old, new, bits, first, count)
    else:
        old_bits, new_bits = at(before, numba.uint16), at(after, numba.uint16)
        if after == 0:
            signed_sums(sums, old_bits, None, bits, first, count)
        else:
            signed_sums(sums, old_bits, new_bits, bits, first, count)


@jit
def _project_part(before, after, dtype, start, length, num_blocks, sums, begin, end, code):  # type: ignore[no-untyped-def]
    """Add the segments ``begin..end`` to ``sums``."""
    family, key_0, key_1, scale = code
    words, flat = np.empty((4, TILE), np.uint32), np.zeros(4 * TILE + 2, np.uint32)
    x, y = np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)
    bits, own = np.int64(flat.ctypes.data), np.int64(sums.ctypes.data)
    for s in range(begin, end):
        stop = start[s] + length[s]
        group = start[s] // GROUP
        while group * GROUP < stop:
            groups, first, count = tile_of(start[s], stop, group)
            offset, dtype_of_tile = group * GROUP + first - start[s], dtype[s]
            if family == SIGNS and dtype[s] != FLOAT16:
                skipped = offset * itemsize(dtype[s])
                old, new = before[s] + skipped, after[s] + skipped if after[s] != 0 else 0
            else:
                old = difference(x, y, before[s], after[s], dtype[s], offset, groups, first, count)
                old, new, dtype_of_tile = old + 4 * first, 0, FLOAT32
            if family == SIGNS:
                sign_words(flat, words, group, groups, 0, key_0, key_1)
            else:
                normal_elements(y, group, groups, 0, key_0, key_1, scale)
                values, v = numba.carray(at(old, numba.float32), (count,)), y[first:]
                for i in range(count):
                    v[i] *= values[i]
                old = np.int64(v.ctypes.data)
            index = group * GROUP + first
            high = index + count
            size = itemsize(dtype_of_tile)
            while index < high:
                block, run = _run(index, high, num_blocks, key_0, key_1)
                _add_run(own + 8 * block, old, new, dtype_of_tile, bits, first, run)
                old, first, index = old + size * run, first + run, index + run
                if new != 0:
                    new += size * run
            group += TILE


@jit_parallel
def _project(before, after, dtype, start, length, num_blocks, sums, bounds, code):  # type: ignore[no-untyped-def]
    for part in numba.prange(len(bounds) - 1):
        begin, end = bounds[part], bounds[part + 1]
        _project_part(before, after, dtype, start, length, num_blocks, sums[part], begin, end, code)


@jit
def _replay_part(ends, dtypes, start, length, num_blocks, coefficients, begin, end, code):  # type: ignore[no-untyped-def]
    """Replay the segments ``begin..end``."""
    source, target = ends
    source_dtype, target_dtype = dtypes
    family, scale, keys = code
    once = family == SIGNS and len(keys) == 1
    words, flat = np.empty((4, TILE), np.uint32), np.empty(4 * TILE + 2, np.uint32)
    x, v = np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)
    bits = np.int64(flat.ctypes.data)
    for s in range(begin, end):
        stop = start[s] + length[s]
        group = start[s] // GROUP
        while group * GROUP < stop:
            groups, first, count = tile_of(start[s], stop, group)
            offset = group * GROUP + first - start[s]
            old = source[s] + offset * itemsize(source_dtype[s])
            new = target[s] + offset * itemsize(target_dtype[s])
            direct = once and source_dtype[s] == target_dtype[s] == BFLOAT16
            tile = new
            if not direct:
                tile = masters(x, old, source_dtype[s], new, target_dtype[s], groups, first, count)
            w = numba.carray(at(tile, numba.float32), (groups * GROUP,))
            for r in range(len(keys)):
                key_0, key_1 = keys[r]
                if family == SIGNS:
                    sign_words(flat, words, group, groups, 0, key_0, key_1)
                else:
                    normal_elements(v, group, groups, 0, key_0, key_1, scale)
                within = first
                while within < first + count:
                    index = group * GROUP + within
                    high = group * GROUP + first + count
                    block, run = _run(index, high, num_blocks, key_0, key_1)
                    c = coefficients[r, block:]
                    if family == SIGNS:
                        values = np.int64(c.ctypes.data)
                        if direct:
                            away = 2 * (within - first)
                            read = at(old + away, numba.uint16)
                            written = at(new + away, numba.uint16)
                            signed_subtract(written, read, values, bits, within, run)
                        else:
                            part = at(tile + 4 * within, numba.float32)
                            signed_subtract(part, part, values, bits, within, run)
                    else:
                        masters_of_run, elements = w[within:], v[within:]
                        for i in range(run):
                            masters_of_run[i] -= c[i] * elements[i]
                    within += run
            if tile != new:
                store(new, target_dtype[s], x[first:], count)
            group += TILE


@jit_parallel
def _replay(ends, dtypes, start, length, num_blocks, coefficients, bounds, code):  # type: ignore[no-untyped-def]
    for thread in numba.prange(len(bounds) - 1):
        begin, end = bounds[thread], bounds[thread + 1]
        _replay_part(ends, dtypes, start, length, num_blocks, coefficients, begin, end, code)


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
    replay(arrays, [(plan, coefficients)], segments, arrays)


def replay(
    source: Sequence[np.ndarray],
    rounds: Sequence[tuple[RoundPlan, np.ndarray]],
    segments: Segments,
    target: Sequence[np.ndarray],
) -> None:
    """Write float32(``source``) − Δ̂_1 − Δ̂_2 − ... to ``target``, as `cpu.replay` does."""
    plans = [plan for plan, _ in rounds]
    _replay(
        (addresses_of(source, segments), addresses_of(target, segments)),
        (kinds_of(source, segments), kinds_of(target, segments)),
        segments.start,
        segments.length,
        plans[0].num_bases,
        np.stack([c for _, c in rounds]),
        segments.divide(segments.length, numba.get_num_threads()),
        family_codes(plans),
    )
