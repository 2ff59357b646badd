"""On a GPU: nothing of a batch shows in a row but its own token; prefill and decoding give the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fusedmoe.checks import check
from fusedmoe.plan.planner import choose, support
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case, formats_of
from fusedmoe.testing.isolation import batch_variant_rows, couples_rows, disturbed_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

#: One token, both sides of the path without a schedule, every height of a tile, prefill.
SIZES = (1, 2, 7, 8, 9, 32, 64, 200, 500, 1000, 2048, 4096, 8192)
#: (tokens, top_k, experts, hidden, intermediate)
SHAPES = [(8192, 8, 64, 512, 384), (8192, 2, 8, 1024, 4096), (8192, 8, 128, 2048, 768)]
BACKENDS = ("auto", "triton", "gluon_sm90")


def plain() -> list[Case]:
    return [
        Case.of(shape, dtype=dtype, gate_up_layout=layout, bias=True, ids="invalid")
        for shape in SHAPES
        for dtype, layout in (("bfloat16", "concatenated"), ("float16", "interleaved"))
    ] + [Case.of((2048, 8, 64, 256, 192), dtype="float32", ids="invalid")]


def quantised() -> list[Case]:
    forms = [form for scheme in SCHEMES for form in dict.fromkeys((format_of(scheme), *formats_of(scheme)[:4]))]
    cases = [Case.of(SHAPES[i % 2], formats=(form, form), ids="any").fitted() for i, form in enumerate(forms)]
    return [case for case in cases if not couples_rows(case)]


CASES = plain() + quantised()


def name(case: Case) -> str:
    return f"{case.formats[0] or case.dtype} {case.tokens}x{case.top_k}x{case.experts}x{case.hidden}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_batch_invariant(case, backend):
    arguments, options = replace(case, tokens=8).draw("cuda")
    problem, target = check(*arguments, **options).problem, target_of(torch.device("cuda", torch.cuda.current_device()))
    if backend != "auto" and support(replace(problem, tokens=case.tokens), target)[backend]:
        pytest.skip(f"{backend} does not take it")
    sizes = [size for size in SIZES if size <= case.tokens]
    found = batch_variant_rows(case, sizes, "cuda", backend)
    anchor = choose(replace(problem, tokens=case.tokens, batch_invariant=True), target, backend)
    plans = [
        choose(replace(problem, tokens=n, batch_invariant=True), target, backend).triton for n in found if found[n]
    ]
    assert not any(found.values()), (found, anchor.triton, plans[:1])


def test_batch_invariant_row_by_row():
    case = Case.of((300, 4, 16, 256, 192), ids="invalid", bias=True)
    assert batch_variant_rows(case, (1, 8, 300), "cuda", "torch") == {1: 0, 8: 0, 300: 0}


def test_batches_show_without_the_mode():
    """Else the tests above would test nothing."""
    form = format_of("fp8_block")
    case = Case.of((8192, 8, 64, 512, 384), formats=(form, form)).fitted()
    assert batch_variant_rows(case, (8,), "cuda", "auto", batch_invariant=False)[8] > 0


@pytest.mark.parametrize("backend", ["triton", "gluon_sm90", "torch"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [4, 600])
@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_a_bad_number_stays_in_its_row(scheme, tokens, value, backend):
    form = None if scheme == "none" else format_of(scheme)
    case = Case.of((tokens, 4, 16, 256, 192), formats=(form, form)).fitted()
    arguments, options = case.draw("cuda")
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    if support(check(*arguments, **options).problem, target)[backend]:
        pytest.skip(f"{backend} does not take it")
    changed, seen = disturbed_rows(case, value, "cuda", backend)
    assert changed == 0
    assert seen or abs(value) == float("inf") and form is not None and form.inputs is not None  # which saturates
