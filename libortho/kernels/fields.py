"""Packed integers as floats, inside a kernel, without a conversion.

A field of 4 or 8 bits ORed into the mantissa of a power of two is a float: 2**e + q, with e chosen
so that the field's lowest bit is worth 1. Conversion instructions run at a quarter to half of the
rate of logical ones, and there is one for each weight.

Where a field is moved to before that: at 4 bits to bit 12 or 16, whichever is nearer by whole
bytes, at 8 bits to bit 0 or 8, so that the fields of a word share their shifts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are Triton's, and typed by it.
from __future__ import annotations

import triton
import triton.language as tl

UNIT = 1 << 23
"""The lowest exponent bit of a float32, for `tagged`."""


@triton.jit
def _position(value, BITS: tl.constexpr):
    return tl.where(value % 2 == 0, 16, 12) if BITS == 4 else 8 * (value % 2)


@triton.jit
def tagged(words, value, unit, BITS: tl.constexpr):
    """Field number `value` of int32 words as float32: 2**e + q, e being 7 or 11, or 23 or 15.

    unit: `UNIT` as a run-time number. A constant that the compiler must not know: it then stays in
        a register, and AND and OR are one instruction.
    """
    position = _position(value, BITS)
    left = tl.maximum(position - BITS * value, 0)
    right = tl.maximum(BITS * value - position, 0)
    field = ((1 << BITS) - 1) << position
    # 127 + 23 - position is the exponent whose mantissa bit `position` is worth 1.
    return ((((words << left) >> right) & field) | ((150 - position) * unit)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def tag(value, BITS: tl.constexpr):
    """What `tagged` is for an integer in the middle of its range: 2**e + 2**(BITS - 1), exactly."""
    power = ((150 - _position(value, BITS)) << 23).to(tl.float32, bitcast=True)
    return power + (1 << (BITS - 1))
