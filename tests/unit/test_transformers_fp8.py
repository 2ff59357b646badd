"""FP8Experts of Transformers as "fusedmoe", against float64 on rows rounded to the same codes."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_models import fp8_experts, relative, routing
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Experts

from fusedmoe.errors import GradientError
from fusedmoe.numerics import quantise_inputs, spread_input_scale
from fusedmoe.spec.format import Inputs


def fp8_expected(x, numbers, weights, ids, inputs, static):
    """The layer in float64 on rows that are rounded to codes before each product, a slot at a time."""

    def met(row, scale):
        if inputs is None:
            return row
        codes, scale = quantise_inputs(row[None], inputs, scale)
        return (codes * spread_input_scale(scale, inputs, row.shape[0]))[0]

    w13, w2 = (w.double() for w in numbers.values())
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, j in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        e = ids[t, j].item()
        if e < w13.shape[0]:
            gate, up = (w13[e] @ met(x[t].double(), static and static[0])).chunk(2)
            out[t] += weights[t, j].double() * (w2[e] @ met(nn.functional.silu(gate) * up, static and static[1]))
    return out


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": (32, 32)},
        {"block_size": (32, 32), "scale_fmt": "ue8m0"},
        {"block_size": None},
        {"block_size": None, "activation_scheme": "static"},
        {"block_size": None, "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    ],
    ids=["block", "block ue8m0", "tensor", "tensor static", "fp4"],
)
def test_fp8_experts(options, calls):
    if not set(options) <= set(inspect.signature(FP8Experts.__init__).parameters):
        pytest.skip("this version of Transformers has no such experts")
    experts, numbers = fp8_experts(**options)
    x, (weights, ids) = torch.randn(11, 96), routing(11, 2, 4)
    ids[0, 0] = 4
    inputs, static = Inputs(element="e4m3", mode="token"), None
    if options["block_size"] is not None:
        inputs = Inputs(element="e4m3", mode="group", group=32)
    if "expert_dtype" in options:
        inputs = None
    if options.get("activation_scheme") == "static":
        inputs, static = Inputs(element="e4m3", mode="static"), (torch.tensor(0.01), torch.tensor(0.05))
        with torch.no_grad():  # the largest of the experts serves all
            experts.gate_up_proj_activation_scale.copy_(torch.tensor([0.004, 0.01, 0.002, 0.008]))
            experts.down_proj_activation_scale.fill_(0.05)
    with torch.no_grad():
        got = experts(x, ids, weights)
    assert len(calls) == 1
    # A code of the intermediate that lies half-way may go either way; a wrong scale or rounding is off by 0.05.
    assert relative(got, fp8_expected(x, numbers, weights, ids, inputs, static)) < 5e-3


def test_fp8_experts_refuse_gradients():
    experts, _ = fp8_experts(block_size=(32, 32))
    weights, ids = routing(3, 2, 4)
    with pytest.raises(GradientError, match=r"experts in fp8: got hidden states .* require grad; wanted inference"):
        experts(torch.randn(3, 96, requires_grad=True), ids, weights)


@pytest.mark.parametrize("options", [{"block_size": (32, 32)}, {"block_size": None, "activation_scheme": "static"}])
def test_fp8_experts_compiled(options):
    experts, _ = fp8_experts(**options)
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    weights, ids = routing(3, 2, 4)
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(compiled(x, ids, weights), experts(x, ids, weights))
