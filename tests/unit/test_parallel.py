"""Many ranks against one process: every placement, mode and scheme, uneven batches; and errors on every rank."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch

import fusedmoe
from fusedmoe.bench.routing import draw_routing
from fusedmoe.errors import (
    DeviceError,
    DTypeError,
    GradientError,
    OptionError,
    ParallelError,
    ShapeError,
    UnsupportedError,
)
from fusedmoe.modular import Experts, run
from fusedmoe.parallel import ExpertParallel, Placement, TensorParallel, intermediate_slice
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import Case
from fusedmoe.testing.ranks import Ranks
from fusedmoe.testing.verify import expected, relative_error

#: tokens of each rank, by the number of ranks
TOKENS = {2: (23, 14), 4: (19, 0, 7, 11)}
E, K, H, I = 9, 3, 48, 32
CASE = Case(tokens=37, top_k=K, experts=E, hidden=H, intermediate=I, dtype="float32")
HOT = Placement(((0, 1, 2, 8), (3, 4, 8), (5, 6), (7, 8)))


@pytest.fixture(params=[2, 4])
def ranks(pools, request):
    return pools(request.param)


@pytest.fixture
def four(pools):
    return pools(4)


# --- what the ranks run ---------------------------------------------------------------------------------------------


def me():
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def mine(tensors, n_ranks, rank):
    start = sum(TOKENS[n_ranks][:rank])
    return [tensor[start : start + TOKENS[n_ranks][rank]] for tensor in tensors]


def share(layer, experts):
    """The experts of one rank; plain tensors are copied so that the rest of the layer is out of reach."""
    chosen = torch.tensor(experts, dtype=torch.long)

    def pick(w):
        return w.map(lambda t: t if t.numel() == 1 else t[chosen]) if hasattr(w, "map") else w[chosen]

    options = {k: pick(v) if k.endswith("_bias") and v is not None else v for k, v in layer.options.items()}
    return Experts(pick(layer.w13), pick(layer.w2), backend=layer.backend, **options) if experts else None


def drawn(case, routing="case"):
    (x, w13, w2, weights, ids), options = case.draw(seed=7)
    if routing == "apart":  # never two experts of a token on one rank
        ids = (torch.arange(case.tokens)[:, None] + torch.arange(case.top_k) * 3) % case.experts
    elif routing != "case":
        weights, ids = draw_routing(routing, case.tokens, case.experts, case.top_k, torch.Generator().manual_seed(1))
    return (x, weights, ids), Experts(w13, w2, **options)


def distribute(case, routing, placement, how):
    """The layer on this rank's tokens, and on the same tokens in one process."""
    rank, n_ranks = me()
    arguments, layer = drawn(case, routing)
    placement = placement or Placement.contiguous(case.experts, n_ranks)
    group = torch.distributed.device_mesh.init_device_mesh("cpu", (n_ranks,)) if how.pop("mesh", False) else None
    local = share(layer, placement.experts[rank])
    parallel = ExpertParallel(group, local, placement=placement, top_k=case.top_k, **how)
    x, weights, ids = mine(arguments, n_ranks, rank)
    out = torch.full_like(x, float("nan"))
    assert parallel(x, weights, ids, out=out) is out
    assert torch.equal(parallel(x, weights, ids), out), "the same call gives the same bits"
    whole = fusedmoe.fused_experts(arguments[0], layer.w13, layer.w2, *arguments[1:], **layer.options)
    return out, mine([whole], n_ranks, rank)[0], parallel.transport.wire.row_bytes


def together(results):
    got, want, row_bytes = zip(*results, strict=True)
    assert len(set(row_bytes)) == 1
    return torch.cat(got), torch.cat(want), row_bytes[0]


