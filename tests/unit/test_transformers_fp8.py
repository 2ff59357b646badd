"""FP8Experts of Transformers as "fusedmoe", against float64 on rows rounded to the same codes."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny_models import relative, routing
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import use_experts_implementation

from fusedmoe.errors import GradientError
from fusedmoe.integrations.transformers import NAME
from fusedmoe.numerics import quantise_inputs, spread_input_scale
from fusedmoe.spec.format import Inputs


def fp8_experts(*, block_size, activation_scheme="dynamic", **more):
    """FP8Experts as the quantiser makes them, with random codes, and their weights as numbers."""
    config = Qwen3MoeConfig(hidden_size=96, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = NAME
    experts_class = type("Experts", (FP8Experts,), {"__init__": FP8Experts.__init__, "forward": FP8Experts.forward})
    experts = use_experts_implementation(experts_class, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)(
        config,
        block_size=block_size,
        activation_scheme=activation_scheme,
        **more,
    )
    g = torch.Generator().manual_seed(0)
    numbers = {}
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            data, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            if data.dtype == torch.int8:
                data.copy_(torch.randint(-128, 128, data.shape, generator=g).to(torch.int8))
                e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
                codes = torch.stack([data.view(torch.uint8) & 15, data.view(torch.uint8) >> 4], -1).flatten(-2).long()
                w = e2m1[codes & 7] * (1 - 2.0 * (codes >> 3))
                size = 0.03
            else:
                data.copy_((torch.randn(data.shape, generator=g) * 50).to(data.dtype))
                w, size = data.float(), 0.002
            # Experts differ by a factor, so that a scale of another expert shows.
            s = torch.rand(scale.shape, generator=g) * size * torch.tensor([1.0, 4.0, 0.25, 2.0]).view(4, 1, 1) + 1e-4
            if scale.dtype != torch.float32:
                s = torch.exp2(s.log2().round())
            scale.copy_(s.to(scale.dtype))
            rows, columns = w.shape[1] // s.shape[1], w.shape[2] // s.shape[2]
            numbers[name] = w * s.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return experts, numbers


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
