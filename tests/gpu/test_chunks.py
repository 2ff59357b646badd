"""A bound on the workspace on a GPU: the bits of the whole, and memory that stays below it."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import experts
from fusedmoe.checks import check
from fusedmoe.modular import Batched, Experts, run
from fusedmoe.plan.planner import choose
from fusedmoe.schemes import format_of
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case
from fusedmoe.testing.verify import expected, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]
CASES = [
    Case.of((4000, 8, 64, 512, 768), ids="invalid", bias=True),
    Case.of((4096, 8, 32, 1024, 512), formats=(format_of("fp8_block"),) * 2),
    Case.of((2000, 4, 16, 512, 1024), formats=(format_of("fp8_channel"),) * 2),
    Case.of((3000, 4, 16, 512, 256), formats=(format_of("int4_w4a16"),) * 2),
    Case.of((4000, 2, 8, 512, 4096), ids="uniform"),  # gathered rows
]


@pytest.mark.parametrize("index", range(len(CASES)))
@pytest.mark.parametrize("share", [2, 5])
def test_chunks_have_the_bits_of_the_whole(index, share):
    arguments, options = CASES[index].draw("cuda", seed=index)
    call = check(*arguments, **options)
    plan = choose(call.problem, target_of(call.hidden_states.device))
    limit = experts.bytes_for(call.problem, plan) // share
    assert experts.tokens_at_a_time(call.problem, plan, limit) < call.problem.tokens
    out, want = torch.empty_like(arguments[0]), fusedmoe.fused_experts(*arguments, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fusedmoe.fused_experts(*arguments, out=out, workspace_limit=limit, **options)
    torch.cuda.synchronize()
    # PyTorch's allocator leaves up to 1 MiB of a block that it does not split to who asked for the rest.
    assert torch.cuda.max_memory_allocated() - before <= limit + (1 << 20)
    assert torch.equal(out, want)


@pytest.mark.parametrize("scheme", [None, "fp8_block", "fp8_channel"])
def test_batched_rows(scheme):
    forms = (None if scheme is None else format_of(scheme),) * 2
    case = Case.of((300, 4, 16, 512, 256), formats=forms, ids="uniform")
    (x, w13, w2, weights, ids), options = case.draw("cuda")
    got = run(Batched(320), Experts(w13, w2, **options), x, weights, ids)
    assert relative_error(got, expected((x, w13, w2, weights, ids), options)) < 2 * case.tolerance
