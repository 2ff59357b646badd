"""The two functions that Transformers calls in place of an experts module's own forward.

They keep nothing between calls and copy no weight: tensors are read from the module once a call (PEFT makes new ones
for each), and sizes come from them, for under tensor parallelism the module's own attributes are those of all ranks.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from fusedmoe.errors import GradientError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.functional import fused_experts
from fusedmoe.integrations.transformers.gates import activated, gate_of
from fusedmoe.linear import expert_linear
from fusedmoe.spec.layout import WeightLayout

#: What a warning says where others compute the gradients.
FALLS_BACK = (
    "fusedmoe computes no gradients: where one is needed, experts run as {}. "
    "Call the model under torch.no_grad() or torch.inference_mode() for the fused experts."
)


class _Weights(NamedTuple):
    w13: Tensor | ExpertMatrix
    w2: Tensor | ExpertMatrix
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    layout: WeightLayout = "NK"

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of a matrix that is not quantised, if there is one."""
        return next((w.dtype for w in (self.w13, self.w2) if isinstance(w, Tensor)), None)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module [T, H] -> [T, H]; registered as ``"fusedmoe"`` in ``ExpertsInterface``.

    Args:
        self: the module.
        hidden_states: [T, H].
        top_k_index: [T, top_k]; an id outside [0, E) is an expert of another rank and adds nothing.
        top_k_weights: [T, top_k].

    Where a gradient is needed, Transformers' default implementation ``grouped_mm`` runs instead, with one warning.
    """
    first = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    biased = self.has_bias
    weights = _Weights(
        getattr(self, first),
        self.down_proj,
        getattr(self, f"{first}_bias") if biased else None,
        self.down_proj_bias if biased else None,
        "KN" if self.is_transposed else "NK",
    )
    if needs_grad(self, hidden_states, top_k_weights, *weights):
        if not torch.compiler.is_compiling():
            warnings.warn(FALLS_BACK.format("Transformers' grouped_mm"), stacklevel=2)
        result: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return result
    return _run(self, hidden_states, top_k_index, top_k_weights, weights)


def fp8_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of FP8Experts; registered as ``"fusedmoe"`` in ``FP8ExpertsInterface``. Arguments as above.

    Rows are quantised as the module says: per token, or per token and block, or with the static scale of the module,
    the largest of its experts'. fp4 weights multiply rows as they are.

    Raises:
        GradientError: hidden states or router weights need a gradient.
    """
    refuse_gradients("experts in fp8", hidden_states, top_k_weights)
    first = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"
    weights = _Weights(_fp8_matrix(self, first), _fp8_matrix(self, "down_proj"))
    return _run(self, hidden_states, top_k_index, top_k_weights, weights)


def needs_grad(module: nn.Module | None, *tensors: object) -> bool:
    """Grad mode is on, and one of the tensors, or of the parameters of the module, requires a gradient."""
    if not torch.is_grad_enabled():
        return False
    parameters = () if module is None else module.parameters()
    return any(isinstance(t, Tensor) and t.requires_grad for t in (*tensors, *parameters))


def refuse_gradients(what: str, hidden_states: Tensor, top_k_weights: Tensor) -> None:
    """Raise where a gradient would be needed, inside of a compiled graph too."""
    if needs_grad(None, hidden_states, top_k_weights):
        raise GradientError(
            explain(
                what,
                got="hidden states or router weights that require grad",
                wanted="inference: this layer computes no gradients",
                do="Call the model under torch.no_grad() or torch.inference_mode().",
            )
        )


def _fp8_matrix(experts: Any, name: str) -> Tensor | ExpertMatrix:
    """A matrix of FP8Experts with its scales, as they lie."""
    data = getattr(experts, name)
    if data.element_size() > 1:
        return data  # type: ignore[no-any-return]  # left in 16 bits by the quantiser
    scale = getattr(experts, f"{name}_scale_inv")
    if scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        scale = scale.view(torch.uint8)  # e8m0
    if data.dtype == torch.int8:
        return ExpertMatrix("mxfp4", data.view(torch.uint8), scale)
    if experts.block_size is not None:
        bn, bk = experts.block_size
        return ExpertMatrix("fp8_block", data, scale, block=(bn, bk))
    static = None
    if experts.activation_scheme == "static":
        # That of gate and up has the name gate_up_proj_..., whether there is a gate or not.
        of = "down_proj" if name == "down_proj" else "gate_up_proj"
        static = getattr(experts, f"{of}_activation_scale").amax()
    return ExpertMatrix("fp8_tensor", data, scale, block=(0, 0), input_scale=static)


def _run(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: _Weights) -> Tensor:
    # Under autocast a norm may have made hidden states wider than the weights. A cast to the same type takes its time.
    given, dtype = hidden_states.dtype, weights.dtype
    x = hidden_states if dtype is None or dtype == given else hidden_states.to(dtype)
    norm = experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None
    gate = gate_of(experts)
    if gate is None or norm is not None:
        return _between(experts, x, top_k_index, top_k_weights, weights, norm).to(given)
    out = fused_experts(
        x,
        weights.w13,
        weights.w2,
        top_k_weights,
        top_k_index,
        activation=gate.activation,
        gate_up_layout=gate.layout,
        weight_layout=weights.layout,
        w13_bias=weights.w13_bias,
        w2_bias=weights.w2_bias,
    )
    return out if out.dtype == given else out.to(given)


def _between(
    experts: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, weights: _Weights, norm: Any
) -> Tensor:
    """The two products apart, and between and after them what the module does itself."""
    ids = top_k_index.reshape(-1, 1)
    h = expert_linear(x, weights.w13, top_k_index, bias=weights.w13_bias, weight_layout=weights.layout)
    h = activated(experts, h.flatten(0, 1)).to(x.dtype)
    y = expert_linear(h, weights.w2, ids, bias=weights.w2_bias, weight_layout=weights.layout).squeeze(1)
    if norm is not None:
        y = norm(y)
    y = y.view(*top_k_index.shape, -1).float() * top_k_weights.unsqueeze(-1)
    # A norm may make something of the zeros of absent experts, and so may a weight that is NaN.
    absent = (top_k_index < 0) | (top_k_index >= weights.w2.shape[0])
    return y.masked_fill(absent.unsqueeze(-1), 0).sum(1)
