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


def launched(target, placement, tokens, capacity, inputs, *, adapters=False):
    """The kernels of a dispatch and a combine of so many tokens."""
    transit = backends.load_transit("triton")
    with compiling_for(target) as compiled:
        ids = torch.zeros(tokens, 8, dtype=torch.int64)
        sends = transit.sends(ids, placement.table(CPU), 1, capacity)
        wire = Wire(7168, 8, torch.float16, inputs, adapters)
        raw = torch.empty(sends.token.numel(), wire.row_bytes, dtype=torch.uint8)
        x = torch.empty(tokens, 7168, dtype=wire.row_dtype)
        scale = torch.empty(tokens, wire.groups) if wire.groups else None
        slots = torch.zeros(tokens, dtype=torch.int64) if adapters else None
        transit.pack(x, scale, torch.empty(tokens, 8), slots, sends, capacity, wire.views(raw))
        rows, out = torch.empty(sends.token.numel(), 7168, dtype=torch.float16), torch.empty(tokens, 7168)
        transit.reduce(rows, sends.answer, None, out.half())
        if inputs is not None:
            transit.encode(rows[:tokens], inputs, None)
    return compiled


@pytest.mark.parametrize("adapters", [False, True], ids=["none", "adapters"])
def test_tokens_and_rows_do_not_make_variants(adapters):
    """Other tokens, and other rows of answers, run the same code, attributes of arguments included."""
    inputs = format_of("int8_w8a8", block=(128, 128)).inputs
    seen = []
    for tokens in (129, 131, 144, 160):
        kernels = launched("sm_90", Placement.contiguous(128, 3), tokens, None, inputs, adapters=adapters)
        seen.append([kernel.asm["ttir"] for kernel in kernels])
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize("target", codegen.TARGETS)
@pytest.mark.parametrize("capacity", [None, 4096])
def test_no_register_spills(target, capacity):
    inputs = None if target == "sm_75" else format_of("int8_w8a8", block=(128, 128)).inputs
    for placement in (Placement.contiguous(256, 8), Placement.contiguous(128, 2)):
        compiled = launched(target, placement, 4096, capacity, inputs, adapters=placement.ranks == 2)
        names = [kernel.name for kernel in compiled]
        assert names[:4] == ["count", "place", "pack", "combine"]
        for kernel in compiled:
            assert kernel.stack_bytes == 0, kernel.name
