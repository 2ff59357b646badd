"""The experts as a loop over experts."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedmoe.errors import DTypeError, OptionError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
from fusedmoe.numerics import quantise_inputs, spread_input_scale
from fusedmoe.reference.activations import activate
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GATE_UP_LAYOUTS, WEIGHT_LAYOUTS, GateUpLayout, WeightLayout


def fused_experts(
    hidden_states: Tensor,
    w13: Tensor | ExpertMatrix,
    w2: Tensor | ExpertMatrix,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    hidden_states_scale: Tensor | None = None,
    emulate: bool = False,
    activation: str | Activation = "silu",
    gate_up_layout: GateUpLayout = "concatenated",
    weight_layout: WeightLayout = "NK",
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    global_num_experts: int | None = None,
    lora: LoRA | None = None,
    adapter_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The layer by its definition, every operation in ``dtype``, nothing rounded in between but to codes.

        out[t] = sum_j w[t, j] * (W2[e] a(W1[e] x[t] + b1[e]) + b2[e]),    e = expert_map[ids[t, j]]

    and with ``apply_router_weight_on_input``

        out[t] = sum_j W2[e] a(w[t, j] * (W1[e] x[t]) + b1[e]) + b2[e]

    With an adapter a of token t (``adapter_ids[t]``, where that slot of ``lora`` holds an enabled adapter)

        W1[e] x[t] + scaling[a] * B1[a, e] A1[a, e] x[t]   stands for W1[e] x[t],   and likewise of W2 and its input,

    where x[t] and a(...) are those before they were quantised; gate rows of B1 meet the first half of A1, up rows the
    second, where it has two.

    A slot whose id or mapped id names no expert adds exactly 0; an expert chosen twice by a token counts twice.

    Where W1 or W2 is quantised, it stands for ``dequantize()`` of itself. Where its format quantises the rows that it
    multiplies, x[t] or a(...) is codes * scale of :func:`fusedmoe.numerics.quantise_inputs`: of x[t] once for all its
    slots, of a(...) after everything that is applied to it. The largest magnitude of mode "tensor" is that of the
    tokens, or slots, that have an expert. This is the only rounding there is; that of x[t] is done in the type of
    hidden_states, float32 at least, whatever ``dtype`` is: values of few bits lie exactly between two codes often
    enough, and which one they get is then a matter of definition.

    Args:
        hidden_states: x, [T, H].
        w13: W1, [E, 2I, H] ([E, I, H] if not gated), or its transpose [E, H, 2I] with ``weight_layout="KN"``;
            or an ExpertMatrix.
        w2: W2, [E, H, I], or [E, I, H] with ``weight_layout="KN"``; or an ExpertMatrix.
        topk_weights: w, [T, top_k].
        topk_ids: [T, top_k] integers; outside [0, E), or outside ``expert_map``, they name no expert.
        hidden_states_scale: x[t] is hidden_states[t] times this; [1], [T], [T, 1], or [T, ceil(H / group)] with the
            group of the inputs of w13.
        emulate: of no effect; it is here because the options of ``fusedmoe.fused_experts`` fit this function too.
        activation: a; a name or an :class:`fusedmoe.spec.activation.Activation`.
        gate_up_layout: order of the 2I rows of W1: "concatenated" or "interleaved".
        weight_layout: "NK" ([E, out, in]) or "KN" ([E, in, out]); an ExpertMatrix is "NK".
        w13_bias: b1, [E, 2I or I].
        w2_bias: b2, [E, H].
        apply_router_weight_on_input: see above; neither bias is weighted then.
        expert_map: [G] integers: global id -> local id; a value outside [0, E) names no expert.
        global_num_experts: ids at or above this name no expert either.
        lora, adapter_ids: see above; both or none. adapter_ids: [T] integers.
        dtype: torch.float64 or torch.float32. The latter follows torch's setting of tf32.

    Returns:
        [T, H] in ``dtype``.

    Raises:
        DTypeError: ``dtype`` is neither.
        OptionError: unknown activation or layout, or an ExpertMatrix with "KN".
    """
    activation = Activation.of(activation)
    _check_options(gate_up_layout, weight_layout, dtype, quantised=any(isinstance(w, ExpertMatrix) for w in (w13, w2)))
    expert = _local_ids(topk_ids, w13.shape[0], expert_map, global_num_experts)
    token, j = torch.nonzero(expert >= 0, as_tuple=True)
    weight = topk_weights[token, j].to(dtype)[:, None]
    rows = [torch.nonzero(expert[token, j] == e).flatten() for e in range(w13.shape[0])]
    if hidden_states_scale is None:
        x = _rows(hidden_states, w13, dtype, live=(expert >= 0).any(1))
    else:
        x = _scaled(hidden_states.to(dtype), hidden_states_scale.to(dtype), w13)
    inner = w2.shape[2] if weight_layout == "NK" else w2.shape[1]
    a = x.new_zeros(token.numel(), inner)
    for e, row in enumerate(rows):
        if row.numel() == 0:
            continue
        h = x[token[row]] @ _matrix(w13, e, weight_layout, dtype).T
        if lora is not None and adapter_ids is not None:
            second = _up_rows(h.shape[1], gate_up_layout) if lora.parts == 2 else None
            pair = lora.w13(interleaved=gate_up_layout == "interleaved")
            h = h + _delta(hidden_states[token[row]], adapter_ids[token[row]], lora, pair, e, second, dtype)
        if apply_router_weight_on_input:
            h = weight[row] * h
        if w13_bias is not None:
            h = h + w13_bias[e].to(dtype)
        a[row] = activate(h, activation, gate_up_layout)
    unquantised, a = a, _rows(a, w2, dtype)
    out = torch.zeros_like(x)
    for e, row in enumerate(rows):
        if row.numel() == 0:
            continue
        y = a[row] @ _matrix(w2, e, weight_layout, dtype).T
        if lora is not None and adapter_ids is not None:
            y = y + _delta(unquantised[row], adapter_ids[token[row]], lora, (lora.w2_a, lora.w2_b), e, None, dtype)
        if w2_bias is not None:
            y = y + w2_bias[e].to(dtype)
        if not apply_router_weight_on_input:
            y = weight[row] * y
        out.index_add_(0, token[row], y)
    return out


