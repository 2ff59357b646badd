"""What the kernels of Hopper are made of: which tile, copies of its rows, and all that follows its sums.

No constants of the module: Triton names a function by those of the functions that it calls only if these have a name
already, so that a kernel would have two, depending on what was compiled before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, tma

from fusedmoe.kernels.epilogue import weight_of
from fusedmoe.kernels.scales import of_whole_rows, row_of
from fusedmoe.kernels.store import write
from fusedmoe.kernels.tiles import scheduled_tile

#: Names that Triton 3.9 gave to what 3.6 to 3.8 have.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def tile_of(i, n_tiles, schedule, a, ADAPTED: gl.constexpr, N_BLOCKS: gl.constexpr, GROUP_M: gl.constexpr):
    """Expert, first row, row behind the expert's last, column block, first step of adapters and number of these. Past
    the last tile: of none, without a load.
    """
    there = i < n_tiles * N_BLOCKS
    tile, block_n = scheduled_tile(i, n_tiles, N_BLOCKS, GROUP_M)
    expert = gl.load(schedule.tile_expert + tile, mask=there, other=0)
    row0 = gl.load(schedule.tile_row + tile, mask=there, other=0)
    end = gl.load(schedule.offset + expert + 1, mask=there, other=0)
    more0 = 0
    more = 0
    if ADAPTED:
        more0 = gl.load(a.blocks + 2 * tile, mask=there, other=0)
        more = gl.load(a.blocks + 2 * tile + 1, mask=there, other=0)
    return expert, row0, end, block_n, more0, more


@gluon.jit
def told(number):
    """The same number, though the compiler cannot see it. Triton 3.6 takes a value that a loop carries for the same
    in every turn when nothing but bounds of loops within depends on it.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [number], gl.int32, False, 1)


@gluon.constexpr_function
def _reinterpret_is_public():
    return hasattr(gl.shared_memory_descriptor, "reinterpret")


@gluon.jit
def seen_as(buffer, SHAPE: gl.constexpr):
    """The same shared memory in another shape."""
    if _reinterpret_is_public():
        return buffer.reinterpret(buffer.dtype, SHAPE, buffer.layout)
    else:
        return buffer._reinterpret(buffer.dtype, SHAPE, buffer.layout)


@gluon.jit
def rows_of(row0, end, schedule, LAYOUT: gl.constexpr, COUNT: gl.constexpr):
    """Sorted rows from ``row0`` on, which of them are live, and their slots."""
    row = row0 + gl.arange(0, COUNT, gl.SliceLayout(1, LAYOUT))
    live = row < end
    return row, live, gl.load(schedule.slot + row, mask=live, other=0)


