"""Low-rank adapters: ``delta[s] = B[a, e] (scaling[a] * A[a, e] x[s])`` for slot s with adapter a and expert e.

Two policies of the grouped GEMM, whose rows, tiles and sums stay those of a layer without adapters:

* *shrink*: a launch of that kernel with A as its weights, and a SPAN and LOCATE of its own. ``tl.program_id(0)`` is a
  tile of rows of one expert (few slots: a group) and a block of columns, as ever; the tile numbers of a program are the
  adapters that have rows in it, shared by the programs along axis 1. (1) Rows of an adapter are live in its turn alone,
  so each row is stored once. (2) A tile without adapters, and a block of columns beyond the rank, load nothing.
* *expand*: an EPILOGUE that adds B v to the rows of each adapter in a tile, adapter by adapter, before what the layer
  has in its epilogue. (3) Other rows keep their bits, whatever an adapter holds; a tile without adapters makes no turn.

The weights of the layer are read as often as without adapters, those of an adapter once per tile that has rows of it.
Where experts have several tiles, ``by_adapter`` has sorted the tokens first, so that a tile has few adapters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedmoe.kernels.epilogue import bias_then_weigh, weigh_then_bias
from fusedmoe.kernels.tiles import few_group


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
def _range(adapter):
    """First and one past the last adapter of some slots; without one, a range that is empty from any turn on."""
    return tl.min(tl.where(adapter < 0, 1 << 30, adapter), 0), tl.max(adapter, 0) + 1


# --- shrink -------------------------------------------------------------------------------------------


@triton.jit
def _turn(adapters, expert, adapter, live, i, block_n):
    """Matrix of A, -1 where there is nothing to do, and live rows in the turn of adapter i."""
    live = live & (adapter == i)
    n = block_n * adapters.block + tl.arange(0, adapters.block)
    within = tl.min(n % adapters.max_rank, 0) < tl.load(adapters.rank + i)
    some = (tl.max(live.to(tl.int32), 0) > 0) & within
    return tl.where(some, i * adapters.experts + expert, -1), live & within


@triton.jit
def _scheduled(ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr):
    tile = tl.program_id(0) // N_BLOCKS
    there = tile < tl.load(schedule.n_tiles)
    expert = tl.load(schedule.tile_expert + tile, mask=there, other=0)
    row = tl.load(schedule.tile_row + tile, mask=there, other=0) + tl.arange(0, BLOCK_M)
    live = there & (row < tl.load(schedule.offset + expert + 1))
    slot = tl.load(schedule.slot + row, mask=live, other=0)
    return expert, row, slot, live, adapter_of(ids, slot, live)


@triton.jit
def scheduled_span(ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr, WAIT: tl.constexpr):
    WAIT()
    _, _, _, _, adapter = _scheduled(ids, schedule, N_BLOCKS, BLOCK_M)
    first, last = _range(adapter)
    return first + tl.program_id(1), last, tl.num_programs(1)


@triton.jit
def scheduled_locate(
    i, ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, FEW: tl.constexpr
):
    expert, row, slot, live, adapter = _scheduled(ids, schedule, N_BLOCKS, BLOCK_M)
    block_n = tl.program_id(0) % N_BLOCKS
    matrix, live = _turn(ids, expert, adapter, live, i, block_n)
    return matrix, 0, row, slot, live, block_n


# Few slots: a tile of FEW rows, which are all slots, holds any group whole.


@triton.jit
def few_span(ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, FEW: tl.constexpr, WAIT: tl.constexpr):
    _, slot, match = few_group(ids, N_BLOCKS, FEW)
    WAIT()
    first, last = _range(adapter_of(ids, slot, match))
    return first + tl.program_id(1), last, tl.num_programs(1)


@triton.jit
def few_locate(
    i, ids, schedule, N_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, FEW: tl.constexpr
):
    expert, slot, match = few_group(ids, N_BLOCKS, FEW)
    block_n = tl.program_id(0) % N_BLOCKS
    adapter = adapter_of(ids, slot, match)
    matrix, live = _turn(ids, expert, adapter, match, i, block_n)
    return matrix, 0, slot, slot, live, block_n


@triton.jit
def load_a(
    w, desc, matrix, n0, k0, limit, N: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_ITEM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """LOAD_W of A, where ``matrix`` is adapter * E + expert, or -1."""
    n = n0 + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    base = w.ptr + (matrix // w.experts).to(tl.int64) * w.stride_a + (matrix % w.experts).to(tl.int64) * w.stride_e
    address = base + n.to(tl.int64)[None, :] * w.stride_n + k.to(tl.int64)[:, None] * w.stride_k
    mask = matrix >= 0
    if RAGGED:
        mask = mask & (n < N)[None, :]
    if MASKED:
        mask = mask & (k < limit)[:, None]
    return tl.load(address, mask=mask, other=0.0)


@triton.jit
def scale(acc, e, weight, matrix, slot, live, col, inside):
    """EPILOGUE of shrink, ``e`` a Shrink."""
    return acc * tl.load(e.scaling + matrix // e.experts, mask=matrix >= 0, other=0.0)


# --- expand -------------------------------------------------------------------------------------------


@triton.jit
def add_product(delta, b, i, e_offset, slot, live, col, inside, r0, rank, part):
    """Add columns r0 ... of part ``part`` of v, times those of B.

    Loads are not masked by the rank, which would make them narrow; what lies beyond it may be NaN, on either side.
    """
    r = r0 + tl.arange(0, b.block)
    used, there = r < rank, r < b.max_rank
    address = b.v + slot.to(tl.int64)[:, None] * b.v_stride + (r + part * b.max_rank)[None, :]
    base = b.ptr + tl.cast(i, tl.int64) * b.stride_a + e_offset
    w_address = base + col.to(tl.int64)[None, :] * b.stride_n + r.to(tl.int64)[:, None] * b.stride_r
    if b.max_rank % b.block == 0:
        v = tl.load(address, mask=live[:, None], other=0.0)
        w = tl.load(w_address, mask=inside[None, :], other=0.0)
    else:
        v = tl.load(address, mask=live[:, None] & there[None, :], other=0.0)
        w = tl.load(w_address, mask=inside[None, :] & there[:, None], other=0.0)
    v, w = tl.where(used[None, :], v, 0.0), tl.where(used[:, None], w, 0.0)
    return tl.dot(v, w, delta, input_precision=b.precision)


@triton.jit
def expand(acc, b, expert, slot, live, col, inside):
    """Add B v, ``b`` an AdaptedEpilogue, to the rows of each adapter, where it has any."""
    adapter = adapter_of(b, slot, live)
    first, last = _range(adapter)
    e_offset = expert.to(tl.int64) * b.stride_e
    for i in tl.range(first, last, num_stages=1):
        mine = adapter == i
        rank = tl.where(tl.max(mine.to(tl.int32), 0) > 0, tl.load(b.rank + i), 0)
        delta = tl.zeros_like(acc)
        for r0 in tl.range(0, rank, b.block, num_stages=1):
            if b.parts == "alternate":
                up = col % 2 == 1
                delta = add_product(delta, b, i, e_offset, slot, mine, col, inside & (up == 0), r0, rank, 0)
                delta = add_product(delta, b, i, e_offset, slot, mine, col, inside & up, r0, rank, 1)
            elif b.parts == "halves":
                part = (tl.min(col, 0) >= b.up).to(tl.int32)
                delta = add_product(delta, b, i, e_offset, slot, mine, col, inside, r0, rank, part)
            else:
                delta = add_product(delta, b, i, e_offset, slot, mine, col, inside, r0, rank, 0)
        acc = tl.where(mine[:, None], acc + delta, acc)
    return acc


@triton.jit
def expand_one(acc, b, expert, slot, live, col, inside):
    """As expand, for a tile of one row, [1, BLOCK_N]: a product without tensor cores."""
    adapter = tl.max(adapter_of(b, slot, live), 0)
    if adapter >= 0:
        part = 0
        if b.parts == "alternate":
            part = tl.min(col, 0) % 2  # a tile has gate rows or up rows
        elif b.parts == "halves":
            part = (tl.min(col, 0) >= b.up).to(tl.int32)
        rank = tl.load(b.rank + adapter)
        v_row = b.v + tl.max(slot, 0).to(tl.int64) * b.v_stride + part * b.max_rank
        base = b.ptr + adapter.to(tl.int64) * b.stride_a + expert.to(tl.int64) * b.stride_e
        for r0 in tl.range(0, rank, b.block, num_stages=1):
            r = r0 + tl.arange(0, b.block)
            v = tl.load(v_row + r, mask=r < rank, other=0.0).to(tl.float32)
            address = base + col.to(tl.int64)[:, None] * b.stride_n + r.to(tl.int64)[None, :] * b.stride_r
            w = tl.load(address, mask=inside[:, None] & (r < rank)[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(w * v[None, :], 1)[None, :]
    return acc


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
    RELEASE: tl.constexpr, BUCKETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Tokens sorted by adapter, those without one first; stable. Grid: (chunks of tokens).

    Every program counts all tokens, which are read from L2: one launch, and nothing to hand over.
    """
    RELEASE()
    chunk = tl.program_id(0)
    place = tl.arange(0, CHUNK)
    total = tl.zeros((BUCKETS,), tl.int32)
    earlier = tl.zeros((BUCKETS,), tl.int32)
    for c in range(tl.cdiv(n_tokens, CHUNK)):
        token = c * CHUNK + place
        live = token < n_tokens
        count = tl.histogram(adapter_of(adapters, token * adapters.top_k, live) + 1, BUCKETS, mask=live)
        total += count
        earlier += tl.where(c < chunk, count, 0)
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
