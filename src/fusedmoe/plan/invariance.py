"""Batch-invariant plans: the bits of a row depend on its own token alone, whatever the number of tokens.

Everything but the two products is the same for every T: rows are quantised one by one, slots are added in their
order. Of a product, a row's bits depend on the order in which K is added up, and on nothing else of the tile:
:class:`Arithmetic` is that order. The rule: T decides the tiles, as ever, among those with the arithmetic of one number
of tokens, :func:`anchor_tokens`. Schedule, loads and grid are free.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from fusedmoe.plan.arithmetic import bytes_of, multiply_in
from fusedmoe.plan.config import FEW, KernelConfig, TritonPlan
from fusedmoe.plan.heuristics import TALL_ROWS, requantise
from fusedmoe.plan.validity import why_not, wide
from fusedmoe.spec.problem import Gemm, Problem
from fusedmoe.target import Target

HEIGHTS = (16, 32, 64, 128)
#: Sums of a thread from which on a tile that has grown is shared by 8 warps: twice as many, and scales, spill.
SUMS = 64
#: What a tile may take from another one to add up alike.
BORROWED = ("block_k", "block_n", "warps", "swap", "words", "scale_weights")


class Arithmetic(NamedTuple):
    """What the bits of a row of a product depend on.

    Attributes:
        unit: what multiplies and adds. Tensor cores sum the products of an instruction in an order and to a precision
            of their own; those of Hopper and newer have two kinds of instructions, and where the kind follows from the
            shape of the tile in ways that are not written down, that stands here.
        step: columns of K that are summed apart from the running sum; 0 where there is one sum.
        words: columns change places within groups of 32.
    """

    unit: tuple[str | int, ...]
    step: int
    words: bool


def arithmetic_of(config: KernelConfig, gemm: Gemm, problem: Problem, target: Target) -> Arithmetic:
    """The arithmetic of a launch; the kernels' side of it is ``kernels/step.py``."""
    math = multiply_in(gemm, target)
    # dense and product add to one running sum, but float32 and weights decoded code by code: step sums err less there.
    running = bytes_of(math) == 1 and not gemm.grouped or gemm.format is None and math != "float32"
    if gemm.format is not None and config.words:
        group = gemm.format.block[1]
        running = config.block_k > group or config.scale_weights  # or scales come between the products of two steps
    step = 0 if running else config.block_k
    if math == "int8":  # integers have one sum, in any order
        return Arithmetic(("integer",), step, config.words)
    return Arithmetic(_unit(config, gemm, problem, target), step, config.words)


def _unit(config: KernelConfig, gemm: Gemm, problem: Problem, target: Target) -> tuple[str | int, ...]:
    # Both rows of a column are in one operand where they alternate.
    columns = config.block_n * (gemm.width if problem.gate_up == "interleaved" or config.pairs else 1)
    if target.vendor != "nvidia":
        return (target.vendor, config.block_m, columns, config.warps)
    if multiply_in(gemm, target) == "float32" and problem.fp32_precision == "ieee":
        return ("fma",)
    left = columns if config.swap else config.block_m
    groups = target.capability // 10 in (9, 10) and left % 64 == 0 and config.warps % 4 == 0
    return ("warp group",) if groups or config.specialised else ("warp",)


def anchor_tokens(problem: Problem) -> int:
    """The number of tokens whose arithmetic is everybody's: one at which experts have many rows.

    Long prompts have most to lose by a tile that is not theirs; decoding waits for weights, whatever multiplies them.
    """
    return max(-(-TALL_ROWS * problem.experts // problem.top_k), FEW + 1)


def alike(plan: TritonPlan, anchor: TritonPlan, problem: Problem, target: Target) -> TritonPlan | None:
    """The plan with tiles that have the arithmetic of the anchor's, as near to its own as can be; None: there are none.

    The intermediate becomes codes where it does in the anchor, or of float32 in a kernel of its own where the anchor's
    epilogue makes them: there it has not been rounded before. Adapters read it rounded.
    """
    places = {anchor.requantise}
    if anchor.requantise == "epilogue" and problem.adapters is None:
        places.add("kernel")

    def same_codes(config: KernelConfig) -> bool:
        return requantise(problem, config) in places

    for block_m in (height for height in HEIGHTS if height >= plan.gate_up.block_m):
        first = _tiles(plan.gate_up, anchor.gate_up, problem.gate_up_gemm, block_m, problem, target)
        second = _tiles(plan.down, anchor.down, problem.down_gemm, block_m, problem, target)
        gate_up, down = next(filter(same_codes, first), None), next(second, None)
        if gate_up is not None and down is not None:
            place = requantise(problem, gate_up)
            unrounded = place != anchor.requantise
            gather = gate_up.maps == "xw"
            return replace(plan, gather=gather, gate_up=gate_up, down=down, requantise=place, unrounded=unrounded)
    return None


def _tiles(
    own: KernelConfig, other: KernelConfig, gemm: Gemm, block_m: int, problem: Problem, target: Target
) -> Iterator[KernelConfig]:
    """Tiles of this height with the arithmetic of ``other``, of which they take no more than they must."""
    wanted = arithmetic_of(other, gemm, problem, target)
    for count in range(len(BORROWED) + 1):
        for names in itertools.combinations(BORROWED, count):
            tile = replace(own, block_m=block_m, **{name: getattr(other, name) for name in names})
            if tile.words and not tile.specialised:  # which are loaded by pointer
                tile = replace(tile, maps="none", programs_per_sm=0, flatten=False)
            if tile != own and block_m * wide(tile, gemm) > SUMS * 32 * tile.warps:
                tile = replace(tile, warps=8)
            for one in (tile, _turned(tile, gemm)) if block_m < 64 and wanted.unit == ("warp group",) else (tile,):
                if arithmetic_of(one, gemm, problem, target) != wanted:
                    continue
                deep = min(8, one.stages * max(1, own.block_k // one.block_k))  # as many bytes on their way as it had
                fits = (replace(one, stages=stages) for stages in range(deep, 0, -1))
                yield from itertools.islice((fit for fit in fits if not why_not(fit, gemm, target)), 1)


def _turned(tile: KernelConfig, gemm: Gemm) -> KernelConfig:
    """The tile with weights as the left operand, of which an instruction of a warp group has 64 rows.

    Rows of tokens that are too few for that are its other side. The narrowest tiles are of launches with few programs:
    32 columns with both of their rows are more of those. A tile that grows takes shorter steps, and none is wider than
    the registers of its 4 warps like it (dsv3-tp8 in bfloat16 on an H200, T = 512: 767 us, by 128 columns for 256 739).
    """
    pairs = gemm.width == 2 and tile.block_n < 32 and gemm.format is None and not gemm.rank
    block_n = 32 if pairs else max(64, min(128, tile.block_n))
    block_k = max(min(128, tile.block_k), tile.block_k * tile.block_n // block_n)
    return replace(tile, swap=True, pairs=pairs, block_n=block_n, block_k=min(block_k, tile.block_k))