@gluon.jit
def tokens_of(row0, end, schedule, x, LAYOUT: gl.constexpr, COUNT: gl.constexpr):
    """Which rows of x some rows of a tile are made of, and which of them are live."""
    row, live, slot = rows_of(row0, end, schedule, LAYOUT, COUNT)
    return row if x.per is None else slot // x.per, live


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.constexpr_function
def coalesced(columns, bits, warps):
    """Layout in which a thread reads or writes 16 bytes, and neighbours those beside."""
    vector = 128 // bits
    lanes = min(32, columns // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def pointers(x, index, column):
    # The compiler knows multiples of 16 elements by itself; what is promised are 16 bytes.
    ITEMS: gl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
    start = gl.multiple_of(index.to(gl.int64) * x.stride_row, [ITEMS])
    return x.ptr + start[:, None] + column[None, :]


@gluon.jit
def copy(pointers, live, column, buffer, k, K: gl.constexpr, BLOCK_K: gl.constexpr):
    """Columns past K, and rows that are not live, become 0."""
    mask = live[:, None]
    if K % BLOCK_K != 0:
        mask = mask & (k + column < K)[None, :]
    load_rows(buffer, pointers, mask=mask)


@gluon.jit
def halves(acc):
    """Left and right half of the columns: other registers, nothing moves."""
    return gl.split(gl.permute(gl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@gluon.jit
def beside(left, right):
    """Two halves as one."""
    joined = gl.permute(gl.join(left, right), (0, 2, 1))
    return gl.reshape(joined, (left.shape[0], 2 * left.shape[1]))


@gluon.jit
def scales_of_halves(
    w, expert, left_n, right_n, n0, k,
    PARTS: gl.constexpr, LIMIT: gl.constexpr, K: gl.constexpr, BLOCK_K: gl.constexpr, LOAD_SCALES: gl.constexpr,
):  # fmt: skip
    """Scales of the weights of both halves in a step."""
    left, _ = LOAD_SCALES(w, expert, left_n, n0, left_n < LIMIT, k, 0, K, BLOCK_K)
    # The right half of the last block may lie past the last row, which has scales.
    right_n0 = n0 if PARTS == 2 else gl.minimum(n0 + right_n.shape[0], LIMIT - 1)
    right, _ = LOAD_SCALES(w, expert, right_n, right_n0, right_n < LIMIT, k, PARTS - 1, K, BLOCK_K)
    return left, right


@gluon.jit
def facts(schedule, x, e, row0, end, LAYOUT: gl.constexpr, COUNT: gl.constexpr):
    """Of rows: their slots, which of them are live, scales that hold for all of K, and router weights."""
    row, live, slot = rows_of(row0, end, schedule, LAYOUT, COUNT)
    return slot, live, of_whole_rows(x, row_of(x, row, slot), live), weight_of(e, slot, live)


@gluon.jit
def _laid(values, LAYOUT: gl.constexpr):
    """Facts of rows in the layout of half of their sums, which is another name for the same place."""
    if values.type.is_block():
        return gl.convert_layout(values, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    else:
        return values


@gluon.jit
def _finished(
    acc, x, w, e, slot, live, r, weight, expert, n0,
    PART: gl.constexpr, EVERY: gl.constexpr, LIMIT: gl.constexpr, FINISH: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """What follows the sum of columns ``n0, n0 + EVERY ...`` of a part of the weights, up to its activation."""
    LAYOUT: gl.constexpr = acc.type.layout
    slot, live, r, weight = _laid(slot, LAYOUT), _laid(live, LAYOUT), _laid(r, LAYOUT), _laid(weight, LAYOUT)
    n = n0 + EVERY * gl.arange(0, acc.shape[1], gl.SliceLayout(0, LAYOUT))
    inside = n < LIMIT
    acc = FINISH(acc, x, w, r, expert, n, gl.minimum(n0, LIMIT - 1), inside, PART)
    return EPILOGUE(acc, e, weight, expert, slot, live, PART * w.up + n, inside)


@gluon.jit
def _write_live(value, schedule, out, row0, end, column0, COLUMNS: gl.constexpr):
    """Live rows alone, by pointer."""
    LAYOUT: gl.constexpr = value.type.layout
    row, live, slot = rows_of(row0, end, schedule, LAYOUT, value.shape[0])
    column = column0 + gl.arange(0, value.shape[1], gl.SliceLayout(0, LAYOUT))
    write(value, out, slot if out.by_slot else row, live, column, COLUMNS)


@gluon.jit
def _store(
    result, schedule, out, out_desc, buffers, row0, end, column0,
    CONSUMER: gl.constexpr, COLUMNS: gl.constexpr, STORE: gl.constexpr, ARRANGE: gl.constexpr, ENCODE: gl.constexpr,
    LARGEST: gl.constexpr, OUT_GROUP: gl.constexpr,
):  # fmt: skip
    """By way of a buffer, from where a tensor map takes whole tiles while this consumer goes on; or from registers,
    each row to its own place.
    """
    ROWS: gl.constexpr = result.shape[0]
    BLOCK_N: gl.constexpr = result.shape[1]
    SUMMED: gl.constexpr = result.type.layout
    row, live, slot = rows_of(row0, end, schedule, SUMMED, ROWS)
    column = column0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SUMMED))
    dest = slot if out.by_slot else row
    value = ARRANGE(STORE(result, out, dest, live, column, COLUMNS, ROWS, BLOCK_N, ENCODE, LARGEST, OUT_GROUP))
    LAYOUT: gl.constexpr = coalesced(BLOCK_N, value.dtype.primitive_bitwidth, gl.num_warps())
    if buffers is None:
        _write_live(gl.convert_layout(value, LAYOUT), schedule, out, row0, end, column0, COLUMNS)
    else:
        tma.store_wait(0)  # the tile before has left
        # Addresses in a buffer are the same in every tile. Computed anew from a number that the compiler does not know,
        # they take no registers while products are added up.
        buffer = buffers.index(told(row0 * 0 + CONSUMER))
        buffer.store(value)
        if row0 + ROWS <= end:
            fence_async_shared()
            store_box(out_desc, [row0, column0], buffer)
        else:
            _write_live(buffer.load(LAYOUT), schedule, out, row0, end, column0, COLUMNS)


@gluon.jit
def _activated_pairs(acc, p, ACTIVATION: gl.constexpr):
    """Gate and up lie side by side."""
    gate, up = gl.split(gl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
    return ACTIVATION(gate, up, p)


@gluon.jit
def conclude(
    left, right, schedule, x, w, out, out_desc, buffers, e, p, slot, live, r, weight, expert, row0, end, n0, second,
    column0,
    CONSUMER: gl.constexpr, PARTS: gl.constexpr, EVERY: gl.constexpr, LIMIT: gl.constexpr, COLUMNS: gl.constexpr,
    FINISH: gl.constexpr, EPILOGUE: gl.constexpr, ACTIVATION: gl.constexpr, GATE_UP: gl.constexpr,
    STORE: gl.constexpr, ARRANGE: gl.constexpr, ENCODE: gl.constexpr, LARGEST: gl.constexpr, OUT_GROUP: gl.constexpr,
):  # fmt: skip
    """All that follows two sums, of columns ``n0 ...`` and ``second ...``: gate and up, or (EVERY == 1) two halves."""
    left = _finished(left, x, w, e, slot, live, r, weight, expert, n0, 0, EVERY, LIMIT, FINISH, EPILOGUE)
    # One half after the other where they do not meet: fewer registers.
    if GATE_UP is None:
        if ACTIVATION is not None:
            left = ACTIVATION(left, p)
        _store(
            left, schedule, out, out_desc, buffers, row0, end, n0,
            CONSUMER, COLUMNS, STORE, ARRANGE, ENCODE, LARGEST, OUT_GROUP,
        )  # fmt: skip
    elif GATE_UP == "interleaved" and EVERY == 1:
        left = _activated_pairs(left, p, ACTIVATION)
    right = _finished(right, x, w, e, slot, live, r, weight, expert, second, PARTS - 1, EVERY, LIMIT, FINISH, EPILOGUE)
    if GATE_UP is None:
        if ACTIVATION is not None:
            right = ACTIVATION(right, p)
        _store(
            right, schedule, out, out_desc, buffers, row0, end, second,
            CONSUMER, COLUMNS, STORE, ARRANGE, ENCODE, LARGEST, OUT_GROUP,
        )  # fmt: skip
    else:
        if GATE_UP == "interleaved" and EVERY == 1:
            result = beside(left, _activated_pairs(right, p, ACTIVATION))
        else:
            result = ACTIVATION(left, right, p)
        _store(
            result, schedule, out, out_desc, buffers, row0, end, column0,
            CONSUMER, COLUMNS, STORE, ARRANGE, ENCODE, LARGEST, OUT_GROUP,
        )  # fmt: skip
