"""Sort the live slots by expert (stable in the slot) and cover them with tiles of BLOCK_M rows.

Up to some thousand slots in one launch, ``route``: the row of a slot is the number of slots that sort before it, found
by comparing it with all of them. More slots are sorted chunk by chunk, in three launches:

* ``count``:   chunk c -> how many of its slots chose each expert;
* ``offsets``: turns counts into the first row of (chunk, expert), and writes the offsets; no tile is claimed yet;
* ``scatter``: chunk c sorts its slots and writes them to their rows; programs also write the tiles.

Invariants: (1) rows of expert e are ``offset[e] .. offset[e + 1]``, in the order of slots, or of the tokens in
``ids.order``: no atomics, so two runs give the same bits. (2) Absent slots get no row. (3) sum over e of
ceil(S_e / BLOCK_M) is at most ceil(S / BLOCK_M) + min(E, S), which bounds the tile table. Grid: one dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.tiles import local_expert, n_slots


@triton.jit
def _in_order(ids, place):
    """The slot that is sorted as number ``place``."""
    if ids.order is None:
        return place
    else:
        token = tl.load(ids.order + place // ids.top_k, mask=place < n_slots(ids), other=0)
        return token * ids.top_k + place % ids.top_k


@triton.jit
def _experts_at(ids, place, E: tl.constexpr):
    """Expert of the slot at each place; E stands for absent, so that absent slots sort last."""
    expert = local_expert(ids, _in_order(ids, place), place < n_slots(ids))
    return tl.where(expert >= 0, expert, E)


@triton.jit
def _count_experts(expert, E: tl.constexpr, E_PAD: tl.constexpr):
    return tl.histogram(expert, E_PAD, mask=expert < E)


@triton.jit
def _write_tiles(
    schedule, start, count, first_tile, E: tl.constexpr, E_PAD: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Tiles ``first_tile ..`` of the table, found from the first row and the number of rows of every expert."""
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    last_tile = tl.cumsum(tiles, 0)
    n_tiles = tl.sum(tiles)
    tile = first_tile + tl.arange(0, TILES)
    expert = tl.sum((last_tile[:, None] <= tile[None, :]).to(tl.int32), 0)
    mine = tl.arange(0, E_PAD)[:, None] == expert[None, :]
    row = tl.sum(tl.where(mine, start[:, None] + (tile[None, :] - (last_tile - tiles)[:, None]) * BLOCK_M, 0), 0)
    tl.store(schedule.tile_expert + tile, expert, mask=tile < n_tiles)
    tl.store(schedule.tile_row + tile, row, mask=tile < n_tiles)


@triton.jit
def _store_offsets(schedule, total, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr):
    e = tl.arange(0, E_PAD)
    end = tl.cumsum(total, 0)
    tl.store(schedule.offset + e + 1, end, mask=e < E)
    tl.store(schedule.offset, 0)
    tl.store(schedule.n_tiles, tl.sum((total + BLOCK_M - 1) // BLOCK_M))
    tl.store(schedule.claimed + tl.arange(0, 2), 0)


@triton.jit
def count(ids, counts, RELEASE: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr):
    RELEASE()
    chunk = tl.program_id(0)
    expert = _experts_at(ids, chunk * CHUNK + tl.arange(0, CHUNK), E)
    e = tl.arange(0, E_PAD)
    tl.store(counts + chunk.to(tl.int64) * E + e, _count_experts(expert, E, E_PAD), mask=e < E)


@triton.jit(do_not_specialize=["n_chunks", "own_chunks"])
def offsets(
    ids, schedule, counts, base, n_chunks, own_chunks,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid: a program for every ``own_chunks`` chunks; each adds up all chunks, which is quick, and places its own."""
    WAIT()
    RELEASE()
    first = tl.program_id(0) * own_chunks
    e = tl.arange(0, E_PAD)
    total = tl.zeros((E_PAD,), tl.int32)
    before = tl.zeros((E_PAD,), tl.int32)
    for c0 in range(0, n_chunks, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        address = counts + c.to(tl.int64)[:, None] * E + e[None, :]
        here = tl.load(address, mask=(c < n_chunks)[:, None] & (e < E)[None, :], other=0)
        total += tl.sum(here, 0)
        before += tl.sum(tl.where((c < first)[:, None], here, 0), 0)
    start = tl.cumsum(total, 0) - total + before
    if first == 0:
        _store_offsets(schedule, total, E, E_PAD, BLOCK_M)
    last = tl.minimum(first + own_chunks, n_chunks)
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mask = (c < last)[:, None] & (e < E)[None, :]
        at = c.to(tl.int64)[:, None] * E + e[None, :]
        here = tl.load(counts + at, mask=mask, other=0)
        # What a slot of chunk c adds to its place in the sorted chunk to get its row: rows of its expert
        # in earlier chunks, less the slots of smaller experts in this chunk.
        smaller = tl.cumsum(here, 1) - here
        earlier = tl.cumsum(here, 0) - here
        tl.store(base + at, start[None, :] + earlier - smaller, mask=mask)
        start += tl.sum(here, 0)


@triton.jit(do_not_specialize=["n_chunks"])
def scatter(
    ids, schedule, base, n_chunks,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    WAIT()
    RELEASE()
    program = tl.program_id(0)
    if program < n_chunks:
        place = tl.arange(0, CHUNK)
        key = tl.sort(_experts_at(ids, program * CHUNK + place, E) * CHUNK + place)
        expert = key // CHUNK
        row = place + tl.load(base + program.to(tl.int64) * E + expert, mask=expert < E, other=0)
        slot = _in_order(ids, program * CHUNK + key % CHUNK)
        tl.store(schedule.slot + row, slot, mask=expert < E)
        tl.store(schedule.row + slot, row, mask=expert < E)
    if program * TILES < tl.load(schedule.n_tiles):
        e = tl.arange(0, E_PAD)
        start = tl.load(schedule.offset + e, mask=e < E, other=0)
        end = tl.load(schedule.offset + e + 1, mask=e < E, other=0)
        _write_tiles(schedule, start, end - start, program * TILES, E, E_PAD, TILES, BLOCK_M)


@triton.jit(do_not_specialize=["n_sorters"])
def route(
    ids, schedule, n_sorters,
    RELEASE: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, SLOTS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All of the above for up to SLOTS slots. Grid: ``n_sorters`` programs with OWN slots each, and those that write
    TILES tiles each.
    """
    RELEASE()
    program = tl.program_id(0)
    if program < n_sorters:
        place = program * OWN + tl.arange(0, OWN)
        expert = _experts_at(ids, place, E)
        row = tl.zeros((OWN,), tl.int32)  # how many slots sort before each
        for first in range(0, n_slots(ids), BLOCK):
            other = first + tl.arange(0, BLOCK)
            before = _experts_at(ids, other, E) * SLOTS + other
            row += tl.sum((before[:, None] < (expert * SLOTS + place)[None, :]).to(tl.int32), 0)
        slot = _in_order(ids, place)
        tl.store(schedule.slot + row, slot, mask=expert < E)
        tl.store(schedule.row + slot, row, mask=expert < E)
    else:
        total = tl.zeros((E_PAD,), tl.int32)
        for first in range(0, n_slots(ids), BLOCK):
            total += _count_experts(_experts_at(ids, first + tl.arange(0, BLOCK), E), E, E_PAD)
        if program == n_sorters:
            _store_offsets(schedule, total, E, E_PAD, BLOCK_M)
        start = tl.cumsum(total, 0) - total
        _write_tiles(schedule, start, total, (program - n_sorters) * TILES, E, E_PAD, TILES, BLOCK_M)
