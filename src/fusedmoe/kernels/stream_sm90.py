"""The GEMM of Hopper for few rows an expert: what :mod:`fusedmoe.kernels.grouped_gemm` computes, by its policies.

Here weights are what takes time. One group of 4 warps streams them through a ring of STAGES buffers, by tensor map, and
copies the rows that they meet (cp.async, each row from its own address) on the same barrier. Another one multiplies,
with weights as the left operand: BLOCK_M = 16 or 32 rows are the narrow side of WGMMA. A tile has two sums of HALF rows
of weights: gate and up where they are concatenated, else two halves of its columns.

Grid: persistent, tile number ``program, program + programs, ...``, the tiles of a tile of rows one after the other; the
ring goes on from tile to tile. ``ready[stage]`` completes when a buffer is full, ``empty[stage]`` when it is used up.

Two policies wait for the launch before: WAIT, before the schedule is read, and WAIT_FOR_ROWS, after that and after the
weights that fill the ring; one of them does, the first where that launch made the schedule. Where both launches have a
multiprocessor's shared memory and registers beside each other, the stream of weights does not pause between two GEMMs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.hopper import (
    coalesced,
    conclude,
    copy,
    facts,
    load_box,
    next_stage,
    pointers,
    scales_of_halves,
    seen_as,
    tile_of,
    tokens_of,
)
from fusedmoe.kernels.scales import of_rows, row_of
from fusedmoe.kernels.step import add_scaled


@gluon.jit
def _load_weights(w_desc, w, expert, block_n, k, full, weights, stage, wanted, PARTS: gl.constexpr):
    """A step of weights into its buffer, if it is wanted."""
    BYTES: gl.constexpr = PARTS * weights.shape[1] * weights.shape[2] * weights.dtype.primitive_bitwidth // 8
    row = expert * w.rows_per_expert + block_n * weights.shape[1]
    mbarrier.expect(full, BYTES, pred=wanted)
    load_box(w_desc, [row, k], full, weights.index(stage * PARTS), pred=wanted)
    if PARTS == 2:
        load_box(w_desc, [row + w.up, k], full, weights.index(stage * PARTS + 1), pred=wanted)


@gluon.jit
def _produce(
    schedule, x, w, w_desc, rows, weights, ready, empty, first, step, k_end,
    WAIT_FOR_ROWS: gl.constexpr, PARTS: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, N_BLOCKS: gl.constexpr,
):  # fmt: skip
    AHEAD: gl.constexpr = min(STAGES, (K + BLOCK_K - 1) // BLOCK_K)  # steps of the first tile that fill the ring
    LAYOUT: gl.constexpr = coalesced(BLOCK_K, rows.dtype.primitive_bitwidth, gl.num_warps())
    column = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    # The first weights need the number of tiles and an expert alone, which are loaded at once; the table has as many
    # places as there are programs to a block of columns.
    n_tiles = gl.load(schedule.n_tiles)
    expert = gl.load(schedule.tile_expert + first // N_BLOCKS)
    there = first < n_tiles * N_BLOCKS
    expert = gl.where(there, expert, 0)
    for stage in gl.static_range(AHEAD):
        _load_weights(
            w_desc, w, expert, first % N_BLOCKS, stage * BLOCK_K, ready.index(stage), weights, stage, there, PARTS
        )
    WAIT_FOR_ROWS()
    expert, row0, end, block_n, _, _ = tile_of(first, n_tiles, schedule, None, False, N_BLOCKS, 1)
    index, live = tokens_of(row0, end, schedule, x, LAYOUT, BLOCK_M)
    stage = 0
    phase = 1
    for i in range(first, n_tiles * N_BLOCKS, step):
        # What the next tile needs is loaded a tile ahead: three loads, one after the other.
        next_expert, next_row0, next_end, next_block_n, _, _ = tile_of(
            i + step, n_tiles, schedule, None, False, N_BLOCKS, 1
        )
        next_index, next_live = tokens_of(next_row0, next_end, schedule, x, LAYOUT, BLOCK_M)
        at = pointers(x, index, column)
        for k in range(0, k_end, BLOCK_K):
            full = ready.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            wanted = (i != first) | (k >= AHEAD * BLOCK_K)
            _load_weights(w_desc, w, expert, block_n, k, full, weights, stage, wanted, PARTS)
            copy(at, live, column, rows.index(stage), k, K, BLOCK_K)
            async_copy.mbarrier_arrive(full, increment_count=False)
            at += BLOCK_K
            stage, phase = next_stage(stage, phase, STAGES)
        expert, block_n, index, live = next_expert, next_block_n, next_index, next_live


@gluon.jit
def _running_sums(rows, weights, ready, empty, stage, phase, left, right, k_end, BLOCK_K: gl.constexpr,
                  STAGES: gl.constexpr):  # fmt: skip
    """Both sums, over all of K."""
    for _ in range(0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(stage), phase)
        fence_async_shared()  # rows were written by cp.async, and WGMMA reads through the other proxy
        b = rows.index(stage).permute((1, 0))
        left = warpgroup_mma(weights.index(stage * 2), b, left, is_async=True)
        right = warpgroup_mma(weights.index(stage * 2 + 1), b, right, is_async=True)
        left, right = warpgroup_mma_wait(0, deps=(left, right))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return left, right, stage, phase


@gluon.jit
def _sums_of_groups(
    rows, weights, ready, empty, stage, phase, left, right, k_end, schedule, x, w, expert, row0, end, n0,
    PARTS: gl.constexpr, LIMIT: gl.constexpr, LOAD_SCALES: gl.constexpr, K: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Both sums, of the products of the steps times their scales, which are loaded a step ahead."""
    LAYOUT: gl.constexpr = left.type.layout
    row = row0 + gl.arange(0, left.shape[1], gl.SliceLayout(0, LAYOUT))
    live = row < end
    scale_row = row_of(x, row, gl.load(schedule.slot + row, mask=live, other=0))
    left_n = n0 + gl.arange(0, left.shape[0], gl.SliceLayout(1, LAYOUT))
    right_n = left_n if PARTS == 2 else left_n + left.shape[0]
    left_part = left
    right_part = right
    r = of_rows(x, scale_row, live, row0 * 0, BLOCK_K)
    s_left, s_right = scales_of_halves(
        w, expert, left_n, right_n, n0, row0 * 0, PARTS, LIMIT, K, BLOCK_K, LOAD_SCALES
    )  # fmt: skip
    for k in range(0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(stage), phase)
        fence_async_shared()
        b = rows.index(stage).permute((1, 0))
        left_part = warpgroup_mma(weights.index(stage * 2), b, left_part, use_acc=False, is_async=True)
        right_part = warpgroup_mma(weights.index(stage * 2 + 1), b, right_part, use_acc=False, is_async=True)
        ahead = gl.minimum(k + BLOCK_K, K - 1)
        r_next = of_rows(x, scale_row, live, ahead, BLOCK_K)
        s_left_next, s_right_next = scales_of_halves(
            w, expert, left_n, right_n, n0, ahead, PARTS, LIMIT, K, BLOCK_K, LOAD_SCALES
        )
        left_part, right_part = warpgroup_mma_wait(0, deps=(left_part, right_part))
        mbarrier.arrive(empty.index(stage), count=1)
        left = add_scaled(left, left_part, s_left, r, x, w, True)
        right = add_scaled(right, right_part, s_right, r, x, w, True)
        r, s_left, s_right = r_next, s_left_next, s_right_next
        stage, phase = next_stage(stage, phase, STAGES)
    return left, right, stage, phase


