"""The launches around a dispatch, compiled for every target. Needs no GPU."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import backends
from fusedmoe.parallel.placement import Placement
from fusedmoe.parallel.wire import Wire
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.testing import codegen
from fusedmoe.testing.codegen import compiling_for

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.mark.parametrize("target", codegen.TARGETS)
@pytest.mark.parametrize("capacity", [None, 4096])
def test_no_register_spills(target, capacity):
    transit = backends.load_transit("triton")
    for placement in (Placement.contiguous(256, 8), Placement.contiguous(128, 2)):
        with compiling_for(target) as compiled:
            ids = torch.zeros(4096, 8, dtype=torch.int64)
            sends = transit.sends(ids, placement.table(CPU), 1, capacity)
            inputs = None if target == "sm_75" else format_of("int8_w8a8", block=(128, 128)).inputs
            wire = Wire(7168, 8, torch.float16, inputs)
            raw = torch.empty(sends.token.numel(), wire.row_bytes, dtype=torch.uint8)
            x = torch.empty(4096, 7168, dtype=wire.row_dtype)
            scale = torch.empty(4096, wire.groups) if wire.groups else None
            transit.pack(x, scale, torch.empty(4096, 8), sends, capacity, wire.views(raw))
            rows, out = torch.empty(sends.token.numel(), 7168, dtype=torch.float16), torch.empty(4096, 7168)
            transit.reduce(rows, sends.answer, None, out.half())
            if inputs is not None:
                transit.encode(rows[:4096], inputs, None)
        names = [kernel.name for kernel in compiled]
        assert names[:4] == ["count", "place", "pack", "combine"]
        for kernel in compiled:
            assert kernel.stack_bytes == 0, kernel.name
