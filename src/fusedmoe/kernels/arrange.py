"""The order of the columns of rows in memory: policies ARRANGE ``f(a [rows, columns]) -> a``, and a kernel for one.

``as_they_are``; or the order in which weights that are decoded by the word (kernels/words.py) have their columns:
that of the rows that they multiply must be the same. Columns move within whole groups of 32 or 16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_they_are(a):
    return a


@triton.jit
def by_words_of_eight(a):
    """Code 4 h + 2 j + i of word q is column 16 j + 8 i + 2 q + h of 32."""
    groups = tl.reshape(a, (a.shape[0], a.shape[1] // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(groups, (0, 1, 4, 5, 2, 3)), a.shape)


@triton.jit
def by_words_of_four(a):
    """Code 2 i + h of word q is column 8 i + 2 q + h of 16."""
    groups = tl.reshape(a, (a.shape[0], a.shape[1] // 16, 4, 2, 2))
    return tl.reshape(tl.permute(groups, (0, 1, 3, 2, 4)), a.shape)


@triton.jit
def arrange(
    x, out_ptr, out_stride_row,
    WAIT: tl.constexpr, RELEASE: tl.constexpr, ARRANGE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, blocks of K). Rows in another order of columns."""
    WAIT()
    RELEASE()
    row = tl.program_id(0).to(tl.int64)
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    value = tl.load(x.ptr + row * x.stride_row + k.to(tl.int64) * x.stride_k, mask=k < K, other=0.0)
    tl.store(out_ptr + row * out_stride_row + k, ARRANGE(value), mask=k < K)
