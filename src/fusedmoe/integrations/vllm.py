"""vLLM: this library's experts in the place of its Triton experts, 0.22.1 to 0.33.

A plugin of vLLM (entry point ``vllm.general_plugins``), which does nothing unless ``FUSEDMOE_VLLM=1`` is set::

    FUSEDMOE_VLLM=1 vllm serve Qwen/Qwen3-30B-A3B --moe-backend triton

``TritonExperts`` and ``TritonWNA16Experts`` are then subclasses of themselves, whose ``apply`` is
:func:`fusedmoe.fused_experts`: wherever vLLM chooses them, by itself or because it was told to, the experts run here.
vLLM's LoRA runs here too, on the tensors of its slots; rows of a quantised layer with adapters are quantised here, as
adapters multiply them as they are. What they cannot take (adapters that are sharded along their ranks, emulated
quantisation, a form of scales that they do not know) runs in vLLM's class as before, with its own workspaces; the
reason is logged once. Before the first call of a layer its arguments are put together without tokens, and whatever
this library says against them is a reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from typing import Any

import torch
from torch import Tensor

from fusedmoe.checks import check
from fusedmoe.errors import FusedMoEError, OptionError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.functional import fused_experts
from fusedmoe.lora import MAX_RANK, MAX_SLOTS, LoRA
from fusedmoe.settings import settings
from fusedmoe.spec.activation import TABLE, Activation
from fusedmoe.target import installed

#: Versions of vLLM whose experts classes were looked at.
FIRST, LAST = (0, 22, 1), (0, 33)
NAMES = ("TritonExperts", "TritonWNA16Experts")
_MODULE = "vllm.model_executor.layers.fused_moe.experts.triton_moe"
#: Layers that hold adapters, and what tells which slot each token has.
_LAYERS = "vllm.lora.layers.fused_moe"
_SLOTS_OF_TOKENS = "vllm.lora.ops.triton_ops.lora_kernel_metadata"
#: Whose gate and up rows alternate in vLLM, and the same activation of gate rows and then up rows (0.33).
_INTERLEAVED, _UNINTERLEAVED = "swigluoai", "swigluoai_uninterleave"

_log = logging.getLogger("fusedmoe.vllm")


def register() -> None:
    """Replace vLLM's Triton experts, where the settings ask for it; a second call changes nothing.

    A vLLM of another version, or without these classes, is left as it is, with a warning.
    """
    if not settings().vllm:
        return
    version = installed("vllm") or "none"
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())
    if not (numbers >= FIRST and numbers[:2] <= LAST):
        wanted = f"{'.'.join(map(str, FIRST))} to {'.'.join(map(str, LAST))}"
        _log.warning("FUSEDMOE_VLLM: got vLLM %s; wanted %s. Its experts are left as they are.", version, wanted)
        return
    try:
        module = importlib.import_module(_MODULE)
        found = {name: getattr(module, name) for name in NAMES}
    except (ImportError, AttributeError) as cause:
        _log.warning(
            "FUSEDMOE_VLLM: got %s; wanted %s in %s. Nothing is replaced.", cause, " and ".join(NAMES), _MODULE
        )
        return
    package = importlib.import_module(_MODULE.rpartition(".experts.")[0])
    for name, base in found.items():
        if getattr(base, "runs_fusedmoe", False):
            continue
        ours = experts_class(base)
        for place in (module, package):
            if getattr(place, name, None) is base:
                setattr(place, name, ours)
    prepare_adapters()
    _log.info("FUSEDMOE_VLLM: %s of vLLM %s run on fusedmoe.", " and ".join(NAMES), version)


def prepare_adapters() -> None:
    """Have vLLM keep two things about adapters that kernels here rely on; a second call changes nothing.

    Its layers put what is not finite in B of an adapter into its A, whenever they load one. In A a NaN reaches rows of
    this adapter alone; in B it would reach others' on the kernels of Hopper, which therefore want B finite
    (:class:`fusedmoe.LoRA`). And in a batch without adapters each token's slot becomes -1, where vLLM leaves those of
    the batch before, for its own kernels are told that there are none.
    """
    for place, name, made in ((_LAYERS, "set_lora", isolating), (_SLOTS_OF_TOKENS, "prepare_tensors", forgetting)):
        try:
            module = importlib.import_module(place)
        except ImportError as cause:
            _log.info("FUSEDMOE_VLLM: got %s. Adapters stay vLLM's own, or run on kernels that need less.", cause)
            continue
        for kind in vars(module).values():  # its own: what it imports are bases of other layers too
            own = vars(kind).get(name) if getattr(kind, "__module__", None) == place else None
            if own is not None and not hasattr(own, made.__name__):
                setattr(kind, name, made(own))


def isolating(set_lora: Any) -> Any:
    """A layer's ``set_lora`` that leaves every number of B finite."""

    @functools.wraps(set_lora)
    def wrapper(self: Any, index: int, *args: Any, **kwargs: Any) -> None:
        set_lora(self, index, *args, **kwargs)
        pairs = (self.w13_lora_a_stacked, self.w13_lora_b_stacked), (self.w2_lora_a_stacked, self.w2_lora_b_stacked)
        for a, b in (pair for both in pairs for pair in zip(*both, strict=True)):
            if a.shape[2] == b.shape[3]:  # otherwise sharded along the rank, and run by vLLM
                wrong = ~torch.isfinite(b[index])
                columns = wrong.any(1)  # [E or 1, R], of A [E or 1, R, K]
                if a.shape[1] == 1:
                    columns = columns.any(0, keepdim=True)
                a[index].masked_fill_(columns.unsqueeze(2), float("nan"))
                b[index].masked_fill_(wrong, 0.0)

    wrapper.isolating = True  # type: ignore[attr-defined]
    return wrapper


