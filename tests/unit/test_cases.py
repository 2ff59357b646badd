"""What cases draw, and that the bound they state rejects what is wrong and nothing else."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from fusedmoe.backends import torch as torch_backend
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.functional import fused_experts
from fusedmoe.numerics import quantise_inputs
from fusedmoe.schemes import SCHEMES
from fusedmoe.spec.format import ELEMENTS
from fusedmoe.testing import verify as verifying
from fusedmoe.testing.cases import Case, formats_of, pairwise, quantised_cases, random_matrix, run_poisoned
from fusedmoe.testing.verify import expected, relative_error, verify

SHAPES = [(1, 1, 1, 16, 16), (2, 2, 5, 33, 80), (20, 2, 4, 48, 33), (70, 3, 7, 33, 24)]
CASES = quantised_cases(SHAPES)
FORMATS = [form for scheme in SCHEMES for form in formats_of(scheme)]


def case_of(form, **options) -> Case:
    return Case.of((24, 2, 4, 160, 128), **{"formats": (form, form), "router_dtype": "float32", **options}).fitted()


def test_every_choice_of_every_scheme_is_a_format():
    for scheme, has in SCHEMES.items():
        formats = formats_of(scheme)
        assert {form.element for form in formats} == set(has.elements)
        assert {form.scale for form in formats} == set(has.scales)
        assert {form.inputs.mode if form.inputs else None for form in formats} == set(has.inputs)
        assert {form.zero for form in formats} == ({False, True} if has.zero else {False})
        assert len(set(formats)) == len(formats)


def test_every_format_is_in_a_case():
    assert {form for case in CASES for form in case.formats} == {None, *FORMATS}
    pairs = {(form.scheme, case.activation) for case in CASES for form in case.formats if form}
    activations = {case.activation for case in CASES}
    assert pairs == set(itertools.product(SCHEMES, activations))


def test_pairwise_has_every_pair():
    options = {"a": (1, 2, 3), "b": "xy", "c": (None, True, False)}
    rows = pairwise(options)
    assert len(rows) < 3 * 2 * 3
    for (a, first), (b, second) in itertools.combinations(options.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(first, second))


@pytest.mark.parametrize("index", range(len(CASES)))
def test_cases_on_the_torch_backend(index):
    case = CASES[index]
    _, error = run_poisoned(case, backend="torch", seed=index)
    assert error < 0.7 * case.tolerance, case


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_random_matrices(form):
    shape = (4, 2 * 96, 128)
    one, again = (random_matrix(form, shape, torch.Generator().manual_seed(3), parts=2) for _ in range(2))
    assert all(torch.equal(tensor.float(), again.tensors()[name].float()) for name, tensor in one.tensors().items())
    w = one.dequantize()
    assert w.isfinite().all() and 0.5 < w.std() * 128**0.5 < 2.5
    scales = one.dequantize().abs().amax((1, 2)) / ELEMENTS[form.element].largest
    of_experts = one.tensor_scale[:, 0] if form.tensor_scale else one.scale.float().mean((1, 2))
    if form.scale == "e8m0":
        of_experts = torch.exp2(of_experts)
    assert 3 < of_experts[1] / of_experts[0] < 30 and scales.min() > 0


@pytest.mark.parametrize("form", FORMATS[:: len(FORMATS) // 20], ids=str)
def test_memory_beside_the_operands_is_poisoned(form):
    (x, w13, w2, *_), options = case_of(form, pad=3, codes=True, dtype="float32").draw()
    for tensor in (x, *w13.tensors().values(), *w2.tensors().values()):
        assert not tensor.is_contiguous() or tensor.numel() == 1
        beside = tensor.as_strided(tensor.shape[:-1], tensor.stride()[:-1], tensor.storage_offset() + tensor.shape[-1])
        if tensor.is_floating_point() and tensor.dim() > 1:
            assert beside.float().isnan().all()
        elif tensor.dim() > 1:
            assert beside.unique().tolist() == [255 if tensor.dtype == torch.uint8 else 85]
    assert (w13.format.inputs is not None) == ("hidden_states_scale" in options)


# --- the bound ------------------------------------------------------------------------------------------------------


def mapped(w, **functions):
    """The matrix with some of its tensors, those that there are, changed."""
    tensors = {name: functions.get(name, lambda t: t)(tensor) for name, tensor in w.tensors().items()}
    return ExpertMatrix(w.format, tensors.pop("data"), tensors.pop("scale"), **tensors, parts=w.parts)


def swap_halves(t):
    return t.roll(t.shape[1] // 2, 1) if t.dim() == 3 else t


def without_last_columns(w):
    per_byte = w.format.per_byte
    values = quantise_zero(w)
    data = w.data.clone()
    data.view(torch.uint8)[:, :, -32 // per_byte :] = values
    return mapped(w, data=lambda _: data)


def quantise_zero(w):
    """The byte of codes of 0 where there are no zero points."""
    zero = ELEMENTS[w.format.element].zero
    return zero * 17 if w.format.per_byte == 2 else zero


def both(change):
    return lambda case, a, o: ((a[0], change(a[1]), change(a[2]), *a[3:]), o)


def other_block(w):
    dim = 2 if w.scale.shape[2] > 1 else 1
    return mapped(w, scale=lambda t: t.roll(1, dim)) if w.scale.shape[dim] > 1 else None


def swap_nibbles(w):
    return mapped(w, data=lambda t: (t >> 4) | (t << 4)) if w.format.per_byte == 2 else None


def ignore_zero(w):
    return mapped(w, zero=lambda t: torch.full_like(t, quantise_zero(w))) if w.zero is not None else None


def one_tensor_scale(w):
    apart = w.tensor_scale is not None and w.tensor_scale.ndim == 2
    return mapped(w, tensor_scale=lambda t: t[:, :1].expand_as(t)) if apart else None


def other_token(case, a, o):
    inputs = a[1].format.inputs
    if inputs is None or inputs.mode not in ("token", "group"):
        return None
    codes, scale = quantise_inputs(a[0], inputs)
    codes = codes.to(getattr(torch, ELEMENTS[inputs.element].dtype))
    return (codes, *a[1:]), {**o, "hidden_states_scale": scale.roll(1, 0), "dtype": a[0].dtype}


#: f(case, arguments, options) -> what a wrong kernel would compute instead, or None where it cannot go wrong that way.
FAULTS = {
    "gate and up swapped": lambda case, a, o: ((a[0], a[1].map(swap_halves), *a[2:]), o),
    "expert off by one": lambda case, a, o: ((*a[:4], (a[4] + 1) % case.experts), o),
    "another expert's scale": both(lambda w: mapped(w, scale=lambda t: t.roll(1, 0))),
    "another expert's tensor scale": both(
        lambda w: mapped(w, tensor_scale=lambda t: t.roll(1, 0)) if w.tensor_scale is not None else None
    ),
    "up's tensor scale is gate's": lambda case, a, o: ((a[0], one_tensor_scale(a[1]), *a[2:]), o),
    "scale of the first expert": both(lambda w: mapped(w, scale=lambda t: t[:1].expand_as(t))),
    "scale of another block": both(other_block),
    "last K block dropped": both(without_last_columns),
    "zero point ignored": both(ignore_zero),
    "nibbles swapped": both(swap_nibbles),
    "input scale of another token": other_token,
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bound_rejects_planted_faults(scheme, dtype):
    planted = set()
    for form in formats_of(scheme):
        case = case_of(form, dtype=dtype)
        arguments, options = case.draw()
        want = expected(arguments, options)
        assert relative_error(torch.zeros_like(want), want) == 1 > 10 * case.tolerance
        for name, fault in FAULTS.items():
            changed = fault(case, arguments, options)
            if changed is None or None in changed[0][1:3]:
                continue
            planted.add(name)
            out = fused_experts(*changed[0], backend="torch", **changed[1])
            assert relative_error(out, want) > 3 * case.tolerance, (name, str(form))
    impossible = set()
    has = SCHEMES[scheme]
    if not has.zero:
        impossible.add("zero point ignored")
    if not has.tensor_scale:
        impossible |= {"another expert's tensor scale", "up's tensor scale is gate's"}
    if has.granularities == ("tensor",):
        impossible.add("scale of another block")
    if ELEMENTS[has.elements[0]].per_byte == 1:
        impossible.add("nibbles swapped")
    if not {"token", "group"} & set(has.inputs):
        impossible.add("input scale of another token")
    assert planted == set(FAULTS) - impossible


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_bound_is_near_what_roundings_cost(monkeypatch, scheme, dtype):
    """The intermediate in the type of the layer before it is quantised: what the bound is derived for."""
    right = torch_backend._dequantised
    monkeypatch.setattr(verifying, "SUMS", 0.0)  # sums of codes are exact here

    def rounded(x, w, live=None):
        return right(x.to(getattr(torch, dtype)), w, live)

    monkeypatch.setattr(torch_backend, "_dequantised", rounded)
    ratios = []
    for form in formats_of(scheme):
        case = dataclasses.replace(case_of(form, dtype=dtype), tokens=64)
        arguments, options = case.draw()
        out = fused_experts(*arguments, backend="torch", **options)
        ratios.append(relative_error(out, expected(arguments, options)) / case.tolerance)
    assert 0.05 < max(ratios) < 0.7  # the lowest of few draws says little: a dozen codes more or less are off


def test_verify_takes_a_sample_but_where_all_rows_share_a_scale(monkeypatch):
    monkeypatch.setattr(verifying, "FULL", 16)
    monkeypatch.setattr(verifying, "SAMPLE", 8)
    for form in (form for form in FORMATS if form.inputs and form.scale == "float32"):
        for codes in (False, True):
            case = case_of(form, codes=codes)
            arguments, options = case.draw()
            verdict = verify(fused_experts(*arguments, backend="torch", **options), arguments, options)
            assert verdict.ok, str(form)
            assert verdict.rows == (case.tokens if form.inputs.mode == "tensor" else 8)
