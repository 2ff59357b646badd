"""Which tiles a program computes, and which rows a tile holds.

A tile order is a pair of functions: ``span(...) -> first, last, step`` of the tile numbers of this
program, which also waits for the previous launch before anything that one wrote is read, and
``locate(i, ...) -> expert, row0, row, slot, live, block_n``. ``row`` is where a row's intermediate lies,
``slot`` names its token and router weight; ``row0`` is the first row of the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def n_slots(ids):
    return ids.odd // 2


@triton.jit
def local_expert(ids, slot, mask):
    """Local expert of each slot, or -1: outside [0, n_global), unmapped, or masked."""
    token = (slot // ids.top_k).to(tl.int64)
    choice = (slot % ids.top_k).to(tl.int64)
    expert = tl.load(ids.ptr + token * ids.stride_t + choice * ids.stride_j, mask=mask, other=-1)
    present = (expert >= 0) & (expert < ids.odd_global // 2)
    if ids.map_ptr is not None:
        expert = tl.load(ids.map_ptr + tl.where(present, expert, 0), mask=present, other=-1)
        present = present & (expert >= 0) & (expert < ids.n_local)
    return tl.where(present, expert, -1).to(tl.int32)


# --- scheduled: tiles were written to memory by kernels/routing.py -----------------------------------


@triton.jit
def scheduled_span(ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr, WAIT: tl.constexpr):
    WAIT()
    # A grid of one program per tile makes at most one turn; a smaller grid is a persistent kernel.
    return tl.program_id(0), tl.load(schedule.n_tiles) * N_BLOCKS, tl.num_programs(0)


@triton.jit
def scheduled_tile(i, n_tiles, N_BLOCKS: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile of rows and block of columns of tile number i: GROUP_M tiles share a column block of weights while it is
    in L2.
    """
    group = i // (GROUP_M * N_BLOCKS)
    within = i % (GROUP_M * N_BLOCKS)
    size = tl.minimum(n_tiles - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit
def scheduled_locate(
    i, ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, FEW: tl.constexpr
):
    tile, block_n = scheduled_tile(i, tl.load(schedule.n_tiles), N_BLOCKS, GROUP_M)
    expert = tl.load(schedule.tile_expert + tile)
    row0 = tl.load(schedule.tile_row + tile)
    row = row0 + tl.arange(0, BLOCK_M)
    live = row < tl.load(schedule.offset + expert + 1)
    slot = tl.load(schedule.slot + row, mask=live, other=0)
    return expert, row0, row, slot, live, block_n


# --- few: S <= FEW slots, no schedule; every program reads all ids ------------------------------------
#
# Group g of programs serves one expert: expert g when E <= S, else the expert of slot g, unless an
# earlier slot chose it too. Its rows are the slots that chose it, BLOCK_M at a time.


@triton.jit
def few_group(ids, N_BLOCKS: tl.constexpr, FEW: tl.constexpr):
    s = tl.arange(0, FEW)
    chosen = local_expert(ids, s, s < n_slots(ids))
    group = tl.program_id(0) // N_BLOCKS
    by_slot = ids.n_local > n_slots(ids)
    expert = tl.where(by_slot, tl.sum(tl.where(s == group, chosen, 0)), group)
    match = (chosen == expert) & (expert >= 0)
    earlier = tl.sum((match & (s < group)).to(tl.int32))
    match = match & ((earlier == 0) | (by_slot == 0))
    return expert, s, match


@triton.jit
def few_span(ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr, WAIT: tl.constexpr):
    _, _, match = few_group(ids, N_BLOCKS, FEW)
    WAIT()  # the ids are the user's; only the rows come from the launch before
    return 0, tl.cdiv(tl.sum(match.to(tl.int32)), BLOCK_M), 1


@triton.jit
def few_locate(
    i, ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, FEW: tl.constexpr
):
    expert, s, match = few_group(ids, N_BLOCKS, FEW)
    rank = tl.cumsum(match.to(tl.int32), 0) - 1
    wanted = i * BLOCK_M + tl.arange(0, BLOCK_M)
    pick = match[:, None] & (rank[:, None] == wanted[None, :])
    slot = tl.sum(tl.where(pick, s[:, None], 0), 0)
    live = wanted < tl.sum(match.to(tl.int32))
    return expert, 0, slot, slot, live, tl.program_id(0) % N_BLOCKS
