"""The warp-specialised kernels of Hopper at real sizes; the interpreter cannot run Gluon, so this is where they run."""

from __future__ import annotations

from dataclasses import replace

import hopper
import pytest
import torch

import fusedmoe
from fusedmoe.bench import Shape, problem_of
from fusedmoe.checks import check
from fusedmoe.plan.heuristics import sm90_plan
from fusedmoe.plan.planner import SUPPORTS, choose
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.spec.activation import Activation
from fusedmoe.target import KNOWN, target_of
from fusedmoe.testing.cases import QUANTISED_OPTIONS, Case, formats_of, pairwise, run_poisoned
from fusedmoe.testing.verify import TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu, hopper.needed, pytest.mark.filterwarnings("default")]

#: Of few rows an expert, whose weights are streamed to tiles of 16 or 32: one and several tiles a program, more rows
#: than a tile, columns past the last, rings longer than a sum.
STREAMED = [
    (8, 8, 128, 2048, 768),
    (200, 8, 128, 1040, 320),
    (33, 4, 7, 272, 144),
    (60, 2, 5, 96, 2880),
    (20, 1, 3, 512, 1408),
    (1, 8, 16, 256, 192),
]
SHAPES = [
    *hopper.SHAPES,
    *STREAMED,
    (40, 64, 256, 64, 96),
    (3, 8, 4096, 64, 32),
    (4096, 8, 128, 2048, 768),
    hopper.SHORT,
]
GRID = pairwise({"shape": SHAPES, **hopper.TAKEN}, seed=2)


@pytest.mark.parametrize("row", range(len(GRID)))
def test_option_grid(row):
    case = Case.of(**GRID[row])
    _, error = run_poisoned(case, "cuda", "gluon_sm90", seed=row)
    assert error < TOLERANCE[case.dtype], case


#: Multiplied as codes, or decoded by the word of 32 bits, whose columns change places by 32.
WHOLE_WORDS = [shape for shape in SHAPES if shape[3] % 32 == shape[4] % 32 == 0]


def quantised() -> list[Case]:
    """Every format that these kernels take, over shapes and options."""
    rows = pairwise({"shape": SHAPES, **hopper.TAKEN, "pad": (0, 16), **QUANTISED_OPTIONS, "emulate": (False,)}, seed=3)
    layer = Shape("any", 8, 2, 256, 256)
    cases = []
    for form in (form for scheme in SCHEMES for form in formats_of(scheme)):
        problem = problem_of(layer, 512, torch.bfloat16, form=form)
        if SUPPORTS["gluon_sm90"](problem, KNOWN["sm_90"]):
            continue
        for _ in range(5):
            options = dict(rows[len(cases) % len(rows)])
            if sm90_plan(problem, KNOWN["sm_90"]).gate_up.words and options["shape"] not in WHOLE_WORDS:
                options["shape"] = WHOLE_WORDS[len(cases) % len(WHOLE_WORDS)]
            chosen = {"both": (form, form), "w13": (form, None), "w2": (None, form)}[options.pop("quantised")]
            cases.append(Case.of(**options, formats=chosen).fitted())
    return cases


QUANTISED = quantised()


@pytest.mark.parametrize("index", range(len(QUANTISED)))
def test_scheme_grid(index):
    case = QUANTISED[index]
    _, error = run_poisoned(case, "cuda", "gluon_sm90", seed=index)
    assert error < case.tolerance, case


@pytest.mark.parametrize("activation", ["relu2_no_mul", "silu"])
@pytest.mark.parametrize("sizes", [(513, 4, 16, 1040, 320), (300, 2, 5, 272, 144)], ids=str)
def test_halves_of_a_tile_past_the_last_column(sizes, activation):
    """They have no scales to read, and no scale of theirs may be written: it would be the next row's."""
    form = format_of("fp8_block")
    case = Case.of(sizes, activation=Activation.of(activation), formats=(form, form)).fitted()
    _, error = run_poisoned(case, "cuda", "gluon_sm90")
    assert error < case.tolerance


@pytest.mark.parametrize("tokens", [1, 5, 40, 100, 300])
@pytest.mark.parametrize("codes", [False, True])
def test_what_is_read_ahead_is_there(tokens, codes):
    """Weights and the schedule are read before the launch before is done, which may have made the schedule or not, and
    a launch of a call starts while those before it run. Calls follow each other, with other routing each time, and
    results wait for nobody.
    """
    form = format_of("fp8_block")
    case = Case.of((tokens, 8, 128, 1024, 768), formats=(form, form), codes=codes).fitted()
    drawn = [case.draw("cuda", seed=seed) for seed in range(4)]
    problem = check(*drawn[0][0], **drawn[0][1]).problem
    assert choose(problem, target_of(torch.device("cuda")), "gluon_sm90").triton.gate_up.streams
    w13, w2 = drawn[0][0][1:3]
    calls = [((a[0], w13, w2, *a[3:]), options) for a, options in drawn]
    want = [
        fusedmoe.reference.fused_experts(
            *arguments, **{name: given for name, given in options.items() if name != "dtype"}
        )
        for arguments, options in calls
    ]
    workspace = torch.full(
        (fusedmoe.workspace_bytes(*calls[0][0], backend="gluon_sm90", **calls[0][1]),), 255, dtype=torch.uint8
    ).cuda()
    run = lambda a, o: fusedmoe.fused_experts(*a, backend="gluon_sm90", workspace=workspace, **o)  # noqa: E731
    first = [run(arguments, options) for arguments, options in calls]
    for one, wanted in zip(first, want, strict=True):
        assert relative_error(one, wanted) < case.tolerance
    for turn in range(25):
        got = [run(arguments, options) for arguments, options in calls]
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), turn


@pytest.mark.parametrize("scheme", ["none", "fp8_block"])
@pytest.mark.parametrize("tokens", [20, 600])
def test_graph_replays_with_other_routing(tokens, scheme):
    form = None if scheme == "none" else format_of(scheme)
    case = Case.of((tokens, 8, 128, 256, 256), ids="uniform", formats=(form, form)).fitted()
    arguments, options = case.draw("cuda")
    x, w13, w2, weights, ids = arguments
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)
    for kind in ("any", "one", "invalid", "absent"):
        other, _ = replace(case, ids=kind).draw("cuda", seed=5)
        ids.copy_(other[4])
        x.copy_(other[0])
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        want = fusedmoe.reference.fused_experts(x, w13, w2, weights, ids, **options)
        assert relative_error(out, want) < case.tolerance, kind


@pytest.mark.parametrize("tokens", [100, 600])
def test_a_row_of_nan_stays_alone(tokens):
    arguments, options = Case.of((tokens, 4, 16 if tokens > 100 else 64, 256, 192)).draw("cuda")
    want = fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)
    arguments[0][77] = float("nan")
    got = fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)
    assert got[77].isnan().all()
    others = torch.arange(tokens, device="cuda") != 77
    assert torch.equal(got[others], want[others])


def test_chosen_where_it_was_measured_to_be_faster():
    arguments, options = Case.of((8192, 8, 128, 256, 192)).draw("cuda")
    assert choose(check(*arguments, **options).problem, target_of(torch.device("cuda"))).backend == "gluon_sm90"
