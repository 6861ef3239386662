"""Vector instructions for ±1: 32 sign bits act on 32 floats as one select, on any processor.

numba has no vector type, and its compiler does not recognise the unpacking of bits, so these few
loops are written in LLVM's own language, where a 32-bit word is a vector of 32 conditions.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32
_FLOAT, _WORD, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _DOUBLES = ir.VectorType(_FLOAT, LANES), ir.VectorType(ir.DoubleType(), LANES)
_HALVES, _WORDS = ir.VectorType(ir.IntType(16), LANES), ir.VectorType(_WORD, LANES)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_ALL = ir.Constant(_MASK, [1] * LANES)
_SUFFIXES = {_FLOATS: "f32", _DOUBLES: "f64", _HALVES: "i16"}


def _vector_at(builder, address, index, kind=_FLOATS):  # type: ignore[no-untyped-def]
    """Return a pointer to elements ``32 index ..`` behind the integer ``address``."""
    base = builder.inttoptr(address, kind.as_pointer())
    return builder.gep(base, [index])


def _mask_at(builder, address, index):  # type: ignore[no-untyped-def]
    """Return word ``index`` behind the integer ``address`` as 32 conditions, lowest bit first."""
    base = builder.inttoptr(address, _WORD.as_pointer())
    return builder.bitcast(builder.load(builder.gep(base, [index]), align=4), _MASK)


def _broadcast(builder, value):  # type: ignore[no-untyped-def]
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_WORD, 0))
    lanes = ir.Constant(_WORDS, [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), lanes)


@intrinsic
def signed_dot(typingctx, x, words, count):  # type: ignore[no-untyped-def]
    """Return Σ ±x in float32 over ``32 count`` floats at address ``x``."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        x, words, count = arguments
        total = cgutils.alloca_once_value(builder, ir.Constant(_FLOATS, [0.0] * LANES))
        with cgutils.for_range(builder, count) as loop:
            value = builder.load(_vector_at(builder, x, loop.index), align=4)
            mask = _mask_at(builder, words, loop.index)
            signed = builder.select(mask, builder.fneg(value), value)
            builder.store(builder.fadd(builder.load(total), signed), total)
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOATS])
        add_up = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32"
        )
        return builder.call(
            add_up, [ir.Constant(_FLOAT, -0.0), builder.load(total)], fastmath=["reassoc"]
        )

    return types.float32(types.int64, types.int64, types.int64), codegen


