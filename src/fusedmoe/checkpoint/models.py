"""What only config.json says: the activation of the experts and the rule of the router, by model type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from fusedmoe.checkpoint.files import CONVERT_AGAIN, error
from fusedmoe.errors import OptionError
from fusedmoe.spec.activation import FLOAT32_MAX, Activation

#: config.hidden_act -> activation; the tanh names are one function in exact arithmetic.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}
#: These declare hidden_act "silu" and compute (up + 1) * gate * sigmoid(alpha * gate).
_SWIGLUOAI = {"gpt_oss", "gpt_oss_puzzle", "openai_privacy_filter", "minimax_m3_vl"}
#: Gate and up rows alternate; no tensor says so.
INTERLEAVED = {"gpt_oss", "gpt_oss_puzzle"}
#: The routing weight multiplies the input of the experts, not their output.
WEIGHT_ON_INPUT = {"llama4"}
#: Experts that compute what no Activation describes: a norm after w2, a soft-capped gate.
_OTHER_EXPERTS = {"muse_spark", "inkling2", "inkling2_loop"}
#: Their code has an activation that their configuration does not name.
_UNNAMED = {"lfm2_moe": "silu"}

RouterKind = Literal["softmax", "sigmoid", "topk_softmax"]


class _Family(NamedTuple):
    """How a family of models routes. Keys of ``needs`` are taken from config.json, which must have them:
    their defaults differ between models, so that none is guessed. Others are not read, as in the models' code.
    """

    kind: RouterKind
    renormalize: bool = True
    float32: bool = False  # logits are computed in float32 whatever the type of the model
    needs: tuple[str, ...] = ()


_DEEPSEEK_V3 = _Family(
    "sigmoid", float32=True, needs=("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
)
#: As in the models' code in Transformers 5.24. A model type that is not here is refused: routers differ in
#: details (a scale per expert, a soft cap, noise) that no tensor or configuration key betrays.
_ROUTERS: dict[str, _Family] = {
    **dict.fromkeys(
        [
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "exaone_moe",
            "glm4_moe",
            "glm4_moe_lite",
            "glm4v_moe",
            "glm_moe_dsa",
            "kimi_k2",
            "mimo_v2_flash",
            "nemotron_h",
            "solar_open",
        ],
        _DEEPSEEK_V3,
    ),
    **dict.fromkeys(["minimax", "mixtral", "qwen3_5_moe", "qwen3_vl_moe"], _Family("softmax")),
    **dict.fromkeys(
        ["flex_olmo", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"], _Family("softmax", needs=("norm_topk_prob",))
    ),
    "deepseek_v2": _Family("softmax", renormalize=False, float32=True, needs=("topk_method", "routed_scaling_factor")),
    "jamba": _Family("softmax", renormalize=False),
    "llama4": _Family("sigmoid", renormalize=False),
    "minimax_m2": _Family("sigmoid"),
    **dict.fromkeys(["gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared"], _Family("topk_softmax")),
}


@dataclass(frozen=True, kw_only=True)
class RoutingRule:
    """How router logits become a choice of experts and their weights.

    ``kind`` "softmax": weights of the top_k largest of softmax(logits), by groups in DeepSeek-V2; "sigmoid": of
    sigmoid(logits), chosen by groups and with a correction bias (DeepSeek-V3); "topk_softmax": softmax of the top_k
    largest logits.
    Equations: :mod:`fusedmoe.routers`. The weights are multiplied by ``routed_scaling_factor``.
    """

    kind: RouterKind
    top_k: int
    renormalize: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0


TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")


def integer(config: dict[str, Any], keys: Iterable[str]) -> int | None:
    """The value of the first key that holds an integer above 0."""
    values = (config.get(key) for key in keys)
    return next((value for value in values if type(value) is int and value > 0), None)


def model_type_of(config: dict[str, Any]) -> str:
    """Without the suffix that the text part of a multimodal model has."""
    return str(config.get("model_type")).removesuffix("_text")


def dtype_of(config: dict[str, Any]) -> torch.dtype | None:
    """Type of the model's weights that are not quantised, None when it is not said."""
    said = config.get("dtype") or config.get("torch_dtype")
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return kinds.get(said) if isinstance(said, str) else None


