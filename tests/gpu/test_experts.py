"""The layer on a GPU at real sizes: options, invalid ids, poisoned memory, graphs, devices, streams, threads, size."""

from __future__ import annotations

import threading

import pytest
import torch

import fusedmoe
from fusedmoe import reference
from fusedmoe.schemes import format_of
from fusedmoe.testing.cases import OPTIONS, Case, pairwise, quantised_cases, run_poisoned
from fusedmoe.testing.verify import TOLERANCE, expected, relative_error, tolerance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # With torch 2.11 the reference's float64 products first load libraries that warn about themselves.
    pytest.mark.filterwarnings("default"),
]

#: (tokens, top_k, experts, hidden, intermediate): every tile height, sizes that are multiples of nothing
SHAPES = [
    (1, 8, 128, 2048, 768),
    (7, 3, 5, 33, 80),
    (17, 6, 60, 192, 704),
    (64, 2, 8, 2880, 352),
    (40, 64, 256, 64, 96),
    (3, 8, 4096, 64, 32),
    (300, 8, 128, 256, 192),
    (129, 2, 3, 96, 2880),
    (513, 4, 16, 1025, 320),
    (2048, 8, 64, 512, 768),
    (5000, 2, 8, 512, 384),
    (2100, 2, 8, 128, 4096),  # tall tiles and a large I: rows are gathered first
]
GRID = pairwise({"shape": SHAPES, **OPTIONS}, seed=1)


@pytest.mark.parametrize("row", range(len(GRID)))
def test_option_grid(row):
    case = Case.of(**GRID[row])
    _, error = run_poisoned(case, "cuda", seed=row)
    assert error < TOLERANCE[case.dtype], case


QUANTISED_SHAPES = [
    (1, 8, 128, 2048, 768),
    (7, 3, 5, 33, 80),
    (64, 2, 8, 2880, 352),
    (3, 8, 1000, 64, 96),
    (300, 8, 128, 256, 192),
    (129, 2, 3, 96, 2880),
    (513, 4, 16, 1025, 320),
    (2048, 8, 64, 512, 768),
    (4096, 2, 8, 1024, 1536),
]
QUANTISED = quantised_cases(QUANTISED_SHAPES, seed=1)


@pytest.mark.parametrize("index", range(len(QUANTISED)))
def test_scheme_grid(index):
    case = QUANTISED[index]
    _, error = run_poisoned(case, "cuda", seed=index)
    assert error < case.tolerance, case


@pytest.mark.parametrize("tokens", [1, 8, 300, 3000])
def test_scales_of_all_powers_of_two(tokens):
    """Row n of w2 has scale 2^(n - 127), the last one NaN. Where a pair of bfloat16 has no room for it, results may be
    infinite, or vanish, but are not silently others.
    """
    form = format_of("mxfp4")
    (hidden, w13, w2, *routed), options = Case.of((tokens, 2, 4, 256, 128), formats=(form, form)).draw("cuda", seed=1)
    bytes_of_rows = torch.arange(256, device="cuda", dtype=torch.uint8)
    ones = fusedmoe.ExpertMatrix(form, w2.data, torch.full_like(w2.scale, 127))
    w2 = fusedmoe.ExpertMatrix(form, w2.data, bytes_of_rows[None, :, None].expand_as(w2.scale).contiguous())
    power = torch.arange(256, device="cuda") - 127
    out = fusedmoe.fused_experts(hidden, w13, w2, *routed, **options).double()
    want = expected((hidden, w13, ones, *routed), options)
    off = ((out * torch.exp2(-power.double()) - want) / want.std()).abs()
    inside, below, above = (power >= -90) & (power <= 33), power < -90, (power > 33) & (power < 120)
    assert off[:, inside].norm() < 2 * tolerance(torch.bfloat16, form, form) * off[:, inside].numel() ** 0.5
    assert out[:, below].abs().max() < 1e-24
    assert ((off < 0.1) | ~out.isfinite())[:, above].all()
    assert not out[:, power == 128].isfinite().any()


def test_graph_replays_with_other_routing():
    """Captured once, replayed with other ids, also all on one expert, all absent: nothing of a routing is baked in."""
    for shape in ((4, 8, 128, 256, 192), (300, 8, 128, 256, 192), (5000, 2, 8, 512, 384)):
        case = Case.of(shape, ids="uniform")
        arguments, options = case.draw("cuda")
        x, w13, w2, weights, ids = arguments
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = fusedmoe.fused_experts(*arguments, **options)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = fusedmoe.fused_experts(*arguments, **options)
        for kind in ("any", "one", "invalid", "absent"):
            other, _ = Case.of(shape, ids=kind).draw("cuda", seed=5)
            ids.copy_(other[4])
            x.copy_(other[0])
            out.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            want = reference.fused_experts(x, w13, w2, weights, ids, **options)
            assert relative_error(out, want) < TOLERANCE["bfloat16"], (shape, kind)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    case = Case.of((300, 8, 128, 256, 192))
    with torch.cuda.device(0):
        _, error = run_poisoned(case, "cuda:1")
    assert error < TOLERANCE["bfloat16"]


