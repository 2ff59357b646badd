"""Tiles from shape and device facts, when nothing was measured for them.

The numbers are what a sweep on an H200 chose in bfloat16 (docs/performance.md); what does not
fit the device or the layout is then made smaller until :func:`fusedmoe.plan.validity.why_not` is content.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from fusedmoe.plan.arithmetic import bytes_of, decodes, multiply_in
from fusedmoe.plan.config import FEW, KernelConfig, Requantise, ShrinkPlan, TritonPlan
from fusedmoe.plan.validity import step_bytes, why_no_maps, why_no_words, why_not, why_not_plan, wide
from fusedmoe.spec.layout import Matrix
from fusedmoe.spec.problem import Gemm, Problem
from fusedmoe.target import Target

#: From this mean of rows per expert on, an expert has tiles enough to share its weights in L2.
TALL_ROWS = 256
#: Copying the tokens into sorted rows costs 4 S H bytes, and saves a share of 4 S H I flops: it pays from this I.
GATHER_INTERMEDIATE = 4096
#: Most tokens whose rows are multiplied one by one, and the least share of them that have an expert for themselves.
SINGLE, ALONE = 4, 0.9
#: Integers and 4-bit codes up to which that is faster than tensor cores; the second, of weights and rows.
MANY_CODES = 200_000_000, 60_000_000
#: From the first on tiles of streamed weights are wide, beyond the second tall, and beyond the last there are none.
STREAMED = (4, 8, 24)
#: In 16 bits, with I from the first on, rows an expert from which on tiles of 128 pay: the narrower, the more tiles
#: there are, and the more of them may be half empty (us on an H200, portable and specialised: dsv3-tp8 at T = 1024
#: 785 and 751; qwen3-30b-a3b at 512 and 768 323 and 324, 362 and 337; gpt-oss-120b at 1536, 2048 and 8192 1626 and
#: 1643, 1664 and 1671, 3681 and 3129; mixtral-8x7b at 256, 512 and 8192 727 and 740, 939 and 914, 9156 and 8817).
ROWS_IN_16_BITS = ((GATHER_INTERMEDIATE, 128), (2048, 64), (513, 48), (0, 24))
#: Up to this H tiles that are half empty do not pay where sums are of groups: nothing hides what follows so few steps
#: (fp8 by block on an H200, us portable and specialised: qwen3-30b-a3b at T = 768 217 and 225, dsv3-ep8 at 192 380 and
#: 380, gpt-oss-120b at 1536 956 and 913, dsv3-tp8 at 1536 569 and 509, mixtral-8x7b at 192 525 and 369).
SHORT_HIDDEN = 2048
#: Rows an expert from which on tiles of 128 pay where weights are decoded, and where 8 bits are multiplied as they are.
ROWS_DECODED, ROWS_IN_8_BITS = 64, 48
#: Where sums are of groups, they pay from the first on, but with H up to SHORT_HIDDEN not from the second to the third.
ROWS_BY_BLOCK = (12, 24, 64)
#: Means of rows per expert at which :func:`why_portable` changes its mind.
BREAKS = (ROWS_DECODED, ROWS_IN_8_BITS, *ROWS_BY_BLOCK, *(rows for _, rows in ROWS_IN_16_BITS))


def _next_power_of_2(value: float) -> int:
    power = 1
    while power < value:
        power *= 2
    return power


def sm90_plan(problem: Problem, target: Target) -> TritonPlan:
    """The same pipeline with the warp-specialised GEMMs of Hopper, for a problem that they support."""
    if problem.mean_rows <= STREAMED[2]:
        plan = _streaming_plan(problem, target)
        if not why_not_plan(plan, problem, target):
            return plan
    gate_up = _specialised(problem, problem.gate_up_gemm, target, gate_up=True)
    down = _specialised(problem, problem.down_gemm, target, gate_up=False)
    return assemble(problem, target, few=False, gate_up=gate_up, down=down)


def _streaming_plan(problem: Problem, target: Target) -> TritonPlan:
    """That of the kernel that streams weights, for few rows an expert.

    Two programs to a multiprocessor, with room for one of the launch that follows; or, from 4 rows an expert on, one
    with tiles of twice the width, which have all columns that share a scale where the intermediate becomes codes (fp8
    by block on an H200, us both ways, qwen3-30b-a3b at T = 8, 64, 128, 256: 83.2 and 83.1, 162.5 and 160.1, 167.8 and
    164.0, 180.5 and 173.5; dsv3-tp8 at 8, 32, 512: 102.6 and 104.4, 243.7 and 248.0, 441.1 and 420.8).
    """
    tall, wide_tiles = problem.mean_rows > STREAMED[1], problem.mean_rows >= STREAMED[0]

    def tile(gemm: Gemm) -> KernelConfig:
        return KernelConfig(
            block_m=32 if tall else 16,
            block_n=(256 if wide_tiles else 128) // gemm.width,
            block_k=128 // bytes_of(multiply_in(gemm, target)),
            stages=4 if not wide_tiles else 5 if tall else 6,
            maps="w",
            programs_per_sm=1 if wide_tiles else 2,
            swap=True,
            specialised=True,
        )

    gate_up, down = tile(problem.gate_up_gemm), tile(problem.down_gemm)
    return assemble(problem, target, few=False, gate_up=gate_up, down=down)


def why_portable(problem: Problem, target: Target) -> str | None:
    """Why the portable kernels are faster than those of :func:`sm90_plan`; None when they are not.

    A tile of 128 rows needs rows; few have tiles to which weights are streamed. Scales that are applied step by step
    stall the portable kernel, so that these pay from fewer rows on, where K is long. Weights of 16 bits gain least, and
    those that are decoded need the most rows. Gate and up side by side change places in their epilogue, but where they
    are decoded: then on their way in.
    """
    mean = problem.mean_rows
    interleaved = problem.activation.gated and problem.gate_up == "interleaved"
    gemms = problem.gate_up_gemm, problem.down_gemm
    if sm90_plan(problem, target).gate_up.streams:
        if _single(problem, target):
            return f"rows one by one are faster at {problem.tokens} tokens"
        if not any(gemm.grouped for gemm in gemms):
            return f"the portable kernels are as fast at {mean:.3g} rows an expert"
        return None
    if any(decodes(gemm, target) for gemm in gemms):
        slower = mean < ROWS_DECODED
    elif any(gemm.grouped for gemm in gemms):
        least, half_empty, full = ROWS_BY_BLOCK
        slower = mean < least or half_empty <= mean < full and problem.hidden <= SHORT_HIDDEN
    elif all(bytes_of(multiply_in(gemm, target)) == 1 for gemm in gemms):
        integers = all(multiply_in(gemm, target) == "int8" for gemm in gemms)
        slower = mean < ROWS_IN_8_BITS or not integers and interleaved
    else:
        rows = next(rows for least, rows in ROWS_IN_16_BITS if problem.intermediate >= least)
        slower = mean < rows or interleaved
    return f"the portable kernels are faster at {mean:.3g} rows an expert" if slower else None


def tokens_before_breaks(problem: Problem) -> list[int]:
    """Token counts below the problem's at which a backend is chosen for the last time before another is."""
    experts = max(problem.experts, problem.known_experts)
    ends = [mean * experts / problem.top_k for mean in (*BREAKS, *STREAMED)]
    counts = {count for end in ends for count in (math.ceil(end) - 1, math.floor(end))}  # with the end and without
    return sorted(tokens for tokens in counts if 0 < tokens < problem.tokens)


