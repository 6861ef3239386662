"""The kernels for processors: numba, all cores, no basis is ever held in memory.

The index space is walked in segments, each within one tensor and one block, and each segment in
tiles that fit the first-level cache. Threads get contiguous runs of segments of equal cost; sums
are kept for each segment, so no result depends on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from ferret_flwr.projection.families import GROUP
from ferret_flwr.projection.kernels.reference import MIX_BITS, MIX_INDEX
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.kernels.signs import signed_add, signed_dot
from ferret_flwr.projection.kernels.tiles import (
    BFLOAT16,
    ELEMENTS,
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
    sign_words,
    store,
    tile_of,
)
from ferret_flwr.projection.plan import RoundPlan

COST_OF_MEMORY = 2  # reading an element costs about as much as this many bases

_jit_sum = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})


@_jit_sum
def _dot(x, v, count):  # type: ignore[no-untyped-def]
    """Return Σ v x over at most one tile, in float32."""
    total = np.float32(0)
    for i in range(count):
        total += x[i] * v[i]
    return total


@jit
def _project_part(  # type: ignore[no-untyped-def]
    before, after, dtype, start, length, block, counts, position, sums, begin, end, code
):
    """Set the sums of the segments ``begin..end``."""
    family, key_0, key_1, scale = code
    words, flat = np.empty((4, TILE), np.uint32), np.empty(4 * TILE, np.uint32)
    x, y = np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)
    for s in range(begin, end):
        stop = start[s] + length[s]
        group = start[s] // GROUP
        while group * GROUP < stop:
            groups, first, count = tile_of(start[s], stop, group)
            offset = group * GROUP + first - start[s]
            delta = difference(x, y, before[s], after[s], dtype[s], offset, groups, first, count)
            for k in range(counts[block[s]]):
                if family == SIGNS:
                    sign_words(flat, words, group, groups, k, key_0, key_1)
                    term = signed_dot(delta, np.int64(flat.ctypes.data), np.int64(4 * groups))
                else:
                    normal_elements(y, group, groups, k, key_0, key_1, scale)
                    values = numba.carray(at(delta, numba.float32), (groups * GROUP,))
                    term = _dot(values, y, groups * GROUP)
                sums[position[s] + k] += np.float64(term)
            group += TILE


@jit_parallel
def _project(before, after, dtype, start, length, block, counts, position, sums, bounds, code):  # type: ignore
    for thread in numba.prange(len(bounds) - 1):
        begin, end = bounds[thread], bounds[thread + 1]
        _project_part(
            before, after, dtype, start, length, block, counts, position, sums, begin, end, code
        )


@jit
def _add_up(sums, position, block, counts, offsets, coefficients):  # type: ignore[no-untyped-def]
    """Add the sums of each block's segments, in order."""
    for s in range(len(block)):
        for k in range(counts[block[s]]):
            coefficients[offsets[block[s]] + k] += sums[position[s] + k]


@jit
def _replay_part(  # type: ignore[no-untyped-def]
    ends, dtypes, start, length, block, counts, offsets, coefficients, begin, end, code
):
    """Replay the segments ``begin..end``."""
    source, target = ends
    source_dtype, target_dtype = dtypes
    family, scale, keys = code
    words, flat = np.empty((4, TILE), np.uint32), np.empty(4 * TILE + 2, np.uint32)
    x, update = np.empty(ELEMENTS, np.float32), np.empty(ELEMENTS, np.float32)
    v, bits = np.empty(ELEMENTS, np.float32), np.int64(flat.ctypes.data)
    sum_of_bases = at(np.int64(update.ctypes.data), numba.float32)
    for s in range(begin, end):
        stop, b = start[s] + length[s], block[s]
        group = start[s] // GROUP
        once = family == SIGNS and len(keys) == 1 and counts[0, b] == 1
        direct = once and source_dtype[s] == target_dtype[s] == BFLOAT16
        while group * GROUP < stop:
            groups, first, count = tile_of(start[s], stop, group)
            offset, size = group * GROUP + first - start[s], groups * GROUP
            old = source[s] + offset * itemsize(source_dtype[s])
            new = target[s] + offset * itemsize(target_dtype[s])
            if direct:
                c = coefficients[offsets[0, b]]
                sign_words(flat, words, group, groups, 0, keys[0, 0], keys[0, 1])
                written, read = at(new, numba.uint16), at(old, numba.uint16)
                signed_add(written, read, -c, bits, first, count)
                group += TILE
                continue
            tile = masters(x, old, source_dtype[s], new, target_dtype[s], groups, first, count)
            floats = at(tile, numba.float32)
            w = numba.carray(floats, (size,))
            for r in range(len(keys)):
                key_0, key_1 = keys[r]
                for k in range(counts[r, b]):
                    c = coefficients[offsets[r, b] + k]
                    if family == SIGNS:
                        sign_words(flat, words, group, groups, k, key_0, key_1)
                        if counts[r, b] == 1:
                            signed_add(floats, floats, -c, bits, 0, size)
                        elif k == 0:
                            signed_add(sum_of_bases, None, c, bits, 0, size)
                        else:
                            signed_add(sum_of_bases, sum_of_bases, c, bits, 0, size)
                    else:
                        normal_elements(v, group, groups, k, key_0, key_1, scale)
                        if k == 0:
                            for i in range(size):
                                update[i] = c * v[i]
                        else:
                            for i in range(size):
                                update[i] += c * v[i]
                if family != SIGNS or counts[r, b] > 1:
                    for i in range(size):
                        w[i] -= update[i]
            if tile != new:
                store(new, target_dtype[s], x[first:], count)
            group += TILE


