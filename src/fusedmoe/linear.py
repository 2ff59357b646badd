"""One matrix of every expert alone, for layers that do something of their own between the two."""

from __future__ import annotations

import torch

from fusedmoe import experts
from fusedmoe.checks import check_linear
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.plan.planner import choose
from fusedmoe.spec.layout import Fp32Precision, WeightLayout
from fusedmoe.target import target_of
from fusedmoe.torch_ops import flatten


def expert_linear(
    hidden_states: torch.Tensor,
    w: torch.Tensor | ExpertMatrix,
    topk_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    weight_layout: WeightLayout = "NK",
    emulate: bool = False,
    fp32_precision: Fp32Precision = "ieee",
    backend: str | None = None,
) -> torch.Tensor:
    """Multiply each token by the matrices of its experts.

    With e = topk_ids[t, j]::

        out[t, j] = w[e] @ x[t] + bias[e]

    Half of :func:`fused_experts`, in the same arithmetic: two of them, ids of the second [T * top_k, 1], and what lies
    between make a layer with any activation, or with a norm of each expert's rows.

    Args:
        hidden_states: [T, K] float32, float16 or bfloat16, which is the type of the result; any strides.
        w: [E, N, K] of the type of hidden_states, or an ExpertMatrix; any strides, used where it lies, never copied.
        topk_ids: [T, top_k] int32 or int64; an id outside [0, E) is an absent expert, whose row is zeros.
        bias: [E, N], any float type.
        weight_layout: "NK" as above, or "KN": w [E, K, N].
        emulate, fp32_precision, backend: as of fused_experts.

    Returns:
        [T, top_k, N].

    Raises:
        ShapeError, DTypeError, DeviceError, LayoutError, OptionError: an argument does not fit.
        GradientError: grad mode is on and an argument requires grad; no gradients are computed.
        UnsupportedError: no backend can run it; the message has every reason.

    >>> import torch, fusedmoe
    >>> x, w = torch.randn(5, 64), torch.randn(4, 96, 64)
    >>> fusedmoe.expert_linear(x, w, torch.randint(4, (5, 2))).shape
    torch.Size([5, 2, 96])
    """
    if torch.compiler.is_compiling():
        result: torch.Tensor = torch.ops.fusedmoe.expert_linear(
            hidden_states, *flatten(w), topk_ids, bias, weight_layout, emulate, fp32_precision, backend
        )
        return result
    call = check_linear(
        hidden_states,
        w,
        topk_ids,
        bias=bias,
        weight_layout=weight_layout,
        emulate=emulate,
        fp32_precision=fp32_precision,
    )
    return experts.run_alone(call, choose(call.problem, target_of(hidden_states.device), backend))
