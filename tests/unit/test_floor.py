"""The floor against numbers worked out by hand and against measured figures."""

from __future__ import annotations

import pytest

from fusedmoe.plan.floor import H200, Ceilings, floor_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.problem import Problem

CEILINGS = Ceilings(bandwidth_gbps=100.0, tflops=2.0, launch_us=3.0)


def problem(tokens, *, activation="silu", **sizes):
    sizes = {"experts": 8, "top_k": 2, "hidden": 1000, "intermediate": 500, "dtype": "float16", **sizes}
    return Problem(tokens=tokens, activation=Activation.of(activation), **sizes)


def test_few_tokens_are_bound_by_the_weights_of_their_experts():
    floor = floor_of(problem(1), CEILINGS, distinct=2)
    # 2 experts x 1000 x (2 x 500 + 500) x 2 bytes = 6 MB at 100 GB/s
    assert floor.weights_us == pytest.approx(60.0)
    assert floor.math_us == pytest.approx(2 * 2 * 1000 * 1500 / 2e6)
    assert (floor.bound, floor.us) == ("weights", pytest.approx(63.0))


def test_many_tokens_are_bound_by_the_matrix_products():
    floor = floor_of(problem(4096), CEILINGS, distinct=8)
    assert floor.math_us == pytest.approx(2 * 8192 * 1000 * 1500 / 2e6)
    assert floor.weights_us == pytest.approx(240.0)
    assert (floor.bound, floor.us) == ("math", pytest.approx(floor.math_us + 3.0))


def test_without_ids_the_number_of_experts_is_the_expected_one():
    expected = 8 * (1 - (1 - 2 / 8) ** 3)
    assert floor_of(problem(3), CEILINGS).us == pytest.approx(floor_of(problem(3), CEILINGS, distinct=expected).us)
    assert floor_of(problem(0), CEILINGS).us == pytest.approx(3.0)


def test_a_layer_without_a_gate_reads_and_multiplies_two_thirds():
    gated, single = (floor_of(problem(1, activation=name), CEILINGS) for name in ("silu", "silu_no_mul"))
    assert single.weights_us == pytest.approx(gated.weights_us * 2 / 3)
    assert single.math_us == pytest.approx(gated.math_us * 2 / 3)


@pytest.mark.parametrize(
    ("sizes", "tokens", "distinct", "us"),
    [
        # (experts, top_k, hidden, intermediate): figures that were computed when an H200 was measured
        ((8, 2, 4096, 14336), 1, 2, 170.3),
        ((128, 8, 2048, 768), 32768, 128, 3066.2),
        ((256, 8, 7168, 256), 8192, 256, 897.1),
    ],
)
def test_nominal_h200(sizes, tokens, distinct, us):
    names = ("experts", "top_k", "hidden", "intermediate")
    call = problem(tokens, dtype="bfloat16", **dict(zip(names, sizes, strict=True)))
    assert floor_of(call, H200["bfloat16"], distinct=distinct).us == pytest.approx(us, rel=1e-3)
