"""FusedExperts: parameters, initialisation, state dict, leading dimensions, and what it hands to fused_experts."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fusedmoe.errors import GradientError, LayoutError, OptionError, ShapeError
from fusedmoe.functional import fused_experts
from fusedmoe.nn import FusedExperts
from fusedmoe.spec.activation import Activation

E, H, I, TOP_K = 4, 32, 24, 2


def inputs(*lead: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*lead, H, generator=generator)
    weights = torch.rand(*lead, TOP_K, generator=generator)
    ids = torch.rand(*lead, E, generator=generator).topk(TOP_K).indices
    return hidden, weights, ids


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {"w13": (E, 2 * I, H), "w2": (E, H, I)}),
        ({"weight_layout": "KN"}, {"w13": (E, H, 2 * I), "w2": (E, I, H)}),
        ({"activation": "relu2_no_mul"}, {"w13": (E, I, H), "w2": (E, H, I)}),
        ({"bias": True}, {"w13": (E, 2 * I, H), "w2": (E, H, I), "w13_bias": (E, 2 * I), "w2_bias": (E, H)}),
    ],
)
def test_parameters(options, shapes):
    layer = FusedExperts(E, H, I, **options)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == shapes
    assert not any(p.requires_grad for p in layer.parameters())


def test_initialised_as_linear():
    layer = FusedExperts(8, 256, 64, bias=True, weight_layout="KN")
    for parameter, inner in ((layer.w13, 256), (layer.w2, 64), (layer.w13_bias, 256), (layer.w2_bias, 64)):
        bound = 1 / math.sqrt(inner)
        assert parameter.abs().max() <= bound
        assert abs(parameter.std().item() / (bound / math.sqrt(3)) - 1) < 0.1
        assert abs(parameter.mean().item()) < 0.1 * bound


def test_meta_then_materialise():
    with torch.device("meta"):
        layer = FusedExperts(E, H, I, bias=True, dtype=torch.bfloat16)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert all(p.isfinite().all() and not p.requires_grad for p in layer.parameters())


def test_state_dict_round_trip_gives_the_same_bits():
    source, target = FusedExperts(E, H, I, bias=True), FusedExperts(E, H, I, bias=True)
    assert not torch.equal(source.w13, target.w13)
    assert set(source.state_dict()) == {"w13", "w2", "w13_bias", "w2_bias"}
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(*inputs(5)), target(*inputs(5)))
    assert torch.equal(source(*inputs(5)), copy.deepcopy(source)(*inputs(5)))
    with pytest.raises(RuntimeError, match="w13_bias"):
        FusedExperts(E, H, I).load_state_dict(source.state_dict())


def test_options_reach_the_function():
    options = {
        "activation": Activation("swigluoai", limit=1.0),
        "gate_up_layout": "interleaved",
        "weight_layout": "KN",
        "apply_router_weight_on_input": True,
        "backend": "torch",
    }
    layer = FusedExperts(E, H, I, bias=True, **options)
    wanted = fused_experts(
        *(inputs(5)[0], layer.w13, layer.w2, *inputs(5)[1:]),
        w13_bias=layer.w13_bias,
        w2_bias=layer.w2_bias,
        **options,
    )
    assert torch.equal(layer(*inputs(5)), wanted)
    for name, value in (
        ("gate_up_layout", "concatenated"),
        ("activation", "gelu"),
        ("apply_router_weight_on_input", False),
    ):
        changed = FusedExperts(E, H, I, bias=True, **{**options, name: value})
        changed.load_state_dict(layer.state_dict())
        assert not torch.allclose(changed(*inputs(5)), wanted), name


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(lead):
    layer = FusedExperts(E, H, I)
    hidden, weights, ids = inputs(*lead)
    tokens = math.prod(lead)
    flat = layer(hidden.reshape(tokens, H), weights.reshape(tokens, TOP_K), ids.reshape(tokens, TOP_K))
    got = layer(hidden, weights, ids)
    assert got.shape == hidden.shape
    assert torch.equal(got, flat.reshape(hidden.shape))
    # The routing may stay flat, as routers return it.
    assert torch.equal(layer(hidden, weights.reshape(tokens, TOP_K), ids.reshape(tokens, TOP_K)), got)


def test_out():
    layer = FusedExperts(E, H, I)
    hidden, weights, ids = inputs(2, 3)
    out = torch.full_like(hidden, torch.nan)
    assert layer(hidden, weights, ids, out=out) is out
    assert torch.equal(out, layer(hidden, weights, ids))
    with pytest.raises(LayoutError, match="without a copy"):
        layer(hidden, weights, ids, out=torch.empty(3, 2, H).transpose(0, 1))
    with pytest.raises(ShapeError, match="leading dimensions of out"):
        layer(hidden, weights, ids, out=torch.empty(6, H))


def test_mismatched_routing_is_refused():
    layer = FusedExperts(E, H, I)
    hidden, weights, ids = inputs(2, 3)
    with pytest.raises(ShapeError, match="topk_weights"):
        layer(hidden, weights.transpose(0, 1), ids)
    with pytest.raises(ShapeError, match="topk_ids"):
        layer(hidden, weights, ids.flatten(0, 1)[:4])
    with pytest.raises(ShapeError):
        layer(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1))


def test_gradients_are_refused_not_detached():
    layer = FusedExperts(E, H, I)
    hidden, weights, ids = inputs(5)
    with pytest.raises(GradientError):
        layer(hidden.requires_grad_(), weights, ids)
    with torch.no_grad():
        assert layer(hidden, weights, ids).isfinite().all()
    with pytest.raises(GradientError):
        layer.requires_grad_(True)(hidden.detach(), weights, ids)


@pytest.mark.parametrize("sizes", [(0, H, I), (E, -1, I), (E, H, 1.5)])
def test_sizes_are_checked(sizes):
    with pytest.raises(ShapeError, match="an integer above 0"):
        FusedExperts(*sizes)


@pytest.mark.parametrize(
    "options", [{"activation": "nope"}, {"gate_up_layout": "up_first"}, {"weight_layout": "NN"}], ids=str
)
def test_options_are_checked(options):
    with pytest.raises(OptionError):
        FusedExperts(E, H, I, **options)


def test_repr():
    text = repr(FusedExperts(E, H, I, weight_layout="KN", dtype=torch.float16))
    assert "4, 32, 24" in text and "'silu'" in text and "weight_layout='KN'" in text and "torch.float16" in text
    assert "gate_up_layout" not in text
