"""Operands: pointers that travel with their strides. A field that may be None is pruned with ``is None``; one that
holds a tuple is not compared (Triton 3.6 cannot), a constant beside it says what it is for.

Strides are in elements. Whatever the storage order, expert matrices are seen as [E, N, K]: storage
[E, K, N] is the same operand with other strides, and interleaved gate/up rows are a row step of 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Ids(NamedTuple):
    """The user's choice of experts. Slot ``s = t * top_k + j`` is the j-th choice of token t."""

    ptr: object  #         [T, top_k] int32 or int64; anything outside [0, n_global) is an absent expert
    stride_t: object
    stride_j: object
    map_ptr: object  #     [n_global] int32 or int64, local id or negative; or None
    odd_global: object  #  2 n_global + 1, see odd_of
    n_local: object  #     E
    top_k: object  #       constexpr
    odd: object  #         2 S + 1
    order: object = None  # [T] int32: tokens in the order in which an expert has them, or None: in theirs


def odd_of(count: int) -> int:
    """How a number that changes from call to call travels in a tuple: Triton compiles variants for integers there that
    are 1, or divisible by 16, whatever ``do_not_specialize`` says, and an odd number above 1 is neither.
    """
    return 2 * count + 1


class Schedule(NamedTuple):
    """Live slots sorted by expert, and the tiles that cover them; written by kernels/routing.py."""

    slot: object  #        [S] int32: slot of a sorted row
    row: object  #         [S] int32: and sorted row of a slot
    offset: object  #      [E + 1] int32: first row of an expert
    tile_expert: object  # [n_tiles] int32
    tile_row: object  #    [n_tiles] int32: first row of a tile
    n_tiles: object  #     [1] int32
    claimed: object  #     [2] int32: numbers of tiles of each GEMM that programs took beyond their first


class AdaptedIds(NamedTuple):
    """Ids, and the user's choice of adapters: rows are found by both.

    Flat, because Triton 3.6 loses constants of tuples within tuples that have a None.
    """

    ptr: object
    stride_t: object
    stride_j: object
    map_ptr: object
    odd_global: object
    n_local: object
    top_k: object
    odd: object
    order: object
    ids: object  #       [T] int32 or int64, the slot of a token's adapter; anything outside [0, slots) is none
    stride: object
    slots: object
    rank: object  #      [slots] int32, 0 in an empty slot
    enabled: object  #   [slots] of integers, or None
    experts: object  #   constexpr E, as what follows
    max_rank: object  #  R
    columns: object  #   R, or 2 R of gate and up: those of A x of an adapter
    block: object  #     columns of all adapters that a turn computes
    step: object  #      of an expand by steps, which the launch tells what it found; 0: of none
    found: object  #     [S] int32, where it tells the adapter of a sorted row, or -1
    blocks: object  #    [tiles, 2] int32, and of a tile the first block of ``step`` columns and their number


class AdaptedOutput(NamedTuple):
    """Output of a launch that shrinks, and what tells the adapter of a row."""

    ptr: object  #     [S, columns]
    stride_row: object
    by_slot: object
    scale: object  #   as of Output: nothing, as what follows
    stride_scale: object
    beside: object
    stride_beside: object
    stride_column: object
    top_k: object  #   constexpr
    ids: object  #     as of AdaptedIds
    stride: object
    slots: object
    rank: object
    enabled: object
    columns: object  # constexpr, as of AdaptedIds


class Shrink(NamedTuple):
    """The right operand A [slots, E, R or 2R, K] of a launch that shrinks; ``stride_e`` 0 where experts share it."""

    ptr: object
    stride_a: object
    stride_e: object
    stride_n: object
    stride_k: object
    part: object  #      from gate's A to up's
    experts: object  #   constexpr E
    columns: object  #   constexpr, as of AdaptedIds
    max_rank: object  #  R
    scaling: object  #   [slots] float32
    rank: object  #      [slots] int32
    unit: object  #      constexpr 1, as of Weight; what follows is nothing, as of Weight and Epilogue
    up: object = 0
    scale: object = None
    scale_at: object = None
    weight: object = None


class RowScale(NamedTuple):
    """Scales of quantised rows, float32; strides of 0 where one serves all."""

    ptr: object
    stride_row: object
    stride_group: object
    per: object  #       slots that share a row of scales (constexpr); 0: one per sorted row


class Rows(NamedTuple):
    """The left operand. ``per`` slots share a row of ``ptr`` (constexpr); None: one row per sorted row."""

    ptr: Any  #          [rows, K]
    stride_row: object
    stride_k: object
    per: object
    scale: object = None  #       RowScale, or None
    scale_at: object = None  #    constexpr: "step": per group of K, applied to its product; "end": per row, to the sum


