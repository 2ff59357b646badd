"""What a capture refuses to compile, with Triton's own kernels and no GPU."""

from __future__ import annotations

import threading

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

import fusedmoe
from fusedmoe import experts, target
from fusedmoe.backends import elsewhere
from fusedmoe.backends.launch import _nothing_compiled
from fusedmoe.checks import check
from fusedmoe.errors import CaptureError
from fusedmoe.plan.planner import choose
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)


@triton.jit
def fill(out, VALUE: tl.constexpr):
    tl.store(out, VALUE)


def test_a_capture_refuses_what_is_not_compiled_and_takes_what_is(monkeypatch):
    monkeypatch.setattr(driver, "_active", elsewhere.Driver(KNOWN["sm_90"]))
    out = torch.zeros(1)
    message = "kernel fill: got a stream that is being captured.*fusedmoe.warmup"
    with pytest.raises(CaptureError, match=message), _nothing_compiled(fill):
        fill.warmup(out, VALUE=1, grid=(1,))
    assert "_do_compile" not in vars(fill)
    assert fill.warmup(out, VALUE=1, grid=(1,)) is not None
    with _nothing_compiled(fill):
        assert fill.warmup(out, VALUE=1, grid=(1,)) is not None
    with pytest.raises(CaptureError), _nothing_compiled(fill):
        fill.warmup(out, VALUE=2, grid=(1,))  # another variant


def test_other_threads_compile(monkeypatch):
    monkeypatch.setattr(driver, "_active", elsewhere.Driver(KNOWN["sm_90"]))
    found = []
    with _nothing_compiled(fill):
        other = threading.Thread(target=lambda: found.append(fill.warmup(torch.zeros(1), VALUE=3, grid=(1,))))
        other.start()
        other.join()
    assert found[0] is not None


@pytest.mark.parametrize("scheme", ["none", "fp8_block", "int4_w4a16"])
@pytest.mark.parametrize("tokens", [1, 3000])
def test_a_layer_that_is_captured_says_which_kernel_is_not_compiled(tokens, scheme, monkeypatch):
    """The layer's own kernels, whose constants are functions."""
    w13, w2 = torch.randn(8, 2 * 144, 128).bfloat16(), torch.randn(8, 128, 144).bfloat16()
    if scheme != "none":
        choices = {"group": -1} if scheme == "int4_w4a16" else {}
        w13, w2 = fusedmoe.quantize(w13, scheme, parts=2, **choices), fusedmoe.quantize(w2, scheme, **choices)
    x, weights = torch.zeros(tokens, 128, dtype=torch.bfloat16), torch.zeros(tokens, 2)
    call = check(x, w13, w2, weights, torch.zeros(tokens, 2, dtype=torch.int64))
    plan = choose(call.problem, KNOWN["sm_90"], "triton")
    monkeypatch.setattr(target, "_elsewhere", KNOWN["sm_90"])
    monkeypatch.setattr(driver, "_active", elsewhere.Driver(KNOWN["sm_90"]))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(CaptureError, match=r"kernel \w+: got a stream that is being captured"):
        experts.run(call, plan)
