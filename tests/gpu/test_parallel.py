"""Two GPUs or more over NCCL against one: schemes, modes, graphs, errors."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import fusedmoe
from fusedmoe import LoRA
from fusedmoe.bench.routing import draw_routing
from fusedmoe.errors import OptionError, ParallelError
from fusedmoe.modular import Experts
from fusedmoe.parallel import ExpertParallel, Placement, TensorParallel, intermediate_slice
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import Case
from fusedmoe.testing.ranks import Ranks
from fusedmoe.testing.verify import expected, relative_error

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
    pytest.mark.filterwarnings("default"),
]
#: (tokens of a rank at most, top_k, experts, hidden, intermediate)
SHAPES = {"decode": (32, 8, 64, 1024, 256), "prefill": (1500, 4, 48, 512, 384)}
#: Rounding of each rank's part, on top of what the whole layer rounds.
ROUNDING = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(scope="module")
def ranks():
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    pool = Ranks(GPUS, "nccl", timeout_s=120.0)
    yield pool
    pool.close()


def drawn(case, routing="zipf"):
    """The same on every rank: drawn on the CPU."""
    (x, w13, w2, _, _), options = case.draw("cpu", seed=5)
    generator = torch.Generator().manual_seed(3)
    weights, ids = draw_routing(routing, case.tokens, case.experts, case.top_k, generator)
    options = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    return [t.cuda() for t in (x, weights, ids)], Experts(w13.to("cuda"), w2.to("cuda"), **options)


def share(layer, experts):
    chosen = torch.tensor(experts, device="cuda")

    def pick(w):
        return w.map(lambda t: t if t.numel() == 1 else t[chosen]) if hasattr(w, "map") else w[chosen]

    options = {k: pick(v) if k.endswith("_bias") and v is not None else v for k, v in layer.options.items()}
    return Experts(pick(layer.w13), pick(layer.w2), **options)


def mine(tensors, most):
    """Rank r has r / (R - 1) of the most: the first none at all."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    counts = [most * r // (n_ranks - 1) for r in range(n_ranks)]
    start = sum(counts[:rank])
    return [t[start : start + counts[rank]] for t in tensors]