def activation_of(config: dict[str, Any], *, gated: bool) -> Activation:
    """The activation of the experts."""
    # Where a model has several of these keys, the special one is the one its code uses.
    keys = ("mlp_hidden_act", "hidden_activation", "hidden_act")
    model_type, limit = model_type_of(config), config.get("swiglu_limit")
    name = next((config[key] for key in keys if config.get(key) is not None), _UNNAMED.get(model_type))
    try:
        if model_type in _SWIGLUOAI or name == "swigluoai":
            return Activation("swigluoai", limit=limit or 7.0, alpha=config.get("swiglu_alpha") or 1.702)
        plain = model_type not in _OTHER_EXPERTS and config.get("swiglu_limits") is None
        if plain and isinstance(name, str) and name in _ACTIVATIONS:
            return Activation(_ACTIVATIONS[name] + ("" if gated else "_no_mul"), limit=limit)
    except OptionError as cause:
        raise error("activation in config.json", got=cause, wanted="its parameters", do=CONVERT_AGAIN) from cause
    raise error(
        f"activation of the experts of model type {model_type!r}",
        got=f"{name!r}, swiglu_limits {config.get('swiglu_limits')}",
        wanted=f"one of {', '.join(_ACTIVATIONS)}, and experts that compute nothing else",
        do="Build FusedExperts from tensors yourself, if an Activation describes these experts.",
    )


def family_of(config: dict[str, Any]) -> _Family:
    """How models of this type route."""
    # The words of DeepSeek-V3's own configuration, which models derived from it keep under names of their own.
    if (config.get("scoring_func"), config.get("topk_method")) == ("sigmoid", "noaux_tc"):
        return _DEEPSEEK_V3
    model_type = model_type_of(config)
    if model_type not in _ROUTERS:
        raise error(
            "router", got=f"model type {model_type!r}", wanted=f"one of {', '.join(sorted(_ROUTERS))}", do=_ROUTE
        )
    return _ROUTERS[model_type]


_ROUTE = "Compute top-k weights and ids as the model does; fusedmoe.routers has the usual functions."


def rule_of(config: dict[str, Any]) -> RoutingRule:
    """The family's rule with this model's numbers."""
    family = family_of(config)
    needs, method = family.needs, config.get("topk_method")
    if family.kind == "softmax" and method == "group_limited_greedy":
        needs = (*needs, "n_group", "topk_group")
    elif family.kind == "softmax" and method not in (None, "greedy"):
        wanted = "'greedy' or 'group_limited_greedy'"
        raise error("topk_method in config.json", got=repr(method), wanted=wanted, do=_ROUTE)
    if absent := [key for key in needs if key not in config]:
        raise error("router in config.json", got=f"no {', '.join(absent)}", wanted="them", do=_ROUTE)
    top_k = integer(config, TOP_K)
    if top_k is None:
        raise error("top-k in config.json", got="none", wanted=f"an integer {TOP_K[0]}", do=_ROUTE)
    said = {key: config[key] for key in needs if config[key] is not None}
    factor = said.get("routed_scaling_factor", 1.0)
    if not isinstance(factor, (int, float)) or not abs(factor) <= FLOAT32_MAX:
        raise error("routed_scaling_factor in config.json", got=repr(factor), wanted="a number", do=_ROUTE)
    return RoutingRule(
        kind=family.kind,
        top_k=top_k,
        renormalize=bool(said.get("norm_topk_prob", family.renormalize)),
        n_group=integer(said, ("n_group",)) or 1,
        topk_group=integer(said, ("topk_group",)) or 1,
        routed_scaling_factor=float(factor),
    )
