"""What the tuner runs is verified before it is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe.bench import draw_layer, format_for, problem_of, shape_of
from fusedmoe.plan.planner import untuned
from fusedmoe.settings import settings
from fusedmoe.target import target_of
from fusedmoe.tune.session import OnDevice
from fusedmoe.tune.space import Tiles

if not settings().interpret:
    pytest.skip("runs in Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)

CPU = torch.device("cpu")
SHAPE = shape_of("4,2,64,64")


@pytest.fixture(params=["none", "fp8_channel"])
def machine(request):
    layer = draw_layer(SHAPE, dtype=torch.float32, device=CPU, scheme=request.param)
    problem = problem_of(SHAPE, 6, torch.float32, form=format_for(request.param, SHAPE))
    return OnDevice(layer, 6, "uniform", None), Tiles.of(untuned(problem, target_of(CPU), "triton").triton)


def test_tiles_are_timed(machine):
    runs, tiles = machine
    other = tiles._replace(few=False, down=replace(tiles.down, block_n=32))
    runs.prepare([tiles, other])
    assert runs.time(tiles, careful=False) > 0 and runs.time(other, careful=False) > 0


def test_wrong_results_and_failures_have_no_time(machine, monkeypatch):
    runs, tiles = machine
    with monkeypatch.context() as patch:
        patch.setattr(runs._oracle, "_want", runs._oracle._want * 1.1)
        assert runs.time(tiles, careful=False) is None
    assert runs.time(tiles._replace(gate_up=replace(tiles.gate_up, block_n=48)), careful=False) is None
    assert runs.time(tiles, careful=False) > 0