# --- equality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"max_tokens": 23}], ids=["exact", "padded"])
def test_bits_of_one_process_where_the_order_of_the_sum_is_the_same(ranks, how):
    """Each expert sees the same rows in the same order, and each token adds the same numbers in slot order."""
    thirds = Placement(((0, 1, 2), (3, 4, 5), (6, 7, 8), ()))
    for case, routing, placement in (
        (replace(CASE, top_k=1, dtype="bfloat16", bias=True), "zipf", None),
        (replace(CASE, top_k=1, dtype="float16", on_input=True), "case", None),
        (replace(CASE, top_k=2), "uniform", None),  # two numbers have one sum
        (CASE, "apart", thirds),
    ):
        if placement is not None and placement.ranks != len(ranks.processes):
            continue
        got, want, _ = together(ranks.run(distribute, case, routing, placement, dict(how)))
        assert torch.equal(got, want), (case, routing)


PLACEMENTS = {
    "contiguous": None,
    "any order": Placement(((8, 0, 3), (5,), (7, 1), (2, 6, 4))),
    "one rank has none": Placement(((0, 1, 2, 3), (), (4, 5, 6), (7, 8))),
    "one rank has all": Placement(((), tuple(range(E)), (), ())),
    "a hot expert on three ranks": HOT,
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("routing", ["uniform", "zipf"])
@pytest.mark.parametrize("how", [{}, {"max_tokens": 20, "parts": 2}, {"parts": 3}], ids=["exact", "padded", "parts"])
def test_placements(four, placement, routing, how):
    case = replace(CASE, bias=True)
    got, want, _ = together(four.run(distribute, case, routing, PLACEMENTS[placement], dict(how)))
    assert relative_error(got, want) < 5e-7


@pytest.mark.parametrize("ids", ["one", "invalid", "absent", "any"])
@pytest.mark.parametrize("how", [{}, {"max_tokens": 23}], ids=["exact", "padded"])
def test_ids(ranks, ids, how):
    got, want, _ = together(ranks.run(distribute, replace(CASE, ids=ids), "case", None, dict(how)))
    assert relative_error(got, want) < 5e-7
    if ids == "absent":
        assert not got.any()


#: scheme -> bytes of a row beside ids and weights
SCHEMES = {
    None: 2 * 64,
    format_of("fp8_channel"): 64 + 16,
    format_of("int8_w8a8", block=(32, 32)): 64 + 16,
    format_of("fp8_tensor", inputs="static"): 64 + 16,
    format_of("int4_w4a16", group=32): 2 * 64,
}


@pytest.mark.parametrize("form", SCHEMES, ids=str)
@pytest.mark.parametrize("how", [{"mesh": True}, {"max_tokens": 23}], ids=["exact", "padded"])
def test_schemes_and_what_travels(two, form, how):
    case = Case(tokens=37, top_k=K, experts=E, hidden=64, intermediate=64, dtype="bfloat16", formats=(form, form))
    got, want, row_bytes = together(two.run(distribute, case, "uniform", None, dict(how)))
    assert row_bytes == SCHEMES[form] + 2 * 16
    # One rounding more, of each rank's part.
    assert relative_error(got, want) < 2.0**-8
    (x, weights, ids), layer = drawn(case, "uniform")
    reference = expected((x, layer.w13, layer.w2, weights, ids), layer.options)
    assert relative_error(got, reference) < 2 * case.tolerance + 2.0**-8


def no_tokens(how):
    (x, weights, ids), layer = drawn(CASE)
    rank, n_ranks = me()
    local = share(layer, Placement.contiguous(E, n_ranks).experts[rank])
    parallel = ExpertParallel(None, local, top_k=K, **how)
    return parallel(x[:0], weights[:0], ids[:0])


@pytest.mark.parametrize("how", [{}, {"max_tokens": 5}, {"parts": 2}])
def test_no_tokens_at_all(ranks, how):
    assert all(out.shape == (0, H) for out in ranks.run(no_tokens, how))


def of_a_module():
    """Experts as a checkpoint is read: with a map from all ids, in whose place come those of the dispatch."""
    (x, weights, ids), layer = drawn(CASE)
    rank, n_ranks = me()
    placement = Placement.contiguous(E, n_ranks)
    own = list(placement.experts[rank])
    expert_map = torch.full((E,), -1)
    expert_map[own] = torch.arange(len(own))
    module = fusedmoe.FusedExperts.of(layer.w13[own], layer.w2[own], expert_map=expert_map)
    part = mine((x, weights, ids), n_ranks, rank)
    got = ExpertParallel(None, module, top_k=K)(*part)  # placed by how many each rank has
    parts = [torch.zeros_like(x) for _ in range(n_ranks)]
    torch.distributed.all_gather(parts, module(x, weights, ids))
    return got, mine((sum(parts),), n_ranks, rank)[0]


def test_modules_of_experts(ranks):
    for got, want in ranks.run(of_a_module):
        assert relative_error(got, want) < 5e-7


def by_steps():
    (x, weights, ids), layer = drawn(CASE, "uniform")
    rank, n_ranks = me()
    local = share(layer, Placement.contiguous(E, n_ranks).experts[rank])
    parallel = ExpertParallel(torch.distributed.group.WORLD, local, top_k=K)
    part = mine((x, weights, ids), n_ranks, rank)
    return torch.equal(run(parallel.transport, local, *part), parallel(*part))


def test_the_transport_is_a_prepare_and_a_finalize_step(two):
    assert two.run(by_steps) == [True, True]


# --- tensor parallelism ---------------------------------------------------------------------------------------------


def sliced(case):
    rank, n_ranks = me()
    (x, weights, ids), layer = drawn(case)
    cuts = [0, *(I * (r + 1) // n_ranks - (r + 1 < n_ranks) for r in range(n_ranks))]
    local = intermediate_slice(layer, cuts[rank], cuts[rank + 1])
    got = TensorParallel(None, local)(x, weights, ids)
    return got, fusedmoe.fused_experts(x, layer.w13, layer.w2, weights, ids, **layer.options)


@pytest.mark.parametrize(
    "case",
    [
        replace(CASE, bias=True),
        replace(CASE, weight_layout="KN", gate_up_layout="interleaved", bias=True, ids="invalid"),
        replace(CASE, activation=fusedmoe.Activation("relu2_no_mul"), bias=True, on_input=True),
        replace(CASE, dtype="bfloat16", mapped=True),
    ],
)
def test_slices_of_the_intermediate_add_up(ranks, case):
    results = ranks.run(sliced, case)
    for got, want in results:
        # Each rank's part and each sum of two is rounded.
        assert relative_error(got, want) < (5e-7 if case.dtype == "float32" else len(results) * 2.0**-8)
        assert torch.equal(got, results[0][0])


def both_ways():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "ep"))
    slice_, expert = mesh.get_local_rank("tp"), mesh.get_local_rank("ep")
    (x, weights, ids), layer = drawn(replace(CASE, bias=True))
    local = share(layer, Placement.contiguous(E, 2).experts[expert])
    local = intermediate_slice(local, I // 2 * slice_, I // 2 * (slice_ + 1))
    parallel = TensorParallel(mesh["tp"], ExpertParallel(mesh["ep"], local, top_k=K))
    rows = slice(0, 20) if expert == 0 else slice(20, 37)
    got = parallel(x[rows], weights[rows], ids[rows])
    return got, fusedmoe.fused_experts(x, layer.w13, layer.w2, weights, ids, **layer.options)[rows]


def test_slices_of_experts_of_several_ranks(four):
    for got, want in four.run(both_ways):
        assert relative_error(got, want) < 5e-7


@pytest.mark.parametrize("cut", [(-1, 4), (4, 4), (0, I + 1)])
def test_a_slice_outside(cut):
    with pytest.raises(ShapeError, match="intermediate_slice: got .* wanted within 0 .. 32"):
        intermediate_slice(drawn(CASE)[1], *cut)


def test_a_slice_of_quantised_experts_is_for_readers():
    case = Case(tokens=3, top_k=1, experts=2, hidden=64, intermediate=64, formats=(format_of("fp8_channel"),) * 2)
    with pytest.raises(DTypeError, match=r"layer to slice: got FusedExperts; .*Call modular.Experts.of\(layer\)"):
        intermediate_slice(fusedmoe.FusedExperts(4, 64, 64), 0, 32)
    with pytest.raises(ShapeError, match="intermediate_slice: got quantised experts.*from_checkpoint"):
        intermediate_slice(drawn(case)[1], 0, 32)


# --- errors ---------------------------------------------------------------------------------------------------------


def one_rank_errs(what, how):
    rank, n_ranks = me()
    (x, weights, ids), layer = drawn(CASE)
    local = share(layer, Placement.contiguous(E, n_ranks).experts[rank])
    parallel = ExpertParallel(None, local, top_k=K, **how)
    if rank == 1:
        if what == "shape":
            x = x[:, :-1]
        elif what == "more tokens":
            x, weights, ids = (torch.cat((t, t)) for t in (x, weights, ids))
        elif what == "list":
            ids = ids.tolist()
        elif what == "device":
            weights = weights.to("meta")
        elif what == "ids":
            ids = ids.float()
        elif what == "weights":
            weights = weights.int()
        elif what == "type":
            x = x.half()
        elif what == "choices":
            ids = ids[:, :-1]
        elif what == "out":
            return parallel(x, weights, ids, out=x.half())
        elif what == "gradient":
            x = x.clone().requires_grad_()
        elif what == "experts":
            local.options["activation"] = "swish"
    with torch.set_grad_enabled(what == "gradient"):
        return parallel(x, weights, ids)


@pytest.mark.parametrize("how", [{}, {"max_tokens": 37}, {"parts": 2}], ids=["exact", "padded", "parts"])
@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("shape", ShapeError, f"hidden_states: got (37, {H - 1}); wanted [T, {H}]"),
        ("gradient", GradientError, "requires grad"),
        ("experts", OptionError, "'swish'"),
        ("list", DTypeError, "topk_ids: got list; wanted a torch.Tensor"),
        ("device", DeviceError, "topk_weights: got meta; wanted cpu"),
        ("ids", DTypeError, "topk_ids: got torch.float32; wanted int32 or int64"),
        ("weights", DTypeError, "topk_weights: got torch.int32; wanted a float type"),
        ("type", DTypeError, "hidden_states: got torch.float16; wanted torch.float32"),
        ("choices", ShapeError, f"topk_ids: got (37, {K - 1}); wanted (37, {K})"),
        ("out", ShapeError, f"out: got (37, {H}) torch.float16; wanted (37, {H}) torch.float32"),
        ("more tokens", OptionError, "74 tokens; wanted at most max_tokens = 37"),
    ],
)
def test_an_error_of_one_rank_is_an_error_of_all(ranks, what, error, words, how):
    if what == "more tokens" and "max_tokens" not in how:
        return
    outcomes = ranks.outcomes(one_rank_errs, what, how)
    assert type(outcomes[1]) is error
    assert words in str(outcomes[1])
    for rank, other in enumerate(outcomes):
        if rank != 1:
            assert type(other) is ParallelError
            assert "on rank 1" in str(other)
            assert words in str(other)
    # The group still works.
    test_no_tokens_at_all(ranks, how)


