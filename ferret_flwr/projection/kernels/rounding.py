"""Stochastic rounding to bfloat16, by random bits that depend on nothing but seed and index."""

from __future__ import annotations

import numba
import numpy as np

from ferret_flwr.projection.kernels.philox import split_key
from ferret_flwr.projection.kernels.tiles import jit_parallel, sign_words

DRAWS = 8  # elements that share a counter, 16 bits each
COUNTERS = 256  # drawn at once
RUN = COUNTERS * DRAWS


@jit_parallel
def _round(values, out, start, step, key_0, key_1, runs):  # type: ignore[no-untyped-def]
    first = start // DRAWS
    for run in numba.prange(runs):
        words, flat = np.empty((4, COUNTERS), np.uint32), np.empty(4 * COUNTERS, np.uint32)
        counter = first + run * COUNTERS
        sign_words(flat, words, counter, COUNTERS, step, key_0, key_1)
        random = flat.view(np.uint16)
        low = counter * DRAWS - start  # of ``values``, where ``random`` begins
        begin, end = max(0, low), min(len(values), low + RUN)
        exact, drawn, result = values[begin:end], random[begin - low :], out[begin:end]
        for i in range(end - begin):
            result[i] = np.uint16((exact[i] + np.uint32(drawn[i])) >> np.uint32(16))


def rounded(values: np.ndarray, seed: int, step: int, start: int) -> np.ndarray:
    """Return `reference.rounded` of C-contiguous finite float32 ``values``: uint16, ``(n,)``."""
    out = np.empty(values.size, dtype=np.uint16)
    runs = -(-(start + values.size) // DRAWS) - start // DRAWS
    low, high = (np.uint32(half) for half in split_key(seed))
    _round(values.view(np.uint32), out, start, step, low, high, -(-runs // COUNTERS))
    return out
