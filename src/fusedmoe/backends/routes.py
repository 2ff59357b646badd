"""The sort of slots by expert, and the table of tiles: its launches and their memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.call import Call
from fusedmoe.kernels import routing
from fusedmoe.kernels.operands import Ids, Schedule, odd_of
from fusedmoe.spec.problem import Problem

#: Most slots that one launch routes: each is compared with all.
ONE_LAUNCH = 4096
#: Slots that a program of it sorts, and that it compares them with at a time.
OWN, BLOCK = 16, 512
#: Slots that one program sorts otherwise: up to MANY slots, and above.
CHUNKS = (256, 1024)
MANY = 1 << 18
#: Programs that share the chunks when their rows are placed.
PLACERS = 32
#: Entries of the tile table that one program writes.
TILES = 64
#: Elements of the (chunk, expert) table that ``offsets`` holds at once, and of the one in ``_write_tiles``.
TABLE = 8192


class Routed(NamedTuple):
    """Ids, and what was made of them; no schedule where few slots need none."""

    ids: Ids
    schedule: Schedule | None
    max_tiles: int


def max_tiles(problem: Problem, block_m: int) -> int:
    """Tiles of so many rows that there can be."""
    # sum over experts of ceil(S_e / BLOCK_M) <= floor(S / BLOCK_M) + number of non-empty experts
    return problem.slots // block_m + min(problem.experts, problem.slots)


def _chunk(slots: int) -> int:
    """Slots that one program sorts: a small sort is fast, but every program of ``offsets`` adds up all chunks."""
    return CHUNKS[0] if slots <= MANY else CHUNKS[1]


def layout(problem: Problem) -> Layout:
    """Named scratch tensors of the schedule."""
    # Sized for the lowest tile and the smallest chunk, so that a workspace for more tokens serves fewer.
    most_tiles = max_tiles(problem, 16)
    slots = problem.slots
    named: Layout = {
        "slot": ((slots,), torch.int32),
        "row": ((slots,), torch.int32),
        "offset": ((problem.experts + 1,), torch.int32),
        "tile_expert": ((most_tiles,), torch.int32),
        "tile_row": ((most_tiles,), torch.int32),
        "n_tiles": ((1,), torch.int32),
        "claimed": ((2,), torch.int32),
    }
    if slots > ONE_LAUNCH:
        for name in ("counts", "base"):
            named[name] = ((math.ceil(slots / min(CHUNKS)), problem.experts), torch.int32)
    return named


def ids_of(call: Call) -> Ids:
    """Ids as kernels take them."""
    problem = call.problem
    return Ids(
        call.topk_ids,
        call.topk_ids.stride(0),
        call.topk_ids.stride(1),
        call.expert_map,
        odd_of(call.n_global),
        problem.experts,
        tl.constexpr(problem.top_k),
        odd_of(problem.slots),
    )


def sort(
    call: Call, placed: Ids, block_m: int, work: Workspace, first: dict[str, Any], after: dict[str, Any]
) -> Routed:
    """Sort the live slots and write the table of tiles of ``block_m`` rows.

    Args:
        placed: ids in the order in which an expert's slots are to lie.
        first, after: launch options of the first launch, and of those that follow it.
    """
    problem, ids = call.problem, ids_of(call)
    schedule = Schedule(*(work[name] for name in Schedule._fields))
    tiles = max_tiles(problem, block_m)
    n_experts = problem.experts
    e_pad = max(2, triton.next_power_of_2(n_experts))
    tiles_each = max(1, min(TILES, TABLE // e_pad))
    with device_guard(call.hidden_states.device):
        writers = math.ceil(tiles / tiles_each)
        if problem.slots <= ONE_LAUNCH:
            sorters = math.ceil(problem.slots / OWN)
            launch(
                routing.route,
                (sorters + writers,),
                placed,
                schedule,
                sorters,
                **first,
                E=n_experts,
                E_PAD=e_pad,
                SLOTS=ONE_LAUNCH,
                OWN=OWN,
                BLOCK=BLOCK,
                TILES=tiles_each,
                BLOCK_M=block_m,
            )
        else:
            counts, base = work["counts"], work["base"]
            chunk = _chunk(problem.slots)
            n_chunks = math.ceil(problem.slots / chunk)
            block_c = max(1, TABLE // e_pad)
            own_chunks = max(block_c, math.ceil(n_chunks / PLACERS))
            launch(routing.count, (n_chunks,), placed, counts, **first, E=n_experts, E_PAD=e_pad, CHUNK=chunk)
            launch(
                routing.offsets,
                (math.ceil(n_chunks / own_chunks),),
                ids,
                schedule,
                counts,
                base,
                n_chunks,
                own_chunks,
                **after,
                E=n_experts,
                E_PAD=e_pad,
                BLOCK_C=block_c,
                BLOCK_M=block_m,
                num_warps=8,
            )
            launch(
                routing.scatter,
                (max(n_chunks, writers),),
                placed,
                schedule,
                base,
                n_chunks,
                **after,
                E=n_experts,
                E_PAD=e_pad,
                CHUNK=chunk,
                TILES=tiles_each,
                BLOCK_M=block_m,
            )
    return Routed(ids, schedule, tiles)
