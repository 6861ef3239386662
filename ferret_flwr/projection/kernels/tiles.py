"""What the kernels for processors share: a tile of a tensor, and the elements of a basis for it.

numba keeps compiled kernels beside each file and compiles again when that file changes, but not
when a file changes whose functions it has compiled in: after a change here, `make clean-kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from ferret_flwr.projection.families import FAMILIES, GROUP, truncated_normal_scale
from ferret_flwr.projection.kernels.philox import (
    LOW_32,
    MULTIPLIER_0,
    MULTIPLIER_1,
    WEYL_0,
    WEYL_1,
    split_key,
)
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.kernels.vectors import at, write_difference
from ferret_flwr.projection.plan import RoundPlan

TILE = 32  # groups handled at once: 16 KiB of float32
ELEMENTS = TILE * GROUP

SIGNS = FAMILIES["rademacher"].code
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
jit_inline = numba.njit(cache=True, nogil=True, error_model="numpy", forceinline=True)
jit_parallel = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@jit_inline
def _round(c0, c1, c2, c3, key_0, key_1):  # type: ignore[no-untyped-def]
    product_0 = (c0 & np.uint64(LOW_32)) * np.uint64(MULTIPLIER_0)
    product_1 = (c2 & np.uint64(LOW_32)) * np.uint64(MULTIPLIER_1)
    return (
        (product_1 >> np.uint64(32)) ^ c1 ^ key_0,
        product_1,
        (product_0 >> np.uint64(32)) ^ c3 ^ key_1,
        product_0,
    )


@jit_inline
def philox(c0, c1, c2, c3, key_0, key_1):  # type: ignore[no-untyped-def]
    """Philox4x32-10, so that a loop over counters becomes vector instructions.

    Unrolled, and with each word in the lower half of 64 bits, whatever is above: that is what the
    instruction multiplies, so nothing is ever moved between lanes.
    """
    w0, w1 = np.uint32(WEYL_0), np.uint32(WEYL_1)
    k0, k1 = np.uint32(key_0), np.uint32(key_1)
    c0, c1, c2, c3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, np.uint64(k0), np.uint64(k1))
    return np.uint32(c0), np.uint32(c1), np.uint32(c2), np.uint32(c3)


@jit
def sign_words(flat, words, group, groups, basis, key_0, key_1):  # type: ignore[no-untyped-def]
    """Fill ``flat[4 * groups]`` with the sign bits of ``groups`` groups from ``group`` on."""
    for t in range(groups):
        index = np.uint64(group + t)
        w0, w1, w2, w3 = philox(
            np.uint32(index),
            np.uint32(index >> np.uint64(32)),
            np.uint32(basis),
            np.uint32(0),
            key_0,
            key_1,
        )
        words[0, t] = w0
        words[1, t] = w1
        words[2, t] = w2
        words[3, t] = w3
    for t in range(groups):
        for q in range(4):
            flat[4 * t + q] = words[q, t]


@jit
def normal_elements(v, group, groups, basis, key_0, key_1, scale):  # type: ignore[no-untyped-def]
    """Fill ``v[groups * GROUP]`` with elements of the truncated normal."""
    for t in range(groups):
        index = np.uint64(group + t)
        low, high = np.uint32(index), np.uint32(index >> np.uint64(32))
        for q in range(32):
            words = philox(low, high, np.uint32(basis), np.uint32(1 + q), key_0, key_1)
            for j in range(4):
                t_uniform = (np.float64(words[j]) + 0.5) * 2.0**-31 - 1.0
                s = scale * t_uniform
                s2 = s * s
                v[t * 128 + q * 4 + j] = np.float32(
                    s * (1 + s2 * (1 / 6 + s2 * (7 / 120 + s2 * (127 / 5040))))
                )


@jit_inline
def itemsize(dtype):  # type: ignore[no-untyped-def]
    """Return the bytes of an element."""
    return 4 if dtype == FLOAT32 else 2


@jit
def _from_float16(bits):  # type: ignore[no-untyped-def]
    """Return the float32 that the bits of a float16 stand for."""
    half = np.uint32(bits & np.uint32(0x7FFF))
    if half < np.uint32(0x0400):  # of no exponent; as a float32 it has one, and is never flushed
        value = np.float32(half) * np.float32(2.0**-24)
    elif half < np.uint32(0x7C00):  # the exponents' biases differ by 112
        value = np.uint32((half << np.uint32(13)) + np.uint32(0x38000000)).view(np.float32)
    else:  # infinite, or not a number
        value = np.uint32((half << np.uint32(13)) | np.uint32(0x7F800000)).view(np.float32)
    return -value if bits & np.uint32(0x8000) else value


@jit
def load(out, address, dtype, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` elements at ``address`` to ``out`` as float32."""
    floats = at(np.int64(out.ctypes.data), numba.float32)
    if dtype == FLOAT32:
        write_difference(floats, at(address, numba.float32), None, count)
    elif dtype == BFLOAT16:
        write_difference(floats, at(address, numba.uint16), None, count)
    else:
        bits = numba.carray(at(address, numba.uint16), (count,))
        for i in range(count):
            out[i] = _from_float16(np.uint32(bits[i]))


