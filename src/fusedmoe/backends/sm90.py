"""Launch of the warp-specialised GEMM of Hopper."""

from __future__ import annotations

import math
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fusedmoe._compat import device_guard
from fusedmoe.backends.weights import operand, stacked_rows
from fusedmoe.call import Call
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.kernels import step
from fusedmoe.kernels.grouped_gemm_sm90 import grouped_gemm_sm90
from fusedmoe.kernels.operands import Epilogue, Output, Parameters, Rows, Schedule
from fusedmoe.plan.config import KernelConfig
from fusedmoe.spec.problem import Gemm
from fusedmoe.target import target_of


def launch(
    call: Call,
    gemm: Gemm,
    config: KernelConfig,
    options: dict[str, Any],
    schedule: Schedule,
    max_tiles: int,
    x: Rows,
    w: torch.Tensor | ExpertMatrix,
    multiply: str,
    up: int,
    out: Output,
    e: Epilogue,
    p: Parameters,
    epilogue_function: Any,
    activation_function: Any,
    gate_up_layout: str | None,
    stored: dict[str, Any],
) -> None:
    """One of the two GEMMs, as :func:`fusedmoe.backends.triton._launch` would launch the portable one."""
    _, n, k = w.shape
    half = config.block_n * gemm.width // 2  # columns of weights that share a scale, if any do
    matrix = operand(w, multiply, up, half, config)
    data, policies = matrix.data, matrix.policies
    layout = gl.NVMMASharedLayout(128, 8 * data.element_size(), 2)
    rows, per_expert = stacked_rows(data)
    w_desc = TensorDescriptor(
        data,
        [rows, k],
        [data.stride(1), 1],
        [half if gate_up_layout == "concatenated" else 2 * half, config.block_k],
        layout,
    )
    x_desc = None
    if config.maps == "xw":
        x_desc = TensorDescriptor(x.ptr, [x.ptr.shape[0], k], [x.stride_row, 1], [64, config.block_k], layout)
    columns = n if gate_up_layout is None else n // 2
    n_programs = min(max_tiles * math.ceil(columns / config.block_n), target_of(call.hidden_states.device).n_sm)
    with device_guard(call.hidden_states.device):
        grouped_gemm_sm90[(n_programs,)](
            schedule,
            x,
            matrix.weight._replace(rows_per_expert=per_expert),
            out,
            e,
            p,
            x_desc,
            w_desc,
            k,
            **options,
            **{name: stored[name] for name in ("STORE", "ENCODE", "LARGEST", "OUT_GROUP")},
            LOAD_SCALES=policies["LOAD_SCALES"],
            FINISH=policies["FINISH"],
            EPILOGUE=epilogue_function,
            ACTIVATION=activation_function,
            GATE_UP=gate_up_layout,
            N=n,
            K=k,
            ACCUMULATE=policies["ACCUMULATE"],
            SCALED=policies["STEP"] is step.scaled_product,
            BLOCK_K=config.block_k,
            STAGES=config.stages,
            GROUP_M=config.group_m,
            CONSUMERS=8 // config.warps,
            num_warps=4,
        )
