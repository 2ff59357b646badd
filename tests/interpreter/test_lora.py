"""Adapters on the Triton backend in Triton's interpreter. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import fusedmoe
from fusedmoe import experts, reference
from fusedmoe.backends import routes
from fusedmoe.checks import check
from fusedmoe.plan.planner import choose
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.settings import settings
from fusedmoe.target import target_of
from fusedmoe.testing.cases import OPTIONS, Case, pairwise, run_poisoned
from fusedmoe.testing.verify import TOLERANCE, relative_error

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Rows of a tile that are not live hold whatever lies in memory; numpy remarks on its NaNs and overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

#: Options of adapters, for a pairwise grid.
ADAPTERS = {
    "ranks": ((1,), (3, 0, 8), (16, 16, 5, 0), (64,), (200, 3)),
    "apart": (True, False, "tensors"),
    "shared": (False, True),
    "finite": (True, False),
}
#: Sizes as Case.of takes them: one token, few slots, more experts than slots, several tiles an expert.
SHAPES = [(1, 2, 5, 33, 80), (9, 3, 4, 48, 33), (2, 3, 20, 32, 40), (40, 2, 2, 32, 24)]
GRID = pairwise({"shape": SHAPES, **OPTIONS, **ADAPTERS})[:36]


@pytest.mark.parametrize("row", range(len(GRID)))
def test_option_grid(row):
    case = Case.of(**GRID[row])
    _, error = run_poisoned(case, seed=row)
    assert error < TOLERANCE[case.dtype], case


#: The default of every scheme, and every place where an intermediate becomes codes.
FORMATS = [
    *(format_of(scheme) for scheme in SCHEMES),
    format_of("fp8_block", block=(32, 32)),
    format_of("int8_w8a8", block=(32, 32)),
    format_of("fp8_tensor", inputs="static"),
    format_of("int8_w8a8", inputs="static"),
]


def bare(options):
    return {name: value for name, value in options.items() if name not in ("lora", "adapter_ids")}


def mixed(ids):
    """Tokens with an adapter, where the second slot is empty."""
    return (ids == 0) | (ids == 2)


@pytest.mark.parametrize(("form", "tokens"), list(zip([None, *FORMATS, None], itertools.cycle([6, 40]))), ids=str)
def test_schemes_and_rows_without_an_adapter(form, tokens):
    """Within the bound of the scheme; and the other rows have the bits of the layer without adapters."""
    case = Case.of(
        (tokens, 2, 2, 64, 64), formats=(form, form), ranks=(5, 0, 16), gate_up_layout="interleaved"
    ).fitted()
    mine = lambda seed: mixed(case.draw(seed=seed)[1]["adapter_ids"])  # noqa: E731
    seed = next(seed for seed in range(20) if mine(seed).any() and not mine(seed).all())
    out, error = run_poisoned(case, seed=seed)
    assert error < case.tolerance
    arguments, options = case.draw(seed=seed)
    base = fusedmoe.fused_experts(*arguments, backend="triton", **bare(options))
    adapted = mixed(options["adapter_ids"])
    assert torch.equal(out[~adapted], base[~adapted])
    assert not (out[adapted] == base[adapted]).all(1).any()


def test_scale_of_all_rows_counts_adapted_ones():
    """Where all rows share a scale, those with an adapter have their part in it."""
    for scheme in ("fp8_tensor", "int8_w8a8"):
        form = format_of(scheme, inputs="tensor")
        case = Case.of((40, 2, 2, 64, 64), formats=(form, form), ranks=(5, 16)).fitted()
        _, error = run_poisoned(case)
        assert error < case.tolerance


def test_many_tokens_are_sorted_by_adapter(monkeypatch):
    """Several chunks of tokens in the sort by adapter, and in the sort by expert."""
    monkeypatch.setattr(routes, "ONE_LAUNCH", 256)
    case = Case.of((1100, 1, 2, 16, 16), ranks=(2, 0, 3), ids="invalid")
    arguments, options = case.draw()
    how = choose(check(*arguments, **options).problem, target_of(torch.device("cpu")), "triton").triton
    assert how.shrink.by_adapter and not how.few
    _, error = run_poisoned(case)
    assert error < TOLERANCE[case.dtype]


@pytest.mark.parametrize("tokens", [6, 40])
def test_any_number_of_programs_shares_the_adapters_of_a_tile(tokens):
    """Also more than there are, and in tiles that have none."""
    arguments, options = Case.of((tokens, 2, 3, 32, 32), ranks=(5, 4, 0, 3), ids="invalid").draw()
    call = check(*arguments, **options)
    plan = choose(call.problem, target_of(torch.device("cpu")), "triton")
    want = experts.run(call, plan)
    for turns in (1, 2, 7):
        how = replace(plan.triton, shrink=replace(plan.triton.shrink, turns=turns))
        assert torch.equal(experts.run(call, replace(plan, triton=how)), want)
    options["adapter_ids"].fill_(-1)
    base = fusedmoe.fused_experts(*arguments, backend="triton", **bare(options))
    call = check(*arguments, **options)
    assert torch.equal(experts.run(call, replace(plan, triton=how)), base)


def test_a_broken_adapter_breaks_its_own_rows_alone():
    for tokens in (6, 40):
        arguments, options = Case.of((tokens, 2, 2, 32, 32), dtype="float32", ranks=(5, 4, 3)).draw()
        clean = fusedmoe.fused_experts(*arguments, backend="triton", **options)
        for matrix in ("w13_a", "w13_b", "w2_a", "w2_b"):
            getattr(options["lora"], matrix)[1].fill_(float("nan"))
        dirty = fusedmoe.fused_experts(*arguments, backend="triton", **options)
        broken = options["adapter_ids"] == 1
        assert broken.any() and dirty[broken].isnan().all()
        assert torch.equal(dirty[~broken], clean[~broken])


def test_a_batch_without_adapters_is_the_layer():
    for tokens in (6, 40):
        arguments, options = Case.of((tokens, 2, 2, 32, 32), ranks=(5, 4)).draw()
        options["adapter_ids"].fill_(-1)
        base = fusedmoe.fused_experts(*arguments, backend="triton", **bare(options))
        assert torch.equal(fusedmoe.fused_experts(*arguments, backend="triton", **options), base)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_an_adapter_that_is_not_enabled_is_none(dtype):
    arguments, options = Case.of((40, 2, 2, 32, 32), ranks=(5, 4)).draw()
    base = fusedmoe.fused_experts(*arguments, backend="triton", **bare(options))
    options["lora"].adapter_enabled = torch.tensor([0, 1], dtype=dtype)
    out = fusedmoe.fused_experts(*arguments, backend="triton", **options)
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < TOLERANCE["bfloat16"]
    first = options["adapter_ids"] == 0
    assert first.any() and torch.equal(out[first], base[first])


@pytest.mark.parametrize("tokens", [3, 40])
def test_offsets_beyond_2_to_31(tokens):
    """Strides of adapters and of their ids are multiplied in 64 bits."""
    arguments, options = Case.of((tokens, 2, 2, 32, 16), dtype="float16", ranks=(3, 4), id_dtype="int32").draw()
    want = fusedmoe.fused_experts(*arguments, backend="triton", **options)
    lora = options["lora"]
    for name in ("w13_a", "w13_b", "w2_a", "w2_b"):
        setattr(lora, name, spread(getattr(lora, name), 0, 2**31 + 8))
    options["adapter_ids"] = spread(options["adapter_ids"], 0, 2**31 // (tokens - 1) + 8)
    assert torch.equal(fusedmoe.fused_experts(*arguments, backend="triton", **options), want)


def spread(tensor, dim, step):
    """The same values, ``step`` elements apart along ``dim``: memory that is reserved but hardly touched."""
    strides = list(tensor.stride())
    strides[dim] = step
    size = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
    return torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
