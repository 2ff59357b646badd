"""Activations as equations on tensors; the table of them is :mod:`fusedmoe.spec.activation`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GateUpLayout


def activate(h: Tensor, activation: Activation, gate_up_layout: GateUpLayout = "concatenated") -> Tensor:
    """Apply an activation to the output of the first matrix, in the dtype of ``h``. NaN stays NaN.

    Args:
        h: [..., 2I] when the activation is gated, else [..., I]; float32 or float64.
        activation: equation and parameters.
        gate_up_layout: "concatenated": gate is ``h[..., :I]``, up is ``h[..., I:]``;
            "interleaved": gate is ``h[..., 0::2]``, up is ``h[..., 1::2]``. Of no effect when not gated.

    Returns:
        [..., I].
    """
    if not activation.gated:
        return _single(h, activation.name.removesuffix("_no_mul"))
    gate, up = (h[..., 0::2], h[..., 1::2]) if gate_up_layout == "interleaved" else h.chunk(2, dim=-1)
    alpha, beta, limit, linear_beta = activation.alpha, activation.beta, activation.limit, activation.linear_beta
    match activation.name:
        case "swigluoai":
            assert alpha is not None and beta is not None and limit is not None, "defaults are filled in"
            gate = gate.clamp(max=limit)
            return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta)
        case "swiglustep":
            assert limit is not None, "defaults are filled in"
            return functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
        case "situ":
            assert beta is not None, "required"
            if linear_beta is not None:
                up = linear_beta * torch.tanh(up / linear_beta)
            return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up
        case "silu" if limit is not None:
            return functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
        case name:
            return _single(gate, name) * up


def _single(x: Tensor, name: str) -> Tensor:
    match name:
        case "silu":
            return functional.silu(x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return functional.relu(x).square()
        case "identity":
            return x
    raise AssertionError(f"activation {name!r} is in the table but has no equation here")
