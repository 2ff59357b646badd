"""Launch of the kernel of single rows."""

from __future__ import annotations

import math
from typing import Any

import triton

from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.product import Product
from fusedmoe.backends.weights import TRITON_TYPES, operand
from fusedmoe.kernels.gemv import grouped_gemv, of_expert
from fusedmoe.kernels.operands import Ids
from fusedmoe.kernels.tiles import local_expert
from fusedmoe.plan.arithmetic import multiplies
from fusedmoe.plan.validity import chunk
from fusedmoe.target import Target


def multiply(product: Product, ids: Ids, groups: int, turns: int, options: dict[str, Any], target: Target) -> None:
    """One of the two GEMMs; ``turns`` slots are added up to a row of the result."""
    config, gemm = product.config, product.gemm
    _, n, k = product.w.shape
    wide = config.block_n * (2 if product.gate_up == "interleaved" else 1)
    form = gemm.format
    # Codes that the device knows become numbers in one instruction, also where the rows are none.
    multiply_as = product.multiply
    if form is not None and form.element in TRITON_TYPES and not gemm.emulate:
        multiply_as = form.element if multiplies(target, form.element) else multiply_as
    matrix = operand(product.w, multiply_as, product.up, wide, config)
    with device_guard(product.x.ptr.device):
        launch(
            grouped_gemv,
            (groups * math.ceil(gemm.columns / config.block_n),),
            ids,
            product.x,
            matrix.weight,
            product.out,
            product.e,
            product.p,
            k,
            **options,
            **{name: product.stored[name] for name in ("STORE", "ARRANGE", "ENCODE", "LARGEST", "OUT_GROUP")},
            **{name: matrix.policies[name] for name in ("ELEMENT", "SHIFT", "PER_ITEM", "FINISH")},
            MATRIX=local_expert,
            PLACE=of_expert,
            TURNS=turns,
            J=triton.next_power_of_2(turns),
            GROUP=0 if gemm.inputs is None else gemm.inputs.group,
            EPILOGUE=product.epilogue,
            ACTIVATION=product.activation,
            GATE_UP=product.gate_up,
            N=n,
            K=k,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            CHUNK=chunk(gemm),
            num_warps=config.warps,
            num_stages=1,
        )
