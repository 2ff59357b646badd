"""The experts as a loop over experts."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedmoe.errors import DTypeError, OptionError, explain
from fusedmoe.reference.activations import activate
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GATE_UP_LAYOUTS, WEIGHT_LAYOUTS, GateUpLayout, WeightLayout


def fused_experts(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str | Activation = "silu",
    gate_up_layout: GateUpLayout = "concatenated",
    weight_layout: WeightLayout = "NK",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    global_num_experts: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The layer by its definition, every operation in ``dtype``, nothing rounded in between.

        out[t] = sum_j w[t, j] * (W2[e] a(W1[e] x[t] + b1[e]) + b2[e]),    e = expert_map[ids[t, j]]

    and with ``apply_router_weight_on_input``

        out[t] = sum_j W2[e] a(w[t, j] * (W1[e] x[t]) + b1[e]) + b2[e]

    A slot whose id or mapped id names no expert adds exactly 0; an expert chosen twice by a token counts twice.

    Args:
        hidden_states: x, [T, H].
        w13: W1, [E, 2I, H] ([E, I, H] if not gated), or its transpose [E, H, 2I] with ``weight_layout="KN"``.
        w2: W2, [E, H, I], or [E, I, H] with ``weight_layout="KN"``.
        topk_weights: w, [T, top_k].
        topk_ids: [T, top_k] integers; outside [0, E), or outside ``expert_map``, they name no expert.
        activation: a; a name or an :class:`fusedmoe.spec.activation.Activation`.
        gate_up_layout: order of the 2I rows of W1: "concatenated" or "interleaved".
        weight_layout: "NK" ([E, out, in]) or "KN" ([E, in, out]).
        w13_bias: b1, [E, 2I or I].
        w2_bias: b2, [E, H].
        apply_router_weight_on_input: see above; neither bias is weighted then.
        expert_map: [G] integers: global id -> local id; a value outside [0, E) names no expert.
        global_num_experts: ids at or above this name no expert either.
        dtype: torch.float64 or torch.float32. The latter follows torch's setting of tf32.

    Returns:
        [T, H] in ``dtype``.

    Raises:
        DTypeError: ``dtype`` is neither.
        OptionError: unknown activation or layout.
    """
    activation = Activation.of(activation)
    _check_options(gate_up_layout, weight_layout, dtype)
    n_experts = w13.shape[0]
    expert = _local_ids(topk_ids, n_experts, expert_map, global_num_experts)
    x = hidden_states.to(dtype)
    out = torch.zeros_like(x)
    for e in range(n_experts):
        token, j = torch.nonzero(expert == e, as_tuple=True)
        if token.numel() == 0:
            continue
        w1_e, w2_e = w13[e].to(dtype), w2[e].to(dtype)
        if weight_layout == "NK":
            w1_e, w2_e = w1_e.T, w2_e.T
        weight = topk_weights[token, j].to(dtype)[:, None]
        h = x[token] @ w1_e
        if apply_router_weight_on_input:
            h = weight * h
        if w13_bias is not None:
            h = h + w13_bias[e].to(dtype)
        y = activate(h, activation, gate_up_layout) @ w2_e
        if w2_bias is not None:
            y = y + w2_bias[e].to(dtype)
        if not apply_router_weight_on_input:
            y = weight * y
        out.index_add_(0, token, y)
    return out


def _local_ids(ids: Tensor, n_experts: int, expert_map: Tensor | None, n_global: int | None) -> Tensor:
    """Local expert of each slot [T, top_k], -1 where there is none."""
    limit = n_experts if expert_map is None else expert_map.shape[0]
    if n_global is not None:
        limit = min(limit, n_global)
    local = torch.where((ids >= 0) & (ids < limit), ids.long(), -1)
    if expert_map is not None and limit > 0:
        local = torch.where(local >= 0, expert_map.long()[local.clamp(min=0)], -1)
    return torch.where((local >= 0) & (local < n_experts), local, -1)


def _check_options(gate_up_layout: str, weight_layout: str, dtype: torch.dtype) -> None:
    for name, value, known in (
        ("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS),
        ("weight_layout", weight_layout, WEIGHT_LAYOUTS),
    ):
        if value not in known:
            wanted = " or ".join(map(repr, known))
            raise OptionError(explain(name, got=repr(value), wanted=wanted, do="See the documentation of the layouts."))
    if dtype not in (torch.float64, torch.float32):
        raise DTypeError(
            explain(
                "dtype of the reference",
                got=dtype,
                wanted="torch.float64 or torch.float32",
                do="Inputs of any type are converted to it; cast the result.",
            )
        )
