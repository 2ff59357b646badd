"""Models whose experts Transformers' interface does not reach: their experts modules replaced, in place."""

from __future__ import annotations

import inspect
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from fusedmoe.checkpoint import ExpertsCheckpoint, experts_of_module, read_experts
from fusedmoe.checkpoint.files import LAYER, Files, open_checkpoint
from fusedmoe.checkpoint.stored import find_layer
from fusedmoe.errors import CheckpointError, FusedMoEError, UnsupportedError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.functional import fused_experts
from fusedmoe.integrations.transformers.gates import Gate, gate_of, plain_gate_of
from fusedmoe.integrations.transformers.interface import FALLS_BACK, needs_grad, refuse_gradients
from fusedmoe.nn import FusedExperts


@dataclass(frozen=True)
class Report:
    """What :func:`patch` did, by the names of the modules.

    Attributes:
        replaced: modules that run as fused experts now, and from what.
        kept: modules that were left as they are, for they need no replacement.
        refused: modules that could not be replaced, and the reason.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for what in ("replaced", "kept", "refused"):
            modules = getattr(self, what)
            lines += [f"{what}: {len(modules)}", *(f"  {name}: {why}" for name, why in modules.items())]
        return "\n".join(lines)


class TransformersExperts(FusedExperts):
    """Fused experts that take their arguments in the order of Transformers."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Apply the experts: [T, H], [T, top_k] and [T, top_k] to [T, H].

        Raises:
            GradientError: hidden states or router weights need a gradient.
        """
        refuse_gradients("quantised experts", hidden_states, top_k_weights)
        return super().forward(hidden_states, top_k_weights, top_k_index)


class FusedLlama4TextMoe(Llama4TextMoe):
    """Llama-4's mixture on the experts that its router chose, where the original multiplies by all of them.

    The class of a module is changed to this one; its tensors and their names stay, unless its experts come from a
    quantised checkpoint.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Mixture and router logits; the router's weight multiplies the input of an expert."""
        experts, x = self.experts, hidden_states.reshape(-1, self.hidden_dim)
        quantised = isinstance(experts, FusedExperts)
        if not quantised and needs_grad(self, x):
            if not torch.compiler.is_compiling():
                warnings.warn(FALLS_BACK.format("Transformers' own"), stacklevel=2)
            return super().forward(hidden_states)  # type: ignore[no-any-return, no-untyped-call]
        router_logits = self.router(x)[1]
        values, ids = router_logits.topk(self.top_k, dim=1)
        weights = values.float().sigmoid().to(values.dtype)
        if quantised:
            return self.shared_expert(x).add_(experts(x, ids, weights)), router_logits
        gate = plain_gate_of(experts.act_fn)
        assert gate is not None, "checked when the class was changed"
        out = fused_experts(
            x.to(experts.gate_up_proj.dtype),
            experts.gate_up_proj,
            experts.down_proj,
            weights,
            ids,
            activation=gate.activation,
            weight_layout="KN",
            apply_router_weight_on_input=True,
        )
        return self.shared_expert(x).add_(out), router_logits


def patch(model: PreTrainedModel, checkpoint: str | os.PathLike[str] | None = None) -> Report:
    """Replace experts modules that Transformers' experts interface does not reach, in place.

    * Llama-4's mixtures compute the chosen experts alone, from the tensors that they have, or from a checkpoint.
    * Experts that are quantised in ``checkpoint``, in any way that :func:`fusedmoe.checkpoint.read_experts` knows
      (compressed-tensors, GPTQ, AWQ, gpt-oss' mxfp4, ...), are read from it into :class:`TransformersExperts`, which
      take the place of experts that Transformers has widened or left out. The module may lie on the meta device.
    * Without a checkpoint, experts made of quantised modules in memory are read from them, where the module takes
      hidden states, ids and weights as Transformers' experts do.

    Replaced experts have tensors of other names (``w13``, ``w13_scale``, ...), and compute no gradients.

    Args:
        model: a model of Transformers.
        checkpoint: directory of the checkpoint that the model was made from.

    Returns:
        Which modules were replaced, kept and refused, with reasons; nothing is raised for a module.

    Raises:
        CheckpointError: the directory is no checkpoint.
    """
    report = Report()
    with ExitStack() as stack:
        files = None if checkpoint is None else stack.enter_context(open_checkpoint(checkpoint))
        for name, module in list(model.named_modules()):
            try:
                if isinstance(module, Llama4TextMoe):
                    _llama4(model, name, module, files, report)
                elif name.rpartition(".")[2] == "experts" and not isinstance(_parent(model, name), Llama4TextMoe):
                    _replace(model, name, module, files, report)
            except FusedMoEError as error:
                report.refused[name] = str(error)
    return report


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _llama4(model: PreTrainedModel, name: str, module: Any, files: Files | None, report: Report) -> None:
    """One mixture of Llama-4; raises what stands against it."""
    experts = module.experts
    if isinstance(module, FusedLlama4TextMoe):
        report.kept[name] = "replaced before"
        return
    if type(module) is not Llama4TextMoe or type(experts) is not Llama4TextExperts:
        report.refused[name] = f"{type(module).__name__} with {type(experts).__name__} is not Llama-4's own"
        return
    gate = plain_gate_of(experts.act_fn)
    if gate is None:
        report.refused[name] = f"its activation {type(experts.act_fn).__name__} is not known"
        return
    what = "its own tensors"
    if files is not None and _quantised(files, name):
        stored = read_experts(files.directory, _layer(name), device=_device(model, f"{name}.experts"), progress=False)
        _check_same(experts.gate_up_proj, gate, stored)
        module.set_submodule("experts", TransformersExperts.of_checkpoint(stored))
        what = _origin(stored, files)
    module.__class__ = FusedLlama4TextMoe
    report.replaced[name] = f"Llama-4, the chosen experts alone, {what}"


