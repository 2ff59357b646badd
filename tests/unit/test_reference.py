"""The reference against the formula written out with Python numbers, slot by slot."""

from __future__ import annotations

import math

import pytest
import torch

from fusedmoe import reference
from fusedmoe.errors import DTypeError, OptionError
from fusedmoe.spec.activation import TABLE, Activation

ACTIVATIONS = [
    Activation("silu"),
    Activation("silu", limit=0.5),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("swigluoai"),
    Activation("swigluoai", alpha=1.2, beta=0.3, limit=0.6),
    Activation("swiglustep", limit=0.4),
    Activation("situ", beta=1.5),
    Activation("situ", beta=1.5, linear_beta=0.8),
    Activation("silu_no_mul"),
    Activation("gelu_no_mul"),
    Activation("gelu_tanh_no_mul"),
    Activation("relu2_no_mul"),
]


def sigmoid(z: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * z))


def scalar(p: Activation, g: float, u: float) -> float:
    """The table of spec/activation.py, on numbers; u is 1 for those that are not gated."""
    name = p.name.removesuffix("_no_mul")
    if name == "silu":
        if p.limit is not None:
            g, u = min(g, p.limit), max(-p.limit, min(u, p.limit))
        return g * sigmoid(g) * u
    if name == "gelu":
        return g * 0.5 * math.erfc(-g / math.sqrt(2.0)) * u
    if name == "gelu_tanh":
        return g * sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (g + 0.044715 * g**3)) * u
    if name == "relu2":
        return max(g, 0.0) ** 2 * u
    if name == "swigluoai":
        g, u = min(g, p.limit), max(-p.limit, min(u, p.limit))
        return g * sigmoid(p.alpha * g) * (u + p.beta)
    if name == "swiglustep":
        return min(g * sigmoid(g), p.limit) * max(-p.limit, min(u, p.limit))
    assert name == "situ"
    if p.linear_beta is not None:
        u = p.linear_beta * math.tanh(u / p.linear_beta)
    return p.beta * math.tanh(g / p.beta) * sigmoid(g) * u


def naive(x, w13, w2, weights, ids, p, *, interleaved=False, b1=None, b2=None, on_input=False, local=None):
    """Token by token, slot by slot; matrices [E, out, in]; ``local`` maps an id to an expert or None."""
    n_experts, n_rows, _ = w13.shape
    n_inner = w2.shape[2]
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            i = int(ids[t, j])
            e = (i if 0 <= i < n_experts else None) if local is None else local(i)
            if e is None:
                continue
            w = float(weights[t, j])
            h = [float(torch.dot(w13[e, r], x[t])) * (w if on_input else 1.0) for r in range(n_rows)]
            h = [v + (0.0 if b1 is None else float(b1[e, r])) for r, v in enumerate(h)]
            if not p.gated:
                a = [scalar(p, v, 1.0) for v in h]
            elif interleaved:
                a = [scalar(p, h[2 * i], h[2 * i + 1]) for i in range(n_inner)]
            else:
                a = [scalar(p, h[i], h[n_inner + i]) for i in range(n_inner)]
            y = w2[e] @ torch.tensor(a, dtype=torch.float64)
            y = y + (0.0 if b2 is None else b2[e])
            out[t] += y if on_input else w * y
    return out


def inputs(p: Activation, tokens=4, top_k=3, experts=5, hidden=7, inner=6, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, fan_in=1):
        return torch.randn(*shape, generator=g, dtype=torch.float64) / math.sqrt(fan_in)

    rows = inner * (2 if p.gated else 1)
    ids = torch.randint(0, experts, (tokens, top_k), generator=g)
    return {
        "x": draw(tokens, hidden),
        "w13": draw(experts, rows, hidden, fan_in=hidden),
        "w2": draw(experts, hidden, inner, fan_in=inner),
        "weights": torch.rand(tokens, top_k, generator=g, dtype=torch.float64),
        "ids": ids,
        "b1": draw(experts, rows),
        "b2": draw(experts, hidden),
    }


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_every_activation_is_tested():
    assert {p.name for p in ACTIVATIONS} == set(TABLE)


