"""Adapters on a GPU, at sizes with several tiles: the option grid, every scheme, other rows' bits, replay."""

from __future__ import annotations

import hopper
import pytest
import torch

import fusedmoe
from fusedmoe import LoRA, reference
from fusedmoe.modular import Experts
from fusedmoe.parallel import intermediate_slice
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.testing.cases import OPTIONS, Case, pairwise, run_poisoned
from fusedmoe.testing.verify import TOLERANCE, relative_error, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

ADAPTERS = {
    "ranks": ((1,), (3, 0, 8), (16, 16, 5, 0), (64,), (200, 3)),
    "apart": (True, False, "tensors"),
    "shared": (False, True),
    "finite": (True, False),
}
SHAPES = [(1, 4, 16, 256, 192), (9, 3, 8, 264, 136), (300, 4, 16, 256, 192), (2100, 2, 8, 128, 512)]
GRID = pairwise({"shape": SHAPES, **OPTIONS, **ADAPTERS})


@pytest.mark.parametrize("row", range(len(GRID)))
def test_option_grid(row):
    case = Case.of(**GRID[row])
    _, error = run_poisoned(case, "cuda", seed=row)
    assert error < TOLERANCE[case.dtype], case


#: What the warp-specialised kernels take, who add adapters as steps of their sums.
STEPS = pairwise(
    {
        "shape": [*hopper.SHAPES, hopper.SHORT],
        **hopper.TAKEN,
        **ADAPTERS,
        "ranks": ((1,), (3, 0, 8), (16, 16, 5, 0), (64,) * 3, (200, 3), tuple(range(1, 17)) * 2),
        "finite": (True,),
    },
    seed=4,
)


@hopper.needed
@pytest.mark.parametrize("row", range(len(STEPS)))
def test_option_grid_of_steps(row):
    case = Case.of(**STEPS[row])
    _, error = run_poisoned(case, "cuda", "gluon_sm90", seed=row)
    assert error < TOLERANCE[case.dtype], case


@hopper.needed
@pytest.mark.parametrize("ranks", [(5, 0, 16, 64), (16,) * 16], ids=len)
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
def test_steps_leave_rows_without_an_adapter_their_bits(layout, ranks):
    case = Case.of((3000, 4, 8, 256, 384), ranks=ranks, finite=True, gate_up_layout=layout, ids="any")
    arguments, options = case.draw("cuda", seed=3)
    out, base = (fused_on_hopper(arguments, given) for given in (options, bare(options)))
    ids = options["adapter_ids"]
    adapted = (ids >= 0) & (ids < len(ranks)) & (options["lora"].rank[ids.clamp(0, len(ranks) - 1)] > 0)
    assert torch.equal(out[~adapted], base[~adapted])
    assert not (out[adapted] == base[adapted]).all(1).any()
    options["adapter_ids"] = torch.full_like(ids, -1)
    assert torch.equal(fused_on_hopper(arguments, options), base)


@hopper.needed
@pytest.mark.parametrize("ranks", [(5, 0, 16, 64), (16,) * 16], ids=len)
@pytest.mark.parametrize("backend", ["triton", "gluon_sm90"])
def test_a_nan_in_a_reaches_rows_of_its_adapter_alone(backend, ranks):
    """Where B is finite, which is all that the kernels are promised."""
    case = Case.of((3000, 4, 8, 256, 384), ranks=ranks, finite=True, ids="any")
    arguments, options = case.draw("cuda", seed=5)
    lora, ids = options["lora"], options["adapter_ids"]
    clean = fusedmoe.fused_experts(*arguments, backend=backend, **options)
    lora.w13_a[2, :, 3], lora.w2_a[2, :, 3] = float("nan"), float("inf")
    out = fusedmoe.fused_experts(*arguments, backend=backend, **options)
    assert torch.equal(out[ids != 2], clean[ids != 2])
    assert out[ids == 2].isnan().any(1).any()


def fused_on_hopper(arguments, options):
    return fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)


def bare(options):
    return {name: value for name, value in options.items() if name not in ("lora", "adapter_ids")}


