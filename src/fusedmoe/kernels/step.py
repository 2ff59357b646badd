"""What a K step adds to an accumulator, and what is left to do with the sum: policies STEP and FINISH.

``step(acc, a, b, ...) -> acc``: a [BLOCK_M, BLOCK_K] rows, b [bytes of BLOCK_K, BLOCK_N] weights as loaded.
SWAP: the accumulator is [BLOCK_N, BLOCK_M], weights are the left operand of the product. Few rows then fill the narrow
side of a tensor core's tile, and decoded weights go to it from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.decode import block_scale


@triton.jit
def dense(
    acc, a, b, x, w, row, live, expert, n, n0, inside, k0, PART: tl.constexpr, DECODE: tl.constexpr, MATH: tl.constexpr,
    ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_BYTE: tl.constexpr, SWAP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += a b, both as they are."""
    if a.dtype == tl.float32:
        # A sum of step sums errs by far less than one running sum over K. Any max_num_imprecise_acc but 0 (of no
        # other effect on float32) keeps the compiler from folding the addition into the dot again.
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product(
    acc, a, b, x, w, row, live, expert, n, n0, inside, k0, PART: tl.constexpr, DECODE: tl.constexpr, MATH: tl.constexpr,
    ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_BYTE: tl.constexpr, SWAP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += a decode(b); scales, if any, are in the decoded weights or applied to the sum."""
    weights = DECODE(b, w, expert, n, n0, inside, k0, PART, MATH, ELEMENT, SHIFT, PER_BYTE, K, BLOCK_N, BLOCK_K)
    if SWAP:
        left, right = weights, a.T
    else:
        left, right = a, weights.T
    if MATH == tl.float32:
        return acc + tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(left, right, acc, out_dtype=acc.dtype, input_precision=PRECISION)


@triton.jit
def scaled_product(
    acc, a, b, x, w, row, live, expert, n, n0, inside, k0, PART: tl.constexpr, DECODE: tl.constexpr, MATH: tl.constexpr,
    ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_BYTE: tl.constexpr, SWAP: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc += (a decode(b)) s_row s_column, where the step lies in one group of K."""
    weights = DECODE(b, w, expert, n, n0, inside, k0, PART, MATH, ELEMENT, SHIFT, PER_BYTE, K, BLOCK_N, BLOCK_K)
    if SWAP:
        left, right = weights, a.T
    else:
        left, right = a, weights.T
    if MATH == tl.int8:
        part = tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
    else:
        part = tl.dot(left, right, input_precision=PRECISION)
    s = block_scale(w.step_scale, expert, n, n0, inside, k0 // w.step_scale.block_k, PART)
    if x.step_scale is None:
        if w.step_scale.block_n == 0 or w.step_scale.uniform:
            return acc + part * s
        elif SWAP:
            return acc + part * s[:, None]
        else:
            return acc + part * s[None, :]
    else:
        group = (k0 // w.step_scale.block_k).to(tl.int64)
        address = x.step_scale.ptr + row.to(tl.int64) * x.step_scale.stride_row + group * x.step_scale.stride_group
        r = tl.load(address, mask=live, other=0.0)
        if w.step_scale.block_n == 0 or w.step_scale.uniform:
            r = r * s
            if SWAP:
                return acc + part * r[None, :]
            else:
                return acc + part * r[:, None]
        elif SWAP:
            return acc + part * (s[:, None] * r[None, :])
        else:
            return acc + part * (r[:, None] * s[None, :])


@triton.jit
def nothing(acc, x, w, row, live, expert, n, n0, inside, PART: tl.constexpr):
    """There are no scales."""
    return acc


@triton.jit
def scales(acc, x, w, row, live, expert, n, n0, inside, PART: tl.constexpr):
    """float32, times the scales that hold for whole rows and columns."""
    acc = acc.to(tl.float32)
    if x.final_scale is not None:
        r = tl.load(x.final_scale.ptr + row.to(tl.int64) * x.final_scale.stride_row, mask=live, other=0.0)
        acc = acc * r[:, None]
    if w.final_scale is not None:
        s = block_scale(w.final_scale, expert, n, n0, inside, expert * 0, PART)
        if w.final_scale.block_n == 0 or w.final_scale.uniform:
            acc = acc * s
        else:
            acc = acc * s[None, :]
    if w.tensor_scale is not None:
        acc = acc * tl.load(w.tensor_scale + expert)
    return acc
