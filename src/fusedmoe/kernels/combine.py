"""Sum the down-projected rows of a token: ``out[t] = sum_j w[t, j] * y[ROW(t * top_k + j)]`` over present experts.

Grid: (T, blocks of H). (1) float32 sum in slot order, one rounding: the same bits in every run and for
every batch. (2) Rows of absent experts are never read, so nothing unwritten can reach the output.
(3) Every element of ``out`` is written: a token without a present expert gets +0. (4) The weights are 1 where none are
given: those of the layer are in its rows already. ROW says where a row lies: sorted by expert (``by_row``), at its slot
(``by_slot``), or, rows that came from elsewhere, where its id says (``by_id``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.tiles import local_expert, n_slots


@triton.jit
def by_row(schedule, slot, number):
    return tl.load(schedule.row + slot)  # an absent slot has none, and what it finds is not used


@triton.jit
def by_slot(schedule, slot, number):
    return slot


@triton.jit
def by_id(schedule, slot, number):
    return number


@triton.jit
def combine(
    ids, schedule, y_ptr, y_stride_row, weight_ptr, weight_stride_t, weight_stride_j,
    out_ptr, out_stride_t, out_stride_h,
    WAIT: tl.constexpr, ROW: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    WAIT()
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for j in tl.static_range(ids.top_k):
        slot = token * ids.top_k + j
        number = local_expert(ids, slot, slot < n_slots(ids))
        present = number >= 0
        row = ROW(schedule, slot, number).to(tl.int64)
        y = tl.load(y_ptr + row * y_stride_row + h, mask=(h < H) & present, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + token.to(tl.int64) * weight_stride_t + j * weight_stride_j).to(tl.float32)
            y = tl.where(present, y * w, 0.0)  # the weight of an absent expert may be NaN
        total += y
    address = out_ptr + token.to(tl.int64) * out_stride_t + h.to(tl.int64) * out_stride_h
    tl.store(address, total.to(out_ptr.dtype.element_ty), mask=h < H)
