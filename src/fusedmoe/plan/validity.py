"""Every reason why a configuration cannot run. One source: the planner, the tuner and the errors ask here."""

from __future__ import annotations

from fusedmoe.plan.config import KernelConfig
from fusedmoe.spec.problem import Gemm
from fusedmoe.target import Target

#: Shared memory beside the operand buffers: barriers of tensor maps, reductions of the few-token path.
_EXTRA = 1024


def wide(config: KernelConfig, gemm: Gemm) -> int:
    """Rows of weights that a tile multiplies."""
    return config.block_n * gemm.width


def shared_bytes(config: KernelConfig, gemm: Gemm) -> int:
    """An upper bound of the shared memory of a program, compared with the compiler's own figure in the tests.

    Operand buffers: one K step of both operands per stage. The epilogue converts layouts in shared memory: after
    the buffers are free in a kernel of one tile, beside them when the next tile's loads are already under way.
    """
    step = (config.block_m + wide(config, gemm)) * config.block_k * gemm.itemsize
    epilogue = config.block_m * wide(config, gemm) * 4
    buffers = step * max(1, config.stages)
    return _EXTRA + (buffers + epilogue // 4 if config.programs_per_sm else max(buffers, epilogue))


def why_not(config: KernelConfig, gemm: Gemm, target: Target) -> list[str]:
    """Every reason why ``config`` cannot run ``gemm`` on ``target``; empty when it can."""
    reasons = []
    for name in ("block_m", "block_n", "block_k"):
        value = getattr(config, name)
        if value < 16 or value & (value - 1):
            reasons.append(f"{name}={value} is no power of two of at least 16")
    if config.warps not in (1, 2, 4, 8, 16):
        reasons.append(f"warps={config.warps} is not 1, 2, 4, 8 or 16")
    if config.stages < 1:
        reasons.append(f"stages={config.stages} is below 1")
    if config.group_m < 1:
        reasons.append(f"group_m={config.group_m} is below 1")
    if config.flatten and not config.programs_per_sm:
        reasons.append("flatten needs a persistent grid (programs_per_sm > 0)")
    if config.maps != "none":
        reasons += why_no_maps(config, gemm, target)
    need = shared_bytes(config, gemm)
    if need > target.shared_bytes:
        have = f"{target.arch or target.vendor} has {target.shared_bytes}"
        reasons.append(f"needs up to {need} bytes of shared memory, {have}")
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
    if gemm.matrix.contiguous == "N" and gemm.inner % config.block_k:
        # Rows past K belong to the next expert; 0 * NaN would leak them in.
        reasons.append(f"K = {gemm.inner} of a matrix stored [E, K, N] is no multiple of block_k={config.block_k}")
    return reasons
