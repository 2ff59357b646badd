"""FusedExperts: parameters, initialisation, state dict, leading dimensions, and what it hands to fused_experts."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fusedmoe import expert_matrix
from fusedmoe.errors import GradientError, LayoutError, OptionError, ShapeError
from fusedmoe.functional import fused_experts
from fusedmoe.nn import FusedExperts
from fusedmoe.quantization import quantize
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


# ------------------------------------------------------------------------------------------------- quantised

FORMATS = [
    ("fp8_block", {"parts": 2}),
    ("fp8_tensor", {"parts": 2, "input_scale": 0.02}),
    ("int8_w8a8", {}),
    ("int4_w4a16", {"group": 32, "zero": True}),
    ("mxfp4", {}),
    ("nvfp4", {}),
]
QH, QI = 64, 96


def quantised(scheme="int4_w4a16", seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    w13, w2 = torch.randn(E, 2 * QI, QH, generator=generator) / 8, torch.randn(E, QH, QI, generator=generator) / 10
    return quantize(w13, scheme, **options), quantize(w2, scheme, **{**options, "parts": 1})


def tokens(n=7):
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(n, E, generator=generator).topk(TOP_K).indices
    return torch.randn(n, QH, generator=generator), torch.rand(n, TOP_K, generator=generator), ids


@pytest.mark.parametrize(("scheme", "options"), FORMATS)
def test_quantised_layer_is_the_function(scheme, options):
    w13, w2 = quantised(scheme, **options)
    layer = FusedExperts.of(w13, w2)
    hidden, weights, ids = tokens()
    assert torch.equal(layer(hidden, weights, ids), fused_experts(hidden, w13, w2, weights, ids))
    assert (layer.num_experts, layer.hidden_size, layer.intermediate_size) == (E, QH, QI)
    assert layer.w13.data_ptr() == w13.data.data_ptr() and str(w13.format) in repr(layer)


@pytest.mark.parametrize(("scheme", "options"), FORMATS)
def test_quantised_state_dict(scheme, options, tmp_path):
    source = FusedExperts.of(*quantised(scheme, **options), w2_bias=torch.randn(E, QH))
    target = FusedExperts.of(*quantised(scheme, seed=1, **options), w2_bias=torch.zeros(E, QH))
    other = target(*tokens())
    save_file = pytest.importorskip("safetensors.torch").save_file
    state = source.state_dict()
    save_file(state, tmp_path / "state.safetensors")  # tensors only, so that any file of tensors can hold it
    target.load_state_dict(state)
    assert torch.equal(target(*tokens()), source(*tokens()))
    assert not torch.equal(target(*tokens()), other)
    assigned = FusedExperts.of(*quantised(scheme, seed=1, **options), w2_bias=torch.zeros(E, QH))
    assigned(*tokens())  # so that the matrices have been made once
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(*tokens()), source(*tokens()))
    assert torch.equal(copy.deepcopy(source)(*tokens()), source(*tokens()))


def test_state_dict_of_another_format_is_refused():
    four, eight = (FusedExperts.of(*quantised("int4_w4a16", group=32, zero=zero)) for zero in (True, False))
    with pytest.raises(OptionError, match="'zero': False.*wanted .*'zero': True"):
        four.load_state_dict(eight.state_dict())
    static = FusedExperts.of(*quantised("fp8_channel"))
    weight_only = FusedExperts.of(*quantised("fp8_w8a16", block=(1, 0)))
    with pytest.raises(OptionError, match="formats of quantised experts in a state dict: got .*fp8_w8a16.*wanted"):
        static.load_state_dict(weight_only.state_dict())


@pytest.mark.parametrize(("scheme", "options"), FORMATS)
def test_casts_leave_codes_and_scales(scheme, options):
    layer = FusedExperts.of(*quantised(scheme, **options), w2_bias=torch.randn(E, QH))
    before = {name: tensor.dtype for name, tensor in layer.state_dict().items() if "bias" not in name}
    wanted = layer(*tokens())
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.float32)):
        layer = change(layer)
        after = layer.state_dict()
        assert {name: tensor.dtype for name, tensor in after.items() if "bias" not in name} == before
    assert layer.w2_bias.dtype == torch.float32
    layer.w2_bias.data = layer.w2_bias.data.clone()
    assert (layer(*tokens()) - wanted).abs().max() < 0.02  # the bias was rounded
    assert {t.device.type for t in layer.to("meta").state_dict().values() if t.dtype != torch.uint8} <= {"meta"}
    empty = layer.to_empty(device="cpu")
    assert {n: t.dtype for n, t in empty.state_dict().items() if "bias" not in n} == before


def test_matrices_are_checked_once(monkeypatch):
    layer, made = FusedExperts.of(*quantised(group=32)), []
    original = expert_matrix.ExpertMatrix._check
    monkeypatch.setattr(expert_matrix.ExpertMatrix, "_check", lambda s, p: (made.append(1), original(s, p))[1])
    for _ in range(3):
        layer(*tokens())
    assert len(made) == 2
    layer.w2_scale = layer.w2_scale * 2
    doubled = layer(*tokens())
    assert len(made) == 3
    layer.w2_scale = layer.w2_scale / 2
    assert torch.allclose(doubled, 2 * layer(*tokens()), rtol=1e-5)


def test_one_matrix_may_stay_unquantised():
    (w13, w2), (_, plain) = quantised(group=32), (None, torch.randn(E, QH, QI))
    layer = FusedExperts.of(w13, plain)
    hidden, weights, ids = tokens()
    assert torch.equal(layer(hidden, weights, ids), fused_experts(hidden, w13, plain, weights, ids))
    assert "dtype=torch.float32" in repr(layer) and set(layer.formats.of) == {"w13"}
    with pytest.raises(OptionError, match="reset_parameters: got quantised experts"):
        layer.reset_parameters()
    with pytest.raises(ShapeError, match=r"w13: got .4, 192, 64.; wanted .4, 96, 64."):
        FusedExperts.of(w13, w2, activation="relu2_no_mul")


def test_expert_map_makes_ranks_add_up():
    w13, w2 = quantised(group=32)
    wanted = FusedExperts.of(w13, w2)(*tokens())
    total = 0
    for start, stop in ((0, 1), (1, E)):
        local = torch.full((E,), -1)
        local[start:stop] = torch.arange(stop - start)
        rank = FusedExperts.of(w13.experts(start, stop), w2.experts(start, stop), expert_map=local)
        assert "expert_map" not in rank.state_dict() and f"of {E} experts" in repr(rank)
        total = total + rank(*tokens())
    torch.testing.assert_close(total, wanted)


def test_hidden_states_that_are_codes():
    w13, w2 = quantised("fp8_channel")
    layer = FusedExperts.of(w13, w2, emulate=True)
    hidden, weights, ids = tokens(6)
    scale = hidden.abs().amax(1, keepdim=True) / 448
    codes = (hidden / scale).to(torch.float8_e4m3fn)
    got = layer(
        codes.view(2, 3, QH),
        weights.view(2, 3, TOP_K),
        ids.view(2, 3, TOP_K),
        hidden_states_scale=scale.view(2, 3, 1),
        dtype=torch.float32,
    )
    options = {"hidden_states_scale": scale, "dtype": torch.float32, "emulate": True}
    assert torch.equal(got.view(6, QH), fused_experts(codes, w13, w2, weights, ids, **options))


def test_compiled():
    layer = FusedExperts.of(*quantised(group=32))
    wanted = layer(*tokens())
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*tokens()), wanted)
