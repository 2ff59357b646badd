"""SGLang: this library's experts in the place of its Triton runner's, 0.5.23.

A plugin of SGLang (entry point ``sglang.srt.plugins``), which does nothing unless ``FUSEDMOE_SGLANG=1`` is set::

    FUSEDMOE_SGLANG=1 python -m sglang.launch_server --model Qwen/Qwen3-30B-A3B --moe-runner-backend triton

SGLang keeps one function for "tokens that stay where they are, Triton's runner"; it is wrapped. What this library
cannot take goes to the function that was there, and the reason is logged once. What it can take is found out at the
first call of a layer: its arguments are checked without their tokens.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import SimpleNamespace
from typing import Any

import torch

from fusedmoe.checks import check
from fusedmoe.errors import FusedMoEError
from fusedmoe.functional import fused_experts
from fusedmoe.integrations.vllm import kind_of, matrices
from fusedmoe.settings import settings
from fusedmoe.spec.activation import Activation
from fusedmoe.target import installed

#: The version of SGLang whose function was looked at.
VERSION = "0.5.23"
KEY = ("none", "triton")
_RUNNER = "sglang.srt.layers.moe.moe_runner"

_log = logging.getLogger("fusedmoe.sglang")


def register() -> None:
    """Wrap SGLang's fused function of the Triton runner, where the settings ask for it; a second call changes nothing.

    An SGLang of another version, or without that function, is left as it is, with a warning.
    """
    if not settings().sglang:
        return
    version = installed("sglang") or "none"
    if version.split("+")[0] != VERSION:
        _log.warning("FUSEDMOE_SGLANG: got SGLang %s; wanted %s. Its experts are left as they are.", version, VERSION)
        return
    try:
        importlib.import_module(f"{_RUNNER}.triton")  # which puts its function there
        functions = importlib.import_module(f"{_RUNNER}.base").FusedOpPool._fused_funcs
        theirs = functions[KEY]
    except (ImportError, AttributeError, KeyError) as cause:
        _log.warning("FUSEDMOE_SGLANG: got %r; wanted a fused function %s. Nothing is wrapped.", cause, KEY)
        return
    if not getattr(theirs, "runs_fusedmoe", False):
        functions[KEY] = wrapped(theirs)
        _log.info("FUSEDMOE_SGLANG: the Triton runner of SGLang %s runs on fusedmoe.", version)


def wrapped(theirs: Any) -> Any:
    """A fused function that runs here what it can, and the rest as the given one does."""

    @functools.wraps(theirs)
    def experts(dispatch_output: Any, quant_info: Any, runner_config: Any) -> Any:
        layer = _made(dispatch_output, quant_info, runner_config)
        if isinstance(layer, str):
            _say(layer)
            return theirs(dispatch_output, quant_info, runner_config)
        w13, w2, options = layer
        chosen = dispatch_output.topk_output  # one of several tuples, which all have these
        out = fused_experts(
            dispatch_output.hidden_states,
            w13,
            w2,
            chosen.topk_weights,
            chosen.topk_ids,
            w13_bias=quant_info.b13,
            w2_bias=quant_info.b2,
            **options,
        )
        if runner_config.routed_scaling_factor is not None:
            out.mul_(runner_config.routed_scaling_factor)
        place = importlib.import_module("sglang.srt.layers.moe.token_dispatcher.standard")
        return place.StandardCombineInput(hidden_states=out)

    experts.runs_fusedmoe = True  # type: ignore[attr-defined]
    return experts


def config_of(info: Any) -> SimpleNamespace:
    """Quantisation of a ``TritonMoeQuantInfo`` under the names that vLLM's has, whose quantisations these are."""
    rows = torch.float8_e4m3fn if info.use_fp8_w8a8 else torch.int8 if info.use_int8_w8a8 else None
    plain = not (rows or info.use_int8_w8a16 or info.use_int4_w4a16)
    return SimpleNamespace(
        quant_dtype=rows,
        weight_quant_dtype=None if plain else info.w13_weight.dtype,
        # SGLang writes groups of weights alone as blocks too.
        block_shape=info.block_shape if rows else None,
        per_act_token_quant=info.per_channel_quant,
        w1_scale=info.w13_scale,
        w2_scale=info.w2_scale,
        w1_zp=info.w13_zp,
        w2_zp=info.w2_zp,
        a1_scale=info.a13_scale,
        a2_scale=info.a2_scale,
        use_fp8_w8a8=info.use_fp8_w8a8,
        use_int8_w8a8=info.use_int8_w8a8,
        use_int8_w8a16=info.use_int8_w8a16,
        use_int4_w4a16=info.use_int4_w4a16,
    )


