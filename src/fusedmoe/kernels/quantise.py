"""Quantise rows, when no epilogue could: ``codes[r] = ENCODE(x[r] / scale[r])``.

Grid: a program for every row, or every ROWS of them. (1) A row that no live slot needs is neither read nor written;
LIVE says which: ``token`` (row t serves the slots of token t), ``slot`` (row s is slot s) or ``sorted_row``. (2) Scales
are per row, also where all rows have the same: a NaN in a row of integers has no other place to go. (3) Columns past K
are not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels import encode
from fusedmoe.kernels.tiles import local_expert, n_slots


@triton.jit
def all_rows(ids, schedule, row):
    return row >= 0


@triton.jit
def token(ids, schedule, row):
    """Some slot of the token is live."""
    live = row < 0
    for j in tl.static_range(ids.top_k):
        slot = row * ids.top_k + j
        live = live | (local_expert(ids, slot, slot < n_slots(ids)) >= 0)
    return live


@triton.jit
def slot(ids, schedule, row):
    return local_expert(ids, row, row < n_slots(ids)) >= 0


@triton.jit
def sorted_row(ids, schedule, row):
    return row < tl.load(schedule.offset + ids.n_local)


@triton.jit
def _load(x, row, live, k, K: tl.constexpr):
    address = x.ptr + row.to(tl.int64)[:, None] * x.stride_row + k.to(tl.int64)[None, :] * x.stride_k
    return tl.load(address, mask=live[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _largest(x, row, live, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest magnitude of each row."""
    largest = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        largest = tl.maximum(largest, encode.magnitude(_load(x, row, live, k0 + tl.arange(0, BLOCK_K), K)))
    return tl.max(largest, 1)


@triton.jit
def zero(ptr, WAIT: tl.constexpr, RELEASE: tl.constexpr, N: tl.constexpr):
    """Grid: one program. Start of a maximum."""
    WAIT()
    RELEASE()
    tl.store(ptr + tl.arange(0, N), 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def amax(
    ids, schedule, x, out, n_rows,
    WAIT: tl.constexpr, RELEASE: tl.constexpr, LIVE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of all live rows."""
    WAIT()
    RELEASE()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = LIVE(ids, schedule, row) & (row < n_rows)
    bits = tl.max(_largest(x, row, live, K, ROWS, BLOCK_K), 0).to(tl.int32, bitcast=True)
    tl.atomic_max(out.to(tl.pointer_type(tl.int32)), bits, sem="relaxed")


@triton.jit
def _encoded(value, s, static_ptr, ENCODE: tl.constexpr, ARRANGE: tl.constexpr, TYPE: tl.constexpr):
    """Codes of rows. A scale that was given is not made from the largest of them, as ``quotient`` asks for."""
    if static_ptr is not None:
        return ARRANGE(ENCODE(tl.div_rn(value, s[:, None]), TYPE))
    else:
        return ARRANGE(ENCODE(encode.quotient(value, s[:, None]), TYPE))


@triton.jit(do_not_specialize=["n_rows"])
def quantise_rows(
    ids, schedule, x, codes, stride_row, scale, amax_ptr, static_ptr, n_rows,
    WAIT: tl.constexpr, RELEASE: tl.constexpr, LIVE: tl.constexpr, ARRANGE: tl.constexpr,
    ENCODE: tl.constexpr, LARGEST: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A scale per row: of its own, from the maximum over all rows, or given. Rows of one block are read once."""
    WAIT()
    RELEASE()
    TYPE: tl.constexpr = codes.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = LIVE(ids, schedule, row) & (row < n_rows)
    to = codes + row.to(tl.int64)[:, None] * stride_row
    k = tl.arange(0, BLOCK_K)
    value = _load(x, row, live, k, K)
    bad = encode.broken(value, 1)
    if static_ptr is not None:
        s = tl.load(static_ptr) + tl.zeros((ROWS,), tl.float32)
    elif amax_ptr is not None:
        s = encode.scale_of(tl.load(amax_ptr), LARGEST) + tl.zeros((ROWS,), tl.float32)
    elif K <= BLOCK_K:
        s = encode.scale_of(tl.max(encode.magnitude(value), 1), LARGEST)
    else:
        s = encode.scale_of(_largest(x, row, live, K, ROWS, BLOCK_K), LARGEST)
    code = _encoded(value, s, static_ptr, ENCODE, ARRANGE, TYPE)
    tl.store(to + k[None, :], code, mask=live[:, None] & (k < K)[None, :])
    if K > BLOCK_K:
        for k0 in range(BLOCK_K, K, BLOCK_K):
            value = _load(x, row, live, k0 + k, K)
            bad = bad | encode.broken(value, 1)
            code = _encoded(value, s, static_ptr, ENCODE, ARRANGE, TYPE)
            tl.store(to + (k0 + k)[None, :], code, mask=live[:, None] & (k0 + k < K)[None, :])
    if encode.int8 == ENCODE:
        s = tl.where(bad != 0, float("nan"), s)
    tl.store(scale + row, s, mask=live)


@triton.jit
def quantise_groups(
    ids, schedule, x, codes, stride_row, scale, stride_scale,
    WAIT: tl.constexpr, RELEASE: tl.constexpr, LIVE: tl.constexpr, ENCODE: tl.constexpr, LARGEST: tl.constexpr,
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A scale per row and GROUP columns; BLOCK_GROUP is the power of two that holds a group. Grid: (rows, groups)."""
    WAIT()
    RELEASE()
    row = tl.program_id(0)
    if LIVE(ids, schedule, row):
        group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
        within = tl.arange(0, BLOCK_GROUP)
        k = group[:, None] * GROUP + within[None, :]
        inside = (within < GROUP)[None, :] & (k < K)
        address = x.ptr + row.to(tl.int64) * x.stride_row + k.to(tl.int64) * x.stride_k
        value = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        s = encode.scale_of(tl.max(encode.magnitude(value), 1), LARGEST)
        if encode.int8 == ENCODE:
            s = tl.where(encode.broken(value, 1) != 0, float("nan"), s)
        code = ENCODE(encode.quotient(value, s[:, None]), codes.dtype.element_ty)
        tl.store(codes + row.to(tl.int64) * stride_row + k, code, mask=inside)
        there = group < (K + GROUP - 1) // GROUP
        tl.store(scale + row.to(tl.int64) * stride_scale + group, s, mask=there)
