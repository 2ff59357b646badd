"""The grouped matrix product of single rows, on the ordinary cores, with everything that follows it.

    out[dest] = ACTIVATION(EPILOGUE(x[index] @ w[expert].T))        TURNS 1: for the slot of a program
    out[t]    = sum_j EPILOGUE(x[t top_k + j] @ w[expert_j].T)      TURNS top_k: the end of a layer, no rows to combine

A row alone leaves a tensor core 15 of 16 parts idle and itself waiting: weights pass through shared memory, barriers
and the instruction's latency, step by step. Here a thread takes 16 bytes of a row of weights into registers, decodes
them, multiplies them by its part of x and adds up; weights are read as a copy reads them.

Grid: one dimension, (groups of TURNS slots, blocks of columns). A tile is [J, BLOCK_N, BLOCK_K]: J >= TURNS slots at
once. (1) The first weights are asked for before the launch waits for the one before, since none writes weights. (2)
Every thread keeps the sums of its own columns of K until all are added: one reduction a program. (3) A slot of an
absent expert reads neither weights nor rows, and adds +0. (4) float32 throughout, rows added in slot order: the same
bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.epilogue import weight_of
from fusedmoe.kernels.scales import of_chunks, of_whole_rows, row_of, rows_of_chunks, zeros_of_chunks
from fusedmoe.kernels.store import keep, write


@triton.jit
def _rows(x, row, live, k, K: tl.constexpr):
    """[J, BLOCK_K], float32."""
    address = x.ptr + row.to(tl.int64)[:, None] * x.stride_row + k.to(tl.int64)[None, :] * x.stride_k
    return tl.load(address, mask=live[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _weights(
    w, expert, n, k0, inside, PLACE: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr, PER_ITEM: tl.constexpr,
):  # fmt: skip
    """[J, BLOCK_N, BLOCK_K / PER_ITEM] of the rows n, and nothing where there is no expert."""
    k = k0 // PER_ITEM + tl.arange(0, BLOCK_K // PER_ITEM)
    base = w.ptr + PLACE(w, expert[:, None, None], n[None, :, None])
    mask = (expert >= 0)[:, None, None]
    if MASKED:
        mask = mask & (k < K // PER_ITEM)[None, None, :]
    if RAGGED:
        mask = mask & inside[None, :, None]
    return tl.load(
        base + k.to(tl.int64)[None, None, :] * w.stride_k, mask=mask, other=0.0, eviction_policy="evict_first"
    )


@triton.jit
def of_expert(w, expert, n):
    """PLACE of a row of an expert."""
    return expert.to(tl.int64) * w.stride_e * w.unit + n.to(tl.int64) * w.stride_n * w.unit


@triton.jit
def _added(
    acc, b, a, x, w, expert, live, scale_row, n, n0, inside, k0, PART: tl.constexpr,
    ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, GROUP: tl.constexpr,
    K: tl.constexpr, J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of CHUNK columns, [J, BLOCK_N, CHUNKS], added to those of earlier tiles."""
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    if PER_ITEM == 2:
        b = tl.reshape(tl.join(b & 15, b >> 4), (J, BLOCK_N, BLOCK_K))
    if ELEMENT is None:
        value = b.to(tl.float32)
    elif SHIFT is None:
        value = ELEMENT(b, 0.0)
    else:
        value = ELEMENT(b, SHIFT)
    part = tl.sum(tl.reshape(value * a[:, None, :], (J, BLOCK_N, CHUNKS, CHUNK)), 3)
    if SHIFT is None:  # sum of (q - z) a
        z = zeros_of_chunks(w, expert, n, inside, k0, PART, K, CHUNKS, CHUNK)
        part -= z * tl.sum(tl.reshape(a, (J, CHUNKS, CHUNK)), 2)[:, None, :]
    if w.scale_at == "step":
        part *= of_chunks(w.scale, expert, n, n0, inside, k0, PART, K, CHUNKS, CHUNK)
    if x.scale_at == "step":
        part *= rows_of_chunks(x, scale_row, live, k0, GROUP, K, CHUNKS, CHUNK)
    return acc + part


