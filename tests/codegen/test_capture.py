"""What a capture refuses to compile, with Triton's own kernels and no GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

from fusedmoe.backends.launch import _nothing_compiled
from fusedmoe.errors import CaptureError
from fusedmoe.settings import settings
from fusedmoe.testing import codegen

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)


@triton.jit
def fill(out, VALUE: tl.constexpr):
    tl.store(out, VALUE)


def test_a_capture_refuses_what_is_not_compiled_and_takes_what_is(monkeypatch):
    monkeypatch.setattr(driver, "_active", codegen._Driver("sm_90"))
    seen = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **facts: seen.append(facts) or False)
    mine = knobs.runtime.jit_cache_hook
    out = torch.zeros(1)
    message = "kernel fill: got a stream that is being captured.*fusedmoe.warmup"
    with pytest.raises(CaptureError, match=message), _nothing_compiled(fill):
        assert fill.warmup(out, VALUE=1, grid=(1,)) is None
    assert not seen and knobs.runtime.jit_cache_hook is mine
    assert fill.warmup(out, VALUE=1, grid=(1,)) is not None
    assert len(seen) == 1
    with _nothing_compiled(fill):
        assert fill.warmup(out, VALUE=1, grid=(1,)) is not None
    with pytest.raises(CaptureError), _nothing_compiled(fill):
        fill.warmup(out, VALUE=2, grid=(1,))  # another variant
