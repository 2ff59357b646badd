"""Launch of the warp-specialised GEMM of Hopper."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe.backends.launch import launch
from fusedmoe.backends.product import Product
from fusedmoe.backends.weights import operand, stacked_rows
from fusedmoe.kernels import step
from fusedmoe.kernels.grouped_gemm_sm90 import grouped_gemm_sm90
from fusedmoe.kernels.operands import Schedule


def multiply(product: Product, options: dict[str, Any], schedule: Schedule, programs: int) -> None:
    """One of the two GEMMs, on the current device."""
    config, x = product.config, product.x
    _, n, k = product.w.shape
    half = config.block_n * product.gemm.width // 2  # columns of weights that share a scale, if any do
    matrix = operand(product.w, product.multiply, product.up, half, config)
    data, policies = matrix.data, matrix.policies
    layout = gl.NVMMASharedLayout(128, 8 * data.element_size(), 2)
    rows, per_expert = stacked_rows(data)
    box = half if product.gate_up == "concatenated" else 2 * half
    w_desc = TensorDescriptor(data, [rows, k], [data.stride(1), 1], [box, config.block_k], layout)
    x_desc = None
    if config.maps == "xw":
        x_desc = TensorDescriptor(x.ptr, [x.ptr.shape[0], k], [x.stride_row, 1], [64, config.block_k], layout)
    launch(
        grouped_gemm_sm90,
        (programs,),
        schedule,
        x,
        matrix.weight._replace(rows_per_expert=per_expert),
        product.out,
        product.e,
        product.p,
        x_desc,
        w_desc,
        k,
        **options,
        **{name: product.stored[name] for name in ("STORE", "ENCODE", "LARGEST", "OUT_GROUP")},
        LOAD_SCALES=policies["LOAD_SCALES"],
        FINISH=policies["FINISH"],
        EPILOGUE=product.epilogue,
        ACTIVATION=product.activation,
        GATE_UP=product.gate_up,
        N=n,
        K=k,
        ACCUMULATE=policies["ACCUMULATE"],
        SCALED=policies["STEP"] is step.scaled_product,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        GROUP_M=config.group_m,
        CONSUMERS=8 // config.warps,
        num_warps=4,  # of the producer, which the kernel starts in
    )
