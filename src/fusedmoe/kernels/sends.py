"""Rows before they travel: which token goes to which rank, where its answer will be, and the messages.

Three launches. ``count`` and ``place`` have a program per chunk of CHUNK tokens, ``pack`` one per row.

(1) A token goes to a rank once, however many of its experts are there. (2) Rows are in the order of ranks, then of
tokens: no atomics, so two runs give the same bits. (3) Nothing depends on the host: rows for rank r start where those
for the ranks before it end or, with a CAPACITY, at r * CAPACITY. (4) Of COPIES of an expert a slot takes the one that a
hash of its token says.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(
    ids_ptr, stride_t, stride_j, places_ptr, copies_ptr, token, j, inside, n_experts, rank, COPIES: tl.constexpr
):
    """Place of a slot's expert; -1 where it is absent."""
    expert = tl.load(ids_ptr + token.to(tl.int64) * stride_t + j * stride_j, mask=inside, other=-1)
    present = (expert >= 0) & (expert < n_experts)
    expert = tl.where(present, expert, n_experts).to(tl.int32)
    if COPIES == 1:
        return tl.load(places_ptr + expert)
    mixed = (((token.to(tl.int64) + 7919 * rank) * 2654435769) & 0xFFFFFFFF) >> 16
    return tl.load(places_ptr + expert * COPIES + (mixed % tl.load(copies_ptr + expert)).to(tl.int32))


@triton.jit(do_not_specialize=["n_tokens", "rank"])
def count(
    ids_ptr, stride_t, stride_j, places_ptr, copies_ptr, chosen_ptr, base_ptr, n_tokens, rank,
    E: tl.constexpr, COPIES: tl.constexpr, TOP_K: tl.constexpr, RANKS: tl.constexpr, EACH: tl.constexpr,
    R_PAD: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Places of a chunk's slots, and how many of its tokens go to each rank."""
    chunk = tl.program_id(0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    r = tl.arange(0, R_PAD)
    goes = tl.zeros((CHUNK, R_PAD), tl.int32)
    for j in tl.static_range(TOP_K):
        inside = token < n_tokens
        place = _place(ids_ptr, stride_t, stride_j, places_ptr, copies_ptr, token, j, inside, E, rank, COPIES)
        tl.store(chosen_ptr + token.to(tl.int64) * TOP_K + j, place, mask=inside)
        goes = goes | ((place >= 0)[:, None] & ((place // EACH)[:, None] == r[None, :])).to(tl.int32)
    tl.store(base_ptr + chunk * RANKS + r, tl.sum(goes, 0), mask=r < RANKS)


@triton.jit(do_not_specialize=["n_tokens", "n_chunks", "capacity"])
def place(
    chosen_ptr, base_ptr, counts_ptr, token_ptr, answer_ptr, n_tokens, n_chunks, capacity,
    TOP_K: tl.constexpr, RANKS: tl.constexpr, EACH: tl.constexpr, R_PAD: tl.constexpr, CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Token of each row, and row of each answer."""
    chunk = tl.program_id(0)
    r = tl.arange(0, R_PAD)
    total = tl.zeros((R_PAD,), tl.int32)
    earlier = tl.zeros((R_PAD,), tl.int32)
    for c in range(n_chunks):
        here = tl.load(base_ptr + c * RANKS + r, mask=r < RANKS, other=0)
        total += here
        earlier += tl.where(c < chunk, here, 0)
    start = r * capacity if PADDED else tl.cumsum(total, 0) - total
    if chunk == 0:
        tl.store(counts_ptr + r, total.to(tl.int64), mask=r < RANKS)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < n_tokens
    goes = tl.zeros((CHUNK, R_PAD), tl.int32)
    for j in tl.static_range(TOP_K):
        chosen = tl.load(chosen_ptr + token.to(tl.int64) * TOP_K + j, mask=inside, other=-1)
        goes = goes | ((chosen >= 0)[:, None] & ((chosen // EACH)[:, None] == r[None, :])).to(tl.int32)
    row = (start + earlier)[None, :] + tl.cumsum(goes, 0) - goes
    tl.store(token_ptr + row, tl.broadcast_to(token.to(tl.int64)[:, None], row.shape), mask=goes != 0)
    seen = tl.zeros((CHUNK, R_PAD), tl.int32)
    for j in tl.static_range(TOP_K):
        chosen = tl.load(chosen_ptr + token.to(tl.int64) * TOP_K + j, mask=inside, other=-1)
        mine = ((chosen >= 0)[:, None] & ((chosen // EACH)[:, None] == r[None, :])).to(tl.int32)
        first = tl.sum(mine * (1 - seen), 1) != 0
        answer = tl.where(first, tl.sum(mine * row, 1), -1)
        tl.store(answer_ptr + token.to(tl.int64) * TOP_K + j, answer, mask=inside)
        seen = seen | mine


@triton.jit
def _copy(x_ptr, x_stride, token, out_ptr, out_stride, row, N: tl.constexpr, BLOCK: tl.constexpr):
    for i0 in range(0, N, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + token * x_stride + i, mask=i < N, other=0)
        tl.store(out_ptr + row * out_stride + i, value, mask=i < N)


@triton.jit(do_not_specialize=["capacity"])
def pack(
    token_ptr, counts_ptr, capacity,
    x_ptr, x_stride, x_out, x_out_stride, scale_ptr, scale_stride, scale_out, scale_out_stride,
    chosen_ptr, chosen_out, chosen_out_stride, weight_ptr, weight_stride_t, weight_stride_j, weight_out,
    weight_out_stride, adapter_ptr, adapter_stride, adapter_out, adapter_out_stride,
    SLOTS: tl.constexpr, WORDS: tl.constexpr, GROUPS: tl.constexpr, TOP_K: tl.constexpr, K_PAD: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_G: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """A message; of a row that nobody fills only the places, which are absent."""
    row = tl.program_id(0).to(tl.int64)
    live = True
    if PADDED:
        live = row % capacity < tl.load(counts_ptr + row // capacity)
    j = tl.arange(0, K_PAD)
    if live:
        token = tl.load(token_ptr + row)
        _copy(x_ptr, x_stride, token, x_out, x_out_stride, row, WORDS, BLOCK)
        if scale_ptr is not None:
            _copy(scale_ptr, scale_stride, token, scale_out, scale_out_stride, row, GROUPS, BLOCK_G)
        weight = tl.load(weight_ptr + token * weight_stride_t + j * weight_stride_j, mask=j < TOP_K, other=0.0)
        tl.store(weight_out + row * weight_out_stride + j, weight.to(tl.float32), mask=j < TOP_K)
        if adapter_ptr is not None:
            slot = tl.load(adapter_ptr + token * adapter_stride)
            slot = tl.where((slot >= 0) & (slot < SLOTS), slot, -1)  # before it is an int32
            tl.store(adapter_out + row * adapter_out_stride, slot.to(tl.int32))
        chosen = tl.load(chosen_ptr + token * TOP_K + j, mask=j < TOP_K, other=-1)
        tl.store(chosen_out + row * chosen_out_stride + j, chosen, mask=j < TOP_K)
    else:
        tl.store(chosen_out + row * chosen_out_stride + j, -1, mask=j < TOP_K)
