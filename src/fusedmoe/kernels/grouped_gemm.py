"""The grouped GEMM of both halves of the layer, with everything that follows a dot in its epilogue.

    out[dest] = ACTIVATION(EPILOGUE(x[index] @ w[expert].T))        for every live row of every tile

Grid: one dimension. (1) Tile numbers ``first, first + step ... < last`` belong to this program; with as
many programs as tiles each does one, with fewer the kernel is persistent. (2) A live row belongs to
exactly one tile, so each element of ``out`` that is read later is written exactly once. (3) Rows that
are not live are neither read from memory by pointer nor stored.

Gate and up: ``GATE_UP`` None: one accumulator and an activation of one argument (or none);
"concatenated": two accumulators, the up rows lie ``w.up`` rows further;
"interleaved": one accumulator of twice the width, split in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


# The ids carry S, which changes from call to call: it must not decide which variant is compiled.
@triton.jit(do_not_specialize=["ids"])
def grouped_gemm(
    ids, schedule, x, w, out, e, p,  # Ids, Schedule, Rows, Weight, Output, Epilogue, Parameters
    x_desc, w_desc,  # tensor maps, or None
    k_end,  # K again, at run time: a constant trip count makes LLVM unroll short loops until they spill
    WAIT: tl.constexpr, RELEASE: tl.constexpr, SPAN: tl.constexpr, LOCATE: tl.constexpr,
    LOAD_X: tl.constexpr, LOAD_W: tl.constexpr, STEP: tl.constexpr, FINISH: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, GATE_UP: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,  # rows of w, inner size
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, FEW: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # BLOCK_N counts output columns; the interleaved form loads both rows of a column.
    WIDE: tl.constexpr = 2 * BLOCK_N if GATE_UP == "interleaved" else BLOCK_N
    COLUMNS: tl.constexpr = N if GATE_UP is None else N // 2
    RAGGED: tl.constexpr = COLUMNS % BLOCK_N != 0
    N_BLOCKS: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    first, last, step = SPAN(ids, schedule, N_BLOCKS, BLOCK_M, FEW, WAIT)
    RELEASE()
    for i in tl.range(first, last, step, flatten=FLATTEN):
        expert, row0, row, slot, live, block_n = LOCATE(i, ids, schedule, N_BLOCKS, BLOCK_M, GROUP_M, FEW)
        index = row if x.per is None else slot // x.per
        n0 = block_n * WIDE
        acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
        if GATE_UP == "concatenated":
            acc_up = tl.zeros((BLOCK_M, WIDE), tl.float32)
        tl.assume(k_end > 0)  # without it ptxas may serialise WGMMA, one wait per K step
        for k0 in tl.range(0, k_end, BLOCK_K):
            a = LOAD_X(x, x_desc, index, live, row0, k0, K, BLOCK_M, BLOCK_K)
            b = LOAD_W(w, w_desc, expert, n0, k0, N, K, WIDE, BLOCK_K, RAGGED)
            acc = STEP(acc, a, b, x, w, PRECISION)
            if GATE_UP == "concatenated":
                b = LOAD_W(w, w_desc, expert, w.up + n0, k0, N, K, WIDE, BLOCK_K, RAGGED)
                acc_up = STEP(acc_up, a, b, x, w, PRECISION)

        n = n0 + tl.arange(0, WIDE)
        inside = n < (COLUMNS if GATE_UP == "concatenated" else N)
        acc = EPILOGUE(FINISH(acc, x, w), e, expert, slot, live, n, inside)
        if GATE_UP == "concatenated":
            acc_up = EPILOGUE(FINISH(acc_up, x, w), e, expert, slot, live, w.up + n, inside)
            result = ACTIVATION(acc, acc_up, p)
        elif GATE_UP == "interleaved":
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))
            result = ACTIVATION(gate, up, p)
        elif ACTIVATION is not None:
            result = ACTIVATION(acc, p)
        else:
            result = acc

        dest = slot if out.by_slot else row
        column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        address = out.ptr + dest.to(tl.int64)[:, None] * out.stride_row + column[None, :]
        tl.store(address, result.to(out.ptr.dtype.element_ty), mask=live[:, None] & (column < COLUMNS)[None, :])
