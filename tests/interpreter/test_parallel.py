"""Rows on their way, in Triton's interpreter: the launches against plain torch, and two ranks against one process."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
from fusedmoe import LoRA, backends
from fusedmoe.backends.base import Places
from fusedmoe.modular import Experts
from fusedmoe.parallel import ExpertParallel, Placement
from fusedmoe.parallel.wire import Wire
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.testing.cases import Case
from fusedmoe.testing.ranks import Ranks
from fusedmoe.testing.verify import relative_error

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

HOT = Placement(((0, 1, 7), (2, 3, 7), (), (4, 5, 6, 7), (8, 9)))


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize("adapters", [None, torch.int32, torch.int64], ids=str)
def test_sends_and_messages(tokens, capacity, adapters):
    torch.manual_seed(tokens)
    table: Places = HOT.table(torch.device("cpu"))
    ids = torch.randint(-1, 12, (tokens, 4), dtype=torch.int32)
    found, want = (backends.load_transit(kind).sends(ids, table, 3, capacity) for kind in ("triton", "torch"))
    assert torch.equal(found.places, want.places)
    assert torch.equal(found.counts, want.counts)
    assert torch.equal(found.answer.long(), want.answer.long())
    rows = int(want.counts.sum()) if capacity is None else want.token.numel()
    wire = Wire(38, 4, torch.bfloat16, format_of("int8_w8a8", block=(32, 32)).inputs, adapters is not None)
    slots = None if adapters is None else torch.randint(-2, 1030, (tokens, 2), dtype=adapters)[:, 1]
    if adapters == torch.int64 and tokens:
        slots[::7] = 2**32 + 1
    x, scale = torch.randint(-128, 128, (tokens, 38), dtype=torch.int8), torch.rand(tokens, wire.groups)
    weights = torch.rand(tokens, 5).bfloat16()[:, :4]
    messages = []
    for kind, sends in (("triton", found), ("torch", want)):
        raw = torch.full((rows, wire.row_bytes), 0x7F, dtype=torch.uint8)
        backends.load_transit(kind).pack(x, scale, weights, slots, sends, capacity, wire.views(raw))
        messages.append(wire.views(raw))
    live = torch.ones(rows, dtype=torch.bool)
    if capacity is not None:
        live = (torch.arange(capacity) < want.counts[:, None]).flatten()
        assert (messages[0].places[~live] == -1).all()
    for got, other in zip(*messages, strict=True):
        assert got is other is None or torch.equal(got[live], other[live])
    if slots is not None:
        known = slots[want.token[:rows][live]].long()
        assert torch.equal(messages[0].adapters[live].long(), known.where((known >= 0) & (known < 1024), -1))
    assert torch.equal(messages[0].weights[live], weights.float()[want.token[:rows][live]])


def distribute(case, how):
    (x, w13, w2, weights, ids), options = case.draw(seed=3)
    rank = torch.distributed.get_rank()
    whole = fusedmoe.fused_experts(x, w13, w2, weights, ids, backend="triton", **options)
    half = slice(rank * case.experts // 2, (rank + 1) * case.experts // 2)
    local = [w.experts(half.start, half.stop) if hasattr(w, "experts") else w[half] for w in (w13, w2)]
    parallel = ExpertParallel(None, Experts(*local, backend="triton", **options), top_k=case.top_k, **how)
    rows = slice(0, 13) if rank == 0 else slice(13, case.tokens)
    return parallel(x[rows], weights[rows], ids[rows]), whole[rows]


@pytest.fixture(scope="module")
def two():
    pool = Ranks(2, timeout_s=120.0)
    yield pool
    pool.close()


@pytest.mark.parametrize("how", [{}, {"max_tokens": 13}], ids=["exact", "padded"])
@pytest.mark.parametrize("scheme", [None, "fp8_channel", "fp8_block"])
def test_two_ranks(two, scheme, how):
    """Of one expert a token and rank, rows are rounded once on both ways, and have the same sum."""
    forms = (None if scheme is None else format_of(scheme),) * 2
    case = Case(tokens=20, top_k=2, experts=4, hidden=64, intermediate=64, dtype="bfloat16", formats=forms)
    results = two.run(distribute, case, how)
    got, want = (torch.cat(part) for part in zip(*results, strict=True))
    assert relative_error(got, want) < 2.0**-8
    one = Case(tokens=20, top_k=1, experts=4, hidden=64, intermediate=64, dtype="bfloat16", formats=forms)
    results = two.run(distribute, one, how)
    assert all(torch.equal(*pair) for pair in results)


def with_adapters(case, how):
    (x, w13, w2, weights, ids), options = case.draw(seed=3)
    lora, slots = options.pop("lora"), options.pop("adapter_ids")
    rank, half = torch.distributed.get_rank(), case.experts // 2
    here = slice(rank * half, (rank + 1) * half)
    matrices = (t[:, here] for t in (lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b))
    mine = LoRA(*matrices, scaling=lora.scaling, rank=lora.rank, adapter_enabled=lora.adapter_enabled)
    layer = Experts(w13[here], w2[here], backend="triton", **options)
    parallel = ExpertParallel(None, layer, top_k=case.top_k, adapters=True, **how)
    rows = slice(0, 13) if rank == 0 else slice(13, case.tokens)
    got = parallel(x[rows], weights[rows], ids[rows], lora=mine, adapter_ids=slots[rows])
    whole = fusedmoe.reference.fused_experts(x, w13, w2, weights, ids, **options, lora=lora, adapter_ids=slots)
    bare = fusedmoe.reference.fused_experts(x, w13, w2, weights, ids, **options)
    return got, whole[rows], bare[rows]


@pytest.mark.parametrize("how", [{}, {"max_tokens": 13}], ids=["exact", "padded"])
def test_adapters_travel_with_their_tokens(two, how):
    case = Case(tokens=20, top_k=2, experts=4, hidden=64, intermediate=64, dtype="float32", ranks=(3, 5))
    got, want, bare = (torch.cat(part) for part in zip(*two.run(with_adapters, case, how), strict=True))
    assert relative_error(got, want) < 2e-6 and relative_error(got, bare) > 0.01
