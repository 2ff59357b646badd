"""The self-test passes here, and a layer that is wrong in one respect fails the lines that it should."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import selftest as module
from fusedmoe.schemes import SCHEMES
from fusedmoe.selftest import selftest
from fusedmoe.spec.activation import TABLE

CPU = torch.device("cpu")


def failed() -> set[str]:
    return {result.name for result in selftest(CPU) if not result.ok}


def test_every_capability_holds_here():
    results = list(selftest(CPU))
    assert not [result for result in results if not result.ok]
    names = [result.name for result in results]
    assert len(set(names)) == len(names)
    assert {f"scheme {name}" for name in SCHEMES} | {"hidden states as codes"} <= set(names)
    assert {f"activation {name}" for name in TABLE} | {"float32", "float16", "bfloat16", "torch.compile"} <= set(names)
    assert all(result.error <= result.tolerance and result.detail == "" for result in results)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (lambda options: options.pop("w2_bias", None), {"biases", "router weight on the input"}),
        (lambda options: options.update(gate_up_layout="concatenated"), {"gate and up interleaved"}),
        (lambda options: options.update(apply_router_weight_on_input=False), {"router weight on the input"}),
        (lambda options: options.pop("expert_map", None), {"expert map"}),
        (lambda options: options.update(weight_layout="NK"), {"experts stored [E, K, N]"}),
        (
            lambda options: (
                options.update(hidden_states_scale=options["hidden_states_scale"] * 0 + 1)
                if "hidden_states_scale" in options
                else None
            ),
            {"hidden states as codes"},
        ),
    ],
)
def test_an_option_that_is_ignored_fails_its_line(monkeypatch, change, lines):
    right = module.fused_experts

    def wrong(*arguments, **options):
        change(options)
        return right(*arguments, **options)

    monkeypatch.setattr(module, "fused_experts", wrong)
    monkeypatch.setattr(module, "_compiled", module._no_tokens)
    assert failed() == lines


def test_bits_that_differ_from_run_to_run_are_seen(monkeypatch):
    right, count = module.fused_experts, []

    def drifting(*arguments, **options):
        count.append(1)
        out = right(*arguments, **options)
        return out.view(torch.int16).add_(len(count) % 2).view(out.dtype) if out.dtype == torch.bfloat16 else out

    monkeypatch.setattr(module, "fused_experts", drifting)
    assert {"same bits again, few tokens", "same bits again, many tokens"} <= failed()


def test_a_backend_that_raises_fails_its_lines_and_no_more():
    results = list(selftest(CPU, backend="triton"))
    assert not any(result.ok for result in results)
    assert all(
        "UnsupportedError: backend 'triton' does not take this call" in r.detail
        for r in results
        if r.name != "torch.compile"
    )


def test_every_backend_that_takes_a_call_is_tested():
    names = {result.name for result in selftest(CPU)}
    assert {"backend torch, bfloat16", "backend torch, scheme fp8_block", "backend torch, scheme int8_w8a8"} <= names
    assert not any(name.startswith(("backend triton", "backend gluon")) for name in names), "there is no GPU"
    assert not any(name.startswith("backend") for name in (r.name for r in selftest(CPU, backend="torch")))
