"""A small layer tuned in seconds: the file is what the planner then reads, and its tiles give right results."""

from __future__ import annotations

import time

import pytest
import torch

from fusedmoe import fused_experts
from fusedmoe.bench import draw_layer, format_for, problem_of, shape_of
from fusedmoe.plan.planner import choose
from fusedmoe.target import target_of
from fusedmoe.testing.verify import verify
from fusedmoe.tune import tune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

SHAPE = shape_of("16,4,512,256")


@pytest.mark.parametrize("scheme", ["none", "fp8_block"])
def test_what_is_tuned_is_used_and_right(scheme, folder):
    device, start = torch.device("cuda", torch.cuda.current_device()), time.monotonic()
    layer = {"dtype": torch.bfloat16, "device": device, "scheme": scheme}
    steps = list(tune(SHAPE, (2, 512), folder=folder, keep=3, seconds=60, **layer))
    assert [step.tokens for step in steps] == [2, 512] and time.monotonic() - start < 120
    for step in steps:
        assert step.tried > 5 and 0 < step.entry.us <= step.entry.planned_us
    drawn = draw_layer(SHAPE, **layer)
    for step in steps:
        arguments = drawn.call(step.tokens)
        plan = choose(problem_of(SHAPE, step.tokens, torch.bfloat16, form=format_for(scheme, SHAPE)), target_of(device))
        if step.entry.gate_up is not None:
            assert (plan.triton.gate_up, plan.triton.down) == (step.entry.gate_up, step.entry.down)
            assert str(folder) in plan.why
        assert verify(fused_experts(*arguments, **drawn.options), arguments, {}).ok
