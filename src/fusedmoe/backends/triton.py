"""The portable Triton backend: CUDA from sm_75, ROCm, XPU, and Triton's interpreter on the CPU.

Launches: the schedule (one, or three for many slots; none for few), gate-up GEMM, down GEMM, combine.
Grids are bounded by shapes, nothing is read back: a call can be captured in a CUDA graph and replayed
with other ids.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedmoe._compat import device_guard, teach_interpreter_bfloat16
from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.kernels import activations, epilogue, load, overlap, routing, tiles
from fusedmoe.kernels.combine import combine as combine_kernel
from fusedmoe.kernels.gather import gather as gather_kernel
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.kernels.operands import Epilogue, Ids, Output, Parameters, Rows, Schedule, Weight
from fusedmoe.plan.config import FEW, KernelConfig, Plan, TritonPlan
from fusedmoe.schemes import load as load_scheme
from fusedmoe.settings import settings
from fusedmoe.spec.call import Call
from fusedmoe.spec.problem import Problem
from fusedmoe.target import target_of

if settings().interpret:
    teach_interpreter_bfloat16()

#: Most slots that one launch of one program routes.
ONE_CHUNK = 1024
#: Slots that one program sorts otherwise: up to 32768 slots, and above.
CHUNKS = (256, 1024)
#: Entries of the tile table that one program writes.
TILES = 64
#: Elements of the (chunk, expert) table that ``offsets`` holds at once, and of the one in ``_write_tiles``.
TABLE = 8192

_ABSENT = Epilogue(None, None, None, None, None, None, None)


class _Schedule(NamedTuple):
    ids: Ids
    schedule: Schedule | None
    max_tiles: int


def _row_stride(columns: int, dtype: torch.dtype) -> int:
    """Elements from row to row of an intermediate: rows start at multiples of 16 bytes."""
    unit = 16 // dtype.itemsize
    return -(-columns // unit) * unit


def _max_tiles(problem: Problem, block_m: int) -> int:
    # sum over experts of ceil(S_e / BLOCK_M) <= floor(S / BLOCK_M) + number of non-empty experts
    return problem.slots // block_m + min(problem.experts, problem.slots)


def _chunk(slots: int) -> int:
    """Slots that one program sorts: a small sort is fast, many chunks make the one program of ``offsets`` slow."""
    return CHUNKS[0] if slots <= 32768 else CHUNKS[1]


def _overlap(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Launch options of the first kernel of a call, which the stream orders, and of those that follow it."""
    if not _plan(plan).overlap:
        return {"RELEASE": overlap.nothing}, {"WAIT": overlap.nothing, "RELEASE": overlap.nothing}
    return {"RELEASE": overlap.release}, {"WAIT": overlap.wait, "RELEASE": overlap.release, "launch_pdl": True}


def _plan(plan: Plan) -> TritonPlan:
    assert plan.triton is not None, "a Triton plan names its kernels"
    return plan.triton


def workspace_layout(problem: Problem, plan: Plan) -> Layout:
    """Named scratch tensors; see :class:`fusedmoe.backends.base.Backend`."""
    dtype = getattr(torch, problem.dtype)
    slots = problem.slots
    layout: Layout = {
        "hidden": ((slots, _row_stride(problem.intermediate, dtype)), dtype),
        "rows": ((slots, _row_stride(problem.hidden, dtype)), dtype),
    }
    how = _plan(plan)
    if how.gather:
        layout["tokens"] = ((slots, _row_stride(problem.hidden, dtype)), dtype)
    if not how.few:
        # Sized for the lowest tile and the smallest chunk, so that a workspace for more tokens serves fewer.
        max_tiles = _max_tiles(problem, 16)
        layout["slot"] = ((slots,), torch.int32)
        layout["offset"] = ((problem.experts + 1,), torch.int32)
        layout["tile_expert"] = ((max_tiles,), torch.int32)
        layout["tile_row"] = ((max_tiles,), torch.int32)
        layout["n_tiles"] = ((1,), torch.int32)
        if slots > ONE_CHUNK:
            layout["base"] = ((math.ceil(slots / min(CHUNKS)), problem.experts), torch.int32)
    return layout