def forgetting(prepare_tensors: Any) -> Any:
    """A ``prepare_tensors`` of what tells each token's slot, that says -1 where no token has one."""

    @functools.wraps(prepare_tensors)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare_tensors(self, *args, **kwargs)
        if self.no_lora_flag_cpu.item():
            self.token_lora_mapping.fill_(-1)

    wrapper.forgetting = True  # type: ignore[attr-defined]
    return wrapper


def _layers_isolate() -> bool:
    layer = getattr(sys.modules.get(_LAYERS), "FusedMoEWithLoRA", None)
    return hasattr(getattr(layer, "set_lora", None), "isolating")


def experts_class(base: Any) -> Any:
    """A subclass of one of vLLM's Triton experts that runs here what it can, and the rest as its base does."""

    class Experts(base):  # type: ignore[misc]
        runs_fusedmoe = True

        @property
        def expects_unquantized_inputs(self) -> bool:
            """Whether rows come as they are, to be quantised here: adapters multiply them as they are."""
            context = getattr(self, "_lora_context", None)
            if context is not None and self.quant_config.quant_dtype is not None:
                reason, _ = self._fusedmoe_how(self.moe_config.activation, _shape(context))
                if reason is None:
                    return True
            return bool(super().expects_unquantized_inputs)

        def workspace_shapes(
            self,
            M: int,
            N: int,
            K: int,
            topk: int,
            global_num_experts: int,
            local_num_experts: int,
            expert_tokens_meta: Any,
            activation: Any,
        ) -> Any:
            """None but the output: a call allocates what it needs, in the graph's pool when it is captured."""
            if self._fusedmoe_how(activation, (local_num_experts, N, K))[0]:
                return super().workspace_shapes(
                    M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation
                )
            return (0,), (0,), (M, K)

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> Any:
            reason, options = self._fusedmoe_how(activation, (*w1.shape[:2], hidden_states.shape[1]))
            if reason:
                _say(type(self).__mro__[1].__name__, reason)
                return super().apply(
                    output=output,
                    hidden_states=hidden_states,
                    w1=w1,
                    w2=w2,
                    topk_weights=topk_weights,
                    topk_ids=topk_ids,
                    activation=activation,
                    global_num_experts=global_num_experts,
                    expert_map=expert_map,
                    a1q_scale=a1q_scale,
                    a2_scale=a2_scale,
                    workspace13=workspace13,
                    workspace2=workspace2,
                    expert_tokens_meta=expert_tokens_meta,
                    apply_router_weight_on_input=apply_router_weight_on_input,
                )
            w13, down = self._fusedmoe_matrices(w1, w2, options)
            if apply_router_weight_on_input:  # the prepare step did it
                topk_weights = torch.ones_like(topk_weights)
            lora = adapter_ids = None
            if (context := getattr(self, "_lora_context", None)) is not None:
                lora, adapter_ids = self._fusedmoe_lora(context), _adapter_ids(context, hidden_states.shape[0])
            fused_experts(
                hidden_states,
                w13,
                down,
                topk_weights,
                topk_ids,
                hidden_states_scale=a1q_scale,
                dtype=None if a1q_scale is None else output.dtype,
                w13_bias=self.quant_config.w1_bias,
                w2_bias=self.quant_config.w2_bias,
                expert_map=expert_map,
                lora=lora,
                adapter_ids=adapter_ids,
                out=output,
                **options,
            )
            return None

        def _fusedmoe_how(self, activation: Any, shape: tuple[int, int, int]) -> tuple[str | None, dict[str, Any]]:
            """Why vLLM's class runs a layer whose w1 is of this shape; or None, and the options that it has here.

            Tried once: what vLLM asks before a call and what the call does are the same answer.
            """
            key = activation, shape, _batch_invariant(), settings()
            if getattr(self, "_fusedmoe_asked", None) != key:
                reason = why_not(self, activation, shape)
                self._fusedmoe_answer = reason, {} if reason else options_of(self, activation)
                self._fusedmoe_asked = key
            reason, options = self._fusedmoe_answer
            context = getattr(self, "_lora_context", None)
            return reason or why_no_adapters(context, self.moe_config.in_dtype), options

        def _fusedmoe_matrices(self, w1: Tensor, w2: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
            """Both matrices; made anew when a tensor is another one, for vLLM may move or reload weights."""
            config = self.quant_config
            parts = (w1, w2, config.w1_scale, config.w2_scale, config.w1_zp, config.w2_zp)
            key = tuple(None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in parts)
            if getattr(self, "_fusedmoe_key", None) != key:
                self._fusedmoe_made = matrices(config, w1, w2, options)
                self._fusedmoe_key = key
            return self._fusedmoe_made

        def _fusedmoe_lora(self, context: Any) -> LoRA:
            """VLLM's slots, where they lie; made anew when a tensor is another one."""
            tensors = [*_slots(context), context.adapter_enabled]
            key = tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)
            if getattr(self, "_fusedmoe_slots", None) != key:
                (a, *up_a), (b, *up_b) = context.w13_lora_a_stacked, context.w13_lora_b_stacked
                self._fusedmoe_adapters = LoRA(
                    a,
                    b,
                    context.w2_lora_a_stacked[0],
                    context.w2_lora_b_stacked[0],
                    adapter_enabled=context.adapter_enabled[: a.shape[0]],  # has one more: of tokens without
                    up_a=up_a[0] if up_a else None,
                    up_b=up_b[0] if up_b else None,
                    finite=_layers_isolate(),
                )
                self._fusedmoe_slots = key
            return self._fusedmoe_adapters

    Experts.__name__ = Experts.__qualname__ = base.__name__
    Experts.__doc__ = base.__doc__
    return Experts


