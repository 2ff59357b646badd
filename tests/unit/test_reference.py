"""The reference against the formula written out with Python numbers, slot by slot."""

from __future__ import annotations

import bisect
import functools
import math

import pytest
import torch

from fusedmoe import reference
from fusedmoe.errors import DTypeError, OptionError
from fusedmoe.numerics import quantise_inputs
from fusedmoe.quantization import quantize
from fusedmoe.schemes import SCHEMES, format_of, formats_of
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
    Activation("identity_no_mul"),
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
    if name == "identity":
        return g * u
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


# --- quantised ----------------------------------------------------------------------------------------------------

#: Blocks that divide neither the rows nor the columns.
FORMATS = [form for scheme in SCHEMES for form in formats_of(scheme, block=(24, 48))]
DYNAMIC = [
    ("fp8_channel", "token"), ("fp8_tensor", "tensor"), ("fp8_block", "group"),
    ("int8_w8a8", "token"), ("int8_w8a8", "tensor"), ("int8_w8a8", "group"),
]  # fmt: skip


@functools.cache
def codes_of(element: str) -> list[float]:
    """Values of a float8 from 0 up; the index is the code."""
    dtype = torch.float8_e4m3fn if element == "e4m3" else torch.float8_e4m3fnuz
    return torch.arange(127 if element == "e4m3" else 128).to(torch.uint8).view(dtype).double().tolist()


def nearest(v: float, element: str) -> float:
    """The nearest value, of two the even code, and the last where there is no more."""
    if element == "int8":
        return min(max(round(v), -128), 127)
    values = codes_of(element)
    i = bisect.bisect_left(values, abs(v))
    if i == len(values) or i and (abs(v) - values[i - 1], (i - 1) % 2) < (values[i] - abs(v), i % 2):
        i -= 1
    return math.copysign(values[i], v)


def as_codes(rows, matrix):
    """Rows, by name, as codes times scales; each value on its own. As they are where the format says nothing."""
    inputs = getattr(getattr(matrix, "format", None), "inputs", None)
    if inputs is None:
        return rows
    largest = {"e4m3": 448.0, "e4m3fnuz": 240.0, "int8": 127.0}[inputs.element]
    everything = max(float(row.abs().max()) for row in rows.values())
    out = {}
    for name, row in rows.items():
        back = []
        for run in row.split(inputs.group or len(row)):
            amax = everything if inputs.mode == "tensor" else float(run.abs().max())
            s = float(matrix.input_scale) if inputs.mode == "static" else max(amax, 1e-10) / largest
            back += [nearest(v / s, inputs.element) * s for v in run.tolist()]
        out[name] = torch.tensor(back, dtype=torch.float64)
    return out


def numbers(matrix):
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dequantize(torch.float64)


