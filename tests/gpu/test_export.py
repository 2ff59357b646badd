"""On a GPU: exported and compiled programs take its kernels, whichever machine exported them; the examples."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest
import torch

import fusedmoe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")

E, K, H, I = 16, 4, 256, 256
TOKENS = torch.export.Dim("tokens", min=1, max=65536)
#: A path without a schedule, one launch for it, three.
SIZES = (1, 5, 300, 3000)


def layer(scheme):
    w13, w2 = torch.randn(E, 2 * I, H).bfloat16() / 16, torch.randn(E, H, I).bfloat16() / 16
    if scheme is not None:
        w13, w2 = fusedmoe.quantize(w13, scheme, parts=2), fusedmoe.quantize(w2, scheme)
    return fusedmoe.FusedExperts.of(w13, w2, backend="triton")


def inputs(tokens, device="cuda"):
    hidden, weights = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, K)
    return tuple(one.to(device) for one in (hidden, weights, torch.randint(0, E, (tokens, K))))


def agrees(program, experts):
    with torch.inference_mode():
        for tokens in SIZES:
            arguments = inputs(tokens)
            wanted = experts(*arguments)
            assert wanted.abs().max() > 0.1
            assert torch.equal(program(*arguments), wanted), tokens


@pytest.mark.parametrize("scheme", [None, "fp8_block", "mxfp4"])
def test_exported(scheme):
    experts = layer(scheme).cuda()
    program = torch.export.export(experts, inputs(5), dynamic_shapes=({0: TOKENS},) * 3)
    agrees(program.module(), experts)


@needs_compiler
@pytest.mark.xfail(run=False, reason="torch 2.11 died in aoti_load_package of one nn.Linear too")
@pytest.mark.parametrize("scheme", [None, "fp8_block", "mxfp4"])
def test_compiled_ahead_of_time(scheme, tmp_path):
    experts = layer(scheme).cuda()
    program = torch.export.export(experts, inputs(5), dynamic_shapes=({0: TOKENS},) * 3)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    agrees(torch._inductor.aoti_load_package(package), experts)


def test_a_compiled_program_is_captured_in_a_graph(tmp_path):
    """Between torch.export's operators nothing is read back either."""
    experts = layer("fp8_channel").cuda()
    program = torch.export.export(experts, inputs(5), dynamic_shapes=({0: TOKENS},) * 3).module()
    static, other = inputs(8), inputs(8)
    with torch.inference_mode():
        program(*static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = program(*static)
        for mine, theirs in zip(static, other, strict=True):
            mine.copy_(theirs)
        graph.replay()
        assert torch.equal(out, experts(*other))


def test_the_example_of_cuda_graphs(capsys):
    example = Path(__file__).parents[2] / "examples" / "cuda_graph.py"
    runpy.run_path(str(example), run_name="__main__")
    assert "sizes, graphs:" in capsys.readouterr().out
