"""Adapters under tensor parallelism: cut as the layer is, within the sum of all ranks; and where they cannot go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import fusedmoe
from fusedmoe import Adapter, LoRA, reference
from fusedmoe.errors import OptionError, ShapeError, UnsupportedError
from fusedmoe.modular import Experts
from fusedmoe.parallel import ExpertParallel, TensorParallel, intermediate_slice
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import Case
from fusedmoe.testing.ranks import Ranks
from fusedmoe.testing.verify import relative_error

E, K, H, I = 9, 3, 48, 32
CASE = Case(tokens=37, top_k=K, experts=E, hidden=H, intermediate=I, dtype="float32")


@pytest.fixture(scope="module")
def two():
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def three():
    pool = Ranks(3)
    yield pool
    pool.close()


def adapters_of(options):
    """The adapters in the slots of a case, whose numbers beyond a rank are NaN, as they would be loaded."""
    lora, found = options["lora"], []
    for slot, rank in enumerate(lora.rank.tolist()):
        a13 = lora.w13_a[slot].unflatten(1, (lora.parts, lora.max_rank))[:, :, :rank].flatten(1, 2)
        tensors = a13, lora.w13_b[slot, ..., :rank], lora.w2_a[slot, :, :rank], lora.w2_b[slot, ..., :rank]
        names = ("w13_a", "w13_b", "w2_a", "w2_b")
        found.append(Adapter(**dict(zip(names, tensors, strict=True)), scaling=float(lora.scaling[slot])))
    return found


def sliced_with_adapters(case):
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    (x, w13, w2, weights, ids), options = case.draw(seed=7)
    want = reference.fused_experts(x, w13, w2, weights, ids, **options)
    adapters, adapter_ids = adapters_of(options), options["adapter_ids"]
    bare = {name: value for name, value in options.items() if name not in ("lora", "adapter_ids")}
    ends = I * rank // n_ranks, I * (rank + 1) // n_ranks
    slots = LoRA.of([intermediate_slice(a, *ends, gate_up_layout=case.gate_up_layout) for a in adapters])
    parallel = TensorParallel(None, intermediate_slice(Experts(w13, w2, **bare), *ends))
    got = parallel(x, weights, ids, lora=slots, adapter_ids=adapter_ids)
    return got, want, parallel(x, weights, ids), reference.fused_experts(x, w13, w2, weights, ids, **bare)


@pytest.mark.parametrize(
    "case",
    [
        replace(CASE, ranks=(5, 8), bias=True),
        replace(CASE, ranks=(5, 8), gate_up_layout="interleaved", weight_layout="KN", shared=True, ids="invalid"),
        replace(CASE, ranks=(3,), activation=fusedmoe.Activation("relu2_no_mul"), on_input=True),
        replace(CASE, ranks=(3, 4), apart=False),
    ],
    ids=["concatenated", "interleaved", "no gate", "one A"],
)
@pytest.mark.parametrize("pool", ["two", "three"])
def test_adapters_are_cut_as_the_layer_is(pool, case, request):
    """On three ranks, slices of 10, 11 and 11 columns."""
    for got, want, without, base in request.getfixturevalue(pool).run(sliced_with_adapters, case):
        assert relative_error(got, want) < 2e-6
        assert relative_error(without, base) < 2e-6
        assert relative_error(got, base) > 0.01, "adapters count"


def quantised_with_adapters():
    form = format_of("fp8_channel")
    case = Case(
        tokens=9, top_k=2, experts=3, hidden=64, intermediate=64, dtype="float32", formats=(form, form), ranks=(5, 8)
    )
    (x, w13, w2, weights, ids), options = case.draw(seed=7)
    adapters = {name: options.pop(name) for name in ("lora", "adapter_ids")}
    got = TensorParallel(None, Experts(w13, w2, **options))(x, weights, ids, **adapters)
    return got, dist.get_world_size() * fusedmoe.fused_experts(x, w13, w2, weights, ids, **options, **adapters)


def test_adapters_of_a_quantised_layer_meet_rows_that_are_not(two):
    for got, want in two.run(quantised_with_adapters):
        assert relative_error(got, want) < 5e-7


def adapters_that_would_travel():
    (x, w13, w2, weights, ids), options = replace(CASE, ranks=(3,)).draw()
    adapters = {name: options.pop(name) for name in ("lora", "adapter_ids")}
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(E).chunk(n_ranks)[rank]
    local = Experts(w13[mine], w2[mine])
    with pytest.raises(UnsupportedError, match="TensorParallel with lora: got ExpertParallel; wanted experts.*merge"):
        TensorParallel(None, ExpertParallel(None, local, top_k=K))(x, weights, ids, **adapters)
    return True


def test_adapters_do_not_travel_with_rows(two):
    assert two.run(adapters_that_would_travel) == [True, True]


@pytest.mark.parametrize(("of_experts", "layout"), [(False, "both"), (True, "interleaved")], ids=["none", "experts"])
def test_the_layout_of_a_slice(of_experts, layout):
    (_, w13, w2, _, _), options = replace(CASE, ranks=(3,)).draw()
    layer = Experts(w13, w2) if of_experts else adapters_of(options)[0]
    with pytest.raises(OptionError, match=f"gate_up_layout: got '{layout}'; wanted"):
        intermediate_slice(layer, 0, 4, gate_up_layout=layout)


@pytest.mark.parametrize("ends", [(-1, 4), (4, 4), (0, I + 1)], ids=str)
def test_a_slice_outside(ends):
    with pytest.raises(ShapeError, match="intermediate_slice: got .* wanted within 0 .. 32"):
        intermediate_slice(adapters_of(replace(CASE, ranks=(3,)).draw()[1])[0], *ends)