@jit
def _to_float16(bits):  # type: ignore[no-untyped-def]
    """Return the bits of a float32 rounded to nearest, ties to even."""
    sign, size = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    if size > np.uint32(0x7F800000):
        half = np.uint32(0x7E00)  # not a number
    elif size >= np.uint32(0x47800000):
        half = np.uint32(0x7C00)  # 2¹⁶ and more
    elif size < np.uint32(0x38800000):  # below 2⁻¹⁴, where halves are multiples of 2⁻²⁴ as at 0.5
        aligned = np.uint32(size).view(np.float32) + np.float32(0.5)
        half = np.float32(aligned).view(np.uint32) - np.uint32(0x3F000000)
    else:
        odd = (size >> np.uint32(13)) & np.uint32(1)
        half = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    return np.uint16(sign | half)


@jit
def store(address, dtype, values, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` float32 to ``address``, rounded to ``dtype`` to nearest, ties to even."""
    floats = at(np.int64(values.ctypes.data), numba.float32)
    if dtype == FLOAT32:
        write_difference(at(address, numba.float32), floats, None, count)
    elif dtype == BFLOAT16:
        write_difference(at(address, numba.uint16), floats, None, count)
    else:
        out, bits = numba.carray(at(address, numba.uint16), (count,)), values.view(np.uint32)
        for i in range(count):
            out[i] = _to_float16(bits[i])


@jit
def tile_of(start, stop, group):  # type: ignore[no-untyped-def]
    """Return the number of groups of the tile from ``group`` on, and its part of ``start..stop``.

    The part is its first element, counted from the start of ``group``, and how many there are.
    """
    low, high = max(start, group * GROUP), min(stop, (group + TILE) * GROUP)
    return (high - group * GROUP + GROUP - 1) // GROUP, low - group * GROUP, high - low


@jit
def difference(x, y, before, after, dtype, offset, groups, first, count):  # type: ignore[no-untyped-def]
    """Return the address of a tile of ``before − after``, or of ``before`` if ``after`` is 0.

    The tile is ``groups`` of float32, zero beside ``first..first+count``, which are the elements
    from ``offset`` on. It is in place if it can be, else in ``x``; ``y`` is room.
    """
    if dtype == FLOAT32 and after == 0 and count == groups * GROUP:
        return before + offset * 4
    skipped = offset * itemsize(dtype)
    old, new = before + skipped, after + skipped
    x[:first] = 0
    x[first + count : groups * GROUP] = 0
    delta = x[first:]
    floats = at(np.int64(delta.ctypes.data), numba.float32)
    if after == 0:
        load(delta, old, dtype, count)
    elif dtype == FLOAT32:
        write_difference(floats, at(old, numba.float32), at(new, numba.float32), count)
    elif dtype == BFLOAT16:
        write_difference(floats, at(old, numba.uint16), at(new, numba.uint16), count)
    else:
        load(delta, old, dtype, count)
        load(y, new, dtype, count)
        for i in range(count):
            delta[i] -= y[i]
    return np.int64(x.ctypes.data)


@jit
def masters(x, source, source_dtype, target, target_dtype, groups, first, count):  # type: ignore[no-untyped-def]
    """Return the address of ``groups`` of float32, ``count`` of which, from ``first`` on, are read.

    They are at ``target`` if that is ``source``, else in ``x``, to go to ``target`` by `store`.
    """
    if source == target and source_dtype == target_dtype == FLOAT32 and count == groups * GROUP:
        return target
    load(x[first:], source, source_dtype, count)
    return np.int64(x.ctypes.data)


def addresses_of(arrays: Sequence[np.ndarray], segments: Segments) -> np.ndarray:
    """Return where in memory each segment begins: int64, ``(S,)``."""
    base = np.array([array.ctypes.data for array in arrays], dtype=np.int64)
    size = np.array([array.itemsize for array in arrays], dtype=np.int64)
    return base[segments.tensor] + size[segments.tensor] * segments.within


def kinds_of(arrays: Sequence[np.ndarray], segments: Segments) -> np.ndarray:
    """Return the code of each segment's dtype: int64, ``(S,)``."""
    kinds = {"float32": FLOAT32, "uint16": BFLOAT16, "float16": FLOAT16}
    return np.array([kinds[array.dtype.name] for array in arrays])[segments.tensor]


def family_code(plan: RoundPlan) -> tuple[int, np.uint32, np.uint32, float]:
    """Return what a kernel must know to draw ``plan``'s elements: family, key, scale."""
    low, high = split_key(plan.seed)
    scale = truncated_normal_scale(plan.blocks.block_size)
    return FAMILIES[plan.family].code, np.uint32(low), np.uint32(high), scale


def family_codes(plans: Sequence[RoundPlan]) -> tuple[int, float, np.ndarray]:
    """Return the same of plans that differ in their keys: family, scale, uint32 ``(R, 2)`` keys."""
    family, _, _, scale = family_code(plans[0])
    return family, scale, np.array([split_key(plan.seed) for plan in plans], dtype=np.uint32)
