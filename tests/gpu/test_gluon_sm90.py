"""The warp-specialised kernels of Hopper at real sizes; the interpreter cannot run Gluon, so this is where they run."""

from __future__ import annotations

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

SHAPES = [*hopper.SHAPES, (40, 64, 256, 64, 96), (3, 8, 4096, 64, 32), (4096, 8, 128, 2048, 768), hopper.SHORT]
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


def test_graph_replays_with_other_routing():
    case = Case.of((600, 8, 128, 256, 192), ids="uniform")
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
        other, _ = Case.of((600, 8, 128, 256, 192), ids=kind).draw("cuda", seed=5)
        ids.copy_(other[4])
        x.copy_(other[0])
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        want = fusedmoe.reference.fused_experts(x, w13, w2, weights, ids, **options)
        assert relative_error(out, want) < TOLERANCE["bfloat16"], kind


def test_a_row_of_nan_stays_alone():
    arguments, options = Case.of((600, 4, 16, 256, 192)).draw("cuda")
    want = fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)
    arguments[0][77] = float("nan")
    got = fusedmoe.fused_experts(*arguments, backend="gluon_sm90", **options)
    assert got[77].isnan().all()
    others = torch.arange(600, device="cuda") != 77
    assert torch.equal(got[others], want[others])


def test_chosen_where_it_was_measured_to_be_faster():
    arguments, options = Case.of((8192, 8, 128, 256, 192)).draw("cuda")
    assert choose(check(*arguments, **options).problem, target_of(torch.device("cuda"))).backend == "gluon_sm90"
