"""The planner: pure, so it is tested for devices that are not here."""

from __future__ import annotations

import importlib.metadata
import random
from dataclasses import replace

import pytest
import torch

from fusedmoe import target
from fusedmoe.bench import SHAPES, format_for, problem_of
from fusedmoe.errors import UnsupportedError
from fusedmoe.plan.config import FEW
from fusedmoe.plan.planner import choose, support
from fusedmoe.plan.validity import why_not, why_not_plan
from fusedmoe.schemes import format_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import Matrix
from fusedmoe.spec.problem import Adapters, Problem
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
        assert p.slots > 4 or plan.few
        assert p.slots <= FEW or not plan.few
        assert not (plan.gather and plan.few)


@pytest.mark.parametrize(
    ("slots", "experts", "scheme", "few"),
    [
        (64, 8, None, True),  # mixtral-8x7b, T = 32: 657 us without a schedule, 676 with
        (64, 256, None, False),  # dsv3-tp8, T = 8: 186 and 177 us
        (32, 32, None, True),  # dsv3-ep8, T = 4: 478 and 497 us
        (64, 8, "fp8_block", False),  # mixtral-8x7b, T = 32: 369 and 363 us
        (8, 128, "fp8_block", True),  # qwen3-30b-a3b, T = 1: 28.6 and 30.6 us
        (8, 8, "mxfp4", False),  # mixtral-8x7b, T = 4: 336 and 302 us
    ],
)
def test_schedules_pay_the_sooner_the_lighter_the_weights(slots, experts, scheme, few):
    form = format_of(scheme) if scheme else None
    p = problem(slots, 1, experts, w13_format=form, w2_format=form)
    assert choose(p, H200, "triton").triton.few == few


@pytest.mark.parametrize(
    ("tokens", "sizes", "columns"),
    [
        (8, (2, 8, 4096, 14336), 128),  # 1.3 waves of narrow tiles, one of wide ones
        (2, (2, 8, 4096, 14336), 64),  # neither fills a wave: more programs load more at once
        (4, (8, 32, 7168, 2048), 64),  # many waves: no difference, narrow
    ],
)
def test_few_slots_fill_their_last_wave(tokens, sizes, columns):
    top_k, experts, hidden, intermediate = sizes
    p = problem(tokens, top_k, experts, hidden, intermediate)
    assert choose(p, H200, "triton").triton.down.block_n == columns


FP8_BLOCK, FP8_CHANNEL, INT8, INT4, MXFP4 = (
    format_of(name) for name in ("fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4")
)
MIXTRAL = {"top_k": 2, "experts": 8, "hidden": 4096, "intermediate": 14336}


@pytest.mark.parametrize(
    ("single", "options"),
    [
        (True, {"tokens": 1}),  # qwen3-30b-a3b: 28 us, on tensor cores 36
        (True, {"tokens": 4}),  # 84 and 90
        (False, {"tokens": 8}),  # 156 and 136: slots share experts
        (True, {"tokens": 1, **MIXTRAL}),  # 177 and 190
        (False, {"tokens": 2, **MIXTRAL}),
        (True, {"tokens": 1, "w13_format": INT8, "w2_format": INT8}),
        (False, {"tokens": 1, "w13_format": INT8, "w2_format": INT8, **MIXTRAL}),  # 166 and 118: conversion of bytes
        (False, {"tokens": 1, "w13_format": INT4, "w2_format": INT4, **MIXTRAL}),  # 134 and 109
        (True, {"tokens": 1, "w13_format": MXFP4, "w2_format": MXFP4}),  # 24 and 33
        (False, {"tokens": 2, "w13_format": MXFP4, "w2_format": MXFP4}),  # 46 and 45
        (True, {"tokens": 1, "adapters": Adapters(slots=4, rank=16, parts=2)}),  # as without: rows keep their bits
        (False, {"tokens": 1, "w13": Matrix("N", tma=True)}),
        (False, {"tokens": 1, "batch_invariant": True}),
        (False, {"tokens": 1, "top_k": 32}),
    ],
    ids=str,
)
def test_rows_one_by_one_where_that_is_faster(single, options):
    p = problem(**options)
    plan = choose(p, H200, "triton").triton
    assert plan.single == single
    assert not why_not_plan(plan, p, H200)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_n": 0}, "powers of two"),
        ({"block_k": 96}, "powers of two"),
        ({"block_k": 16}, "below 32"),
        ({"block_n": 128, "block_k": 1024}, "larger than Triton's tensors"),
        ({"warps": 3}, "warps=3"),
        ({"words": True}, "by pointer"),
        ({"pairs": True}, "by pointer"),
    ],
    ids=str,
)
def test_tiles_of_single_rows_that_cannot_run(change, reason):
    """As a file could have them, which planned nothing."""
    plan = choose(problem(1), H200).triton
    assert plan.single
    (said,) = why_not_plan(replace(plan, down=replace(plan.down, **change)), problem(1), H200)
    assert reason in said


