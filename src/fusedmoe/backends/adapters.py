"""Launches and operands of adapters, beside those of the layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.product import PLAIN
from fusedmoe.backends.weights import TRITON_TYPES
from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.call import Call
from fusedmoe.kernels import decode, load, lora, scales, step
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.kernels.operands import (
    AdaptedEpilogue,
    AdaptedIds,
    Epilogue,
    Ids,
    Output,
    Parameters,
    Rows,
    Schedule,
    Shrink,
)
from fusedmoe.plan.config import FEW, TritonPlan
from fusedmoe.plan.validity import expand_block
from fusedmoe.spec.problem import Problem

#: Tokens that one program sorts by adapter.
CHUNK = 1024


def workspace_layout(problem: Problem, how: TritonPlan) -> Layout:
    """Scratch tensors that a layer without adapters does not need, but for "hidden", which it may not need either."""
    if problem.adapters is None:
        return {}
    dtype = getattr(torch, problem.dtype)
    columns = problem.adapters.parts * problem.adapters.rank
    layout: Layout = {"shrunk": ((problem.slots, columns), dtype)}
    if intermediate(how) != "hidden":
        layout["unarranged"] = ((problem.slots, problem.intermediate), dtype)
    if not how.few:
        layout["order"] = ((problem.tokens,), torch.int32)
    return layout


def intermediate(how: TritonPlan) -> str:
    """Name of the intermediate as numbers, in the order of its columns."""
    return "unarranged" if how.requantise == "none" and how.down.words else "hidden"


def beside(how: TritonPlan, out: Output, work: Workspace) -> Output:
    """Store the intermediate as numbers too, where gate-up stores something else."""
    name = intermediate(how)
    if how.requantise != "epilogue" and name == "hidden":
        return out
    return out._replace(beside=work[name], stride_beside=work[name].stride(0))


def in_order(call: Call, how: TritonPlan, ids: Ids, work: Workspace, options: dict[str, Any]) -> Ids:
    """Ids that are routed in the order of their tokens' adapters, where the plan says so."""
    if how.shrink is None or not how.shrink.by_adapter:
        return ids
    assert call.lora is not None, "a plan that shrinks has adapters"
    adapters, order = _adapted(call, ids), work["order"]
    n_tokens = call.problem.tokens
    with device_guard(order.device):
        launch(
            lora.by_adapter,
            (math.ceil(n_tokens / CHUNK),),
            adapters,
            order,
            n_tokens,
            **options,
            BUCKETS=triton.next_power_of_2(call.lora.slots + 1),
            CHUNK=CHUNK,
        )
    return ids._replace(order=order)


def _chosen(call: Call) -> tuple[Any, ...]:
    """What tells the adapter of a slot."""
    held, ids = call.lora, call.adapter_ids
    assert held is not None and ids is not None, "a plan that shrinks has adapters"
    return ids, ids.stride(0), held.slots, held.rank, held.adapter_enabled


def _adapted(call: Call, ids: Ids, block: int = 0) -> AdaptedIds:
    """Ids that tell adapters too."""
    assert call.lora is not None, "a plan that shrinks has adapters"
    e, r = tl.constexpr(call.problem.experts), tl.constexpr(call.lora.max_rank)
    return AdaptedIds._make((*ids, *_chosen(call), e, r, tl.constexpr(block)))


def _strides(matrix: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """A or B and its strides; 0 from expert to expert where they share it."""
    slot, expert, row, column = matrix.stride()
    return matrix, slot, expert if matrix.shape[1] > 1 else 0, row, column


def shrink(
    call: Call,
    how: TritonPlan,
    ids: Ids,
    schedule: Schedule | None,
    max_tiles: int,
    x: Rows,
    work: Workspace,
    options: dict[str, Any],
    *,
    of_tokens: bool,
) -> None:
    """A x of the rows that have an adapter, by slot, into the workspace."""
    assert how.shrink is not None and call.lora is not None, "a plan that shrinks has adapters"
    config, problem = how.shrink.gate_up if of_tokens else how.shrink.down, call.problem
    a = call.lora.w13_a if of_tokens else call.lora.w2_a
    _, _, n, k = a.shape
    w = Shrink(*_strides(a), tl.constexpr(problem.experts), call.lora.scaling)
    out = work["shrunk"]
    with device_guard(out.device):
        launch(
            grouped_gemm,
            (max_tiles * math.ceil(n / config.block_n), how.shrink.turns),
            _adapted(call, ids, config.block_n),
            schedule,
            x,
            w,
            Output(out, out.stride(0), tl.constexpr(True)),
            w,
            Parameters(None, None, None, None),
            None,
            None,
            k,
            **options,
            **PLAIN,
            SPAN=lora.few_span if how.few else lora.scheduled_span,
            LOCATE=lora.few_locate if how.few else lora.scheduled_locate,
            LOAD_X=load.rows_by_pointer,
            LOAD_W=lora.load_a,
            LOAD_SCALES=scales.none,
            STEP=step.dense,
            DECODE=decode.as_they_are,
            ELEMENT=None,
            FINISH=scales.nothing,
            EPILOGUE=lora.scale,
            ACTIVATION=None,
            GATE_UP=None,
            N=n,
            K=k,
            GROUP=k,
            STRIDE=k,
            MATH=TRITON_TYPES[problem.dtype],
            ACCUMULATE=tl.float32,
            SHIFT=0.0,
            PER_ITEM=1,
            SWAP=False,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=1,
            FEW=FEW,
            FLATTEN=False,
            PRECISION=problem.fp32_precision,
            num_warps=config.warps,
            num_stages=config.stages,
        )


def expanded(call: Call, how: TritonPlan, e: Epilogue, work: Workspace, *, of_tokens: bool) -> tuple[Any, Any]:
    """What an epilogue reads to add B v, and the epilogue that does."""
    held, problem = call.lora, call.problem
    assert held is not None, "a plan that shrinks has adapters"
    b, v = held.w13_b if of_tokens else held.w2_b, work["shrunk"]
    block = expand_block(how.gate_up, problem.gate_up_gemm) if of_tokens else expand_block(how.down, problem.down_gemm)
    parts = "one"
    if of_tokens and held.parts == 2:
        parts = "alternate" if problem.gate_up == "interleaved" else "halves"
    constants = (parts, held.max_rank, block, problem.fp32_precision)
    base = e._replace(top_k=tl.constexpr(problem.top_k))
    product = (v, v.stride(0), *_strides(b), problem.intermediate, *map(tl.constexpr, constants))
    adapted = AdaptedEpilogue._make((*base, *_chosen(call), *product))
    if how.single:
        return adapted, lora.expand_one_weigh_then_bias if of_tokens else lora.expand_one_bias_then_weigh
    return adapted, lora.expand_weigh_then_bias if of_tokens else lora.expand_bias_then_weigh
