"""After warmup nothing is compiled, and a CUDA graph can be captured; without it the error is ours."""

from __future__ import annotations

import random

import pytest
import torch
from triton.runtime.jit import JITFunction

import fusedmoe
from fusedmoe.errors import CaptureError
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import random_matrix
from fusedmoe.testing.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

MOST = 20_000
SOME = ["none", "fp8_block", "fp8_channel", "fp8_tensor", "int8_w8a8", "int4_w4a16", "mxfp4"]


def layer(scheme, hidden, intermediate, experts=8, top_k=2, tokens=MOST):
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    if scheme == "none":
        w13, w2 = (
            torch.randn(*size, dtype=torch.bfloat16, device="cuda", generator=generator) * size[-1] ** -0.5
            for size in sizes
        )
    else:
        w13 = random_matrix(format_of(scheme), sizes[0], generator, parts=2)
        w2 = random_matrix(format_of(scheme), sizes[1], generator)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda", generator=generator)
    topk = fusedmoe.softmax_topk(
        torch.randn(tokens, experts, device="cuda", generator=generator), top_k, renormalize=True
    )
    return x, w13, w2, topk.weights, topk.ids


def first(arguments, n):
    x, w13, w2, weights, ids = arguments
    return x[:n], w13, w2, weights[:n], ids[:n]


@pytest.fixture
def compiled(monkeypatch):
    """Names of what is compiled, or loaded from disk. Triton's own hook cannot write functions among the constants."""
    seen, compiles = [], JITFunction._do_compile

    def counted(self, *args, **named):
        seen.append(self.__name__)
        return compiles(self, *args, **named)

    monkeypatch.setattr(JITFunction, "_do_compile", counted)
    return seen


@pytest.mark.parametrize("scheme", SOME)
def test_a_thousand_calls_after_warmup_compile_nothing(scheme, compiled):
    # Sizes that no other test has, so that the kernels are this test's to compile.
    arguments = layer(scheme, *((320, 448) if scheme == "none" else (384, 640)))
    report = fusedmoe.warmup(lambda n: fusedmoe.fused_experts(*first(arguments, n)), MOST)
    assert report.variants and compiled
    assert len(compiled) <= 2 * report.variants  # two threads may meet a kernel at once
    print(f"{scheme}: {report}")  # noqa: T201 - the figures of docs/guarantees.md
    compiled.clear()
    chooser = random.Random(0)
    counts = [int(2 ** chooser.uniform(0, 14.28)) for _ in range(1000)]
    for n in counts:
        fusedmoe.fused_experts(*first(arguments, n))
    assert compiled == []
    some = first(arguments, 333)
    assert verify(fusedmoe.fused_experts(*some), some, {}).ok


@pytest.mark.parametrize("scheme", ["none", "fp8_block", "int4_w4a16"])
def test_a_capture_without_warmup_says_so_and_with_it_works(scheme, compiled):
    # Other sizes again.
    arguments = first(layer(scheme, 384, 896 if scheme == "none" else 768, tokens=700), 700)
    out = torch.empty_like(arguments[0])
    torch.cuda.synchronize()
    with pytest.raises(CaptureError, match="warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fusedmoe.fused_experts(*arguments, out=out)
    assert compiled == []
    report = fusedmoe.warmup(lambda n: fusedmoe.fused_experts(*first(arguments, n)), [700])
    assert report.tokens == 1 and compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fusedmoe.fused_experts(*arguments, out=out)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert verify(out, arguments, {}).ok


def test_warmup_launches_nothing():
    arguments = layer("none", 256, 320, tokens=64)
    out = torch.full_like(arguments[0], float("nan"))
    fusedmoe.warmup(lambda n: fusedmoe.fused_experts(*first(arguments, n), out=out[:n]), 64)
    torch.cuda.synchronize()
    assert out.isnan().all()