def _matrix(w: Tensor | ExpertMatrix, e: int, weight_layout: WeightLayout, dtype: torch.dtype) -> Tensor:
    """[out, in] of expert e."""
    if isinstance(w, ExpertMatrix):
        return w.dequantize_expert(e, dtype)
    return w[e].to(dtype) if weight_layout == "NK" else w[e].to(dtype).T


def _up_rows(n_rows: int, gate_up_layout: GateUpLayout) -> Tensor:
    """Which rows of W1 are up rows."""
    row = torch.arange(n_rows)
    return row % 2 == 1 if gate_up_layout == "interleaved" else row >= n_rows // 2


def _delta(
    x: Tensor,
    adapter_ids: Tensor,
    lora: LoRA,
    matrices: tuple[Tensor, Tensor],
    e: int,
    second: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What the adapters add to rows of expert e: [R, out]. ``second``: rows of B that meet the second half of A."""
    a, b = matrices
    delta = x.new_zeros(x.shape[0], b.shape[2], dtype=dtype)
    for slot in range(lora.slots):
        rank = int(lora.rank[slot])
        if rank == 0 or lora.adapter_enabled is not None and not lora.adapter_enabled[slot]:
            continue
        mine = torch.nonzero(adapter_ids == slot).flatten()
        left = a[slot, e % a.shape[1]].to(dtype).unflatten(0, (-1, lora.max_rank))[:, :rank]
        right = b[slot, e % b.shape[1], :, :rank].to(dtype)
        found = x[mine].to(dtype) @ left[0].T @ right.T
        if second is not None:
            found = torch.where(second.to(x.device), x[mine].to(dtype) @ left[1].T @ right.T, found)
        delta[mine] = lora.scaling[slot].to(dtype) * found
    return delta


def _rows(x: Tensor, w: Tensor | ExpertMatrix, dtype: torch.dtype, live: Tensor | None = None) -> Tensor:
    """Rows as ``w`` meets them: codes times scales where its format quantises them."""
    if not isinstance(w, ExpertMatrix) or w.format.inputs is None:
        return x.to(dtype)
    codes, scale = quantise_inputs(x, w.format.inputs, w.input_scale, live)
    return _scaled(codes.to(dtype), scale.to(dtype), w)


def _scaled(codes: Tensor, scale: Tensor, w: Tensor | ExpertMatrix) -> Tensor:
    """Codes [R, K] times scales of one value, [R] or [R, groups]."""
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    inputs = w.format.inputs if isinstance(w, ExpertMatrix) else None
    return codes * (scale if inputs is None else spread_input_scale(scale, inputs, codes.shape[1]))


def _local_ids(ids: Tensor, n_experts: int, expert_map: Tensor | None, n_global: int | None) -> Tensor:
    """Local expert of each slot [T, top_k], -1 where there is none."""
    limit = n_experts if expert_map is None else expert_map.shape[0]
    if n_global is not None:
        limit = min(limit, n_global)
    local = torch.where((ids >= 0) & (ids < limit), ids.long(), -1)
    if expert_map is not None and limit > 0:
        local = torch.where(local >= 0, expert_map.long()[local.clamp(min=0)], -1)
    return torch.where((local >= 0) & (local < n_experts), local, -1)


def _check_options(gate_up_layout: str, weight_layout: str, dtype: torch.dtype, *, quantised: bool) -> None:
    for name, value, known in (
        ("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS),
        ("weight_layout", weight_layout, WEIGHT_LAYOUTS),
    ):
        if value not in known:
            wanted = " or ".join(map(repr, known))
            raise OptionError(explain(name, got=repr(value), wanted=wanted, do="See the documentation of the layouts."))
    if quantised and weight_layout == "KN":
        do = "Build it from transposed views of its tensors."
        raise OptionError(explain("weight_layout of an ExpertMatrix", got="'KN'", wanted="'NK'", do=do))
    if dtype not in (torch.float64, torch.float32):
        raise DTypeError(
            explain(
                "dtype of the reference",
                got=dtype,
                wanted="torch.float64 or torch.float32",
                do="Inputs of any type are converted to it; cast the result.",
            )
        )
