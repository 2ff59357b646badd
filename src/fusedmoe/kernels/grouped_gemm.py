"""The grouped GEMM of both halves of the layer, with everything that follows a dot in its epilogue.

    out[dest] = ACTIVATION(EPILOGUE(x[index] @ w[expert].T))        for every live row of every tile

Grid: one dimension. (1) Tile numbers ``first, first + step ... < last`` belong to this program; with as
many programs as tiles each does one, with fewer the kernel is persistent. (2) A live row belongs to
exactly one tile, so each element of ``out`` that is read later is written exactly once. (3) Rows that
are not live are neither read from memory by pointer nor stored.

Gate and up: ``GATE_UP`` None: one accumulator and an activation of one argument (or none);
"concatenated": two accumulators, the up rows lie ``w.up`` rows further;
"interleaved": one accumulator of twice the width, split in registers; "pairs": the same, of rows that lie apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.epilogue import weight_of
from fusedmoe.kernels.load import in_pairs
from fusedmoe.kernels.scales import of_rows, of_whole_rows, row_of
from fusedmoe.kernels.store import keep


@triton.jit
def _column(k, GROUP: tl.constexpr, STRIDE: tl.constexpr):
    """First column of the step at k: groups of GROUP columns take STRIDE each, so that no step crosses one."""
    k = tl.cast(k, tl.int32)
    if GROUP != STRIDE:
        k = k // STRIDE * GROUP + k % STRIDE
    return k


@triton.jit
def grouped_gemm(
    ids, schedule, x, w, out, e, p,  # Ids, Schedule, Rows, Weight, Output, Epilogue, Parameters
    x_desc, w_desc,  # tensor maps, or None
    k_end,  # K (padded by STRIDE) at run time: a constant trip count makes LLVM unroll short loops until they spill
    WAIT: tl.constexpr, RELEASE: tl.constexpr, SPAN: tl.constexpr, LOCATE: tl.constexpr,
    LOAD_X: tl.constexpr, LOAD_W: tl.constexpr, LOAD_SCALES: tl.constexpr,
    STEP: tl.constexpr, DECODE: tl.constexpr, ELEMENT: tl.constexpr, FINISH: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, GATE_UP: tl.constexpr, STORE: tl.constexpr,
    ARRANGE: tl.constexpr, WRITE: tl.constexpr, ENCODE: tl.constexpr, LARGEST: tl.constexpr, OUT_GROUP: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,  # rows of w, inner size
    GROUP: tl.constexpr, STRIDE: tl.constexpr,  # steps stay within GROUP columns of K, which take STRIDE; or K and K
    MATH: tl.constexpr, ACCUMULATE: tl.constexpr, SHIFT: tl.constexpr, PER_ITEM: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, FEW: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # BLOCK_N counts output columns; where they alternate, both rows of a column are loaded.
    ALTERNATE: tl.constexpr = GATE_UP == "interleaved" or GATE_UP == "pairs"
    WIDE: tl.constexpr = 2 * BLOCK_N if ALTERNATE else BLOCK_N
    COLUMNS: tl.constexpr = N if GATE_UP is None else N // 2
    PART_COLUMNS: tl.constexpr = COLUMNS if GATE_UP == "concatenated" else N
    RAGGED: tl.constexpr = COLUMNS % BLOCK_N != 0
    N_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    MASKED: tl.constexpr = K % BLOCK_K != 0 or GROUP != STRIDE
    first, last, step = SPAN(ids, schedule, N_BLOCKS, BLOCK_M, FEW, WAIT)
    RELEASE()
    for i in tl.range(first, last, step, flatten=FLATTEN):
        expert, row0, row, slot, live, block_n = LOCATE(i, ids, schedule, N_BLOCKS, BLOCK_M, GROUP_M, FEW)
        index = row if x.per is None else slot // x.per
        scale_row = row_of(x, row, slot)
        n0 = block_n * WIDE
        n = n0 + tl.arange(0, WIDE)
        inside = n < PART_COLUMNS
        ROWS: tl.constexpr = WIDE if SWAP else BLOCK_M
        acc = tl.zeros((ROWS, BLOCK_M + WIDE - ROWS), ACCUMULATE)
        if GATE_UP == "concatenated":
            acc_up = tl.zeros((ROWS, BLOCK_M + WIDE - ROWS), ACCUMULATE)
        # Too small for asynchronous copies, scales are loaded a step before they are needed.
        r = of_rows(x, scale_row, live, expert * 0, GROUP)
        s, z = LOAD_SCALES(w, expert, n, n0, inside, expert * 0, 0, K, BLOCK_K)
        if GATE_UP == "concatenated":
            s_up, z_up = LOAD_SCALES(w, expert, n, n0, inside, expert * 0, 1, K, BLOCK_K)
        tl.assume(k_end > 0)  # without it ptxas may serialise WGMMA, one wait per K step
        for k in tl.range(0, k_end, BLOCK_K):
            k0, limit = _column(k, GROUP, STRIDE), K
            if GROUP != STRIDE:
                limit = tl.minimum(k0 // GROUP * GROUP + GROUP, K)
            a = LOAD_X(x, x_desc, index, live, row0, k0, limit, MASKED, BLOCK_M, BLOCK_K)
            b = LOAD_W(w, w_desc, expert, n0, k0, limit, N, MASKED, WIDE, BLOCK_K, PER_ITEM, RAGGED)
            ahead = tl.minimum(_column(k + BLOCK_K, GROUP, STRIDE), K - 1)
            r_next = of_rows(x, scale_row, live, ahead, GROUP)
            s_next, z_next = LOAD_SCALES(w, expert, n, n0, inside, ahead, 0, K, BLOCK_K)
            acc = STEP(acc, a, b, s, z, r, x, w, DECODE, MATH, ELEMENT, SHIFT, PER_ITEM, SWAP, WIDE, BLOCK_K, PRECISION)
            s, z = s_next, z_next
            if GATE_UP == "concatenated":
                b = LOAD_W(w, w_desc, expert, w.up + n0, k0, limit, N, MASKED, WIDE, BLOCK_K, PER_ITEM, RAGGED)
                s_up_next, z_up_next = LOAD_SCALES(w, expert, n, n0, inside, ahead, 1, K, BLOCK_K)
                acc_up = STEP(
                    acc_up, a, b, s_up, z_up, r, x, w, DECODE, MATH, ELEMENT, SHIFT, PER_ITEM, SWAP, WIDE,
                    BLOCK_K, PRECISION,
                )  # fmt: skip
                s_up, z_up = s_up_next, z_up_next
            r = r_next

        if SWAP:
            acc = tl.trans(acc)
        r_all = of_whole_rows(x, scale_row, live)
        acc = FINISH(acc, x, w, r_all, expert, n, n0, inside, 0)
        weight = weight_of(e, slot, live)
        if GATE_UP == "pairs":
            n = in_pairs(n, w)
        acc = EPILOGUE(acc, e, weight, expert, slot, live, n, inside)
        if GATE_UP == "concatenated":
            if SWAP:
                acc_up = tl.trans(acc_up)
            acc_up = FINISH(acc_up, x, w, r_all, expert, n, n0, inside, 1)
            acc_up = EPILOGUE(acc_up, e, weight, expert, slot, live, w.up + n, inside)
            result = ACTIVATION(acc, acc_up, p)
        elif ALTERNATE:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
            result = ACTIVATION(gate, up, p)
        elif ACTIVATION is not None:
            result = ACTIVATION(acc, p)
        else:
            result = acc

        dest = slot if out.by_slot else row
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        keep(result, out, dest, live, column, COLUMNS)
        value = STORE(result, out, dest, live, column, COLUMNS, BLOCK_M, BLOCK_N, ENCODE, LARGEST, OUT_GROUP)
        WRITE(ARRANGE(value), out, dest, live, column, COLUMNS)
