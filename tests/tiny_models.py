"""Every class of Transformers with an experts interface, found in its sources, and small random models of them."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MixtralConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig, StaticCache

MODELS = Path(transformers.__file__).parent / "models"

#: Sizes of a small model, by the names that configurations have for them.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
DERIVED = object()  # left for the configuration to work out
#: What else the models of a file need.
MORE: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [24, 24]} | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 0}
    | {name: SIZES[name] for name in ("num_experts", "top_k_experts", "moe_intermediate_size")},
    "glm5_next": {"mlp_layer_types": ["dense", "sparse"], "head_dim": 0, "qk_rope_head_dim": 0, "linear_num_heads": 4}
    | {"linear_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0]}},
    "mimo_v2_flash": {"num_key_value_heads": 2, "head_dim": 12},
    "glm_moe_dsa": {"mlp_layer_types": ["dense", "sparse"]},
    "mistral4": {"head_dim": DERIVED},
    "muse_spark": {"mlp_layer_types": ["dense", "sparse"], "moe_hidden_size": 16},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": 24},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def experts_classes() -> list[str]:
    """``model.Class`` of every class that is decorated for the experts interface."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)\(", text, re.MULTILINE)
        found += [f"{path.parent.name}.{name}" for name in names]
    return found


def module_of(name: str) -> Any:
    """The modeling module of ``model.Class``."""
    model = name.split(".", maxsplit=1)[0]
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def small(config_class: type[PretrainedConfig], more: dict[str, Any]) -> PretrainedConfig:
    """A configuration of a small model."""
    default = config_class()
    known = {*vars(default), *default.attribute_map}
    sizes = {key: value for key, value in SIZES.items() if key in known} | more
    return config_class(**{key: value for key, value in sizes.items() if value is not DERIVED})


def model_classes(name: str) -> list[type[PreTrainedModel]]:
    """Models of the module of ``model.Class`` that may hold it, those of text alone first."""
    module = module_of(name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and value.config_class is not None
        and "PreTrained" not in value.__name__
    ]
    order = ("ForCausalLM", "TextModel", "Model")

    def rank(value: type) -> int:
        return next((i for i, end in enumerate(order) if value.__name__.endswith(end)), len(order))

    return sorted(found, key=rank)


def experts_class(name: str) -> type[torch.nn.Module]:
    """The class ``model.Class``."""
    found: type[torch.nn.Module] = getattr(module_of(name), name.split(".")[1])
    return found


def draw(experts: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of an experts module, such that outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            scale = min(parameter.shape[1:]) ** -0.5 if parameter.dim() == 3 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def build(name: str) -> PreTrainedModel:
    """A small model with experts of the class ``model.Class``, in float32 on the CPU, weights of its experts drawn."""
    said = []
    torch.manual_seed(0)
    for model_class in model_classes(name):
        try:
            config = small(model_class.config_class, MORE.get(name.split(".", maxsplit=1)[0], {}))
            with torch.device("meta"):
                size = sum(p.numel() for p in model_class(config).parameters())
            if size > 3_000_000:
                said.append(f"{model_class.__name__}: {size} parameters")
                continue
            model = model_class(config).eval()
        except Exception as error:  # noqa: BLE001  # the next one may fit
            said.append(f"{model_class.__name__}: {error!r}")
            continue
        found = experts_of(model, name)
        for seed, experts in enumerate(found):
            draw(experts, seed)
        if found:
            return model
        said.append(f"{model_class.__name__}: has none")
    raise LookupError("; ".join(said))


def experts_of(model: torch.nn.Module, name: str) -> list[torch.nn.Module]:
    """Its modules of the class ``model.Class``."""
    return [module for module in model.modules() if isinstance(module, experts_class(name))]


def prompt(model: PreTrainedModel, tokens: int = 7) -> dict[str, torch.Tensor]:
    """Arguments of a forward for two sequences."""
    generator = torch.Generator().manual_seed(1)
    if not hasattr(model.get_input_embeddings(), "weight") or "Talker" in type(model).__name__:
        return {"inputs_embeds": torch.randn(2, tokens, SIZES["hidden_size"], generator=generator)}
    return {"input_ids": torch.randint(3, SIZES["vocab_size"], (2, tokens), generator=generator)}


def run(model: PreTrainedModel, implementation: str) -> torch.Tensor:
    """Logits, or the last hidden states of a model without them."""
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        out: torch.Tensor = model(**prompt(model))[0]
    return out


def cache_argument(model: PreTrainedModel) -> str:
    """What its forward calls a cache: Transformers 5.24 renamed the argument, and warns of the old name."""
    return next(name for name in ("cache", "past_key_values") if name in inspect.signature(model.forward).parameters)


def generate(model: PreTrainedModel, cache: str, new: int = 6) -> torch.Tensor:
    """Greedy tokens with a "dynamic" or "static" cache; on a GPU a decode step with the latter is compiled."""
    given = {name: tensor.to(model.device) for name, tensor in prompt(model).items()}
    out: Any = model.generate(
        **given,
        max_new_tokens=new,
        do_sample=False,
        use_cache=True,
        cache_implementation=cache,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    used = out["cache" if "cache" in out else "past_key_values"]
    assert isinstance(used, StaticCache) == (cache == "static")
    tokens: torch.Tensor = out.sequences
    return tokens


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def routing(tokens: int, top_k: int, n_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and different experts of each token."""
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, n_experts, generator=g).topk(top_k).indices
    return torch.rand(tokens, top_k, generator=g), ids


def small_config() -> MixtralConfig:
    """Of MixtralExperts with 4 experts of 24 x 32."""
    config = MixtralConfig(hidden_size=32, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "fusedmoe"
    return config


def fp8_experts(
    *,
    block_size: tuple[int, int] | None,
    activation_scheme: str = "dynamic",
    hidden: int = 96,
    inner: int = 64,
    **more: Any,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """FP8Experts as the quantiser makes them, with random codes, and their weights as numbers."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, num_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "fusedmoe"
    experts_class = type("Experts", (FP8Experts,), {"__init__": FP8Experts.__init__, "forward": FP8Experts.forward})
    experts = use_experts_implementation(experts_class, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)(
        config,
        block_size=block_size,
        activation_scheme=activation_scheme,
        **more,
    )
    g = torch.Generator().manual_seed(0)
    numbers = {}
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            data, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
            if data.dtype == torch.int8:
                data.copy_(torch.randint(-128, 128, data.shape, generator=g).to(torch.int8))
                e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
                codes = torch.stack([data.view(torch.uint8) & 15, data.view(torch.uint8) >> 4], -1).flatten(-2).long()
                w = e2m1[codes & 7] * (1 - 2.0 * (codes >> 3))
                size = 0.03
            else:
                data.copy_((torch.randn(data.shape, generator=g) * 50).to(data.dtype))
                w, size = data.float(), 0.002
            # Experts differ by a factor, so that a scale of another expert shows.
            s = torch.rand(scale.shape, generator=g) * size * torch.tensor([1.0, 4.0, 0.25, 2.0]).view(4, 1, 1) + 1e-4
            if scale.dtype != torch.float32:
                s = torch.exp2(s.log2().round())
            scale.copy_(s.to(scale.dtype))
            rows, columns = w.shape[1] // s.shape[1], w.shape[2] // s.shape[2]
            numbers[name] = w * s.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return experts, numbers
