"""Adapters on many ranks: cut as the layer is, and on the rank of their experts; and where they cannot go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import fusedmoe
from fusedmoe import Adapter, LoRA, reference
from fusedmoe.errors import DTypeError, OptionError, ShapeError, UnsupportedError
from fusedmoe.modular import Experts
from fusedmoe.parallel import ExpertParallel, Placement, TensorParallel, intermediate_slice
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import Case
from fusedmoe.testing.verify import relative_error

E, K, H, I = 9, 3, 48, 32
CASE = Case(tokens=37, top_k=K, experts=E, hidden=H, intermediate=I, dtype="float32")


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
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_adapters_are_cut_as_the_layer_is(pools, case, n_ranks):
    """On three ranks, slices of 10, 11 and 11 columns."""
    for got, want, without, base in pools(n_ranks).run(sliced_with_adapters, case):
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


#: Experts of each rank.
PLACES = {
    "two": Placement.contiguous(E, 2),
    "hot": Placement(((0, 1, 2, 8), (3, 4, 8), (5, 6), (7, 8))),
    "idle": Placement(((0, 1, 2, 3), (), (4, 5), (6, 7, 8))),
}


def distributed_with_adapters(case, placement, how):
    """Experts on several ranks, on this rank's tokens; and one process with all of them, with adapters and without."""
    (x, w13, w2, weights, ids), options = case.draw(seed=7)
    adapters, adapter_ids = adapters_of(options), options["adapter_ids"]
    bare = {name: value for name, value in options.items() if name not in ("lora", "adapter_ids")}
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    chosen = placement.experts[rank]

    def pick(w):
        at = torch.tensor(chosen, dtype=torch.long)
        return w.map(lambda t: t if t.numel() == 1 else t[at]) if hasattr(w, "map") else w[at]

    local = {k: pick(v) if k.endswith("_bias") and v is not None else v for k, v in bare.items()}
    layer = Experts(pick(w13), pick(w2), **local) if chosen else None
    slots = LoRA.of([one.of_experts(chosen) for one in adapters]) if chosen else None
    parallel = ExpertParallel(None, layer, top_k=case.top_k, placement=placement, adapters=True, dtype=x.dtype, **how)
    rows = slice(rank * case.tokens // n_ranks, (rank + 1) * case.tokens // n_ranks)
    mine = x[rows], weights[rows], ids[rows]
    got = parallel(*mine, lora=slots, adapter_ids=adapter_ids[rows])
    without = parallel(*mine), parallel(*mine, lora=slots)
    want = fusedmoe.fused_experts(x, w13, w2, weights, ids, **options)[rows]
    base = fusedmoe.fused_experts(x, w13, w2, weights, ids, **bare)[rows]
    return got, want, without, base


@pytest.mark.parametrize("how", [{}, {"max_tokens": 14}, {"parts": 3}], ids=["exact", "padded", "parts"])
@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("form", [None, "fp8_channel", "fp8_block"])
def test_adapters_travel_with_their_tokens(pools, placement, how, form):
    forms = (None if form is None else format_of(form),) * 2
    case = replace(CASE, ranks=(3, 5), tokens=27, formats=forms, bias=form is None)
    placement = PLACES[placement]
    bound = 5e-7 if form is None else 1e-3  # a last bit may make another code of the intermediate
    for got, want, without, base in pools(placement.ranks).run(distributed_with_adapters, case, placement, how):
        assert relative_error(got, want) < bound
        assert all(relative_error(other, base) < bound for other in without)
        assert relative_error(got, base) > 0.01, "adapters count"


def both_ways():
    """Experts and their intermediate cut, on a mesh of 2 x 2."""
    (x, w13, w2, weights, ids), options = replace(CASE, ranks=(3, 5)).draw(seed=7)
    adapters, adapter_ids = adapters_of(options), options["adapter_ids"]
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("experts", "columns"))
    chosen = Placement.contiguous(E, 2).experts[mesh["experts"].get_local_rank()]
    half = mesh["columns"].get_local_rank()
    ends = (half * I // 2, (half + 1) * I // 2)
    layer = intermediate_slice(Experts(w13[list(chosen)], w2[list(chosen)]), *ends)
    slots = LoRA.of([intermediate_slice(one.of_experts(chosen), *ends) for one in adapters])
    parallel = TensorParallel(mesh["columns"], ExpertParallel(mesh["experts"], layer, top_k=K, adapters=True))
    return (
        parallel(x, weights, ids, lora=slots, adapter_ids=adapter_ids),
        fusedmoe.fused_experts(x, w13, w2, weights, ids, lora=options["lora"], adapter_ids=adapter_ids),
    )


def test_adapters_of_slices_of_experts_of_several_ranks(pools):
    for got, want in pools(4).run(both_ways):
        assert relative_error(got, want) < 5e-7


def adapters_that_are_refused():
    (x, w13, w2, weights, ids), options = replace(CASE, ranks=(3,)).draw()
    adapters = {name: options.pop(name) for name in ("lora", "adapter_ids")}
    chosen = Placement.contiguous(E, 2).experts[dist.get_rank()]
    local = Experts(w13[list(chosen)], w2[list(chosen)])
    with pytest.raises(OptionError, match="adapter_ids: got rows that travel without them"):
        ExpertParallel(None, local, top_k=K)(x, weights, ids, **adapters)
    with pytest.raises(UnsupportedError, match="TensorParallel with lora: got function; wanted experts, or an Expert"):
        TensorParallel(None, lambda *arguments: x)(x, weights, ids, **adapters)
    with pytest.raises(OptionError, match="adapters of ExpertParallel: got False on rank 0, True on rank 1"):
        ExpertParallel(None, local, top_k=K, adapters=dist.get_rank() == 1)
    parallel = ExpertParallel(None, local, top_k=K, adapters=True)
    ids_of = adapters["adapter_ids"]
    for wrong, error in ((ids_of[:-1], ShapeError), (ids_of.float(), DTypeError), ("none", DTypeError)):
        with pytest.raises(error, match="adapter_ids"):
            parallel(x, weights, ids, lora=adapters["lora"], adapter_ids=wrong)
    with pytest.raises(ShapeError, match="lora"):  # of all experts, not of those that are here
        parallel(x, weights, ids, **adapters)
    return True


def test_adapters_that_are_refused(two):
    assert two.run(adapters_that_are_refused) == [True, True]


@pytest.mark.parametrize("chosen", [(), (E,), (-1,), (0.5,)], ids=str)
def test_experts_that_there_are_not(chosen):
    adapter = adapters_of(replace(CASE, ranks=(3,)).draw()[1])[0]
    with pytest.raises(ShapeError, match="experts of an adapter"):
        adapter.of_experts(chosen)


def test_what_all_experts_share_stays():
    adapter = adapters_of(replace(CASE, ranks=(3,)).draw()[1])[0]
    shared = Adapter(w13_a=adapter.w13_a[:1], w13_b=adapter.w13_b, w2_a=adapter.w2_a, w2_b=adapter.w2_b[:1])
    some = shared.of_experts([4, 1])
    assert torch.equal(some.w13_b, adapter.w13_b[[4, 1]]) and torch.equal(some.w2_a, adapter.w2_a[[4, 1]])
    assert some.w13_a is shared.w13_a and some.w2_b is shared.w2_b


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
