"""Launches of the warp-specialised GEMMs of Hopper."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.backends.launch import launch
from fusedmoe.backends.product import Product
from fusedmoe.backends.weights import operand, stacked_rows
from fusedmoe.kernels import overlap, step
from fusedmoe.kernels.grouped_gemm_sm90 import grouped_gemm_sm90
from fusedmoe.kernels.operands import Schedule
from fusedmoe.kernels.stream_sm90 import grouped_stream_sm90


class _Common(NamedTuple):
    """What both kernels take of a product."""

    operands: tuple[Any, ...]  # behind the schedule: rows, weights, output, epilogue, parameters
    w_desc: TensorDescriptor
    half: int  #                 columns of weights that share a scale, if any do
    element: Any  #              policy of words
    constants: dict[str, Any]


def _common(product: Product) -> _Common:
    config = product.config
    _, n, k = product.w.shape
    half = config.block_n * product.gemm.width // 2
    matrix = operand(product.w, product.multiply, product.up, half, config)
    data, policies = matrix.data, matrix.policies
    rows, per_expert = stacked_rows(data)
    box = half if product.gate_up == "concatenated" else 2 * half
    count = config.block_k // policies["PER_ITEM"]
    layout = gl.NVMMASharedLayout(count * data.element_size(), 8 * data.element_size(), 2)
    weight = matrix.weight._replace(rows_per_expert=per_expert)
    constants = {
        **{name: product.stored[name] for name in ("STORE", "ARRANGE", "ENCODE", "LARGEST", "OUT_GROUP")},
        **{name: policies[name] for name in ("LOAD_SCALES", "MATH", "FINISH", "ACCUMULATE")},
        "EPILOGUE": product.epilogue,
        "ACTIVATION": product.activation,
        "GATE_UP": product.gate_up,
        "N": n,
        "K": k,
        "SUM": "words" if config.words else "groups" if policies["STEP"] is step.scaled_product else "running",
        "X_LAYOUT": gl.NVMMASharedLayout(128, policies["MATH"].primitive_bitwidth, 2),
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "num_warps": 4,  # of the producer, which the kernels start in
    }
    return _Common(
        (product.x, weight, product.out, product.e, product.p),
        TensorDescriptor(data, [rows, data.shape[2]], [data.stride(1), 1], [box, count], layout),
        half,
        policies["ELEMENT"],
        constants,
    )


def multiply(product: Product, options: dict[str, Any], schedule: Schedule, programs: int, *, second: bool) -> None:
    """One of the two GEMMs, on the current device."""
    config, x, out = product.config, product.x, product.out
    common = _common(product)
    k = common.constants["K"]
    x_desc = None
    if config.maps == "xw":
        layout, box = common.constants["X_LAYOUT"], [64, config.block_k]
        x_desc = TensorDescriptor(x.ptr, [x.ptr.shape[0], k], [x.stride_row, 1], box, layout)
    out_desc = None
    # Slots of neighbouring rows lie anywhere; and what was decoded has neighbouring columns in neighbours already.
    if not (out.by_slot.value or config.words):
        layout = gl.NVMMASharedLayout(128, 8 * out.ptr.element_size(), 2)
        shape, box = [out.ptr.shape[0], product.gemm.columns], [16 * config.warps, common.half]
        out_desc = TensorDescriptor(out.ptr, shape, [out.stride_row, 1], box, layout)
    launch(
        grouped_gemm_sm90,
        (programs,),
        schedule,
        *common.operands,
        product.steps,
        x_desc,
        common.w_desc,
        out_desc,
        k,
        **options,
        **common.constants,
        GEMM=int(second),
        ELEMENT=common.element,
        ADAPTED=product.steps is not None,
        GROUP_M=config.group_m,
        CONSUMERS=8 // config.warps,
    )


def stream(product: Product, options: dict[str, Any], schedule: Schedule, programs: int, *, ahead: bool) -> None:
    """One of the two GEMMs, of few rows an expert; ``ahead``: the launch before did not make the schedule."""
    config, wait = product.config, options["WAIT"]
    common = _common(product)
    # Of a thread that multiplies, and of the others. Alone on its multiprocessor a program takes what is left over
    # elsewhere (dsv3-tp8, fp8 by block, T = 512 on an H200: with 216 and 72 445 us, with these 425); two, with room for
    # one of the next launch, have what their sums need, and products of groups beside them, found by compiling.
    sums = 2 * common.half * config.block_m // 128 * (2 if common.constants["SUM"] == "groups" else 1)
    registers, others = (224, 112) if config.programs_per_sm == 1 else (88 + sums, 72)
    launch(
        grouped_stream_sm90,
        (programs,),
        schedule,
        *common.operands,
        common.w_desc,
        common.constants["K"],
        **{**options, "WAIT": overlap.nothing if ahead else wait},
        **common.constants,
        WAIT_FOR_ROWS=wait if ahead else overlap.nothing,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        REGISTERS=registers,
        maxnreg=(registers + others) // 2,  # of each thread when the kernel starts
    )
