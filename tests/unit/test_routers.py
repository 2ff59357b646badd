"""Routers against their definition in float64, and against the models' own code."""

from __future__ import annotations

import pytest
import torch

from fusedmoe import reference, routers
from fusedmoe.errors import DeviceError, DTypeError, LayoutError, OptionError, ShapeError


def logits(tokens=33, experts=16, seed=0, scale=2.0):
    return scale * torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))


def same(got, weights, ids):
    """Slots may come in any order: compare by expert."""
    assert got.weights.dtype == torch.float32
    assert got.ids.dtype == torch.int64
    assert got.weights.shape == got.ids.shape == ids.shape
    mine, theirs = got.ids.argsort(1), ids.argsort(1)
    assert torch.equal(got.ids.gather(1, mine), ids.gather(1, theirs))
    wanted = weights.double().gather(1, theirs)
    torch.testing.assert_close(got.weights.double().gather(1, mine), wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (16, 1), (16, 16), (60, 4), (128, 8)])
def test_softmax_topk(experts, top_k, renormalize):
    z = logits(experts=experts)
    got = routers.softmax_topk(z, top_k, renormalize=renormalize)
    same(got, *reference.softmax_topk(z, top_k, renormalize=renormalize))
    assert (got.weights.diff(dim=1) <= 0).all(), "best first"


@pytest.mark.parametrize(("experts", "top_k", "n_group", "topk_group"), [(16, 4, 4, 2), (160, 6, 8, 3), (16, 8, 8, 4)])
def test_softmax_topk_in_the_best_groups(experts, top_k, n_group, topk_group):
    z, options = logits(experts=experts), {"renormalize": False, "n_group": n_group, "topk_group": topk_group}
    got = routers.softmax_topk(z, top_k, **options)
    same(got, *reference.softmax_topk(z, top_k, **options))
    assert not torch.equal(got.ids, routers.softmax_topk(z, top_k, renormalize=False).ids)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (32, 4), (128, 128)])
def test_topk_softmax(experts, top_k):
    z = logits(experts=experts)
    got = routers.topk_softmax(z, top_k)
    same(got, *reference.topk_softmax(z, top_k))
    torch.testing.assert_close(got.weights.sum(1), torch.ones(33))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k", "n_group", "topk_group"),
    [(16, 4, 1, 1), (16, 4, 4, 2), (16, 8, 4, 2), (16, 3, 4, 4), (64, 8, 8, 4), (8, 2, 8, 3)],
)
def test_sigmoid_topk(experts, top_k, n_group, topk_group, renormalize, bias):
    z = logits(experts=experts)
    options = {
        "correction_bias": torch.randn(experts, generator=torch.Generator().manual_seed(1)) if bias else None,
        "n_group": n_group,
        "topk_group": topk_group,
        "renormalize": renormalize,
        "routed_scaling_factor": 2.5,
    }
    same(routers.sigmoid_topk(z, top_k, **options), *reference.sigmoid_topk(z, top_k, **options))


def test_the_bias_chooses_and_does_not_weigh():
    z = torch.tensor([[0.0, 1.0, 2.0]])
    got = routers.sigmoid_topk(z, 1, correction_bias=torch.tensor([5.0, 0.0, 0.0]), renormalize=False)
    assert got.ids.tolist() == [[0]]
    assert got.weights.tolist() == [[0.5]]


def test_groups_are_judged_by_their_two_best():
    z = torch.tensor([[3.0, -9.0, -9.0, 1.0, 1.0, -9.0]])
    assert routers.sigmoid_topk(z, 2, n_group=2, topk_group=1).ids.sort().values.tolist() == [[3, 4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32(dtype):
    z = logits().to(dtype)
    same(routers.softmax_topk(z, 4, renormalize=True), *reference.softmax_topk(z.float(), 4, renormalize=True))
    got = routers.sigmoid_topk(z, 4, correction_bias=torch.zeros(16, dtype=dtype))
    assert got.weights.dtype == torch.float32


def test_scores_that_underflow_give_zero_not_nan():
    z = torch.full((2, 4), -200.0)
    assert routers.sigmoid_topk(z, 2).weights.tolist() == [[0.0, 0.0]] * 2
    assert reference.sigmoid_topk(torch.full((2, 4), -2000.0), 2)[0].tolist() == [[0.0, 0.0]] * 2


def test_no_tokens():
    z = torch.empty(0, 8)
    for got in (
        routers.softmax_topk(z, 2, renormalize=True),
        routers.topk_softmax(z, 2),
        routers.sigmoid_topk(z, 2, n_group=4, topk_group=2),
    ):
        assert got.weights.shape == got.ids.shape == (0, 2)


def test_no_value_is_read_on_the_host():
    """Tensors without values: reading one would raise. What makes a call fit for a CUDA graph."""
    z = torch.empty(5, 8, device="meta")
    bias = torch.empty(8, device="meta")
    for got in (
        routers.softmax_topk(z, 2, renormalize=True),
        routers.topk_softmax(z, 2),
        routers.sigmoid_topk(z, 2, correction_bias=bias, n_group=4, topk_group=2),
    ):
        assert got.weights.is_meta
        assert got.ids.shape == (5, 2)


def test_inputs_are_not_modified():
    z, bias = logits(), torch.randn(16)
    z_before, bias_before = z.clone(), bias.clone()
    routers.sigmoid_topk(z, 4, correction_bias=bias, n_group=4, topk_group=2)
    routers.softmax_topk(z, 4, renormalize=True)
    routers.topk_softmax(z, 4)
    assert torch.equal(z, z_before)
    assert torch.equal(bias, bias_before)


def random_weights(module):
    g = torch.Generator().manual_seed(3)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.copy_(torch.randn(tensor.shape, generator=g) / 8)
    return module.eval()


@torch.no_grad()
def test_mixtral():
    model = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = model.MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    z, weights, ids = random_weights(model.MixtralTopKRouter(config))(torch.randn(2, 9, 32))
    same(routers.softmax_topk(z, 2, renormalize=True), weights, ids)


@torch.no_grad()
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_qwen3_moe(norm_topk_prob):
    model = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = model.Qwen3MoeConfig(
        hidden_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=norm_topk_prob
    )  # fmt: skip
    z, weights, ids = random_weights(model.Qwen3MoeTopKRouter(config))(torch.randn(2, 9, 32))
    same(routers.softmax_topk(z, 4, renormalize=norm_topk_prob), weights, ids)


@torch.no_grad()
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2)])
def test_deepseek_v3(n_group, topk_group, norm_topk_prob):
    model = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = model.DeepseekV3Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=n_group, topk_group=topk_group,
        norm_topk_prob=norm_topk_prob, routed_scaling_factor=2.5,
    )  # fmt: skip
    gate = random_weights(model.DeepseekV3TopkRouter(config))
    assert gate.e_score_correction_bias.abs().max() > 0.05
    z, weights, ids = gate(torch.randn(2, 9, 32))
    got = routers.sigmoid_topk(
        z, 4, correction_bias=gate.e_score_correction_bias, n_group=n_group, topk_group=topk_group,
        renormalize=norm_topk_prob, routed_scaling_factor=2.5,
    )  # fmt: skip
    same(got, weights, ids)


