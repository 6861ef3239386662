"""Coefficients in fewer bytes: float16 or int8 multiples of a scale, rounded without bias.

Each `RUN` of coefficients has a scale of its own, the largest magnitude in it. What is rounded lies
between two numbers of the format, and becomes the upper one with the probability that makes the
mean exact; the random bits are Philox's of (seed, index). With random signs the coefficients of a
round are of one size, about ‖Δ‖/√K: 254 steps over the largest of 256 leave an error of about a
hundredth of a coefficient, where the projection itself has left √(d/K) times the update.
"""

from __future__ import annotations

import math

import numpy as np

from ferret_flwr.projection.kernels.philox import philox4x32, split_key
from ferret_flwr.projection.plan import EXACT_NUMBERS, NUMBERS, PlanError

RUN = 256  # coefficients that share a scale
STEPS = 127  # of int8, to either side
BYTES = dict(zip(NUMBERS, (4, 2, 1), strict=True))


def encoded_nbytes(count: int, numbers: str, exact: int = 0) -> int:
    """Return the size of ``count`` encoded coefficients and ``exact`` more, in closed form."""
    scales = 0 if numbers == EXACT_NUMBERS else 4 * math.ceil(count / RUN)
    return BYTES[numbers] * count + scales + 4 * exact


def encode(coefficients: np.ndarray, numbers: str, seed: int, exact: int = 0) -> np.ndarray:
    """Return ``coefficients`` as they cross the wire.

    Parameters
    ----------
    coefficients
        Finite in float32: ``(n + exact,)``.
    numbers
        One of `NUMBERS`.
    seed
        Of the rounding.
    exact
        How many, at the end, stay in float32.

    Returns
    -------
    numpy.ndarray
        float32, ``(n + exact,)``; or, of the other formats, scales, numbers and what is exact, as
        bytes: uint8.
    """
    values = np.ascontiguousarray(coefficients, dtype=np.float32)
    if numbers == EXACT_NUMBERS:
        return values
    values, tail = np.split(values, [values.size - exact])
    scales = _scales(values)
    spread = _spread(scales, values.size).astype(np.float64)
    ratios = np.divide(values, spread, out=np.zeros(values.size), where=spread > 0)
    draws = _uniform(values.size, seed)
    if numbers == "int8":
        kept = np.floor(ratios * STEPS + draws).astype(np.int8)
    else:
        kept = _to_float16(ratios, draws)
    return np.concatenate([part.view(np.uint8) for part in (scales, kept, tail)])


def decode(encoded: np.ndarray, numbers: str, count: int, exact: int = 0) -> np.ndarray:
    """Return the coefficients behind what `encode` made: float32, ``(count + exact,)``.

    Raises
    ------
    PlanError
        If ``encoded`` is no such array.
    """
    kind = np.float32 if numbers == EXACT_NUMBERS else np.uint8
    plain = numbers == EXACT_NUMBERS
    length = count + exact if plain else encoded_nbytes(count, numbers, exact)
    if encoded.dtype != kind or encoded.shape != (length,):
        raise PlanError(
            f"{count + exact} coefficients in {numbers} are {length} of {np.dtype(kind)}, got "
            f"{encoded.dtype} {encoded.shape}"
        )
    if plain:
        return encoded
    # Copied, as views of other types want their alignment.
    cuts = np.cumsum([4 * math.ceil(count / RUN), BYTES[numbers] * count])
    scales, kept, tail = (part.copy() for part in np.split(encoded, cuts))
    spread = _spread(scales.view(np.float32), count)
    if numbers == "int8":
        values = kept.view(np.int8).astype(np.float32) * (spread / np.float32(STEPS))
    else:
        values = kept.view(np.float16).astype(np.float32) * spread
    return np.concatenate([values, tail.view(np.float32)])


def _scales(values: np.ndarray) -> np.ndarray:
    """Return the largest magnitude of each run: float32."""
    return np.maximum.reduceat(np.abs(values), np.arange(0, values.size, RUN))


def _spread(scales: np.ndarray, count: int) -> np.ndarray:
    return np.repeat(scales, RUN)[:count]


def _uniform(count: int, seed: int) -> np.ndarray:
    """Return numbers in [0, 1) that depend on seed and index: float64, ``(count,)``."""
    counters = np.zeros((math.ceil(count / 4), 4), dtype=np.uint32)
    counters[:, 0] = np.arange(len(counters))
    counters[:, 3] = 0xC0DE
    words = philox4x32(counters, split_key(seed)).reshape(-1)[:count]
    return words * 2.0**-32


def _to_float16(ratios: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Round to one of the two float16 around each ratio."""
    nearest = ratios.astype(np.float16)
    low = np.where(nearest > ratios, np.nextafter(nearest, np.float16(-np.inf)), nearest)
    high = np.nextafter(low, np.float16(np.inf))
    share = (ratios - low) / (high.astype(np.float64) - low)
    return np.where(draws < share, high, low).astype(np.float16)
