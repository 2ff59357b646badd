"""The Triton backend in Triton's interpreter, over options and awkward shapes. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fusedmoe import experts, reference
from fusedmoe.checks import check
from fusedmoe.plan.config import KernelConfig, Plan
from fusedmoe.plan.heuristics import assemble
from fusedmoe.plan.planner import choose
from fusedmoe.plan.validity import why_not_plan
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.spec.activation import Activation
from fusedmoe.target import target_of
from fusedmoe.testing.cases import ACTIVATIONS, OPTIONS, Case, pairwise, quantised_cases, run_poisoned
from fusedmoe.testing.verify import TOLERANCE, relative_error

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# Rows of a tile that are not live hold whatever lies in memory; numpy remarks on its NaNs and overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

#: (tokens, top_k, experts, hidden, intermediate), and why
SHAPES = [
    (1, 1, 1, 16, 16),  # the smallest
    (1, 2, 5, 33, 80),  # sizes that are a multiple of nothing
    (3, 4, 3, 64, 48),  # more choices than experts
    (20, 2, 4, 48, 33),  # few slots, more than one tile of an expert
    (2, 3, 100, 32, 40),  # more experts than slots
    (40, 2, 3, 96, 40),  # scheduled
    (70, 3, 7, 33, 24),  # scheduled, ragged
    (9, 8, 200, 24, 32),  # scheduled, most experts empty
]
GRID = pairwise({"shape": SHAPES, **OPTIONS})


@pytest.mark.parametrize("row", range(len(GRID)))
def test_option_grid(row):
    case = Case.of(**GRID[row])
    _, error = run_poisoned(case, seed=row)
    assert error < TOLERANCE[case.dtype], case


QUANTISED = quantised_cases([(1, 1, 1, 16, 16), (2, 2, 5, 33, 80), (20, 2, 4, 48, 33), (40, 2, 3, 48, 40)])


@pytest.mark.parametrize("index", range(len(QUANTISED)))
def test_scheme_grid(index):
    case = QUANTISED[index]
    _, error = run_poisoned(case, seed=index)
    assert error < case.tolerance, case


@pytest.mark.parametrize(("tokens", "ids"), [(530, "one"), (2060, "invalid")])  # other ids: test_routing.py
def test_many_slots_are_sorted_by_several_programs(tokens, ids):
    # Above 4096 slots in three launches, over several chunks.
    case = Case.of((tokens, 2, 5, 16, 16), ids=ids)
    _, error = run_poisoned(case)
    assert error < TOLERANCE[case.dtype]


def test_top_k_64_and_4096_experts():
    for shape in ((2, 64, 64, 16, 16), (1, 2, 4096, 16, 16), (40, 2, 4096, 16, 16)):
        _, error = run_poisoned(Case.of(shape, dtype="float32"))
        assert error < TOLERANCE["float32"], shape


def test_ids_of_int64_beyond_int32_are_absent():
    case = Case.of((4, 3, 4, 32, 16), dtype="float32")
    arguments, options = case.draw()
    ids = arguments[4]
    ids[0, 0], ids[1, 1], ids[2] = 2**63 - 1, -(2**63), 2**32  # 2**32 would be expert 0 if truncated
    out = fused(arguments, options)
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < TOLERANCE["float32"]
    assert out[2].abs().sum() == 0


def fused(arguments, options, plan: Plan | None = None) -> torch.Tensor:
    call = check(*arguments, **options)
    return experts.run(call, plan or choose(call.problem, target_of(torch.device("cpu")), "triton"))


def test_nan_in_one_token_stays_in_its_row():
    case = Case.of((40, 2, 4, 32, 16), dtype="float32")
    arguments, options = case.draw()
    clean = fused(arguments, options)
    arguments[0][7] = float("nan")
    dirty = fused(arguments, options)
    assert dirty[7].isnan().all()
    others = [t for t in range(40) if t != 7]
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_keep_nan(activation):
    case = Case.of((2, 1, 1, 16, 16), dtype="float32", activation=activation)
    arguments, options = case.draw()
    arguments[0][0] = float("nan")
    out = fused(arguments, options)
    assert out[0].isnan().all()
    assert not out[1].isnan().any()


#: What the planner picks on Hopper, at interpreter size: tensor maps, persistent grids, gathered rows.
HOPPER = [
    {"maps": "w"},
    {"maps": "xw"},
    {"maps": "w", "programs_per_sm": 2},
    {"maps": "xw", "programs_per_sm": 3, "flatten": True},
    {"maps": "xw", "programs_per_sm": 1, "gather": True},
]


@pytest.mark.parametrize("form", HOPPER, ids=str)
@pytest.mark.parametrize(
    "layout", [("concatenated", "NK"), ("interleaved", "NK"), ("concatenated", "KN"), ("interleaved", "KN")]
)
@pytest.mark.parametrize("sizes", [(64, 40), (72, 64)], ids=["ragged I", "ragged H"])
def test_tensor_maps_and_persistent_grids(form, layout, sizes):
    hidden, intermediate = sizes
    if layout[1] == "KN":  # a ragged K cannot be loaded by map from this storage: see plan/validity.py
        hidden, intermediate = 64, 64
    case = Case.of(
        (50, 2, 3, hidden, intermediate), dtype="float16", gate_up_layout=layout[0], weight_layout=layout[1],
        ids="invalid", bias=True,
    )  # fmt: skip
    arguments, options = case.draw()
    call = check(*arguments, **options)
    plan = choose(call.problem, target_of(torch.device("cpu")), "triton")
    form = dict(form)
    gather = form.pop("gather", False)
    config = KernelConfig(block_m=16, block_n=16, block_k=32, group_m=2, **form)
    first = config if gather else dataclasses.replace(config, maps="w")
    how = dataclasses.replace(plan.triton, few=False, gather=gather, gate_up=first, down=config)
    out = experts.run(call, dataclasses.replace(plan, triton=how))
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < TOLERANCE["float16"]


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("layout", ["NK", "KN"])
@pytest.mark.parametrize("swap", [True, False])
def test_pairs_of_rows_that_lie_apart(few, layout, swap):
    stored = {"gate_up_layout": "concatenated", "weight_layout": layout}
    case = Case.of((7, 2, 3, 72, 40), dtype="float16", ids="invalid", bias=True, **stored)
    arguments, options = case.draw()
    call = check(*arguments, **options)
    plan = choose(call.problem, target_of(torch.device("cpu")), "triton")
    config = KernelConfig(block_m=16, block_n=16, block_k=32, pairs=True, swap=swap)
    how = dataclasses.replace(plan.triton, few=few, gate_up=config, down=dataclasses.replace(config, pairs=False))
    out = experts.run(call, dataclasses.replace(plan, triton=how))
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < TOLERANCE["float16"]


@pytest.mark.parametrize("on", ["gate_up", "down"])
@pytest.mark.parametrize(
    "form",
    [
        None,
        format_of("fp8_block"),
        format_of("fp8_channel"),
        format_of("int8_w8a8", inputs="tensor"),
        format_of("int8_w8a16", group=32, zero=True),
        format_of("int4_w4a16", group=32, zero=True),
        format_of("nvfp4"),
    ],
    ids=str,
)
def test_single_rows_in_several_steps(form, on):
    """Steps that end before K does, and columns that fill no whole tile."""
    case = Case.of((2, 3, 40, 200, 72), ids="invalid", bias=True, pad=8, formats=(form, form)).fitted()
    arguments, options = case.draw()
    call, target = check(*arguments, **options), target_of(torch.device("cpu"))
    tile, wide = (KernelConfig(block_m=1, block_n=64, block_k=k, warps=1, stages=1) for k in (64, 256))
    gate_up, down = (tile, wide) if on == "gate_up" else (wide, tile)
    how = assemble(call.problem, target, few=True, gate_up=gate_up, down=down)
    assert how.single and not why_not_plan(how, call.problem, target)
    out = experts.run(call, dataclasses.replace(choose(call.problem, target, "triton"), triton=how))
    assert relative_error(out, reference.fused_experts(*arguments, **options)) < case.tolerance


def _drop_last_k_block(x):
    x = x.clone()
    x[..., -32:] = 0
    return x


FAULTS = {
    "zeros": lambda a, o: (a, o, 0.0),
    "gate and up swapped": lambda a, o: ((a[0], a[1].roll(a[1].shape[1] // 2, 1), *a[2:]), o, 1.0),
    "weight squared": lambda a, o: ((*a[:3], a[3] ** 2, a[4]), o, 1.0),
    "expert off by one": lambda a, o: ((*a[:4], (a[4] + 1) % a[1].shape[0]), o, 1.0),
    "last K block dropped": lambda a, o: ((_drop_last_k_block(a[0]), *a[1:]), o, 1.0),
    "wrong activation": lambda a, o: (a, {**o, "activation": Activation("gelu")}, 1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_bound_rejects_planted_faults(fault, dtype):
    arguments, options = Case.of((40, 2, 4, 96, 64), dtype=dtype).draw()
    want = reference.fused_experts(*arguments, **options)
    wrong_arguments, wrong_options, scale = FAULTS[fault](arguments, options)
    out = scale * fused(wrong_arguments, wrong_options)
    assert relative_error(out, want) > 10 * TOLERANCE[dtype]


def _spread(tensor: torch.Tensor, dim: int, step: int) -> torch.Tensor:
    """The same values, ``step`` elements apart along ``dim``: a view of memory that is reserved but hardly touched."""
    strides = list(tensor.stride())
    strides[dim] = step
    size = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
    spread = torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    return spread.copy_(tensor)


@pytest.mark.parametrize("position", ["hidden_states", "w13", "w2", "topk_weights", "topk_ids", "bias", "out"])
@pytest.mark.parametrize("tokens", [3, 40])
def test_offsets_beyond_2_to_31(position, tokens):
    case = Case.of((tokens, 2, 3, 32, 16), dtype="float16", bias=True, id_dtype="int32", router_dtype="float16")
    arguments, options = case.draw()
    want = fused(arguments, options)
    names = ["hidden_states", "w13", "w2", "topk_weights", "topk_ids"]
    far = 2**31 // (len(arguments[names.index(position)]) - 1 if position in names else tokens - 1) + 8
    if position == "bias":
        options["w13_bias"] = _spread(options["w13_bias"].half(), 0, 2**30 + 8)
        want = fused(arguments, {**options, "w13_bias": options["w13_bias"].contiguous()})
    elif position == "out":
        options["out"] = _spread(torch.zeros_like(want), 0, far)
    else:
        index = names.index(position)
        spread = _spread(arguments[index], 0, far)
        arguments = (*arguments[:index], spread, *arguments[index + 1 :])
    assert torch.equal(fused(arguments, options), want)
