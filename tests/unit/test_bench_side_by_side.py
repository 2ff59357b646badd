"""The benchmark's other libraries, backends side by side, routings and shapes from files."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest
import torch

from fusedmoe.bench import PEERS, SHAPES, Row, bench, peers, peers_of, routing_of, shape_of, timing
from fusedmoe.bench.routing import draw_routing
from fusedmoe.errors import OptionError
from fusedmoe.plan.floor import Ceilings

CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth_gbps=10.0, tflops={"bfloat16": 0.1, "float32": 0.1}, launch_us=1.0)
TEXT_CONFIG = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts_per_tok": 2}


def rows(dtype=torch.bfloat16, tokens=(1, 5), shape="4,2,64,48", **options) -> list[Row]:
    return list(bench(shape_of(shape), tokens, dtype=dtype, device=CPU, ceilings=CEILINGS, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", ["torch._grouped_mm", "transformers-grouped_mm", "transformers-batched_mm"])
def test_peers_are_right(peer, dtype):
    if peer.startswith("transformers"):
        pytest.importorskip("transformers")
    for row in rows(dtype, tokens=(1, 33), routings=["zipf"], peers=[peer])[1::2]:
        assert row.backend == peer and row.library.startswith(PEERS[peer].package)
        if row.reason is not None and "grouped_mm" in peer:
            assert "NotImplementedError" in row.reason or "has no torch._grouped_mm" in row.reason
            continue
        assert row.ok and row.reason is None and 0 < row.error <= row.tolerance
        assert row.graph is None and row.times_floor == pytest.approx(row.us / row.floor_us)


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = rows(tokens=[3], peers=peers_of(["vllm", "transformers-grouped_mm"]))
    assert [row.ok for row in found] == [True, False, False]
    assert found[1].reason.startswith("vLLM cannot be imported")
    assert found[2].reason.startswith("Transformers with experts implementations")
    assert not any(row.wrong for row in found) and found[1].error is None


def test_a_peer_without_the_memory_says_so(monkeypatch):
    monkeypatch.setattr(peers, "_free_bytes", lambda device: 1000)
    _, row = rows(tokens=[3], peers=["transformers-batched_mm"])
    assert row.us is None and "copies the weights for every slot" in row.reason


def test_a_peer_gets_no_quantised_experts():
    _, row = rows(tokens=[3], scheme="fp8_channel", peers=["torch._grouped_mm"])
    assert row.reason == "it is compared on experts that are not quantised" and row.scheme == "fp8_channel"


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (lambda x: (_ for _ in ()).throw(RuntimeError("planted\nmore")), "RuntimeError: planted"),
        (lambda x: x * float("nan"), "wrong: error inf > 7.8e-03"),
    ],
)
def test_a_peer_that_fails_is_a_row(monkeypatch, fails, reason):
    monkeypatch.setitem(peers.PEERS, "other", peers.Library("no such package", lambda x, *rest: lambda: fails(x)))
    ours, theirs = rows(tokens=[3], peers=["other"])
    assert ours.ok and theirs.reason.startswith(reason) and "more" not in theirs.reason
    assert not theirs.wrong and theirs.library == "no such package"


def test_peers_by_name():
    assert peers_of([]) == () and peers_of(["vllm", "all"]) == ("vllm", *(name for name in PEERS if name != "vllm"))
    with pytest.raises(OptionError, match=r"peer: got 'sglang'; wanted torch._grouped_mm, .* or all"):
        peers_of(["sglang"])


def test_backends_side_by_side():
    found = rows(tokens=[1, 3], backends=["triton", "torch"])
    assert [(row.tokens, row.backend, row.ok) for row in found] == [
        (1, "triton", False),
        (1, "torch", True),
        (3, "triton", False),
        (3, "torch", True),
    ]
    assert "Triton has no CPU target" in found[0].reason and not found[0].wrong
    assert (found[0].floor_us, found[0].distinct) == (found[1].floor_us, found[1].distinct)
    with pytest.raises(OptionError, match="backend"):
        rows(backends=["torch", "cuda"])


def test_what_a_row_says_of_the_roofline():
    (row,) = rows(tokens=[1])
    assert row.flops == 6 * 2 * 64 * 48 and row.weight_bytes == 2 * 3 * 64 * 48 * 2
    assert row.multiplied_as == ("bfloat16",) and row.routing == "uniform"


def test_uniform_routing():
    weights, ids = draw_routing("uniform", 2000, 8, 2, torch.Generator().manual_seed(0))
    assert weights.shape == ids.shape == (2000, 2) and ids.dtype == torch.int32
    assert all(400 < count < 600 for count in Counter(ids.flatten().tolist()).values())


def test_zipf_routing():
    experts, tokens = 16, 20000
    weights, ids = draw_routing("zipf", tokens, experts, 1, torch.Generator().manual_seed(0))
    counts = sorted(Counter(ids.flatten().tolist()).values(), reverse=True)
    total = sum(1 / rank for rank in range(1, experts + 1))
    want = [tokens / rank / total for rank in range(1, experts + 1)]
    assert counts == pytest.approx(want, rel=0.15)
    assert ids.flatten().bincount().argmax() != 0  # of a random order
    weights, ids = draw_routing("zipf", 50, experts, 8, torch.Generator().manual_seed(1))
    assert all(len(set(row)) == 8 for row in ids.tolist()) and (weights > 0).all()
    again = draw_routing("zipf", 50, experts, 8, torch.Generator().manual_seed(1))
    assert torch.equal(again[0], weights) and torch.equal(again[1], ids)


def test_routing_of_rows():
    found = rows(shape="64,2,64,48", tokens=[32], routings=["uniform", "zipf"])
    assert [row.routing for row in found] == ["uniform", "zipf"] and all(row.ok for row in found)
    assert found[1].distinct < found[0].distinct and found[1].weight_bytes < found[0].weight_bytes
    with pytest.raises(OptionError, match="routing: got 'skewed'; wanted uniform or zipf"):
        routing_of("skewed")


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
            | {"hidden_size": 4096, "intermediate_size": 14336},
            (8, 2, 4096, 14336),
        ),
        ({"model_type": "qwen3_moe", "num_experts": 4, **TEXT_CONFIG}, (4, 2, 64, 48)),
        ({"model_type": "deepseek_v3", "n_routed_experts": 16, "n_shared_experts": 1, **TEXT_CONFIG}, (16, 2, 64, 48)),
        (
            {"model_type": "gpt_oss", "num_local_experts": 128, "num_experts_per_tok": 4}
            | {"hidden_size": 2880, "intermediate_size": 2880},
            (128, 4, 2880, 2880),
        ),
        ({"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 4, **TEXT_CONFIG}}, (4, 2, 64, 48)),
    ],
)
def test_shape_from_a_config(tmp_path, config, sizes):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    for path in (directory, directory / "config.json"):
        shape = shape_of(str(path))
        assert (shape.experts, shape.top_k, shape.hidden, shape.intermediate) == sizes and shape.name == "model"
    snapshot = directory.rename(tmp_path / ("0f" * 20))
    assert shape_of(str(snapshot)).name == config["model_type"]


def test_a_config_without_experts(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "intermediate_size": 96}))
    with pytest.raises(OptionError, match=r"model type 'llama': num_local_experts missing.*wanted a model with routed"):
        shape_of(str(path))
    path.write_text(json.dumps({"num_experts": 1, **TEXT_CONFIG}))
    with pytest.raises(OptionError, match="num_local_experts 1, num_experts_per_tok 2"):
        shape_of(str(tmp_path))
    path.write_text("[")
    with pytest.raises(OptionError, match=r"wanted a readable config\.json"):
        shape_of(str(path))
    path.unlink()
    with pytest.raises(OptionError, match=r"wanted a readable config\.json"):
        shape_of(str(tmp_path))


def test_known_shapes_come_before_paths(tmp_path, monkeypatch):
    (tmp_path / "dsv3-ep8").mkdir()
    monkeypatch.chdir(tmp_path)
    assert shape_of("dsv3-ep8") is SHAPES["dsv3-ep8"]


def test_a_call_that_no_graph_captures_is_launched_anew(monkeypatch):
    def time_us(call, device, *, graph=True):
        if graph:
            message = "operation not permitted when stream is capturing"
            raise RuntimeError(message)
        return 7.0

    monkeypatch.setattr(timing, "time_us", time_us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert timing.time_captured(lambda: None, torch.device("cuda")) == (7.0, False)
    monkeypatch.setattr(timing, "time_us", lambda call, device, **options: 5.0)
    assert timing.time_captured(lambda: None, torch.device("cuda")) == (5.0, True)
    assert timing.time_captured(lambda: None, CPU) == (5.0, None)