def layer_of(dispatch_output: Any, info: Any, runner: Any) -> tuple[Any, Any, dict[str, Any]] | str:
    """Both matrices and the options of :func:`fusedmoe.fused_experts`; or why SGLang's own function runs the layer."""
    config = config_of(info)
    if info.use_mxfp8 or kind_of(config) is None:
        return "its quantisation is unknown here"
    if info.fuse_swiglu_interleaved:
        return "rows of w13 were permuted for SGLang's own kernel"
    if runner.no_combine:
        return "rows are asked for that are not summed"
    try:
        found = activation_of(runner)
        if found is None:
            return f"activation {runner.activation} is unknown here"
        options = dict(zip(("activation", "gate_up_layout"), found, strict=True))
        options["apply_router_weight_on_input"] = runner.apply_router_weight_on_input
        w13, w2 = matrices(config, info.w13_weight, info.w2_weight, options)
        x, chosen = dispatch_output.hidden_states, dispatch_output.topk_output
        weights, ids = chosen.topk_weights[:0], chosen.topk_ids[:0]
        check(x[:0], w13, w2, weights, ids, w13_bias=info.b13, w2_bias=info.b2, **options)
    except FusedMoEError as cause:
        return str(cause).rstrip(".")
    return w13, w2, options


def activation_of(runner: Any) -> Any:
    """Activation and layout of gate and up of a ``MoeRunnerConfig``; None: unknown.

    Raises:
        FusedMoEError: the activation cannot have its parameters.
    """
    name, alpha, limit = runner.activation, runner.gemm1_alpha, runner.gemm1_clamp_limit
    before = runner.swiglu_limit if runner.swiglu_limit is not None and runner.swiglu_limit > 0 else None
    plain = alpha is None and limit is None and before is None
    if not runner.is_gated:
        return (Activation(f"{name}_no_mul"), "concatenated") if plain and name in ("silu", "gelu", "relu2") else None
    if name == "silu" and alpha is not None and limit is not None:
        layout = "interleaved" if runner.gate_up_interleaved else "concatenated"
        return Activation("swigluoai", alpha=alpha, limit=limit), layout
    if name == "silu" and alpha is None:
        if limit is not None:  # clamped after the sigmoid; the other limit is before it
            return Activation("swiglustep", limit=limit), "concatenated"
        return Activation("silu", limit=before), "concatenated"
    if name == "situ":
        return Activation("situ", beta=4.0 if alpha is None else alpha, linear_beta=limit), "concatenated"
    return (Activation(name), "concatenated") if plain and name in ("gelu", "gelu_tanh") else None


def _made(dispatch_output: Any, info: Any, runner: Any) -> tuple[Any, Any, dict[str, Any]] | str:
    """What :func:`layer_of` says, kept with the weight while all that it looked at is the same."""
    tensors = (info.w13_weight, info.w2_weight, info.w13_scale, info.w2_scale, info.w13_zp, info.w2_zp)
    facts = (None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
    key = (dispatch_output.hidden_states.dtype, settings(), *facts)
    found = getattr(info.w13_weight, "_fusedmoe_made", None)
    if found is None or found[0] != key or found[1] is not runner:
        found = key, runner, layer_of(dispatch_output, info, runner)
        info.w13_weight._fusedmoe_made = found
    made: tuple[Any, Any, dict[str, Any]] | str = found[2]
    return made


@functools.cache
def _say(reason: str) -> None:
    _log.info("FUSEDMOE_SGLANG: a layer runs in SGLang's own function: %s.", reason)