def route(call: Call, plan: Plan, work: Workspace) -> _Schedule:
    """Sort the live slots by expert and write the table of tiles; few slots need neither."""
    problem, how = call.problem, _plan(plan)
    ids = Ids(
        call.topk_ids,
        call.topk_ids.stride(0),
        call.topk_ids.stride(1),
        call.expert_map,
        call.n_global,
        problem.experts,
        tl.constexpr(problem.top_k),
        problem.slots,
    )
    if how.few:
        return _Schedule(ids, None, min(problem.experts, problem.slots))
    schedule = Schedule(work["slot"], work["offset"], work["tile_expert"], work["tile_row"], work["n_tiles"])
    block_m = how.gate_up.block_m
    max_tiles = _max_tiles(problem, block_m)
    n_experts = problem.experts
    e_pad = max(2, triton.next_power_of_2(n_experts))
    tiles_each = max(1, min(TILES, TABLE // e_pad))
    first, after = _overlap(plan)
    with device_guard(call.hidden_states.device):
        if problem.slots <= ONE_CHUNK:
            routing.route_one_chunk[(1,)](
                ids,
                schedule,
                **first,
                E=n_experts,
                E_PAD=e_pad,
                CHUNK=max(128, triton.next_power_of_2(problem.slots)),
                TILES=tiles_each,
                BLOCK_M=block_m,
                num_warps=8,
            )
        else:
            base = work["base"]
            chunk = _chunk(problem.slots)
            n_chunks = math.ceil(problem.slots / chunk)
            block_c = max(1, TABLE // e_pad)
            routing.count[(n_chunks,)](ids, base, **first, E=n_experts, E_PAD=e_pad, CHUNK=chunk)
            routing.offsets[(1,)](
                ids,
                schedule,
                base,
                n_chunks,
                **after,
                E=n_experts,
                E_PAD=e_pad,
                BLOCK_C=block_c,
                BLOCK_M=block_m,
                num_warps=8,
            )
            programs = max(n_chunks, math.ceil(max_tiles / tiles_each))
            routing.scatter[(programs,)](
                ids,
                schedule,
                base,
                n_chunks,
                **after,
                E=n_experts,
                E_PAD=e_pad,
                CHUNK=chunk,
                TILES=tiles_each,
                BLOCK_M=block_m,
            )
    return _Schedule(ids, schedule, max_tiles)


def gate_up(call: Call, plan: Plan, schedule: _Schedule, work: Workspace) -> torch.Tensor:
    """Rows of the intermediate [S, I], activated; a row of an absent slot is never written."""
    problem = call.problem
    hidden = work["hidden"]
    tokens = call.hidden_states
    x = Rows(tokens, tokens.stride(0), tokens.stride(1), tl.constexpr(problem.top_k))
    if _plan(plan).gather:
        x = _gather(plan, schedule, tokens, work["tokens"])
    e = _ABSENT
    if call.w13_bias is not None:
        e = e._replace(bias=call.w13_bias, bias_stride_e=call.w13_bias.stride(0), bias_stride_n=call.w13_bias.stride(1))
    if problem.weight_on_input:
        e = _with_router_weight(e, call)
    p = problem.activation
    first, after = _overlap(plan)
    _launch(
        call,
        _plan(plan).gate_up,
        {"WAIT": overlap.nothing, **first} if _plan(plan).few else after,
        schedule,
        x,
        call.w13,
        problem.intermediate if problem.gate_up == "concatenated" else 0,
        Output(hidden, hidden.stride(0), tl.constexpr(False)),
        e,
        Parameters(*(None if v is None else tl.constexpr(float(v)) for v in (p.alpha, p.beta, p.limit, p.linear_beta))),
        epilogue.weigh_then_bias,
        getattr(activations, p.name),
        problem.gate_up if p.gated else None,
    )
    return hidden


def down(call: Call, plan: Plan, schedule: _Schedule, hidden: torch.Tensor, work: Workspace) -> torch.Tensor:
    """Rows of the output [S, H] by slot, weighted; a row of an absent slot is never written."""
    problem = call.problem
    rows = work["rows"]
    e = _ABSENT
    if call.w2_bias is not None:
        e = e._replace(bias=call.w2_bias, bias_stride_e=call.w2_bias.stride(0), bias_stride_n=call.w2_bias.stride(1))
    if not problem.weight_on_input:
        e = _with_router_weight(e, call)
    _launch(
        call,
        _plan(plan).down,
        _overlap(plan)[1],
        schedule,
        Rows(hidden, hidden.stride(0), hidden.stride(1), None),
        call.w2,
        0,
        Output(rows, rows.stride(0), tl.constexpr(True)),
        e,
        Parameters(None, None, None, None),
        epilogue.bias_then_weigh,
        None,
        None,
    )
    return rows


def combine(
    call: Call, plan: Plan, schedule: _Schedule, rows: torch.Tensor, work: Workspace, out: torch.Tensor
) -> None:
    """Sum the rows of each token into ``out``."""
    n_tokens, n_columns = out.shape
    block = _plan(plan).combine_block
    options = _overlap(plan)[1]
    del options["RELEASE"]  # what follows the layer is the stream's to order
    with device_guard(out.device):
        combine_kernel[(n_tokens, math.ceil(n_columns / block))](
            schedule.ids, rows, rows.stride(0), out, out.stride(0), out.stride(1), **options, H=n_columns, BLOCK_H=block
        )


def _gather(plan: Plan, schedule: _Schedule, tokens: torch.Tensor, out: torch.Tensor) -> Rows:
    n_columns = tokens.shape[1]
    block = min(4096, triton.next_power_of_2(n_columns))
    with device_guard(tokens.device):
        gather_kernel[(out.shape[0], math.ceil(n_columns / block))](
            schedule.ids,
            schedule.schedule,
            tokens,
            tokens.stride(0),
            tokens.stride(1),
            out,
            out.stride(0),
            **_overlap(plan)[1],
            E=schedule.ids.n_local,
            H=n_columns,
            BLOCK_H=block,
        )
    return Rows(out, out.stride(0), out.stride(1), None)


def _with_router_weight(e: Epilogue, call: Call) -> Epilogue:
    weights = call.topk_weights
    return e._replace(
        weight=weights,
        weight_stride_t=weights.stride(0),
        weight_stride_j=weights.stride(1),
        top_k=tl.constexpr(call.problem.top_k),
    )


def _weight_map(w: torch.Tensor, config: KernelConfig, wide: int) -> tuple[TensorDescriptor, int, Any]:
    """Tensor map of [E, N, K] as a two-dimensional tensor, its rows per expert, and the load that uses it."""
    n_experts, n, k = w.shape
    stride_e, stride_n, stride_k = w.stride()
    if stride_k == 1:
        per = stride_e // stride_n if n_experts > 1 else n
        rows = (n_experts - 1) * per + n
        return TensorDescriptor(w, [rows, k], [stride_n, 1], [wide, config.block_k]), per, load.weight_by_map_nk
    per = stride_e // stride_k if n_experts > 1 else k
    rows = (n_experts - 1) * per + k
    return TensorDescriptor(w, [rows, n], [stride_k, 1], [config.block_k, wide]), per, load.weight_by_map_kn


def _launch(
    call: Call,
    config: KernelConfig,
    options: dict[str, Any],
    schedule: _Schedule,
    x: Rows,
    w: torch.Tensor,
    up: int,
    out: Output,
    e: Epilogue,
    p: Parameters,
    epilogue_function: Any,
    activation_function: Any,
    gate_up_layout: str | None,
) -> None:
    problem = call.problem
    scheme: ModuleType = load_scheme(problem.scheme)
    _, n, k = w.shape
    wide = config.block_n * (2 if gate_up_layout == "interleaved" else 1)
    w_desc, per_expert, load_w = None, 0, load.weight_by_pointer
    if config.maps != "none":
        w_desc, per_expert, load_w = _weight_map(w, config, wide)
    x_desc, load_x = None, load.rows_by_pointer
    if config.maps == "xw":
        x_desc = TensorDescriptor(x.ptr, [x.ptr.shape[0], k], [x.stride_row, 1], [config.block_m, config.block_k])
        load_x = load.rows_by_map
    columns = n if gate_up_layout is None else n // 2
    n_programs = schedule.max_tiles * math.ceil(columns / config.block_n)
    if config.programs_per_sm:
        n_programs = min(n_programs, target_of(call.hidden_states.device).n_sm * config.programs_per_sm)
    few = schedule.schedule is None
    with device_guard(call.hidden_states.device):
        grouped_gemm[(n_programs,)](
            schedule.ids,
            schedule.schedule,
            x,
            Weight(w, w.stride(0), w.stride(1), w.stride(2), per_expert, up),
            out,
            e,
            p,
            x_desc,
            w_desc,
            k,
            **options,
            SPAN=tiles.few_span if few else tiles.scheduled_span,
            LOCATE=tiles.few_locate if few else tiles.scheduled_locate,
            LOAD_X=load_x,
            LOAD_W=load_w,
            STEP=scheme.step,
            FINISH=scheme.finish,
            EPILOGUE=epilogue_function,
            ACTIVATION=activation_function,
            GATE_UP=gate_up_layout,
            N=n,
            K=k,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            FEW=FEW,
            FLATTEN=config.flatten,
            PRECISION=problem.fp32_precision,
            num_warps=config.warps,
            num_stages=config.stages,
        )
