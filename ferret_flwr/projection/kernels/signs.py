"""Vector instructions for ±1: 32 sign bits act on 32 floats as one select, on any processor.

numba's compiler does not recognise the unpacking of bits, so here a 32-bit word is a vector of 32
conditions, see `kernels.vectors`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ferret_flwr.projection.kernels.vectors import (
    DOUBLES,
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    MASK,
    WORD,
    difference_of,
    every,
    for_lanes,
    load,
    load_floats,
    store,
    store_floats,
    vector_at,
)


def _mask_at(builder, address, index):  # type: ignore[no-untyped-def]
    """Return word ``index`` behind the integer ``address`` as 32 conditions, lowest bit first."""
    base = builder.inttoptr(address, WORD.as_pointer())
    return builder.bitcast(builder.load(builder.gep(base, [index]), align=4), MASK)


def _broadcast(builder, value):  # type: ignore[no-untyped-def]
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(WORD, 0))
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), every(0))


@intrinsic
def signed_dot(typingctx, x, words, count):  # type: ignore[no-untyped-def]
    """Return Σ ±x in float32 over ``32 count`` floats at address ``x``."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        x, words, count = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES))
        with cgutils.for_range(builder, count) as loop:
            value = builder.load(vector_at(builder, x, loop.index), align=4)
            mask = _mask_at(builder, words, loop.index)
            signed = builder.select(mask, builder.fneg(value), value)
            builder.store(builder.fadd(builder.load(total), signed), total)
        kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
        add_up = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        return builder.call(
            add_up, [ir.Constant(FLOAT, -0.0), builder.load(total)], fastmath=["reassoc"]
        )

    return types.float32(types.int64, types.int64, types.int64), codegen


def _signed_run(builder, words, first, count, body):  # type: ignore[no-untyped-def]
    """Emit ``body`` as `for_lanes` does, with what takes signs from behind ``words``.

    They are the bits from ``first`` on; up to 8 bytes behind the last one are read.
    """
    first_byte = builder.add(words, builder.lshr(first, LONG(3)))
    shift = builder.and_(first, LONG(7))

    def with_signs(index, mask):  # type: ignore[no-untyped-def]
        def signed(value):  # type: ignore[no-untyped-def]
            word = builder.gep(builder.inttoptr(first_byte, WORD.as_pointer()), [index])
            bits = builder.load(builder.bitcast(word, LONG.as_pointer()), align=1)
            negative = builder.bitcast(builder.trunc(builder.lshr(bits, shift), WORD), MASK)
            return builder.select(negative, builder.fneg(value), value)

        body(index, mask, signed)

    for_lanes(builder, count, with_signs)


@intrinsic
def signed_sums(typingctx, sums, before, after, words, first, count):  # type: ignore[no-untyped-def]
    """Add ±(before − after) in float64 to ``count`` doubles at address ``sums``.

    ``before`` and ``after`` are pointers to float32, or bfloat16 as uint16; ``after`` may be None.
    Signs are the bits from ``first`` on at address ``words``, see `_signed_run`.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        into, old, new, *bits, number = arguments

        def body(index, mask, signed):  # type: ignore[no-untyped-def]
            delta = difference_of(builder, (old, new), (before, after), index, mask)
            total = load(builder, into, index, DOUBLES, mask)
            total = builder.fadd(total, builder.fpext(signed(delta), DOUBLES))
            store(builder, total, into, index, mask)

        _signed_run(builder, *bits, number, body)
        return context.get_dummy_value()

    return types.void(types.int64, before, after, *[types.int64] * 3), codegen


@intrinsic
def signed_add(typingctx, out, x, c, words, first, count):  # type: ignore[no-untyped-def]
    """Write ``x`` ± the float ``c``, or ±c if ``x`` is None, to ``count`` elements at ``out``.

    Pointers and signs as in `signed_subtract`.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, source, constant, *bits, number = arguments
        constant = _broadcast(builder, constant)

        def body(index, mask, signed):  # type: ignore[no-untyped-def]
            value = signed(constant)
            if x != types.none:
                value = builder.fadd(load_floats(builder, source, index, x, mask), value)
            store_floats(builder, value, target, index, out, mask)

        _signed_run(builder, *bits, number, body)
        return context.get_dummy_value()

    return types.void(out, x, types.float32, *[types.int64] * 3), codegen


@intrinsic
def signed_subtract(typingctx, out, x, values, words, first, count):  # type: ignore[no-untyped-def]
    """Write ``x`` less ±values, ``count`` floats at address ``values``, to ``out``.

    ``out`` and ``x`` are pointers to float32, or bfloat16 as uint16. Signs as in `signed_sums`.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, source, terms, *bits, number = arguments

        def body(index, mask, signed):  # type: ignore[no-untyped-def]
            old = load_floats(builder, source, index, x, mask)
            new = builder.fsub(old, signed(load(builder, terms, index, FLOATS, mask)))
            store_floats(builder, new, target, index, out, mask)

        _signed_run(builder, *bits, number, body)
        return context.get_dummy_value()

    return types.void(out, x, *[types.int64] * 4), codegen
