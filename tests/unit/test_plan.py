"""The planner: pure, so it is tested for devices that are not here."""

from __future__ import annotations

import random

import pytest

from fusedmoe.errors import UnsupportedError
from fusedmoe.plan.config import FEW
from fusedmoe.plan.planner import choose, support
from fusedmoe.plan.validity import why_not
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import Matrix
from fusedmoe.spec.problem import Problem
from fusedmoe.target import KNOWN, Target

H200 = KNOWN["sm_90"]
TARGETS = [*KNOWN.values(), Target("intel", "xpu", 0, 64, 131072)]


def problem(tokens=512, top_k=8, experts=128, hidden=2048, intermediate=768, dtype="bfloat16", **options) -> Problem:
    options.setdefault("activation", Activation("silu"))
    return Problem(
        tokens=tokens, top_k=top_k, experts=experts, hidden=hidden, intermediate=intermediate, dtype=dtype, **options
    )


def test_whatever_is_planned_can_run():
    chooser = random.Random(0)
    matrices = [Matrix("K", tma=True), Matrix("K", tma=False), Matrix("N", tma=True), Matrix("none", tma=False)]
    for _ in range(2000):
        target = chooser.choice(TARGETS)
        p = problem(
            tokens=2 ** chooser.randrange(18) + chooser.randrange(3),
            top_k=chooser.choice([1, 2, 8, 64]),
            experts=chooser.choice([1, 7, 64, 256, 4096]),
            hidden=chooser.choice([1, 33, 2048, 7168]),
            intermediate=chooser.choice([1, 80, 768, 14336]),
            dtype=chooser.choice(["float32", "float16"]),
            activation=Activation(chooser.choice(["silu", "relu2_no_mul"])),
            w13=chooser.choice(matrices),
            w2=chooser.choice(matrices),
        )
        plan = choose(p, target, "triton").triton
        assert why_not(plan.gate_up, p.gate_up_gemm, target) == []
        assert why_not(plan.down, p.down_gemm, target) == []
        assert plan.gate_up.block_m == plan.down.block_m
        assert plan.few == (p.slots <= FEW)
        assert not (plan.gather and plan.few)


@pytest.mark.parametrize(
    ("tokens", "sizes", "columns"),
    [
        (8, (2, 8, 4096, 14336), 128),  # 1.3 waves of narrow tiles, one of wide ones
        (1, (2, 8, 4096, 14336), 64),  # neither fills a wave: more programs load more at once
        (8, (8, 32, 7168, 2048), 64),  # many waves: no difference, narrow
    ],
)
def test_few_slots_fill_their_last_wave(tokens, sizes, columns):
    top_k, experts, hidden, intermediate = sizes
    p = problem(tokens, top_k, experts, hidden, intermediate)
    assert choose(p, H200, "triton").triton.down.block_n == columns


def test_tensor_maps_only_where_they_describe_the_matrix():
    tall = {"tokens": 32768}
    assert choose(problem(**tall), H200, "triton").triton.gate_up.maps == "w"
    assert choose(problem(**tall, w13=Matrix("K", tma=False)), H200, "triton").triton.gate_up.maps == "none"
    # Rows past K of a matrix stored [E, K, N] are the next expert's.
    ragged = problem(**tall, intermediate=784, w2=Matrix("N", tma=True))
    assert choose(ragged, H200, "triton").triton.down.maps == "none"
    assert choose(problem(**tall), KNOWN["sm_80"], "triton").triton.gate_up.maps == "none"


def test_every_reason_of_every_backend():
    old = Target("nvidia", "sm_70", 70, 80, 98304, triton=False)
    reasons = support(problem(), old)
    assert reasons["torch"] == ()
    assert len(reasons["triton"]) == 3
    assert choose(problem(), old).backend == "torch"
    with pytest.raises(UnsupportedError) as raised:
        choose(problem(), old, "triton")
    for words in ("not installed", "older than sm_75", "no bfloat16", "backend='torch'"):
        assert words in str(raised.value)