def test_an_intermediate_for_words_is_stored_by_whole_words():
    p = problem(64, w13_format=MXFP4, w2_format=MXFP4)
    plan = choose(p, H200, "triton").triton
    assert plan.down.words
    assert not why_not_plan(plan, p, H200)
    (said,) = why_not_plan(replace(plan, gate_up=replace(plan.gate_up, block_n=16)), p, H200)
    assert "the columns of four words" in said


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


def both(form, **options) -> Problem:
    return problem(w13_format=form, w2_format=form, **options)


@pytest.mark.parametrize(
    ("p", "backend"),
    [
        (problem(tokens=8192), "gluon_sm90"),
        (problem(tokens=512), "triton"),
        (problem(tokens=768), "gluon_sm90"),  # 362 and 337 us
        (problem(256, 2, 8, 4096, 14336), "triton"),  # 727 and 740 us
        (problem(512, 2, 8, 4096, 14336), "gluon_sm90"),  # 939 and 914 us
        (both(FP8_BLOCK, tokens=8192), "gluon_sm90"),
        (both(FP8_BLOCK, tokens=512), "triton"),
        (both(FP8_BLOCK, tokens=192, top_k=2, experts=8, hidden=4096, intermediate=14336), "gluon_sm90"),  # 525 and 369
        (both(FP8_BLOCK, tokens=256), "gluon_sm90"),
        (both(FP8_BLOCK, tokens=8), "gluon_sm90"),  # 86.1 and 83.2 us
        (both(FP8_BLOCK, tokens=1), "triton"),
        (both(FP8_CHANNEL, tokens=8), "triton"),
        (problem(tokens=8), "triton"),
        (both(FP8_CHANNEL, tokens=1024), "gluon_sm90"),
        (both(FP8_CHANNEL, tokens=512), "triton"),
        (both(FP8_CHANNEL, tokens=768), "gluon_sm90"),  # 251 and 226 us
        (both(INT8, tokens=8192), "gluon_sm90"),
        (problem(32768, 8, 32, 7168, 2048), "gluon_sm90"),  # 39.4 and 38.8 ms, in turns
        (problem(2048, 8, 32, 7168, 2048), "gluon_sm90"),  # 2.53 and 2.39 ms
        (problem(2048, 8, 256, 7168, 256), "gluon_sm90"),  # 960 and 908 us
        (problem(1024, 8, 256, 7168, 256), "gluon_sm90"),  # 785 and 751 us
        (problem(1536, 4, 128, 2880, 2880), "triton"),  # 1.63 and 1.64 ms
        (problem(8192, 4, 128, 2880, 2880), "gluon_sm90"),  # 3.57 and 3.40 ms
        (problem(8192, 4, 128, 2880, 2880, gate_up="interleaved"), "triton"),  # 3.38 and 3.76 ms
        (both(FP8_BLOCK, tokens=8192, gate_up="interleaved"), "gluon_sm90"),
        (both(FP8_CHANNEL, tokens=32768, top_k=2, experts=8, hidden=4096, intermediate=14336), "gluon_sm90"),
        (both(INT8, tokens=32768, top_k=2, experts=8, hidden=4096, intermediate=14336), "gluon_sm90"),
        (both(format_of("int4_w4a16"), tokens=8192), "gluon_sm90"),  # 1.83 and 1.40 ms
        (both(format_of("mxfp4"), tokens=512), "triton"),  # 293 and 351 us
        (both(format_of("mxfp4"), tokens=2048, hidden=2880, intermediate=2880, gate_up="interleaved"), "gluon_sm90"),
        (both(format_of("int4_w4a16"), tokens=8192, batch_invariant=True), "gluon_sm90"),
        (problem(tokens=8192, dtype="float32"), "triton"),
    ],
    ids=str,
)
def test_the_faster_backend_is_chosen(p, backend):
    plan = choose(p, H200)
    assert plan.backend == backend
    if backend == "triton":
        ((name, reasons),) = plan.refused
        assert name == "gluon_sm90" and all(reasons)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "stores 16-bit results"),
        ({"w13": Matrix("N", tma=True)}, "weight_layout='NK'"),
        ({"w2": Matrix("K", tma=False)}, "no tensor map"),
        ({"rows_aligned": False}, "rows of hidden_states"),
        ({"hidden": 2052}, "K = 2052 is no multiple of 8"),
        ({"w13_format": format_of("fp8_block", block=(64, 64))}, "scales must be those of block_k=128"),
        ({"w2_format": format_of("fp8_block", block=(64, 128))}, "blocks of 64 have several"),
        ({"w13_format": format_of("int8_w8a8", inputs="group")}, "e4m3 alone"),
        ({"w2_format": format_of("int4_w4a16", zero=True)}, "no zero points"),
        ({"w2_format": format_of("mxfp8")}, "decoded by the word"),
        ({"w13_format": format_of("int8_w8a16", group=64), "hidden": 2064}, "multiple of 32"),
        ({"w13_format": FP8_CHANNEL, "emulate": True}, "decoded by the word"),
    ],
    ids=str,
)
def test_what_the_kernels_of_hopper_do_not_take(options, words):
    with pytest.raises(UnsupportedError, match=words):
        choose(problem(tokens=8192, **options), H200, "gluon_sm90")
    assert choose(problem(tokens=8192, **options), H200).backend == "triton"


