"""Batch-invariant mode: plans add up alike for every T; the torch backend gives rows the same bits in every batch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import fusedmoe
from fusedmoe import settings
from fusedmoe.backends import load
from fusedmoe.backends.workspace import layout_bytes
from fusedmoe.bench.shapes import SHAPES, Shape, format_for, problem_of
from fusedmoe.errors import OptionError
from fusedmoe.plan.invariance import anchor_tokens, arithmetic_of
from fusedmoe.plan.planner import choose
from fusedmoe.plan.validity import why_not
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.target import KNOWN, Target
from fusedmoe.testing.cases import Case, formats_of
from fusedmoe.testing.isolation import batch_variant_rows, couples_rows, disturbed_rows

TOKENS = (1, 2, 3, 7, 8, 16, 33, 64, 128, 300, 512, 1024, 2048, 5000, 8192, 32768, 262144)
LAYERS = (*SHAPES.values(), Shape("odd", 60, 6, 1056, 352), Shape("one", 1, 1, 64, 96))
TARGETS = (*KNOWN.values(), Target("intel", "xpu", 0, 64, 131072), Target("cpu", interpret=True))


def arithmetics(problem, target, plan):
    gemms = (plan.triton.gate_up, problem.gate_up_gemm), (plan.triton.down, problem.down_gemm)
    return [arithmetic_of(config, gemm, problem, target) for config, gemm in gemms]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.arch or t.vendor)
@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_every_number_of_tokens_adds_up_alike(target, scheme):
    every = itertools.product(LAYERS, (torch.bfloat16, torch.float32), ("concatenated", "interleaved"))
    for shape, dtype, gate_up in itertools.islice(every, 0, None, 3):  # any two values meet
        first = problem_of(shape, 1, dtype, form=format_for(scheme, shape), batch_invariant=True)
        problems = [replace(first, tokens=n, gate_up=gate_up) for n in TOKENS]
        plans = [choose(problem, target, "auto") for problem in problems]
        if plans[0].triton is None:
            assert {plan.backend for plan in plans} == {"torch"}
            continue
        found = {tuple(arithmetics(p, target, plan)) for p, plan in zip(problems, plans, strict=True)}
        assert len(found) == 1
        rounded = {plan.triton.requantise == "kernel" and not plan.triton.unrounded for plan in plans}
        assert len(rounded) == 1, "codes are made of the same numbers"
        for problem, plan in zip(problems, plans, strict=True):
            how = plan.triton
            for config, gemm in ((how.gate_up, problem.gate_up_gemm), (how.down, problem.down_gemm)):
                assert not why_not(config, gemm, target)
                assert not (how.few and (config.programs_per_sm or config.specialised or config.maps == "xw"))
            assert how.gate_up.block_m == how.down.block_m
            assert how.gather == (how.gate_up.maps == "xw")
            assert "batch-invariant" in plan.why


def test_plain_plans_do_not_all_add_up_alike():
    """Else the test above would test nothing."""
    for scheme in ("none", "fp8_block", "int4_w4a16"):
        shape, target = SHAPES["qwen3-30b-a3b"], KNOWN["sm_90"]
        problems = [problem_of(shape, n, torch.bfloat16, form=format_for(scheme, shape)) for n in TOKENS]
        plans = [choose(problem, target, "auto") for problem in problems]
        found = {
            (*arithmetics(p, target, plan), plan.triton.requantise) for p, plan in zip(problems, plans, strict=True)
        }
        assert len(found) > 1


def test_a_long_prompt_keeps_its_plan():
    for shape in SHAPES.values():
        problem = problem_of(shape, 32768, torch.bfloat16, batch_invariant=True)
        assert problem.tokens > anchor_tokens(problem)
        for target in KNOWN.values():
            plain = choose(replace(problem, batch_invariant=False), target, "auto")
            assert choose(problem, target, "auto").triton == plain.triton


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "int8_w8a16", "fp8_w8a16", "int8_w8a8"])
def test_schemes_whose_tiles_add_up_alike_keep_their_plans(scheme):
    """Words have one sum over all of K in every kernel, and integers add up in any order."""
    for shape, tokens in itertools.product(SHAPES.values(), TOKENS):
        problem = problem_of(shape, tokens, torch.bfloat16, form=format_for(scheme, shape))
        plain, alike = (choose(replace(problem, batch_invariant=b), KNOWN["sm_90"], "auto") for b in (False, True))
        if plain.triton.single:
            assert not alike.triton.single, "its sums are nobody else's"
            continue
        assert alike.triton == plain.triton


@pytest.mark.parametrize("scheme", ["none", "fp8_block", "int4_w4a16"])
def test_a_workspace_for_more_tokens_serves_fewer(scheme):
    pytest.importorskip("triton")
    target = KNOWN["sm_90"]
    for shape in LAYERS:
        first = problem_of(shape, 1, torch.bfloat16, form=format_for(scheme, shape), batch_invariant=True)
        sizes = []
        for n in TOKENS:
            plan = choose(replace(first, tokens=n), target, "triton")
            sizes.append(layout_bytes(load("triton").workspace_layout(replace(first, tokens=n), plan)))
        assert sizes == sorted(sizes), shape


# --- the torch backend ------------------------------------------------------------------------------------------------

CASES = [
    *(Case.of((40, 3, 5, 33, 80), dtype=d, bias=True, pad=3) for d in ("float32", "float16", "bfloat16")),
    Case.of((40, 2, 3, 257, 100), dtype="float32", ids="invalid", mapped=True),
    *(
        Case.of((24, 2, 3, 96, 64), formats=(form, form), ids="invalid").fitted()
        for scheme in SCHEMES
        for form in formats_of(scheme)[:3]
    ),
]


@pytest.mark.parametrize("case", [c for c in CASES if not couples_rows(c)], ids=str)
def test_rows_of_the_torch_backend(case):
    assert batch_variant_rows(case, (1, 2, 5, 17, case.tokens), backend="torch") == dict.fromkeys(
        (1, 2, 5, 17, case.tokens), 0
    )


@pytest.mark.parametrize("case", [c for c in CASES if not couples_rows(c)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_row(case, value):
    changed, seen = disturbed_rows(case, value, backend="torch")
    quantised = any(form is not None and form.inputs is not None for form in case.formats)
    assert changed == 0
    assert seen or quantised and value == float("inf")  # which saturates


def test_the_mode_is_refused_where_rows_share_a_scale():
    form = format_of("fp8_channel", inputs="tensor")
    for formats, name in (((form, None), "w13"), ((None, form), "w2")):
        arguments, options = Case.of((5, 2, 3, 32, 32), formats=formats).draw()
        with pytest.raises(OptionError, match=f"batch_invariant: got a {name} .*wanted rows that share no scale"):
            fusedmoe.fused_experts(*arguments, batch_invariant=True, **options)
    arguments, options = Case.of((5, 2, 3, 32, 32), formats=(form, None), codes=True).draw()
    fusedmoe.fused_experts(*arguments, batch_invariant=True, **options)  # given, it couples nothing
    with pytest.raises(OptionError, match=r"batch_invariant: got str; wanted True or False"):
        fusedmoe.fused_experts(*arguments, batch_invariant="yes", **options)


def test_the_process_decides_where_the_call_does_not(monkeypatch):
    form = format_of("fp8_channel", inputs="tensor")
    arguments, options = Case.of((5, 2, 3, 32, 32), formats=(form, form)).draw()
    monkeypatch.setenv("FUSEDMOE_BATCH_INVARIANT", "1")
    settings.settings.cache_clear()
    try:
        with pytest.raises(OptionError, match="batch_invariant"):
            fusedmoe.fused_experts(*arguments, **options)
        fusedmoe.fused_experts(*arguments, batch_invariant=False, **options)
    finally:
        monkeypatch.delenv("FUSEDMOE_BATCH_INVARIANT")
        settings.settings.cache_clear()


def test_the_module_and_the_compiled_call_take_it():
    layer = fusedmoe.FusedExperts(5, 33, 24, batch_invariant=True)
    assert "batch_invariant=True" in repr(layer)
    x, weights, ids = torch.randn(17, 33), torch.rand(17, 2), torch.randint(5, (17, 2))
    whole = layer(x, weights, ids)
    assert torch.equal(layer(x[3:4], weights[3:4], ids[3:4]), whole[3:4])
    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x[3:9], weights[3:9], ids[3:9]), whole[3:9])