class BlockScale(NamedTuple):
    """Scales of weights: one for ``block_n`` rows (0: all) and ``block_k`` columns. Row n of part p has scale row
    ``p up + (n + p phase) // block_n``: the up rows of a concatenated w13 are part 1.
    """

    ptr: object  #       [E, rows, columns]; float, or bytes of ``kind`` "e8m0", "e2m1 pair" or "e4m3"
    stride_e: object  #  in units, as stride_n
    stride_n: object
    stride_k: object
    unit: object  #      constexpr, as of Weight
    up: object
    phase: object
    block_n: object  #   constexpr, as what follows
    block_k: object
    kind: object
    uniform: object  #   all columns of a tile share one


class Zeros(NamedTuple):
    """Zero points, in the same blocks of columns as the scales, each row its own."""

    ptr: object  #       [E, N or ceil(N / 2), columns] uint8
    stride_e: object
    stride_n: object
    stride_k: object
    up: object  #        first row of the up part
    per_byte: object  #  constexpr


class Weight(NamedTuple):
    """The right operand, seen as [E, N, K] whatever its storage."""

    ptr: object
    stride_e: object  #        in units, as stride_n
    stride_n: object
    stride_k: object
    unit: object  #            constexpr: elements that strides are multiples of, where Triton does not see it itself
    rows_per_expert: object  # rows of a tensor map from one expert to the next
    up: object  #              row of the first up row when gate and up are concatenated, else 0
    scale: object = None  #        BlockScale, or None
    scale_at: object = None  #     constexpr: "step": used inside of the loop over K; "end": of whole rows, for the sum
    zero: object = None  #         Zeros, or None
    tensor_scale: object = None  # [E] or [E, 2] float32, or None
    tensor_scale_stride: object = None
    tensor_scale_part: object = None  # from gate's to up's, or None: they have one


class Output(NamedTuple):
    """Where a tile is stored: at its sorted row, or (``by_slot``, constexpr) at its slot."""

    ptr: Any  #          [S, columns]
    stride_row: object
    by_slot: Any
    scale: object = None  #        float32 that a STORE policy reads or writes, or None
    stride_scale: object = None
    beside: object = None  #       [S, columns] of the layer's type, where unquantised numbers go too, or None
    stride_beside: object = None
    stride_column: object = 1


class Epilogue(NamedTuple):
    """What an epilogue may read. Absent ones are None."""

    bias: object  #      [E, N] any float
    bias_stride_e: object
    bias_stride_n: object
    weight: object  #    [T, top_k] router weights, any float
    weight_stride_t: object
    weight_stride_j: object
    top_k: object  #     constexpr


class AdaptedEpilogue(NamedTuple):
    """Epilogue, and what is added to rows with adapters before: v [S, R or 2R] times B [slots, E, N, R]."""

    bias: object
    bias_stride_e: object
    bias_stride_n: object
    weight: object
    weight_stride_t: object
    weight_stride_j: object
    top_k: object
    ids: object  #       as of AdaptedIds
    stride: object
    slots: object
    rank: object
    enabled: object
    v: object
    v_stride: object
    ptr: object
    stride_a: object
    stride_e: object  #  0 where experts share it
    stride_n: object
    stride_r: object
    part: object  #      what is added to the place of an up row, see :func:`fusedmoe.kernels.lora.row_of_b`
    up: object  #        first up row of a concatenated w13
    parts: object  #     constexpr: "one" A, or those of gate and up, whose rows of B are "halves" or "alternate"
    max_rank: object  #  constexpr R, as what follows
    block: object  #     columns of v to a product
    steps: object  #     as of :class:`fusedmoe.spec.problem.Adapters`
    stages: object  #    of the loop over products
    precision: object  # of float32 products


class Steps(NamedTuple):
    """What adapters add to a sum, as more of its steps: v [S, columns] times B [slots, E, N, R], finite throughout."""

    v: object
    v_stride: object
    found: object  #     as of AdaptedIds
    blocks: object
    slots: object
    ptr: object
    stride_a: object
    stride_e: object  #  0 where experts share it
    stride_n: object
    part: object  #      as of AdaptedEpilogue
    columns: object  #   constexpr, as of AdaptedIds
    max_rank: object  #  constexpr R
    parts: object  #     constexpr, as of AdaptedEpilogue


class Parameters(NamedTuple):
    """Parameters of an activation, constexpr; None where it has none."""

    alpha: object
    beta: object
    limit: object
    linear_beta: object
