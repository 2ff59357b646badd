"""The tiles of the package's own files of measurements, compiled: they have to be as good as those of the planner."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from fusedmoe import experts
from fusedmoe.bench import draw_layer, shape_of
from fusedmoe.checks import check
from fusedmoe.plan.config import KernelConfig, Plan
from fusedmoe.plan.tables import PACKAGE
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN
from fusedmoe.testing.codegen import compiling_for
from fusedmoe.tune.space import Tiles

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("sm_90*.json")), ids=lambda path: path.stem.replace(",", " "))
def test_measured_tiles_compile_without_spills(path):
    found = json.loads(path.read_text())
    words = shlex.split(found["command"])
    scheme = words[words.index("--scheme") + 1] if "--scheme" in words else "none"
    layer = draw_layer(
        shape_of(words[2]), dtype=torch.bfloat16, device=torch.device("cpu"), scheme=scheme, values=False
    )
    spilled, seen = [], set()
    for row in found["entries"]:
        if row["gate_up"] is None:
            continue
        arguments = layer.call(row["slots"] // layer.shape.top_k)
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
