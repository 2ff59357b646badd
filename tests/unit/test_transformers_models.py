"""Every experts class of Transformers as itself and as "fusedmoe", in a model and alone; the table of gates."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from tiny_models import build, draw, experts_class, experts_classes, experts_of, relative, routing, run, small_config
from torch import nn
from transformers import activations

import fusedmoe
from fusedmoe.integrations.transformers import NAME, gates

CLASSES = experts_classes()


def test_the_classes_are_found():
    assert len(CLASSES) > 30 and {"mixtral.MixtralExperts", "gpt_oss.GptOssExperts"} <= set(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_logits(name, calls):
    model = build(name)
    want = run(model, "eager")
    assert not calls
    got = run(model, NAME)
    assert calls, "the implementation ran"
    assert want.isfinite().all()
    assert relative(got, want) < 2e-6
    for experts in experts_of(model, name):
        draw(experts, seed=7)
    assert relative(run(model, NAME), want) > 1e-3, "experts matter"


@pytest.mark.parametrize("name", CLASSES)
def test_module_alone_with_experts_of_other_ranks(name):
    """Ids outside [0, E) add nothing, whatever their weight; the oracle is the module's own forward in float64."""
    model = build(name)
    experts = experts_of(model, name)[0]
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    n_experts, n_hidden = first.shape[0], first.shape[1 if experts.is_transposed else 2]
    for tokens in (1, 13):
        x = torch.randn(tokens, n_hidden, generator=torch.Generator().manual_seed(3))
        weights, ids = routing(tokens, 2, n_experts)
        away = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.3
        elsewhere = torch.tensor([-1, n_experts, n_experts + 3])[torch.arange(ids.numel()) % 3].view_as(ids)
        with torch.no_grad():
            experts.config._experts_implementation = "eager"
            exact = copy.deepcopy(experts).double()
            want = exact(x.double(), ids, weights.double().masked_fill(away, 0))
            experts.config._experts_implementation = NAME
            got = experts(x, ids.where(~away, elsewhere), weights.masked_fill(away, torch.nan))
        assert got.dtype == x.dtype and got.shape == x.shape
        torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)


def module_with(apply_gate, act_fn=None, **attributes):
    """An experts module of which only the gate matters."""
    module = nn.Module()
    module.act_fn = act_fn
    for name, value in {"has_gate": True, "config": None, **attributes}.items():
        setattr(module, name, value)
    module._apply_gate = types.MethodType(apply_gate, module)
    return module


def check_gate(module):
    """What the table says of a module is what the module computes, far from the origin too."""
    gate = gates.gate_of(module)
    assert gate is not None
    h = torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 8
    want = gates.activated(module, h)
    got = fusedmoe.reference.activate(h, gate.activation, gate.layout)
    torch.testing.assert_close(got.to(want.dtype), want, atol=1e-5 if want.dtype == torch.float32 else 1e-6, rtol=1e-6)


def test_every_row_of_the_table_is_what_transformers_computes():
    met = {"FP8Experts._apply_gate"}  # has a test of its own
    classes = {name.split(".")[1] for name in CLASSES} | {"_default_apply_gate", "FP8Experts"}
    for name in CLASSES:
        module = experts_of(build(name), name)[0]
        if not module.has_gate:
            continue
        check_gate(module)
        met.add(type(module)._apply_gate.__qualname__)
    assert met <= set(gates.GATES), "each gate of Transformers is fused"
    # Older versions lack some classes.
    assert met == {row for row in gates.GATES if row.split(".")[0] in classes}, "no row is left over"


