"""expert_linear: what it launches, compiled for GPUs by either kind of kernel."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import experts
from fusedmoe.checks import check_linear
from fusedmoe.plan.planner import choose
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN
from fusedmoe.testing.cases import storage_of
from fusedmoe.testing.codegen import compiling_for

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)


@pytest.mark.parametrize("scheme", [None, "fp8_block", "int4_w4a16"])
@pytest.mark.parametrize(
    ("target", "chosen", "tokens"),
    [
        ("sm_80", "triton", 1),
        ("sm_80", "triton", 4096),
        ("sm_90", "triton", 1),
        ("sm_90", "triton", 4096),
        ("sm_90", "gluon_sm90", 4096),
    ],
)
def test_one_gemm_and_no_spills(target, chosen, tokens, scheme):
    shape = (128, 1536, 2048)
    w = torch.empty(shape, dtype=torch.float16)
    if scheme is not None:
        form = format_of(scheme)
        sizes = storage_of(form, shape, 1)
        w = fusedmoe.ExpertMatrix(form, **{k: torch.empty(s, dtype=d) for k, (s, d) in sizes.items()}, parts=1)
    ids = torch.zeros(tokens, 8, dtype=torch.int64)
    call = check_linear(torch.empty(tokens, 2048, dtype=torch.float16), w, ids, bias=torch.empty(128, 1536))
    plan = choose(call.problem, KNOWN[target], chosen)
    with compiling_for(target) as compiled:
        experts.run_alone(call, plan)
    gemms = [kernel for kernel in compiled if kernel.name.startswith("grouped_")]
    ours = "grouped_gemv" if tokens == 1 else "grouped_gemm"
    assert [kernel.name for kernel in gemms] == ["grouped_gemm_sm90" if chosen == "gluon_sm90" else ours]
    assert all(kernel.stack_bytes == 0 for kernel in compiled), compiled
