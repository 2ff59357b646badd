"""The functional entry of the library."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedmoe import experts
from fusedmoe.checks import check
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
from fusedmoe.plan.planner import choose, tokens_before_breaks
from fusedmoe.settings import settings
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import Fp32Precision, GateUpLayout, WeightLayout
from fusedmoe.target import target_of
from fusedmoe.torch_ops import flatten


def fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor | ExpertMatrix,
    w2: torch.Tensor | ExpertMatrix,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    hidden_states_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    emulate: bool = False,
    activation: str | Activation = "silu",
    gate_up_layout: GateUpLayout = "concatenated",
    weight_layout: WeightLayout = "NK",
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    fp32_precision: Fp32Precision = "ieee",
    lora: LoRA | None = None,
    adapter_ids: torch.Tensor | None = None,
    batch_invariant: bool | None = None,
    backend: str | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    workspace_limit: int | None = None,
) -> torch.Tensor:
    """Run the experts of a mixture-of-experts layer.

    With e the local expert of slot (t, j), f the activation and w = topk_weights::

        out[t] = sum_j w[t, j] * (w2[e] @ f(w13[e] @ x[t] + w13_bias[e]) + w2_bias[e])

    or, with ``apply_router_weight_on_input``,
    ``sum_j w2[e] @ f(w[t, j] * (w13[e] @ x[t]) + w13_bias[e]) + w2_bias[e]``.
    Products accumulate in float32 (int8 codes in int32); scales, bias, activation and router weight are applied in
    float32; the intermediate and each slot's row are rounded once to the type of the layer, their sum once more.

    Where the scheme of an :class:`ExpertMatrix` quantises the rows that it multiplies, x[t] stands for
    codes * scale of x[t], and f(...) likewise; :mod:`fusedmoe.numerics` has the definition.

    Args:
        hidden_states: [T, H] float32, float16 or bfloat16, which is the type of the layer; or, with
            hidden_states_scale, codes of the type that the scheme of w13 makes; any strides.
        w13: [E, 2I, H], or [E, I, H] when the activation is not gated; a tensor of the type of hidden_states, or an
            ExpertMatrix; any strides, used where it lies, never copied.
        w2: [E, H, I], likewise. One of the two may be quantised and the other not.
        topk_weights: [T, top_k] float32, float16 or bfloat16.
        topk_ids: [T, top_k] int32 or int64. An id outside [0, E) (outside the map, or mapped outside [0, E)) is an
            absent expert: it adds nothing and reads nothing. An expert chosen twice by a token counts twice.
        hidden_states_scale: float32 scales of hidden_states that are codes: [T] or [T, 1], a single one, or
            [T, ceil(H / group)], as the scheme of w13 has them.
        dtype: type of the layer when hidden_states are codes: float32, float16 or bfloat16 (None).
        emulate: multiply codes in a wider type even where the device has theirs; the same up to rounding.
        activation: a name or an :class:`Activation`; see there for the equations.
        gate_up_layout: rows of w13 (and w13_bias): "concatenated" (gate rows, then up rows) or "interleaved".
        weight_layout: "NK" as above, or "KN": w13 [E, H, 2I] and w2 [E, I, H] (Transformers' is_transposed).
        w13_bias: [E, 2I] or [E, I], any float type.
        w2_bias: [E, H], any float type.
        apply_router_weight_on_input: see the equation.
        expert_map: [E_global] int32 or int64, local id of each global expert or a negative number.
        global_num_experts: length of expert_map, checked when given.
        fp32_precision: products of float32 operands: "ieee", or "tf32" where the device has it.
        lora: adapters, see :class:`fusedmoe.LoRA` for the equation; its matrices are of the type of the layer.
        adapter_ids: [T] int32 or int64, the slot in lora of each token's adapter; any number that names no slot with
            an adapter (such as -1) is none. Without it, or without lora, no token has one.
        batch_invariant: a row of the result has the same bits whatever T, its place, its neighbours and their experts
            are, on this device with this backend ("auto" counts as one); costs some speed. Not for schemes whose rows
            share a dynamic scale. None takes the process's setting (FUSEDMOE_BATCH_INVARIANT), which is off.
        backend: "auto", "gluon_sm90", "triton" or "torch"; None takes the process's setting (FUSEDMOE_BACKEND).
        out: [T, H], written and returned; may not share memory with hidden_states.
        workspace: uint8 buffer of at least :func:`workspace_bytes`; None allocates it. Under torch.compile the
            layer is one operator, which allocates its own; a workspace is not used there.
        workspace_limit: bytes of workspace to use at most; more tokens than fit are done in chunks, with the same bits.
            None takes the process's setting (FUSEDMOE_WORKSPACE_LIMIT). Backend "torch" has no workspace, and so no
            limit.

    Returns:
        [T, H] in the type of the layer.

    Raises:
        ShapeError, DTypeError, DeviceError, LayoutError, OptionError, WorkspaceError: an argument does not fit; or the
            limit is below what one token needs.
        GradientError: grad mode is on and an argument requires grad; the layer computes no gradients.
        UnsupportedError: no backend can run it; the message has every reason.

    >>> import torch, fusedmoe
    >>> x, w13, w2 = torch.randn(5, 64), torch.randn(4, 96, 64), torch.randn(4, 64, 48)
    >>> topk = fusedmoe.softmax_topk(torch.randn(5, 4), top_k=2, renormalize=True)
    >>> fusedmoe.fused_experts(x, w13, w2, topk.weights, topk.ids).shape
    torch.Size([5, 64])
    """
    if torch.compiler.is_compiling():
        act = Activation.of(activation)
        result: torch.Tensor = torch.ops.fusedmoe.fused_experts(
            hidden_states,
            *flatten(w13),
            *flatten(w2),
            topk_weights,
            topk_ids,
            w13_bias,
            w2_bias,
            expert_map,
            global_num_experts,
            hidden_states_scale,
            dtype,
            emulate,
            act.name,
            act.alpha,
            act.beta,
            act.limit,
            act.linear_beta,
            gate_up_layout,
            weight_layout,
            apply_router_weight_on_input,
            fp32_precision,
            [] if lora is None or adapter_ids is None else lora.tensors(),
            lora is not None and lora.finite,
            adapter_ids,
            backend,
            workspace_limit,
            batch_invariant,
        )
        return result if out is None else out.copy_(result)
    key = None
    held = lora.tensors() if isinstance(lora, LoRA) and adapter_ids is not None else ()
    # Memory of the caller's may overlap other arguments.
    if out is None and workspace is None and (lora is None or isinstance(lora, LoRA)):
        arguments = (
            hidden_states, w13, w2, topk_weights, topk_ids, w13_bias, w2_bias, expert_map, hidden_states_scale,
            *held, *(() if lora is None else (adapter_ids,)),
        )  # fmt: skip
        options = (
            dtype, emulate, activation, gate_up_layout, weight_layout, apply_router_weight_on_input, global_num_experts,
            fp32_precision, batch_invariant, backend, workspace_limit, lora and (lora.finite, lora.distances),
        )  # fmt: skip
        key, done = experts.again(arguments, options)
        if done is not None:
            return done
    call = check(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        hidden_states_scale=hidden_states_scale,
        dtype=dtype,
        emulate=emulate,
        activation=Activation.of(activation),
        gate_up_layout=gate_up_layout,
        weight_layout=weight_layout,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        global_num_experts=global_num_experts,
        fp32_precision=fp32_precision,
        lora=lora,
        adapter_ids=adapter_ids,
        batch_invariant=batch_invariant,
        out=out,
        workspace=workspace,
    )
    return experts.run(call, choose(call.problem, target_of(hidden_states.device), backend), workspace_limit, key)


def workspace_bytes(
    hidden_states: torch.Tensor,
    w13: torch.Tensor | ExpertMatrix,
    w2: torch.Tensor | ExpertMatrix,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    backend: str | None = None,
    workspace_limit: int | None = None,
    **options: object,
) -> int:
    """Bytes of workspace that :func:`fused_experts` needs for these arguments; depends on shapes alone.

    It never shrinks when T grows, so a workspace for the largest T serves all.
    Takes the options of :func:`fused_experts`, and raises what it raises.
    """
    problem = check(hidden_states, w13, w2, topk_weights, topk_ids, **options).problem  # type: ignore[arg-type]
    target = target_of(hidden_states.device)
    limit = settings().workspace_limit if workspace_limit is None else workspace_limit
    experts.tokens_at_a_time(problem, choose(problem, target, backend), limit)  # raises

    def need(tokens: int) -> int:
        fewer = replace(problem, tokens=tokens)
        return experts.bytes_for(fewer, choose(fewer, target, backend))

    # A backend that takes over from a number of tokens on may need less than the one before it.
    most = max(map(need, (problem.tokens, *tokens_before_breaks(problem, target))))
    return most if limit is None else min(most, limit)
