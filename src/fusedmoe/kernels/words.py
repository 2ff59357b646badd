"""Decode weights by the word of 32 bits, for NVIDIA's tensor cores, straight into the registers that they read.

A thread of a warp owns, of every 16 columns of the left operand, columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9 (q = lane %
4). A product does not depend on the order of K, so word q of four is declared to be what thread q owns (8 codes of 4
bits: 2 x 16 columns, or 4 of 8 bits: 16 columns), and the columns of the rows that it meets are written in the same
order (kernels/arrange.py). A load then is a word, with nothing to shuffle, and codes are decoded two at a time: of
4-bit codes those that lie 16 bits apart, masked into the mantissas of a pair of 16-bit floats.
"""

from __future__ import annotations

import functools
import struct

import triton
import triton.language as tl

from fusedmoe.kernels.decode import spread

# Pairs of 16-bit floats: 1; 2^k whose lowest mantissa bits hold a code; what e2m1 is multiplied by where it belongs,
# the difference of the biases; and that place in float16.
_ONE = {"bf16": 0x3F803F80, "f16": 0x3C003C00}
_MAGIC = {"bf16": 0x43004300, "f16": 0x64006400}
_E2M1_BY = {"bf16": 0x7E807E80, "f16": 0x74007400}
_E2M1_AT = 9
_MINUS_0 = 0x80008000


@functools.cache
def assembly(element: str, math: str, *, zero: int | None, scale: str | None) -> str:
    """PTX that decodes one word into 8 or 4 numbers of type ``math``.

    Operands after the numbers: the word; then, where they vary, what is added to an integer to take its zero point away
    (``zero`` None), and the scale, of kind ``scale`` (None: there is none).
    """
    kind = {"bfloat16": "bf16", "float16": "f16"}[math]
    if element in ("int8", "uint8"):
        return _eight_bit(element, kind, zero, scale is not None)
    return _four_bit(element, kind, zero, scale)


def kind_of_scale(element: str, math: str, scale: str) -> str:
    """As what scales of words are loaded (kernels/scales.py): of e2m1 in bfloat16 with the difference of the biases."""
    return "e2m1 pair" if (element, math, scale) == ("e2m1", "bfloat16", "e8m0") else scale


def _shift(source: str, target: str, left: int) -> str:
    return f"shl.b32 {target}, {source}, {left};" if left >= 0 else f"shr.u32 {target}, {source}, {-left};"


def _minus(value: float, kind: str) -> int:
    """-value as a pair of 16-bit floats."""
    if kind == "f16":
        half = int.from_bytes(struct.pack("<e", -value), "little")
    else:
        half = int.from_bytes(struct.pack("<f", -value), "little") >> 16
    return half * 0x10001


def _four_bit(element: str, kind: str, zero: int | None, scale: str | None) -> str:
    lines = [".reg .b32 h, s, v, one, by, none, minus;", f"mov.b32 one, {_ONE[kind]:#x};"]
    known = _minus({"bf16": 128.0, "f16": 1024.0}[kind] + (zero or 0), kind)
    lines.append("mov.b32 minus, $9;" if zero is None else f"mov.b32 minus, {known:#x};")
    lines += [f"mov.b32 by, {_E2M1_BY[kind]:#x};", f"mov.b32 none, {_MINUS_0:#x};"]
    if element == "e2m1" and kind == "bf16":
        lines.append("shr.u32 h, $8, 8;")
    for j in range(4):  # codes j and j + 4
        if element == "int4":
            lines += [
                f"shr.u32 s, $8, {4 * j};",
                f"lop3.b32 v, s, 0x000F000F, {_MAGIC[kind]:#x}, 0xEA;",  # (s & mask) | magic
                f"fma.rn.{kind}x2 v, v, one, minus;",
            ]
        elif kind == "bf16":
            # Sign and magnitude are brought to their places by one multiplication, which the pipe of floats does: two
            # copies of a code, 6 and 12 bits further up, do not meet, so nothing is carried.
            at = 4 * (j % 2)
            lines += [
                f"and.b32 v, {'$8' if j < 2 else 'h'}, {0x000F000F << at:#x};",
                f"mul.lo.u32 v, v, {0x1040 >> at:#x};",
                "and.b32 v, v, 0x81C081C0;",
            ]
        else:
            at = _E2M1_AT
            lines += [
                _shift("$8", "s", 12 - 4 * j),
                f"and.b32 s, s, {_MINUS_0:#x};",
                _shift("$8", "v", at - 4 * j),
                f"lop3.b32 v, v, {(7 << at) * 0x10001:#x}, s, 0xEA;",
            ]
        if element == "e2m1" and scale != "e2m1 pair":
            lines.append(f"fma.rn.{kind}x2 v, v, by, none;")
        if scale is not None:
            lines.append(f"fma.rn.{kind}x2 v, v, ${10 if zero is None else 9}, none;")
        lines.append(f"mov.b32 {{${2 * j}, ${2 * j + 1}}}, v;")
    return "{" + "\n".join(lines) + "}"


