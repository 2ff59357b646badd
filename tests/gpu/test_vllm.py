"""vLLM's Triton experts and the plugin's in vLLM's own modular kernel, over the sizes of vLLM's tests of these experts.

Ours against the reference, and the two classes against each other wherever vLLM's takes the layer.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
import vllm_driver

import fusedmoe
from fusedmoe.bench import draw_layer
from fusedmoe.bench.shapes import Shape
from fusedmoe.integrations.vllm import experts_class
from fusedmoe.testing.verify import relative_error, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.filterwarnings("default"),
]

#: (tokens, intermediate, hidden) of vLLM's tests/kernels/moe/test_moe.py.
PLAIN = [(1, 128, 128), (1, 2048, 128), (33, 2048, 128), (32768, 2048, 511), (40000, 1024, 1024)]
WEIGHT_ONLY = [(1, 128, 128), (1, 1024, 1024), (32, 2048, 128), (222, 2048, 1024)]
EXPERTS, TOP_K, RANKS = (8, 64, 192), (2, 6), (1, 4)
every = pytest.mark.parametrize


@pytest.fixture(scope="module")
def benchmark():
    with vllm_driver.driver("cuda") as module:
        yield module


def drawn(size, n_experts, top_k, ranks, quantised=None):
    """A layer with one rank's share of the experts, arguments with ids of all, and the map from one to the other."""
    tokens, intermediate, hidden = size
    local = n_experts // ranks
    shape = Shape("", local, top_k, hidden, intermediate)
    layer = draw_layer(shape, dtype=torch.bfloat16, device=torch.device("cuda"), scheme="none")
    if quantised is not None:
        layer = layer._replace(w13=quantised(layer.w13), w2=quantised(layer.w2))
    x = torch.randn(tokens, hidden, generator=layer.generator, device="cuda", dtype=torch.bfloat16) / 10
    scores = torch.rand(tokens, n_experts, generator=layer.generator, device="cuda")
    weights, ids = scores.softmax(1).topk(top_k)
    found = None
    if ranks > 1:
        found = torch.full((n_experts,), -1, device="cuda", dtype=torch.int32)
        theirs = torch.randperm(n_experts, generator=layer.generator, device="cuda")[:local]
        found[theirs] = torch.arange(local, device="cuda", dtype=torch.int32)
    return layer, (x, weights, ids.int()), found


def compare(benchmark, layer, rows, found, base="TritonExperts"):
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    theirs = getattr(triton_moe, base)
    layer = layer._replace(w13=benchmark.as_vllm_has(layer.w13), w2=benchmark.as_vllm_has(layer.w2))
    x, weights, ids = rows
    moe, quant = benchmark.configured(layer, x.shape[0])
    n_experts = layer.shape.experts if found is None else found.numel()
    given = {**benchmark.operands(layer, *rows), "expert_map": found, "global_num_experts": n_experts}
    out = benchmark.kernel(experts_class(theirs), moe, quant).apply(activation=moe.activation, **given).clone()
    options = {**layer.options, "expert_map": found}
    verdict = verify(out, (x, layer.w13, layer.w2, weights, ids), options)
    # One scale for all rows vLLM's prepare step takes from all, the reference from those with an expert here.
    form = getattr(layer.w13, "format", None)
    twice = found is not None and form is not None and form.inputs is not None and form.inputs.mode == "tensor"
    assert verdict.error < verdict.tolerance * (2 if twice else 1), verdict
    try:
        other = benchmark.kernel(theirs, moe, quant).apply(activation=moe.activation, **given)
    except (AssertionError, TypeError):  # 0.22.1: rows of int8; weight-only matrices of few tokens
        return
    assert relative_error(out, other) < 2 * verdict.tolerance


@every("padding", [True, False])
@every("ranks", RANKS)
@every("top_k", TOP_K)
@every("n_experts", EXPERTS)
@every("size", PLAIN)
def test_as_they_are(benchmark, size, n_experts, top_k, ranks, padding):
    layer, rows, found = drawn(size, n_experts, top_k, ranks)
    if padding:
        w13, w2 = (torch.nn.functional.pad(w, (0, 128))[..., :-128] for w in (layer.w13, layer.w2))
        layer = layer._replace(w13=w13, w2=w2)
    compare(benchmark, layer, rows, found)


@every("scheme", ["int4_w4a16", "int8_w8a16"])
@every("zero", [True, False])
@every("group", [64, 128])
@every("ranks", RANKS)
@every("top_k", TOP_K)
@every("n_experts", EXPERTS)
@every("size", WEIGHT_ONLY)
def test_weight_only(benchmark, size, n_experts, top_k, ranks, group, zero, scheme):
    def quantised(w):
        return fusedmoe.quantize(w, scheme, group=group, zero=zero)

    compare(benchmark, *drawn(size, n_experts, top_k, ranks, quantised), base="TritonWNA16Experts")


@every("scheme", ["fp8_block", "fp8_channel", "fp8_tensor", "int8_w8a8"])
@every("ranks", RANKS)
@every("top_k", TOP_K)
@every("n_experts", EXPERTS)
@every("size", WEIGHT_ONLY)
def test_quantised_rows(benchmark, size, n_experts, top_k, ranks, scheme):
    def quantised(w):  # with a scale for each row vLLM 0.22.1 takes the first expert's scale of weights for all
        return fusedmoe.quantize(w, scheme, **({"inputs": "tensor"} if scheme == "fp8_tensor" else {}))

    compare(benchmark, *drawn(size, n_experts, top_k, ranks, quantised))