def _replace(model: PreTrainedModel, name: str, module: Any, files: Files | None, report: Report) -> None:
    """One experts module; raises what stands against it."""
    if isinstance(module, FusedExperts):
        report.kept[name] = "replaced before"
        return
    on_interface = hasattr(module, "_apply_gate") and hasattr(module, "has_gate")
    mxfp4 = type(module).__name__ == "Mxfp4GptOssExperts"
    if not mxfp4 and _names(module) not in _KNOWN_CALLS:
        raise UnsupportedError(
            explain(
                f"forward of {type(module).__name__}",
                got=f"arguments {', '.join(_names(module)) or 'of no forward'}",
                wanted="hidden_states, top_k_index, top_k_weights, as Transformers calls its experts",
                do="Its mixture calls it in a way of its own: replace that by fusedmoe.FusedExperts yourself.",
            )
        )
    if files is None and mxfp4:
        raise UnsupportedError(
            explain(
                "mxfp4 experts in memory",
                got="weights in the order of other kernels",
                wanted="codes as they are stored",
                do="Pass the directory that the model was loaded from: patch(model, checkpoint=...).",
            )
        )
    if on_interface and (files is None or not _quantised(files, name)):
        report.kept[name] = "on the experts interface: model.set_experts_implementation('fusedmoe')"
        return
    device = _device(model, name)
    if files is not None:
        stored = read_experts(files.directory, _layer(name), device=device, progress=False)
    else:
        mixture = name.rpartition(".")[0]
        stored = experts_of_module(_parent(model, name), mixture, _config(model), device=device)
    if on_interface:
        gate = None if getattr(module, "has_post_expert_norm", False) else gate_of(module)
        _check_same(module.gate_up_proj if module.has_gate else module.up_proj, gate, stored)
    model.set_submodule(name, TransformersExperts.of_checkpoint(stored))
    if mxfp4:
        _undo_mxfp4_mixture(_parent(model, name))
    report.replaced[name] = f"{type(module).__name__}, {_origin(stored, files)}"


def _origin(stored: ExpertsCheckpoint, files: Files | None) -> str:
    form = stored.w13.format if isinstance(stored.w13, ExpertMatrix) else stored.w13.dtype
    return f"{form} from {files.directory if files else 'memory'}"


#: Names of the arguments of experts that take ids and weights.
_KNOWN_CALLS = {
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),
}


def _names(module: nn.Module) -> tuple[str, ...]:
    forward = type(module).forward
    return () if forward is nn.Module.forward else tuple(inspect.signature(forward).parameters)[1:]


def _layer(name: str) -> int:
    found = LAYER.match(f"{name}.")
    if found is None:
        raise CheckpointError(
            explain(
                f"name of {name}", got="no number of a layer", wanted="...layers.<n>...", do="Patch it by yourself."
            )
        )
    return int(found[1])


def _quantised(files: Files, name: str) -> bool:
    layer = find_layer(files, files.block(_layer(name)))
    return any(projection.form() is not None for projection in (*layer.w13, layer.w2))


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json would say, those of the text model first."""
    own: Any = model.config
    config: dict[str, Any] = own.to_dict()
    nested = config.get("text_config")
    config = {**config, **nested} if isinstance(nested, dict) else config
    said: Any = config.get("quantization_config")
    return {**config, "quantization_config": said.to_dict()} if hasattr(said, "to_dict") else config


def _device(model: nn.Module, name: str) -> torch.device:
    """Where the module lies, or where its neighbours lie when it is on the meta device."""
    while True:
        devices: list[torch.device] = [tensor.device for tensor in model.get_submodule(name).state_dict().values()]
        if found := next((device for device in devices if device.type != "meta"), None):
            return found
        if not name:
            return torch.device("cpu")
        name = name.rpartition(".")[0]


def _check_same(first: Tensor, gate: Gate | None, stored: ExpertsCheckpoint) -> None:
    """Raise unless a module with this first matrix and gate has the sizes, and computes, what was read."""
    got, wanted = tuple(stored.w13.shape), tuple(first.shape)
    # Stored rows first or columns first, as it may be.
    if got not in (wanted, (wanted[0], *wanted[:0:-1])):
        said, do = f"{wanted}, as the module has them", "Pass the directory of this very model."
        raise CheckpointError(explain("first matrix of the experts of the checkpoint", got=got, wanted=said, do=do))
    if gate is None:
        raise UnsupportedError(
            explain(
                "experts with quantised weights",
                got="a gate or a norm that is not fused",
                wanted="a gate of the table in docs/transformers.md",
                do="Use set_experts_implementation('fusedmoe') on the unquantised model.",
            )
        )
    read = stored.activation, stored.gate_up_layout if stored.activation.gated else "concatenated"
    if tuple(gate) != read:
        raise CheckpointError(
            explain("what the experts compute", got=f"{read} in config.json", wanted=tuple(gate), do="Report this.")
        )


def _undo_mxfp4_mixture(mixture: nn.Module) -> None:
    """Let gpt-oss' mixture call its experts with ids and weights again."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    mixture.__dict__.pop("forward", None)  # older versions put one on the module
    mixture.__class__ = GptOssMLP