def _eight_bit(element: str, kind: str, zero: int | None, scaled: bool) -> str:
    lines = [".reg .b32 w, v;", ".reg .f32 a, b, minus;"]
    # int8 becomes unsigned by its sign bit, which adds 128.
    known = struct.pack(">f", -(8388608.0 + (zero or 0) + (128 if element == "int8" else 0))).hex()
    lines.append("mov.b32 minus, $5;" if zero is None else f"mov.f32 minus, 0f{known};")
    lines.append("xor.b32 w, $4, 0x80808080;" if element == "int8" else "mov.b32 w, $4;")
    for j in (0, 2):
        for register, code in (("a", j), ("b", j + 1)):
            # The byte becomes the lowest mantissa bits of 2^23.
            lines += [f"prmt.b32 v, w, 0x4B000000, {0x7440 + code:#x};", f"mov.b32 {register}, v;"]
            lines.append(f"add.f32 {register}, {register}, minus;")
            if scaled:
                lines.append(f"mul.f32 {register}, {register}, ${6 if zero is None else 5};")
        lines += [f"cvt.rn.{kind}x2.f32 v, b, a;", f"mov.b32 {{${j}, ${j + 1}}}, v;"]
    return "{" + "\n".join(lines) + "}"


@triton.jit
def _twice(x, MATH: tl.constexpr):
    """A number of type MATH in both halves of a word."""
    bits = x.to(MATH).to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits | (bits << 16)


@triton.jit
def _eight(operands, MATH: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    PLACES: tl.constexpr = "=h,=h,=h,=h,=h,=h,=h,=h,r" + ",r" * (len(operands) - 1)
    if tl.bfloat16 == MATH:
        v = tl.inline_asm_elementwise(ASM, PLACES, operands, dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1)
    else:
        v = tl.inline_asm_elementwise(ASM, PLACES, operands, dtype=(tl.float16,) * 8, is_pure=True, pack=1)
    v0, v4, v1, v5, v2, v6, v3, v7 = v
    # [.., word, half, i, j]: pair 2 j + i of the word is columns 16 j + 8 i + 2 q + half of 32.
    even = tl.join(tl.join(v0, v4), tl.join(v1, v5))
    odd = tl.join(tl.join(v2, v6), tl.join(v3, v7))
    pairs = tl.reshape(tl.join(even, odd), (N, K // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 5, 4, 2, 3)), (N, K))


@triton.jit
def _four(operands, MATH: tl.constexpr, ASM: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    PLACES: tl.constexpr = "=h,=h,=h,=h,r" + ",f" * (len(operands) - 1)
    if tl.bfloat16 == MATH:
        v = tl.inline_asm_elementwise(ASM, PLACES, operands, dtype=(tl.bfloat16,) * 4, is_pure=True, pack=1)
    else:
        v = tl.inline_asm_elementwise(ASM, PLACES, operands, dtype=(tl.float16,) * 4, is_pure=True, pack=1)
    v0, v1, v2, v3 = v
    # [.., word, half, i]: pair i of the word is columns 8 i + 2 q + half of 16.
    pairs = tl.reshape(tl.join(tl.join(v0, v1), tl.join(v2, v3)), (N, K // 16, 4, 2, 2))
    return tl.reshape(tl.permute(pairs, (0, 1, 4, 2, 3)), (N, K))


@triton.jit
def _taken_away(zero, MATH: tl.constexpr, PER_ITEM: tl.constexpr):
    """What is added to a code in the mantissa of a power of two to leave the code less its zero point."""
    if PER_ITEM == 4:
        return -(zero + 8388608.0)
    elif tl.bfloat16 == MATH:
        return _twice(-(zero + 128.0), MATH)
    else:
        return _twice(-(zero + 1024.0), MATH)


@triton.jit
def scale_of_words(s, MATH: tl.constexpr, PER_ITEM: tl.constexpr):
    """A scale as codes are multiplied by it: 4-bit ones in pairs of type MATH, which some are loaded as, others before
    they are of it.
    """
    if PER_ITEM == 8 and s.dtype == tl.float32:
        return _twice(s, MATH)
    else:
        return s


@triton.jit
def numbers(
    w, minus, scale, MATH: tl.constexpr, ELEMENT: tl.constexpr, PER_ITEM: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """The numbers [N, K] of words [N, K / PER_ITEM]; ``minus`` and ``scale`` of each word, None where constant."""
    if scale is None:
        operands = [w] if minus is None else [w, minus]
    else:
        operands = [w, scale] if minus is None else [w, minus, scale]
    if PER_ITEM == 8:
        return _eight(operands, MATH, ELEMENT, N, K)
    else:
        return _four(operands, MATH, ELEMENT, N, K)


@triton.jit
def decoded(
    b, s, z, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Without scales, which wait for a product or the sum."""
    minus = None
    if SHIFT is None:
        minus = tl.broadcast_to(_taken_away(z, MATH, PER_ITEM)[:, None], (BLOCK_N, BLOCK_K // PER_ITEM))
    return numbers(b.T, minus, None, MATH, ELEMENT, PER_ITEM, BLOCK_N, BLOCK_K)


@triton.jit
def decoded_and_scaled(
    b, s, z, MATH: tl.constexpr, ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """With the scales [BLOCK_N, GROUPS], each of as many columns of the step."""
    GROUPS: tl.constexpr = s.shape[1]
    scale = spread(scale_of_words(s, MATH, PER_ITEM), BLOCK_N, GROUPS, BLOCK_K // PER_ITEM // GROUPS)
    minus = None
    if SHIFT is None:
        minus = spread(_taken_away(z, MATH, PER_ITEM), BLOCK_N, GROUPS, BLOCK_K // PER_ITEM // GROUPS)
    return numbers(b.T, minus, scale, MATH, ELEMENT, PER_ITEM, BLOCK_N, BLOCK_K)