@jit_parallel
def _replay(ends, dtypes, start, length, block, counts, offsets, coefficients, bounds, code):  # type: ignore
    for thread in numba.prange(len(bounds) - 1):
        begin, end = bounds[thread], bounds[thread + 1]
        _replay_part(
            ends, dtypes, start, length, block, counts, offsets, coefficients, begin, end, code
        )


@jit_parallel
def _fingerprint(address, start, length, bounds, sums):  # type: ignore[no-untyped-def]
    for thread in numba.prange(len(bounds) - 1):
        total = np.uint64(0)
        for s in range(bounds[thread], bounds[thread + 1]):
            bits = numba.carray(at(address[s], numba.uint32), (length[s],))
            for i in range(length[s]):
                z = np.uint64(bits[i]) + np.uint64(start[s] + i + 1) * np.uint64(MIX_INDEX)
                z = (z ^ (z >> np.uint64(32))) * np.uint64(MIX_BITS)
                total += z ^ (z >> np.uint64(32))
        sums[thread] = total


def _bounds(segments: Segments, counts: np.ndarray) -> np.ndarray:
    """Return what each thread gets, where block l takes ``counts[l]`` bases."""
    cost = segments.length * (counts[segments.block] + COST_OF_MEMORY)
    return segments.divide(cost, numba.get_num_threads())


def project(
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray] | None,
    segments: Segments,
    plan: RoundPlan,
) -> np.ndarray:
    """Return γ of ``before − after``, or of ``before``: float64, ``(K,)``.

    Parameters
    ----------
    before, after
        C-contiguous tensors of equal dtype: float32, float16, or uint16 holding bfloat16.
    segments
        Where the tensors and the plan's blocks cut the index space.
    plan
        The round's bases.
    """
    counts = plan.counts
    position = np.concatenate([[0], np.cumsum(counts[segments.block])])
    sums = np.zeros(position[-1], dtype=np.float64)
    ends = np.zeros_like(segments.start) if after is None else addresses_of(after, segments)
    _project(
        addresses_of(before, segments),
        ends,
        kinds_of(before, segments),
        segments.start,
        segments.length,
        segments.block,
        counts,
        position,
        sums,
        _bounds(segments, plan.counts),
        family_code(plan),
    )
    coefficients = np.zeros(plan.num_bases, dtype=np.float64)
    _add_up(sums, position, segments.block, counts, plan.offsets, coefficients)
    return coefficients


def subtract(
    arrays: Sequence[np.ndarray], coefficients: np.ndarray, segments: Segments, plan: RoundPlan
) -> None:
    """Subtract Δ̂ from ``arrays`` in place.

    Parameters
    ----------
    arrays
        C-contiguous float32 tensors.
    coefficients
        Published c: float32, ``(K,)``.
    segments, plan
        As in `project`.
    """
    replay(arrays, [(plan, coefficients)], segments, arrays)


def replay(
    source: Sequence[np.ndarray],
    rounds: Sequence[tuple[RoundPlan, np.ndarray]],
    segments: Segments,
    target: Sequence[np.ndarray],
) -> None:
    """Write float32(``source``) − Δ̂_1 − Δ̂_2 − ... to ``target``, rounded once, at the end.

    Each element is read and written once, however many rounds there are.

    Parameters
    ----------
    source, target
        C-contiguous tensors, each of a dtype that `project` takes; they may be the same.
    rounds
        At least one plan, all alike but for seed and numbers of bases, with its c: float32.
    segments
        As in `project`.
    """
    plans = [plan for plan, _ in rounds]
    begins = np.cumsum([0] + [plan.num_bases for plan in plans])
    counts = np.stack([plan.counts for plan in plans])
    _replay(
        (addresses_of(source, segments), addresses_of(target, segments)),
        (kinds_of(source, segments), kinds_of(target, segments)),
        segments.start,
        segments.length,
        segments.block,
        counts,
        np.stack([begin + p.offsets for begin, p in zip(begins, plans, strict=False)]),
        np.concatenate([c for _, c in rounds]),
        _bounds(segments, counts.sum(axis=0)),
        family_codes(plans),
    )


def fingerprint(arrays: Sequence[np.ndarray], segments: Segments) -> int:
    """Return `reference.fingerprint` of C-contiguous float32 tensors."""
    bounds = segments.divide(segments.length, numba.get_num_threads())
    sums = np.zeros(len(bounds) - 1, dtype=np.uint64)
    _fingerprint(addresses_of(arrays, segments), segments.start, segments.length, bounds, sums)
    return int(sums.sum(dtype=np.uint64))
