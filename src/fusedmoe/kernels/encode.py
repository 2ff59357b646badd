"""Numbers to codes, rounding to nearest even and saturating; NaN stays NaN in floating-point codes.

The definition is :mod:`fusedmoe.numerics`. The type in which codes are stored is their own where the device has it;
elsewhere they are stored as numbers, in a type that holds them exactly. Divisions round as IEEE says: bfloat16 numbers
lie on the ties between two codes often enough for the hardware's faster division to be seen.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int8(x, TYPE: tl.constexpr):
    # Adding 1.5 * 2^23 leaves no bits below 1, rounding to nearest even. An integer cannot be NaN: its scale is.
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    return ((x + 12582912.0) - 12582912.0).to(TYPE)


@triton.jit
def _float8(x, TYPE: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    x = tl.minimum(x, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    x = tl.maximum(x, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    if TYPE.is_fp8():
        return x.to(TYPE)
    # The power of two below |x| (SMALLEST: bits of the smallest normal one); a code is a multiple of an eighth of it.
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST).to(tl.float32, bitcast=True)
    unit_by_2_to_23 = power * 1572864.0
    return ((x + unit_by_2_to_23) - unit_by_2_to_23).to(TYPE)


@triton.jit
def e4m3(x, TYPE: tl.constexpr):
    return _float8(x, TYPE, 448.0, 0x3C800000)


@triton.jit
def e4m3fnuz(x, TYPE: tl.constexpr):
    return _float8(x, TYPE, 240.0, 0x3C000000)


@triton.jit
def magnitude(x):
    """|x|, and 0 for NaN, which says nothing about a scale."""
    return tl.where(x == x, tl.abs(x), 0.0)


@triton.jit
def scale_of(amax, LARGEST: tl.constexpr):
    return tl.div_rn(tl.maximum(amax, 1e-10), LARGEST)  # numerics.AMAX_FLOOR


@triton.jit
def quotient(x, s):
    """X / s rounded as IEEE says, in three operations where the hardware takes ten and a branch, for a scale that was
    made from the largest |x|: a product with 1 / s, and one correction (P. W. Markstein, IBM J. Res. Dev. 34, 1990).
    Only quotients below 2^-126 may err. An infinite scale makes 0 of what is finite.
    """
    inverse = tl.div_rn(1.0, s)
    q = x * inverse
    inverse, divisor = tl.broadcast_to(inverse, x.shape), tl.broadcast_to(s, x.shape)
    return tl.where(divisor < float("inf"), tl.fma(tl.fma(-divisor, q, x), inverse, q), q)


@triton.jit
def broken(x, axis: tl.constexpr):
    """Whether there is a NaN along an axis, as 0 or 1."""
    return tl.max((x != x).to(tl.int32), axis)