def test_rows_that_the_layer_quantises_itself_are_aligned():
    assert support(both(FP8_CHANNEL, tokens=8192, rows_aligned=False), H200)["gluon_sm90"] == ()
    codes = both(FP8_CHANNEL, tokens=8192, rows_aligned=False, inputs_dtype="float8_e4m3fn")
    assert support(codes, H200)["gluon_sm90"]


@pytest.mark.parametrize("target", [t for t in TARGETS if t != H200], ids=str)
def test_other_devices_have_no_kernels_of_hopper(target):
    assert any("sm_90" in reason for reason in support(problem(tokens=8192, dtype="float16"), target)["gluon_sm90"])
    assert choose(problem(tokens=8192, dtype="float16"), target).backend == "triton"


def test_an_older_triton_has_no_gluon():
    old = replace(H200, gluon=False)
    assert any("Triton 3.6" in reason for reason in support(problem(tokens=8192), old)["gluon_sm90"])


@pytest.mark.parametrize("tokens", [1, 40, 300, 5000])
@pytest.mark.parametrize("form", [None, "fp8_block", "int4_w4a16"])
def test_experts_of_other_ranks_take_no_rows(tokens, form):
    """Twice as many experts by a map, and twice as many tokens: as many rows for each, and the same tiles."""
    forms = {"w13_format": format_of(form), "w2_format": format_of(form)} if form else {}
    alone, mapped = problem(tokens=tokens, experts=64, **forms), problem(
        tokens=2 * tokens, experts=64, known_experts=128, expert_map=True, **forms
    )  # fmt: skip
    assert mapped.mean_rows == alone.mean_rows
    if alone.slots > FEW:
        assert choose(mapped, H200).backend == choose(alone, H200).backend
        assert choose(mapped, H200).triton == choose(alone, H200).triton
    assert problem(experts=64, known_experts=10).mean_rows == problem(experts=64).mean_rows, "a map to copies"


@pytest.mark.parametrize(
    ("versions", "interpret", "reason"),
    [
        ({"triton": "3.4.0", "numpy": "2.3.0"}, False, "triton 3.4 is older than 3.5"),
        ({"triton": "3.5.1", "numpy": "2.4.0"}, True, "the interpreter of triton 3.5 needs numpy below 2.4"),
        ({"triton": "3.6.0", "numpy": "2.3.9"}, True, ""),
        ({"triton": "3.5.1", "numpy": "2.4.0"}, False, ""),
        ({"triton": "3.7.1", "numpy": "2.4.0"}, True, ""),
        ({"triton": "3.9.0", "numpy": "2.4"}, True, ""),
        ({"triton": "3.10.0+git1", "numpy": "3.0"}, False, ""),
        ({"triton": "main"}, True, ""),
        ({}, True, ""),
    ],
    ids=str,
)
def test_versions_that_do_not_fit_are_a_reason(versions, interpret, reason, monkeypatch):
    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert target._unfit(interpret).startswith(reason)
    assert bool(target._unfit(interpret)) == bool(reason)
    if reason:
        here = Target("cpu", interpret=True, unfit=reason)
        assert reason in support(problem(), here)["triton"]
        with pytest.raises(UnsupportedError, match=reason):
            choose(problem(), here, "triton")
        assert choose(problem(), here).backend == "torch"


@pytest.mark.parametrize("scheme", ["none", "fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_has_few_kernels(shape, scheme):
    """All numbers of tokens up to 8192 together need at most 16 compiled GEMMs, of at most 10 plans."""
    one = SHAPES[shape]
    first = problem_of(one, 1, torch.bfloat16, form=format_for(scheme, one))
    tokens = {*range(1, 65), *(int(64 * 2 ** (i / 16)) for i in range(16 * 7 + 1))}
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        found = {choose(replace(first, tokens=n), KNOWN[arch]) for n in tokens}
        plans = {(plan.backend, plan.triton) for plan in found}
        gemms = {(backend, name, getattr(how, name)) for backend, how in plans for name in ("gate_up", "down")}
        assert len(plans) <= 10 and len(gemms) <= 16