@torch.no_grad()
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method):
    model = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    if not hasattr(model, "DeepseekV2TopkRouter"):
        pytest.skip("named otherwise in this version")
    config = model.DeepseekV2Config(
        hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, topk_method=method, n_group=4, topk_group=2,
        routed_scaling_factor=16.0,
    )  # fmt: skip
    z, weights, ids = random_weights(model.DeepseekV2TopkRouter(config))(torch.randn(2, 9, 32))
    groups = {"n_group": 4, "topk_group": 2} if method != "greedy" else {}
    got = routers.softmax_topk(z, 4, renormalize=False, **groups)
    same(got._replace(weights=16 * got.weights), weights, ids)


@torch.no_grad()
def test_gpt_oss():
    model = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = model.GptOssConfig(hidden_size=32, num_local_experts=16, num_experts_per_tok=4)
    z, weights, ids = random_weights(model.GptOssTopKRouter(config))(torch.randn(18, 32))
    same(routers.topk_softmax(z, 4), weights, ids)


@pytest.mark.parametrize(
    "router",
    [lambda z, k: routers.softmax_topk(z, k, renormalize=True), routers.topk_softmax, routers.sigmoid_topk],
)
@pytest.mark.parametrize(
    ("z", "top_k", "error", "match"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), 2, DTypeError, r"router_logits: got torch.int64; wanted .*floating"),
        ([[0.0]], 1, DTypeError, r"router_logits: got list"),
        (torch.zeros(2, 3, 8), 2, ShapeError, r"got \(2, 3, 8\); wanted \[T, E\]"),
        (torch.zeros(2, 8), 0, OptionError, r"top_k: got 0; wanted an integer from 1 to 8"),
        (torch.zeros(2, 8), 9, OptionError, r"top_k: got 9; wanted an integer from 1 to 8"),
        (torch.zeros(2, 8), True, OptionError, r"top_k: got True"),
        (torch.zeros(2, 8), 2.0, OptionError, r"top_k: got 2.0"),
    ],
)
def test_errors_of_every_router(router, z, top_k, error, match):
    with pytest.raises(error, match=match):
        router(z, top_k)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_group": 3}, OptionError, r"n_group: got 3; wanted a divisor of the 8 experts"),
        ({"n_group": 0}, OptionError, r"n_group: got 0"),
        ({"n_group": 4, "topk_group": 5}, OptionError, r"topk_group: got 5; wanted an integer from 1 to 4"),
        ({"n_group": 8, "topk_group": 2}, OptionError, r"top_k: got 3; wanted at most 2: 2 kept groups of 1"),
        ({"correction_bias": torch.zeros(7)}, ShapeError, r"got \(7,\); wanted \[E\] = \(8,\)"),
        ({"correction_bias": torch.zeros(1, 8)}, ShapeError, r"correction_bias"),
        ({"correction_bias": torch.zeros(8).to_sparse()}, LayoutError, r"got torch.sparse_coo; wanted a dense tensor"),
        ({"correction_bias": torch.zeros(8, dtype=torch.int32)}, DTypeError, r"correction_bias: got torch.int32"),
        ({"routed_scaling_factor": "2"}, OptionError, r"routed_scaling_factor: got '2'; wanted a number"),
        ({"routed_scaling_factor": 2**130}, OptionError, r"routed_scaling_factor: .* that float32 holds"),
        ({"correction_bias": [0.0] * 8}, DTypeError, r"correction_bias: got list"),
        ({"correction_bias": torch.zeros(8, device="meta")}, DeviceError, r"correction_bias: got meta; wanted cpu"),
    ],
)
def test_errors_of_sigmoid_topk(options, error, match):
    with pytest.raises(error, match=match):
        routers.sigmoid_topk(torch.zeros(2, 8), 3, **options)
