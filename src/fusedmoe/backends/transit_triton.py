"""Rows before they travel and after, as Triton launches; see :class:`fusedmoe.backends.base.Transit`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedmoe._compat import device_guard, teach_interpreter
from fusedmoe.backends.rows import flat, quantised
from fusedmoe.backends.transit import sends
from fusedmoe.backends.workspace import Workspace
from fusedmoe.kernels import arrange, overlap, quantise
from fusedmoe.kernels.combine import by_id, combine
from fusedmoe.kernels.operands import Ids, Rows
from fusedmoe.settings import settings
from fusedmoe.spec.format import ELEMENTS, Inputs

__all__ = ["encode", "reduce", "sends"]

if settings().interpret:
    teach_interpreter()


def encode(x: Tensor, inputs: Inputs, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows."""
    n_rows, n_columns = x.shape
    groups = math.ceil(n_columns / inputs.group) if inputs.mode == "group" else 1
    work = Workspace({}, x.device)
    codes = torch.empty(n_rows, n_columns, dtype=getattr(torch, ELEMENTS[inputs.element].dtype), device=x.device)
    scale = torch.empty(n_rows, groups, dtype=torch.float32, device=x.device)
    if not n_rows:
        return codes, scale
    work.update(x_codes=codes, x_scale=scale, x_amax=scale)
    options: dict[str, Any] = {"WAIT": overlap.nothing, "RELEASE": overlap.nothing}
    quantised(
        *(_numbers(x[:, :1], n_rows), None, Rows(*flat(x), None), "x", n_columns, inputs, static),
        *(quantise.all_rows, arrange.as_they_are, work, options),
        amax_is_there=False,
    )
    return codes, scale


def reduce(rows: Tensor, index: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """Weigh and sum the rows of each token."""
    n_tokens, n_columns = out.shape
    if not rows.shape[0] or not n_tokens:
        return out.zero_()
    block = max(16, min(1024, triton.next_power_of_2(n_columns)))
    strides = (0, 0) if weights is None else weights.stride()
    with device_guard(out.device):
        combine[(n_tokens, math.ceil(n_columns / block))](
            *(_numbers(index, rows.shape[0]), rows, rows.stride(0), weights, *strides),
            *(out, out.stride(0), out.stride(1)),
            WAIT=overlap.nothing,
            ROW=by_id,
            H=n_columns,
            BLOCK_H=block,
        )
    return out


def _numbers(index: Tensor, count: int) -> Ids:
    """Numbers of rows below ``count`` in the place of ids of experts."""
    top_k = tl.constexpr(index.shape[1])
    return Ids(index, index.stride(0), index.stride(1), None, count, count, top_k, index.numel())
