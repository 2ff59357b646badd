"""Loads of a K step of the left and the right operand: by pointer (any strides) or by tensor map (sm_90+).

Left operand:  ``f(x, desc, index, live, row, k0, limit, MASKED, BLOCK_M, BLOCK_K) -> [BLOCK_M, BLOCK_K]``.
Right operand: ``f(w, desc, expert, n0, k0, limit, N, MASKED, BLOCK_N, BLOCK_K, PER_ITEM, RAGGED)
-> [BLOCK_K / PER_ITEM, BLOCK_N]``; an item holds PER_ITEM codes.

Elements outside K are 0 on both sides (MASKED: the step may reach past ``limit``); elements outside N, and rows that
are not live, may be anything finite or not: a row or column of a product depends on no other, and neither is ever
stored. RAGGED: the last block of columns reaches past N (or, of a concatenated w13, past the up rows).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_by_pointer(
    x, desc, index, live, row, k0, limit, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    k = k0 + tl.arange(0, BLOCK_K)
    address = x.ptr + index.to(tl.int64)[:, None] * x.stride_row + k.to(tl.int64)[None, :] * x.stride_k
    mask = live[:, None]
    if MASKED:
        mask = mask & (k < limit)[None, :]
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def rows_by_map(
    x, desc, index, live, row, k0, limit, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    return desc.load([row, k0])


@triton.jit
def weight_by_pointer(
    w, desc, expert, n0, k0, limit, N: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_ITEM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 // PER_ITEM + tl.arange(0, BLOCK_K // PER_ITEM)
    base = w.ptr + expert.to(tl.int64) * w.stride_e * w.unit
    address = base + n.to(tl.int64)[None, :] * w.stride_n * w.unit + k.to(tl.int64)[:, None] * w.stride_k
    if MASKED:
        return tl.load(address, mask=(k < limit // PER_ITEM)[:, None] & (n < N)[None, :], other=0.0)
    elif RAGGED:
        return tl.load(address, mask=(n < N)[None, :], other=0.0)
    else:
        return tl.load(address)


@triton.jit
def weight_pairs_by_pointer(
    w, desc, expert, n0, k0, limit, N: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_ITEM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Rows of gate and up in turns, which lie apart."""
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    base = w.ptr + expert.to(tl.int64) * w.stride_e * w.unit
    row = in_pairs(n, w)
    address = base + row.to(tl.int64)[None, :] * w.stride_n * w.unit + k.to(tl.int64)[:, None] * w.stride_k
    return tl.load(address, mask=(k < limit)[:, None] & (n < N)[None, :], other=0.0)


@triton.jit
def in_pairs(n, w):
    """The row of the n-th of gate and up in turns."""
    return n // 2 + n % 2 * w.up


@triton.jit
def weight_by_map_nk(
    w, desc, expert, n0, k0, limit, N: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_ITEM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    return desc.load([expert * w.rows_per_expert + n0, k0 // PER_ITEM]).T


@triton.jit
def weight_by_map_kn(
    w, desc, expert, n0, k0, limit, N: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_ITEM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    return desc.load([expert * w.rows_per_expert + k0, n0])
