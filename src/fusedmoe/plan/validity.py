"""Every reason why a configuration cannot run. One source: the planner, the tuner and the errors ask here."""

from __future__ import annotations

import math

from fusedmoe.plan.arithmetic import bytes_of, decodes, multiply_in
from fusedmoe.plan.config import FEW, KernelConfig, TritonPlan
from fusedmoe.spec.problem import Gemm, Problem
from fusedmoe.target import Target

#: Shared memory beside the operand buffers: barriers of tensor maps, reductions of the few-token path.
_EXTRA = 1024


def wide(config: KernelConfig, gemm: Gemm) -> int:
    """Rows of weights that a tile multiplies."""
    return config.block_n * gemm.width


def step_bytes(config: KernelConfig, gemm: Gemm, target: Target) -> int:
    """Bytes that one K step of both operands loads."""
    rows = config.block_m * config.block_k * bytes_of(multiply_in(gemm, target))
    weights = wide(config, gemm) * config.block_k
    return rows + (weights * bytes_of(gemm.dtype) if gemm.format is None else weights // gemm.format.per_byte)


def expand_block(config: KernelConfig, gemm: Gemm) -> int:
    """Columns of A x that one product of an epilogue takes: those of several adapters where it may, else what registers
    are left for beside the sums; all of one where a row is alone.
    """
    if config.block_m == 1:
        return max(16, 1 << (gemm.rank - 1).bit_length())
    if gemm.steps:
        most = 64
        if config.block_m == 16 or _full(config, gemm):
            most = 32 if gemm.format is None else 16  # scales lie beside the sums
        return min(most, max(16, config.block_k), max(16, 1 << (gemm.steps - 1).bit_length()))
    return 16 if gemm.rank <= 16 or _full(config, gemm) else 32


def expand_stages(config: KernelConfig, gemm: Gemm) -> int:
    """Products with B that an epilogue loads ahead, and the one that it makes.

    A tile of few rows has few adapters, and the registers of a longer loop would cost it a program beside it.
    """
    return 1 if config.block_m == 16 else 2 if gemm.format is not None and _full(config, gemm) else 3


def _full(config: KernelConfig, gemm: Gemm) -> bool:
    """Sums, and half of them once more, take three quarters of a thread's registers."""
    return config.block_m * (wide(config, gemm) + config.block_n) // (32 * config.warps) >= 192


def shared_bytes(config: KernelConfig, gemm: Gemm, target: Target) -> int:
    """An upper bound of the shared memory of a program, compared with the compiler's own figure in the tests.

    Operand buffers: one K step of both operands per stage; weights that are decoded lie there once more on their way to
    the tensor cores. The epilogue converts layouts in shared memory: after the buffers are free in a kernel of one
    tile, beside them when the next tile's loads are already under way.
    """
    if config.streams:  # the epilogue turns half of the sums, beside buffers that are never free
        turned = config.block_m * wide(config, gemm) // 2 * 4
        return _EXTRA + step_bytes(config, gemm, target) * config.stages + turned
    if config.specialised:  # the epilogue moves halves of 16-bit results, beside buffers that are never free
        return _EXTRA + step_bytes(config, gemm, target) * config.stages + config.block_m * 128 * 2
    math = multiply_in(gemm, target)
    epilogue = config.block_m * wide(config, gemm) * 4
    if gemm.rank:  # both operands of a product with B
        pieces = expand_block(config, gemm) * expand_stages(config, gemm)
        epilogue += (config.block_m + wide(config, gemm)) * pieces * bytes_of(gemm.dtype)
    buffers = step_bytes(config, gemm, target) * max(1, config.stages)
    if gemm.format is not None and math != gemm.format.element:
        buffers += (wide(config, gemm) // gemm.width * 2 + config.block_m) * config.block_k * bytes_of(math)
    return _EXTRA + (buffers + epilogue // 4 if config.programs_per_sm else max(buffers, epilogue))


def why_not_plan(plan: TritonPlan, problem: Problem, target: Target) -> list[str]:
    """Every reason against the kernels of a plan; empty when there is none."""
    gemms = {"gate-up": (plan.gate_up, problem.gate_up_gemm), "down": (plan.down, problem.down_gemm)}
    reasons = [
        f"{name}: {reason}" for name, (config, gemm) in gemms.items() for reason in why_not(config, gemm, target)
    ]
    if plan.gate_up.block_m != plan.down.block_m:
        reasons.append(f"the GEMMs share tiles of rows, of {plan.gate_up.block_m} and {plan.down.block_m}")
    if plan.few and problem.slots > FEW:
        reasons.append(f"{problem.slots} slots need a schedule: without one there are at most {FEW}")
    if plan.few and (plan.gather or plan.gate_up.maps != "none" or plan.down.maps != "none"):
        reasons.append("tiles that every program finds in the ids are loaded by pointer")
    if plan.few and (plan.gate_up.specialised or plan.down.specialised):
        reasons.append("the warp-specialised kernel reads a schedule")
    if plan.single and not plan.few:
        reasons.append("rows that are multiplied alone are found by their slots, without a schedule")
    if plan.single and problem.top_k > 16:
        reasons.append(f"a tile has rows of up to 16 slots, a token has {problem.top_k}")
    form = problem.down_gemm.format
    by_word = plan.down.words and plan.requantise != "kernel" and form is not None and form.per_byte == 2
    if by_word and plan.gate_up.block_n % 32:  # its tiles are stored in the order in which words have their columns
        reasons.append(f"gate-up: block_n={plan.gate_up.block_n} is no multiple of 32, the columns of four words")
    return reasons


def why_not(config: KernelConfig, gemm: Gemm, target: Target) -> list[str]:
    """Every reason why ``config`` cannot run ``gemm`` on ``target``; empty when it can."""
    if config.block_m == 1:
        return why_not_single(config, gemm)
    reasons = []
    for name in ("block_m", "block_n", "block_k"):
        value = getattr(config, name)
        if value < 16 or value & (value - 1):
            reasons.append(f"{name}={value} is no power of two of at least 16")
    if bytes_of(multiply_in(gemm, target)) == 1 and config.block_k < 32:
        reasons.append(f"block_k={config.block_k} is below 32, the shortest product of codes of one byte")
    if config.warps not in (1, 2, 4, 8, 16):
        reasons.append(f"warps={config.warps} is not 1, 2, 4, 8 or 16")
    if config.stages < 1:
        reasons.append(f"stages={config.stages} is below 1")
    if config.group_m < 1:
        reasons.append(f"group_m={config.group_m} is below 1")
    if config.flatten and not config.programs_per_sm:
        reasons.append("flatten needs a persistent grid (programs_per_sm > 0)")
    if gemm.rank and config.programs_per_sm and not config.specialised:
        reasons.append(
            "a persistent grid adds no adapters: their products would take memory beside that of the next tile"
        )
    if config.maps != "none":
        reasons += why_no_maps(config, gemm, target)
    if config.specialised:
        reasons += why_not_specialised(config, gemm, target)
    if config.pairs and (gemm.width != 2 or gemm.format is not None or gemm.rank or config.maps != "none"):
        reasons.append("pairs of gate and up rows are loaded by pointer, unquantised and without adapters")
    if config.words:
        reasons += why_no_words(config, gemm, target)
    elif config.scale_weights:
        reasons.append("scales weights only where they are decoded by the word")
    need = shared_bytes(config, gemm, target)
    if need > target.shared_bytes:
        have = f"{target.arch or target.vendor} has {target.shared_bytes}"
        reasons.append(f"needs up to {need} bytes of shared memory, {have}")
    return reasons


def chunk(gemm: Gemm) -> int:
    """Columns that a thread of the kernel of single rows adds up at a time: those of 16 bytes that share scales."""
    if gemm.format is None:
        return 16 // bytes_of(gemm.dtype)
    groups = gemm.format.block[1], 0 if gemm.inputs is None else gemm.inputs.group
    return math.gcd(16 * gemm.format.per_byte, *groups)


def why_not_single(config: KernelConfig, gemm: Gemm) -> list[str]:
    """Every reason against multiplying a row alone."""
    reasons = []
    if config.block_n < 1 or config.block_k & (config.block_k - 1) or config.block_n & (config.block_n - 1):
        reasons.append(f"block_n={config.block_n} and block_k={config.block_k} must be powers of two")
    if config.block_n * config.block_k > 1 << 16:
        reasons.append(f"a tile of {config.block_n} x {config.block_k} for each slot is larger than Triton's tensors")
    if config.warps not in (1, 2, 4, 8, 16):
        reasons.append(f"warps={config.warps} is not 1, 2, 4, 8 or 16")
    if config.maps != "none" or config.words or config.pairs or config.specialised:
        reasons.append("reads weights by pointer, into registers, as they are")
    if config.block_k < 32:
        reasons.append(f"block_k={config.block_k} is below 32, the 4-bit codes of 16 bytes")
    if gemm.matrix.contiguous != "K":
        reasons.append("rows of the expert matrix must be contiguous (weight_layout='NK')")
    if chunk(gemm) < 8:
        reasons.append(f"groups of columns that share a scale are no multiple of 8, but of {chunk(gemm)}")
    return reasons


def why_no_maps(config: KernelConfig, gemm: Gemm, target: Target) -> list[str]:
    """Every reason against loading by tensor map."""
    reasons = []
    if target.capability < 90 and not target.interpret:
        reasons.append(f"tensor maps need sm_90 or newer, this is {target.arch or target.vendor}")
    if not gemm.matrix.tma:
        reasons.append("no tensor map describes the expert matrix: address and strides must be multiples of 16 bytes")
    if max(config.block_m, wide(config, gemm), config.block_k) > 256:
        reasons.append("a side of a tensor map's box is at most 256")
    per_byte = gemm.format.per_byte if gemm.format else 1
    group = gemm.format.block[1] if gemm.format else 0
    if group and group % config.block_k and config.block_k % group:
        reasons.append(f"groups of {group} columns are no multiple of block_k={config.block_k}: steps are masked")
    if config.block_k // per_byte < 16:
        reasons.append("a side of a tensor map's box is at least 16 bytes")
    if gemm.matrix.contiguous == "N" and gemm.inner % config.block_k:
        # Rows past K belong to the next expert; 0 * NaN would leak them in.
        reasons.append(f"K = {gemm.inner} of a matrix stored [E, K, N] is no multiple of block_k={config.block_k}")
    return reasons


def why_no_words(config: KernelConfig, gemm: Gemm, target: Target) -> list[str]:
    """Every reason against decoding weights by the word."""
    reasons = []
    math = multiply_in(gemm, target)
    if target.vendor != "nvidia" or target.capability < 80:
        reasons.append(f"words are decoded in PTX for sm_80 and newer, this is {target.arch or target.vendor}")
    if gemm.format is None or gemm.format.element not in ("int4", "e2m1", "int8", "uint8"):
        reasons.append("only 4-bit codes and 8-bit integers are decoded by the word")
    if gemm.grouped:
        reasons.append("rows that are quantised by groups keep the order of their columns")
    if math not in ("float16", "bfloat16"):
        reasons.append(f"words are decoded to 16-bit floats, the products are of {math}")
    if not gemm.matrix.words:
        reasons.append("rows of the expert matrix are no whole words of 32 bits")
    if config.block_k < 32:
        reasons.append(f"block_k={config.block_k} is below 32, the columns of four words")
    if config.maps != "none" and not config.specialised:
        reasons.append("words are loaded by pointer")
    if gemm.inner % 32:
        reasons.append(f"K = {gemm.inner} is no multiple of 32, the columns that change places")
    rows, group = gemm.format.block if gemm.format else (1, 0)
    if group and (rows != 1 or group < 16 or group & (group - 1)):
        reasons.append(
            f"blocks of {rows} x {group} share a scale, words those of a row and 16, 32, 64 ... columns, or of all"
        )
    return reasons


def why_not_specialised(config: KernelConfig, gemm: Gemm, target: Target) -> list[str]:
    """Every reason against the warp-specialised kernel of Hopper."""
    reasons = []
    if target.vendor != "nvidia" or target.capability != 90 or target.interpret:
        reasons.append(f"written for sm_90, this is {target.arch or target.vendor}")
    if not target.gluon:
        reasons.append("needs Gluon as it is in Triton 3.6 and newer")
    if gemm.dtype not in ("float16", "bfloat16"):
        reasons.append(f"stores 16-bit results, the layer is {gemm.dtype}")
    math, form = multiply_in(gemm, target), gemm.format
    decoded = decodes(gemm, target)
    if decoded and not (config.words and config.scale_weights):
        reasons.append("decodes weights by the word alone, and scales them")
    if form is not None and form.zero:
        reasons.append("takes no zero points")
    if gemm.matrix.contiguous != "K":
        reasons.append("rows of the expert matrix must be contiguous (weight_layout='NK')")
    if gemm.inner * bytes_of(math) % 16:
        reasons.append(f"K = {gemm.inner} is no multiple of {16 // bytes_of(math)}, the columns of one copy")
    if config.block_k * bytes_of(math) != 128:
        reasons.append(f"a step has 128 bytes of a row, block_k={config.block_k} has {config.block_k * bytes_of(math)}")
    if not decoded and form is not None and form.block[1] and (not gemm.grouped or form.block[1] != config.block_k):
        reasons.append(f"scales must be those of block_k={config.block_k} columns, or of whole rows")
    if gemm.grouped and form is not None and form.block[0] % 128:
        reasons.append(f"a sum of 128 columns has one scale, blocks of {form.block[0]} have several")
    if gemm.grouped and math == "int8":
        reasons.append("sums groups of e4m3 alone")
    if config.streams:
        if config.block_m > 32 or wide(config, gemm) not in (128, 256) or config.warps != 4 or decoded:
            reasons.append("streams weights as they are to tiles of 16 or 32 rows by 128 or 256 of weights, by 4 warps")
        if not config.swap or config.maps != "w" or not config.programs_per_sm or config.group_m != 1:
            reasons.append("weights that are streamed are the left operand, by tensor map, in a persistent grid")
    elif config.block_m != 128 or wide(config, gemm) != 256 or config.warps not in ((4,) if decoded else (4, 8)):
        reasons.append("a tile multiplies 128 rows by 256 of weights, with 8 warps together or by 4; decoded, by 4")
    if gemm.rank and (form is not None or not gemm.steps or config.streams):
        reasons.append(
            "adds adapters as steps of its sum in tiles of 128 rows: to layers that are not quantised, where LoRA is "
            "finite, with R and strides that are multiples of 8"
        )
    if not gemm.rows_aligned:
        reasons.append("rows of hidden_states must be contiguous and start at multiples of 16 bytes")
    return reasons
