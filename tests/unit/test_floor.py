"""The floor against numbers worked out by hand and against measured figures."""

from __future__ import annotations

import pytest

from fusedmoe.plan.floor import H200, Ceilings, floor_of
from fusedmoe.schemes import format_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.problem import Problem
from fusedmoe.target import KNOWN

CEILINGS = Ceilings(bandwidth_gbps=100.0, tflops={"float16": 2.0, "e4m3": 4.0}, launch_us=3.0)
SM_90, SM_80 = KNOWN["sm_90"], KNOWN["sm_80"]


def problem(tokens, *, activation="silu", scheme=None, **sizes):
    sizes = {"experts": 8, "top_k": 2, "hidden": 1000, "intermediate": 500, "dtype": "float16", **sizes}
    if scheme is not None:
        sizes |= {"w13_format": format_of(scheme), "w2_format": format_of(scheme)}
    return Problem(tokens=tokens, activation=Activation.of(activation), **sizes)


def test_few_tokens_are_bound_by_the_weights_of_their_experts():
    floor = floor_of(problem(1), SM_90, CEILINGS, distinct=2)
    # 2 experts x 1000 x (2 x 500 + 500) x 2 bytes = 6 MB at 100 GB/s
    assert floor.weights_us == pytest.approx(60.0)
    assert floor.math_us == pytest.approx(2 * 2 * 1000 * 1500 / 2e6)
    assert (floor.bound, floor.us) == ("weights", pytest.approx(63.0))


def test_many_tokens_are_bound_by_the_matrix_products():
    floor = floor_of(problem(4096), SM_90, CEILINGS, distinct=8)
    assert floor.math_us == pytest.approx(2 * 8192 * 1000 * 1500 / 2e6)
    assert floor.weights_us == pytest.approx(240.0)
    assert (floor.bound, floor.us) == ("math", pytest.approx(floor.math_us + 3.0))


def test_without_ids_the_number_of_experts_is_the_expected_one():
    expected = 8 * (1 - (1 - 2 / 8) ** 3)
    given = floor_of(problem(3), SM_90, CEILINGS, distinct=expected)
    assert floor_of(problem(3), SM_90, CEILINGS).us == pytest.approx(given.us)
    assert floor_of(problem(0), SM_90, CEILINGS).us == pytest.approx(3.0)


def test_a_layer_without_a_gate_reads_and_multiplies_two_thirds():
    gated, single = (floor_of(problem(1, activation=name), SM_90, CEILINGS) for name in ("silu", "silu_no_mul"))
    assert single.weights_us == pytest.approx(gated.weights_us * 2 / 3)
    assert single.math_us == pytest.approx(gated.math_us * 2 / 3)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("fp8_channel", 8), ("int4_w4a16", 4 + 32 / 128), ("mxfp4", 4 + 8 / 32), ("nvfp4", 4 + 8 / 16)],
)
def test_quantised_weights_are_read_with_their_scales(scheme, bits):
    floor = floor_of(problem(1, scheme=scheme), SM_90, CEILINGS, distinct=2)
    assert floor.weights_us == pytest.approx(60.0 * bits / 16, rel=1e-3)


def test_the_rate_is_that_of_the_type_in_which_the_device_multiplies():
    plain = floor_of(problem(4096), SM_90, CEILINGS)
    assert floor_of(problem(4096, scheme="fp8_channel"), SM_90, CEILINGS).math_us == pytest.approx(plain.math_us / 2)
    assert floor_of(problem(4096, scheme="fp8_channel"), SM_80, CEILINGS).math_us == pytest.approx(plain.math_us)
    assert floor_of(problem(4096, scheme="fp8_w8a16"), SM_90, CEILINGS).math_us == pytest.approx(plain.math_us)


def test_a_rate_that_was_not_measured_is_said():
    floor = floor_of(problem(4096, scheme="int8_w8a8"), SM_90, CEILINGS)
    assert floor.math_us is None and floor.us == pytest.approx(floor.weights_us + 3.0)
    assert "not measured" in floor.bound


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
    assert floor_of(call, SM_90, H200, distinct=distinct).us == pytest.approx(us, rel=1e-3)
