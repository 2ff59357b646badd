"""What an experts module of Transformers does between its two matrices, in the words of this library.

A module is known by the function that it would call, never by its class: a subclass that says nothing new is known with
its parent (parametrised modules are such), and one with a gate of its own is not mistaken for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers import activations

from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GateUpLayout


class Gate(NamedTuple):
    """An activation, and where it finds gate and up."""

    activation: Activation
    layout: GateUpLayout = "concatenated"


#: Classes of activation functions -> their name here. A name that a version of Transformers lacks is left out.
_NAMES = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
_FUNCTIONS: dict[Any, str] = {
    **{getattr(activations, name): known for name, known in _NAMES.items() if hasattr(activations, name)},
    nn.SiLU: "silu",
    functional.silu: "silu",
}
#: Made once, for a layer asks in each call.
_PLAIN = {name: Gate(Activation(name)) for name in _NAMES.values()}


def _name(function: object) -> str | None:
    """Name of an activation function of one argument; None when it is not known."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return _FUNCTIONS.get(type(function) if isinstance(function, nn.Module) else function)


def plain_gate_of(function: object) -> Gate | None:
    """``function(gate) * up``, for an activation function that is known."""
    name = _name(function)
    return None if name is None else _PLAIN[name]


def _default(experts: Any) -> Gate | None:
    return plain_gate_of(experts.act_fn)


def _clamped(function: object, limit: float | None) -> Gate | None:
    # A limit of 0 clamps all, while Hunyuan-V4's configuration says that it clamps nothing: the module has the word.
    if _name(function) != "silu" or (limit is not None and not limit > 0):
        return None
    return Gate(Activation("silu", limit=limit))


def _swiglu_limit(experts: Any) -> Gate | None:
    return _clamped(functional.silu, experts.swiglu_limit)


def _oai(alpha: float, limit: float, layout: GateUpLayout = "concatenated") -> Gate:
    return Gate(Activation("swigluoai", alpha=alpha, beta=1.0, limit=limit), layout)


def _softcapped(gate: float, up: float) -> Gate:
    return Gate(Activation("situ", beta=gate, linear_beta=up))


def _inkling2(experts: Any) -> Gate:
    return _softcapped(experts.act_fn.gate_softcap.softcap, experts.act_fn.up_softcap.softcap)


def _fp8(experts: Any) -> Gate | None:
    """The gate of FP8Experts is chosen by attributes, of which older versions have fewer."""
    if getattr(experts, "gate_softcap", None) is not None:
        return _softcapped(experts.gate_softcap, experts.up_softcap)
    if getattr(experts, "swiglu_alpha", None) is not None:
        return _oai(experts.swiglu_alpha, experts.swiglu_limit)
    if (limit := getattr(experts, "limit", None)) is not None:
        return _clamped(experts.act_fn, limit)
    return _default(experts)


#: Qualified name of a gate of Transformers -> what it computes, given the module. Each row is tested against the gate.
GATES: dict[str | None, Callable[[Any], Gate | None]] = {
    "_default_apply_gate": _default,
    "BeamExperts._apply_gate": _default,
    "DeepseekV4Experts._apply_gate": lambda m: _clamped(m.act_fn, m.limit),
    "FP8Experts._apply_gate": _fp8,
    "Glm5NextTextExperts._apply_gate": _swiglu_limit,
    "GptOssExperts._apply_gate": lambda m: _oai(m.alpha, m.limit, "interleaved"),
    "HYV4Experts._apply_gate": _swiglu_limit,
    "HYV4VLExperts._apply_gate": _swiglu_limit,
    "Inkling2Experts._apply_gate": _inkling2,
    "Inkling2LoopExperts._apply_gate": _inkling2,
    "MiniMaxM3VLExperts._apply_gate": lambda m: _oai(m.swiglu_alpha, m.swiglu_limit),
    "OpenAIPrivacyFilterExperts._apply_gate": lambda m: _oai(m.alpha, m.limit),
}


# A compiler asks once: Dynamo reads the qualified name of a function wrong (torch 2.13). What it asks with has to be a
# constant, which a class is, and a module is not (torch 2.11).
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _gate_of_class(kind: Any) -> str | None:
    return _name_of_gate(kind._apply_gate)


def _name_of_gate(function: Any) -> str | None:
    """Qualified name of a gate, if Transformers wrote it."""
    function = getattr(function, "__func__", function)
    return function.__qualname__ if function.__module__.startswith("transformers.") else None


def gate_of(experts: Any) -> Gate | None:
    """What an experts module does between its two matrices; None where that is not known, so that it must do it."""
    if not getattr(experts, "has_gate", True):
        name = _name(experts.act_fn)
        return None if name is None else Gate(Activation(f"{name}_no_mul"))
    own = experts.__dict__.get("_apply_gate")
    known = GATES.get(_gate_of_class(type(experts)) if own is None else _name_of_gate(own))
    return None if known is None else known(experts)


def activated(experts: Any, rows: torch.Tensor) -> torch.Tensor:
    """What the module itself makes of the products of its first matrix [S, 2I] (or [S, I] without a gate): [S, I]."""
    result: torch.Tensor = experts._apply_gate(rows) if getattr(experts, "has_gate", True) else experts.act_fn(rows)
    return result
