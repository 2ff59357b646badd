"""The benchmark: what it measures is verified first, and what is wrong gets no figure."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fusedmoe import bench as benchmark, functional
from fusedmoe.bench import (
    SHAPES,
    Row,
    bench,
    format_for,
    measure_ceilings,
    problem_of,
    read_peer,
    shape_of,
    time_us,
    timing,
)
from fusedmoe.checks import check
from fusedmoe.errors import OptionError, UnsupportedError
from fusedmoe.plan.floor import Ceilings
from fusedmoe.schemes import SCHEMES
from fusedmoe.testing import verify as verifying
from fusedmoe.testing.cases import random_matrix
from fusedmoe.testing.verify import relative_error, true_float32, verify

CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth_gbps=10.0, tflops={"bfloat16": 0.1, "float32": 0.1}, launch_us=1.0)
PEERS = sorted((Path(__file__).parents[2] / "benchmarks" / "peers").glob("*.json"))


def rows(dtype=torch.bfloat16, tokens=(1, 5), **options) -> list[Row]:
    return list(bench(shape_of("4,2,64,48"), tokens, dtype=dtype, device=CPU, ceilings=CEILINGS, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows(dtype):
    for row, n_tokens in zip(rows(dtype), (1, 5), strict=True):
        assert (row.shape, row.tokens, row.backend) == ("4,2,64,48", n_tokens, "torch")
        assert row.ok and 0 < row.error <= row.tolerance
        assert row.tflops == pytest.approx(6 * n_tokens * 2 * 64 * 48 / row.us / 1e6)
        assert row.times_floor == pytest.approx(row.us / row.floor_us)
        assert row.distinct == 2 if n_tokens == 1 else 2 < row.distinct <= 4


def test_rows_of_batch_invariant_calls(monkeypatch):
    asked = []
    run = functional.fused_experts

    def spy(*arguments, **options):
        asked.append(options["batch_invariant"])
        return run(*arguments, **options)

    monkeypatch.setattr(functional, "fused_experts", spy)
    assert all(row.ok and row.batch_invariant for row in rows(batch_invariant=True))
    assert all(asked) and asked
    assert not any(row.batch_invariant for row in rows())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_schemes(scheme):
    (row,) = bench(shape_of("4,2,96,64"), [3], dtype=torch.bfloat16, device=CPU, ceilings=CEILINGS, scheme=scheme)
    assert row.ok and 0 < row.error <= row.tolerance
    assert row.scheme == scheme and row.format.startswith(scheme)


def test_a_format_fits_the_shape():
    assert format_for("none", SHAPES["gpt-oss-120b"]) is None
    assert format_for("int4_w4a16", SHAPES["qwen3-30b-a3b"]).block == (1, 128)
    assert format_for("int4_w4a16", SHAPES["gpt-oss-120b"]).block == (1, 64)
    with pytest.raises(OptionError, match="scheme 'mxfp4' for shape 4,2,64,48: got H 64, I 48; wanted multiples of 32"):
        format_for("mxfp4", shape_of("4,2,64,48"))
    with pytest.raises(OptionError, match="scheme: got 'int3'"):
        format_for("int3", SHAPES["gpt-oss-120b"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_problem_of_a_scheme_is_that_of_its_tensors(scheme):
    shape = shape_of("4,2,96,64")
    form = format_for(scheme, shape)
    problem = problem_of(shape, 3, torch.bfloat16, form=form)
    generator = torch.Generator().manual_seed(0)
    call = check(
        torch.zeros(3, 96, dtype=torch.bfloat16),
        random_matrix(form, (4, 128, 96), generator, parts=2),
        random_matrix(form, (4, 96, 64), generator),
        torch.zeros(3, 2),
        torch.zeros(3, 2, dtype=torch.int32),
    )
    assert call.problem == problem


@pytest.mark.parametrize("plant", [lambda out: out * 1.1, lambda out: out.index_fill(1, torch.tensor([3]), math.nan)])
def test_a_wrong_result_gets_no_figure(monkeypatch, plant):
    right = functional.fused_experts
    monkeypatch.setattr(functional, "fused_experts", lambda *a, **options: plant(right(*a, **options)))
    for row in rows():
        assert not row.ok and row.error > row.tolerance
        assert row.us is None and row.tflops is None and row.times_floor is None


def test_an_output_that_was_never_written_is_seen(monkeypatch):
    monkeypatch.setattr(functional, "fused_experts", lambda *a, out, **options: out)
    assert [row.error for row in rows()] == [math.inf, math.inf]


def test_of_many_tokens_a_sample_is_verified(monkeypatch):
    monkeypatch.setattr(verifying, "FULL", 16)
    monkeypatch.setattr(verifying, "SAMPLE", 8)
    w13, w2 = torch.randn(4, 96, 64) / 8, torch.randn(4, 64, 48) / 7
    arguments = (torch.randn(17, 64), w13, w2, torch.rand(17, 2), torch.randint(4, (17, 2)))
    out = functional.fused_experts(*arguments)
    verdict = verify(out, arguments, {})
    assert verdict.ok and verdict.rows == 8
    assert not verify(out.flip(0), arguments, {}).ok


def test_relative_error():
    one = torch.ones(4)
    assert relative_error(one, one) == 0.0
    assert relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert relative_error(one, torch.zeros(4)) == math.inf
    assert relative_error(one / 0, one) == math.inf
    assert relative_error(torch.zeros(4), torch.zeros(4)) == 0.0
    assert relative_error(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_precision_of_float32_is_put_back():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with true_float32():
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_backend_that_does_not_take_the_call_is_an_error():
    with pytest.raises(UnsupportedError, match="Triton has no CPU target"):
        rows(backends=["triton"])


def test_ceilings_of_the_cpu():
    found = measure_ceilings(CPU, ["float32", "int8", "int8", "e4m3"])
    assert 0.1 < found.bandwidth_gbps < 1e4 and 0.1 < found.launch_us < 1e5
    assert {"float32", "int8"} == set(found.tflops) and all(1e-4 < rate < 1e3 for rate in found.tflops.values())


def test_a_type_that_cannot_be_multiplied_has_no_rate(monkeypatch):
    def no(*a, **options):
        raise NotImplementedError

    monkeypatch.setattr(torch, "_int_mm", no)
    assert timing._tflops("int8", 32, CPU) is None


def test_time_is_the_median_of_what_was_called():
    calls = []
    assert time_us(lambda: calls.append(1), CPU) < 1e5
    assert 3 <= len(calls) - 2 <= timing.REPEATS


def test_shapes():
    assert shape_of("dsv3-tp8") is SHAPES["dsv3-tp8"]
    for text in ("dsv3", "8,2,64", "8,2,64,0", "8,9,64,64", "a,b,c,d", ""):
        with pytest.raises(OptionError, match=r"shape: got .*wanted mixtral-8x7b.*E,top_k,H,I"):
            shape_of(text)


@pytest.mark.parametrize(("weight_layout", "contiguous"), [("NK", "K"), ("KN", "N")])
def test_problem_without_tensors(weight_layout, contiguous):
    problem = problem_of(SHAPES["gpt-oss-120b"], 3, torch.float16, activation="swigluoai", weight_layout=weight_layout)
    assert (problem.tokens, problem.experts, problem.top_k) == (3, 128, 4)
    assert (problem.hidden, problem.intermediate, problem.w13_rows) == (2880, 2880, 5760)
    assert problem.w13.contiguous == problem.w2.contiguous == contiguous
    assert problem_of(shape_of("4,2,33,48"), 1, torch.bfloat16).w13.tma is False


@pytest.mark.parametrize("path", PEERS, ids=lambda path: path.stem)
def test_figures_of_peers_are_complete(path):
    peer = read_peer(path)
    assert len(peer.source) > 100 and peer.dtype in benchmark.DTYPES and "/" not in peer.source
    assert {shape for shape, _ in peer.us} <= set(SHAPES)
    assert all(us > 0 for us in peer.us.values())


def test_figures_of_peers_that_cannot_be_read(tmp_path):
    path = tmp_path / "peer.json"
    good = {"name": "p", "device": "d", "dtype": "bfloat16", "scheme": None, "source": "s"}
    good["us"] = {"4,2,64,48": {"1": 2.0}}
    path.write_text(json.dumps(good))
    assert read_peer(path).us == {("4,2,64,48", 1): 2.0}
    for text in (
        "",
        "[]",
        json.dumps({**good, "us": [1]}),
        json.dumps({"us": {}}),
        json.dumps({**good, "us": {"a": 1}}),
        json.dumps({**good, "scheme": "int3"}),
    ):
        path.write_text(text)
        with pytest.raises(OptionError, match="figures of a peer in .*benchmarks/peers"):
            read_peer(path)
    with pytest.raises(OptionError, match="No such file"):
        read_peer(tmp_path / "none.json")


def test_the_layer_of_another_model():
    shape = shape_of("4,2,64,48")
    how = {"dtype": torch.float32, "device": torch.device("cpu"), "ceilings": CEILINGS, "bias": True}
    (row,) = bench(shape, [3], activation="swigluoai", gate_up_layout="interleaved", **how)
    assert row.ok and (row.activation, row.gate_up_layout, row.bias) == ("swigluoai", "interleaved", True)
    row, peer = bench(shape, [3], activation="relu2_no_mul", peers=["torch._grouped_mm"], **how)
    assert row.ok and row.gate_up_layout is None
    assert peer.us is None and "silu without biases" in peer.reason