@gluon.jit
def _consume(
    schedule, x, w, out, e, p, rows, weights, ready, empty, first, step, k_end,
    WAIT_FOR_ROWS: gl.constexpr, SUM: gl.constexpr, ACCUMULATE: gl.constexpr, LOAD_SCALES: gl.constexpr,
    FINISH: gl.constexpr, EPILOGUE: gl.constexpr, ACTIVATION: gl.constexpr, GATE_UP: gl.constexpr,
    STORE: gl.constexpr, ARRANGE: gl.constexpr, ENCODE: gl.constexpr, LARGEST: gl.constexpr, OUT_GROUP: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    N_BLOCKS: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 2 if GATE_UP == "concatenated" else 1
    COLUMNS: gl.constexpr = N if GATE_UP is None else N // 2
    LIMIT: gl.constexpr = COLUMNS if PARTS == 2 else N  # columns of a part of the weights
    HALF: gl.constexpr = weights.shape[1]
    K_BITS: gl.constexpr = 256 // rows.dtype.primitive_bitwidth
    SUMMED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_M, K_BITS])
    ROW: gl.constexpr = coalesced(HALF, 16, gl.num_warps())
    WAIT_FOR_ROWS()
    stage = 0
    phase = 0
    n_tiles = gl.load(schedule.n_tiles)
    expert, row0, end, block_n, _, _ = tile_of(first, n_tiles, schedule, None, False, N_BLOCKS, 1)
    for i in range(first, n_tiles * N_BLOCKS, step):
        next_expert, next_row0, next_end, next_block_n, _, _ = tile_of(
            i + step, n_tiles, schedule, None, False, N_BLOCKS, 1
        )
        n0 = block_n * (2 * HALF // PARTS)
        second = n0 if PARTS == 2 else n0 + HALF
        slot, live, r, weight = facts(schedule, x, e, row0, end, ROW, BLOCK_M)  # long before they are needed
        left = gl.zeros((HALF, BLOCK_M), ACCUMULATE, SUMMED)
        right = gl.zeros((HALF, BLOCK_M), ACCUMULATE, SUMMED)
        if SUM == "groups":
            left, right, stage, phase = _sums_of_groups(
                rows, weights, ready, empty, stage, phase, left, right, k_end, schedule, x, w, expert, row0, end, n0,
                PARTS, LIMIT, LOAD_SCALES, K, BLOCK_K, STAGES,
            )  # fmt: skip
        else:
            left, right, stage, phase = _running_sums(
                rows, weights, ready, empty, stage, phase, left, right, k_end, BLOCK_K, STAGES
            )
        conclude(
            gl.convert_layout(left.T, ROW), gl.convert_layout(right.T, ROW), schedule, x, w, out, None, None, e, p,
            slot, live, r, weight, expert, row0, end, n0, second, n0 * PARTS // 2,
            0, PARTS, 1, LIMIT, COLUMNS, FINISH, EPILOGUE, ACTIVATION, GATE_UP, STORE, ARRANGE, ENCODE, LARGEST,
            OUT_GROUP,
        )  # fmt: skip
        expert, row0, end, block_n = next_expert, next_row0, next_end, next_block_n


@gluon.jit
def grouped_stream_sm90(
    schedule, x, w, out, e, p,  # Schedule, Rows, Weight, Output, Epilogue, Parameters
    w_desc,  # tensor map
    k_end,
    WAIT: gl.constexpr, WAIT_FOR_ROWS: gl.constexpr, RELEASE: gl.constexpr,
    LOAD_SCALES: gl.constexpr, MATH: gl.constexpr, FINISH: gl.constexpr, EPILOGUE: gl.constexpr,
    ACTIVATION: gl.constexpr, GATE_UP: gl.constexpr, STORE: gl.constexpr, ARRANGE: gl.constexpr,
    ENCODE: gl.constexpr, LARGEST: gl.constexpr, OUT_GROUP: gl.constexpr, N: gl.constexpr, K: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    SUM: gl.constexpr,  # "running"; "groups": scales are applied to the product of a step
    X_LAYOUT: gl.constexpr,  # of rows in shared memory
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that multiplies
):  # fmt: skip
    PARTS: gl.constexpr = 2 if GATE_UP == "concatenated" else 1
    COLUMNS: gl.constexpr = N if GATE_UP is None else N // 2
    N_BLOCKS: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    WIDE: gl.constexpr = BLOCK_N if GATE_UP is None else 2 * BLOCK_N
    rows = gl.allocate_shared_memory(MATH, [STAGES, BLOCK_M, BLOCK_K], X_LAYOUT)
    # One buffer of a stage, seen as what is loaded and as what is multiplied.
    weights = gl.allocate_shared_memory(w_desc.dtype, [STAGES * PARTS, WIDE // PARTS, BLOCK_K], w_desc.layout)
    halves = seen_as(weights, [STAGES * 2, WIDE // 2, BLOCK_K])
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129)  # the expectation, and threads that copy
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    WAIT()
    RELEASE()
    first = gl.program_id(0)
    step = gl.num_programs(0)
    gl.assume(k_end > 0)
    gl.warp_specialize([
        (_produce, (schedule, x, w, w_desc, rows, weights, ready, empty, first, step, k_end,
                    WAIT_FOR_ROWS, PARTS, K, BLOCK_M, BLOCK_K, STAGES, N_BLOCKS)),
        (_consume, (schedule, x, w, out, e, p, rows, halves, ready, empty, first, step, k_end,
                    WAIT_FOR_ROWS, SUM, ACCUMULATE, LOAD_SCALES, FINISH, EPILOGUE, ACTIVATION, GATE_UP, STORE,
                    ARRANGE, ENCODE, LARGEST, OUT_GROUP, N, K, BLOCK_M, BLOCK_K, STAGES, N_BLOCKS)),
    ], [4], [REGISTERS])  # fmt: skip
