"""Reading checkpoints: those that Transformers writes against its own modules, then everything that can be wrong."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import save_file

from fusedmoe.checkpoint import read_embedding, read_experts, read_router
from fusedmoe.errors import CheckpointError, DTypeError, MissingDependencyError, ShapeError
from fusedmoe.nn import FusedExperts
from fusedmoe.spec.activation import Activation

E, H, I, TOP_K, V = 4, 32, 24, 2, 48
LAYER = 1
COMMON = {
    "vocab_size": V,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": TOP_K,
    "experts_implementation": "eager",
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MOE = {"intermediate_size": 40, "moe_intermediate_size": I}
# model type -> configuration: one of each naming and of each way to route.
MODELS = {
    "mixtral": {"intermediate_size": I, "num_local_experts": E},
    "qwen3_moe": {**MOE, "num_experts": E, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": I, "num_experts": E, "norm_topk_prob": False},
    "deepseek_v3": {**MOE, **LATENT, "n_routed_experts": E, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe": {**MOE, "n_routed_experts": E, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    "gpt_oss": {"intermediate_size": I, "num_local_experts": E},
    "granitemoe": {"intermediate_size": I, "num_local_experts": E, "hidden_act": "gelu_pytorch_tanh"},
}


def build(model_type: str, **changes):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {**COMMON, **MODELS[model_type], **changes}
    config = transformers.AutoConfig.for_model(model_type, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # Initial values are small, and routers and correction biases zero: random ones tell tensors apart.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "layers." in name and tensor.is_floating_point():
            tensor.data.normal_(std=0.5)
    return model


def mixture(model, layer: int = LAYER):
    block = model.model.layers[layer]
    return block.mlp if hasattr(block, "mlp") else block.block_sparse_moe


def own_experts(model, hidden: torch.Tensor) -> torch.Tensor:
    """Router and routed experts as the model computes them, without shared experts."""
    block = mixture(model)
    _, weights, ids = (block.gate if hasattr(block, "gate") else block.router)(hidden)
    return block.experts(hidden, ids, weights)


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_transformers_checkpoint(model_type, tmp_path):
    model = build(model_type)
    model.save_pretrained(tmp_path)
    stored = read_experts(tmp_path, LAYER)
    own = mixture(model).experts
    assert torch.equal(stored.w13, own.gate_up_proj)
    assert torch.equal(stored.w2, own.down_proj)
    if model_type == "gpt_oss":
        assert torch.equal(stored.w13_bias, own.gate_up_proj_bias)
        assert torch.equal(stored.w2_bias, own.down_proj_bias)
        assert (stored.gate_up_layout, stored.weight_layout) == ("interleaved", "KN")
        assert stored.activation == Activation("swigluoai", limit=7.0, alpha=1.702)
    else:
        assert stored.w13_bias is None and stored.w2_bias is None
        assert (stored.gate_up_layout, stored.weight_layout) == ("concatenated", "NK")
        assert stored.activation == Activation("gelu_tanh" if model_type == "granitemoe" else "silu")
    assert stored.top_k == TOP_K and stored.apply_router_weight_on_input is False

    hidden = torch.randn(3, 17, H, generator=torch.Generator().manual_seed(1))
    layer, router = FusedExperts.from_checkpoint(tmp_path, LAYER), read_router(tmp_path, LAYER)
    assert stored.router.kind == router.kind and stored.router.top_k == router.top_k == TOP_K
    got, wanted = layer(hidden, *router(hidden)).reshape(-1, H), own_experts(model, hidden.reshape(-1, H))
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5
    assert torch.equal(read_embedding(tmp_path), model.get_input_embeddings().weight)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_router_chooses_as_the_model_in_bfloat16(model_type, tmp_path):
    model = build(model_type).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    hidden = torch.randn(200, H, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    block = mixture(model)
    _, weights, ids = (block.gate if hasattr(block, "gate") else block.router)(hidden)
    router = read_router(tmp_path, LAYER)
    assert router.weight.dtype == (torch.float32 if model_type == "deepseek_v3" else torch.bfloat16)
    choice = router(hidden)
    # By expert, as the order within a token is not defined. Ties of bfloat16 logits may fall either way.
    got, wanted = (
        torch.zeros(200, E).scatter_(1, i, w.float()) for i, w in ((choice.ids, choice.weights), (ids, weights))
    )
    same = ((got > 0) == (wanted > 0)).all(dim=1)
    assert same.float().mean() > 0.97
    torch.testing.assert_close(got[same], wanted[same], rtol=1e-2, atol=1e-3)


def test_only_the_files_of_the_layer_are_opened(tmp_path):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weight_map.items() if f"layers.{LAYER}.mlp" in name}
    others = set(weight_map.values()) - needed
    assert len(needed) > 1 and others
    for number, file in enumerate(sorted(others)):
        path = tmp_path / file
        path.unlink() if number % 2 else path.write_bytes(b"not a tensor file")
    assert torch.equal(read_experts(tmp_path, LAYER).w13, mixture(model).experts.gate_up_proj)
    assert torch.equal(read_router(tmp_path, LAYER).weight, mixture(model).gate.weight)
    with pytest.raises(CheckpointError, match="cannot read .*wanted an intact safetensors file"):
        read_experts(tmp_path, 0)


def test_links_of_a_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0a1b"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    tensors = separate()
    write(snapshot, tensors, {}, file="a.safetensors", index=dict.fromkeys(tensors, "a.safetensors"))
    (snapshot / "a.safetensors").rename(blobs / "0123")
    (snapshot / "a.safetensors").symlink_to("../../blobs/0123")
    assert read_experts(snapshot, LAYER).w2.shape == (E, H, I)


def test_result_outlives_the_file(tmp_path):
    tensors = fused()
    write(tmp_path, tensors)
    stored = read_experts(tmp_path, LAYER)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    assert torch.equal(stored.w13, tensors[f"model.layers.{LAYER}.mlp.experts.gate_up_proj"])


def test_progress(tmp_path, capsys, monkeypatch):
    write(tmp_path, fused())
    read_experts(tmp_path, LAYER)
    read_experts(tmp_path, LAYER, progress=False)
    assert capsys.readouterr().err == ""
    read_experts(tmp_path, LAYER, progress=True)
    assert "layer 1" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    read_experts(tmp_path, LAYER, progress=True)
    assert f"layer 1 {2 * E}/{2 * E}" in capsys.readouterr().err


def test_type_and_device(tmp_path):
    write(tmp_path, fused())
    stored = read_experts(tmp_path, LAYER, dtype=torch.bfloat16, device="cpu")
    assert stored.w13.dtype == stored.w2.dtype == torch.bfloat16
    assert torch.equal(stored.w2, read_experts(tmp_path, LAYER).w2.to(torch.bfloat16))
    layer = FusedExperts.from_checkpoint(tmp_path, LAYER, dtype=torch.float64)
    assert layer.w13.dtype == torch.float64 and not layer.w13.requires_grad
    with pytest.raises(DTypeError, match=r"got torch.int8; wanted torch.float32"):
        read_experts(tmp_path, LAYER, dtype=torch.int8)


# ----------------------------------------------------------------------- checkpoints written tensor by tensor


def separate(
    names=("gate_proj", "up_proj", "down_proj"), prefix=f"model.layers.{LAYER}.mlp.", experts=E
) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shape = {name: (H, I) if name in ("w2", "down_proj") else (I, H) for name in names}
    return {f"{prefix}experts.{e}.{name}.weight": torch.randn(shape[name]) for e in range(experts) for name in names}


def fused(prefix=f"model.layers.{LAYER}.mlp.", w13=(E, 2 * I, H), w2=(E, H, I)) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"{prefix}experts.gate_up_proj": torch.randn(w13), f"{prefix}experts.down_proj": torch.randn(w2)}


def write(directory: Path, tensors, config=None, *, file="model.safetensors", index=None) -> None:
    base = {"model_type": "qwen3_moe", "hidden_size": H, "hidden_act": "silu", "num_experts_per_tok": TOP_K}
    (directory / "config.json").write_text(json.dumps({**base, **(config or {})}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file)
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


PREFIXES = ("model.", "model.language_model.", "language_model.model.", "transformer.", "")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix(prefix, tmp_path):
    tensors = separate(prefix=f"{prefix}layers.{LAYER}.ffn.")
    # What lies around the experts must neither be read nor confuse.
    tensors[f"{prefix}layers.{LAYER}.ffn.shared_experts.up_proj.weight"] = torch.randn(3)
    tensors[f"vision_model.layers.{LAYER}.mlp.fc1.weight"] = torch.randn(3)
    tensors[f"mtp.layers.{LAYER}.mlp.experts.0.up_proj.weight"] = torch.randn(3)
    write(tmp_path, tensors)
    stored = read_experts(tmp_path, LAYER)
    for e in range(E):
        gate, up, down = (
            tensors[f"{prefix}layers.{LAYER}.ffn.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        assert torch.equal(stored.w13[e], torch.cat([gate, up])) and torch.equal(stored.w2[e], down)


def test_not_gated(tmp_path):
    tensors = separate(("up_proj", "down_proj"), prefix=f"backbone.layers.{LAYER}.mixer.")
    write(tmp_path, tensors, {"model_type": "nemotron_h", "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"})
    stored = read_experts(tmp_path, LAYER)
    assert stored.activation == Activation("relu2_no_mul")
    assert torch.equal(stored.w13[2], tensors[f"backbone.layers.{LAYER}.mixer.experts.2.up_proj.weight"])
    assert stored.w13.shape == (E, I, H)


@pytest.mark.parametrize("intermediate", [H // 2, H, 2 * H, I])
@pytest.mark.parametrize("layout", ["NK", "KN"])
def test_orientation_of_fused_tensors_needs_no_hint(layout, intermediate, tmp_path):
    shapes = [(E, 2 * intermediate, H), (E, H, intermediate)]
    tensors = fused(f"language_model.model.layers.{LAYER}.feed_forward.", *shapes)
    if layout == "KN":
        tensors = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items()}
    write(tmp_path, tensors, {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}})
    stored = read_experts(tmp_path, LAYER)
    assert stored.weight_layout == layout and stored.apply_router_weight_on_input
    assert torch.equal(stored.w13, next(iter(tensors.values())))
    layer = FusedExperts.from_checkpoint(tmp_path, LAYER)
    assert (layer.num_experts, layer.hidden_size, layer.intermediate_size) == (E, H, intermediate)


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"hidden_act": "swish"}, Activation("silu")),
        ({"hidden_act": "gelu"}, Activation("gelu")),
        ({"hidden_activation": "gelu_pytorch_tanh"}, Activation("gelu_tanh")),
        ({"text_config": {"hidden_act": "gelu_new"}}, Activation("gelu_tanh")),
        ({"swiglu_limit": 10.0}, Activation("silu", limit=10.0)),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0, "swiglu_alpha": 1.5}, Activation("swigluoai", 1.5, limit=5.0)),
        ({"model_type": "gpt_oss"}, Activation("swigluoai")),
        ({"model_type": "gpt_oss_puzzle", "hidden_act": "silu", "swiglu_limit": 7.0}, Activation("swigluoai")),
        ({"model_type": "lfm2_moe", "hidden_act": None}, Activation("silu")),
        ({"hidden_act": "swigluoai"}, Activation("swigluoai")),
    ],
    ids=str,
)
def test_activation(config, wanted, tmp_path):
    write(tmp_path, separate(), config)
    assert read_experts(tmp_path, LAYER).activation == wanted


def test_unknown_router_leaves_the_experts_usable(tmp_path):
    write(tmp_path, separate(), {"model_type": "gemma4"})
    assert read_experts(tmp_path, LAYER).router is None
    with pytest.raises(CheckpointError, match="router: got model type 'gemma4'; wanted one of .*mixtral"):
        read_router(tmp_path, LAYER)


def test_routing_named_as_in_deepseek_v3(tmp_path):
    write(
        tmp_path,
        {
            **separate(),
            f"model.layers.{LAYER}.mlp.gate.weight": torch.randn(E, H).to(torch.bfloat16),
            f"model.layers.{LAYER}.mlp.gate.e_score_correction_bias": torch.randn(E),
        },
        {
            "model_type": "derived",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    )
    router = read_router(tmp_path, LAYER)
    assert (router.kind, router.n_group, router.topk_group, router.routed_scaling_factor) == ("sigmoid", 2, 1, 2.5)
    assert router.weight.dtype == torch.float32 and router.correction_bias.shape == (E,)
    with pytest.raises(ShapeError, match=r"hidden_states of the router: got \(3, 31\); wanted \(\.\.\., 32\)"):
        router(torch.randn(3, 31))


# ------------------------------------------------------------------------------------------------- refusals


def fails(directory, match, layer=LAYER, read=read_experts):
    with pytest.raises(CheckpointError, match=match) as caught:
        read(directory, layer)
    assert ": got " in str(caught.value) and "; wanted " in str(caught.value)


def test_layer_must_exist_and_have_experts(tmp_path):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(I, H)}
    for layer in (1, 2, 3, 7):
        tensors.update(separate(prefix=f"model.layers.{layer}.mlp."))
    write(tmp_path, tensors)
    fails(tmp_path, r"layer 0 .* got a layer without routed experts; wanted one of the layers with experts: 1-3, 7", 0)
    fails(tmp_path, r"layer 99 .* got no such layer; wanted one of the layers with experts: 1-3, 7", 99)
    fails(tmp_path, "layer -1 .* got no such layer", -1)
    fails(tmp_path, "layer 99 .* got no such layer", 99, read_router)


def test_no_layer_with_experts(tmp_path):
    write(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.randn(I, H)})
    fails(tmp_path, "No layer here has experts under a known name", 0)


def test_two_models_in_one_checkpoint(tmp_path):
    both = {**separate(prefix="talker.layers.1.mlp."), **separate(prefix="thinker.layers.1.mlp.")}
    write(tmp_path, both)
    fails(tmp_path, r"is not unique: got talker.layers.1.mlp., thinker.layers.1.mlp.")


def test_no_directory(tmp_path):
    fails(tmp_path / "org" / "model", "which is no directory.*not its name on a hub")


@pytest.mark.parametrize("text", [None, "{", "[1]", "\xff\xfe", "[" * 100_000])
def test_broken_config(text, tmp_path):
    write(tmp_path, separate())
    path = tmp_path / "config.json"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    fails(tmp_path, "config.json: got .*wanted a JSON object")


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (tmp_path / "config.json").write_text("{}")
    fails(tmp_path, "got no weights; wanted model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    fails(tmp_path, "got pytorch_model.bin; .*convert them to safetensors")


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x.bin",
        "..",
    ],
)
def test_index_must_stay_in_its_directory(file, tmp_path):
    (tmp_path / "inner").mkdir()
    tensors = separate()
    save_file(tensors, tmp_path / "x.safetensors")
    write(tmp_path / "inner", tensors, file="a.safetensors", index=dict.fromkeys(tensors, file))
    fails(tmp_path / "inner", "names a file outside of the directory, or of another kind: got '")


def test_links_lead_nowhere_else(tmp_path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model", separate())
    outside = tmp_path / "model.safetensors"
    (tmp_path / "model" / "model.safetensors").rename(outside)
    (tmp_path / "model" / "model.safetensors").symlink_to(outside)
    fails(tmp_path / "model", "leads out of the directory: got a link to .*; wanted a file that lies in it")


def test_what_is_no_regular_file_is_not_read(tmp_path):
    write(tmp_path, separate())
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    fails(tmp_path, "cannot read .*config.json: got no regular file")


@pytest.mark.parametrize("index", [[], {"a": 1}, None])
def test_broken_index(index, tmp_path):
    write(tmp_path, separate(), file="a.safetensors", index=[])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    fails(tmp_path, "weight_map of .*index.json: got ")


def test_index_that_promises_too_much(tmp_path):
    tensors = separate()
    names = dict.fromkeys(tensors, "a.safetensors")
    last = list(tensors)[-1]
    write(tmp_path, {name: tensors[name] for name in list(tensors)[:-1]}, file="a.safetensors", index=names)
    fails(tmp_path, f"a.safetensors: got .*{last}")
    write(tmp_path, tensors, file="a.safetensors", index={**names, last: "gone.safetensors"})
    fails(tmp_path, "cannot read .*gone.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(keep, tmp_path):
    write(tmp_path, separate())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    fails(tmp_path, "cannot read .*model.safetensors: got .*wanted an intact safetensors file")


def test_missing_experts(tmp_path):
    tensors = {name: tensor for name, tensor in separate().items() if ".experts.2." not in name}
    write(tmp_path, tensors)
    fails(tmp_path, "got none with number 2; wanted 0-3")
    write(tmp_path, separate(), {"num_experts": 6})
    fails(tmp_path, "got none with number 4, 5; wanted 0-5")
    write(tmp_path, separate(), {"n_routed_experts": 3})
    fails(tmp_path, "got 4; wanted 3, as config.json says")
    for number in (3, 5):
        write(tmp_path, fused(), {"num_experts": number})
        fails(tmp_path, f"got 4; wanted {number}, as config.json says")


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_missing_matrix(part, tmp_path):
    tensors = separate()
    del tensors[f"model.layers.1.mlp.experts.3.{part}.weight"]
    write(tmp_path, tensors)
    fails(tmp_path, f"got no model.layers.1.mlp.experts.3.{part}.weight")


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:-1],
        lambda t: t.T.contiguous(),
        lambda t: t.half(),
        lambda t: t.int(),
        lambda t: t[None],
        lambda t: t[..., None].contiguous(),
        lambda t: torch.stack([t] * 16, -1),
    ],
    ids=["smaller", "transposed", "half", "int", "3-D", "3-D, last", "trailing"],
)
def test_inconsistent_experts(part, change, tmp_path):
    tensors = separate()
    name = f"model.layers.1.mlp.experts.2.{part}.weight"
    write(tmp_path, {**tensors, name: change(tensors[name])})
    fails(tmp_path, f"shape or type of {name}: got .* of .*; wanted what fits model.layers.1.mlp.experts.0.gate_proj")


@pytest.mark.parametrize(
    ("w13", "w2"),
    [((E, 2 * I, H), (E, I, H)), ((E, 2 * I, H), (E + 1, H, I)), ((E, I), (E, H, I)), ((0, 2, 1), (0, 1, 1))],
)
def test_inconsistent_fused(w13, w2, tmp_path):
    write(tmp_path, fused(w13=w13, w2=w2))
    fails(tmp_path, "shape or type of model.layers.1.mlp.experts.down_proj: got .*wanted what fits .*gate_up_proj")


def test_fused_with_parts_that_do_not_fit(tmp_path):
    bias = {"model.layers.1.mlp.experts.gate_up_proj_bias": torch.randn(E, I)}
    write(tmp_path, {**fused(), **bias})
    fails(tmp_path, "shape or type of .*gate_up_proj_bias")
    first = dict(list(fused().items())[:1])
    write(tmp_path, first)
    fails(tmp_path, "got no model.layers.1.mlp.experts.down_proj")


@pytest.mark.parametrize("extra", ["0.gate_proj.g_idx", "0.w1.weight", "norm.weight", "down_proj_bias"])
def test_tensors_that_are_not_understood_are_not_ignored(extra, tmp_path):
    write(tmp_path, {**separate(), f"model.layers.1.mlp.experts.{extra}": torch.randn(I)})
    fails(tmp_path, f"tensors beside the experts of .*got model.layers.1.mlp.experts.{extra}")


def test_unknown_naming(tmp_path):
    write(tmp_path, {"model.layers.1.mlp.experts.fc1.weight": torch.randn(E, H, 2 * I)})
    fails(tmp_path, "got model.layers.1.mlp.experts.fc1.weight; wanted one of the namings")


def test_biases_of_separate_experts(tmp_path):
    tensors = separate()
    for name in list(tensors):
        tensors[name.replace("weight", "bias")] = torch.randn(tensors[name].shape[0]).to(torch.bfloat16)
    write(tmp_path, tensors)
    stored, head = read_experts(tmp_path, LAYER), "model.layers.1.mlp.experts.2."
    assert torch.equal(stored.w13_bias[2], torch.cat([tensors[f"{head}{n}_proj.bias"] for n in ("gate", "up")]))
    assert torch.equal(stored.w2_bias[2], tensors[f"{head}down_proj.bias"])
    assert FusedExperts.from_checkpoint(tmp_path, LAYER).w2_bias.dtype == torch.bfloat16
    for lost in (f"{head}up_proj.bias", "model.layers.1.mlp.experts.0.gate_proj.bias"):
        write(tmp_path, {name: tensor for name, tensor in tensors.items() if name != lost})
        fails(tmp_path, f"got no {lost}; wanted all of them")


def test_quantised_tensors_need_a_configuration(tmp_path):
    scale = {"model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1)}
    write(tmp_path, {**separate(), **scale})
    fails(tmp_path, "tensors beside the experts of .*weight_scale_inv")
    do = "type of .*weight, data of experts that are not quantised: got .*config.json: it has to say how"
    write(tmp_path, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in separate().items()})
    fails(tmp_path, do)
    write(tmp_path, {name: tensor.to(torch.uint8) for name, tensor in fused().items()})
    fails(tmp_path, "type of .*gate_up_proj, data of experts that are not quantised: got U8; wanted F32 or")
    write(tmp_path, {"model.layers.1.mlp.experts.gate_up_proj_blocks": torch.zeros(E, dtype=torch.uint8)})
    fails(tmp_path, "experts: got no .*gate_up_proj.weight or .*gate_up_proj; wanted it, for the data")


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_act": "relu6"},
        {"hidden_act": None},
        {"hidden_act": ["silu"]},
        {"model_type": "muse_spark"},
        {"model_type": "inkling2_loop_text", "hidden_act": "silu"},
        {"swiglu_limits": [7.0]},
        {"swiglu_limit": "high"},
        {"swiglu_limit": -1.0},
        {"hidden_act": "gelu", "swiglu_limit": 7.0},
    ],
    ids=str,
)
def test_unknown_activation(config, tmp_path):
    write(tmp_path, separate(), config)
    fails(tmp_path, "activation")


def test_broken_router(tmp_path):
    known = {"model_type": "mixtral"}
    name = "model.layers.1.mlp.gate.weight"
    write(tmp_path, separate(), known)
    fails(tmp_path, f"no router weight in layer 1 .*neither {name}", read=read_router)
    write(tmp_path, {**separate(), name: torch.randn(H)}, known)
    fails(tmp_path, f"tensor {name}: got shape .32,. of torch.float32", read=read_router)
    write(tmp_path, {**separate(), name: torch.ones(E, H, dtype=torch.int8)}, known)
    fails(tmp_path, f"tensor {name}: got .* of I8, a type that is not float", read=read_router)
    bias = {"model.layers.1.mlp.gate.bias": torch.randn(E + 1)}
    write(tmp_path, {**separate(), name: torch.randn(E, H), **bias}, known)
    fails(tmp_path, "gate.bias: got shape .5,. of torch.float32; wanted floats of shape .4,", read=read_router)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({}, "got no norm_topk_prob"),
        ({"model_type": "mixtral", "num_experts_per_tok": None}, "top-k in config.json"),
        ({"model_type": "deepseek_v3"}, "got no n_group, topk_group, norm_topk_prob, routed_scaling_factor"),
        (
            {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
            "got no n_group, topk_group",
        ),
        (
            {"model_type": "deepseek_v2", "topk_method": "hash", "routed_scaling_factor": 16.0},
            "got 'hash'; wanted 'greedy' or 'group_limited_greedy'",
        ),
        (
            {"model_type": "deepseek_v2", "topk_method": "greedy", "routed_scaling_factor": "x"},
            "routed_scaling_factor in config.json: got 'x'",
        ),
    ],
)
def test_router_configuration_is_not_guessed(config, match, tmp_path):
    write(tmp_path, {**separate(), "model.layers.1.mlp.gate.weight": torch.randn(E, H)}, config)
    fails(tmp_path, match, read=read_router)
    assert read_experts(tmp_path, LAYER).router is None


def test_embedding(tmp_path):
    extra = {"model.layers.61.embed_tokens.weight": torch.randn(1, H)}
    write(tmp_path, {**extra, "model.embed_tokens.weight": torch.randn(V, H)})
    assert read_embedding(tmp_path, dtype=torch.float16).shape == (V, H)
    write(tmp_path, extra)
    with pytest.raises(CheckpointError, match="got no tensor of a known name"):
        read_embedding(tmp_path)
    write(tmp_path, {"a.embed_tokens.weight": torch.randn(V, H), "b.embed_tokens.weight": torch.randn(V, H)})
    with pytest.raises(CheckpointError, match="got a.embed_tokens.weight, b.embed_tokens.weight; wanted one tensor"):
        read_embedding(tmp_path)


def test_safetensors_is_optional(tmp_path, monkeypatch):
    write(tmp_path, separate())
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r'pip install "fusedmoe\[cli\]"'):
        read_experts(tmp_path, LAYER)