def case_of(shape, form, dtype="bfloat16"):
    most, *sizes = shape
    tokens = sum(most * r // (dist.get_world_size() - 1) for r in range(dist.get_world_size()))
    return Case.of((tokens, *sizes), dtype=dtype, formats=(form, form), bias=form is None)


def distribute(shape, form, dtype, how):
    case = case_of(shape, form, dtype)
    arguments, layer = drawn(case)
    n_ranks = dist.get_world_size()
    placement = Placement.contiguous(case.experts, n_ranks)
    if how.pop("redundant", False):
        placement = Placement(tuple((*rank, 0) if 0 not in rank else rank for rank in placement.experts))
    local = share(layer, placement.experts[dist.get_rank()])
    parallel = ExpertParallel(None, local, placement=placement, top_k=case.top_k, **how)
    x, weights, ids = mine(arguments, shape[0])
    got = parallel(x, weights, ids)
    again = parallel(x, weights, ids)
    whole = fusedmoe.fused_experts(arguments[0], layer.w13, layer.w2, *arguments[1:], **layer.options)
    reference = expected((arguments[0], layer.w13, layer.w2, *arguments[1:]), layer.options)
    if not x.shape[0]:
        return True, 0.0, 0.0, case.tolerance
    want, exact = mine((whole, reference), shape[0])
    return torch.equal(got, again), relative_error(got, want), relative_error(got, exact), case.tolerance


@pytest.mark.parametrize("how", [{}, {"max_tokens": 1500}, {"parts": 2}, {"redundant": True}], ids=str)
@pytest.mark.parametrize("scheme", [None, "fp8_block", "fp8_channel", "int4_w4a16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_together_are_the_layer(ranks, shape, scheme, how):
    form = None if scheme is None else format_of(scheme)
    for same, to_whole, to_reference, tolerance in ranks.run(distribute, SHAPES[shape], form, "bfloat16", dict(how)):
        assert same, "two runs gave the same bits"
        assert to_reference < tolerance + ROUNDING["bfloat16"]
        # Tiles depend on the number of rows, and so does the order of long sums.
        assert to_whole < 2 * tolerance + ROUNDING["bfloat16"]


def with_adapters(shape, form, how):
    """Adapters on each rank's experts, on this rank's tokens; and one process with all of them."""
    case = replace(case_of(shape, form), ranks=(16, 5, 24))
    (x, w13, w2, weights, ids), options = case.draw("cuda", seed=7)
    lora, slot_of = options.pop("lora"), options.pop("adapter_ids")
    experts = Placement.contiguous(case.experts, dist.get_world_size()).experts[dist.get_rank()]
    here = LoRA(
        *(t[:, list(experts)] if t.shape[1] > 1 else t for t in (lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b)),
        scaling=lora.scaling,
        rank=lora.rank,
        adapter_enabled=lora.adapter_enabled,
    )
    layer = Experts(w13, w2, **options)
    parallel = ExpertParallel(None, share(layer, experts), top_k=case.top_k, adapters=True, **how)
    arguments = mine((x, weights, ids, slot_of), shape[0])
    got = parallel(*arguments[:3], lora=here, adapter_ids=arguments[3])
    adapters = {"lora": lora, "adapter_ids": slot_of}
    want = mine([expected((x, w13, w2, weights, ids), {**options, **adapters})], shape[0])[0]
    return relative_error(got, want) if got.shape[0] else 0.0, case.tolerance


@pytest.mark.parametrize("how", [{}, {"max_tokens": 1500}, {"parts": 2}], ids=str)
@pytest.mark.parametrize("scheme", [None, "fp8_block", "int4_w4a16"])
def test_adapters_travel_with_their_tokens(ranks, scheme, how):
    form = None if scheme is None else format_of(scheme)
    for error, tolerance in ranks.run(with_adapters, SHAPES["prefill"], form, dict(how)):
        assert error < tolerance + ROUNDING["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_types(ranks, dtype):
    for _, _, error, tolerance in ranks.run(distribute, SHAPES["prefill"], None, dtype, {}):
        assert error < tolerance + ROUNDING[dtype]


def captured(scheme):
    form = None if scheme is None else format_of(scheme)
    shape = SHAPES["decode"]
    case = case_of(shape, form)
    (x, weights, ids), layer = drawn(case, "uniform")
    local = share(layer, Placement.contiguous(case.experts, dist.get_world_size()).experts[dist.get_rank()])
    parallel = ExpertParallel(None, local, top_k=case.top_k, max_tokens=16, parts=2)
    x, weights, ids = (t[:16].clone() for t in (x, weights, ids))
    out = torch.empty_like(x)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        parallel(x, weights, ids, out=out)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            parallel(x, weights, ids, out=out)
        equal = []
        for seed in range(3):
            generator = torch.Generator("cuda").manual_seed(seed + 10 * dist.get_rank())
            x.normal_(generator=generator)
            ids.copy_(torch.randint(-1, case.experts + 1, ids.shape, generator=generator, device="cuda"))
            out.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            equal.append(torch.equal(out, parallel(x, weights, ids)))
    return equal


@pytest.mark.parametrize("scheme", [None, "fp8_block"])
def test_a_graph_replays_with_other_routing(ranks, scheme):
    assert all(all(equal) for equal in ranks.run(captured, scheme))


def slices(dtype):
    case = case_of(SHAPES["prefill"], None, dtype)
    (x, weights, ids), layer = drawn(case)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    cuts = [case.intermediate * r // n_ranks // 8 * 8 for r in range(n_ranks)] + [case.intermediate]
    got = TensorParallel(None, intermediate_slice(layer, cuts[rank], cuts[rank + 1]))(x, weights, ids)
    return relative_error(got, fusedmoe.fused_experts(x, layer.w13, layer.w2, weights, ids, **layer.options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_slices_add_up(ranks, dtype):
    bound = 1e-6 if dtype == "float32" else 2.0**-7 + GPUS * 2.0**-8
    assert max(ranks.run(slices, dtype)) < bound


def one_errs():
    case = case_of(SHAPES["decode"], None)
    (x, weights, ids), layer = drawn(case)
    local = share(layer, Placement.contiguous(case.experts, dist.get_world_size()).experts[dist.get_rank()])
    parallel = ExpertParallel(None, local, top_k=case.top_k)
    if dist.get_rank() == 1:
        local.options["activation"] = "swish"
    parallel(x, weights, ids)


def test_an_error_of_one_rank_is_an_error_of_all(ranks):
    outcomes = ranks.outcomes(one_errs)
    assert isinstance(outcomes[1], OptionError)
    assert all(isinstance(one, ParallelError) and "'swish'" in str(one) for r, one in enumerate(outcomes) if r != 1)


def one_dies():
    case = case_of(SHAPES["decode"], None)
    (x, weights, ids), layer = drawn(case)
    local = share(layer, Placement.contiguous(case.experts, dist.get_world_size()).experts[dist.get_rank()])
    parallel = ExpertParallel(None, local, top_k=case.top_k)
    parallel(x, weights, ids)
    if dist.get_rank() == 1:
        os._exit(3)
    parallel(x, weights, ids)
    torch.cuda.synchronize()


def test_a_lost_rank_ends_the_others_in_time():
    pool, start = Ranks(GPUS, "nccl", timeout_s=15.0), time.perf_counter()
    outcomes = pool.outcomes(one_dies)
    pool.close()
    assert time.perf_counter() - start < 120.0
    # The watchdog of NCCL may end a process before it can say so.
    assert all(isinstance(one, ParallelError | EOFError) for one in outcomes)
