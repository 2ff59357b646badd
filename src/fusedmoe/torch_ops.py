"""The layer as an operator of torch.library, so that torch.compile and torch.export see one opaque call.

``Library.define`` costs a few microseconds a call, ``torch.library.custom_op`` tens; outside of compilation
neither is in the way, because :func:`fusedmoe.fused_experts` then calls the layer directly.
"""

from __future__ import annotations

import torch

from fusedmoe import experts
from fusedmoe.checks import check
from fusedmoe.plan.planner import choose
from fusedmoe.spec.activation import Activation
from fusedmoe.target import target_of

_LIBRARY = torch.library.Library("fusedmoe", "DEF")
_LIBRARY.define(
    "fused_experts(Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? w13_bias, Tensor? w2_bias, Tensor? expert_map, int? global_num_experts, "
    "str activation, float? alpha, float? beta, float? limit, float? linear_beta, "
    "str gate_up_layout, str weight_layout, bool apply_router_weight_on_input, "
    "str fp32_precision, str? backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _fused_experts(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    global_num_experts: int | None,
    activation: str,
    alpha: float | None,
    beta: float | None,
    limit: float | None,
    linear_beta: float | None,
    gate_up_layout: str,
    weight_layout: str,
    apply_router_weight_on_input: bool,
    fp32_precision: str,
    backend: str | None,
) -> torch.Tensor:
    call = check(
        hidden_states,
        w13,
        w2,
        topk_weights,
        topk_ids,
        activation=Activation(activation, alpha=alpha, beta=beta, limit=limit, linear_beta=linear_beta),
        gate_up_layout=gate_up_layout,
        weight_layout=weight_layout,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        global_num_experts=global_num_experts,
        fp32_precision=fp32_precision,
    )
    return experts.run(call, choose(call.problem, target_of(hidden_states.device), backend))


def _fake(hidden_states: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


_LIBRARY.impl("fused_experts", _fused_experts, "CompositeExplicitAutograd")
torch.library.register_fake("fusedmoe::fused_experts", _fake, lib=_LIBRARY)
