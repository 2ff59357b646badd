"""The torch backend: any device, one matrix product per expert that has rows.

It reads the number of rows of each expert on the host. On a GPU that is a synchronisation, and a call cannot be
captured in a CUDA graph; it is the default where there is no GPU, and elsewhere a second opinion.

Rounding: products accumulate in float32 and are stored in the dtype of the layer; bias, router weight and
activation are float32, the activated rows are stored in the dtype of the layer; the sum over the slots of a token
is float32 and rounded once. A row depends on its own token alone, so a NaN stays where it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.errors import UnsupportedError, explain
from fusedmoe.plan.config import Plan
from fusedmoe.reference.activations import activate
from fusedmoe.spec.call import Call
from fusedmoe.spec.problem import Problem

#: Elements of a float32 temporary. Fits the cache of a core, and bounds the memory needed beside the rows.
PIECE = 1 << 18


class _Schedule(NamedTuple):
    """R live slots in groups of one expert each; a group keeps the order of its slots."""

    experts: list[int]  #      expert of each group
    counts: list[int]  #       rows of each group
    slot: Tensor  #            [R] slot of a row
    expert: Tensor  #          [R] expert of a row
    row: Tensor  #             [S] row of a slot; some row where the slot is absent
    absent: Tensor | None  #   [S, 1] slots without a row; None when there are none


def workspace_layout(problem: Problem, plan: Plan) -> Layout:
    """Nothing: the number of rows is known when the ids are, and torch's allocator keeps what it needs."""
    return {}


def route(call: Call, plan: Plan, work: Workspace) -> _Schedule:
    """Sort the live slots by expert.

    Raises:
        UnsupportedError: the current CUDA stream is being captured.
    """
    if call.hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            explain(
                "backend 'torch' in a CUDA graph",
                got="a stream that is being captured",
                wanted="no capture: it reads the number of rows of each expert on the host",
                do="Capture with backend='triton', or call outside of the capture.",
            )
        )
    n_experts = call.problem.experts
    local = _local_experts(call)
    if call.problem.tokens == 1 and max(experts := local.tolist()) < n_experts:
        # Nothing to gain from sorting the slots of one token, and without it a decode step is shorter.
        slot = torch.arange(len(experts), device=local.device)
        return _Schedule(experts, [1] * len(experts), slot, local, slot, None)
    expert, slot = local.sort(stable=True)
    groups = torch.unique_consecutive(expert, return_counts=True)
    experts, counts = torch.stack(groups).tolist()  # one transfer for both
    row = slot.argsort()
    if not experts or experts[-1] < n_experts:
        return _Schedule(experts, counts, slot, expert, row, None)
    n_rows = slot.numel() - counts[-1]
    absent = (local == n_experts).unsqueeze(1)
    return _Schedule(experts[:-1], counts[:-1], slot[:n_rows], expert[:n_rows], row.clamp(max=n_rows - 1), absent)


def gate_up(call: Call, plan: Plan, schedule: _Schedule, work: Workspace) -> Tensor:
    """Activated rows [R, I]."""
    problem, x = call.problem, call.hidden_states
    x = x.expand(schedule.slot.numel(), -1) if problem.tokens == 1 else x[schedule.slot // problem.top_k]
    products = _multiply(x, call.w13, schedule, problem)
    hidden = products.new_empty(products.shape[0], problem.intermediate)
    wide = _wide(products.dtype)
    n_rows = max(1, PIECE // problem.w13_rows)
    for start in range(0, products.shape[0], n_rows):
        piece = slice(start, start + n_rows)
        h = products[piece].to(wide)
        if problem.weight_on_input:
            h = h * call.topk_weights.reshape(-1, 1)[schedule.slot[piece]].to(wide)
        if call.w13_bias is not None:
            h = h + call.w13_bias[schedule.expert[piece]].to(wide)
        hidden[piece] = activate(h, problem.activation, problem.gate_up)
    return hidden


def down(call: Call, plan: Plan, schedule: _Schedule, hidden: Tensor, work: Workspace) -> Tensor:
    """Products [R, H]. Bias and router weight wait for :func:`combine`, which has the rows in cache."""
    return _multiply(hidden, call.w2, schedule, call.problem)


def combine(call: Call, plan: Plan, schedule: _Schedule, rows: Tensor, work: Workspace, out: Tensor) -> None:
    """Add the bias, weigh, and sum the slots of a token in their order."""
    problem = call.problem
    if rows.shape[0] == 0:
        out.zero_()
        return
    wide = _wide(rows.dtype)
    weights = None if problem.weight_on_input else call.topk_weights.to(wide).reshape(-1, 1)
    n_tokens = max(1, PIECE // (problem.top_k * problem.hidden))
    for start in range(0, problem.tokens, n_tokens):
        end = min(start + n_tokens, problem.tokens)
        slots = slice(start * problem.top_k, end * problem.top_k)
        row = schedule.row[slots]
        y = rows.index_select(0, row).to(wide)
        if call.w2_bias is not None:
            y = y + call.w2_bias[schedule.expert[row]].to(wide)
        if weights is not None:
            y = y * weights[slots]
        if schedule.absent is not None:
            y = y.masked_fill(schedule.absent[slots], 0.0)
        total = y.new_zeros(end - start, problem.hidden)
        for y_j in y.view(end - start, problem.top_k, problem.hidden).unbind(1):
            total += y_j  # torch.sum adds in an order of its own
        out[start:end] = total


def _local_experts(call: Call) -> Tensor:
    """Local expert of each slot [S] int64; E where there is none."""
    ids = _within(call.topk_ids.reshape(-1).long(), call.n_global)
    if call.expert_map is None:
        return ids
    return _within(functional.pad(call.expert_map.long(), (0, 1), value=-1)[ids], call.problem.experts)


def _within(ids: Tensor, count: int) -> Tensor:
    """Ids as they are in [0, count), and ``count`` for all others."""
    return ids.clamp(-1, count).remainder(count + 1)


def _multiply(x: Tensor, w: Tensor, schedule: _Schedule, problem: Problem) -> Tensor:
    """``x[r] @ w[expert[r]].T`` [R, N].

    In the dtype of the layer. Measured on a CPU with AMX and AVX512-FP16, 1 to 512 rows: conversion to float32
    first took 0.8 to 6.6 times as long in bfloat16 and 1.1 to 2.4 times in float16. Written in place (``out=``), which
    autocast leaves alone as it does the kernels of other backends.
    """
    out = x.new_empty(x.shape[0], w.shape[1])
    # split_with_sizes and one transpose for all: what the loop does per expert is a good part of a decode step.
    x_rows, out_rows = x.split_with_sizes(schedule.counts), out.split_with_sizes(schedule.counts)
    w = w.transpose(1, 2)
    with _float32_products(problem, x.device):
        for expert, x_e, out_e in zip(schedule.experts, x_rows, out_rows, strict=True):
            torch.mm(x_e, w[expert], out=out_e)
    return out


@contextlib.contextmanager
def _float32_products(problem: Problem, device: torch.device) -> Iterator[None]:
    """Multiply float32 as the problem says, whatever ``torch.set_float32_matmul_precision`` says."""
    if problem.dtype != "float32":
        yield
        return
    backends = torch.backends
    library = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = library.fp32_precision
    library.fp32_precision = problem.fp32_precision
    try:
        yield
    finally:
        library.fp32_precision = before


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
