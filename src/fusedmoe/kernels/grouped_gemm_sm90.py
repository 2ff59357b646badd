"""The grouped GEMM of Hopper, warp-specialised: what :mod:`fusedmoe.kernels.grouped_gemm` computes, by its policies.

Grid: persistent. A program starts with the tile of its own number, and before it is done with one claims the next of
all: tiles of few rows take half the time of full ones, so that programs with as many would end apart by a tile or more.
Every tile has BLOCK_M = 128 rows. Of a program's 12 warps 4 produce and 8 consume. The producer claims tiles, tells the
consumers their numbers, and streams steps of BLOCK_K columns through a ring of STAGES buffers: weights by tensor map,
rows by tensor map where they lie sorted, else each from its own address (cp.async) on the same barrier.
The consumers are one group of 128 rows, or two of 64 that drift apart, so that one multiplies while the other
applies scales or stores; a group without a live row only keeps pace.

Adapters (``a``, Steps) are more steps of a tile: blocks of BLOCK_K columns of A x, of which a row has those of its own
adapter and else zeros, times B. They are copied by cp.async, and the sum goes on.

``ready[stage]`` completes when a buffer is full, ``empty[stage]`` when every consumer is done with it. Both sides
count stages alike over all tiles of the program, so that the ring does not drain between two of many steps. Of tiles'
numbers, two of which have a place, ``said`` and ``heard`` are the same.

A tile multiplies WIDE rows of weights: as one sum, or, where scales are applied step by step, as two sums of half the
columns that share the registers of one product. Both ways what follows the sums sees two halves: gate and up where
they are concatenated.

A result leaves by way of a buffer of its consumers, from where a tensor map takes it while they go on; the last tile of
an expert, whose rows belong to the next one from some row on, is written by pointer.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fusedmoe.kernels.hopper import (
    coalesced,
    conclude,
    copy,
    facts,
    halves,
    load_box,
    load_rows,
    next_stage,
    pointers,
    rows_of,
    scales_of_halves,
    seen_as,
    tile_of,
    tokens_of,
    told,
)
from fusedmoe.kernels.lora import row_of_b
from fusedmoe.kernels.scales import groups_of_step, none, of_places, of_rows, row_of
from fusedmoe.kernels.step import add_scaled
from fusedmoe.kernels.words import numbers, scale_of_words

BLOCK_M = gl.constexpr(128)
WIDE = gl.constexpr(256)
#: Of a buffer of weights, as which adapters' B is copied: 64 rows each.
PIECES = gl.constexpr(4)
#: Columns that are left of a tile when its program claims the next; all, of a tile that has no more.
AHEAD = gl.constexpr(2048)


@gluon.constexpr_function
def _accumulator(wide, widest, bits, warps):
    """Layout of a sum of WGMMA, whose K is 256 bits; Triton's for integers is no wider than 224."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, min(wide, widest), 256 // bits])


# --- which tile is next ---------------------------------------------------------------------------------