def made_differently(what):
    rank, n_ranks = me()
    _, layer = drawn(CASE)
    how = {"top_k": K}
    local = share(layer, Placement.contiguous(E, n_ranks).experts[rank])
    if rank == 1:
        if what == "layer":
            how["placement"] = Placement.contiguous(E + 2, n_ranks)
        elif what == "ranks":
            how["placement"] = Placement.contiguous(E, n_ranks + 1)
        elif what == "none":
            how["top_k"] = 0
        elif what != "nobody":
            how[what] = 2
    if what == "nobody":
        local = None
    ExpertParallel(None, local, **how)


@pytest.mark.parametrize(
    ("what", "own", "other"),
    [
        ("top_k", "top_k of ExpertParallel: got 3 on rank 0, 2 on rank 1", None),
        ("parts", "parts of ExpertParallel: got 1 on rank 0, 2 on rank 1", None),
        ("max_tokens", "max_tokens of ExpertParallel: got None on rank 0, 2 on rank 1", None),
        ("nobody", "layer: got no expert on any rank", None),
        ("layer", "layer: got 4 experts; wanted 5", "on rank 1: got ShapeError: layer"),
        ("ranks", "placement: got 3 ranks; wanted 2", "on rank 1: got OptionError: placement"),
        ("none", "top_k: got 0; wanted an integer above 0", "on rank 1: got OptionError: top_k"),
    ],
)
def test_ranks_that_do_not_fit_together(two, what, own, other):
    outcomes = two.outcomes(made_differently, what)
    assert own in str(outcomes[1])
    assert (other or own) in str(outcomes[0])
    assert isinstance(outcomes[0], ParallelError if other else OptionError)