def naive_quantised(x, w13, w2, weights, ids, p, *, interleaved=False, b1=None, b2=None, on_input=False):
    """Slot by slot, from the equation; the rows of both matrices go through codes where their formats say so."""
    w1_all, w2_all = numbers(w13), numbers(w2)
    slots = [(t, j) for t in range(x.shape[0]) for j in range(ids.shape[1]) if 0 <= ids[t, j] < w1_all.shape[0]]
    x_codes = as_codes({t: x[t] for t, _ in slots}, w13)
    a = {}
    for t, j in slots:
        e, w = int(ids[t, j]), float(weights[t, j])
        h = (w1_all[e] @ x_codes[t]) * (w if on_input else 1.0) + (0.0 if b1 is None else b1[e])
        if not p.gated:
            pairs = [(v, 1.0) for v in h.tolist()]
        elif interleaved:
            pairs = zip(h[0::2].tolist(), h[1::2].tolist(), strict=True)
        else:
            pairs = zip(h[: len(h) // 2].tolist(), h[len(h) // 2 :].tolist(), strict=True)
        a[t, j] = torch.tensor([scalar(p, g, u) for g, u in pairs], dtype=torch.float64)
    out = torch.zeros(x.shape[0], w2_all.shape[1], dtype=torch.float64)
    for (t, j), row in as_codes(a, w2).items():
        y = w2_all[int(ids[t, j])] @ row + (0.0 if b2 is None else b2[int(ids[t, j])])
        out[t] += y if on_input else float(weights[t, j]) * y
    return out


def quantised(i, form13, form2, *, parts=1, static=(0.02, 0.01)):
    """Both matrices quantised, with static scales that some rows exceed."""
    out = []
    for w, form, n_parts, scale in ((i["w13"], form13, parts, static[0]), (i["w2"], form2, 1, static[1])):
        is_static = form is not None and form.inputs is not None and form.inputs.mode == "static"
        out.append(w if form is None else quantize(w, form, parts=n_parts, input_scale=scale if is_static else None))
    return out


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format_is_its_equation(form):
    """With options that change from format to format; ids that name no expert, and a row of zeros, are always there."""
    turn = FORMATS.index(form)
    p = ACTIVATIONS[turn % len(ACTIVATIONS)]
    interleaved, on_input, bias = (bool(turn >> bit & 1) for bit in range(3))
    i = inputs(p, tokens=4, top_k=2, experts=3, hidden=128, inner=128, seed=turn)
    i["x"][1] = 0.0
    i["x"][2] *= 1e3
    i["ids"][2] = torch.tensor([-1, 7])
    w13, w2 = quantised(i, form, form, parts=2 if p.gated and not interleaved else 1)
    arguments = (i["x"], w13, w2, i["weights"], i["ids"])
    b1, b2 = (i["b1"], i["b2"]) if bias else (None, None)
    got = reference.fused_experts(
        *arguments, activation=p, gate_up_layout="interleaved" if interleaved else "concatenated",
        w13_bias=b1, w2_bias=b2, apply_router_weight_on_input=on_input, emulate=bool(turn % 2),
    )  # fmt: skip
    wanted = naive_quantised(*arguments, p, interleaved=interleaved, b1=b1, b2=b2, on_input=on_input)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert wanted[0].abs().max() > 1e-3 and got[2].tolist() == [0.0] * 128


@pytest.mark.parametrize("schemes", [(None, "fp8_block"), ("int8_w8a8", None), ("mxfp4_fp8", "int4_w4a16")])
def test_each_matrix_has_a_format_of_its_own(schemes):
    p = Activation("swigluoai")
    i = inputs(p, tokens=5, top_k=2, experts=3, hidden=128, inner=128)
    w13, w2 = quantised(i, *(None if s is None else format_of(s) for s in schemes))
    arguments = (i["x"], w13, w2, i["weights"], i["ids"])
    close(reference.fused_experts(*arguments, activation=p), naive_quantised(*arguments, p))
    single = reference.fused_experts(*arguments, activation=p, dtype=torch.float32)
    assert single.dtype == torch.float32
    assert float((single - naive_quantised(*arguments, p)).norm()) < 1e-2 * float(single.norm())


@pytest.mark.parametrize(("scheme", "mode"), DYNAMIC)
def test_rows_that_are_codes_already(scheme, mode):
    i = inputs(Activation("silu"), tokens=4, top_k=2, experts=3, hidden=128, inner=128)
    form = format_of(scheme, inputs=mode, block=(64, 48) if mode == "group" else None)
    w13, w2 = quantised(i, form, form)
    g = torch.Generator().manual_seed(3)
    codes = torch.randint(-100, 100, (4, 128), generator=g).to(w13.data.dtype)
    groups = 3 if mode == "group" else 1
    for shape in [(4, groups)] if mode == "group" else [(4, 1), (4,), (1,), (), (1, 1)]:
        scale = torch.rand(shape, generator=g) / 50
        full = scale.reshape(-1, groups).expand(4, groups).tolist()
        factors = [[full[t][k // 48 if groups > 1 else 0] for k in range(128)] for t in range(4)]
        x = codes.double() * torch.tensor(factors, dtype=torch.float64)
        plain = w13.dequantize(torch.float64)
        got = reference.fused_experts(codes, w13, w2, i["weights"], i["ids"], hidden_states_scale=scale)
        close(got, naive_quantised(x, plain, w2, i["weights"], i["ids"], Activation("silu")))


@pytest.mark.parametrize(("scheme", "mode"), DYNAMIC)
def test_rows_do_not_leak_into_each_other(scheme, mode):
    """NaN fills its token and no other; a token without experts sets no scale; nought stays nought."""
    i = inputs(Activation("silu"), tokens=6, top_k=2, experts=3, hidden=128, inner=128)
    form = format_of(scheme, inputs=mode)
    w13, w2 = quantised(i, form, form)
    i["ids"][4] = -1
    i["x"][5] = 0.0
    clean = reference.fused_experts(i["x"], w13, w2, i["weights"], i["ids"])
    assert clean[5].tolist() == [0.0] * 128 and clean[4].tolist() == [0.0] * 128
    x = i["x"].clone()
    x[1, 17] = math.nan
    x[4] = 1e30
    got = reference.fused_experts(x, w13, w2, i["weights"], i["ids"])
    assert got[1].isnan().all()
    # Of mode "tensor" the largest may have been in the row that is NaN now.
    others = [0, 2, 3, 4, 5]
    if mode != "tensor":
        assert torch.equal(got[others], clean[others])
    else:
        assert float((got[others] - clean[others]).norm()) < 0.1 * float(clean[others].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "mode"), DYNAMIC)
def test_rows_are_quantised_in_their_own_type(scheme, mode, dtype):
    """float32 at least: bfloat16 rows have ties, which an arithmetic in float64 would break in its own way."""
    i = inputs(Activation("silu"), tokens=40, top_k=2, experts=3, hidden=128, inner=128)
    form = format_of(scheme, inputs=mode)
    w13, w2 = quantised(i, form, None)
    x = i["x"].to(dtype)
    codes, scale = quantise_inputs(x, form.inputs)
    want = reference.fused_experts(codes, w13, w2, i["weights"], i["ids"], hidden_states_scale=scale)
    assert torch.equal(reference.fused_experts(x, w13, w2, i["weights"], i["ids"]), want)


def test_an_expert_matrix_is_nk():
    i = inputs(Activation("silu"), hidden=128, inner=128)
    w13, w2 = quantised(i, format_of("fp8_block"), None)
    with pytest.raises(OptionError, match="weight_layout of an ExpertMatrix: got 'KN'; wanted 'NK'"):
        reference.fused_experts(i["x"], w13, w2, i["weights"], i["ids"], weight_layout="KN")
