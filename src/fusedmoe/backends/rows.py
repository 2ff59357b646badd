"""Rows as a GEMM multiplies them: quantised where its expert matrix asks for it, in the order of its columns."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.workspace import Workspace
from fusedmoe.kernels import arrange, encode, overlap, quantise
from fusedmoe.kernels.operands import Ids, Rows, RowScale, Schedule
from fusedmoe.plan.config import KernelConfig
from fusedmoe.spec.format import ELEMENTS, Inputs
from fusedmoe.spec.problem import Gemm

#: Elements that a program quantises at once, and rows from which on it has several where they are short.
_ELEMENTS, _MANY_ROWS = 8192, 4096


def flat(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A tensor of two dimensions and its strides."""
    return tensor, tensor.stride(0), tensor.stride(1)


def order_of(gemm: Gemm, config: KernelConfig) -> Any:
    """Order of the columns of the rows that a GEMM multiplies."""
    if not config.words or gemm.format is None:
        return arrange.as_they_are
    return arrange.by_words_of_eight if gemm.format.per_byte == 2 else arrange.by_words_of_four


def in_order(x: Rows, gemm: Gemm, order: Any, out: torch.Tensor, options: dict[str, Any]) -> Rows:
    """Rows with their columns in this order, in ``out``, which may be where they lie."""
    block = min(4096, triton.next_power_of_2(gemm.inner))
    with device_guard(out.device):
        launch(
            arrange.arrange,
            (out.shape[0], math.ceil(gemm.inner / block)),
            x,
            out,
            out.stride(0),
            **options,
            ARRANGE=order,
            K=gemm.inner,
            BLOCK_K=block,
        )
    return x._replace(ptr=out, stride_row=out.stride(0), stride_k=out.stride(1))


def with_scale(x: Rows, inputs: Inputs, scale: torch.Tensor, stride_row: int, stride_group: int) -> Rows:
    """Rows that are codes, with their scales."""
    row_scale = RowScale(scale, stride_row, stride_group, tl.constexpr(0) if x.per is None else x.per)
    return x._replace(scale=row_scale, scale_at=tl.constexpr("step" if inputs.mode == "group" else "end"))


def quantised(
    ids: Ids,
    table: Schedule | None,
    x: Rows,
    name: str,
    columns: int,
    inputs: Inputs,
    static: torch.Tensor | None,
    live: Any,
    order: Any,
    work: Workspace,
    options: dict[str, Any],
    *,
    amax_is_there: bool,
) -> None:
    """Codes and scales of rows into the workspace, where they are called ``name``."""
    codes, scale, amax = work[f"{name}_codes"], work[f"{name}_scale"], work[f"{name}_amax"]
    after = {**options, **({"WAIT": overlap.wait, "launch_pdl": True} if options["RELEASE"] is overlap.release else {})}
    how = {"ENCODE": getattr(encode, inputs.element), "LARGEST": ELEMENTS[inputs.element].largest, "K": columns}
    rows = codes.shape[0]
    with device_guard(codes.device):
        if inputs.mode == "group":
            block_group = triton.next_power_of_2(inputs.group)
            n_groups = scale.shape[1]
            each = min(triton.next_power_of_2(n_groups), max(1, 2048 // block_group))
            launch(
                quantise.quantise_groups,
                (rows, math.ceil(n_groups / each)),
                ids,
                table,
                x,
                codes,
                codes.stride(0),
                scale,
                scale.stride(0),
                **options,
                **how,
                LIVE=live,
                GROUP=inputs.group,
                BLOCK_GROUP=block_group,
                GROUPS=each,
            )
            return
        block_k = min(_ELEMENTS, triton.next_power_of_2(columns))
        # A row for each program where there are few; many rows are short of loads in flight, not of programs.
        each = max(1, _ELEMENTS // block_k) if rows >= _MANY_ROWS else 1
        tile = {"LIVE": live, "ROWS": each, "BLOCK_K": block_k, "num_warps": 8 if each * block_k > 4096 else 4}
        programs = math.ceil(rows / each)
        if inputs.mode == "tensor" and not amax_is_there:
            launch(quantise.zero, (1,), amax, **options, N=1)
            launch(quantise.amax, (programs,), ids, table, x, amax, rows, **after, **tile, K=columns)
            options = after
        launch(
            quantise.quantise_rows,
            (programs,),
            ids,
            table,
            x,
            codes,
            codes.stride(0),
            scale,
            amax if inputs.mode == "tensor" else None,
            static if inputs.mode == "static" else None,
            rows,
            **options,
            **how,
            **tile,
            ARRANGE=order,
        )