@gluon.constexpr_function
def _alone(warps):
    """Layout of one number, which every thread has."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.jit
def _claim(schedule, numbers, said, heard, place, phase, step, GEMM: gl.constexpr):
    """The number of the next tile, which consumers are told."""
    number = step + gl.atomic_add(schedule.claimed + GEMM, 1, sem="relaxed")
    mbarrier.wait(heard.index(place), phase)
    numbers.index(place).store(gl.full([1], number, gl.int32, _alone(gl.num_warps())))
    mbarrier.arrive(said.index(place), count=1)
    place, phase = next_stage(place, phase, 2)
    return number, place, phase


@gluon.jit
def _hear(
    schedule, a, numbers, said, heard, place, phase, n_tiles,
    ADAPTED: gl.constexpr, N_BLOCKS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """The number of the next tile, its expert, first row, row behind the expert's last, column block and number of
    steps of adapters.
    """
    mbarrier.wait(said.index(place), phase)
    number = gl.max(numbers.index(place).load(_alone(gl.num_warps())), 0)
    mbarrier.arrive(heard.index(place), count=1)
    place, phase = next_stage(place, phase, 2)
    expert, row0, end, block_n, _, more = tile_of(number, n_tiles, schedule, a, ADAPTED, N_BLOCKS, GROUP_M)
    return number, expert, row0, end, block_n, more, place, phase


# --- producer ------------------------------------------------------------------------------------------


@gluon.jit
def _copy_shrunk(schedule, a, row0, end, c, own, buffer, LAYOUT: gl.constexpr):
    """A x of 64 rows, in columns c, which belong to adapters ``own``."""
    row, live, slot = rows_of(row0, end, schedule, LAYOUT, BLOCK_M // 2)
    found = gl.load(a.found + row, mask=live, other=-1)
    start = gl.multiple_of(slot.to(gl.int64) * a.v_stride, [8])
    load_rows(buffer, a.v + start[:, None] + (c % a.columns)[None, :], mask=found[:, None] == own[None, :])


@gluon.jit
def _copy_b(a, expert, n0, c, own, there, part, buffer, limit, LAYOUT: gl.constexpr):
    """B of 64 rows of weights."""
    n = n0 + gl.arange(0, BLOCK_M // 2, gl.SliceLayout(1, LAYOUT))
    base = own.to(gl.int64) * a.stride_a + expert.to(gl.int64) * a.stride_e + c % a.max_rank
    mask = there[None, :] & (n < limit)[:, None]
    if a.parts == "halves":
        mask = mask & (c // a.max_rank % 2 == part)[None, :]
    elif a.parts == "alternate":
        mask = mask & ((c // a.max_rank % 2)[None, :] == (n % 2)[:, None])
    at = gl.multiple_of(base[None, :] + row_of_b(a, n, part)[:, None], [1, 8])
    load_rows(buffer, a.ptr + at, mask=mask)


@gluon.jit
def _copy_step(
    schedule, a, w, expert, row0, end, n0, j, rows, weights, stage,
    PARTS: gl.constexpr, LIMIT: gl.constexpr, BLOCK_K: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Both operands of step j of the adapters."""
    # Told anew in each step, so that what follows from them takes no registers beyond it.
    row0, expert, n0 = told(row0), told(expert), told(n0)
    c = j * BLOCK_K + gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    own = c // a.columns  # 8 columns, 16 bytes, have one; what lies beyond its rank is finite, and A x is 0 there
    there = own < a.slots
    _copy_shrunk(schedule, a, row0, end, c, own, rows.index(stage * 2), LAYOUT)
    _copy_shrunk(schedule, a, row0 + BLOCK_M // 2, end, c, own, rows.index(stage * 2 + 1), LAYOUT)
    for piece in range(PIECES):  # no unrolled loop: its addresses would take the registers of the consumers
        part = piece // (PIECES // PARTS)
        first = part * w.up + n0 + piece % (PIECES // PARTS) * 64
        _copy_b(
            a, expert, first, c, own, there, part, weights.index(stage * PIECES + piece), part * w.up + LIMIT, LAYOUT
        )


@gluon.jit
def _load_steps(
    x, w, x_desc, w_desc, rows, weights, ready, empty, stage, phase, first, last, weight_row, row0,
    upper, upper_live, lower, lower_live,  # rows of both halves, where they are gathered
    ADAPTED: gl.constexpr, PARTS: gl.constexpr, K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Both operands of the steps from columns ``first`` up to ``last``."""
    GATHER: gl.constexpr = x_desc is None
    W_BYTES: gl.constexpr = WIDE * weights.shape[2] * weights.dtype.primitive_bitwidth // 8
    BYTES: gl.constexpr = W_BYTES if GATHER else W_BYTES + BLOCK_M * BLOCK_K * rows.dtype.primitive_bitwidth // 8
    PER_ITEM: gl.constexpr = BLOCK_K // weights.shape[2]
    LAYOUT: gl.constexpr = coalesced(BLOCK_K, rows.dtype.primitive_bitwidth, gl.num_warps())
    column = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    if GATHER:
        upper_pointers = pointers(x, upper, column)
        lower_pointers = pointers(x, lower, column)
    for k in range(first, last, BLOCK_K):
        full = ready.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full, BYTES)
        load_box(w_desc, [weight_row, k // PER_ITEM], full, weights.index(stage * PARTS))
        if PARTS == 2:
            load_box(w_desc, [weight_row + w.up, k // PER_ITEM], full, weights.index(stage * PARTS + 1))
        if GATHER:
            copy(upper_pointers + k, upper_live, column, rows.index(stage * 2), k, K, BLOCK_K)
            copy(lower_pointers + k, lower_live, column, rows.index(stage * 2 + 1), k, K, BLOCK_K)
            async_copy.mbarrier_arrive(full, increment_count=False)
        else:
            load_box(x_desc, [row0, k], full, rows.index(stage * 2))
            load_box(x_desc, [row0 + BLOCK_M // 2, k], full, rows.index(stage * 2 + 1))
            if ADAPTED:  # the barrier counts threads, as it must where they copy
                async_copy.mbarrier_arrive(full, increment_count=False)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _produce(
    schedule, x, w, a, x_desc, w_desc, rows, weights, pieces, ready, empty, numbers, said, heard, first, n_tiles, step,
    k_end,
    GEMM: gl.constexpr, ADAPTED: gl.constexpr, PARTS: gl.constexpr, LIMIT: gl.constexpr, K: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, N_BLOCKS: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    GATHER: gl.constexpr = x_desc is None
    BOX: gl.constexpr = WIDE // PARTS
    LAYOUT: gl.constexpr = coalesced(BLOCK_K, rows.dtype.primitive_bitwidth, gl.num_warps())
    stage = 0
    phase = 1
    place = 0
    place_phase = 1
    # Late, so that who is done first claims more; early enough to look up what that tile needs, three loads one after
    # the other.
    late = gl.maximum(k_end - AHEAD, 0) // BLOCK_K * BLOCK_K
    i = first
    expert, row0, end, block_n, more0, more = tile_of(i, n_tiles, schedule, a, ADAPTED, N_BLOCKS, GROUP_M)
    if GATHER:
        upper, upper_live = tokens_of(row0, end, schedule, x, LAYOUT, BLOCK_M // 2)
        lower, lower_live = tokens_of(row0 + BLOCK_M // 2, end, schedule, x, LAYOUT, BLOCK_M // 2)
    else:
        upper, upper_live, lower, lower_live = 0, 0, 0, 0
    while i < n_tiles * N_BLOCKS:
        weight_row = expert * w.rows_per_expert + block_n * BOX
        stage, phase = _load_steps(
            x, w, x_desc, w_desc, rows, weights, ready, empty, stage, phase, 0, late, weight_row, row0,
            upper, upper_live, lower, lower_live, ADAPTED, PARTS, K, BLOCK_K, STAGES,
        )  # fmt: skip
        i, place, place_phase = _claim(schedule, numbers, said, heard, place, place_phase, step, GEMM)
        next_expert, next_row0, next_end, next_block_n, next_more0, next_more = tile_of(
            i, n_tiles, schedule, a, ADAPTED, N_BLOCKS, GROUP_M
        )
        if GATHER:
            next_upper, next_upper_live = tokens_of(next_row0, next_end, schedule, x, LAYOUT, BLOCK_M // 2)
            next_lower, next_lower_live = tokens_of(
                next_row0 + BLOCK_M // 2, next_end, schedule, x, LAYOUT, BLOCK_M // 2
            )
        stage, phase = _load_steps(
            x, w, x_desc, w_desc, rows, weights, ready, empty, stage, phase, late, k_end, weight_row, row0,
            upper, upper_live, lower, lower_live, ADAPTED, PARTS, K, BLOCK_K, STAGES,
        )  # fmt: skip
        if ADAPTED:
            for turn in range(told(more)):
                j = more0 + turn
                full = ready.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                _copy_step(
                    schedule, a, w, expert, row0, end, block_n * BOX, j, rows, pieces, stage,
                    PARTS, LIMIT, BLOCK_K, LAYOUT,
                )  # fmt: skip
                async_copy.mbarrier_arrive(full, increment_count=False)
                mbarrier.arrive(full, count=1)
                stage, phase = next_stage(stage, phase, STAGES)
        expert, row0, end, block_n = next_expert, next_row0, next_end, next_block_n
        more0, more = next_more0, next_more
        if GATHER:
            upper, upper_live, lower, lower_live = next_upper, next_upper_live, next_lower, next_lower_live


# --- consumer ------------------------------------------------------------------------------------------


@gluon.jit
def _skip(ready, empty, stage, phase, k_end, BLOCK_K: gl.constexpr, STAGES: gl.constexpr):
    """Keep pace with the producer."""
    for _ in range(0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _running_sum(
    rows, weights, ready, empty, stage, phase, k_end,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, GATHER: gl.constexpr, ACCUMULATE: gl.constexpr,
    LAYOUT: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One sum over all of K, a product in flight while the next is issued."""
    ROWS: gl.constexpr = rows.shape[1]
    acc = gl.zeros((ROWS, WIDE), ACCUMULATE, LAYOUT)
    for k in range(0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(stage), phase)
        if GATHER:
            fence_async_shared()  # rows were written by cp.async, and WGMMA reads through the other proxy
        a = rows.index(stage * CONSUMERS + CONSUMER)
        acc = warpgroup_mma(a, weights.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        # The stage before is free. It is computed: Triton would not carry a name that starts out as another's value.
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=k > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
    return acc, stage, phase


@gluon.jit
def _sum_of_groups(
    rows, weights, ready, empty, stage, phase, k_end, schedule, x, w, expert, row0, end, n0,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, GATHER: gl.constexpr, PARTS: gl.constexpr, LIMIT: gl.constexpr,
    LOAD_SCALES: gl.constexpr, LAYOUT: gl.constexpr, K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum of every step times its scales, as two halves. While one consumer scales, the other multiplies."""
    ROWS: gl.constexpr = rows.shape[1]
    part = gl.zeros((ROWS, WIDE // 2), gl.float32, LAYOUT)
    left = part
    right = part
    row, live, slot = rows_of(row0, end, schedule, LAYOUT, ROWS)
    scale_row = row_of(x, row, slot)
    left_n = n0 + gl.arange(0, WIDE // 2, gl.SliceLayout(0, LAYOUT))
    right_n = left_n if PARTS == 2 else left_n + WIDE // 2
    r = of_rows(x, scale_row, live, row0 * 0, BLOCK_K)
    s_left, s_right = scales_of_halves(w, expert, left_n, right_n, n0, row0 * 0, PARTS, LIMIT, K, BLOCK_K, LOAD_SCALES)
    for k in range(0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(stage), phase)
        if GATHER:
            fence_async_shared()
        a = rows.index(stage * CONSUMERS + CONSUMER)
        part = warpgroup_mma(a, weights.index(stage * 2).permute((1, 0)), part, use_acc=False, is_async=True)
        ahead = gl.minimum(k + BLOCK_K, K - 1)
        r_next = of_rows(x, scale_row, live, ahead, BLOCK_K)
        s_left_next, s_right_next = scales_of_halves(
            w, expert, left_n, right_n, n0, ahead, PARTS, LIMIT, K, BLOCK_K, LOAD_SCALES
        )
        part = warpgroup_mma_wait(0, deps=(part,))
        left = add_scaled(left, part, s_left, r, x, w, False)
        part = warpgroup_mma(a, weights.index(stage * 2 + 1).permute((1, 0)), part, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(empty.index(stage), count=1)
        right = add_scaled(right, part, s_right, r, x, w, False)
        r, s_left, s_right = r_next, s_left_next, s_right_next
        stage, phase = next_stage(stage, phase, STAGES)
    return left, right, stage, phase


@gluon.constexpr_function
def _words(count, step):
    """Layout of words [64 step, count] that, decoded, lies as WGMMA reads its left operand; a thread has all rows
    of a step.
    """
    registers = [[0, 4 << bit] for bit in range((count // 4).bit_length() - 1)] + [[8 * step, 0]]
    registers += [[1 << bit, 0] for bit in range(step.bit_length() - 1)]
    lanes = [[0, 1], [0, 2], [step, 0], [2 * step, 0], [4 * step, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16 * step, 0], [32 * step, 0]], [], [64 * step, count])


@gluon.constexpr_function
def _words_of_groups(count, groups):
    """The same, as words [64, groups, words of a group]."""
    each = count // groups
    places = [1 << bit for bit in range(count.bit_length() - 1)]
    places = [[0, 0, place] if place < each else [0, place // each, 0] for place in places]
    registers = [*places[2:], [8, 0, 0]]
    lanes = [*places[:2], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, groups, each])


@gluon.jit
def _scale_of_words(
    w, expert, n0, k, PART: gl.constexpr, EVERY: gl.constexpr, LIMIT: gl.constexpr, K: gl.constexpr,
    MATH: gl.constexpr, PER_ITEM: gl.constexpr, BLOCK_K: gl.constexpr, OF_WORDS: gl.constexpr,
):  # fmt: skip
    """What the words of rows ``n0, n0 + EVERY ...`` in the step at k are multiplied by as they are decoded."""
    if OF_WORDS:
        COUNT: gl.constexpr = BLOCK_K // PER_ITEM
        GROUPS: gl.constexpr = max(BLOCK_K // w.scale.block_k, 1)
        LAYOUT: gl.constexpr = _words_of_groups(COUNT, GROUPS)
        TABLE: gl.constexpr = gl.SliceLayout(2, LAYOUT)
        n = (n0 + EVERY * gl.arange(0, 64, gl.SliceLayout(1, TABLE)))[:, None]
        index = gl.arange(0, GROUPS, gl.SliceLayout(0, TABLE))[None, :]
        group, there = groups_of_step(k, index, n < LIMIT, w.scale.block_k, K, BLOCK_K)
        s = scale_of_words(of_places(w, expert, n, there, group, PART), MATH, PER_ITEM)
        s, _ = gl.broadcast(s[:, :, None], gl.zeros((64, GROUPS, COUNT // GROUPS), s.dtype, LAYOUT))
        return gl.convert_layout(gl.reshape(s, (64, COUNT)), _words(COUNT, 1), assert_trivial=True)
    else:
        return 0.0


@gluon.jit
def _sum_of_words(
    rows, weights, ready, empty, stage, phase, k_end, w, expert, n0, second,
    CONSUMER: gl.constexpr, GATHER: gl.constexpr, PARTS: gl.constexpr, PAIRS: gl.constexpr, EVERY: gl.constexpr,
    LIMIT: gl.constexpr, MATH: gl.constexpr, ELEMENT: gl.constexpr, OF_WORDS: gl.constexpr, K: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Two sums of 64 columns, as [columns, rows]. Weights are decoded on their way to registers, as the left operand:
    while one consumer decodes, the other multiplies.
    """
    COUNT: gl.constexpr = weights.shape[2]
    PER_ITEM: gl.constexpr = BLOCK_K // COUNT
    SUM: gl.constexpr = _accumulator(BLOCK_M, BLOCK_M, 16, 4)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUM, 2)
    WORDS: gl.constexpr = _words(COUNT, 1)
    left = gl.zeros((64, BLOCK_M), gl.float32, SUM)
    right = gl.zeros((64, BLOCK_M), gl.float32, SUM)
    s_left = _scale_of_words(w, expert, n0, 0, 0, EVERY, LIMIT, K, MATH, PER_ITEM, BLOCK_K, OF_WORDS)
    s_right = _scale_of_words(w, expert, second, 0, PARTS - 1, EVERY, LIMIT, K, MATH, PER_ITEM, BLOCK_K, OF_WORDS)
    for k in range(0, k_end, BLOCK_K):
        mbarrier.wait(ready.index(stage), phase)
        if PARTS == 2:
            left_words = weights.index(stage * 2).slice(CONSUMER * 64, 64).load(WORDS)
            right_words = weights.index(stage * 2 + 1).slice(CONSUMER * 64, 64).load(WORDS)
        elif PAIRS:
            both = weights.index(stage).slice(CONSUMER * 128, 128).load(_words(COUNT, 2))
            left_words, right_words = gl.split(gl.permute(gl.reshape(both, (64, 2, COUNT)), (0, 2, 1)))
            left_words = gl.convert_layout(left_words, WORDS, assert_trivial=True)
            right_words = gl.convert_layout(right_words, WORDS, assert_trivial=True)
        else:
            left_words = weights.index(stage).slice(CONSUMER * 128, 64).load(WORDS)
            right_words = weights.index(stage).slice(CONSUMER * 128 + 64, 64).load(WORDS)
        if GATHER:
            fence_async_shared()
        b = rows.index(stage).permute((1, 0))
        a_left = numbers(left_words, None, s_left if OF_WORDS else None, MATH, ELEMENT, PER_ITEM, 64, BLOCK_K)
        a_left = gl.convert_layout(a_left, OPERAND, assert_trivial=True)
        left = warpgroup_mma(a_left, b, left, is_async=True)
        a_right = numbers(right_words, None, s_right if OF_WORDS else None, MATH, ELEMENT, PER_ITEM, 64, BLOCK_K)
        a_right = gl.convert_layout(a_right, OPERAND, assert_trivial=True)
        right = warpgroup_mma(a_right, b, right, is_async=True)
        ahead = k + BLOCK_K
        s_left = _scale_of_words(w, expert, n0, ahead, 0, EVERY, LIMIT, K, MATH, PER_ITEM, BLOCK_K, OF_WORDS)
        s_right = _scale_of_words(
            w, expert, second, ahead, PARTS - 1, EVERY, LIMIT, K, MATH, PER_ITEM, BLOCK_K, OF_WORDS
        )
        left, right = warpgroup_mma_wait(0, deps=(left, right))
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = next_stage(stage, phase, STAGES)
    return left, right, stage, phase


@gluon.jit
def _consume(
    schedule, x, w, a, out, out_desc, buffers, e, p, rows, weights, ready, empty, numbers, said, heard, first, n_tiles,
    k_end,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr, ADAPTED: gl.constexpr, GATHER: gl.constexpr, SUM: gl.constexpr,
    ACCUMULATE: gl.constexpr, LOAD_SCALES: gl.constexpr, MATH: gl.constexpr, ELEMENT: gl.constexpr,
    FINISH: gl.constexpr, EPILOGUE: gl.constexpr, ACTIVATION: gl.constexpr, GATE_UP: gl.constexpr,
    STORE: gl.constexpr, ARRANGE: gl.constexpr, ENCODE: gl.constexpr, LARGEST: gl.constexpr, OUT_GROUP: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, N_BLOCKS: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = 2 if GATE_UP == "concatenated" else 1
    COLUMNS: gl.constexpr = N if GATE_UP is None else N // 2
    LIMIT: gl.constexpr = COLUMNS if PARTS == 2 else N  # columns of a part of the weights
    DECODED: gl.constexpr = SUM == "words"
    # Consumers share the rows of a tile, but where they decode: then its columns.
    ROWS: gl.constexpr = BLOCK_M if DECODED else BLOCK_M // CONSUMERS
    SHARE: gl.constexpr = WIDE // 2 if DECODED else WIDE
    PAIRS: gl.constexpr = DECODED and GATE_UP == "interleaved"  # whose halves are gate and up already
    LAYOUT: gl.constexpr = _accumulator(
        WIDE // 2 if SUM == "groups" else WIDE,
        128 if gl.int32 == ACCUMULATE else 256,
        rows.dtype.primitive_bitwidth,
        gl.num_warps(),
    )
    stage = 0
    phase = 0
    place = 0
    place_phase = 0
    i = first
    expert, row0, end, block_n, _, more = tile_of(i, n_tiles, schedule, a, ADAPTED, N_BLOCKS, GROUP_M)
    while i < n_tiles * N_BLOCKS:
        mine = row0 + CONSUMER * (BLOCK_M - ROWS)
        steps_end = k_end
        if ADAPTED:
            steps_end = k_end + told(more) * BLOCK_K
        if mine < end:
            n0 = block_n * (WIDE // PARTS) + CONSUMER * ((WIDE - SHARE) // PARTS)
            second = n0 if PARTS == 2 else n0 + 1 if PAIRS else n0 + SHARE // 2
            EVERY: gl.constexpr = 2 if PAIRS else 1
            if SUM == "running":  # long before they are needed; sums of groups leave no registers for them
                slot, live, r, weight = facts(schedule, x, e, mine, end, LAYOUT, ROWS)
            if DECODED:
                left, right, stage, phase = _sum_of_words(
                    rows, weights, ready, empty, stage, phase, k_end, w, expert, n0, second,
                    CONSUMER, GATHER, PARTS, PAIRS, EVERY, LIMIT, MATH, ELEMENT, LOAD_SCALES is not none, K, BLOCK_K,
                    STAGES,
                )  # fmt: skip
            elif SUM == "groups":
                left, right, stage, phase = _sum_of_groups(
                    rows, weights, ready, empty, stage, phase, k_end, schedule, x, w, expert, mine, end, n0,
                    CONSUMER, CONSUMERS, GATHER, PARTS, LIMIT, LOAD_SCALES, LAYOUT, K, BLOCK_K, STAGES,
                )  # fmt: skip
                slot, live, r, weight = facts(schedule, x, e, mine, end, LAYOUT, ROWS)
            else:
                acc, stage, phase = _running_sum(
                    rows, weights, ready, empty, stage, phase, steps_end,
                    CONSUMER, CONSUMERS, GATHER or ADAPTED, ACCUMULATE, LAYOUT, BLOCK_K, STAGES,
                )  # fmt: skip
                left, right = halves(acc)
            i, next_expert, next_row0, next_end, next_block_n, next_more, place, place_phase = _hear(
                schedule, a, numbers, said, heard, place, place_phase, n_tiles, ADAPTED, N_BLOCKS, GROUP_M
            )
            if DECODED:
                # Half of the rows at a time, each row in a few threads: what follows needs registers for every row.
                ROW: gl.constexpr = coalesced(SHARE // 2, 16, gl.num_warps())
                left, lower_left = halves(left)
                right, lower_right = halves(right)
                left, right = gl.convert_layout(left.T, ROW), gl.convert_layout(right.T, ROW)
                slot, live, r, weight = facts(schedule, x, e, mine, end, ROW, BLOCK_M // 2)
                conclude(
                    left, right, schedule, x, w, out, out_desc, buffers, e, p, slot, live, r, weight, expert, mine, end,
                    n0, second, n0 * PARTS // 2,
                    CONSUMER, PARTS, EVERY, LIMIT, COLUMNS, FINISH, EPILOGUE, ACTIVATION, GATE_UP, STORE, ARRANGE,
                    ENCODE, LARGEST, OUT_GROUP,
                )  # fmt: skip
                left, right = gl.convert_layout(lower_left.T, ROW), gl.convert_layout(lower_right.T, ROW)
                mine += BLOCK_M // 2
                slot, live, r, weight = facts(schedule, x, e, mine, end, ROW, BLOCK_M // 2)
            if not DECODED or mine < end:
                conclude(
                    left, right, schedule, x, w, out, out_desc, buffers, e, p, slot, live, r, weight, expert, mine, end,
                    n0, second, n0 * PARTS // 2,
                    CONSUMER, PARTS, EVERY, LIMIT, COLUMNS, FINISH, EPILOGUE, ACTIVATION, GATE_UP, STORE, ARRANGE,
                    ENCODE, LARGEST, OUT_GROUP,
                )  # fmt: skip
        else:
            stage, phase = _skip(ready, empty, stage, phase, steps_end, BLOCK_K, STAGES)
            i, next_expert, next_row0, next_end, next_block_n, next_more, place, place_phase = _hear(
                schedule, a, numbers, said, heard, place, place_phase, n_tiles, ADAPTED, N_BLOCKS, GROUP_M
            )
        expert, row0, end, block_n, more = next_expert, next_row0, next_end, next_block_n, next_more
    if buffers is not None:
        tma.store_wait(0)


# --- kernel --------------------------------------------------------------------------------------------


@gluon.jit
def grouped_gemm_sm90(
    schedule, x, w, out, e, p,  # Schedule, Rows, Weight, Output, Epilogue, Parameters
    a,  # Steps, or None
    x_desc, w_desc, out_desc,  # tensor maps; x_desc None: rows are gathered; out_desc None: results are scattered
    k_end,
    WAIT: gl.constexpr, RELEASE: gl.constexpr, LOAD_SCALES: gl.constexpr, MATH: gl.constexpr, ELEMENT: gl.constexpr,
    FINISH: gl.constexpr, EPILOGUE: gl.constexpr, ACTIVATION: gl.constexpr, GATE_UP: gl.constexpr,
    STORE: gl.constexpr, ARRANGE: gl.constexpr, ENCODE: gl.constexpr, LARGEST: gl.constexpr, OUT_GROUP: gl.constexpr,
    N: gl.constexpr, K: gl.constexpr, ACCUMULATE: gl.constexpr,
    GEMM: gl.constexpr,  # 0 or 1: of which tiles are claimed
    ADAPTED: gl.constexpr,  # there is ``a``, and the sum is a running one of 16 bits
    SUM: gl.constexpr,  # "running"; "groups": scales are applied to the product of a step; "words": to decoded weights
    X_LAYOUT: gl.constexpr,  # of rows in shared memory
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    GATHER: gl.constexpr = x_desc is None
    COPIES: gl.constexpr = GATHER or ADAPTED
    PARTS: gl.constexpr = 2 if GATE_UP == "concatenated" else 1
    COLUMNS: gl.constexpr = N if GATE_UP is None else N // 2
    LIMIT: gl.constexpr = COLUMNS if PARTS == 2 else N
    BLOCK_N: gl.constexpr = WIDE if GATE_UP is None else WIDE // 2
    N_BLOCKS: gl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    # One buffer of a stage, seen as what is loaded and as what is multiplied.
    COUNT: gl.constexpr = w_desc.block_type.shape[1]  # items of a step
    rows = gl.allocate_shared_memory(MATH, [STAGES * 2, BLOCK_M // 2, BLOCK_K], X_LAYOUT)
    weights = gl.allocate_shared_memory(w_desc.dtype, [STAGES * PARTS, WIDE // PARTS, COUNT], w_desc.layout)
    SHARERS: gl.constexpr = 1 if SUM == "words" else CONSUMERS  # of rows
    left = seen_as(rows, [STAGES * SHARERS, BLOCK_M // SHARERS, BLOCK_K])
    HALVES: gl.constexpr = 2 if SUM == "groups" else PARTS if SUM == "words" else 1
    right = seen_as(weights, [STAGES * HALVES, WIDE // HALVES, COUNT])
    pieces = seen_as(weights, [STAGES * PIECES, WIDE // PIECES, COUNT])
    if out_desc is None:
        buffers: gl.constexpr = None
    else:
        # What a group of consumers stores at a time: half of its columns, or what they are gate and up of.
        AT_ONCE: gl.constexpr = [CONSUMERS, BLOCK_M // CONSUMERS, WIDE // 2]
        buffers = gl.allocate_shared_memory(out_desc.dtype, AT_ONCE, out_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    numbers = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    said = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for turn in gl.static_range(2):
        mbarrier.init(said.index(turn), count=1)
        mbarrier.init(heard.index(turn), count=CONSUMERS)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=129 if COPIES else 1)  # the expectation, and threads that copy
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    fence_async_shared()
    WAIT()
    RELEASE()
    # Of 504 registers of three threads, one of each group of warps, two consumers take these: two sums of 64 x 128 and
    # a product, or one sum of 64 x 256. The producer has the rest, for addresses where it copies, most for adapters.
    REGISTERS: gl.constexpr = 200 if ADAPTED else 216 if COPIES else 224
    first = gl.program_id(0)
    step = gl.num_programs(0)
    n_tiles = gl.load(schedule.n_tiles)
    gl.assume(k_end > 0)
    # The producer is the partition that the kernel starts in: ptxas (13.0) spilled in a consumer there, whatever its
    # registers. Tuples are written out where they are used: in a variable they would lose their constants.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_produce, (schedule, x, w, a, x_desc, w_desc, rows, weights, pieces, ready, empty, numbers, said, heard,
                        first, n_tiles, step, k_end,
                        GEMM, ADAPTED, PARTS, LIMIT, K, BLOCK_K, STAGES, N_BLOCKS, GROUP_M)),
            (_consume, (schedule, x, w, a, out, out_desc, buffers, e, p, left, right, ready, empty, numbers, said,
                        heard, first, n_tiles, k_end,
                        0, CONSUMERS, ADAPTED, GATHER, SUM, ACCUMULATE, LOAD_SCALES, MATH, ELEMENT, FINISH,
                        EPILOGUE, ACTIVATION, GATE_UP, STORE, ARRANGE, ENCODE, LARGEST, OUT_GROUP, N, K, BLOCK_K,
                        STAGES, N_BLOCKS, GROUP_M)),
            (_consume, (schedule, x, w, a, out, out_desc, buffers, e, p, left, right, ready, empty, numbers, said,
                        heard, first, n_tiles, k_end,
                        1, CONSUMERS, ADAPTED, GATHER, SUM, ACCUMULATE, LOAD_SCALES, MATH, ELEMENT, FINISH,
                        EPILOGUE, ACTIVATION, GATE_UP, STORE, ARRANGE, ENCODE, LARGEST, OUT_GROUP, N, K, BLOCK_K,
                        STAGES, N_BLOCKS, GROUP_M)),
        ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_produce, (schedule, x, w, a, x_desc, w_desc, rows, weights, pieces, ready, empty, numbers, said, heard,
                        first, n_tiles, step, k_end,
                        GEMM, ADAPTED, PARTS, LIMIT, K, BLOCK_K, STAGES, N_BLOCKS, GROUP_M)),
            (_consume, (schedule, x, w, a, out, out_desc, buffers, e, p, left, right, ready, empty, numbers, said,
                        heard, first, n_tiles, k_end,
                        0, CONSUMERS, ADAPTED, GATHER, SUM, ACCUMULATE, LOAD_SCALES, MATH, ELEMENT, FINISH,
                        EPILOGUE, ACTIVATION, GATE_UP, STORE, ARRANGE, ENCODE, LARGEST, OUT_GROUP, N, K, BLOCK_K,
                        STAGES, N_BLOCKS, GROUP_M)),
        ], [8], [REGISTERS])  # fmt: skip
