"""Low-rank adapters: ``delta[s] = B[a, e] (scaling[a] * A[a, e] x[s])`` for slot s with adapter a and expert e.

Two policies of the grouped GEMM, whose rows, tiles and sums stay those of a layer without adapters:

* *shrink*: a launch of that kernel with A as its weights: those of all adapters side by side, slots times R (or 2R)
  columns, of which a row keeps its own adapter's. ``tl.program_id(0)`` is a tile of rows of one expert; the tile
  numbers of a program are blocks of the columns of those adapters that have rows in it, shared by the programs along
  axis 1. (1) A column has one adapter, so each element is stored once, zeros beyond the rank. (2) A tile without
  adapters loads nothing, nor do columns beyond the rank. Few slots are rows alone, by the kernel of these.
* *expand*: an EPILOGUE that adds B v to the rows that have an adapter, before what the layer has in its epilogue.
  (3) Other rows keep their bits; a tile without adapters makes no turn. (The kernel of Hopper adds B v as steps of its
  sum instead, and is told by shrink which: ``found`` and ``blocks``.)

The weights of the layer are read as often as without adapters, those of an adapter once per tile that has rows of it.
Where experts have several tiles, ``by_adapter`` has sorted the tokens first, so that a tile has few adapters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.epilogue import bias_then_weigh, weigh_then_bias
from fusedmoe.kernels.tiles import local_expert


@triton.jit
def adapter_of(adapters, slot, live):
    """Adapter of each slot, or -1: outside of the slots of adapters, empty or disabled."""
    token = (slot // adapters.top_k).to(tl.int64)
    adapter = tl.load(adapters.ids + token * adapters.stride, mask=live, other=-1)
    there = (adapter >= 0) & (adapter < adapters.slots)
    at = tl.where(there, adapter, 0)
    there = there & (tl.load(adapters.rank + at, mask=there, other=0) > 0)
    if adapters.enabled is not None:
        there = there & (tl.load(adapters.enabled + at, mask=there, other=0) != 0)
    return tl.where(there, adapter, -1).to(tl.int32)


@triton.jit
def _order(adapter):
    """Place of each row's adapter among those of a tile, -1 without one; the smallest of them, and how many there are.

    In a tile of more than 32 rows the places are those of all adapters from its smallest to its largest.
    """
    smallest = tl.min(tl.where(adapter < 0, 1 << 30, adapter), 0)
    largest = tl.max(adapter, 0)
    if adapter.shape[0] > 32:
        place = adapter - smallest
        count = tl.maximum(largest - smallest + 1, 0)
    else:
        row = tl.arange(0, adapter.shape[0])
        again = (adapter[:, None] == adapter[None, :]) & (row[:, None] < row[None, :])
        new = (tl.sum(again.to(tl.int32), 0) == 0) & (adapter >= 0)
        place = tl.sum(((adapter[None, :] < adapter[:, None]) & new[None, :]).to(tl.int32), 1)
        count = tl.sum(new.to(tl.int32), 0)
    return tl.where(adapter >= 0, place, -1), smallest, count


@triton.jit
def _adapter_at(adapter, order, smallest, count, place):
    """Adapter at each of some places; beyond the last, -1."""
    if adapter.shape[0] > 32:  # as in _order
        return tl.where(place < count, smallest + place, -1)
    else:
        return tl.max(tl.where(order[:, None] == place[None, :], adapter[:, None], -1), 0)


# --- shrink -------------------------------------------------------------------------------------------


@triton.jit
def _matrices(adapters, expert, adapter, i):
    """Matrix of A of each column of block i, adapter * E + expert; -1 beyond the last adapter, and beyond ranks."""
    order, smallest, count = _order(adapter)
    n = i * adapters.block + tl.arange(0, adapters.block)
    own = _adapter_at(adapter, order, smallest, count, n // adapters.columns)
    rank = tl.load(adapters.rank + own, mask=own >= 0, other=0)
    return tl.where(n % adapters.max_rank < rank, own * adapters.experts + expert, -1)


@triton.jit
def _n_blocks(adapters, adapter):
    """Blocks of columns of the adapters of some slots."""
    _, _, count = _order(adapter)
    return tl.cdiv(count * adapters.columns, adapters.block)


@triton.jit
def _scheduled(ids, schedule, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0)
    there = tile < tl.load(schedule.n_tiles)
    expert = tl.load(schedule.tile_expert + tile, mask=there, other=0)
    row = tl.load(schedule.tile_row + tile, mask=there, other=0) + tl.arange(0, BLOCK_M)
    live = there & (row < tl.load(schedule.offset + expert + 1))
    slot = tl.load(schedule.slot + row, mask=live, other=0)
    return expert, row, slot, adapter_of(ids, slot, live)


@triton.jit
def scheduled_span(ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr, WAIT: tl.constexpr):
    WAIT()
    _, row, _, adapter = _scheduled(ids, schedule, BLOCK_M)
    if ids.step > 0:  # noqa: SIM102 - a constant, without which the other is not compiled
        if tl.program_id(1) == 0:
            _tell(ids, schedule, row, adapter)
    return tl.program_id(1), _n_blocks(ids, adapter), tl.num_programs(1)


@triton.jit
def _tell(ids, schedule, row, adapter):
    """Write down for an expand by steps what a tile has."""
    tile = tl.program_id(0)
    there = tile < tl.load(schedule.n_tiles)
    expert = tl.load(schedule.tile_expert + tile, mask=there, other=0)
    tl.store(ids.found + row, adapter, mask=there & (row < tl.load(schedule.offset + expert + 1)))
    smallest, largest = tl.min(tl.where(adapter < 0, 1 << 30, adapter), 0), tl.max(adapter, 0)
    first, last = smallest * ids.columns // ids.step, tl.cdiv((largest + 1) * ids.columns, ids.step)
    tl.store(ids.blocks + 2 * tile, first, mask=there)
    tl.store(ids.blocks + 2 * tile + 1, tl.where(largest < 0, 0, last - first), mask=there)


@triton.jit
def scheduled_locate(
    i, ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, FEW: tl.constexpr
):
    expert, row, slot, adapter = _scheduled(ids, schedule, BLOCK_M)
    return _matrices(ids, expert, adapter, i), 0, row, slot, adapter >= 0, i


@triton.jit
def load_a(
    w, desc, matrix, n0, k0, limit, N: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_ITEM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """LOAD_W of A, where columns have matrices of their own, or -1."""
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    at = tl.maximum(matrix, 0)
    base = of_matrix(w, at, n)
    mask = (matrix >= 0)[None, :]
    if MASKED:
        mask = mask & (k < limit)[:, None]
    return tl.load(w.ptr + base[None, :] + k.to(tl.int64)[:, None] * w.stride_k, mask=mask, other=0.0)


@triton.jit
def scale(acc, e, weight, matrix, slot, live, col, inside):
    """EPILOGUE of shrink, ``e`` a Shrink."""
    return acc * tl.load(e.scaling + matrix // e.experts, mask=matrix >= 0, other=0.0)[None, :]


# Few slots: each is a row alone of the kernel that multiplies these, whose matrix is its adapter's at its expert.


@triton.jit
def matrix_of(ids, slot, mask):
    """MATRIX: adapter * E + expert of each slot, or -1."""
    expert = local_expert(ids, slot, mask)
    adapter = adapter_of(ids, slot, expert >= 0)
    return tl.where(adapter >= 0, adapter * ids.experts + expert, -1)


@triton.jit
def of_matrix(w, matrix, n):
    """PLACE of column n of A x, whose columns are those of one matrix or of all of them side by side."""
    start = (matrix // w.experts).to(tl.int64) * w.stride_a + (matrix % w.experts).to(tl.int64) * w.stride_e
    # Not the remainder of a remainder: Triton 3.6 takes that for a multiple of its divisor, and loads 16 bytes at once.
    start += (n % w.columns // w.max_rank).to(tl.int64) * w.part
    return start + (n % w.max_rank).to(tl.int64) * w.stride_n


@triton.jit
def scale_one(acc, e, weight, matrix, slot, live, col, inside):
    """EPILOGUE of a row alone."""
    adapter = matrix // e.experts
    used = col % e.max_rank < tl.load(e.rank + adapter)
    return tl.where(used[None, :], acc * tl.load(e.scaling + adapter), 0.0)


@triton.jit
def write_own(value, out, dest, live, column, COLUMNS: tl.constexpr):
    """WRITE of shrink, ``out`` an AdaptedOutput: of each row the columns of its own adapter."""
    order, _, _ = _order(adapter_of(out, dest, live))
    own = order[:, None] == (column // out.columns)[None, :]
    address = out.ptr + dest.to(tl.int64)[:, None] * out.stride_row + (column % out.columns)[None, :]
    tl.store(address, value, mask=own)


# --- expand -------------------------------------------------------------------------------------------


@triton.jit
def row_of_b(b, n, part):
    """Place of rows n of B, all of them of ``part``. Gate and up may have tensors of their own, which are as far from
    each other as ``b.part`` says: beside what lies between their rows in one tensor, or where these alternate at all.
    """
    if b.parts == "alternate":
        return (n // 2).to(tl.int64) * b.stride_n + (n % 2).to(tl.int64) * b.part
    elif b.parts == "halves":
        return n.to(tl.int64) * b.stride_n + part * b.part
    else:
        return n.to(tl.int64) * b.stride_n


@triton.jit
def _add_product(delta, b, own, r, used, mine, e_offset, slot, col, inside, part):
    """Add columns r of part ``part`` of v, of the rows that are theirs, times those of B of adapters ``own``."""
    there = own >= -1
    address = b.v + slot.to(tl.int64)[:, None] * b.v_stride + (r + part * b.max_rank)[None, :]
    start = tl.maximum(own, 0).to(tl.int64) * b.stride_a
    if b.steps:
        start = tl.multiple_of(start, 8)  # columns of A x that have one adapter
        there = own >= 0
    elif b.max_rank % b.block != 0:
        there = r < b.max_rank
        mine = mine & there[None, :]
    start += r.to(tl.int64) * b.stride_r
    w_address = b.ptr + e_offset + row_of_b(b, col, part)[None, :] + start[:, None]
    v = tl.load(address, mask=mine, other=0.0)
    w = tl.load(w_address, mask=inside[None, :] & there[:, None], other=0.0)
    if not b.steps:  # a mask by the rank would make loads narrow; what lies beyond it may be NaN, on either side
        v, w = tl.where(used[None, :], v, 0.0), tl.where(used[:, None], w, 0.0)
    return tl.dot(v, w, delta, input_precision=b.precision)


@triton.jit
def expand(acc, b, expert, slot, live, col, inside):
    """Add B v, ``b`` an AdaptedEpilogue, to the rows that have an adapter.

    One loop over pieces of the columns of all adapters in the tile, which the compiler can load ahead: no turn may wait
    for a number that it has to load. Where B is finite, and 8 columns at a time have one adapter (``b.steps``), a piece
    has those of several, of which a row takes its own and zeros, and the sum goes on. Else it has those of one, and
    other rows keep what they have: 0 times an infinity would not be 0.
    """
    adapter = adapter_of(b, slot, live)
    order, smallest, count = _order(adapter)
    e_offset = expert.to(tl.int64) * b.stride_e
    ranks = tl.load(b.rank + tl.maximum(adapter, 0), mask=adapter >= 0, other=0)
    each = tl.cdiv(tl.max(ranks, 0), b.block)
    pieces = tl.cdiv(count * b.max_rank, b.block) if b.steps else count * each
    for j in tl.range(0, pieces, num_stages=b.stages):
        k = tl.arange(0, b.block)
        if b.steps:
            c = k + j * b.block
            place, r = c // b.max_rank, c % b.max_rank
        else:
            place, r = k * 0 + j // each, k + j % each * b.block
        mine = order[:, None] == place[None, :]
        if b.steps:
            own = tl.max_constancy(_adapter_at(adapter, order, smallest, count, place), 8)
            used = own >= 0
            delta = acc
        else:
            its = order == j // each
            own = k * 0 + tl.max(tl.where(its, adapter, 0), 0)
            used = r < tl.max(tl.where(its, ranks, 0), 0)
            delta = tl.zeros_like(acc)
        if b.parts == "alternate":
            up = col % 2 == 1
            delta = _add_product(delta, b, own, r, used, mine, e_offset, slot, col, inside & (up == 0), 0)
            delta = _add_product(delta, b, own, r, used, mine, e_offset, slot, col, inside & up, 1)
        elif b.parts == "halves":
            part = (tl.min(col, 0) >= b.up).to(tl.int32)
            delta = _add_product(delta, b, own, r, used, mine, e_offset, slot, col, inside, part)
        else:
            delta = _add_product(delta, b, own, r, used, mine, e_offset, slot, col, inside, 0)
        if b.steps:
            acc = delta
        else:
            acc = tl.where((order == j // each)[:, None], acc + delta, acc)
    return acc


@triton.jit
def expand_one(acc, b, expert, slot, live, col, inside):
    """As expand, for a tile of one row, [1, BLOCK_N]: a product without tensor cores, of a piece that has all columns.

    Without a branch, so that the loads of several rows, one after the other, are under way together.
    """
    adapter = tl.max(adapter_of(b, slot, live), 0)
    at = tl.maximum(adapter, 0)
    part = 0
    if b.parts == "alternate":
        part = tl.min(col, 0) % 2  # a tile has gate rows or up rows
    elif b.parts == "halves":
        part = (tl.min(col, 0) >= b.up).to(tl.int32)
    r = tl.arange(0, b.block)
    used = (adapter >= 0) & (r < tl.load(b.rank + at))
    v_row = b.v + tl.max(slot, 0).to(tl.int64) * b.v_stride + part * b.max_rank
    v = tl.load(v_row + r, mask=used, other=0.0).to(tl.float32)
    base = b.ptr + at.to(tl.int64) * b.stride_a + expert.to(tl.int64) * b.stride_e
    address = base + row_of_b(b, col, part)[:, None] + r.to(tl.int64)[None, :] * b.stride_r
    w = tl.load(address, mask=inside[:, None] & used[None, :], other=0.0).to(tl.float32)
    return acc + tl.where(adapter >= 0, tl.sum(w * v[None, :], 1)[None, :], -0.0)


@triton.jit
def expand_one_weigh_then_bias(acc, e, weight, expert, slot, live, col, inside):
    acc = expand_one(acc, e, expert, slot, live, col, inside)
    return weigh_then_bias(acc, e, weight, expert, slot, live, col, inside)


@triton.jit
def expand_one_bias_then_weigh(acc, e, weight, expert, slot, live, col, inside):
    acc = expand_one(acc, e, expert, slot, live, col, inside)
    return bias_then_weigh(acc, e, weight, expert, slot, live, col, inside)


@triton.jit
def expand_weigh_then_bias(acc, e, weight, expert, slot, live, col, inside):
    acc = expand(acc, e, expert, slot, live, col, inside)
    return weigh_then_bias(acc, e, weight, expert, slot, live, col, inside)


@triton.jit
def expand_bias_then_weigh(acc, e, weight, expert, slot, live, col, inside):
    acc = expand(acc, e, expert, slot, live, col, inside)
    return bias_then_weigh(acc, e, weight, expert, slot, live, col, inside)


# --- sort ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_tokens"])
def by_adapter(
    adapters, order, n_tokens,
    RELEASE: tl.constexpr, BUCKETS: tl.constexpr, CHUNK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Tokens sorted by adapter, those without one first; stable. Grid: (chunks of tokens).

    Every program counts all tokens, COUNTED at a time, which are read from L2: one launch, and nothing to hand over.
    """
    RELEASE()
    chunk = tl.program_id(0)
    place = tl.arange(0, CHUNK)
    total = tl.zeros((BUCKETS,), tl.int32)
    earlier = tl.zeros((BUCKETS,), tl.int32)
    for first in range(0, n_tokens, COUNTED):
        token = first + tl.arange(0, COUNTED)
        live = token < n_tokens
        bucket = adapter_of(adapters, token * adapters.top_k, live) + 1
        total += tl.histogram(bucket, BUCKETS, mask=live)
        earlier += tl.histogram(bucket, BUCKETS, mask=live & (token < chunk * CHUNK))
    token = chunk * CHUNK + place
    live = token < n_tokens
    mine = tl.where(live, adapter_of(adapters, token * adapters.top_k, live) + 1, BUCKETS)
    here = tl.histogram(mine, BUCKETS, mask=live)
    # What a token adds to its place in the sorted chunk: tokens of smaller buckets and of earlier chunks, less those
    # of smaller buckets in this chunk.
    shift = (tl.cumsum(total, 0) - total) + earlier - (tl.cumsum(here, 0) - here)
    key = tl.sort(mine * CHUNK + place)
    live = key < BUCKETS * CHUNK
    found = tl.gather(shift, tl.where(live, key // CHUNK, 0), 0)
    tl.store(order + place + found, chunk * CHUNK + key % CHUNK, mask=live)
