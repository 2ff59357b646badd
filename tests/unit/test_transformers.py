"""fusedmoe inside Transformers: weights as they are, gradients, compilation, generation, adapters, registration."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tiny_models import (
    build,
    cache_argument,
    draw,
    experts_class,
    experts_of,
    generate,
    prompt,
    relative,
    routing,
    run,
    small_config,
)
from torch import nn
from transformers import activations

from fusedmoe.integrations.transformers import NAME, experts_forward, interface


@pytest.mark.parametrize("name", ["gpt_oss.GptOssExperts", "mixtral.MixtralExperts", "nemotron_h.NemotronHExperts"])
def test_weights_are_the_modules_own(name, calls):
    model = build(name)
    run(model, NAME)
    _, arguments, options = calls[0]
    parameters = {p.data_ptr() for p in experts_of(model, name)[0].parameters()}
    given = [*arguments[1:3], options["w13_bias"], options["w2_bias"]]
    assert {t.data_ptr() for t in given if t is not None} == parameters
    assert not any(key.startswith("_fused") for module in model.modules() for key in vars(module)), "nothing is kept"


def test_changed_weights_are_seen():
    model = build("qwen3_moe.Qwen3MoeExperts")
    run(model, NAME)
    for experts in experts_of(model, "qwen3_moe.Qwen3MoeExperts"):
        experts.down_proj.data = experts.down_proj.data * 2
        experts.gate_up_proj.data.neg_()
    assert relative(run(model, NAME), run(model, "eager")) < 2e-6


def test_sizes_are_the_weights(calls):
    """Two ranks of tensor parallelism hold half of the rows of gate and of up, while the module says the whole size."""
    whole = experts_class("mixtral.MixtralExperts")(small_config())
    draw(whole)
    x, (weights, ids) = torch.randn(5, 32), routing(5, 2, 4)
    total = torch.zeros(5, 32)
    with torch.no_grad():
        want = whole(x, ids, weights)
        for rank in range(2):
            part = copy.deepcopy(whole)
            rows, columns = slice(rank * 12, rank * 12 + 12), slice(24 + rank * 12, 36 + rank * 12)
            packed = torch.cat([whole.gate_up_proj[:, rows], whole.gate_up_proj[:, columns]], 1)
            part.gate_up_proj, part.down_proj = nn.Parameter(packed), nn.Parameter(whole.down_proj[:, :, rows])
            total += part(x, ids, weights)
    torch.testing.assert_close(total, want, atol=1e-5, rtol=1e-5)


def test_autocast_widens_hidden_states_alone():
    experts = experts_class("mixtral.MixtralExperts")(small_config()).bfloat16()
    draw(experts)
    x, (weights, ids) = torch.randn(5, 32), routing(5, 2, 4)
    with torch.no_grad():
        out = experts(x, ids, weights)
        assert out.dtype == torch.float32
        assert torch.equal(out, experts(x.bfloat16(), ids, weights).float())


@pytest.mark.parametrize("needs", ["weights", "hidden", "router"])
def test_gradients_fall_back_with_one_warning(needs, calls):
    experts = experts_class("mixtral.MixtralExperts")(small_config())
    draw(experts)
    experts.requires_grad_(needs == "weights")
    x, (weights, ids) = torch.randn(5, 32), routing(5, 2, 4)
    x.requires_grad_(needs == "hidden")
    weights.requires_grad_(needs == "router")
    tensors = {"weights": [experts.gate_up_proj, experts.down_proj], "hidden": [x], "router": [weights]}[needs]
    with pytest.warns(UserWarning, match=r"computes no gradients.*no_grad.*grouped_mm|grouped_mm.*no_grad"):
        out = experts(x, ids, weights)
    got = torch.autograd.grad(out.square().sum(), tensors)
    experts.config._experts_implementation = "eager"
    want = torch.autograd.grad(experts(x, ids, weights).square().sum(), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert not calls


def test_a_parameter_of_the_activation_gets_its_gradient():
    """Nothing else requires one, so that only the parameters of the module tell."""
    experts = experts_class("mixtral.MixtralExperts")(small_config()).requires_grad_(requires_grad=False)
    draw(experts)
    experts.act_fn = nn.PReLU()
    x, (weights, ids) = torch.randn(5, 32), routing(5, 2, 4)
    with pytest.warns(UserWarning, match="computes no gradients"):
        out = experts(x, ids, weights)
    assert torch.autograd.grad(out.sum(), experts.act_fn.weight)[0].abs() > 0


def test_the_warning_comes_once_and_only_with_gradients():
    model = build("qwen3_moe.Qwen3MoeExperts")
    model.set_experts_implementation(NAME)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        with torch.no_grad():
            model(**prompt(model))
        assert not [w for w in seen if "fusedmoe" in str(w.message)]
        interface.__dict__.pop("__warningregistry__", None)
        model(**prompt(model))
        model(**prompt(model))
    assert len([w for w in seen if "fusedmoe" in str(w.message)]) == 1


COMPILED = ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts", "nemotron_h.NemotronHExperts"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_experts(name):
    model = build(name)
    experts = experts_of(model, name)[0]
    experts.config._experts_implementation = NAME
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for tokens in (5, 9, 1):
            x, (weights, ids) = torch.randn(tokens, 32), routing(tokens, 2, 4)
            torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights), atol=1e-6, rtol=1e-6)


def test_compiled_between_two_products():
    experts = experts_class("mixtral.MixtralExperts")(small_config())
    draw(experts)
    experts.act_fn = activations.ACT2FN["mish"]
    torch._dynamo.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, (weights, ids) = torch.randn(5, 32), routing(5, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, ids, weights), experts(x, ids, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo remarks on what grouped_mm does
def test_compiled_with_gradients():
    experts = experts_class("mixtral.MixtralExperts")(small_config()).bfloat16()  # the only type grouped_mm compiles in
    draw(experts)
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="aot_eager")  # grouped_mm of older versions breaks the graph
    x, (weights, ids) = torch.randn(5, 32).bfloat16(), routing(5, 2, 4)
    (got,) = torch.autograd.grad(compiled(x, ids, weights).sum(), experts.down_proj)
    experts.config._experts_implementation = "eager"
    (want,) = torch.autograd.grad(experts(x, ids, weights).sum(), experts.down_proj)
    assert relative(got, want) < 2e-2


def test_generate_with_a_static_cache():
    model = build("qwen3_moe.Qwen3MoeExperts")
    tokens = {}
    for implementation in ("eager", NAME):
        model.set_experts_implementation(implementation)
        for cache in ("dynamic", "static"):
            tokens[implementation, cache] = generate(model, cache)
        assert model.config._experts_implementation == implementation, "generate() leaves the name alone"
    first, *others = tokens.values()
    assert first.shape == (2, 13) and all(torch.equal(first, other) for other in others)


def test_compiled_model_with_a_static_cache():
    from transformers import StaticCache

    model = build("qwen3_moe.Qwen3MoeExperts")
    model.config.use_cache = True
    logits = {}
    torch._dynamo.reset()
    for implementation in ("eager", NAME):
        model.set_experts_implementation(implementation)
        forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if implementation == NAME else model
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            for step in (prompt(model)["input_ids"], torch.tensor([[5], [6]])):
                logits[implementation] = forward(input_ids=step, **{cache_argument(model): cache}).logits
    assert relative(logits[NAME], logits["eager"]) < 2e-6


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_of_peft(calls):
    peft = pytest.importorskip("peft")
    model = build("mixtral.MixtralExperts")
    plain = run(model, NAME)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=4, target_parameters=names, target_modules=[], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    calls.clear()
    want = run(adapted.base_model.model, "eager")
    assert not calls
    got = run(adapted.base_model.model, NAME)
    assert calls and relative(got, want) < 1e-5
    assert relative(got, plain) > 1e-3, "the adapter matters"
    with adapted.disable_adapter():
        assert relative(run(adapted.base_model.model, NAME), plain) < 1e-6


def test_from_pretrained(tmp_path, calls):
    from transformers import AutoModelForCausalLM

    model = build("qwen3_moe.Qwen3MoeExperts")
    want = run(model, "eager")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=NAME)
    with torch.no_grad():
        got = loaded(**prompt(model))[0]
    assert calls and relative(got, want) < 2e-6


def test_registered_in_both_tables():
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    assert ALL_EXPERTS_FUNCTIONS[NAME] is experts_forward
    assert ALL_FP8_EXPERTS_FUNCTIONS[NAME] is interface.fp8_experts_forward


@pytest.mark.parametrize("found", ["5.6.2", "4.57.0", "none"])
def test_an_older_transformers_is_refused(found, monkeypatch):
    import importlib
    import importlib.metadata

    import fusedmoe.integrations.transformers as integration

    def version(_):
        if found == "none":
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=rf"transformers: got version {found}; wanted 5.7 or newer"):
        importlib.reload(integration)
