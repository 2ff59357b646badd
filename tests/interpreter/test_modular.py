"""Prepare, apply, finalize in Triton's interpreter and in plain torch: formats, memory of the caller's, reduction."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import backends
from fusedmoe.modular import Batched, Experts, Standard, run
from fusedmoe.numerics import quantise_inputs
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN
from fusedmoe.testing.cases import Case
from fusedmoe.testing.verify import expected, relative_error

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

QUANTISED = (format_of("fp8_channel"),) * 2
#: tokens, top_k, experts, hidden, intermediate
CASES = [
    Case.of((23, 3, 5, 48, 32), ids="invalid", bias=True, mapped=True),
    Case.of((40, 2, 4, 64, 64), dtype="bfloat16", formats=QUANTISED),
    Case.of((40, 2, 4, 64, 64), dtype="float16", formats=(format_of("int8_w8a8", block=(32, 32)),) * 2),
    Case.of((9, 2, 4, 64, 64), dtype="bfloat16", formats=(format_of("fp8_tensor", inputs="static"),) * 2),
    Case.of((9, 2, 4, 64, 64), dtype="bfloat16", formats=(format_of("fp8_channel", inputs="tensor"),) * 2),
    Case.of((40, 2, 4, 192, 16), dtype="float16"),  # an output larger than what lies before it is written
]


def layer_of(case, backend, **more):
    arguments, options = case.draw(seed=3)
    x, w13, w2, weights, ids = arguments
    return (x, weights, ids), Experts(w13, w2, backend=backend, **more, **options), expected(arguments, options)


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_standard_path_has_the_bits_of_the_layer(index, backend):
    (x, weights, ids), layer, want = layer_of(CASES[index], backend)
    got = run(Standard(), layer, x, weights, ids)
    whole = fusedmoe.fused_experts(x, layer.w13, layer.w2, weights, ids, backend=backend, **layer.options)
    assert torch.equal(got, whole)
    assert relative_error(got, want) < 2 * CASES[index].tolerance


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_the_batched_path_is_the_layer(index, backend):
    (x, weights, ids), layer, want = layer_of(CASES[index], backend)
    most = ids.shape[1] if index == 0 else 1  # an expert chosen twice by a token takes two rows
    got = run(Batched(x.shape[0] * most), layer, x, weights, ids)
    # Rows are rounded before they are weighed, not after: one rounding each more.
    assert relative_error(got, want) < 2 * CASES[index].tolerance


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("scheme", [None, "fp8_channel"])
@pytest.mark.parametrize("limited", [False, True])
def test_rows_past_the_count_are_not_read(backend, scheme, limited):
    torch.manual_seed(0)
    forms = (None if scheme is None else format_of(scheme),) * 2
    case = Case.of((1, 1, 3, 40, 24), dtype="bfloat16", formats=forms, bias=True)
    (_, w13, w2, _, _), options = case.draw()
    layer = Experts(w13, w2, backend=backend, **options)
    rows, counts = torch.randn(3, 7, 40).bfloat16(), torch.tensor([7, 0, 3])
    inside = torch.arange(7)[None, :] < counts[:, None]
    shapes = layer.workspace_shapes(7, 1, torch.bfloat16, batched=True)
    if limited and backend == "triton":
        layer.workspace_limit = 2 * shapes.workspace2[0] * 2 // 3
        shapes = layer.workspace_shapes(7, 1, torch.bfloat16, batched=True)
    outputs = []
    for poison in (float("nan"), 1e30):
        rows = rows.masked_fill(~inside[..., None], poison)
        # The output lies where the first workspace does.
        first = torch.full((max(shapes.workspace13[0], rows.numel()),), poison, dtype=torch.bfloat16)
        second = torch.full(shapes.workspace2, poison, dtype=torch.bfloat16)
        output = torch.full_like(rows, poison) if limited else first[: rows.numel()].view(rows.shape)
        assert shapes.output == tuple(output.shape)
        assert layer.apply(output, rows, workspace13=first, workspace2=second, counts=counts) is output
        outputs.append(output)
    assert torch.equal(outputs[0][inside], outputs[1][inside])
    x = torch.cat([rows[e, : counts[e]] for e in range(3)])
    ids = torch.repeat_interleave(torch.arange(3), counts)[:, None]
    whole = fusedmoe.fused_experts(x, w13, w2, torch.ones(10, 1), ids, backend=backend, **options)
    want = expected((x, w13, w2, torch.ones(10, 1), ids), options)
    assert relative_error(outputs[0][inside], want) < 2 * case.tolerance
    assert relative_error(outputs[0][inside], whole) < 2.0**-8


@pytest.mark.parametrize("index", [0, 1, 2, 5])
@pytest.mark.parametrize("limited", [False, True])
def test_the_output_may_lie_in_the_first_workspace(index, limited):
    (x, weights, ids), layer, _ = layer_of(CASES[index], "triton")
    want = run(Standard(), layer, x, weights, ids)
    full = layer.workspace_shapes(*ids.shape, x.dtype)
    assert full.output == tuple(x.shape)
    if limited:
        layer.workspace_limit = 2 * (full.workspace13[0] + full.workspace2[0]) * x.itemsize // 3
    shapes = layer.workspace_shapes(*ids.shape, x.dtype)
    if limited:
        assert (shapes.workspace13[0] + shapes.workspace2[0]) * x.itemsize <= layer.workspace_limit
    for poison in (0xFF, 0x7F):
        first = torch.full(
            (max(shapes.workspace13[0], x.numel()) * x.itemsize,), poison, dtype=torch.uint8
        ).view(x.dtype)  # fmt: skip
        second = torch.full((shapes.workspace2[0] * x.itemsize,), poison, dtype=torch.uint8).view(x.dtype)
        # Under a limit the output of one chunk would be the workspace of the next.
        output = torch.full_like(x, float("nan")) if limited else first[: x.numel()].view(x.shape)
        layer.apply(output, x, weights, ids, first, second)
        assert torch.equal(output, want)
        if limited:
            with pytest.raises(fusedmoe.LayoutError, match="output: got memory of workspace13.*next one's workspace"):
                layer.apply(first[: x.numel()].view(x.shape), x, weights, ids, first, second)
            with pytest.raises(fusedmoe.WorkspaceError, match="workspace2: got .*wanted .*workspace_shapes"):
                layer.apply(output, x, weights, ids, first, second[:16])


@pytest.mark.parametrize("index", [1, 2, 3])
def test_rows_are_encoded_as_by_definition(index):
    (x, _, _), layer, _ = layer_of(CASES[index], "triton")
    codes, scale = layer.encode(x)
    want, want_scale = quantise_inputs(x, layer.inputs, layer.w13.input_scale)
    assert torch.allclose(scale, want_scale.float().expand_as(scale), rtol=1e-6)
    assert (codes.float() != want).float().mean() < 2e-3
    empty, no_scale = layer.encode(x[:0])
    assert empty.shape == (0, x.shape[1])
    assert no_scale.shape == (0, scale.shape[1])


def test_a_device_without_such_codes_never_sees_them(monkeypatch):
    (x, _, _), layer, _ = layer_of(CASES[1], "triton")
    monkeypatch.setattr(backends.load_transit("triton"), "target_of", lambda device: KNOWN["sm_80"])
    got, want = layer.encode(x), backends.load_transit("torch").encode(x, layer.inputs, None)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kind", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_reduce(kind, dtype, weighted):
    torch.manual_seed(1)
    rows = torch.randn(11, 2 * 37)[:, :37].to(dtype)
    index = torch.randint(-2, 13, (6, 3))
    index[0] = -1
    weights = torch.rand(6, 3) if weighted else None
    if weighted:
        weights[(index < 0) | (index >= 11)] = float("nan")  # never read, or read in vain
    out = torch.full((6, 37), float("nan"), dtype=dtype)
    assert backends.load_transit(kind).reduce(rows, index, weights, out) is out
    total = torch.zeros(6, 37)
    for j in range(3):
        for t in range(6):
            if 0 <= index[t, j] < 11:
                total[t] += rows[index[t, j]].float() * (weights[t, j] if weighted else 1.0)
    assert torch.equal(out, total.to(dtype)) if not weighted else torch.allclose(out, total.to(dtype), rtol=8e-3)
    assert not out[0].any()
    assert not backends.load_transit(kind).reduce(rows[:0], index, None, out).any()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("scheme", [None, "fp8_channel"])
@pytest.mark.parametrize("batched", [False, True], ids=["standard", "batched"])
def test_rows_have_adapters(backend, scheme, batched):
    """Within the caller's memory, with what a row past a count names, or has, of no effect."""
    forms = (None if scheme is None else format_of(scheme),) * 2
    case = Case.of((18, 1, 3, 64, 64), dtype="bfloat16", formats=forms, ranks=(5, 0, 8)).fitted()
    (x, w13, w2, weights, ids), options = case.draw(seed=1)
    ids = torch.repeat_interleave(torch.tensor([0, 2, 1]), torch.tensor([9, 7, 2]))[:, None]
    adapters = {name: options.pop(name) for name in ("lora", "adapter_ids")}
    layer = Experts(w13, w2, backend=backend, **options)
    arguments = x, w13, w2, torch.ones_like(weights), ids
    whole = fusedmoe.fused_experts(*arguments, backend=backend, **options, **adapters)
    shapes = layer.workspace_shapes(
        *((9, 1) if batched else ids.shape), x.dtype, batched=batched, lora=adapters["lora"]
    )
    first, second = (
        torch.full(shape, float("nan"), dtype=x.dtype) for shape in (shapes.workspace13, shapes.workspace2)
    )
    memory = {"workspace13": first, "workspace2": second}
    output = torch.full(shapes.output, float("nan"), dtype=x.dtype)
    if batched:
        counts = torch.bincount(ids[:, 0], minlength=3)
        inside = torch.arange(9) < counts[:, None]
        rows = torch.full((3, 9, 64), float("nan"), dtype=x.dtype)
        named = torch.zeros(3, 9, dtype=adapters["adapter_ids"].dtype)
        by_expert = ids[:, 0].argsort(stable=True)
        rows[inside], named[inside] = x[by_expert], adapters["adapter_ids"][by_expert]
        layer.apply(output, rows, counts=counts, lora=adapters["lora"], adapter_ids=named, **memory)
        whole, got = whole[by_expert], output[inside]
    else:
        got = layer.apply(output, x, torch.ones_like(weights), ids, **memory, **adapters)
    assert relative_error(got, whole) < 2.0**-8
    bare = fusedmoe.fused_experts(*arguments, backend=backend, **options)
    assert relative_error(whole, bare[by_expert] if batched else bare) > 0.1, "adapters count"
