"""Codes to numbers: policy DECODE ``f(b, s, z, ...) -> [BLOCK_N, BLOCK_K]`` of type MATH.

``b`` is what was loaded, [items of BLOCK_K, BLOCK_N]; s and z are scales and zero points of the step
(kernels/scales.py). Elements are functions ``f(codes, zero) -> float32``, integers less their zero.
Bit patterns are put where float32 has exponent and mantissa and multiplied by the difference of the two biases:
exact, subnormals included, and possible on devices that do not know the type.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- elements ------------------------------------------------------------------------------------------


@triton.jit
def e4m3(code, zero):
    bits = code.to(tl.uint32)
    value = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e4m3fnuz(code, zero):
    bits = code.to(tl.uint32)
    value = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 6.64613997892458e35  # 2^119
    return tl.where(bits == 0x80, float("nan"), value)


@triton.jit
def e2m1(code, zero):
    bits = code.to(tl.uint32)
    return (((bits & 8) << 28) | ((bits & 7) << 22)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def unsigned(code, zero):
    # 2^23 + code as a bit pattern; taking 2^23 + zero away leaves their difference, exactly.
    return (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def signed(code, zero):
    return code.to(tl.float32) - zero


@triton.jit
def power_of_two(byte):
    """e8m0: 2^(byte - 127); 0 is a subnormal of float32, 255 is NaN."""
    bits = byte.to(tl.uint32)
    bits = tl.where(bits == 0, 0x00400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return bits.to(tl.float32, bitcast=True)


# --- policies ------------------------------------------------------------------------------------------


@triton.jit
def spread(x, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, TIMES: tl.constexpr):
    """[BLOCK_N, GROUPS] -> [BLOCK_N, GROUPS * TIMES], each value TIMES times."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (BLOCK_N, GROUPS, TIMES)), (BLOCK_N, GROUPS * TIMES))


@triton.jit
def _unpacked(b, PER_ITEM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] codes, the low nibble first."""
    b = b.T
    if PER_ITEM == 2:
        b = tl.reshape(tl.join(b & 15, b >> 4), (BLOCK_N, BLOCK_K))
    return b


@triton.jit
def as_they_are(
    b, s, z, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes are multiplied as codes."""
    return b.T


@triton.jit
def decoded(
    b, s, z, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Without scales, which are applied to products: a step of K lies in one group."""
    codes = _unpacked(b, PER_ITEM, BLOCK_N, BLOCK_K)
    if SHIFT is None:
        return ELEMENT(codes, z[:, None]).to(MATH)
    else:
        return ELEMENT(codes, SHIFT).to(MATH)


@triton.jit
def decoded_and_scaled(
    b, s, z, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With the scales [BLOCK_N, groups] of groups shorter than a step."""
    codes = _unpacked(b, PER_ITEM, BLOCK_N, BLOCK_K)
    if SHIFT is None:
        value = ELEMENT(codes, spread(z, BLOCK_N, BLOCK_K // GROUP, GROUP))
    else:
        value = ELEMENT(codes, SHIFT)
    return (value * spread(s, BLOCK_N, BLOCK_K // GROUP, GROUP)).to(MATH)
