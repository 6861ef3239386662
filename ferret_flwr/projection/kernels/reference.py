"""The definition: one basis at a time in NumPy, short enough to check against the paper.

Every other kernel is a faster answer to this one. `project` computes in float64; `reconstruct`
adds in float32, basis by basis, which fixes the bits of its result on every device.
"""

from __future__ import annotations

import numpy as np

from ferret_flwr.projection.families import FAMILIES, GROUP, truncated_normal_scale
from ferret_flwr.projection.kernels.philox import philox4x32, split_key
from ferret_flwr.projection.plan import RoundPlan

ROTATION = 33  # the counter's last word for a row's offset; 0 is the signs', 1..32 the normals'
MIX_INDEX, MIX_BITS = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd, from splitmix64 and rrmxmx


def _counters(group: np.ndarray, basis: int, word: np.ndarray | int) -> np.ndarray:
    """Return Philox counters ``(low, high half of the group, basis, word)``."""
    halves = group & 0xFFFFFFFF, group >> 32
    return np.stack(np.broadcast_arrays(*halves, basis, word), axis=-1).astype(np.uint32)


def _signs(seed: int, basis: int, index: np.ndarray) -> np.ndarray:
    """Return ±1: bit ``i % 128`` of the output at counter ``(i // 128, k, 0)``, 1 meaning −1."""
    words = philox4x32(_counters(index // GROUP, basis, 0), split_key(seed))
    bit = index % GROUP
    word = np.take_along_axis(words, (bit // 32)[:, None], axis=1)[:, 0]
    return (1 - 2 * ((word >> (bit % 32)) & 1).astype(np.int64)).astype(np.float32)


def _truncated_normal(seed: int, basis: int, index: np.ndarray, block_size: int) -> np.ndarray:
    """Return the quantile of a uniform t in (−1, 1), four elements to a counter."""
    within = index % GROUP
    words = philox4x32(_counters(index // GROUP, basis, 1 + within // 4), split_key(seed))
    word = np.take_along_axis(words, (within % 4)[:, None], axis=1)[:, 0]
    t = (word.astype(np.float64) + 0.5) * 2.0**-31 - 1.0
    s = truncated_normal_scale(block_size) * t
    s2 = s * s
    return (s * (1 + s2 * (1 / 6 + s2 * (7 / 120 + s2 * (127 / 5040))))).astype(np.float32)


def basis_elements(plan: RoundPlan, basis: int, start: int, stop: int) -> np.ndarray:
    """Return elements ``start..stop-1`` of basis ``basis``: float32, ``(stop - start,)``.

    Parameters
    ----------
    plan
        The round's bases.
    basis
        k, counted from 0 within the block.
    start, stop
        Indices into 0..d-1.
    """
    index = np.arange(start, stop, dtype=np.int64)
    if FAMILIES[plan.family].code == 0:
        return _signs(plan.seed, basis, index)
    return _truncated_normal(plan.seed, basis, index, plan.blocks.block_size)


def block_of(plan: RoundPlan, start: int, stop: int) -> np.ndarray:
    """Return the interleaved block of elements ``start..stop-1``: int64, ``(stop - start,)``.

    Element i is in row i // L, and in column i mod L before row j is rotated by ⌊x_j L / 2³²⌋,
    where x_j is the first output word at counter ``(j, 0, 33)``.
    """
    count = plan.blocks.count
    row, column = np.divmod(np.arange(start, stop, dtype=np.int64), count)
    words = philox4x32(_counters(row, 0, ROTATION), split_key(plan.seed))
    return (column + (words[:, 0].astype(np.int64) * count >> 32)) % count


def project(delta: np.ndarray, plan: RoundPlan) -> np.ndarray:
    """Return γ_{l,k} = Σ_{i in block l} v_{k,i} Δ_i (paper, Eq. 6 without its factor).

    Parameters
    ----------
    delta
        Δ: ``(d,)``, any floating dtype.
    plan
        The round's bases.

    Returns
    -------
    numpy.ndarray
        γ: float64, ``(K,)``.
    """
    if plan.interleaved:
        terms = basis_elements(plan, 0, 0, delta.size) * delta.astype(np.float64)
        blocks = block_of(plan, 0, delta.size)
        return np.bincount(blocks, weights=terms, minlength=plan.blocks.count)
    coefficients = []
    for block, count in enumerate(plan.counts):
        start = block * plan.blocks.block_size
        piece = delta[start : start + plan.blocks.block_size].astype(np.float64)
        for basis in range(count):
            coefficients.append(basis_elements(plan, basis, start, start + piece.size) @ piece)
    return np.array(coefficients)


def reconstruct(coefficients: np.ndarray, plan: RoundPlan) -> np.ndarray:
    """Return Δ̂_i = Σ_k c_{l,k} v_{k,i}, added in float32 over k in order (paper, Eq. 7).

    Parameters
    ----------
    coefficients
        Published c: float32, ``(K,)``, with all factors already in them.
    plan
        The round's bases.

    Returns
    -------
    numpy.ndarray
        Δ̂: float32, ``(d,)``.
    """
    size = plan.blocks.size
    if plan.interleaved:
        published = np.asarray(coefficients, dtype=np.float32)
        return published[block_of(plan, 0, size)] * basis_elements(plan, 0, 0, size)
    update = np.empty(size, dtype=np.float32)
    for block, (first, count) in enumerate(zip(plan.offsets, plan.counts, strict=False)):
        start = block * plan.blocks.block_size
        piece = update[start : start + plan.blocks.block_size]
        for basis in range(count):
            elements = basis_elements(plan, basis, start, start + piece.size)
            term = np.float32(coefficients[first + basis]) * elements
            piece[:] = term if basis == 0 else piece + term
    return update


def fingerprint(parameters: np.ndarray) -> int:
    """Return Σ_i mix(i, bits of parameter i) mod 2⁶⁴, the same in whatever order it is added.

    Parameters
    ----------
    parameters
        m: float32, ``(d,)``.
    """
    index = np.arange(1, parameters.size + 1, dtype=np.uint64)
    z = parameters.view(np.uint32).astype(np.uint64) + index * np.uint64(MIX_INDEX)
    z = (z ^ (z >> np.uint64(32))) * np.uint64(MIX_BITS)
    return int((z ^ (z >> np.uint64(32))).sum(dtype=np.uint64))


def rounded(values: np.ndarray, seed: int, step: int, start: int) -> np.ndarray:
    """Return float32 ``values`` as bfloat16, at random up or down so that the mean is exact.

    To the bits of element i a number r_i in 0..2¹⁶−1 is added, and the lower 16 are cut off. So it
    goes to the neighbour further from zero with the probability of how near it is, exactly. r_i is
    half-word ``i % 8`` of Philox's output at counter ``(i // 8, step, 0)``.

    Parameters
    ----------
    values
        Finite: float32, ``(n,)``.
    seed, step
        Which random numbers.
    start
        Index i of the first element.

    Returns
    -------
    numpy.ndarray
        The bits of bfloat16: uint16, ``(n,)``.
    """
    index = np.arange(start, start + values.size, dtype=np.int64)
    words = philox4x32(_counters(index // 8, step, 0), split_key(seed))
    half = index % 8
    word = np.take_along_axis(words, (half // 2)[:, None], axis=1)[:, 0]
    random = word >> (16 * (half % 2)).astype(np.uint32) & np.uint32(0xFFFF)
    return ((values.view(np.uint32) + random) >> np.uint32(16)).astype(np.uint16)