def test_side_stream_and_threads():
    case = Case.of((300, 8, 32, 256, 192))
    arguments, options = case.draw("cuda")
    want = fusedmoe.fused_experts(*arguments, **options)
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results.extend(fusedmoe.fused_experts(*arguments, **options) for _ in range(10))
        stream.synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40
    assert all(torch.equal(result, want) for result in results)


def test_more_than_2_to_31_elements():
    """w13, w2, hidden states, the intermediate and the output each beyond 2^31 elements; rows at both ends compared."""
    if torch.cuda.get_device_properties(0).total_memory < 120 * 2**30:
        pytest.skip("needs 120 GiB")
    n_experts, top_k, hidden, intermediate = 300, 2, 4096, 2048
    tokens = 2**31 // hidden + 1024
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    ends = torch.cat([torch.arange(64), torch.arange(tokens - 64, tokens)]).cuda()
    x[ends] = torch.randn(128, hidden, device="cuda").bfloat16()
    w13 = torch.empty(n_experts, 2 * intermediate, hidden, dtype=torch.bfloat16, device="cuda").normal_(0, hidden**-0.5)
    w2 = torch.empty(n_experts, hidden, intermediate, dtype=torch.bfloat16, device="cuda").normal_(
        0, intermediate**-0.5
    )
    assert min(x.numel(), w13.numel(), w2.numel()) > 2**31
    ids = torch.randint(n_experts, (tokens, top_k), device="cuda", dtype=torch.int32)
    ids[ends, 0] = n_experts - 1  # the far end of the weights
    weights = torch.rand(tokens, top_k, device="cuda")
    out = fusedmoe.fused_experts(x, w13, w2, weights, ids)
    want = reference.fused_experts(x[ends], w13, w2, weights[ends], ids[ends], dtype=torch.float32)
    assert relative_error(out[ends], want) < TOLERANCE["bfloat16"]
    others = torch.ones(tokens, dtype=torch.bool, device="cuda")
    others[ends] = False
    assert int((out != 0).any(1)[others].sum()) == 0


def test_no_weight_is_copied():
    case = Case.of((300, 8, 64, 1024, 512), weight_layout="KN", pad=8)
    arguments, options = case.draw("cuda")
    fusedmoe.fused_experts(*arguments, **options)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = fusedmoe.fused_experts(*arguments, **options)
    peak = torch.cuda.max_memory_allocated() - before
    declared = fusedmoe.workspace_bytes(*arguments, **options) + out.nbytes
    assert peak <= declared + 4096


def test_torch_backend_agrees():
    case = Case.of((300, 8, 32, 256, 192), ids="invalid", bias=True)
    arguments, options = case.draw("cuda")
    out = fusedmoe.fused_experts(*arguments, backend="torch", **options)
    want = reference.fused_experts(*arguments, **options)
    assert relative_error(out, want) < 2 * TOLERANCE["bfloat16"]


def test_fp32_is_not_tf32_unless_asked():
    case = Case.of((300, 8, 32, 256, 192), dtype="float32")
    arguments, options = case.draw("cuda")
    want = reference.fused_experts(*arguments, **options)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        exact = fusedmoe.fused_experts(*arguments, **options)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert relative_error(exact, want) < TOLERANCE["float32"]
    rough = fusedmoe.fused_experts(*arguments, fp32_precision="tf32", **options)
    # Tensor cores drop the bits below tf32's 10: each factor shrinks by up to 2^-10, and a weight, a token (in gate and
    # in up) and an intermediate meet in one output.
    assert 1e-5 < relative_error(rough, want) < 6 * 2**-10


@pytest.mark.parametrize("shape", [(4, 8, 128, 256, 192), (300, 8, 128, 256, 192)])
def test_compiled_whole(shape):
    case = Case.of(shape)
    arguments, options = case.draw("cuda")
    layer = torch.compile(lambda *a: fusedmoe.fused_experts(*a, **options) * 2, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(layer(*arguments), fusedmoe.fused_experts(*arguments, **options) * 2)
