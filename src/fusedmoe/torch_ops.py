"""The layer as an operator of torch.library, so that torch.compile and torch.export see one opaque call.

``Library.define`` costs a few microseconds a call, ``torch.library.custom_op`` tens; outside of compilation
neither is in the way, because :func:`fusedmoe.fused_experts` then calls the layer directly.

An operator takes tensors and plain values only, so an expert matrix travels as its tensors, with its format as text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedmoe import experts
from fusedmoe.checks import check, check_linear
from fusedmoe.errors import GradientError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
from fusedmoe.plan.planner import choose
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import Format, Inputs
from fusedmoe.target import target_of

_MATRIX = (
    "Tensor {0}, Tensor? {0}_scale, Tensor? {0}_zero, Tensor? {0}_tensor_scale, Tensor? {0}_input_scale, "
    "str[] {0}_format, int {0}_parts, "
)
_LIBRARY = torch.library.Library("fusedmoe", "DEF")
_LIBRARY.define(
    "fused_experts(Tensor hidden_states, " + _MATRIX.format("w13") + _MATRIX.format("w2") + "Tensor topk_weights, "
    "Tensor topk_ids, Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, int? global_num_experts, "
    "Tensor? hidden_states_scale, ScalarType? dtype, bool emulate, "
    "str activation, float? alpha, float? beta, float? limit, float? linear_beta, "
    "str gate_up_layout, str weight_layout, bool apply_router_weight_on_input, "
    "str fp32_precision, Tensor[] lora, bool finite, Tensor? adapter_ids, str? backend, int? workspace_limit, "
    "bool? batch_invariant) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.define(
    "expert_linear(Tensor hidden_states, " + _MATRIX.format("w") + "Tensor topk_ids, Tensor? bias, "
    "str weight_layout, bool emulate, str fp32_precision, str? backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

_Flat = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[str], int]


def flatten(w: Tensor | ExpertMatrix) -> _Flat:
    """An expert matrix as the operator takes it."""
    if isinstance(w, Tensor):
        return w, None, None, None, None, [], 1
    return w.data, w.scale, w.zero, w.tensor_scale, w.input_scale, format_to_words(w.format), w.parts


def format_to_words(form: Format) -> list[str]:
    """A format as a list of words; the inverse of :func:`format_of_words`."""
    rows = form.inputs  # no dataclasses.astuple: torch.export of 2.11 does not trace its copies
    inputs = ("", "", 0) if rows is None else (rows.element, rows.mode, rows.group)
    return [
        *map(str, (form.scheme, form.element, *form.block, form.scale, int(form.zero), int(form.tensor_scale), *inputs))
    ]


def format_of_words(words: list[Any]) -> Format:
    """The format that :func:`format_to_words` wrote."""
    scheme, element, block_n, block_k, scale, zero, tensor_scale, code, mode, group = words
    inputs = Inputs(element=code, mode=mode, group=int(group)) if mode else None
    return Format(
        scheme=scheme,
        element=element,
        block=(int(block_n), int(block_k)),
        scale=scale,
        zero=zero == "1",
        tensor_scale=tensor_scale == "1",
        inputs=inputs,
    )


def _matrix(
    data: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    tensor_scale: Tensor | None,
    input_scale: Tensor | None,
    words: list[str],
    parts: int,
) -> Tensor | ExpertMatrix:
    if scale is None:
        return data
    form = format_of_words(words)
    return ExpertMatrix(form, data, scale, zero=zero, tensor_scale=tensor_scale, input_scale=input_scale, parts=parts)


def _fused_experts(hidden_states: Tensor, *arguments: Any) -> Tensor:
    w13, w2 = _matrix(*arguments[:7]), _matrix(*arguments[7:14])
    (
        topk_weights, topk_ids, w13_bias, w2_bias, expert_map, global_num_experts, hidden_states_scale, dtype, emulate,
        activation, alpha, beta, limit, linear_beta,
        gate_up_layout, weight_layout, apply_router_weight_on_input, fp32_precision, lora, finite, adapter_ids, backend,
        workspace_limit, batch_invariant,
    ) = arguments[14:]  # fmt: skip
    call = check(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        hidden_states_scale=hidden_states_scale,
        dtype=dtype,
        emulate=emulate,
        activation=Activation(activation, alpha=alpha, beta=beta, limit=limit, linear_beta=linear_beta),
        gate_up_layout=gate_up_layout,
        weight_layout=weight_layout,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        global_num_experts=global_num_experts,
        fp32_precision=fp32_precision,
        lora=LoRA.of_tensors(lora, finite=finite) if lora else None,
        adapter_ids=adapter_ids,
        batch_invariant=batch_invariant,
    )
    return experts.run(call, choose(call.problem, target_of(hidden_states.device), backend), workspace_limit)


def _fake(hidden_states: Tensor, *arguments: Any) -> Tensor:
    dtype = hidden_states.dtype
    if arguments[20] is not None:  # the scale of hidden states that are codes
        dtype = arguments[21] or torch.bfloat16
    return torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)


def _expert_linear(hidden_states: Tensor, *arguments: Any) -> Tensor:
    topk_ids, bias, weight_layout, emulate, fp32_precision, backend = arguments[7:]
    call = check_linear(
        hidden_states,
        _matrix(*arguments[:7]),
        topk_ids,
        bias=bias,
        weight_layout=weight_layout,
        emulate=emulate,
        fp32_precision=fp32_precision,
    )
    return experts.run_alone(call, choose(call.problem, target_of(hidden_states.device), backend))


def _fake_linear(hidden_states: Tensor, w: Tensor, *arguments: Any) -> Tensor:
    n_rows = w.shape[1 if arguments[8] == "NK" else 2]
    return hidden_states.new_empty(*arguments[6].shape, n_rows)


_LIBRARY.impl("fused_experts", _fused_experts, "CompositeExplicitAutograd")
torch.library.register_fake("fusedmoe::fused_experts", _fake, lib=_LIBRARY)
_LIBRARY.impl("expert_linear", _expert_linear, "CompositeExplicitAutograd")
torch.library.register_fake("fusedmoe::expert_linear", _fake_linear, lib=_LIBRARY)


def _no_gradient(ctx: Any, *gradients: Tensor) -> None:
    """What a call that is not compiled says before it starts: without it a compiled one would detach silently."""
    raise GradientError(
        explain(
            "gradient of a compiled layer",
            got="a backward pass",
            wanted="inference: this layer computes no gradients",
            do="Call it under torch.no_grad() or torch.inference_mode().",
        )
    )


torch.library.register_autograd("fusedmoe::fused_experts", _no_gradient, lib=_LIBRARY)
torch.library.register_autograd("fusedmoe::expert_linear", _no_gradient, lib=_LIBRARY)
