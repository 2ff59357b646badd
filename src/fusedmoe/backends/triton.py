"""The portable Triton backend: CUDA from sm_75, ROCm, XPU, and Triton's interpreter on the CPU.

Launches: the schedule (one, or three for many slots; none for few), gate-up GEMM, down GEMM, combine.
Grids are bounded by shapes, nothing is read back: a call can be captured in a CUDA graph and replayed
with other ids.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedmoe._compat import teach_interpreter
from fusedmoe.backends import adapters, gemv, routes
from fusedmoe.backends.launch import device_guard, launch
from fusedmoe.backends.product import PLAIN, Product
from fusedmoe.backends.routes import Routed
from fusedmoe.backends.rows import flat, in_order, order_of, quantised, with_scale
from fusedmoe.backends.weights import operand, weight_map
from fusedmoe.backends.workspace import Layout, Workspace
from fusedmoe.call import Call
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.kernels import (
    activations,
    arrange,
    encode,
    epilogue,
    load,
    overlap,
    quantise,
    store,
    tiles,
)
from fusedmoe.kernels.combine import by_row, by_slot, combine as combine_kernel
from fusedmoe.kernels.gather import gather as gather_kernel
from fusedmoe.kernels.grouped_gemm import grouped_gemm
from fusedmoe.kernels.operands import (
    Epilogue,
    Output,
    Parameters,
    Rows,
)
from fusedmoe.plan.config import FEW, Plan, TritonPlan
from fusedmoe.settings import settings
from fusedmoe.spec.format import ELEMENTS, Inputs
from fusedmoe.spec.problem import Problem
from fusedmoe.target import target_of

if settings().interpret:
    teach_interpreter()


def _row_stride(columns: int) -> int:
    """Elements from row to row of an intermediate: what Triton takes to be a multiple of 16 bytes, of whatever type."""
    return -(-columns // 16) * 16


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
    how = _plan(plan)
    layout: Layout = adapters.workspace_layout(problem, how)
    if not (problem.alone or problem.sparse or how.single):
        layout["rows"] = ((slots, _row_stride(problem.hidden)), dtype)
    if (how.requantise != "epilogue" or how.shrink is not None) and not problem.alone:
        layout["hidden"] = ((slots, _row_stride(problem.intermediate)), torch.float32 if how.unrounded else dtype)
    tokens_type = dtype
    if how.gate_up.words:
        layout["x_codes"] = ((problem.tokens, _row_stride(problem.hidden)), dtype)
    if (inputs := problem.gate_up_gemm.inputs) is not None:
        tokens_type = _torch_type(how.multiply[0])
        if how.gate_up.words or not _given_as_multiplied(problem, how):
            layout |= _codes_layout("x", problem.tokens, problem.hidden, inputs, tokens_type)
    if (inputs := problem.down_gemm.inputs) is not None:
        layout |= _codes_layout("hidden", slots, problem.intermediate, inputs, _torch_type(how.multiply[1]))
    if how.gather:
        layout["tokens"] = ((slots, _row_stride(problem.hidden)), tokens_type)
    if not how.few:
        layout |= routes.layout(problem)
    return layout


def _torch_type(multiply: str) -> torch.dtype:
    name = ELEMENTS[multiply].dtype if multiply in ELEMENTS else multiply
    return getattr(torch, name)  # type: ignore[no-any-return]


def _given_as_multiplied(problem: Problem, how: TritonPlan) -> bool:
    """Hidden states are codes already, of the very type that gate-up multiplies."""
    return problem.inputs_dtype == str(_torch_type(how.multiply[0])).removeprefix("torch.")


def _groups(columns: int, inputs: Inputs) -> int:
    return math.ceil(columns / inputs.group) if inputs.mode == "group" else 1


def _codes_layout(name: str, rows: int, columns: int, inputs: Inputs, dtype: torch.dtype) -> Layout:
    """Codes of rows, their scales, and one maximum over all rows."""
    return {
        f"{name}_codes": ((rows, _row_stride(columns)), dtype),
        f"{name}_scale": ((rows, _groups(columns, inputs)), torch.float32),
        f"{name}_amax": ((1,), torch.float32),
    }


def route(call: Call, plan: Plan, work: Workspace) -> Routed:
    """Sort the live slots by expert and write the table of tiles; few slots need neither."""
    how = _plan(plan)
    if how.few:
        return Routed(routes.ids_of(call), None, min(call.problem.experts, call.problem.slots))
    first, after = _overlap(plan)
    ids = adapters.in_order(call, how, routes.ids_of(call), work, first)
    return routes.sort(call, ids, how.gate_up.block_m, work, first, after)


def gate_up(call: Call, plan: Plan, schedule: Routed, work: Workspace) -> Rows:
    """Rows of the intermediate [S, I], activated, alone at their slots; a row of an absent slot is never written."""
    problem, how = call.problem, _plan(plan)
    first, after = _overlap(plan)
    options = {"WAIT": overlap.nothing, **first} if how.few else after
    x = Rows(*flat(call.hidden_states), tl.constexpr(problem.top_k))
    if how.shrink is not None:
        adapters.shrink(
            call, how, schedule.ids, schedule.schedule, schedule.max_tiles, x, work, options, of_tokens=True
        )
        options = after
    ahead = False  # whether the launch before gate-up is another one than that which made the schedule
    if (inputs := problem.gate_up_gemm.inputs) is not None:
        x = _tokens_as_codes(call, plan, schedule, x, inputs, work, options)
        options, ahead = after, call.hidden_states_scale is None
    elif how.gate_up.words:
        order = order_of(problem.gate_up_gemm, how.gate_up)
        x = in_order(x, problem.gate_up_gemm, order, work["x_codes"], options)
        options = after
    if how.gather:
        x = _gather(plan, schedule, x, work["tokens"])
    e = _with_bias(call.w13_bias)
    if problem.weight_on_input:
        e = _with_router_weight(e, call)
    p = problem.activation
    requantised = problem.down_gemm.inputs
    out, stored = _hidden(how, requantised, call, work)
    follows = epilogue.weigh_then_bias
    steps = None
    if how.shrink is not None:
        if how.gate_up.specialised:
            steps = adapters.steps(call, work, of_tokens=True)
        else:
            e, follows = adapters.expanded(call, how, e, work, of_tokens=True)
        out = adapters.beside(how, out, work)
    if requantised is not None and requantised.mode == "tensor":
        with device_guard(call.hidden_states.device):
            launch(quantise.zero, (1,), work["hidden_amax"], **after, N=1)
        options = after
    product = Product(
        problem.gate_up_gemm,
        how.gate_up,
        x,
        call.w13,
        how.multiply[0],
        out,
        e,
        follows,
        stored,
        up=problem.intermediate if problem.gate_up == "concatenated" and p.gated else 0,
        p=Parameters(
            *(None if v is None else tl.constexpr(float(v)) for v in (p.alpha, p.beta, p.limit, p.linear_beta))
        ),
        activation=getattr(activations, p.name),
        gate_up=problem.gate_up if p.gated else None,
        steps=steps,
    )
    _launch(call, product, options, schedule, ahead=ahead)
    if how.requantise != "kernel":
        return _hidden_rows(how, requantised, call, work)
    assert requantised is not None
    hidden = work["hidden"]
    live = quantise.slot if how.few else quantise.sorted_row
    static = call.w2.input_scale if isinstance(call.w2, ExpertMatrix) else None
    x = Rows(*flat(hidden), None)
    order = order_of(problem.down_gemm, how.down)
    # What these read before they wait was there before gate-up.
    if (how.single or how.down.streams) and how.overlap:
        after = {**after, "WAIT": overlap.release_and_wait, "RELEASE": overlap.nothing}
    quantised(
        schedule.ids,
        schedule.schedule,
        x,
        "hidden",
        problem.intermediate,
        requantised,
        static,
        live,
        order,
        work,
        after,
        amax_is_there=True,
    )
    return _hidden_rows(how, requantised, call, work)


def _tokens_as_codes(
    call: Call, plan: Plan, schedule: Routed, x: Rows, inputs: Inputs, work: Workspace, options: dict[str, Any]
) -> Rows:
    """Hidden states as codes with their scales; they may be that already."""
    problem, how = call.problem, _plan(plan)
    order = order_of(problem.gate_up_gemm, how.gate_up)
    scale = call.hidden_states_scale
    if scale is not None:
        if not _given_as_multiplied(problem, how):
            codes = work["x_codes"]
            codes[:, : problem.hidden].copy_(call.hidden_states)
            x = x._replace(ptr=codes, stride_row=codes.stride(0), stride_k=codes.stride(1))
            if how.gate_up.words:
                x = in_order(x, problem.gate_up_gemm, order, codes, options)
        row = scale.stride(0) if scale.shape[0] == problem.tokens else 0
        return with_scale(x, inputs, scale, row, scale.stride(1))
    static = call.w13.input_scale if isinstance(call.w13, ExpertMatrix) else None
    live = quantise.token if inputs.mode == "tensor" else quantise.all_rows
    quantised(
        schedule.ids,
        schedule.schedule,
        x,
        "x",
        problem.hidden,
        inputs,
        static,
        live,
        order,
        work,
        options,
        amax_is_there=False,
    )
    codes, scale = work["x_codes"], work["x_scale"]
    return with_scale(Rows(*flat(codes), x.per), inputs, scale, scale.stride(0), scale.stride(1))


def _hidden(how: TritonPlan, inputs: Inputs | None, call: Call, work: Workspace) -> tuple[Output, dict[str, Any]]:
    """Where gate-up writes, and its STORE policy."""
    if call.problem.alone:
        assert call.out is not None, "made with the call"
        return Output(call.out, call.out.stride(0), tl.constexpr(True)), PLAIN
    by_slot = tl.constexpr(False)
    order = arrange.as_they_are if how.requantise == "kernel" else order_of(call.problem.down_gemm, how.down)
    plain = {**PLAIN, "ARRANGE": order}
    if how.requantise != "epilogue":
        hidden = work["hidden"]
        out = Output(hidden, hidden.stride(0), by_slot)
        if inputs is not None and inputs.mode == "tensor":
            return out._replace(scale=work["hidden_amax"]), {**plain, "STORE": store.numbers_and_amax}
        return out, plain
    assert inputs is not None
    codes = work["hidden_codes"]
    how_encoded = {**plain, "ENCODE": getattr(encode, inputs.element), "LARGEST": ELEMENTS[inputs.element].largest}
    if inputs.mode == "static":
        assert isinstance(call.w2, ExpertMatrix)
        return Output(codes, codes.stride(0), by_slot, call.w2.input_scale), {**how_encoded, "STORE": store.codes}
    scale = work["hidden_scale"]
    out = Output(codes, codes.stride(0), by_slot, scale, scale.stride(0))
    return out, {**how_encoded, "STORE": store.codes_by_group, "OUT_GROUP": inputs.group}


def _hidden_rows(how: TritonPlan, inputs: Inputs | None, call: Call, work: Workspace) -> Rows:
    """What the down GEMM reads."""
    if inputs is None:
        hidden = call.out if call.problem.alone else work["hidden"]
        assert hidden is not None, "made with the call"
        return Rows(*flat(hidden), None)
    codes, scale = work["hidden_codes"], work["hidden_scale"]
    x = Rows(*flat(codes), None)
    if inputs.mode == "static" and how.requantise == "epilogue":
        assert isinstance(call.w2, ExpertMatrix) and call.w2.input_scale is not None
        return with_scale(x, inputs, call.w2.input_scale, 0, 0)
    return with_scale(x, inputs, scale, scale.stride(0), scale.stride(1))


def down(call: Call, plan: Plan, schedule: Routed, hidden: Rows, work: Workspace) -> torch.Tensor:
    """Rows of the output [S, H], weighted, sorted where there is a schedule, absent slots never written; or their sums:
    of single rows, and of tokens with one expert.
    """
    problem, how, after = call.problem, _plan(plan), _overlap(plan)[1]
    assert call.w2 is not None, "a whole layer has a second matrix"
    rows = call.out if (problem.sparse or how.single) and call.out is not None else work["rows"]
    e = _with_bias(call.w2_bias)
    if not problem.weight_on_input:
        e = _with_router_weight(e, call)
    follows = epilogue.bias_then_weigh
    steps = None
    if how.shrink is not None:
        x = Rows(*flat(work[adapters.intermediate(how)]), None)
        adapters.shrink(call, how, schedule.ids, schedule.schedule, schedule.max_tiles, x, work, after, of_tokens=False)
        if how.down.specialised:
            steps = adapters.steps(call, work, of_tokens=False)
        else:
            e, follows = adapters.expanded(call, how, e, work, of_tokens=False)
    product = Product(
        problem.down_gemm,
        how.down,
        hidden,
        call.w2,
        how.multiply[1],
        Output(rows, rows.stride(0), tl.constexpr(problem.sparse), stride_column=rows.stride(1)),
        e,
        follows,
        PLAIN,
        steps=steps,
    )
    turns = 1 if problem.sparse else problem.top_k
    _launch(call, product, after, schedule, turns, ahead=True, second=True)
    return rows


def combine(call: Call, plan: Plan, schedule: Routed, rows: torch.Tensor, work: Workspace, out: torch.Tensor) -> None:
    """Sum the rows of each token into ``out``; they may be there already."""
    if call.problem.sparse or _plan(plan).single:
        return
    n_tokens, n_columns = out.shape
    block = _plan(plan).combine_block
    options = _overlap(plan)[1]
    del options["RELEASE"]  # what follows the layer is the stream's to order
    with device_guard(out.device):
        launch(
            combine_kernel,
            (n_tokens, math.ceil(n_columns / block)),
            *(schedule.ids, schedule.schedule, rows, rows.stride(0), None, 0, 0, out, out.stride(0), out.stride(1)),
            **options,
            ROW=by_slot if schedule.schedule is None else by_row,
            H=n_columns,
            BLOCK_H=block,
        )


def _gather(plan: Plan, schedule: Routed, x: Rows, out: torch.Tensor) -> Rows:
    """Rows copied into sorted order; scales stay where they are."""
    tokens = x.ptr
    n_columns = tokens.shape[1]
    block = min(4096, triton.next_power_of_2(n_columns))
    with device_guard(out.device):
        launch(
            gather_kernel,
            (out.shape[0], math.ceil(n_columns / block)),
            schedule.ids,
            schedule.schedule,
            tokens,
            x.stride_row,
            x.stride_k,
            out,
            out.stride(0),
            **_overlap(plan)[1],
            E=schedule.ids.n_local,
            H=n_columns,
            BLOCK_H=block,
        )
    return x._replace(ptr=out, stride_row=out.stride(0), stride_k=1, per=None)


def _with_bias(bias: torch.Tensor | None) -> Epilogue:
    if bias is None:
        return Epilogue(None, None, None, None, None, None, None)
    return Epilogue(*flat(bias), None, None, None, None)


def _with_router_weight(e: Epilogue, call: Call) -> Epilogue:
    weights = call.topk_weights
    assert weights is not None, "a whole layer has router weights"
    return e._replace(
        weight=weights,
        weight_stride_t=weights.stride(0),
        weight_stride_j=weights.stride(1),
        top_k=tl.constexpr(call.problem.top_k),
    )


def _launch(
    call: Call,
    product: Product,
    options: dict[str, Any],
    schedule: Routed,
    turns: int = 1,
    *,
    ahead: bool,
    second: bool = False,
) -> None:
    target = target_of(call.hidden_states.device)
    if product.config.block_m == 1:
        gemv.multiply(product, schedule.ids, call.problem.slots // turns, turns, options, target)
        return
    programs = product.programs(schedule.max_tiles, target.n_sm)
    with device_guard(call.hidden_states.device):
        if not product.config.specialised:
            _launch_portable(call, product, options, schedule, programs)
            return
        # Imported when chosen: Gluon is younger than the oldest Triton that the portable kernels run on.
        from fusedmoe.backends import sm90

        assert schedule.schedule is not None, "a plan with these kernels has a schedule"
        if product.config.streams:
            sm90.stream(product, options, schedule.schedule, programs, ahead=ahead)
        else:
            sm90.multiply(product, options, schedule.schedule, programs, second=second)


def _launch_portable(call: Call, product: Product, options: dict[str, Any], schedule: Routed, programs: int) -> None:
    config, x = product.config, product.x
    _, n, k = product.w.shape
    form = "pairs" if config.pairs and product.gate_up == "concatenated" else product.gate_up
    wide = config.block_n * (2 if form in ("interleaved", "pairs") else 1)
    matrix = operand(product.w, product.multiply, product.up, wide, config)
    w_desc, weight = None, matrix.weight
    load_w = load.weight_pairs_by_pointer if form == "pairs" else load.weight_by_pointer
    if config.maps != "none":
        w_desc, per_expert, load_w = weight_map(matrix.data, config, wide, matrix.policies["PER_ITEM"])
        weight = weight._replace(rows_per_expert=per_expert)
    x_desc, load_x = None, load.rows_by_pointer
    if config.maps == "xw":
        x_desc = TensorDescriptor(x.ptr, [x.ptr.shape[0], k], [x.stride_row, 1], [config.block_m, config.block_k])
        load_x = load.rows_by_map
    few = schedule.schedule is None
    launch(
        grouped_gemm,
        (programs,),
        schedule.ids,
        schedule.schedule,
        x,
        weight,
        product.out,
        product.e,
        product.p,
        x_desc,
        w_desc,
        matrix.k_end,
        **options,
        **matrix.policies,
        **product.stored,
        SPAN=tiles.few_span if few else tiles.scheduled_span,
        LOCATE=tiles.few_locate if few else tiles.scheduled_locate,
        LOAD_X=load_x,
        LOAD_W=load_w,
        EPILOGUE=product.epilogue,
        WRITE=store.write,
        ACTIVATION=product.activation,
        GATE_UP=form,
        N=n,
        K=k,
        SWAP=config.swap,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        FEW=FEW,
        FLATTEN=config.flatten,
        PRECISION=call.problem.fp32_precision,
        num_warps=config.warps,
        num_stages=config.stages,
    )