@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
@pytest.mark.parametrize("tokens", [6, 300, 3000])
@pytest.mark.parametrize("finite", [False, True])
def test_schemes_and_rows_without_an_adapter(scheme, tokens, finite):
    """Within the bound of the scheme; and the other rows have the bits of the layer without adapters."""
    form = None if scheme == "none" else format_of(scheme)
    case = Case.of((tokens, 4, 8, 256, 384), formats=(form, form), ranks=(5, 0, 16, 64), finite=finite).fitted()
    out, error = run_poisoned(case, "cuda", "triton", seed=3)
    assert error < case.tolerance
    arguments, options = case.draw("cuda", seed=3)
    base = fusedmoe.fused_experts(*arguments, backend="triton", **bare(options))
    ids = options["adapter_ids"]
    adapted = (ids == 0) | (ids == 2) | (ids == 3)
    assert torch.equal(out[~adapted], base[~adapted])
    assert not (out[adapted] == base[adapted]).all(1).any()


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize("tokens", [3, 64, 700])
def test_a_graph_replays_with_what_the_slots_then_hold(tokens, finite):
    """Other adapters, other tokens of theirs, slots filled and emptied: nothing is captured or compiled anew."""
    case = Case.of((tokens, 4, 8, 256, 384), ranks=(16, 8), finite=finite)
    arguments, options = case.draw("cuda")
    lora, ids = options["lora"], options["adapter_ids"]
    out = torch.empty_like(arguments[0])
    fusedmoe.fused_experts(*arguments, out=out, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fusedmoe.fused_experts(*arguments, out=out, **options)
    for seed in range(3):
        other = case.draw("cuda", seed=seed + 1)[1]
        for name in ("w13_a", "w13_b", "w2_a", "w2_b", "scaling"):
            getattr(lora, name).copy_(getattr(other["lora"], name))
        ids.copy_(other["adapter_ids"])
        if seed == 2:
            lora.remove(0)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert verify(out, arguments, options).ok


@pytest.mark.parametrize("tokens", [3, 64, 700])
def test_a_second_call_with_other_adapters(tokens):
    """Calls alike are launched again: with the adapters of the second call, not those of the first."""
    first, second = (
        Case.of((tokens, 4, 8, 256, 384), ranks=(16, 8), ids="uniform").draw("cuda", seed=s) for s in (0, 1)
    )
    for arguments, options in (first, second, first):
        assert verify(fusedmoe.fused_experts(*arguments, **options), arguments, options).ok
    arguments, options = second
    without = fusedmoe.fused_experts(*arguments, **bare(options))
    assert verify(without, arguments, bare(options)).ok
    assert verify(fusedmoe.fused_experts(*arguments, **options), arguments, options).ok


@pytest.mark.parametrize("finite", [False, True])
def test_sixteen_adapters_of_a_known_size(finite):
    g = torch.Generator("cuda").manual_seed(0)
    experts, hidden, intermediate, rank, slots, tokens = 32, 2048, 768, 64, 16, 2048

    def draw(*sizes):
        return torch.randn(sizes, dtype=torch.bfloat16, device="cuda", generator=g) * sizes[-1] ** -0.5

    w13, w2 = draw(experts, 2 * intermediate, hidden), draw(experts, hidden, intermediate)
    lora = LoRA(
        draw(slots, experts, rank, hidden), draw(slots, experts, 2 * intermediate, rank),
        draw(slots, experts, rank, intermediate), draw(slots, experts, hidden, rank), finite=finite,
    )  # fmt: skip
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda", generator=g)
    topk = fusedmoe.softmax_topk(torch.randn(tokens, experts, device="cuda", generator=g), 8, renormalize=True)
    options = {"lora": lora, "adapter_ids": torch.randint(-1, slots, (tokens,), device="cuda", generator=g)}
    arguments = (x, w13, w2, topk.weights, topk.ids)
    assert verify(fusedmoe.fused_experts(*arguments, **options), arguments, options).ok


@pytest.mark.parametrize("tokens", [3, 64, 700])
def test_slices_of_the_intermediate_add_up(tokens):
    """What ranks of tensor parallelism compute, in memory of the caller's; twice, so that launches are replayed."""
    slices_add_up(tokens, "cuda")


def slices_add_up(tokens, device):
    case = Case.of((tokens, 4, 8, 256, 384), dtype="float32", ranks=(16, 8))
    (x, w13, w2, weights, ids), options = case.draw(device)
    adapters = {name: options.pop(name) for name in ("lora", "adapter_ids")}
    want = reference.fused_experts(x, w13, w2, weights, ids, **options, **adapters)
    layer, lora = Experts(w13, w2, **options), adapters["lora"]
    for _ in range(2):
        total = torch.zeros_like(want)
        for start, stop in ((0, 128), (128, 384)):
            slots = LoRA.empty(
                2, num_experts=8, hidden_size=256, intermediate_size=stop - start, max_rank=16,
                dtype=x.dtype, device=device,
            )  # fmt: skip
            for slot, rank in enumerate(case.ranks):
                whole = fusedmoe.Adapter(
                    w13_a=lora.w13_a[slot].unflatten(1, (2, lora.max_rank))[:, :, :rank].flatten(1, 2),
                    w13_b=lora.w13_b[slot, ..., :rank], w2_a=lora.w2_a[slot, :, :rank],
                    w2_b=lora.w2_b[slot, ..., :rank], scaling=float(lora.scaling[slot]),
                )  # fmt: skip
                slots.add(slot, intermediate_slice(whole, start, stop))
            mine = intermediate_slice(layer, start, stop)
            shapes = mine.workspace_shapes(*ids.shape, x.dtype, lora=slots)
            nan = {"fill_value": float("nan"), "dtype": x.dtype, "device": device}
            first, second = torch.full(shapes.workspace13, **nan), torch.full(shapes.workspace2, **nan)
            out = torch.full(shapes.output, **nan)
            total += mine.apply(out, x, weights, ids, first, second, lora=slots, adapter_ids=adapters["adapter_ids"])
        assert relative_error(total, want) < 2 * TOLERANCE["float32"]
