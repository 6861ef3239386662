"""32 elements at a time, float32 or bfloat16, for loops that numba's compiler does not find.

Written in LLVM's own language, which has vectors, and makes of them what the processor has. What
is left at the end of a loop goes through the same instructions under a mask.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32
FLOAT, WORD, LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, DOUBLES = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.DoubleType(), LANES)
HALVES, WORDS = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(WORD, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
_ALL = ir.Constant(MASK, [1] * LANES)
_KINDS = {FLOATS: ("f32", 4), DOUBLES: ("f64", 8), HALVES: ("i16", 2)}  # and bytes of an element


@intrinsic
def at(typingctx, address, dtype):  # type: ignore[no-untyped-def]
    """Return ``address`` as a pointer to ``dtype``."""
    pointer = types.CPointer(dtype.dtype)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.int64, dtype), codegen


def vector_at(builder, base, index, kind=FLOATS):  # type: ignore[no-untyped-def]
    """Return a pointer to the elements ``32 index ..`` behind ``base``, an integer or a pointer."""
    cast = builder.inttoptr if isinstance(base.type, ir.IntType) else builder.bitcast
    return builder.gep(cast(base, kind.as_pointer()), [index])


def every(number):  # type: ignore[no-untyped-def]
    """Return a vector of equal words."""
    return ir.Constant(WORDS, [number] * LANES)


def load(builder, base, index, kind, mask):  # type: ignore[no-untyped-def]
    """Return the elements behind ``base``; those not in ``mask`` are not read."""
    name, size = _KINDS[kind]
    function = ir.FunctionType(kind, [kind.as_pointer(), WORD, MASK, kind])
    masked = cgutils.get_or_insert_function(
        builder.module, function, f"llvm.masked.load.v{LANES}{name}.p0"
    )
    pointer = vector_at(builder, base, index, kind)
    return builder.call(masked, [pointer, WORD(size), mask, ir.Constant(kind, None)])


def store(builder, value, base, index, mask):  # type: ignore[no-untyped-def]
    """Write those elements of ``value`` that are in ``mask``."""
    name, size = _KINDS[value.type]
    function = ir.FunctionType(ir.VoidType(), [value.type, value.type.as_pointer(), WORD, MASK])
    masked = cgutils.get_or_insert_function(
        builder.module, function, f"llvm.masked.store.v{LANES}{name}.p0"
    )
    pointer = vector_at(builder, base, index, value.type)
    builder.call(masked, [value, pointer, WORD(size), mask])


def load_floats(builder, base, index, pointer, mask):  # type: ignore[no-untyped-def]
    """Return elements as floats; ``pointer`` says what they are: float32, or bfloat16 as uint16."""
    if pointer.dtype == types.float32:
        return load(builder, base, index, FLOATS, mask)
    bits = builder.zext(load(builder, base, index, HALVES, mask), WORDS)
    return builder.bitcast(builder.shl(bits, every(16)), FLOATS)


def store_floats(builder, value, base, index, pointer, mask):  # type: ignore[no-untyped-def]
    """Write floats as what ``pointer`` says, rounded to nearest, ties to even."""
    if pointer.dtype == types.uint16:
        is_nan = builder.fcmp_unordered("uno", value, value)
        bits = builder.bitcast(value, WORDS)
        odd = builder.and_(builder.lshr(bits, every(16)), every(1))
        bits = builder.add(builder.add(bits, every(0x7FFF)), odd)
        bits = builder.select(is_nan, every(0x7FC00000), bits)
        value = builder.trunc(builder.lshr(bits, every(16)), HALVES)
    store(builder, value, base, index, mask)


def for_lanes(builder, count, body):  # type: ignore[no-untyped-def]
    """Emit ``body`` for each 32 of ``count`` elements, and for those left over.

    ``body`` gets an index and the mask of the elements that there are.
    """
    whole = builder.lshr(count, LONG(5))
    with cgutils.for_range(builder, whole) as loop:
        body(loop.index, _ALL)
    rest = builder.trunc(builder.and_(count, LONG(31)), WORD)
    body(whole, builder.bitcast(builder.sub(builder.shl(WORD(1), rest), WORD(1)), MASK))


def difference_of(builder, ends, pointers, index, mask):  # type: ignore[no-untyped-def]
    """Return the first of ``ends`` less the second, which may be None."""
    before, *after = (
        load_floats(builder, end, index, pointer, mask)
        for end, pointer in zip(ends, pointers, strict=True)
        if pointer != types.none
    )
    return builder.fsub(before, after[0]) if after else before


@intrinsic
def write_difference(typingctx, out, before, after, count):  # type: ignore[no-untyped-def]
    """Write ``before − after``, or ``before`` if ``after`` is None, to ``out``.

    All are pointers to ``count`` float32, or bfloat16 as uint16.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        target, *ends, number = arguments

        def body(index, mask):  # type: ignore[no-untyped-def]
            value = difference_of(builder, ends, (before, after), index, mask)
            store_floats(builder, value, target, index, out, mask)

        for_lanes(builder, number, body)
        return context.get_dummy_value()

    return types.void(out, before, after, types.int64), codegen
