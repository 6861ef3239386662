"""What the kernels for processors share: a tile of a tensor, and the elements of a basis for it.

numba keeps compiled kernels beside each file and compiles again when that file changes, but not
when a file changes whose functions it has compiled in: after a change here, `make clean-kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from ferret_flwr.projection.families import FAMILIES, GROUP, truncated_normal_scale
from ferret_flwr.projection.kernels.philox import (
    MULTIPLIER_0,
    MULTIPLIER_1,
    WEYL_0,
    WEYL_1,
    split_key,
)
from ferret_flwr.projection.kernels.segments import Segments
from ferret_flwr.projection.plan import RoundPlan

TILE = 32  # groups handled at once: 16 KiB of float32
ELEMENTS = TILE * GROUP

SIGNS = FAMILIES["rademacher"].code
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
HALF_TO_FLOAT = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)

jit = numba.njit(cache=True, nogil=True, error_model="numpy")
jit_parallel = numba.njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@intrinsic
def at(typingctx, address, dtype):  # type: ignore[no-untyped-def]
    """Return ``address`` as a pointer to ``dtype``, for `numba.carray`."""
    pointer = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), codegen


@jit
def _round(c0, c1, c2, c3, key_0, key_1):  # type: ignore[no-untyped-def]
    product_0 = np.uint64(c0) * np.uint64(MULTIPLIER_0)
    product_1 = np.uint64(c2) * np.uint64(MULTIPLIER_1)
    return (
        np.uint32(np.uint32(product_1 >> np.uint64(32)) ^ c1 ^ key_0),
        np.uint32(product_1),
        np.uint32(np.uint32(product_0 >> np.uint64(32)) ^ c3 ^ key_1),
        np.uint32(product_0),
    )


@jit
def philox(c0, c1, c2, c3, key_0, key_1):  # type: ignore[no-untyped-def]
    """Philox4x32-10, unrolled so that a loop over counters becomes vector instructions."""
    w0, w1 = np.uint32(WEYL_0), np.uint32(WEYL_1)
    k0, k1 = np.uint32(key_0), np.uint32(key_1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    k0, k1 = np.uint32(k0 + w0), np.uint32(k1 + w1)
    return _round(c0, c1, c2, c3, k0, k1)


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


@jit
def load(out, address, dtype, count):  # type: ignore[no-untyped-def]
    """Copy ``count`` elements at ``address`` to ``out`` as float32."""
    if dtype == FLOAT32:
        exact = numba.carray(at(address, numba.float32), (count,))
        for i in range(count):
            out[i] = exact[i]
    else:
        bits = numba.carray(at(address, numba.uint16), (count,))
        if dtype == BFLOAT16:
            raw = out.view(np.uint32)
            for i in range(count):
                raw[i] = np.uint32(bits[i]) << np.uint32(16)
        else:
            for i in range(count):
                out[i] = HALF_TO_FLOAT[bits[i]]


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
    offset *= 4 if dtype == FLOAT32 else 2
    x[:first] = 0
    x[first + count : groups * GROUP] = 0
    load(x[first:], before + offset, dtype, count)
    if after != 0:
        load(y[first:], after + offset, dtype, count)
        for i in range(first, first + count):
            x[i] -= y[i]
    return np.int64(x.ctypes.data)


@jit
def subtract_tile(address, update, first, count):  # type: ignore[no-untyped-def]
    """Subtract ``update[first..first+count]`` from the floats at ``address``."""
    w = numba.carray(at(address, numba.float32), (count,))
    for i in range(count):
        w[i] -= update[first + i]


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