def why_not(experts: Any, activation: Any, shape: tuple[int, int, int]) -> str | None:
    """Why vLLM's own class runs a layer whose w1 is [E, N, K] = ``shape``; None where it runs here.

    The same for every call of a layer: a call without tokens is put together and checked, on matrices that hold
    nothing, as vLLM asks before it hands over its own.
    """
    config = experts.quant_config
    if getattr(experts, "quantization_emulation", False):
        return "quantisation is emulated"
    if kind_of(config) is None:
        return f"weights of {config.weight_quant_dtype} with rows of {config.quant_dtype} are unknown here"
    try:
        options = options_of(experts, activation)
        w1, w2 = _blanks(experts, shape, gated=options["activation"].gated)
        ids = torch.empty((0, 1), dtype=torch.int32, device=w1.device)
        check(
            torch.empty((0, shape[2]), dtype=experts.moe_config.in_dtype, device=w1.device),
            *matrices(config, w1, w2, options),
            ids.float(),
            ids,
            w13_bias=config.w1_bias,
            w2_bias=config.w2_bias,
            **options,
        )
    except FusedMoEError as cause:
        return str(cause).rstrip(".")
    return None


def _blanks(experts: Any, shape: tuple[int, int, int], *, gated: bool) -> tuple[Tensor, Tensor]:
    """A w1 of this shape and its w2 that take no memory: sizes, type and device are those of the layer's."""
    config = experts.quant_config
    beside = (config.w1_scale, config.w2_scale, config.w1_bias, config.w2_bias)
    device = next((t.device for t in beside if t is not None), torch.device("cpu"))
    dtype = config.weight_quant_dtype
    if dtype is None:
        dtype = experts.moe_config.in_dtype
    elif config.quant_dtype is None or not isinstance(dtype, torch.dtype):
        dtype = torch.uint8  # codes that meet rows as they are
    n_experts, n_rows, n_hidden = shape
    per_byte = 2 if config.use_int4_w4a16 else 1

    def blank(rows: int, columns: int) -> Tensor:
        return torch.empty(columns // per_byte, dtype=dtype, device=device).expand(n_experts, rows, -1)

    return blank(n_rows, n_hidden), blank(n_hidden, n_rows // 2 if gated else n_rows)


def why_no_adapters(context: Any, dtype: torch.dtype) -> str | None:
    """Why vLLM's own class runs a layer of ``dtype`` with this ``MoELoRAContext``, or without (None); None where it
    runs here. The same for every call of a layer.
    """
    if context is None:
        return None
    tensors = _slots(context)
    if context.fully_sharded:
        return "adapters are sharded along their ranks"
    told = getattr(context.punica_wrapper, "token_mapping_meta", None)
    if not hasattr(getattr(told, "prepare_tensors", None), "forgetting"):
        return "slots of tokens may be those of the batch before"
    if _batch_invariant() or settings().batch_invariant:
        return "adapters have no batch-invariant form here"
    other = next((t.dtype for t in tensors if t.dtype != dtype), None)
    if other is not None:
        return f"adapters in {other} meet rows in {dtype}"
    if tensors[0].shape[0] > MAX_SLOTS or tensors[0].shape[2] > MAX_RANK:
        return f"there are more than {MAX_SLOTS} adapters, or their rank is above {MAX_RANK}"
    for pair in (context.w13_lora_a_stacked, context.w13_lora_b_stacked):
        if len({(t.shape, t.stride()) for t in pair}) > 1:
            return "adapters of gate and up are laid out differently"
    return None


def _slots(context: Any) -> list[Tensor]:
    """All tensors of adapters."""
    c = context
    pairs = c.w13_lora_a_stacked, c.w13_lora_b_stacked, c.w2_lora_a_stacked, c.w2_lora_b_stacked
    return [tensor for pair in pairs for tensor in pair]


def _shape(context: Any) -> tuple[int, int, int]:
    """[E, N, K] of the w1 that adapters are for. One A may serve all experts."""
    a, b = context.w13_lora_a_stacked, context.w13_lora_b_stacked
    return b[0].shape[1], sum(up.shape[2] for up in b), a[0].shape[3]


def _adapter_ids(context: Any, n_tokens: int) -> Tensor:
    """Slot of each token's adapter, -1 for none: those that travelled with the tokens, or the batch's."""
    local = getattr(context, "local_token_lora_mapping", None)
    found: Tensor = context.punica_wrapper.token_mapping_meta.meta_args(n_tokens, False)[0] if local is None else local
    return found[:n_tokens]


def kind_of(config: Any, matrix: int = 1) -> tuple[str, dict[str, Any]] | None:
    """Scheme and choices of w1 or w2 (``matrix`` 2) of a ``FusedMoEQuantConfig``; ("none", {}) of one without
    quantisation; None: unknown.
    """
    block = config.block_shape
    if config.quant_dtype is None and config.weight_quant_dtype is None:
        return "none", {}
    if config.use_fp8_w8a8 or config.use_int8_w8a8:
        scale, input_scale = getattr(config, f"w{matrix}_scale"), getattr(config, f"a{matrix}_scale")
        code = "fp8" if config.use_fp8_w8a8 else "int8_w8a8"
        if block is not None:
            return (f"{code}_block" if code == "fp8" else code), {"block": tuple(block), "inputs": "group"}
        mode = "token" if config.per_act_token_quant else "tensor" if input_scale is None else "static"
        if code == "int8_w8a8":
            return code, {"inputs": mode}
        whole = scale is not None and scale.shape[:1].numel() == scale.numel()
        return ("fp8_tensor" if whole else "fp8_channel"), {"inputs": mode}
    if config.use_int8_w8a16:
        return "int8_w8a16", {}
    if config.use_int4_w4a16:
        return "int4_w4a16", {}
    return None


def matrices(config: Any, w1: Tensor, w2: Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
    """w13 and w2 as this library takes them, from the tensors of a vLLM layer with these options; nothing is copied,
    for vLLM may write other numbers into its tensors.

    Raises:
        FusedMoEError: scales or zero points do not fit the weights.
    """
    halves = options["activation"].gated and options["gate_up_layout"] == "concatenated"

    def matrix(number: int, w: Tensor) -> Tensor | ExpertMatrix:
        found = kind_of(config, number)
        if found is None:
            raise FusedMoEError("a quantisation that why_not refuses")
        scheme, choices = found
        if scheme == "none":
            return w
        scale, zero, input_scale = (
            getattr(config, name.format(number)) for name in ("w{}_scale", "w{}_zp", "a{}_scale")
        )
        if choices.get("inputs") != "static":
            input_scale = None
        parts = 2 if number == 1 and halves and "block" in choices else 1
        return ExpertMatrix(scheme, w, scale, zero=zero, input_scale=input_scale, parts=parts, **choices)

    return matrix(1, w1), matrix(2, w2)


def options_of(experts: Any, activation: Any) -> dict[str, Any]:
    """What :func:`fusedmoe.fused_experts` is told of a layer besides its tensors.

    Raises:
        FusedMoEError: the activation is unknown here, or cannot have its parameters.
    """
    return {
        "activation": activation_of(experts, activation),
        "gate_up_layout": "interleaved" if activation.value == _INTERLEAVED else "concatenated",
        "batch_invariant": _batch_invariant(),
    }


def activation_of(experts: Any, activation: Any) -> Activation:
    """An activation of vLLM with its parameters, which 0.33 keeps in ``activation_config``.

    Raises:
        FusedMoEError: it is unknown here, or cannot have its parameters.
    """
    name, config = activation.value, getattr(experts, "activation_config", None)
    limit = experts.quant_config.gemm1_clamp_limit if config is None else config.clamp_limit
    if limit is not None and not limit > 0:
        limit = None  # no clamp
    if name == "silu":
        return Activation("silu", limit=limit)
    if name == _UNINTERLEAVED and config is not None and limit is not None:
        return Activation("swigluoai", alpha=config.alpha, beta=config.beta, limit=limit)
    if limit is not None or name not in TABLE:
        raise OptionError(
            explain(
                "activation",
                got=name if limit is None else f"{name} with limit {limit}",
                wanted=f"silu, {_UNINTERLEAVED} with a limit, or one of fusedmoe.Activation without",
                do="vLLM's own class has it.",
            )
        )
    if name == "situ" and config is not None:
        linear = config.activation_situ_linear_beta
        linear = linear if linear is not None and linear > 0 else None  # else up as it is
        return Activation("situ", beta=config.activation_situ_beta, linear_beta=linear)
    return Activation(name)


def _batch_invariant() -> bool | None:
    """The setting of vLLM, where it is on."""
    return bool(getattr(importlib.import_module("vllm.envs"), "VLLM_BATCH_INVARIANT", False)) or None


@functools.cache
def _say(name: str, reason: str) -> None:
    _log.info("FUSEDMOE_VLLM: a layer runs in vLLM's own %s: %s.", name, reason)