def _specialised(problem: Problem, gemm: Gemm, target: Target, *, gate_up: bool) -> KernelConfig:
    """A warp-specialised tile of 128 x 256. Two groups of consumers where there is other work than one long sum."""
    math = multiply_in(gemm, target)
    decoded = decodes(gemm, target)
    copied = bytes_of(math) == 2 and problem.intermediate >= GATHER_INTERMEDIATE
    return KernelConfig(
        block_m=128,
        block_n=256 // gemm.width,
        block_k=128 // bytes_of(math),
        warps=4 if gemm.grouped or decoded or not gate_up and gemm.inner <= 1024 else 8,
        stages=6 if decoded else 4,
        swap=decoded,
        words=decoded,
        scale_weights=decoded,
        group_m=16 if gate_up and copied else 8,
        maps="xw" if copied or not gate_up else "w",
        programs_per_sm=1,
        specialised=True,
    )


def _without_schedule(problem: Problem, target: Target) -> bool:
    """Few slots are found by every program in the ids, rather than sorted by a launch of its own.

    That look is latency before the first load of weights. It is worth a launch while there are few programs, or
    16 bits a weight to stream behind it.
    """
    gemms = problem.gate_up_gemm, problem.down_gemm
    if all(gemm.format is None for gemm in gemms):
        limit = FEW if problem.experts <= 16 else FEW // 2
    elif any(decodes(gemm, target) for gemm in gemms):
        limit = FEW // 16
    else:
        limit = FEW // 8
    return problem.slots <= limit


