"""Calls like an earlier one are made of its launches, on other tensors."""

from __future__ import annotations

import threading

import pytest
import torch
from triton.runtime.jit import JITFunction

from fusedmoe import functional, fused_experts, softmax_topk
from fusedmoe.backends import launch as launches
from fusedmoe.errors import DTypeError, GradientError, LayoutError, OptionError, ShapeError
from fusedmoe.modular import Experts
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import random_matrix
from fusedmoe.testing.verify import verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

SCHEMES = [None, "fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4"]


def layer(scheme, tokens, seed, *, experts=16, top_k=4, hidden=256, intermediate=384):
    generator = torch.Generator("cuda").manual_seed(seed)
    sizes = (experts, 2 * intermediate, hidden), (experts, hidden, intermediate)
    if scheme is None:
        w13, w2 = (
            torch.randn(*size, dtype=torch.bfloat16, device="cuda", generator=generator) * size[-1] ** -0.5
            for size in sizes
        )
    else:
        w13 = random_matrix(format_of(scheme), sizes[0], generator, parts=2)
        w2 = random_matrix(format_of(scheme), sizes[1], generator)
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda", generator=generator)
    weights, ids = softmax_topk(
        torch.randn(tokens, experts, device="cuda", generator=generator), top_k, renormalize=True
    )
    return x, w13, w2, weights, ids


@pytest.fixture(autouse=True)
def no_tapes():
    launches._LOCAL.tapes.clear()
    launches._LOCAL.calls.clear()


@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_call_binds_no_kernel_and_is_right(scheme, tokens, monkeypatch):
    first, second = layer(scheme, tokens, 0), layer(scheme, tokens, 1)
    assert verify(fused_experts(*first), first, {}).ok
    (tape,) = launches._LOCAL.tapes.values()
    assert tape.whole
    want = fused_experts(*second, out=torch.empty(tokens + 1, 256, dtype=torch.bfloat16, device="cuda")[1:])
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda *_, **__: pytest.fail("a kernel was bound anew"))
        patch.setattr(functional, "check", lambda *_, **__: pytest.fail("checked anew"))
        got = fused_experts(*second)
        again = fused_experts(*first)
    assert verify(got, second, {}).ok and verify(again, first, {}).ok
    assert torch.equal(got, want)


def test_replayed_on_the_current_stream_and_captured():
    arguments = layer(None, 8, 0)
    want = fused_experts(*arguments)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        out = fused_experts(*arguments)
    other = layer(None, 8, 5)
    for mine, theirs in zip(arguments, other, strict=True):
        mine.copy_(theirs)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert verify(out, arguments, {}).ok and not torch.equal(out, want)


def test_threads_at_once():
    arguments = [layer(None, 4, seed) for seed in range(4)]
    want = [fused_experts(*one) for one in arguments]
    torch.cuda.synchronize()
    wrong = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                out = fused_experts(*arguments[number])
            torch.cuda.current_stream().synchronize()
            if not torch.equal(out, want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_another_alignment_is_another_tape():
    x, *rest = layer(None, 4, 0)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(x).copy_(x)
    assert torch.equal(fused_experts(x, *rest), fused_experts(shifted, *rest))
    assert len(launches._LOCAL.tapes) == 2


def test_what_was_right_once_is_checked_when_it_differs():
    x, w13, w2, weights, ids = layer(None, 4, 0)
    fused_experts(x, w13, w2, weights, ids)
    with pytest.raises(GradientError):
        fused_experts(x, w13.detach().requires_grad_(), w2, weights, ids)
    with pytest.raises(DTypeError):
        fused_experts(x, w13, w2, weights, ids.float())
    with pytest.raises(ShapeError):
        fused_experts(x, w13, w2, weights, ids[:, :2])
    with pytest.raises(OptionError):
        fused_experts(x, w13, w2, weights, ids, activation="none such")
    with pytest.raises(LayoutError):
        fused_experts(x._neg_view(), w13, w2, weights, ids)
    other = fused_experts(x, w13, w2, weights, ids, activation="gelu")
    assert verify(other, (x, w13, w2, weights, ids), {"activation": "gelu"}).ok


@pytest.mark.parametrize("tokens", [1, 64, 1024])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_may_lie_in_the_first_workspace(scheme, tokens):
    """Also where it is larger than the intermediate of its slots, as in shards of tensor parallelism."""
    x, w13, w2, weights, ids = layer(scheme, tokens, 0, top_k=8, hidden=2048, intermediate=128)
    want = fused_experts(x, w13, w2, weights, ids)
    assert verify(want, (x, w13, w2, weights, ids), {}).ok
    experts = Experts(w13, w2)
    shapes = experts.workspace_shapes(*ids.shape, x.dtype)
    for _ in range(2):
        first, second = (
            torch.full((size,), float("nan"), dtype=x.dtype, device="cuda")
            for size in (max(shapes.workspace13[0], x.numel()), shapes.workspace2[0])
        )
        output = first[: x.numel()].view(x.shape)
        assert torch.equal(experts.apply(output, x, weights, ids, first, second), want)
