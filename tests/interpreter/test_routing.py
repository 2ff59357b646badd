"""The schedule by its invariants, in Triton's interpreter. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fusedmoe import backends
from fusedmoe.backends import routes
from fusedmoe.backends.workspace import Workspace
from fusedmoe.checks import check
from fusedmoe.plan.planner import choose
from fusedmoe.settings import settings
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


@pytest.mark.parametrize("ids", ["uniform", "any", "one", "invalid", "absent"])
@pytest.mark.parametrize("shape", [(1100, 2, 6), (700, 2, 11)])
def test_several_programs_place_the_chunks_in_several_steps(shape, ids, monkeypatch):
    monkeypatch.setattr(routes, "ONE_LAUNCH", 1024)
    monkeypatch.setattr(routes, "TABLE", 32)
    monkeypatch.setattr(routes, "PLACERS", 3)
    test_schedule(shape, ids)


IDS = ("uniform", "any", "one", "invalid", "absent")
SMALL, LARGE = ((5, 2, 3), (100, 3, 7), (64, 2, 130), (700, 2, 6), (300, 4, 33)), ((2048, 2, 300), (2049, 2, 6))


@pytest.mark.parametrize(
    ("shape", "ids"), [*itertools.product(SMALL, IDS), *itertools.product(LARGE, ("uniform", "invalid"))]
)
def test_schedule(shape, ids):
    tokens, top_k, n_experts = shape
    case = Case(tokens=tokens, top_k=top_k, experts=n_experts, hidden=16, intermediate=16, ids=ids)
    arguments, options = case.draw()
    call = check(*arguments, **options)
    plan = choose(call.problem, target_of(torch.device("cpu")), "triton")
    plan = dataclasses.replace(plan, triton=dataclasses.replace(plan.triton, few=False))
    backend = backends.load("triton")
    layout = backend.workspace_layout(call.problem, plan)
    size = sum(-(-torch.Size(s).numel() * d.itemsize // 256) * 256 for s, d in layout.values())
    work = Workspace(layout, torch.device("cpu"), torch.full((size,), 0xFF, dtype=torch.uint8))
    backend.route(call, plan, work)

    flat = arguments[4].flatten()
    by_expert = [torch.nonzero(flat == e).flatten() for e in range(n_experts)]
    counts = torch.tensor([len(s) for s in by_expert])
    assert work["offset"].tolist() == [0, *counts.cumsum(0).tolist()]
    # sorted by expert, and by slot within an expert: the same schedule in every run
    sorted_slots = torch.cat(by_expert)
    assert work["slot"][: int(counts.sum())].tolist() == sorted_slots.tolist()
    assert work["row"][sorted_slots].tolist() == list(range(len(sorted_slots)))
    block_m = plan.triton.gate_up.block_m
    tiles = [(e, int(work["offset"][e]) + m) for e in range(n_experts) for m in range(0, int(counts[e]), block_m)]
    assert work["claimed"].tolist() == [0, 0]
    n_tiles = int(work["n_tiles"])
    assert n_tiles == len(tiles) <= len(work["tile_expert"])
    assert list(zip(work["tile_expert"][:n_tiles].tolist(), work["tile_row"][:n_tiles].tolist(), strict=True)) == tiles
