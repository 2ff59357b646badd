"""The story of the layer. Everything else is a policy handed to it."""

from __future__ import annotations

import torch

from fusedmoe import backends
from fusedmoe.backends.workspace import Workspace
from fusedmoe.call import Call
from fusedmoe.plan.config import Plan


def run(call: Call, plan: Plan) -> torch.Tensor:
    """Run a checked call the way ``plan`` says; returns ``call.out``, or a new tensor [T, H]."""
    out = call.out
    if out is None:
        x = call.hidden_states
        out = torch.empty(x.shape, dtype=getattr(torch, call.problem.dtype), device=x.device)
    if call.problem.tokens == 0 or out.device.type == "meta":
        return out  # nothing to compute, or shapes alone are wanted
    backend = backends.load(plan.backend)
    layout = backend.workspace_layout(call.problem, plan)
    work = Workspace(layout, call.hidden_states.device, call.workspace)
    schedule = backend.route(call, plan, work)
    hidden = backend.gate_up(call, plan, schedule, work)
    rows = backend.down(call, plan, schedule, hidden, work)
    backend.combine(call, plan, schedule, rows, work, out)
    return out


def run_alone(call: Call, plan: Plan) -> torch.Tensor:
    """Run the first GEMM of a checked call; returns its rows [T, top_k, I], zeros where there is no expert."""
    problem, device = call.problem, call.hidden_states.device
    shape = (problem.tokens, problem.top_k, problem.intermediate)
    out = torch.zeros(shape, dtype=getattr(torch, problem.dtype), device=device)
    if problem.tokens == 0 or device.type == "meta":
        return out
    call = call._replace(out=out.view(problem.slots, problem.intermediate))
    backend = backends.load(plan.backend)
    work = Workspace(backend.workspace_layout(problem, plan), device)
    backend.gate_up(call, plan, backend.route(call, plan, work), work)
    return out
