"""Codes to numbers: ``f(b, w, expert, n, inside, k0, PART, MATH, ...) -> [BLOCK_N, BLOCK_K]`` of type MATH.

``b`` is what was loaded, [bytes of BLOCK_K, BLOCK_N]. A decoder is an element function, which gives float32 (integers
less their zero), with or without the scale of each group of columns.
The bit patterns are put where float32 has exponent and mantissa and multiplied by the difference of the two biases:
exact, subnormals included, and possible on devices that know neither type.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- elements: f(codes uint8 or int8, zero float32) -> float32 -----------------------------------------


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


# --- scales and zero points of a tile's columns --------------------------------------------------------


@triton.jit
def scale_value(raw, KIND: tl.constexpr):
    if KIND == "e8m0":
        return power_of_two(raw)
    elif KIND == "e4m3":
        return e4m3(raw, 0.0)
    else:
        return raw.to(tl.float32)


@triton.jit
def block_scale(s, expert, n, n0, inside, group, PART: tl.constexpr):
    """Scales of columns n in one group of K: [BLOCK_N], or a scalar where they share it."""
    base = s.ptr + expert.to(tl.int64) * s.stride_e + group.to(tl.int64) * s.stride_k
    if s.block_n == 0:
        return scale_value(tl.load(base + PART * s.up * s.stride_n), s.kind)
    elif s.uniform:
        row = PART * s.up + (n0 + PART * s.phase) // s.block_n
        return scale_value(tl.load(base + row.to(tl.int64) * s.stride_n), s.kind)
    else:
        row = PART * s.up + (n + PART * s.phase) // s.block_n
        return scale_value(tl.load(base + row.to(tl.int64) * s.stride_n, mask=inside, other=0), s.kind)


@triton.jit
def zero_point(z, expert, n, inside, group, PART: tl.constexpr):
    """Zero points of columns n in groups of K: [BLOCK_N], or [BLOCK_N, groups] where group is a row."""
    row = n + PART * z.up
    address = z.ptr + expert.to(tl.int64) * z.stride_e + (row // z.per_byte).to(tl.int64) * z.stride_n
    byte = tl.load(address + group.to(tl.int64) * z.stride_k, mask=inside, other=0)
    if z.per_byte == 2:
        byte = (byte >> ((row % 2) * 4).to(tl.uint8)) & 15
    return byte.to(tl.float32)


# --- decoders ------------------------------------------------------------------------------------------


@triton.jit
def _unpacked(b, PER_BYTE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] codes, the low nibble first."""
    b = b.T
    if PER_BYTE == 2:
        b = tl.reshape(tl.join(b & 15, b >> 4), (BLOCK_N, BLOCK_K))
    return b


@triton.jit
def as_they_are(
    b, w, expert, n, n0, inside, k0, PART: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr,
    PER_BYTE: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes are multiplied as codes."""
    return b.T


@triton.jit
def decoded(
    b, w, expert, n, n0, inside, k0, PART: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr,
    PER_BYTE: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Without scales, which are applied to products: a step of K lies in one group."""
    codes = _unpacked(b, PER_BYTE, BLOCK_N, BLOCK_K)
    if w.zero is None:
        return ELEMENT(codes, SHIFT).to(MATH)
    else:
        group = k0 // w.step_scale.block_k if w.step_scale is not None else k0 * 0
        zero = zero_point(w.zero, expert, n, inside, group, PART)
        return ELEMENT(codes, zero[:, None]).to(MATH)


@triton.jit
def _spread(x, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """[BLOCK_N, GROUPS] -> [BLOCK_N, GROUPS * GROUP], each value GROUP times."""
    return tl.reshape(tl.broadcast_to(x[:, :, None], (BLOCK_N, GROUPS, GROUP)), (BLOCK_N, GROUPS * GROUP))


@triton.jit
def decoded_and_scaled(
    b, w, expert, n, n0, inside, k0, PART: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr,
    PER_BYTE: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With the scales of groups shorter than a step; each row has its own."""
    s = w.step_scale
    GROUP: tl.constexpr = s.block_k
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    group = (k0 // GROUP + tl.arange(0, GROUPS))[None, :]
    there = inside[:, None]
    if K % BLOCK_K != 0:
        there = there & (group < (K + GROUP - 1) // GROUP)
    row = (n + PART * (s.up + s.phase))[:, None]
    address = s.ptr + expert.to(tl.int64) * s.stride_e + row.to(tl.int64) * s.stride_n + group * s.stride_k
    scale = scale_value(tl.load(address, mask=there, other=0), s.kind)
    codes = _unpacked(b, PER_BYTE, BLOCK_N, BLOCK_K)
    if w.zero is None:
        value = ELEMENT(codes, SHIFT)
    else:
        zero = zero_point(w.zero, expert, n[:, None], there, group, PART)
        value = ELEMENT(codes, _spread(zero, BLOCK_N, GROUPS, GROUP))
    return (value * _spread(scale, BLOCK_N, GROUPS, GROUP)).to(MATH)