def two_static_scales():
    forms = (format_of("fp8_channel", inputs="static"),) * 2
    _, layer = drawn(Case(tokens=3, top_k=1, experts=2, hidden=64, intermediate=64, formats=forms))
    layer.w13.input_scale *= 1 + me()[0]
    ExpertParallel(None, share(layer, [me()[0]]), top_k=1)


def test_given_scales_of_rows_must_agree(two):
    outcomes = two.outcomes(two_static_scales)
    assert all("static of ExpertParallel: got" in str(one) for one in outcomes)


def one_scale_for_all():
    forms = (format_of("fp8_channel", inputs="tensor"),) * 2
    _, layer = drawn(Case(tokens=3, top_k=1, experts=2, hidden=64, intermediate=64, formats=forms))
    ExpertParallel(None, share(layer, [me()[0]]), top_k=1)


def test_one_scale_for_all_rows_is_refused(two):
    outcomes = two.outcomes(one_scale_for_all)
    assert all(isinstance(one, UnsupportedError) for one in outcomes)
    assert "inputs='token'" in str(outcomes[0])


def one_rank_is_lost(how):
    rank, n_ranks = me()
    (x, weights, ids), layer = drawn(CASE)
    parallel = ExpertParallel(None, share(layer, Placement.contiguous(E, n_ranks).experts[rank]), top_k=K)
    parallel(x, weights, ids)
    if rank == 1 and how == "dies":
        os._exit(3)
    if rank == 1:
        time.sleep(4.0)
    return parallel(x, weights, ids)


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_lost_rank_is_an_error_in_time(how):
    pool = Ranks(2, timeout_s=2.0)
    start = time.perf_counter()
    outcomes = pool.outcomes(one_rank_is_lost, how)
    assert time.perf_counter() - start < 25.0
    assert isinstance(outcomes[0], ParallelError)
    assert "first rank that failed" in str(outcomes[0])
    assert isinstance(outcomes[1], EOFError if how == "dies" else ParallelError)
    pool.close()