@triton.jit
def grouped_gemv(
    ids, x, w, out, e, p,  # Ids, Rows, Weight, Output, Epilogue, Parameters
    k_end,  # K at run time, as grouped_gemm's
    WAIT: tl.constexpr, RELEASE: tl.constexpr, MATRIX: tl.constexpr, PLACE: tl.constexpr,
    TURNS: tl.constexpr, J: tl.constexpr,
    ELEMENT: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, GROUP: tl.constexpr,
    FINISH: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, GATE_UP: tl.constexpr,
    STORE: tl.constexpr, ARRANGE: tl.constexpr, ENCODE: tl.constexpr, LARGEST: tl.constexpr, OUT_GROUP: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = N if GATE_UP is None else N // 2
    N_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    RAGGED: tl.constexpr = COLUMNS % BLOCK_N != 0
    MASKED: tl.constexpr = K % BLOCK_K != 0
    PART: tl.constexpr = 1 if GATE_UP == "concatenated" else 0  # of the up rows, among scales
    EACH: tl.constexpr = 2 if GATE_UP == "interleaved" else 1
    group = tl.program_id(0) // N_BLOCKS
    first_column = tl.program_id(0) % N_BLOCKS * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < COLUMNS
    n0, n = first_column * EACH, column * EACH
    up = n + (1 if GATE_UP == "interleaved" else w.up)
    n_up = up if GATE_UP == "interleaved" else n  # scales are counted from the first row of a part
    k = tl.arange(0, BLOCK_K)
    turn = tl.arange(0, J)
    slot = group * TURNS + turn

    expert = MATRIX(ids, slot, turn < TURNS)
    b = _weights(w, expert, n, 0, inside, PLACE, MASKED, RAGGED, K, BLOCK_K, PER_ITEM)
    if GATE_UP is not None:
        b_up = _weights(w, expert, up, 0, inside, PLACE, MASKED, RAGGED, K, BLOCK_K, PER_ITEM)
    WAIT()
    RELEASE()
    live, at = expert >= 0, tl.maximum(expert, 0)
    row = slot if x.per is None else slot // x.per
    scale_row = row_of(x, row, slot)
    acc = tl.zeros((J, BLOCK_N, BLOCK_K // CHUNK), tl.float32)
    acc_up = tl.zeros((J, BLOCK_N, BLOCK_K // CHUNK), tl.float32)
    a = _rows(x, row, live, k, K)
    acc = _added(
        acc, b, a, x, w, at, live, scale_row, n, n0, inside, 0, 0,
        ELEMENT, SHIFT, PER_ITEM, GROUP, K, J, BLOCK_N, BLOCK_K, CHUNK,
    )  # fmt: skip
    if GATE_UP is not None:
        acc_up = _added(
            acc_up, b_up, a, x, w, at, live, scale_row, n_up, n0, inside, 0, PART,
            ELEMENT, SHIFT, PER_ITEM, GROUP, K, J, BLOCK_N, BLOCK_K, CHUNK,
        )  # fmt: skip
    if BLOCK_K < K:
        for k0 in tl.range(BLOCK_K, k_end, BLOCK_K, num_stages=1):
            b = _weights(w, expert, n, k0, inside, PLACE, MASKED, RAGGED, K, BLOCK_K, PER_ITEM)
            if GATE_UP is not None:
                b_up = _weights(w, expert, up, k0, inside, PLACE, MASKED, RAGGED, K, BLOCK_K, PER_ITEM)
            a = _rows(x, row, live, k0 + k, K)
            acc = _added(
                acc, b, a, x, w, at, live, scale_row, n, n0, inside, k0, 0,
                ELEMENT, SHIFT, PER_ITEM, GROUP, K, J, BLOCK_N, BLOCK_K, CHUNK,
            )  # fmt: skip
            if GATE_UP is not None:
                acc_up = _added(
                    acc_up, b_up, a, x, w, at, live, scale_row, n_up, n0, inside, k0, PART,
                    ELEMENT, SHIFT, PER_ITEM, GROUP, K, J, BLOCK_N, BLOCK_K, CHUNK,
                )  # fmt: skip

    sums, sums_up = tl.sum(acc, 2), tl.sum(acc_up, 2)
    total = tl.zeros((1, BLOCK_N), tl.float32)
    for j in tl.static_range(TURNS):
        # What follows a product is for rows of one expert.
        mine = turn == j
        one = tl.max(tl.where(mine, at, 0), 0)
        there = tl.max((mine & live).to(tl.int32), 0) + tl.zeros((1,), tl.int32)
        its_slot = group * TURNS + j + tl.zeros((1,), tl.int32)
        its_row = its_slot if x.per is None else its_slot // x.per
        r = of_whole_rows(x, row_of(x, its_row, its_slot), there > 0)
        weight = weight_of(e, its_slot, there > 0)
        result = tl.sum(tl.where(mine[:, None], sums, 0.0), 0)[None, :]
        result = FINISH(result, x, w, r, one, n, n0, inside, 0)
        result = EPILOGUE(result, e, weight, one, its_slot, there > 0, n, inside)
        if GATE_UP is not None:
            other = tl.sum(tl.where(mine[:, None], sums_up, 0.0), 0)[None, :]
            other = FINISH(other, x, w, r, one, n_up, n0, inside, PART)
            other = EPILOGUE(other, e, weight, one, its_slot, there > 0, up, inside)
            result = ACTIVATION(result, other, p)
        elif ACTIVATION is not None:
            result = ACTIVATION(result, p)
        total += tl.where(there[:, None] > 0, result, 0.0)

    dest = group + tl.zeros((1,), tl.int32)
    keep(total, out, dest, dest >= 0, column, COLUMNS)
    value = STORE(total, out, dest, dest >= 0, column, COLUMNS, 1, BLOCK_N, ENCODE, LARGEST, OUT_GROUP)
    write(ARRANGE(value), out, dest, dest >= 0, column, COLUMNS)
