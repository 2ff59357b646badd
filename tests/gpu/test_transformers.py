"""Models of Transformers on a GPU in bfloat16: logits, generation with a static cache, compilation, CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers", minversion="5.7")

from tiny_models import build, experts_classes, experts_of, fp8_experts, generate, prompt, relative

from fusedmoe.integrations.transformers import NAME, interface

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

MODELS = [
    "mixtral.MixtralExperts",
    "qwen3_moe.Qwen3MoeExperts",
    "gpt_oss.GptOssExperts",
    "nemotron_h.NemotronHExperts",
    "deepseek_v3.DeepseekV3Experts",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",
]


def on_gpu(name):
    return build(name).to("cuda", torch.bfloat16)


def given(model, tokens=7):
    return {
        key: value.cuda().to(model.dtype if value.is_floating_point() else value.dtype)
        for key, value in prompt(model, tokens).items()
    }


def draw_routing(tokens, n_experts):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, n_experts, generator=g).topk(2).indices
    return torch.rand(tokens, 2, generator=g).cuda(), ids.cuda()


@pytest.mark.parametrize("name", experts_classes())
@pytest.mark.parametrize("tokens", [1, 300])
def test_experts(name, tokens):
    """The experts alone, for a router chooses otherwise when its input is rounded otherwise; the oracle is float64."""
    experts = experts_of(build(name), name)[0].to("cuda", torch.bfloat16)
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    x = torch.randn(tokens, first.shape[1 if experts.is_transposed else 2], device="cuda", dtype=torch.bfloat16)
    weights, ids = draw_routing(tokens, first.shape[0])
    with torch.no_grad():
        experts.config._experts_implementation = "eager"
        here = weights.double()
        here[0, 0] = 0
        want = copy.deepcopy(experts).double()(x.double(), ids, here)
        experts.config._experts_implementation = NAME
        ids[0, 0], weights[0, 0] = first.shape[0] + 1, torch.nan  # an expert of another rank
        assert relative(experts(x, ids, weights), want) < 8e-3


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    model = on_gpu(name)
    logits = {}
    for implementation in ("eager", NAME, "grouped_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            logits[implementation] = model(**given(model))[0]
    want = logits.pop("eager").float()
    # By token and in the middle: where two experts are as good as each other, rounding decides for the router.
    off = {name: ((got.float() - want).norm(dim=-1) / want.norm(dim=-1)).median() for name, got in logits.items()}
    assert off[NAME] < max(2 * off["grouped_mm"], 2e-2)


@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_compiled(name):
    model = on_gpu(name)
    model.set_experts_implementation(NAME)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for tokens in (7, 7, 7):
            arguments = given(model, tokens)
            assert relative(compiled(**arguments)[0].clone(), model(**arguments)[0]) < 2e-2


@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_generate_with_a_static_cache(name):
    """generate() compiles a decode step with a static cache by itself."""
    model = on_gpu(name).float()
    torch._dynamo.reset()
    tokens = {}
    for cache in ("dynamic", "static"):
        for implementation in ("eager", NAME):
            model.set_experts_implementation(implementation)
            if implementation == "eager" and cache == "static":
                continue  # its loop over experts cannot be captured
            tokens[implementation, cache] = generate(model, cache)
    first, *others = tokens.values()
    assert all(torch.equal(first, other) for other in others)


def test_captured_in_a_cuda_graph():
    """Replays follow other ids, and allocate nothing."""
    name = "qwen3_moe.Qwen3MoeExperts"
    experts = experts_of(on_gpu(name), name)[0]
    experts.config._experts_implementation = NAME
    x = torch.randn(4, 32, device="cuda", dtype=torch.bfloat16)
    weights, ids = draw_routing(4, 4)
    with torch.no_grad():
        experts(x, ids, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts(x, ids, weights)
        ids.copy_(ids.flip(0))
        graph.replay()
        assert torch.equal(out, experts(x, ids, weights))


@pytest.mark.parametrize("tokens", [3, 400])
def test_between_two_products(tokens, monkeypatch):
    name = "mixtral.MixtralExperts"
    experts = experts_of(on_gpu(name), name)[0]
    experts.config._experts_implementation = NAME
    x = torch.randn(tokens, 32, device="cuda", dtype=torch.bfloat16)
    weights, ids = draw_routing(tokens, 4)
    with torch.no_grad():
        want = experts(x, ids, weights)
        monkeypatch.setattr(interface, "gate_of", lambda experts: None)
        assert relative(experts(x, ids, weights), want) < 1e-2


def test_no_weight_is_copied():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    config = MixtralConfig(hidden_size=1024, intermediate_size=1024, num_local_experts=16)
    config._experts_implementation = NAME
    with torch.device("cuda"):
        experts = MixtralExperts(config).bfloat16()
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=0.03)
    x = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    weights, ids = draw_routing(8, 16)
    with torch.no_grad():
        experts(x, ids, weights)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        experts(x, ids, weights)
    assert torch.cuda.max_memory_allocated() - before < experts.down_proj[0].nbytes


@pytest.mark.parametrize("tokens", [1, 40, 2000])
@pytest.mark.parametrize(
    "options", [{"block_size": (128, 128)}, {"block_size": None}, {"block_size": None, "activation_scheme": "static"}]
)
def test_fp8_experts(options, tokens):
    """The same as on the CPU, where the result is held against float64."""
    experts, _ = fp8_experts(hidden=512, inner=384, **options)
    if "activation_scheme" in options:
        torch.nn.init.constant_(experts.gate_up_proj_activation_scale, 0.01)
        torch.nn.init.constant_(experts.down_proj_activation_scale, 0.3)
    x = torch.randn(tokens, 512).bfloat16()
    weights, ids = draw_routing(tokens, 4)
    with torch.no_grad():
        want = experts(x.float(), ids.cpu(), weights.cpu())
        got = experts.cuda()(x.cuda(), ids, weights)
    # The intermediate may be rounded to bfloat16 before its codes: those that lie half-way go the other way.
    assert relative(got.cpu(), want) < 3e-2
