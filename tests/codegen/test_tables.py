"""The tiles of the package's own files of measurements, compiled: they have to be as good as those of the planner."""

from __future__ import annotations

import own_tables
import pytest
import torch

from fusedmoe import experts
from fusedmoe.bench import draw_layer
from fusedmoe.checks import check
from fusedmoe.plan.config import KernelConfig, Plan
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN
from fusedmoe.testing.codegen import compiling_for
from fusedmoe.tune.space import Tiles

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)


#: Some files say that nothing is faster than what is planned, and have no tiles.
WITH_TILES = [path for path in own_tables.PATHS if any(row["gate_up"] for row in own_tables.told(path)[0]["entries"])]


@pytest.mark.parametrize("path", WITH_TILES, ids=own_tables.name)
def test_measured_tiles_compile_without_spills(path):
    found, shape, scheme = own_tables.told(path)
    layer = draw_layer(shape, dtype=torch.bfloat16, device=torch.device("cpu"), scheme=scheme, values=False)
    spilled, seen = [], set()
    for row in found["entries"]:
        if row["gate_up"] is None:
            continue
        arguments = layer.call(row["slots"] // shape.top_k)
        call = check(*arguments, out=torch.empty_like(arguments[0]), batch_invariant=False, **layer.options)
        tiles = Tiles(row["few"], KernelConfig(**row["gate_up"]), KernelConfig(**row["down"]))
        assert tiles.can_run(call.problem, KNOWN["sm_90"]) and tiles.backend == row["backend"]
        if tiles in seen:
            continue
        seen.add(tiles)
        with torch.no_grad(), compiling_for("sm_90") as compiled:
            experts.run(call, Plan(backend=tiles.backend, triton=tiles.plan(call.problem, KNOWN["sm_90"])))
        spilled += [(row["slots"], kernel.name, kernel.stack_bytes) for kernel in compiled if kernel.stack_bytes]
    assert seen and not spilled
