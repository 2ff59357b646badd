"""torch.export and AOTInductor: the module, quantised or not, with a number of tokens that stays open."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch

import fusedmoe
from fusedmoe.schemes import SCHEMES

E, K, H, I = 6, 2, 128, 128
TOKENS = torch.export.Dim("tokens", min=1, max=65536)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
#: Not ours: torch's own loader and pytree warn.
pytestmark = pytest.mark.filterwarnings("default::UserWarning:torch.*", "default::FutureWarning")


def layer(scheme, **options):
    """Experts in bfloat16, with every field that an operator's call may have or not."""
    g = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(E, rows, H, generator=g).bfloat16() / 11 for rows in (2 * I, H))
    if scheme is not None:
        w13, w2 = fusedmoe.quantize(w13, scheme, parts=2), fusedmoe.quantize(w2, scheme)
    bias = torch.randn(E, 2 * I, generator=g).bfloat16()
    ids = torch.tensor([3, -1, 0, 5, 1, 2, 4, -1])  # of a whole layer with two experts that are elsewhere
    return fusedmoe.FusedExperts.of(w13, w2, w13_bias=bias, expert_map=ids, **options)


def inputs(tokens):
    g = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, H, generator=g).bfloat16()
    return hidden, torch.rand(tokens, K, generator=g), torch.randint(0, 8, (tokens, K), generator=g)


def export(module, strict=False):
    return torch.export.export(module, inputs(5), dynamic_shapes=({0: TOKENS},) * 3, strict=strict)


def skip_where_torch_cannot_load(experts):
    if torch.__version__ < "2.10" and not experts.w13.is_floating_point():
        pytest.skip("torch 2.9 loads no parameter of integers")


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_saved_and_loaded(scheme, strict, tmp_path):
    experts = layer(scheme, activation=fusedmoe.Activation("swigluoai", limit=2.0))
    skip_where_torch_cannot_load(experts)
    torch.export.save(export(experts, strict), tmp_path / "layer.pt2")
    program = torch.export.load(tmp_path / "layer.pt2").module()
    with torch.inference_mode():
        for tokens in (1, 5, 33):
            wanted = experts(*inputs(tokens))
            assert wanted.abs().max() > 0.1
            assert torch.equal(program(*inputs(tokens)), wanted)


def test_exporting_leaves_the_layer_as_it_was():
    """No tensor of torch.export's stays in the module, and it says nothing of attributes that appeared."""
    experts = layer("fp8_channel")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(experts)
    assert not experts._matrices


@needs_compiler
@pytest.mark.parametrize("scheme", [None, "mxfp4"])
def test_compiled_ahead_of_time(scheme, tmp_path):
    experts = layer(scheme)
    package = torch._inductor.aoti_compile_and_package(export(experts), package_path=str(tmp_path / "layer.pt2"))
    run = torch._inductor.aoti_load_package(package)
    with torch.inference_mode():
        for tokens in (1, 5, 33):
            assert torch.equal(run(*inputs(tokens)), experts(*inputs(tokens)))


def test_a_process_that_loads_imports_the_operators(tmp_path, python):
    path = tmp_path / "layer.pt2"
    experts = layer("fp8_w8a16")
    torch.export.save(export(experts), path)
    torch.save((inputs(7), experts(*inputs(7))), tmp_path / "wanted")
    load = (
        "import torch; import fusedmoe.torch_ops\n"
        f"arguments, wanted = torch.load({str(tmp_path / 'wanted')!r})\n"
        f"with torch.inference_mode(): got = torch.export.load({str(path)!r}).module()(*arguments)\n"
        "print(torch.equal(got, wanted))"
    )
    assert python(load).strip() == "True"


def test_a_mistake_is_explained():
    hidden, weights, ids = inputs(5)
    program = export(layer(None)).module()
    program.w13 = torch.nn.Parameter(torch.zeros(E, 2 * I - 1, H, dtype=torch.bfloat16), requires_grad=False)
    with torch.inference_mode(), pytest.raises(fusedmoe.ShapeError, match=r"w13.*got .*wanted"):
        program(hidden, weights, ids)