@pytest.mark.parametrize("row", ["DeepseekV4Experts._apply_gate", "HYV4Experts._apply_gate"])
def test_a_limit_of_zero_is_left_to_the_module(row):
    def gate(limit):
        return gates.GATES[row](types.SimpleNamespace(act_fn=nn.SiLU(), limit=limit, swiglu_limit=limit))

    assert gate(0.0) is None and gate(-1.0) is None
    assert gate(3.0) == gates.Gate(fusedmoe.Activation("silu", limit=3.0))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python", "gelu"),
        ("relu2", "relu2"),
        ("quick_gelu", None),
        ("mish", None),
        ("relu", None),
        ("gelu_10", None),
    ],
)
def test_activation_functions(name, known):
    act_fn = activations.ACT2FN[name]
    default = gates_default()
    gated = module_with(default, act_fn)
    single = module_with(default, act_fn, has_gate=False)
    if known is None:
        assert gates.gate_of(gated) is None and gates.gate_of(single) is None
        return
    assert gates.gate_of(gated).activation.name == known
    check_gate(gated)
    check_gate(single)


def gates_default():
    return experts_class("mixtral.MixtralExperts")._apply_gate


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"limit": 2.0},
        {"swiglu_alpha": 1.5, "swiglu_limit": 3.0, "limit": 3.0},
        {"gate_softcap": 4.0, "up_softcap": 5.0},
        {"act_fn": activations.ACT2FN["gelu_pytorch_tanh"]},
    ],
)
def test_gate_of_fp8_experts(attributes):
    from transformers.integrations.finegrained_fp8 import FP8Experts

    none = dict.fromkeys(("limit", "swiglu_alpha", "swiglu_limit", "gate_softcap", "up_softcap"))
    module = module_with(FP8Experts._apply_gate, **{"act_fn": nn.SiLU(), **none, **attributes})
    reads = FP8Experts._apply_gate.__code__.co_names
    if not set(attributes) <= set(reads):
        pytest.skip("this version of Transformers has no such gate")
    check_gate(module)


def test_a_gate_of_somebody_else_is_not_taken_for_a_known_one():
    class MixtralExperts(experts_class("mixtral.MixtralExperts")):
        def _apply_gate(self, gate_up):
            return gate_up.chunk(2, -1)[1]

    mine = MixtralExperts(small_config())
    assert gates.gate_of(mine) is None
    renamed = type("Parametrized", (experts_class("mixtral.MixtralExperts"),), {})(small_config())
    assert gates.gate_of(renamed) is not None


@pytest.mark.parametrize("kind", ["gate", "activation", "not gated", "norm", "biased norm"])
def test_between_two_products(kind, calls):
    experts = experts_class("mixtral.MixtralExperts")(small_config())
    draw(experts)
    if kind == "gate":
        experts._apply_gate = types.MethodType(lambda self, h: torch.cos(h[..., :24]) * h[..., 24:], experts)
    elif kind == "activation":
        experts.act_fn = activations.ACT2FN["mish"]
    elif kind == "not gated":
        experts.has_gate, experts.act_fn = False, activations.ACT2FN["mish"]
        experts.up_proj = nn.Parameter(experts.gate_up_proj[:, :24].detach())
    else:
        experts.has_post_expert_norm = True
        experts.post_expert_norm = nn.LayerNorm(32, bias=kind == "biased norm")
        nn.init.normal_(experts.post_expert_norm.weight)
        if kind == "biased norm":
            nn.init.normal_(experts.post_expert_norm.bias)
    x = torch.randn(9, 32)
    weights, ids = routing(9, 2, 4)
    ids[0, 0], ids[1], ids[2, 1] = -1, 4, 99
    weights[1] = torch.nan
    w13 = experts.gate_up_proj if experts.has_gate else experts.up_proj
    exact = copy.deepcopy(experts).double()
    want = torch.zeros(9, 32, dtype=torch.float64)
    with torch.no_grad():
        for t in range(9):
            for j in range(2):
                e = ids[t, j].item()
                if 0 <= e < 4:
                    h = gates.activated(exact, (w13[e].double() @ x[t].double())[None])[0]
                    y = exact.down_proj[e] @ h
                    y = exact.post_expert_norm(y) if "norm" in kind else y
                    want[t] += weights[t, j].double() * y
        got = experts(x, ids, weights)
    assert [name for name, *_ in calls] == ["expert_linear"] * 2
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
