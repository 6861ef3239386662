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
_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_WORD = ir.IntType(32)
_MASK = ir.VectorType(ir.IntType(1), LANES)


def _vector_at(builder, address, index):  # type: ignore[no-untyped-def]
    """Return a pointer to floats ``32 index ..`` behind the integer ``address``."""
    base = builder.inttoptr(address, _FLOATS.as_pointer())
    return builder.gep(base, [index])


def _mask_at(builder, address, index):  # type: ignore[no-untyped-def]
    """Return word ``index`` behind the integer ``address`` as 32 conditions, lowest bit first."""
    base = builder.inttoptr(address, _WORD.as_pointer())
    return builder.bitcast(builder.load(builder.gep(base, [index]), align=4), _MASK)


def _broadcast(builder, value):  # type: ignore[no-untyped-def]
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(_WORD, 0))
    lanes = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
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


def _signed_loop(builder, out, words, count, value_at, combine=None):  # type: ignore[no-untyped-def]
    """Write ±``value_at(index)`` to each 32 floats at ``out``, or combine it with what is there.

    ``value_at`` returns 32 floats, and ``combine`` is "fadd", "fsub", or None.
    """
    with cgutils.for_range(builder, count) as loop:
        target = _vector_at(builder, out, loop.index)
        mask = _mask_at(builder, words, loop.index)
        value = value_at(loop.index)
        value = builder.select(mask, builder.fneg(value), value)
        if combine is not None:
            value = getattr(builder, combine)(builder.load(target, align=4), value)
        builder.store(value, target, align=4)


def _of_constant(combine=None):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        out, words, count, c = arguments
        constant = _broadcast(builder, c)
        _signed_loop(builder, out, words, count, lambda index: constant, combine)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), codegen


def _of_vector(combine=None):  # type: ignore[no-untyped-def]
    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        out, x, words, count = arguments

        def value_at(index):  # type: ignore[no-untyped-def]
            return builder.load(_vector_at(builder, x, index), align=4)

        _signed_loop(builder, out, words, count, value_at, combine)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def signed_store(typingctx, out, words, count, c):  # type: ignore[no-untyped-def]
    """Write ±c to ``32 count`` floats at address ``out``."""
    return _of_constant()


@intrinsic
def signed_add(typingctx, out, words, count, c):  # type: ignore[no-untyped-def]
    """Add ±c to ``32 count`` floats at address ``out``."""
    return _of_constant("fadd")


@intrinsic
def signed_copy(typingctx, out, x, words, count):  # type: ignore[no-untyped-def]
    """Write ±x, from ``32 count`` floats at address ``x``, to address ``out``."""
    return _of_vector()


@intrinsic
def signed_subtract(typingctx, out, x, words, count):  # type: ignore[no-untyped-def]
    """Subtract ±x, from ``32 count`` floats at address ``x``, from those at address ``out``."""
    return _of_vector("fsub")
