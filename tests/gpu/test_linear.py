"""expert_linear on a GPU at real sizes: every kind of kernel, formats, absent experts, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe.numerics import quantise_inputs, spread_input_scale
from fusedmoe.target import target_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

E, N, K, TOP_K = 24, 1544, 1024, 4


def draw(tokens):
    g = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, K, device="cuda", generator=g).bfloat16()
    w = (torch.randn(E, N, K, device="cuda", generator=g) / K**0.5).bfloat16()
    bias = torch.randn(E, N, device="cuda", generator=g).bfloat16()
    ids = torch.randint(-2, E + 2, (tokens, TOP_K), device="cuda", generator=g)
    return x, w, bias, ids


def expected(x, w, bias, ids):
    """In float64, an expert at a time; ``w`` a function of the expert."""
    out = torch.zeros(*ids.shape, N, dtype=torch.float64, device="cuda")
    for e in range(E):
        t, j = torch.where(ids == e)
        out[t, j] = x[t].double() @ w(e).double().T + bias[e].double()
    return out


@pytest.mark.parametrize("scheme", [None, "fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4"])
@pytest.mark.parametrize("tokens", [1, 8, 300, 4096])
@pytest.mark.parametrize("backend", ["auto", "triton", "gluon_sm90", "torch"])
def test_rows(tokens, backend, scheme):
    x, w, bias, ids = draw(tokens)
    matrix = w if scheme is None else fusedmoe.quantize(w.float(), scheme)
    if backend == "gluon_sm90" and (target_of(x.device).arch != "sm_90" or tokens < 300):
        pytest.skip("not for these kernels")
    rows = x
    if isinstance(matrix, fusedmoe.ExpertMatrix):
        if (inputs := matrix.format.inputs) is not None:
            codes, scale = quantise_inputs(x, inputs)
            rows = codes * spread_input_scale(scale, inputs, K)
        one = lambda e: matrix.dequantize_expert(e, torch.float64)  # noqa: E731
    else:
        one = lambda e: matrix[e]  # noqa: E731
    try:
        out = fusedmoe.expert_linear(x, matrix, ids, bias=bias, backend=backend)
    except fusedmoe.UnsupportedError as error:
        pytest.skip(str(error))
    want = expected(rows, one, bias, ids)
    # The result is rounded to bfloat16; weights that are decoded to bfloat16 before the product round too.
    error = ((out.double() - want).norm() / want.norm()).item() if want.any() else out.abs().max().item()
    assert error < 8e-3
    assert (out[(ids < 0) | (ids >= E)] == 0).all()


def test_transposed_storage_and_a_graph():
    x, w, bias, ids = draw(40)
    stored = w.transpose(1, 2).contiguous()
    call = lambda: fusedmoe.expert_linear(x, stored, ids, bias=bias, weight_layout="KN")  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    ids.copy_(ids.flip(0))
    graph.replay()
    want = expected(x, lambda e: w[e], bias, ids)
    assert ((out.double() - want).norm() / want.norm()).item() < 8e-3
