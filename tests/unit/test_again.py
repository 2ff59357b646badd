"""Calls that need no check: what their key tells apart, on tensors that stand for a GPU's."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import experts, quantize
from fusedmoe.backends import launch as launches
from fusedmoe.backends.launch import Tape, alike, call_for, keep_call
from fusedmoe.experts import again
from fusedmoe.settings import Settings


@pytest.fixture(autouse=True)
def no_calls():
    launches._LOCAL.calls.clear()


def arguments(**other):
    x = torch.empty(3, 64, dtype=torch.bfloat16, device="meta")
    w13, w2 = (torch.empty(4, n, k, dtype=torch.bfloat16, device="meta") for n, k in ((96, 64), (64, 48)))
    weights, ids = torch.empty(3, 2, device="meta"), torch.empty(3, 2, dtype=torch.int64, device="meta")
    made = {"x": x, "w13": w13, "w2": w2, "weights": weights, "ids": ids, "b13": None, "b2": None, "map": None}
    return tuple({**made, "scale": None, **other}.values())


def key(*options, **other):
    found, done = again(arguments(**other), options or ("silu",))
    assert done is None
    return found


def test_calls_alike_have_one_key():
    assert key() == key() and key() is not None


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.empty(4, 64, dtype=torch.bfloat16, device="meta")},
        {"x": torch.empty(3, 128, dtype=torch.bfloat16, device="meta")[:, ::2]},
        {"ids": torch.empty(3, 2, dtype=torch.int32, device="meta")},
        {"w2": torch.empty(4, 64, 48, dtype=torch.bfloat16, device="meta", requires_grad=True)},
        {"x": torch.nn.Parameter(torch.empty(3, 64, dtype=torch.bfloat16, device="meta"), requires_grad=False)},
        {"b13": torch.empty(4, 96, device="meta")},
        {"b2": torch.empty(4, 96, device="meta")},
        {"weights": torch.empty(3, 2, device="meta")._neg_view()},
    ],
    ids=lambda other: f"{next(iter(other))}",
)
def test_what_a_check_could_see_is_in_the_key(other):
    assert key(**other) not in (None, key())


def test_options_and_grad_mode_are_in_the_key():
    assert len({key("silu"), key("gelu"), key("silu", 1), key("silu", True), key("silu", None)}) == 5
    with torch.no_grad():
        quiet = key()
    assert quiet != key()


def test_settings_are_in_the_key(monkeypatch):
    before = key()
    monkeypatch.setattr(experts, "settings", lambda: Settings(backend="torch"))
    assert key() != before


def test_quantised_and_plain_experts_differ():
    w13, w2 = torch.randn(4, 96, 64), torch.randn(4, 64, 48)
    fp8 = quantize(w13, "fp8_channel", parts=2), quantize(w2, "fp8_channel")
    keys = {key(w13=w13, w2=w2), key(w13=fp8[0], w2=w2), key(w13=w13, w2=fp8[1]), key(w13=fp8[0], w2=fp8[1])}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "other",
    [{"x": None}, {"x": "text"}, {"w13": [1.0]}, {"ids": torch.ones(3, 2).to_sparse()}],
    ids=["none", "text", "list", "sparse"],
)
def test_what_is_no_tensor_is_left_to_the_check(other):
    assert again(arguments(**other), ("silu",)) == (None, None)


def test_options_that_cannot_be_looked_up_and_cpus_are_left_to_the_check():
    assert again(arguments(), ([],)) == (None, None)
    assert again(arguments(x=torch.empty(3, 64)), ()) == (None, None)


def test_a_kept_call_is_made_of_its_launches():
    tensors = [value for value in arguments() if value is not None]
    tape, seen = Tape(), []
    tape.n_bytes = 5
    tape.replay = seen.append
    known = key()
    keep_call(known, tape, torch.float16)
    _, out = again(arguments(), ("silu",))
    assert out.dtype == torch.float16 and out.shape == (3, 64)
    (sources,) = seen
    assert [alike(one) for one in sources[:5]] == [alike(one) for one in tensors]
    assert sources[5] is out and sources[6].shape == (5,)
    assert call_for(known)[0] is tape