def triton_plan(problem: Problem, target: Target) -> TritonPlan:
    """The portable pipeline for a problem that the Triton backend supports."""
    return _single(problem, target) or tiled_plan(problem, target)


def tiled_plan(problem: Problem, target: Target) -> TritonPlan:
    """That of tiles of many rows, which tensor cores multiply, however few rows there are."""
    mean = problem.mean_rows
    few = _without_schedule(problem, target)
    gemms = problem.gate_up_gemm, problem.down_gemm
    # Twice the mean: most experts then fill one tile, and a row costs nothing while weights are streamed.
    block_m = 16 if few else max(16, min(128, _next_power_of_2(2 * mean)))
    if problem.dtype == "float32" and problem.fp32_precision == "ieee":
        block_m = min(block_m, 64)
    # Sums of groups, and decoded weights, take registers: half the height, until an expert has many tiles.
    grouped = any(g.grouped for g in gemms)
    decoded = any(decodes(g, target) for g in gemms)
    if mean < TALL_ROWS and (decoded or grouped and problem.intermediate < GATHER_INTERMEDIATE):
        block_m = min(block_m, 64)
    if target.interpret:
        block_m = min(block_m, 32)
    gate_up, down = tiles_of_height(problem, target, block_m, few=few)
    return assemble(problem, target, few=few, gate_up=gate_up, down=down)


def _single(problem: Problem, target: Target) -> TritonPlan | None:
    """The plan of rows one by one, where that is the fastest; None elsewhere.

    It reads an expert's weights for each of its rows, and decodes them as often: codes that take several instructions
    make it wait for those where there are many of them.
    """
    formats = {form for form in (problem.w13_format, problem.w2_format) if form is not None}
    slow = any(form.element not in ("e4m3", "e4m3fnuz") for form in formats)
    if problem.batch_invariant or problem.tokens > (1 if slow else SINGLE):
        return None
    twice = any(form.element == "int8" and form.inputs for form in formats)  # rows have to be decoded as well
    if slow and problem.flops > 2 * MANY_CODES[twice]:
        return None
    if problem.tokens > 1 and problem.active_experts < ALONE * problem.slots:
        return None
    plan = single_plan(problem, target)
    return None if why_not_plan(plan, problem, target) else plan