def _of_constant(combine=None):  # type: ignore[no-untyped-def]
    """Write ±c to each 32 floats, or ``combine`` ("fadd") it with what is there."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        out, words, count, c = arguments
        constant = _broadcast(builder, c)
        negative = builder.fneg(constant)
        with cgutils.for_range(builder, count) as loop:
            target = _vector_at(builder, out, loop.index)
            value = builder.select(_mask_at(builder, words, loop.index), negative, constant)
            if combine is not None:
                value = getattr(builder, combine)(builder.load(target, align=4), value)
            builder.store(value, target, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen


@intrinsic
def signed_store(typingctx, out, words, count, c):  # type: ignore[no-untyped-def]
    """Write ±c to ``32 count`` floats at address ``out``."""
    return _of_constant()


@intrinsic
def signed_add(typingctx, out, words, count, c):  # type: ignore[no-untyped-def]
    """Add ±c to ``32 count`` floats at address ``out``."""
    return _of_constant("fadd")


def _load(builder, address, index, kind, mask):  # type: ignore[no-untyped-def]
    """Return the vector at ``32 index`` behind ``address``; lanes not in ``mask`` are not read."""
    arguments = [kind.as_pointer(), _WORD, _MASK, kind]
    name = f"llvm.masked.load.v{LANES}{_SUFFIXES[kind]}.p0"
    load = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, arguments), name)
    size = ir.Constant(_WORD, 2 if kind is _HALVES else 8 if kind is _DOUBLES else 4)
    other = ir.Constant(kind, None)
    return builder.call(load, [_vector_at(builder, address, index, kind), size, mask, other])


def _store(builder, value, address, index, kind, mask):  # type: ignore[no-untyped-def]
    """Write the lanes of ``value`` that are in ``mask``."""
    arguments = [kind, kind.as_pointer(), _WORD, _MASK]
    name = f"llvm.masked.store.v{LANES}{_SUFFIXES[kind]}.p0"
    function = ir.FunctionType(ir.VoidType(), arguments)
    store = cgutils.get_or_insert_function(builder.module, function, name)
    size = ir.Constant(_WORD, 8 if kind is _DOUBLES else 4)
    builder.call(store, [value, _vector_at(builder, address, index, kind), size, mask])


def _floats(builder, address, index, pointer, mask):  # type: ignore[no-untyped-def]
    """Return 32 elements as floats: float32, or uint16 that holds bfloat16."""
    if pointer.dtype == types.float32:
        return _load(builder, address, index, _FLOATS, mask)
    halves = builder.zext(_load(builder, address, index, _HALVES, mask), _WORDS)
    return builder.bitcast(builder.shl(halves, ir.Constant(_WORDS, [16] * LANES)), _FLOATS)


def _run(builder, words, first, count, body):  # type: ignore[no-untyped-def]
    """Emit ``body`` for each 32 of ``count`` elements, and for those left over, under a mask.

    ``body`` gets an index, the elements that there are, and what changes the sign of a vector as
    the bits from ``first`` on behind ``words`` say.
    """
    first_byte = builder.add(words, builder.lshr(first, ir.Constant(_LONG, 3)))
    shift = builder.and_(first, ir.Constant(_LONG, 7))

    def signed(value, index):  # type: ignore[no-untyped-def]
        word = builder.gep(builder.inttoptr(first_byte, _WORD.as_pointer()), [index])
        bits = builder.load(builder.bitcast(word, _LONG.as_pointer()), align=1)
        mask = builder.bitcast(builder.trunc(builder.lshr(bits, shift), _WORD), _MASK)
        return builder.select(mask, builder.fneg(value), value)

    whole = builder.lshr(count, ir.Constant(_LONG, 5))
    with cgutils.for_range(builder, whole) as loop:
        body(loop.index, _ALL, signed)
    rest = builder.trunc(builder.and_(count, ir.Constant(_LONG, 31)), _WORD)
    one = ir.Constant(_WORD, 1)
    body(whole, builder.bitcast(builder.sub(builder.shl(one, rest), one), _MASK), signed)


@intrinsic
def signed_sums(typingctx, sums, before, after, words, first, count):  # type: ignore[no-untyped-def]
    """Add ±(before − after) in float64 to ``count`` doubles at address ``sums``.

    ``before`` and ``after`` are pointers to float32 or to bfloat16 in uint16, ``after`` may be
    None. Signs are the bits from ``first`` on behind address ``words``; up to 7 bytes behind the
    last one are read.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        sums, *ends, words, first, count = arguments

        def body(index, mask, signed):  # type: ignore[no-untyped-def]
            delta, *minus = (
                _floats(builder, builder.ptrtoint(end, _LONG), index, pointer, mask)
                for end, pointer in zip(ends, (before, after), strict=True)
                if pointer != types.none
            )
            if minus:
                delta = builder.fsub(delta, minus[0])
            term = builder.fpext(signed(delta, index), _DOUBLES)
            total = _load(builder, sums, index, _DOUBLES, mask)
            _store(builder, builder.fadd(total, term), sums, index, _DOUBLES, mask)

        _run(builder, words, first, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, before, after, *[types.int64] * 3), codegen


@intrinsic
def signed_subtract(typingctx, out, x, words, first, count):  # type: ignore[no-untyped-def]
    """Subtract ±x, ``count`` floats at address ``x``, from those at address ``out``.

    Signs are those of `signed_sums`.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        out, x, words, first, count = arguments

        def body(index, mask, signed):  # type: ignore[no-untyped-def]
            term = signed(_load(builder, x, index, _FLOATS, mask), index)
            old = _load(builder, out, index, _FLOATS, mask)
            _store(builder, builder.fsub(old, term), out, index, _FLOATS, mask)

        _run(builder, words, first, count, body)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen
