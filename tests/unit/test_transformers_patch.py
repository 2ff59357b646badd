"""patch(): experts that the interface of Transformers does not reach, from the checkpoint, from memory, and refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tiny_models import build, experts_of, generate, prompt, relative, run, small_config
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

import fusedmoe
from fusedmoe.checkpoint.convert import quantize_checkpoint
from fusedmoe.errors import CheckpointError, GradientError
from fusedmoe.integrations.transformers import NAME, TransformersExperts, patch
from fusedmoe.quantization import quantize

QWEN, GPT_OSS = "qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"


# --- Llama-4 -----------------------------------------------------------------------------------------------------


def llama4(intermediate_size=24, **more):
    sizes = {"hidden_size": 32, "intermediate_size": intermediate_size, "intermediate_size_mlp": 48, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **sizes, **heads, num_local_experts=4, num_experts_per_tok=2, interleave_moe_layer_step=1, **more
    )
    model = Llama4ForCausalLM(config).eval()
    for layer in model.model.layers:
        for parameter in layer.feed_forward.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def logits(model, **given):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 17).view(2, 7), use_cache=False, **given).logits


def test_llama4():
    model = llama4()
    want, names = logits(model), list(model.state_dict())
    kept = {name: p.data_ptr() for name, p in model.named_parameters()}
    report = patch(model)
    assert list(report.replaced) == [f"model.layers.{i}.feed_forward" for i in range(2)]
    assert not report.refused and not report.kept
    assert list(model.state_dict()) == names and {n: p.data_ptr() for n, p in model.named_parameters()} == kept
    assert relative(logits(model), want) < 2e-6
    again = patch(model)
    assert not again.replaced and set(again.kept.values()) == {"replaced before"}


def test_llama4_multiplies_the_chosen_experts_alone(monkeypatch):
    from fusedmoe.integrations.transformers import patching

    model, seen = llama4(), []
    patch(model)
    real = patching.fused_experts
    monkeypatch.setattr(patching, "fused_experts", lambda *a, **k: seen.append(a[4].shape) or real(*a, **k))
    logits(model)
    assert seen == [(14, 2)] * 2


def test_llama4_gradients_fall_back():
    model = llama4()
    want = torch.autograd.grad(model(input_ids=torch.arange(3, 10)[None]).logits.sum(), model.lm_head.weight)[0]
    patch(model)
    with pytest.warns(UserWarning, match=r"computes no gradients.*Transformers' own"):
        out = model(input_ids=torch.arange(3, 10)[None]).logits
    assert torch.equal(torch.autograd.grad(out.sum(), model.lm_head.weight)[0], want)


def test_llama4_from_a_quantised_checkpoint(tmp_path):
    model = llama4(intermediate_size=64)
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", "int4_w4a16", group=32)
    for i, layer in enumerate(model.model.layers):
        stored = fusedmoe.checkpoint.read_experts(tmp_path / "small", i)
        with torch.no_grad():
            layer.feed_forward.experts.gate_up_proj.copy_(stored.w13.dequantize().transpose(1, 2))
            layer.feed_forward.experts.down_proj.copy_(stored.w2.dequantize().transpose(1, 2))
    want = logits(model)
    for layer in model.model.layers:
        layer.feed_forward.experts.to("meta")
    report = patch(model, tmp_path / "small")
    assert len(report.replaced) == 2 and "int4_w4a16" in str(report)
    assert relative(logits(model), want) < 2e-6
    with pytest.raises(GradientError, match="quantised experts"):
        model(input_ids=torch.arange(3, 10)[None])


def test_llama4_compiled():
    model = llama4()
    patch(model)
    want = logits(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert relative(logits(model), want) < 1e-6


def test_llama4_with_another_activation_is_refused():
    model = llama4(hidden_act="mish")
    report = patch(model)
    assert not report.replaced and len(report.refused) == 2
    assert all(re.fullmatch(r"its activation Mish\w* is not known", why) for why in report.refused.values())


# --- quantised in a checkpoint -----------------------------------------------------------------------------------


def quantised(tmp_path, name, scheme, **options):
    """A checkpoint with quantised experts, and the model with its experts as these numbers say."""
    model = build(name)
    model.save_pretrained(tmp_path / "plain")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "small", scheme, **options)
    for i, layer in enumerate(model.model.layers):
        stored = fusedmoe.checkpoint.read_experts(tmp_path / "small", i)
        first, second = (w.dequantize() for w in (stored.w13, stored.w2))
        swap = layer.mlp.experts.is_transposed
        with torch.no_grad():
            layer.mlp.experts.gate_up_proj.copy_(first.transpose(1, 2) if swap else first)
            layer.mlp.experts.down_proj.copy_(second.transpose(1, 2) if swap else second)
    return model, tmp_path / "small"


@pytest.fixture
def wider(monkeypatch):
    """Sizes that groups of 32 divide."""
    import tiny_models

    monkeypatch.setitem(tiny_models.SIZES, "moe_intermediate_size", 64)
    monkeypatch.setitem(tiny_models.SIZES, "intermediate_size", 64)


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        (QWEN, "int4_w4a16", {"group": 32}),
        (QWEN, "int4_w4a16", {"group": 32, "zero": True}),
        (QWEN, "int8_w8a16", {"group": 32}),
        (QWEN, "fp8_w8a16", {}),
        (GPT_OSS, "mxfp4", {}),
    ],
)
def test_experts_of_a_checkpoint(name, scheme, options, tmp_path, wider):
    model, directory = quantised(tmp_path, name, scheme, **options)
    want = run(model, "eager")
    for experts in experts_of(model, name):
        nn.init.normal_(experts.down_proj)  # what Transformers makes of them does not matter
    report = patch(model, directory)
    assert list(report.replaced) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert not report.kept and not report.refused and scheme in str(report)
    assert all(isinstance(layer.mlp.experts, TransformersExperts) for layer in model.model.layers)
    assert relative(run(model, "eager"), want) < 2e-6
    assert relative(run(model, NAME), want) < 2e-6
    assert set(patch(model, directory).kept.values()) == {"replaced before"}


def test_experts_on_the_meta_device(tmp_path, wider):
    """Nothing is allocated for experts that are read from the checkpoint anyway."""
    model, directory = quantised(tmp_path, QWEN, "int4_w4a16", group=32)
    want = run(model, "eager")
    for experts in experts_of(model, QWEN):
        experts.to("meta")
    assert len(patch(model, directory).replaced) == 2
    assert relative(run(model, "eager"), want) < 2e-6


def test_generates_compiles_and_refuses_gradients(tmp_path, wider):
    model, directory = quantised(tmp_path, QWEN, "int4_w4a16", group=32)
    given = prompt(model)
    want = generate(model, "static")
    patch(model, directory)
    assert torch.equal(generate(model, "static"), want)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(**given).logits, model(**given).logits) < 1e-6
    with pytest.raises(GradientError, match="quantised experts: got hidden states .* require grad; wanted inference"):
        model(**given)


def test_mxfp4_experts_of_transformers(tmp_path, wider):
    """Their weights are in the order of other kernels: they come from the checkpoint, or are refused."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    model, directory = quantised(tmp_path, GPT_OSS, "mxfp4")
    want = run(model, "eager")
    for layer in model.model.layers:
        experts = mxfp4.Mxfp4GptOssExperts(model.config)
        if hasattr(mxfp4, "Mxfp4GptOssMLP"):
            layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, experts)
        else:
            layer.mlp.experts = experts
            layer.mlp.forward = mxfp4.mlp_forward.__get__(layer.mlp)
    report = patch(model)
    assert len(report.refused) == 2 and not report.replaced
    assert all("Pass the directory that the model was loaded from" in why for why in report.refused.values())
    assert len(patch(model, directory).replaced) == 2
    assert relative(run(model, "eager"), want) < 2e-6