def single_plan(problem: Problem, target: Target) -> TritonPlan:
    """Tiles of single rows, whatever speaks against them.

    Programs of one warp or two, as many as there can be: each waits for its weights, 64 to 256 bytes a thread, and
    others hide that.
    """

    def tile(gemm: Gemm, turns: int) -> KernelConfig:
        per_byte = gemm.format.per_byte if gemm.format else 1 / bytes_of(gemm.dtype)
        codes = per_byte == 2  # which are decoded: several columns share the numbers of a row
        if gemm.width == 2:
            block_n, block_k = (4, 512) if codes else (1, min(1024, int(2048 * per_byte)))
        else:
            block_n, block_k = 4 if codes else 2, min(1024, 2048 // turns)
        warps = 2 if codes and gemm.width == 1 else 1
        config = KernelConfig(block_m=1, block_n=block_n, block_k=block_k, warps=warps, stages=1)
        if target.interpret:  # few programs
            config = replace(config, block_n=32)
        return replace(config, block_k=max(128, min(config.block_k, _next_power_of_2(gemm.inner))))

    turns = _next_power_of_2(problem.top_k)
    return assemble(
        problem, target, few=True, gate_up=tile(problem.gate_up_gemm, 1), down=tile(problem.down_gemm, turns)
    )


def tiles_of_height(problem: Problem, target: Target, block_m: int, *, few: bool) -> tuple[KernelConfig, KernelConfig]:
    """Portable tiles of the two GEMMs, of so many rows or fewer."""
    gemms = first, _ = problem.gate_up_gemm, problem.down_gemm
    gate_up, down = (
        _fit(
            adapted(_ideal(problem, target, block_m, gemm, few=few, gate_up=gemm is first), problem, gemm, target),
            gemm,
            target,
        )
        for gemm in gemms
    )
    # Both GEMMs work on the same tiles.
    block_m = min(gate_up.block_m, down.block_m)
    return replace(gate_up, block_m=block_m), replace(down, block_m=block_m)


def assemble(problem: Problem, target: Target, *, few: bool, gate_up: KernelConfig, down: KernelConfig) -> TritonPlan:
    """The plan with these tiles; everything else in it follows."""
    first, second = problem.gate_up_gemm, problem.down_gemm
    return TritonPlan(
        few=few,
        gather=gate_up.maps == "xw",
        overlap=_overlap(problem, target, down, few=few),
        gate_up=gate_up,
        down=down,
        combine_block=max(16, min(1024, _next_power_of_2(problem.hidden))),
        multiply=(multiply_in(first, target), multiply_in(second, target)),
        requantise=requantise(problem, gate_up),
        shrink=_shrink(problem, target, gate_up.block_m, few=few),
    )


def adapted(config: KernelConfig, problem: Problem, gemm: Gemm, target: Target) -> KernelConfig:
    """A tile that has registers for what adapters add to it, beside its sums, and no other sums in another order."""
    if not gemm.rank or config.specialised:
        return config
    config = replace(config, programs_per_sm=0, flatten=False)
    hopper = target.vendor == "nvidia" and target.capability == 90
    if gemm.steps and hopper and gemm.format is None:
        return config  # adds to the sums that are there, from shared memory
    halves = 2 if gemm.width == 2 and problem.gate_up == "concatenated" else 1  # added one after the other
    # WGMMA has both operands in shared memory, but for weights that are decoded in registers.
    decoded = decodes(gemm, target)
    whole = gemm.rank % 16 == 0  # else loads are masked
    registers = 112 if not hopper else 128 if decoded else 192 if whole else 160
    while (
        config.block_m * wide(config, gemm) * (1 + 1 / halves) > registers * 32 * config.warps and config.block_n > 16
    ):
        narrow = replace(config, block_n=config.block_n // 2)
        if requantise(problem, narrow) != requantise(problem, config):
            break  # rows without adapters keep their bits only where the intermediate becomes codes at the same place
        config = narrow
    return config


def _shrink(problem: Problem, target: Target, block_m: int, *, few: bool) -> ShrinkPlan | None:
    """How A x of all adapters is computed: row by row for few slots, in the layer's tiles of rows for more."""
    if problem.adapters is None:
        return None
    slots, rank = problem.adapters.slots, problem.adapters.rank

    def tile(columns: int, inner: int) -> KernelConfig:
        if few:  # each row alone
            block_k = max(128, min(1024, _next_power_of_2(inner)))
            return KernelConfig(block_m=1, block_n=32 if target.interpret else 1, block_k=block_k, warps=1, stages=1)
        gemm = Gemm(columns=columns, inner=inner, width=1, matrix=Matrix("none", tma=False), dtype=problem.dtype)
        block_n = min(128 if block_m == 128 else 64, max(16, _next_power_of_2(columns)))
        block_k = 32 if target.interpret or problem.dtype == "float32" else 128 if block_m <= 64 else 64
        config = KernelConfig(block_m=block_m, block_n=block_n, block_k=block_k, warps=8 if block_m == 128 else 4)
        if target.vendor == "nvidia" and target.capability < 80:
            config = replace(config, block_n=min(block_n, 32), block_k=16, stages=1)
        return _fit(config, gemm, target)

    tiles = min(problem.experts, problem.slots) + problem.slots // block_m
    return ShrinkPlan(
        by_adapter=not few and slots > 1 and problem.slots / problem.experts >= block_m,
        # Twice as many programs as multiprocessors; those whose turn does not come leave at once.
        turns=math.ceil(2 * target.n_sm / tiles),
        gate_up=tile(slots * problem.adapters.parts * rank, problem.hidden),
        down=tile(slots * rank, problem.intermediate),
    )


def requantise(problem: Problem, gate_up: KernelConfig) -> Requantise:
    """Where the intermediate becomes codes: in the epilogue of gate-up when a tile has all that a scale is made of."""
    inputs = problem.down_gemm.inputs
    if inputs is None:
        return "none"
    if gate_up.block_m == 1:
        return "kernel"
    if inputs.mode == "group":
        # What a tile stores at a time: specialised, two halves apart, where they are not gate and up.
        stored = wide(gate_up, problem.gate_up_gemm) // 2 if gate_up.specialised else gate_up.block_n
        whole = stored % inputs.group == 0
    else:
        # A NaN among integers is a NaN of their row's scale, which no tile alone can write.
        whole = inputs.mode == "static" and inputs.element != "int8"
    return "epilogue" if whole else "kernel"


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
    mean, half = problem.mean_rows, gemm.width
    if target.interpret:
        return KernelConfig(block_m=block_m, block_n=64 // half, block_k=32, group_m=2, swap=gemm.format is not None)
    if gemm.format is not None:
        tile = _quantised(problem, target, block_m, gemm, few=few, gate_up=gate_up)
        lonely = block_m == 16 and _programs(problem, gemm, tile.block_n) < target.n_sm
        return _lonely(problem, target, gemm, tile) if lonely and target.capability == 90 else tile
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
            return _few(problem, target, gemm)
        wide_rows = 64 if gate_up else 128
        return KernelConfig(block_m=16, block_n=wide_rows // half, block_k=128, warps=4, stages=3)
    if block_m == 32:
        if gate_up:
            return KernelConfig(block_m=32, block_n=128 // half, block_k=128, warps=4, stages=3)
        # Wide tiles where they are programs enough (mixtral-8x7b, T = 64: 128 of them 691 us, 256 narrow ones 659).
        if _programs(problem, gemm, 256) < target.n_sm:
            return KernelConfig(block_m=32, block_n=128, block_k=128, warps=4, stages=4)
        return KernelConfig(block_m=32, block_n=256, block_k=64, warps=4, stages=4)
    if block_m == 64:
        few_programs = _programs(problem, gemm, 128 // half) < 2 * target.n_sm  # nobody else hides their waits
        return KernelConfig(block_m=64, block_n=128 // half, block_k=128 if few_programs else 64, warps=4, stages=4)
    if target.vendor == "nvidia" and target.capability < 90:
        # mma.sync keeps its operands in registers beside the accumulators; WGMMA reads them from shared memory.
        return KernelConfig(block_m=128, block_n=128 // half, block_k=64, warps=8, stages=3, group_m=8)
    tile = KernelConfig(block_m=128, block_n=256 // half, block_k=64, warps=8, stages=4, group_m=4, maps="w")
    if mean < TALL_ROWS:
        return tile
    if gate_up:
        if problem.intermediate >= GATHER_INTERMEDIATE:
            return replace(tile, group_m=16, maps="xw")
        return replace(tile, stages=3)
    if gemm.inner <= 512:  # hardly longer than the epilogue: one pipeline over the tiles hides it
        return replace(tile, stages=3, group_m=8, maps="xw", programs_per_sm=1, flatten=True)
    return replace(tile, group_m=8, maps="xw", programs_per_sm=1)


def _quantised(problem: Problem, target: Target, block_m: int, gemm: Gemm, *, few: bool, gate_up: bool) -> KernelConfig:
    """The tile of a quantised matrix."""
    half, math = gemm.width, multiply_in(gemm, target)
    hopper = target.vendor == "nvidia" and target.capability == 90
    assert gemm.format is not None
    if target.vendor == "nvidia" and target.capability < 80:
        return KernelConfig(block_m=min(32, block_m), block_n=64 // half, block_k=32, warps=4, stages=1, group_m=4)
    if math == "float32":
        return KernelConfig(block_m=min(32, block_m), block_n=64 // half, block_k=32, warps=4, stages=3, group_m=4)
    if decodes(gemm, target):
        return _decoded(problem, target, block_m, gemm, gate_up=gate_up)
    grouped = gemm.grouped
    block_k = min(128, max(32, _next_power_of_2(gemm.format.block[1]))) if grouped else 128
    if not hopper:
        # What a second sum, a maximum over all rows or codes at the end take in registers is not there for rows.
        tall = min(block_m, 64 if gemm.inputs and gemm.inputs.mode == "token" else 32)
        return KernelConfig(block_m=tall, block_n=128 // half, block_k=block_k, warps=4, stages=3, group_m=4)
    tile = KernelConfig(block_m=block_m, block_n=64, block_k=block_k, warps=4, stages=4)
    if block_m <= 32:
        # Few rows are the narrow side of WGMMA; mma.sync, which they would fall back to, has no fp8 on this device.
        tile = replace(tile, swap=True)
        if grouped:
            if gate_up or few and gemm.inner > 512:
                return replace(tile, stages=(5 if gate_up else 6) if block_m == 16 else 4)
            # dsv3-tp8 (K = 256), T = 32 on an H200: 260 us, by 3 stages 253; qwen3-30b-a3b (768) 147.6 and 147.3.
            return replace(tile, block_n=128, stages=3 if block_m == 16 and gemm.inner <= 1024 else 4)
        if not gate_up and gemm.inner <= 512:  # few steps: fewer programs, each with more to store
            return replace(tile, block_n=128)
        if gate_up or few:
            # Several programs to a multiprocessor hide each other's waits.
            crowded = problem.active_experts * -(-gemm.columns // 64) > 2 * target.n_sm
            return replace(tile, block_k=256, stages=3 if gate_up and crowded and block_m == 16 else 4)
        if block_m == 32:
            return replace(tile, block_n=256, warps=8, stages=3)
        if gemm.inner >= 8192 and math != "int8":  # mixtral-8x7b, T = 32 on an H200: 360 us, by 256 columns a step 346
            return replace(tile, block_n=128, block_k=256, stages=3)
        return replace(tile, block_n=128)
    if block_m == 64:
        if gate_up:
            return tile
        return replace(tile, block_n=128) if grouped else replace(tile, block_n=128, stages=3, maps="w")
    tile = replace(tile, warps=8, group_m=8)
    if gate_up:
        gather = problem.intermediate >= GATHER_INTERMEDIATE
        maps: Literal["w", "xw"] = "xw" if gather else "w"
        if grouped:  # a second accumulator, of a group, leaves registers for 64 columns of gate and up
            return replace(tile, stages=4 if gather else 5, maps=maps)
        return replace(tile, block_n=128, stages=3, maps=maps)
    tile = replace(tile, maps="xw", programs_per_sm=1, flatten=gemm.inner <= 512 and math != "int8")
    return replace(tile, block_n=128) if grouped else replace(tile, block_n=256, stages=3)


def _decoded(problem: Problem, target: Target, block_m: int, gemm: Gemm, *, gate_up: bool) -> KernelConfig:
    """The tile of weights that are decoded on their way to the tensor cores.

    By the word, a warp group of 4 warps has 64 rows of weights in its registers: half a tile more would only wait.
    """
    assert gemm.format is not None
    group = gemm.format.block[1]
    tile = KernelConfig(block_m=block_m, block_n=64, block_k=128, warps=4, stages=4, swap=target.vendor == "nvidia")
    words = replace(tile, words=True)
    hopper = target.vendor == "nvidia" and target.capability == 90
    if not hopper or why_no_words(words, gemm, target):
        # Where mma.sync keeps both operands in registers, and where every code takes one of its own on the way.
        # WGMMA has no fewer than 64 rows of weights.
        narrow = 64 if hopper else 64 // gemm.width
        tile = replace(tile, block_m=min(block_m, 64 if hopper else 32), block_n=narrow, block_k=64, stages=3)
        if group and group < tile.block_k and (gemm.format.block[0] != 1 or group % 16):
            tile = replace(tile, block_k=max(32, _next_power_of_2(group)))
        words = replace(tile, words=True)
        if not why_no_words(words, gemm, target):
            return words
        if hopper or gemm.format.per_byte == 2:
            return tile
        return replace(tile, block_k=32, stages=4 if tile.block_m == 16 else 3)
    short = replace(words, block_k=64)
    if block_m == 16:
        return _streamed(problem, target, gemm, words, gate_up=gate_up)
    if block_m == 32:
        if gate_up and _long_rows(gemm):
            return replace(words, block_k=256, stages=3)
        return replace(words, stages=3 if gate_up or 0 < group < 128 else 4)
    if block_m == 64:
        return replace(words, stages=3) if gate_up else words
    if gate_up and 0 < group < 128 and (gemm.format.zero or gemm.inputs):
        return replace(short, block_m=64)  # zero points or scales of rows as well: registers for half the rows
    if gate_up:
        # Side by side they are one product, whose operand of 128 columns has no room beside its sum; in two products,
        # one after the other, only masks of columns past the last have none.
        pairs = gemm.width == 2 and problem.gate_up == "interleaved"
        tall = words if pairs else short
        return replace(tall, block_n=64 if pairs or gemm.columns % 128 else 128, warps=8, stages=3, group_m=8)
    return replace(short if 0 < group < 128 else words, stages=3, group_m=8)


def _streamed(problem: Problem, target: Target, gemm: Gemm, words: KernelConfig, *, gate_up: bool) -> KernelConfig:
    """The step of decoded weights that few rows meet.

    What waits, decodes and multiplies in turn is hidden by other programs of its multiprocessor while there are many,
    and by a longer step while there are few. A step of 256 codes of 4 bits is also a whole line of 128 bytes of a row,
    of which a load has half as many, and memory is asked for both halves at once. Stages beyond what that takes cost:
    scales are loaded a few bytes a row, and the rest of their sectors has to stay in L1, which has what buffers leave
    (int4, dsv3-tp8, T = 32 on an H200: 299 us, by steps of 256 for 128 247; mxfp4, dsv3-ep8, T = 8: 283 and 243).
    """
    assert gemm.format is not None
    group, packed = gemm.format.block[1], gemm.format.per_byte == 2
    if not gate_up and gemm.inner <= 512:
        return replace(words, stages=3) if packed else replace(words, block_k=64)
    crowd = _programs(problem, gemm, words.block_n) / target.n_sm
    room = _room(gemm)
    if room and gemm.inner >= 4096 and not gate_up:
        return replace(words, block_k=256, stages=3 if packed and crowd >= 1 else 4)
    if crowd < 1:
        return replace(words, stages=5)
    if room and (crowd <= 6 or gate_up and (group >= 128 or _long_rows(gemm))):
        return replace(words, block_k=256, stages=3 if gate_up else 4)
    return replace(words, stages=3 if gate_up and packed else 4)


def _room(gemm: Gemm) -> bool:
    """There are registers for the scales of a longer step, which zero points and short groups take."""
    assert gemm.format is not None
    return not gemm.format.zero and not 0 < gemm.format.block[1] < 32


def _long_rows(gemm: Gemm) -> bool:
    """Codes of 4 bits whose rows are made of whole steps of 256, for which there is room."""
    assert gemm.format is not None
    return gemm.format.per_byte == 2 and gemm.inner % 256 == 0 and _room(gemm)


def _few(problem: Problem, target: Target, gemm: Gemm) -> KernelConfig:
    """A tile of few slots: wide or narrow, whichever leaves fewer multiprocessors idle in the last wave.

    Weights are streamed once, so what counts is that all memory pipes stay busy: a wave that is a third full costs as
    much as a full one (mixtral-8x7b, T = 8, down: 253 us narrow, 1.3 waves; 223 us wide, one wave). Narrow tiles are
    more loads in flight where one wave holds them all, and wide ones must win clearly.
    """
    narrow = KernelConfig(block_m=16, block_n=64 // gemm.width, block_k=128, warps=4, stages=4)
    if _programs(problem, gemm, narrow.block_n) < target.n_sm:
        return _lonely(problem, target, gemm, narrow)
    if gemm.width > 1 and target.vendor == "nvidia" and target.capability > 90:
        return narrow  # the wide tile of a pair takes all 255 registers on sm_90, and spills on sm_100
    wide_tile = replace(narrow, block_n=128 // gemm.width)

    def waves(config: KernelConfig) -> float:
        # Loads by pointer keep one step fewer in shared memory than there are stages.
        step = step_bytes(config, gemm, target)
        resident = max(1, target.shared_bytes // (step * (config.stages - 1) + 1024))
        return problem.active_experts * -(-gemm.columns // config.block_n) / (target.n_sm * resident)

    def waste(count: float) -> float:
        return math.ceil(count) / count if count > 1 else 1.0

    short = gemm.inner <= 512 and waves(narrow) > 4
    return wide_tile if short or waste(waves(wide_tile)) < 0.85 * waste(waves(narrow)) else narrow


def _programs(problem: Problem, gemm: Gemm, block_n: int) -> int:
    """Programs of a launch with one tile of rows to each expert that some token chose."""
    return math.ceil(problem.active_experts) * -(-gemm.columns // block_n)


def _lonely(problem: Problem, target: Target, gemm: Gemm, tile: KernelConfig) -> KernelConfig:
    """The tile of a launch with fewer programs than multiprocessors: each must keep more bytes on their way.

    dsv3-tp8, T = 1 on an H200, 64 programs in gate-up: 49.4 us for the layer; 44.8 by six stages; 43.9 by tiles of half
    the width as well. fp8: 43.3 to 41.6 by block, 41.2 to 38.0 by channel. mxfp4 by the word, which has no fewer than
    64 rows of weights: 65.9 to 60.4 by steps of twice the length.
    """
    very = 2 * _programs(problem, gemm, tile.block_n) <= target.n_sm
    if gemm.format is not None and decodes(gemm, target):
        longer = very and tile.words and _room(gemm)
        return replace(tile, block_k=256, stages=4) if longer else tile
    tile = replace(tile, stages=6)
    if not very or tile.block_n < 32:
        return tile
    deep = gemm.format is None
    return replace(tile, block_n=tile.block_n // 2, swap=False, block_k=2 * tile.block_k if deep else tile.block_k)


def _fit(config: KernelConfig, gemm: Gemm, target: Target) -> KernelConfig:
    """Make a tile smaller until nothing speaks against it."""
    if config.maps != "none" and why_no_maps(config, gemm, target):
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
