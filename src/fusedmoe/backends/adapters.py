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


def _rows_of_b(call: Call) -> tuple[int, int]:
    """Stride of rows of w13's B, and its ``part``, as :func:`fusedmoe.kernels.lora.row_of_b` reads them."""
    held = call.lora
    assert held is not None, "a plan that shrinks has adapters"
    stride = held.w13_b.stride(2)
    if not held.distances:
        return (2 * stride, stride) if _parts(call) == "alternate" else (stride, 0)
    between = held.distances[1] // held.w13_b.element_size()
    return stride, between - (0 if _parts(call) == "alternate" else call.problem.intermediate * stride)


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
    a = call.lora.w13_a if of_tokens else call.lora.w2_a
    k = a.shape[3]
    columns = call.lora.max_rank * (call.lora.parts if of_tokens else 1)
    apart = of_tokens and call.lora.distances
    part = call.lora.distances[0] // a.element_size() if apart else call.lora.max_rank * a.stride(2)
    each, n = tl.constexpr(columns), call.lora.slots * columns
    held = call.lora
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
    held = call.lora
    v, (b, stride_a, stride_e, stride_n, _) = work["shrunk"], _strides(held.w13_b if of_tokens else held.w2_b)
    columns = held.max_rank * (held.parts if of_tokens else 1)
    stride_n, part = _rows_of_b(call) if of_tokens else (stride_n, 0)
    parts = _parts(call) if of_tokens else "one"
    constants = map(tl.constexpr, (columns, call.lora.max_rank, parts))
    told = work["found"], work["blocks"], call.lora.slots
    return Steps(v, v.stride(0), *told, b, stride_a, stride_e, stride_n, part, *constants)


def _parts(call: Call) -> str:
    """Which rows of the B of gate and up belong to which A."""
    assert call.lora is not None, "a plan that shrinks has adapters"
    if call.lora.parts == 1:
        return "one"
    return "alternate" if call.problem.gate_up == "interleaved" else "halves"


def expanded(call: Call, how: TritonPlan, e: Epilogue, work: Workspace, *, of_tokens: bool) -> tuple[Any, Any]:
    """What an epilogue reads to add B v, and the epilogue that does."""
    held, problem = call.lora, call.problem
    assert held is not None, "a plan that shrinks has adapters"
    b, v = held.w13_b if of_tokens else held.w2_b, work["shrunk"]
    config, gemm = (how.gate_up, problem.gate_up_gemm) if of_tokens else (how.down, problem.down_gemm)
    parts = _parts(call) if of_tokens else "one"
    how_many = expand_block(config, gemm), gemm.steps > 0, expand_stages(config, gemm)
    constants = (parts, held.max_rank, *how_many, problem.fp32_precision)
    base = e._replace(top_k=tl.constexpr(problem.top_k))
    b, stride_a, stride_e, stride_n, stride_r = _strides(b)
    stride_n, part = _rows_of_b(call) if of_tokens else (stride_n, 0)
    strides = stride_a, stride_e, stride_n, stride_r, part
    product = (v, v.stride(0), b, *strides, problem.intermediate, *map(tl.constexpr, constants))
    adapted = AdaptedEpilogue._make((*base, *_chosen(call), *product))
    if how.single:
        return adapted, lora.expand_one_weigh_then_bias if of_tokens else lora.expand_one_bias_then_weigh
    return adapted, lora.expand_weigh_then_bias if of_tokens else lora.expand_bias_then_weigh
