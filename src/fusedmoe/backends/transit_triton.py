"""Rows before they travel and after, as Triton launches; see :class:`fusedmoe.backends.base.Transit`."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedmoe._compat import teach_interpreter
from fusedmoe.backends import transit
from fusedmoe.backends.base import Places, Rows as Messages, Sends
from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.rows import flat, quantised
from fusedmoe.backends.transit import rows_of, words
from fusedmoe.backends.workspace import Workspace
from fusedmoe.kernels import arrange, overlap, quantise, sends as kernels
from fusedmoe.kernels.combine import by_id, combine
from fusedmoe.kernels.operands import Ids, Rows, odd_of
from fusedmoe.lora import MAX_SLOTS
from fusedmoe.plan.arithmetic import multiplies
from fusedmoe.settings import settings
from fusedmoe.spec.format import ELEMENTS, Inputs
from fusedmoe.target import target_of

if settings().interpret:
    teach_interpreter()


def encode(x: Tensor, inputs: Inputs, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows; in plain torch where the device has no such codes, and so no compiler for them."""
    if not multiplies(target_of(x.device), inputs.element):
        return transit.encode(x, inputs, static)
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
        launch(
            combine,
            (n_tokens, math.ceil(n_columns / block)),
            *(_numbers(index, rows.shape[0]), None, rows, rows.stride(0), weights, *strides),
            *(out, out.stride(0), out.stride(1)),
            WAIT=overlap.nothing,
            ROW=by_id,
            H=n_columns,
            BLOCK_H=block,
        )
    return out


def sends(topk_ids: Tensor, places: Places, rank: int, capacity: int | None) -> Sends:
    """Which tokens go to which rank, once each, and where the answers of each token will be."""
    (n_tokens, top_k), device = topk_ids.shape, topk_ids.device
    r_pad = max(2, triton.next_power_of_2(places.ranks))
    chunk = max(16, min(128, 8192 // r_pad))
    n_chunks = math.ceil(n_tokens / chunk)
    sizes: dict[str, Any] = {"TOP_K": top_k, "RANKS": places.ranks, "EACH": places.each, "R_PAD": r_pad, "CHUNK": chunk}

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    chosen, answer, base = empty(n_tokens, top_k), empty(n_tokens, top_k), empty(max(1, n_chunks), places.ranks)
    token = empty(rows_of(n_tokens, top_k, places.ranks, capacity), dtype=torch.int64)
    if not n_tokens:
        counts = torch.zeros(places.ranks, dtype=torch.int64, device=device)
        return Sends(chosen, counts, token.zero_(), answer)
    counts = empty(places.ranks, dtype=torch.int64)
    with device_guard(device):
        launch(
            kernels.count,
            (n_chunks,),
            *(topk_ids, *topk_ids.stride(), places.of, places.copies, chosen, base, n_tokens, rank),
            E=places.of.shape[0] - 1,
            COPIES=places.of.shape[1],
            **sizes,
        )
        launch(
            kernels.place,
            (n_chunks,),
            *(chosen, base, counts, token, answer, n_tokens, n_chunks, capacity or 0),
            PADDED=capacity is not None,
            **sizes,
        )
    return Sends(chosen, counts, token, answer)


def pack(
    x: Tensor, scale: Tensor | None, weights: Tensor, adapter_ids: Tensor | None, sends: Sends, capacity: int | None,
    out: Messages,
) -> None:  # fmt: skip
    """Write messages."""
    n_rows = out.places.shape[0]
    if not n_rows:
        return
    bits, target = words(x, out.hidden_states)
    scales = (None, 0, None, 0) if out.scale is None or scale is None else (
        scale, scale.stride(0), out.scale, out.scale.stride(0))  # fmt: skip
    adapters = (None, 0, None, 0) if out.adapters is None or adapter_ids is None else (
        adapter_ids, adapter_ids.stride(0), out.adapters, out.adapters.stride(0))  # fmt: skip
    with device_guard(x.device):
        launch(
            kernels.pack,
            (n_rows,),
            *(sends.token, sends.counts, capacity or 0, bits, bits.stride(0), target, target.stride(0), *scales),
            *(sends.places, out.places, out.places.stride(0)),
            *(weights, *weights.stride(), out.weights, out.weights.stride(0), *adapters),
            SLOTS=MAX_SLOTS,
            WORDS=bits.shape[1],
            GROUPS=0 if scale is None else scale.shape[1],
            TOP_K=weights.shape[1],
            K_PAD=max(2, triton.next_power_of_2(weights.shape[1])),
            BLOCK=min(1024, max(16, triton.next_power_of_2(bits.shape[1]))),
            BLOCK_G=min(1024, max(2, triton.next_power_of_2(1 if scale is None else scale.shape[1]))),
            PADDED=capacity is not None,
        )


def _numbers(index: Tensor, count: int) -> Ids:
    """Numbers of rows below ``count`` in the place of ids of experts."""
    top_k = tl.constexpr(index.shape[1])
    return Ids(index, index.stride(0), index.stride(1), None, odd_of(count), 1, top_k, odd_of(index.numel()))
