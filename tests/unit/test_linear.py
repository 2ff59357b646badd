"""expert_linear: one matrix of every expert, against a float64 loop; absent experts, layouts, formats, messages."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.errors import DTypeError, GradientError, OptionError, ShapeError
from fusedmoe.numerics import quantise_inputs, spread_input_scale

E, N, K, T, TOP_K = 5, 44, 36, 7, 3


def draw(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, K, generator=g).to(dtype)
    w = (torch.randn(E, N, K, generator=g) / K**0.5).to(dtype)
    bias = torch.randn(E, N, generator=g).to(dtype)
    ids = torch.randint(E, (T, TOP_K), generator=g)
    ids[0, 1], ids[2, 0], ids[3] = -1, E, torch.tensor([2**31 - 1, -7, E + 1])
    return x, w, bias, ids


def expected(x, w, bias, ids):
    out = torch.zeros(*ids.shape, w.shape[1], dtype=torch.float64)
    for t, j in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        e = ids[t, j].item()
        if 0 <= e < w.shape[0]:
            out[t, j] = w[e].double() @ x[t].double() + (0 if bias is None else bias[e].double())
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows(dtype, tolerance, layout, with_bias):
    x, w, bias, ids = draw(dtype)
    bias = bias if with_bias else None
    stored = w.transpose(1, 2).contiguous() if layout == "KN" else w
    out = fusedmoe.expert_linear(x, stored, ids, bias=bias, weight_layout=layout)
    assert out.shape == (T, TOP_K, N) and out.dtype == dtype
    want = expected(x, w, bias, ids)
    torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
    assert (out[3] == 0).all(), "absent experts, whatever their id, are zeros"


@pytest.mark.parametrize("scheme", ["fp8_w8a16", "int4_w4a16", "mxfp4", "fp8_channel"])
def test_quantised(scheme):
    x, w, bias, ids = draw()
    x, w = torch.nn.functional.pad(x, (0, 28)), torch.nn.functional.pad(w, (0, 28))
    matrix = fusedmoe.quantize(w, scheme, **({"group": 32} if scheme == "int4_w4a16" else {}))
    out = fusedmoe.expert_linear(x, matrix, ids, bias=bias)
    if (inputs := matrix.format.inputs) is not None:
        codes, scale = quantise_inputs(x, inputs, None)
        x = codes * spread_input_scale(scale, inputs, x.shape[1])
    torch.testing.assert_close(out.double(), expected(x, matrix.dequantize(), bias, ids), atol=1e-5, rtol=0)


def test_two_make_a_layer():
    x, w, _, ids = draw()
    weights = torch.rand(T, TOP_K)
    h = fusedmoe.expert_linear(x, w, ids).flatten(0, 1)
    gate, up = h.chunk(2, -1)
    h = torch.nn.functional.silu(gate) * up
    w2 = torch.randn(E, K, N // 2, generator=torch.Generator().manual_seed(1))
    rows = fusedmoe.expert_linear(h, w2, ids.reshape(-1, 1)).view(T, TOP_K, K)
    want = fusedmoe.fused_experts(x, w, w2, weights, ids)
    torch.testing.assert_close((rows * weights.unsqueeze(-1)).sum(1), want, atol=1e-4, rtol=1e-4)


def test_no_tokens_and_meta():
    x, w, _, ids = draw()
    assert fusedmoe.expert_linear(x[:0], w, ids[:0]).shape == (0, TOP_K, N)
    meta = (t.to("meta") for t in (x, w, ids))
    assert fusedmoe.expert_linear(*meta).shape == (T, TOP_K, N)


def test_compiled():
    x, w, bias, ids = draw()
    call = torch.compile(
        lambda x: fusedmoe.expert_linear(x, w, ids, bias=bias) * 2, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(call(x), 2 * fusedmoe.expert_linear(x, w, ids, bias=bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": torch.zeros(E, N, K + 1)}, ShapeError, r"w: got inner size 37; wanted 36, the width of hidden_states"),
        ({"w": torch.zeros(E, 0, K)}, ShapeError, r"w: got \[E, N, K\] = \(5, 0, 36\); wanted .*at least 1"),
        ({"w": torch.zeros(E, N, K).half()}, DTypeError, "w: got torch.float16; wanted torch.float32"),
        ({"bias": torch.zeros(E, K)}, ShapeError, r"bias: got shape \(5, 36\)"),
        ({"ids": torch.zeros(T, dtype=torch.int64)}, ShapeError, "topk_ids: got 1 dimensions"),
        ({"ids": torch.zeros(T + 1, 2, dtype=torch.int64)}, ShapeError, "topk_ids: got 8 rows; wanted 7"),
        ({"weight_layout": "NKK"}, OptionError, "weight_layout: got 'NKK'"),
        ({"x": torch.zeros(T, K, requires_grad=True)}, GradientError, "hidden_states requires grad"),
    ],
)
def test_messages(change, error, message):
    x, w, bias, ids = draw()
    given = {"x": x, "w": w, "ids": ids, "bias": bias, "weight_layout": "NK"} | change
    with pytest.raises(error, match=message):
        fusedmoe.expert_linear(
            given["x"], given["w"], given["ids"], bias=given["bias"], weight_layout=given["weight_layout"]
        )
