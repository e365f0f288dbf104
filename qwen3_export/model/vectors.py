"""Vector instructions of AVX2, as small pieces of LLVM.

numba makes none of these from a loop by itself.

One instruction of AVX2 multiplies 16 pairs of 16-bit integers, or 32 pairs of bytes, and adds neighbouring products:
two or four times as many as in fp32, and without rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic

ADDRESS = ir.IntType(64)
INT32, FP32 = ir.IntType(32), ir.FloatType()
# Each is one register of 32 bytes.
BYTES, SHORTS = ir.VectorType(ir.IntType(8), 32), ir.VectorType(ir.IntType(16), 16)
INTS, FLOATS = ir.VectorType(INT32, 8), ir.VectorType(FP32, 8)

Builder = Any
Value = Any


def inserted(function: Callable[..., Any]) -> Any:
    """Make an instruction of `addressed` callable from compiled code."""
    return intrinsic(function)


def addressed(arguments: int, build: Callable[..., None]) -> Any:
    """Instructions that numba inserts in place of a call.

    The call has `arguments` arguments of 64 bits, addresses or numbers, and returns nothing. `build` writes the
    instructions, given a builder and the arguments.
    """

    def generate(context: Any, builder: Builder, _signature: Any, given: Sequence[Value]) -> Value:
        build(builder, *given)
        return context.get_dummy_value()

    return numba.types.void(*[numba.types.intp] * arguments), generate


def load(builder: Builder, address: Value, kind: Any) -> Value:
    """One number or register from any address, aligned or not."""
    found = builder.load(builder.inttoptr(address, kind.as_pointer()))
    found.align = 1
    return found


def store(builder: Builder, value: Value, address: Value) -> None:
    """The reverse of `load`."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 1


def ahead(builder: Builder, address: Value, times: Value | int, step: int = 1) -> Value:
    """`address + times · step`."""
    times = ADDRESS(times) if isinstance(times, int) else times
    return builder.add(address, builder.mul(times, ADDRESS(step)))


def spread(builder: Builder, number: Value, kind: Any) -> Value:
    """A register that holds one number of 32 bits everywhere, seen as `kind`."""
    lanes = ir.VectorType(number.type, 8)
    one = builder.insert_element(ir.Constant(lanes, ir.Undefined), number, INT32(0))
    return builder.bitcast(builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * 8)), kind)


def same(kind: Any, number: float) -> Value:
    """A constant register."""
    return ir.Constant(kind, [number] * kind.count)


def pairs_of_shorts(builder: Builder, left: Value, right: Value) -> Value:
    """Products of signed 16-bit integers, added in pairs, in 32 bits.

    `[2 i] · [2 i] + [2 i + 1] · [2 i + 1]`.
    """
    return _call(builder, "llvm.x86.avx2.pmadd.wd", INTS, left, right)


def pairs_of_bytes(builder: Builder, left: Value, right: Value) -> Value:
    """Products of unsigned with signed bytes, added in pairs, saturated to 16 bits."""
    return _call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, left, right)


def _call(builder: Builder, name: str, result: Any, *given: Value) -> Value:
    known = builder.module.globals
    if name not in known:
        ir.Function(builder.module, ir.FunctionType(result, [value.type for value in given]), name)
    return builder.call(known[name], given)


def repeat(
    builder: Builder, times: Value, carried: Sequence[Value], body: Callable[[Value, Sequence[Value]], Sequence[Value]]
) -> Sequence[Value]:
    """A loop of `carried = body(i, carried)`, run `times` times but at least once.

    Returns the last `carried`.
    """
    before, inside, behind = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(inside)
    builder.position_at_end(inside)
    index, entering = builder.phi(ADDRESS), [builder.phi(value.type) for value in carried]
    found = body(index, entering)
    following = builder.add(index, ADDRESS(1))
    for phi, first, next_one in zip([index, *entering], [ADDRESS(0), *carried], [following, *found], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, times), inside, behind)
    builder.position_at_end(behind)
    return found
