"""Launches and operands of adapters, beside those of the layer."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.product import PLAIN
from fusedmoe.backends.routes import max_tiles
from fusedmoe.backends.weights import TRITON_TYPES
from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.call import Call
from fusedmoe.kernels import decode, load, lora, scales, step
from fusedmoe.kernels.gemv import grouped_gemv
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.kernels.operands import (
    AdaptedEpilogue,
    AdaptedIds,
    AdaptedOutput,
    Epilogue,
    Ids,
    Output,
    Parameters,
    Rows,
    Schedule,
    Shrink,
    Steps,
)
from fusedmoe.plan.config import FEW, TritonPlan
from fusedmoe.plan.validity import expand_block, expand_stages
from fusedmoe.spec.problem import Problem

#: Tokens that one program sorts by adapter.
CHUNK = 1024
#: Tokens that it counts at a time.
COUNTED = 4096
#: Columns of a step of the specialised kernel, in 16 bits.
STEP = 64


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
        if problem.gate_up_gemm.steps:
            layout["found"] = ((problem.slots,), torch.int32)
            layout["blocks"] = ((max_tiles(problem, 128), 2), torch.int32)
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
            COUNTED=COUNTED,
            num_warps=8,
        )
    return ids._replace(order=order)


def _chosen(call: Call) -> tuple[Any, ...]:
    """What tells the adapter of a slot."""
    held, ids = call.lora, call.adapter_ids
    assert held is not None and ids is not None, "a plan that shrinks has adapters"
    return ids, ids.stride(0), held.slots, held.rank, held.adapter_enabled


def _adapted(call: Call, ids: Ids, columns: int = 0, block: int = 0, work: Workspace | None = None) -> AdaptedIds:
    """Ids that tell adapters too, and with ``work`` what an expand by steps is told."""
    assert call.lora is not None, "a plan that shrinks has adapters"
    constants = (call.problem.experts, call.lora.max_rank, columns, block, STEP if work else 0)
    told = (work["found"], work["blocks"]) if work else (None, None)
    return AdaptedIds._make((*ids, *_chosen(call), *map(tl.constexpr, constants), *told))


def _strides(matrix: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """A or B and its strides; 0 from expert to expert where they share it."""
    slot, expert, row, column = matrix.stride()
    return matrix, slot, expert if matrix.shape[1] > 1 else 0, row, column


def _b(call: Call, *, of_tokens: bool) -> tuple[str, torch.Tensor, tuple[int, int, int, int, int]]:
    """Which rows of B belong to which A, B, and its strides of slots, experts, rows and columns and its ``part``, as
    :func:`fusedmoe.kernels.lora.row_of_b` reads them.
    """
    held = call.lora
    assert held is not None, "a plan that shrinks has adapters"
    b, slot, expert, row, column = _strides(held.w13_b if of_tokens else held.w2_b)
    if not of_tokens or held.parts == 1:
        return "one", b, (slot, expert, row, column, 0)
    alternate = call.problem.gate_up == "interleaved"
    if held.distances:
        between = held.distances[1] // b.element_size()
        part = between if alternate else between - call.problem.intermediate * row
    else:
        row, part = (2 * row, row) if alternate else (row, 0)
    return "alternate" if alternate else "halves", b, (slot, expert, row, column, part)


def shrink(
    call: Call,
    how: TritonPlan,
    ids: Ids,
    schedule: Schedule | None,
    n_tiles: int,
    x: Rows,
    work: Workspace,
    options: dict[str, Any],
    *,
    of_tokens: bool,
) -> None:
    """A x of the rows that have an adapter, by slot, into the workspace."""
    assert how.shrink is not None and call.lora is not None, "a plan that shrinks has adapters"
    config, problem = how.shrink.gate_up if of_tokens else how.shrink.down, call.problem
    held = call.lora
    a = held.w13_a if of_tokens else held.w2_a
    k = a.shape[3]
    columns = held.max_rank * (held.parts if of_tokens else 1)
    part = held.distances[0] // a.element_size() if of_tokens and held.distances else held.max_rank * a.stride(2)
    each, n = tl.constexpr(columns), held.slots * columns
    sizes = tl.constexpr(problem.experts), each, tl.constexpr(held.max_rank)
    w = Shrink(*_strides(a), part, *sizes, held.scaling, held.rank, tl.constexpr(1))
    out = work["shrunk"]
    plain = Output(out, out.stride(0), tl.constexpr(True))
    specialised = (how.gate_up if of_tokens else how.down).specialised  # and adds by steps
    adapted = _adapted(call, ids, columns, config.block_n, work if specialised else None)
    shared = {
        **options,
        **PLAIN,
        "ELEMENT": None,
        "SHIFT": 0.0,
        "PER_ITEM": 1,
        "FINISH": scales.nothing,
        "ACTIVATION": None,
        "GATE_UP": None,
        "K": k,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    with device_guard(out.device):
        if how.few:
            launch(
                grouped_gemv,
                (problem.slots * math.ceil(columns / config.block_n),),
                adapted,
                x,
                w,
                plain,
                w,
                Parameters(None, None, None, None),
                k,
                **shared,
                MATRIX=lora.matrix_of,
                PLACE=lora.of_matrix,
                EPILOGUE=lora.scale_one,
                TURNS=1,
                J=1,
                GROUP=0,
                N=columns,
                CHUNK=16 // a.element_size(),
            )
            return
        launch(
            grouped_gemm,
            (n_tiles, min(how.shrink.turns, math.ceil(n / config.block_n))),
            adapted,
            schedule,
            x,
            w,
            AdaptedOutput._make((*plain, tl.constexpr(problem.top_k), *_chosen(call), each)),
            w,
            Parameters(None, None, None, None),
            None,
            None,
            k,
            **shared,
            SPAN=lora.scheduled_span,
            LOCATE=lora.scheduled_locate,
            LOAD_X=load.rows_by_pointer,
            LOAD_W=lora.load_a,
            LOAD_SCALES=scales.none,
            STEP=step.dense,
            DECODE=decode.as_they_are,
            EPILOGUE=lora.scale,
            WRITE=lora.write_own,
            N=n,
            GROUP=k,
            STRIDE=k,
            MATH=TRITON_TYPES[problem.dtype],
            ACCUMULATE=tl.float32,
            SWAP=False,
            BLOCK_M=config.block_m,
            GROUP_M=1,
            FEW=FEW,
            FLATTEN=False,
            PRECISION=problem.fp32_precision,
        )


def steps(call: Call, work: Workspace, *, of_tokens: bool) -> Steps:
    """B v as more steps of a sum."""
    assert call.lora is not None, "a plan that shrinks has adapters"
    held, v = call.lora, work["shrunk"]
    parts, b, (stride_a, stride_e, stride_n, _, part) = _b(call, of_tokens=of_tokens)
    columns = held.max_rank * (held.parts if of_tokens else 1)
    constants = map(tl.constexpr, (columns, held.max_rank, parts))
    told = work["found"], work["blocks"], held.slots
    return Steps(v, v.stride(0), *told, b, stride_a, stride_e, stride_n, part, *constants)


def expanded(call: Call, how: TritonPlan, e: Epilogue, work: Workspace, *, of_tokens: bool) -> tuple[Any, Any]:
    """What an epilogue reads to add B v, and the epilogue that does."""
    held, problem = call.lora, call.problem
    assert held is not None, "a plan that shrinks has adapters"
    parts, b, strides = _b(call, of_tokens=of_tokens)
    config, gemm = (how.gate_up, problem.gate_up_gemm) if of_tokens else (how.down, problem.down_gemm)
    how_many = expand_block(config, gemm), gemm.steps > 0, expand_stages(config, gemm)
    constants = (parts, held.max_rank, *how_many, problem.fp32_precision)
    base = e._replace(top_k=tl.constexpr(problem.top_k))
    v = work["shrunk"]
    product = (v, v.stride(0), b, *strides, problem.intermediate, *map(tl.constexpr, constants))
    adapted = AdaptedEpilogue._make((*base, *_chosen(call), *product))
    if how.single:
        return adapted, lora.expand_one_weigh_then_bias if of_tokens else lora.expand_one_bias_then_weigh
    return adapted, lora.expand_weigh_then_bias if of_tokens else lora.expand_bias_then_weigh
