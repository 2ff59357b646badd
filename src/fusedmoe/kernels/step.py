"""What a K step adds to an accumulator, policy STEP: ``f(acc, a, b, s, z, r, ...) -> acc``.

a [BLOCK_M, BLOCK_K]: rows; b [items of BLOCK_K, BLOCK_N]: weights as loaded; s, z: scales and zero points of the
weights; r: scales of the rows. SWAP: the accumulator is [BLOCK_N, BLOCK_M] and weights are the left operand of the
product: few rows then fill the narrow side of a tensor core's tile, and decoded weights go to it from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dense(
    acc, a, b, s, z, r, x, w, DECODE: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr,
    SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a b, both as they are."""
    left, right = (b.T, a.T) if SWAP else (a, b)
    if a.dtype == tl.float32:
        # A sum of step sums errs by far less than one running sum over K. Any max_num_imprecise_acc but 0 (of no
        # other effect on float32) keeps the compiler from folding the addition into the dot again.
        return acc + tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def _sides(a, weights, SWAP: tl.constexpr):
    """The operands of a product, from rows [BLOCK_M, BLOCK_K] and weights [BLOCK_N, BLOCK_K]."""
    if SWAP:
        return weights, a.T
    else:
        return a, weights.T


@triton.jit
def product(
    acc, a, b, s, z, r, x, w, DECODE: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr,
    SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a decode(b); scales, if any, are in the decoded weights or wait for the sum."""
    weights = DECODE(b, s, z, MATH, ELEMENT, SHIFT, PER_ITEM, w.scale.block_k, BLOCK_N, BLOCK_K)
    left, right = _sides(a, weights, SWAP)
    if tl.int8 == MATH or MATH.is_fp8():
        return tl.dot(left, right, acc, out_dtype=acc.dtype)
    # A sum of step sums, as in dense.
    return acc + tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)


@triton.jit
def product_of_words(
    acc, a, b, s, z, r, x, w, DECODE: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr,
    SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As product, to one running sum over all of K, as the kernel of Hopper adds words up: the bits are the same."""
    weights = DECODE(b, s, z, MATH, ELEMENT, SHIFT, PER_ITEM, w.scale.block_k, BLOCK_N, BLOCK_K)
    left, right = _sides(a, weights, SWAP)
    acc = tl.dot(left, right, acc, input_precision=PRECISION)
    # No instruction, but a use of the sum in the same step: else Triton keeps WGMMA in flight into the next one, and
    # ptxas serialises it, as the next operand is decoded into the registers that it reads.
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def add_scaled(acc, part, s, r, x, w, SWAP: tl.constexpr):
    """Add the product of a group, times the scales of both sides."""
    if not w.scale.uniform:
        s = s[:, None] if SWAP else s[None, :]
    if x.scale_at == "step":
        s = s * (r[None, :] if SWAP else r[:, None])
    return acc + part * s


@triton.jit
def scaled_product(
    acc, a, b, s, z, r, x, w, DECODE: tl.constexpr, MATH: tl.constexpr, ELEMENT: tl.constexpr,
    SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add (a decode(b)) r s, where the step lies in one group of K."""
    weights = DECODE(b, s, z, MATH, ELEMENT, SHIFT, PER_ITEM, w.scale.block_k, BLOCK_N, BLOCK_K)
    left, right = _sides(a, weights, SWAP)
    if tl.int8 == MATH:
        part = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
    else:
        part = tl.dot(left, right, input_precision=PRECISION)
    return add_scaled(acc, part, s, r, x, w, SWAP)