def words_go_beside_the_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "get_backend_config", lambda group: "cuda:nccl")
        (x, weights, ids), layer = drawn(CASE)
        local = share(layer, Placement.contiguous(E, 2).experts[me()[0]])
        first, second = (ExpertParallel(None, local, top_k=K) for _ in range(2))
    assert first.control.group is second.control.group is not first.group
    return torch.equal(first(x, weights, ids), second(x, weights, ids))


def test_a_group_without_the_host_gets_one_beside_it(two):
    assert two.run(words_go_beside_the_data) == [True, True]


def two_dimensions():
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
    _, layer = drawn(CASE)
    local = share(layer, Placement.contiguous(E, 2).experts[me()[0]])
    assert ExpertParallel(mesh["ep"], local, top_k=K).transport.ranks == 2
    ExpertParallel(mesh, local, top_k=K)


def test_a_mesh_has_one_dimension(two):
    assert all("mesh: got 2 dimensions ('dp', 'ep')" in str(one) for one in two.outcomes(two_dimensions))


def test_without_a_process_group():
    with pytest.raises(OptionError, match="torch.distributed: got no process group; wanted one.*torchrun"):
        ExpertParallel(None, None, top_k=1)


def no_group():
    ExpertParallel("world", None, top_k=1)


def test_a_group_that_is_none(two):
    assert all("group: got str; wanted a ProcessGroup" in str(one) for one in two.outcomes(no_group))
