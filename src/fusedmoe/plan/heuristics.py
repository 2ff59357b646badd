"""Tiles from shape and device facts, when nothing was measured for them.

The numbers are what an exhaustive sweep on an H200 chose in bfloat16 (docs/performance.md); what does not
fit the device or the layout is then made smaller until :func:`fusedmoe.plan.validity.why_not` is content.
"""

from __future__ import annotations

from dataclasses import replace

from fusedmoe.plan.config import FEW, KernelConfig, TritonPlan
from fusedmoe.plan.validity import why_not, wide
from fusedmoe.spec.problem import Gemm, Problem
from fusedmoe.target import Target

#: From this many rows per expert the operands are loaded by tensor map, and gathering rows first can pay.
PREFILL_ROWS = 64
#: Copying the tokens into sorted rows costs 4 S H bytes, and saves a share of 4 S H I flops: it pays from this I.
GATHER_INTERMEDIATE = 4096


def _next_power_of_2(value: float) -> int:
    power = 1
    while power < value:
        power *= 2
    return power


def triton_plan(problem: Problem, target: Target) -> TritonPlan:
    """The portable pipeline for a problem that the Triton backend supports."""
    mean = problem.slots / problem.experts
    few = problem.slots <= FEW
    # Twice the mean: most experts then fill one tile, and a row costs nothing while weights are streamed.
    block_m = 16 if few else max(16, min(128, _next_power_of_2(2 * mean)))
    if problem.dtype == "float32" and problem.fp32_precision == "ieee":
        block_m = min(block_m, 64)
    if target.interpret:
        block_m = min(block_m, 32)
    first, second = problem.gate_up_gemm, problem.down_gemm
    gate_up = _fit(_ideal(problem, target, block_m, first, few=few, gate_up=True), first, target)
    down = _fit(_ideal(problem, target, block_m, second, few=few, gate_up=False), second, target)
    # Both GEMMs work on the same tiles.
    block_m = min(gate_up.block_m, down.block_m)
    gate_up, down = replace(gate_up, block_m=block_m), replace(down, block_m=block_m)
    gather = gate_up.maps == "xw"
    return TritonPlan(
        few=few,
        gather=gather,
        overlap=_overlap(problem, target, down, few=few),
        gate_up=gate_up,
        down=down,
        combine_block=max(16, min(1024, _next_power_of_2(problem.hidden))),
    )


def _overlap(problem: Problem, target: Target, down: KernelConfig, *, few: bool) -> bool:
    """Start each launch while the one before it ends.

    A launch of hardly more programs than multiprocessors loses by it: early programs fill the multiprocessors that
    are free first, several to each, and the others then stay idle (mixtral-8x7b, T = 1 on an H200: 217 us for 192).
    """
    if target.vendor != "nvidia" or target.capability < 90:
        return False
    programs = min(problem.slots, problem.experts) * -(-problem.hidden // down.block_n)
    return not few or 2 * programs >= 3 * target.n_sm


def _ideal(problem: Problem, target: Target, block_m: int, gemm: Gemm, *, few: bool, gate_up: bool) -> KernelConfig:
    """The tile one would like, before shared memory and layout are looked at."""
    mean, half = problem.slots / problem.experts, gemm.width
    if target.interpret:
        return KernelConfig(block_m=block_m, block_n=64 // half, block_k=32, group_m=2)
    if problem.dtype == "float32":
        # Products on the CUDA cores: registers, not tensor cores, bound the tile.
        return KernelConfig(
            block_m=block_m, block_n=64 // half, block_k=32, warps=8 if block_m == 64 else 4, stages=3, group_m=4
        )
    if target.vendor == "nvidia" and target.capability < 80:
        # Operands pass through registers on their way to shared memory: small steps, or they spill.
        return KernelConfig(block_m=min(32, block_m), block_n=64 // half, block_k=16, warps=4, stages=1, group_m=4)
    if block_m == 16:
        if few:
            return KernelConfig(block_m=16, block_n=64 // half, block_k=128, warps=4, stages=4)
        return KernelConfig(block_m=16, block_n=128 // half, block_k=128, warps=4, stages=3)
    if block_m == 32:
        return KernelConfig(block_m=32, block_n=128 // half, block_k=128, warps=4, stages=3)
    if block_m == 64:
        return KernelConfig(block_m=64, block_n=128 // half, block_k=64, warps=4, stages=4)
    if target.vendor == "nvidia" and target.capability < 90:
        # mma.sync keeps its operands in registers beside the accumulators; WGMMA reads them from shared memory.
        return KernelConfig(block_m=128, block_n=128 // half, block_k=64, warps=8, stages=3, group_m=8)
    tall = mean >= 256
    if gate_up:
        gather = tall and problem.intermediate >= GATHER_INTERMEDIATE
        return KernelConfig(
            block_m=128,
            block_n=256 // half,
            block_k=64,
            warps=8,
            stages=3 if tall else 4,
            group_m=16 if gather else 4 if tall else 8,
            maps="xw" if gather else "w",
            programs_per_sm=1 if gather else 0,
        )
    short = gemm.inner <= 512
    return KernelConfig(
        block_m=128,
        block_n=256 // half,
        block_k=64,
        warps=8,
        stages=3 if short or tall else 4,
        group_m=8,
        maps="xw",
        programs_per_sm=1 if short or tall else 0,
        flatten=short,
    )


def _fit(config: KernelConfig, gemm: Gemm, target: Target) -> KernelConfig:
    """Make a tile smaller until nothing speaks against it."""
    if config.maps != "none" and why_not(replace(config, block_k=16, stages=1), gemm, target):
        config = replace(config, maps="none", programs_per_sm=0, flatten=False)
    if target.vendor not in ("nvidia", "cpu"):
        config = replace(config, stages=2)
    while why_not(config, gemm, target):
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.block_k > 32:
            config = replace(config, block_k=config.block_k // 2, stages=min(4, config.stages * 2))
        elif wide(config, gemm) > 64 and config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        elif config.stages > 1:
            config = replace(config, stages=config.stages - 1)
        elif config.block_k > 16:
            config = replace(config, block_k=config.block_k // 2)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return config