@pytest.mark.parametrize("p", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_activation_is_its_equation(p, layout):
    g = torch.tensor([-30.0, -3.0, -0.7, -1e-9, 0.0, 0.2, 0.55, 0.9, 6.9, 7.1, 40.0], dtype=torch.float64)
    u = torch.tensor([1.0, -9.0, 0.3, 0.5, -0.1, 8.0, -0.65, 0.7, 7.5, -7.5, 2.0], dtype=torch.float64)
    if not p.gated:
        h, up = g, torch.ones_like(g)
    else:
        h, up = (torch.cat([g, u]) if layout == "concatenated" else torch.stack([g, u], 1).flatten()), u
    wanted = [scalar(p, a, b) for a, b in zip(g.tolist(), up.tolist(), strict=True)]
    got = reference.activate(h, p, layout)
    assert got.dtype == torch.float64
    close(got, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("p", ACTIVATIONS, ids=str)
def test_activation_keeps_nan_and_dtype(p):
    h = torch.full((2, 4), math.nan)
    h[1] = 1.0
    got = reference.activate(h, p, "concatenated")
    assert got.dtype == torch.float32
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("p", ACTIVATIONS, ids=str)
def test_layer_is_its_formula(p, on_input):
    i = inputs(p)
    got = reference.fused_experts(
        i["x"], i["w13"], i["w2"], i["weights"], i["ids"], activation=p,
        w13_bias=i["b1"], w2_bias=i["b2"], apply_router_weight_on_input=on_input,
    )  # fmt: skip
    wanted = naive(
        i["x"], i["w13"], i["w2"], i["weights"], i["ids"], p, b1=i["b1"], b2=i["b2"], on_input=on_input
    )  # fmt: skip
    close(got, wanted)


@pytest.mark.parametrize("weight_layout", ["NK", "KN"])
@pytest.mark.parametrize("gate_up_layout", ["concatenated", "interleaved"])
def test_layouts(gate_up_layout, weight_layout):
    p = Activation("swigluoai")
    i = inputs(p)
    stored = (lambda w: w.transpose(1, 2).contiguous()) if weight_layout == "KN" else (lambda w: w)
    got = reference.fused_experts(
        i["x"], stored(i["w13"]), stored(i["w2"]), i["weights"], i["ids"],
        activation=p, gate_up_layout=gate_up_layout, weight_layout=weight_layout, w13_bias=i["b1"],
    )  # fmt: skip
    interleaved = gate_up_layout == "interleaved"
    wanted = naive(i["x"], i["w13"], i["w2"], i["weights"], i["ids"], p, interleaved=interleaved, b1=i["b1"])
    close(got, wanted)


def test_ids_that_name_no_expert_add_exactly_zero():
    p = Activation("silu")
    i = inputs(p, tokens=3)
    ids = torch.tensor([[-1, 2, 5], [6, 2**31 - 1, -(2**63)], [0, 0, -7]])
    weights = i["weights"].clone()
    weights[(ids < 0) | (ids >= 5)] = math.nan
    got = reference.fused_experts(i["x"], i["w13"], i["w2"], weights, ids, w2_bias=i["b2"])
    close(got, naive(i["x"], i["w13"], i["w2"], weights, ids, p, b2=i["b2"]))
    assert got[1].tolist() == [0.0] * 7
    assert not torch.signbit(got[1]).any()


def test_duplicates_count_twice():
    i = inputs(Activation("silu"), tokens=2, top_k=1)
    once = reference.fused_experts(i["x"], i["w13"], i["w2"], i["weights"], i["ids"])
    twice = reference.fused_experts(
        i["x"], i["w13"], i["w2"], i["weights"].expand(2, 2), i["ids"].expand(2, 2)
    )  # fmt: skip
    close(twice, 2 * once)


def test_expert_map():
    p = Activation("silu")
    i = inputs(p, tokens=4, top_k=3)
    table = torch.tensor([3, -1, 0, 5, 4, -(2**31), 1, 2], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8], [-1, 100, 0]])

    def local(e: int):
        mapped = int(table[e]) if 0 <= e < 8 else -1
        return mapped if 0 <= mapped < 5 else None

    got = reference.fused_experts(i["x"], i["w13"], i["w2"], i["weights"], ids, expert_map=table)
    close(got, naive(i["x"], i["w13"], i["w2"], i["weights"], ids, p, local=local))
    got = reference.fused_experts(
        i["x"], i["w13"], i["w2"], i["weights"], ids, expert_map=table, global_num_experts=7
    )  # fmt: skip
    close(got, naive(i["x"], i["w13"], i["w2"], i["weights"], ids, p, local=lambda e: local(e) if e < 7 else None))


def test_low_precision_inputs_are_widened_first():
    i = inputs(Activation("silu"), tokens=5)
    low = [i[name].bfloat16() for name in ("x", "w13", "w2")]
    got = reference.fused_experts(*low, i["weights"].float(), i["ids"].int())
    assert got.dtype == torch.float64
    close(got, naive(*(t.double() for t in low), i["weights"].float(), i["ids"], Activation("silu")))
    single = reference.fused_experts(*low, i["weights"], i["ids"], dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"gate_up_layout": "halves"}, OptionError),
        ({"weight_layout": "nk"}, OptionError),
        ({"activation": "swish"}, OptionError),
        ({"dtype": torch.bfloat16}, DTypeError),
    ],
)
def test_unknown_options_are_refused(option, error):
    i = inputs(Activation("silu"))
    with pytest.raises(error, match="wanted"):
        reference.fused_experts(i["x"], i["w13"], i["w2"], i["weights"], i["ids"], **option)