def test_plain_experts_are_kept(tmp_path):
    model = build(QWEN)
    report = patch(model)
    assert set(report.kept) == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert "set_experts_implementation" in str(report) and str(report).startswith("replaced: 0\nkept: 2\n")
    model.save_pretrained(tmp_path)
    assert patch(model, tmp_path).kept == report.kept


# --- quantised in memory -----------------------------------------------------------------------------------------


class GptqLinear(nn.Module):
    """The tensors of a GPTQ projection [N, K] of int4 in groups of 32, symmetric."""

    def __init__(self, weight):
        super().__init__()
        made = quantize(weight[None], "int4_w4a16", group=32)
        self.numbers = made.dequantize()[0]
        words = made.data[0].contiguous().view(torch.int32)  # [N, K / 8]
        self.qweight = nn.Buffer(words.T.contiguous())
        self.scales = nn.Buffer(made.scale[0].T.contiguous())
        n, k = weight.shape
        self.qzeros = nn.Buffer(torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32))
        self.g_idx = nn.Buffer((torch.arange(k) // 32).int())


class GptqExperts(nn.ModuleDict):
    """Experts as modules of their own, called as Transformers calls its experts."""

    def __init__(self, experts):
        super().__init__()
        for i, (both, down) in enumerate(zip(experts.gate_up_proj, experts.down_proj, strict=True)):
            gate, up = both.chunk(2)
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": down}
            self[str(i)] = nn.ModuleDict({name: GptqLinear(w.detach()) for name, w in parts.items()})

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("it is replaced")


def test_gptq_in_memory(wider):
    model = build(QWEN)
    for layer in model.model.layers:
        made = GptqExperts(layer.mlp.experts)
        with torch.no_grad():
            for i, expert in enumerate(made.values()):
                both = torch.cat([expert["gate_proj"].numbers, expert["up_proj"].numbers])
                layer.mlp.experts.gate_up_proj[i], layer.mlp.experts.down_proj[i] = both, expert["down_proj"].numbers
        layer.mlp.made = made
    want = run(model, "eager")
    for layer in model.model.layers:
        layer.mlp.experts = layer.mlp.__dict__["_modules"].pop("made")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    report = patch(model)
    assert len(report.replaced) == 2 and "from memory" in str(report), str(report)
    with torch.no_grad():
        assert relative(model(**prompt(model)).logits, want) < 2e-6


# --- refused -----------------------------------------------------------------------------------------------------


def test_another_call_is_refused():
    model = build(QWEN)
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    report = patch(model)
    (why,) = report.refused.values()
    assert "forward of ModuleList: got arguments of no forward; wanted hidden_states, top_k_index, top_k_weights" in why
    assert len(report.kept) == 1


def test_another_checkpoint_is_refused(tmp_path, wider, monkeypatch):
    import tiny_models

    _, directory = quantised(tmp_path, QWEN, "int4_w4a16", group=32)
    monkeypatch.setitem(tiny_models.SIZES, "moe_intermediate_size", 32)
    report = patch(build(QWEN), directory)
    assert not report.replaced and len(report.refused) == 2
    assert all("of the checkpoint: got (4, 128, 32); wanted (4, 64, 32)" in why for why in report.refused.values())


def test_a_gate_that_is_not_the_configurations_is_refused(tmp_path, wider):
    model, directory = quantised(tmp_path, QWEN, "int4_w4a16", group=32)
    model.model.layers[0].mlp.experts.act_fn = nn.GELU()
    model.model.layers[1].mlp.experts.act_fn = nn.Mish()
    first, second = patch(model, directory).refused.values()
    assert "what the experts compute: got" in first and "a gate or a norm that is not fused" in second


def test_broken_configuration_is_refused_by_name(tmp_path, wider):
    model, directory = quantised(tmp_path, QWEN, "int4_w4a16", group=32)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "of tomorrow"
    (directory / "config.json").write_text(json.dumps(config))
    report = patch(model, directory)
    assert len(report.refused) == 2 and all("of tomorrow" in why for why in report.refused.values())


def test_a_directory_that_is_none_raises(tmp_path):
    with pytest.raises(CheckpointError, match="which is no directory"):
        patch(build(QWEN), tmp_path / "nowhere")


def test_experts_outside_of_layers_are_refused(tmp_path, wider):
    _, directory = quantised(tmp_path, QWEN, "int4_w4a16", group=32)
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    holder = nn.Module()
    holder.experts = MixtralExperts(small_config())
    assert "no number of a layer" in patch(holder, directory).refused["experts"]
