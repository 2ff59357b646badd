"""Read the experts, the router or the embedding of a Hugging Face checkpoint, and nothing else.

A checkpoint is a directory with ``config.json`` and either ``model.safetensors`` or
``model.safetensors.index.json`` with its shards. The layer is found by its tensors, not by its model type,
so any prefix before ``layers.<n>.`` will do. These namings are known (``w1``, ``gate_proj``: gate; ``w3``,
``up_proj``: up; ``w2``, ``down_proj``: down)::

    experts.<e>.w1.weight, .w3.weight, .w2.weight                     [I, H], [I, H], [H, I]
    experts.<e>.gate_proj.weight, .up_proj.weight, .down_proj.weight  [I, H], [I, H], [H, I]
    experts.<e>.up_proj.weight, .down_proj.weight   (not gated)       [I, H], [H, I]
    experts.gate_up_proj, experts.down_proj                           [E, 2I, H], [E, H, I] or both transposed
    block_sparse_moe.input_linear.weight, .output_linear.weight       [E, 2I, H], [E, H, I]

each with or without biases (``.bias`` in place of ``.weight``; ``gate_up_proj_bias``, ``down_proj_bias``).

Quantised experts are recognised by ``quantization_config`` of config.json: fp8 per block or per tensor (DeepSeek-V3,
Qwen3-FP8, Transformers), compressed-tensors (fp8 per channel, tensor or block, int8, packed int4 and int8 with or
without zero points, nvfp4, mxfp4, mxfp8), GPTQ (versions 1 and 2), AWQ, AutoRound (packed as one of these two), mxfp4
of gpt-oss and DeepSeek-V4, ModelOpt (FP8 per tensor, channel or block, NVFP4, MXFP8; of all experts in one tensor, then
as above or both transposed), and what ``fusedmoe quantize`` writes. Weights of nvfp4, mxfp4 and mxfp8 are read without
what quantises their inputs.
:mod:`fusedmoe.checkpoint.methods` has one function for each.

A checkpoint is somebody else's file. Nothing in it is executed, pickles are not opened, files outside the
directory are not followed, and a tensor next to the experts that is not understood is an error: leaving it
out would give numbers that look right. Needs ``pip install "fusedmoe[cli]"`` for safetensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from fusedmoe.checkpoint import models
from fusedmoe.checkpoint.assembly import Source, check_range, cut, read_bias, read_matrix
from fusedmoe.checkpoint.files import EMBEDDING, FLOATS, LAYER, Files, Tensors, error, open_checkpoint, some
from fusedmoe.checkpoint.models import RoutingRule
from fusedmoe.checkpoint.progress import ticks
from fusedmoe.checkpoint.stored import find_layer
from fusedmoe.errors import CheckpointError, DTypeError, ShapeError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GateUpLayout, WeightLayout
from fusedmoe.target import device_of

if TYPE_CHECKING:
    from fusedmoe.routers import TopK

__all__ = ["ExpertsCheckpoint", "Router", "RoutingRule", "read_embedding", "read_experts", "read_router"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Router(RoutingRule):
    """The router of one layer: ``logits = hidden_states @ weight.T + bias``, then the rule.

    Attributes:
        weight: [E, H]; float32 when the model computes its logits in float32 whatever its own type.
        bias: [E] in the type of weight, or None.
        correction_bias: [E] float32, added to the scores for the choice only, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None

    def __call__(self, hidden_states: torch.Tensor) -> TopK:
        """Route hidden_states [..., H]: weights float32 [T, top_k] and ids int64 [T, top_k], T = product of ``...``.

        Weights stay in float32, where some models round theirs to the type of the hidden states.

        Raises:
            ShapeError: the last dimension is not H.
            DTypeError: hidden_states are no tensor of floating-point numbers.
        """
        from fusedmoe import routers

        hidden = self.weight.shape[1]
        if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
            got = hidden_states.dtype if isinstance(hidden_states, torch.Tensor) else type(hidden_states).__name__
            do = "Pass what comes before the experts in the model."
            raise DTypeError(explain("hidden_states of the router", got=got, wanted="floating point", do=do))
        if hidden_states.shape[-1:] != (hidden,):
            raise ShapeError(
                explain(
                    "hidden_states of the router",
                    got=tuple(hidden_states.shape),
                    wanted=f"(..., {hidden})",
                    do="Pass the hidden states of the model that the router was read from.",
                )
            )
        states = hidden_states.reshape(-1, hidden).to(self.weight.dtype)
        logits = torch.nn.functional.linear(states, self.weight, self.bias)
        if self.kind == "sigmoid":
            return routers.sigmoid_topk(
                logits,
                self.top_k,
                correction_bias=self.correction_bias,
                n_group=self.n_group,
                topk_group=self.topk_group,
                renormalize=self.renormalize,
                routed_scaling_factor=self.routed_scaling_factor,
            )
        if self.kind == "softmax":
            groups = {"n_group": self.n_group, "topk_group": self.topk_group}
            choice = routers.softmax_topk(logits, self.top_k, renormalize=self.renormalize, **groups)
        else:
            choice = routers.topk_softmax(logits, self.top_k)
        return choice._replace(weights=choice.weights * self.routed_scaling_factor)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertsCheckpoint:
    """The experts of one layer, with the options that :func:`fusedmoe.fused_experts` needs for them.

    Attributes:
        w13: [E, 2I, H] ([E, I, H] when not gated), or [E, H, 2I] when weight_layout is "KN"; an ExpertMatrix when
            quantised.
        w2: [E, H, I], or [E, I, H] when weight_layout is "KN"; likewise.
        w13_bias: [E, 2I] or None.
        w2_bias: [E, H] or None.
        activation, gate_up_layout, weight_layout, apply_router_weight_on_input: options of fused_experts.
        experts: numbers of the experts that were read, of ``num_experts`` that the layer has.
        top_k: experts per token, None when config.json does not say.
        router: how the layer routes, None when that is not known (see :func:`read_router`).
        dtype: type of the model's other weights as config.json says it, None when it does not.
    """

    w13: torch.Tensor | ExpertMatrix
    w2: torch.Tensor | ExpertMatrix
    w13_bias: torch.Tensor | None
    w2_bias: torch.Tensor | None
    activation: Activation
    gate_up_layout: GateUpLayout
    weight_layout: WeightLayout
    apply_router_weight_on_input: bool
    experts: range
    num_experts: int
    top_k: int | None
    router: RoutingRule | None
    dtype: torch.dtype | None

    def expert_map(self) -> torch.Tensor | None:
        """[num_experts] int32, local number of each expert or -1; None when all were read."""
        if len(self.experts) == self.num_experts:
            return None
        local = torch.full((self.num_experts,), -1, dtype=torch.int32, device=self.w13.device)
        local[self.experts.start : self.experts.stop] = torch.arange(len(self.experts), dtype=torch.int32)
        return local


def read_experts(
    directory: str | os.PathLike[str],
    layer: int,
    *,
    experts: tuple[int, int] | None = None,
    intermediate: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
) -> ExpertsCheckpoint:
    """Read the routed experts of one layer, all or a slice; see the module for the namings.

    Only tensors of these experts are read, one expert at a time into the result, so that the peak is the
    result and one expert. Fused tensors keep their layout; separate ones become "NK", "concatenated".

    Expert parallel: each rank reads a range of ``experts``; router ids pass through ``expert_map()``.

    Tensor parallel: each rank reads a range of the ``intermediate`` size, gate and up rows and columns of w2, and the
    outputs of all ranks add up to the layer. ``w2_bias`` comes with the slice that starts at 0 and with no other, so
    that it is added once. Where a slice starts or ends inside a block of weights that share a scale, blocks are
    re-cut to what block and ends have in common, with repeated scales, if that is at least 32. Else the slice is
    extended, down and up, to the nearest multiples where it is; w13 rows (and biases) of the neighbours are then
    zeros, so that their activations are too, and the sum is the same; the result is wider than was asked for.
    Rows that are quantised in the call get their dynamic scales from the slice, groups as narrow as the re-cut
    blocks, so that these rows are rounded a little differently from those of the whole layer.

    A static ``input_scale`` is the largest of all experts of the layer and of gate and up. Zero points that GPTQ's
    version 1 stores as the largest code are 0.

    Args:
        directory: of the checkpoint.
        layer: number of the layer, as it stands in the tensor names.
        experts: (start, stop) of the experts to read; all when None.
        intermediate: (start, stop) of the intermediate size to read; all when None.
        dtype: float32, float16, bfloat16 or float64, of weights that are not quantised and of biases; as stored
            when None.
        device: where the result lies.
        progress: show a bar on stderr; None: on a terminal, when it takes long.

    Raises:
        CheckpointError: the directory, a file, a tensor or the configuration is missing, broken, inconsistent or not
            understood, or the experts are quantised in a way that is not known here; the layer does not exist or has
            no experts.
        OptionError: a range is not within the layer.
        DTypeError, DeviceError: dtype is not one of the above, device none of this machine.
        MissingDependencyError: safetensors is not installed.
    """
    _check(dtype, device)
    with open_checkpoint(directory) as files:
        return _read(files, layer, experts, intermediate, dtype, device, progress)


def experts_of_module(
    module: torch.nn.Module, name: str, config: dict[str, Any], *, device: str | torch.device
) -> ExpertsCheckpoint:
    """The experts of a layer from the quantised modules of a model in memory, by the same namings and methods.

    Args:
        module: the mixture; its tensors are named as in a checkpoint from ``experts.`` on.
        name: of the mixture in its model, which quantization_config may speak of; it has the number of the layer.
        config: what config.json of the model would say.
        device: where the result lies.

    Raises:
        CheckpointError: as :func:`read_experts`.
    """
    layer = LAYER.match(f"{name}.")
    files = Tensors({f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}, config)
    return _read(files, int(layer[1]) if layer else 0, None, None, None, device, progress=False)


def _read(
    files: Files,
    layer: int,
    experts: tuple[int, int] | None,
    intermediate: tuple[int, int] | None,
    dtype: torch.dtype | None,
    device: str | torch.device,
    progress: bool | None,
) -> ExpertsCheckpoint:
    config = files.config
    stored = find_layer(files, files.block(layer))
    activation = models.activation_of(config, gated=stored.gated)
    chosen = check_range("experts", experts, stored.experts)
    wanted = check_range("intermediate", intermediate, stored.intermediate)
    stored.check(chosen)
    plan = cut(stored, wanted)
    down = (Source(stored.w2, range(stored.hidden), range(stored.hidden)),)
    with ticks(progress, 2 * len(chosen), f"layer {layer}") as tick:
        w13 = read_matrix(
            *(plan.w13, range(stored.hidden), chosen),
            block=plan.w13_block,
            parts=plan.parts,
            dtype=dtype,
            device=device,
            tick=tick,
        )
        w2 = read_matrix(*(down, plan.columns, chosen), block=plan.w2_block, dtype=dtype, device=device, tick=tick)
    w13_bias = read_bias(plan.w13, chosen, dtype=dtype, device=device)
    w2_bias = read_bias(down, chosen, dtype=dtype, device=device) if wanted.start == 0 else None
    try:
        rule = models.rule_of(config)
    except CheckpointError:  # the experts are usable with any routing; read_router says what is wrong
        rule = None
    return ExpertsCheckpoint(
        w13=w13,
        w2=w2,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        activation=activation,
        gate_up_layout="interleaved" if stored.interleaved else "concatenated",
        weight_layout=stored.weight_layout,
        apply_router_weight_on_input=models.model_type_of(config) in models.WEIGHT_ON_INPUT,
        experts=chosen,
        num_experts=stored.experts,
        top_k=models.integer(config, models.TOP_K),
        router=rule,
        dtype=models.dtype_of(config),
    )


def read_router(
    directory: str | os.PathLike[str],
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> Router:
    """Read the router of one layer, to be called with hidden states.

    Args:
        directory, layer, device: as in :func:`read_experts`.
        dtype: of weight and bias; as stored when None. Models that route in float32 get float32 regardless.

    Raises:
        CheckpointError: as :func:`read_experts`; or the routing of this model type is not known.
        DTypeError, DeviceError, MissingDependencyError: as :func:`read_experts`.
    """
    _check(dtype, device)
    with open_checkpoint(directory) as files:
        block = files.block(layer)
        rule = models.rule_of(files.config)
        name = files.first(block, ("gate.weight", "router.weight", "router.layer.weight"))
        if name is None:
            raise error(
                f"no router weight in layer {layer} of {files.directory}",
                got=f"neither {block}gate.weight nor {block}router.weight",
                wanted="one tensor [E, H]",
                do="Route with your own logits through fusedmoe.routers.",
            )
        if models.family_of(files.config).float32:
            dtype = torch.float32
        weight = files.tensor(name, (None, None), dtype, device)

        def vector(names: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor | None:
            found = files.first(block, names)
            return None if found is None else files.tensor(found, weight.shape[:1], dtype, device)

        return Router(
            **{field.name: getattr(rule, field.name) for field in fields(rule)},
            weight=weight,
            bias=vector(("gate.bias", "router.bias"), weight.dtype),
            correction_bias=vector(
                ("gate.e_score_correction_bias", "e_score_correction_bias", "experts.e_score_correction_bias"),
                torch.float32,
            ),
        )


def read_embedding(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Read the input embedding [V, H]: rows of real values to try a layer with.

    Args:
        directory, dtype, device: as in :func:`read_experts`.

    Raises:
        CheckpointError: as :func:`read_experts`; or not exactly one tensor has the name of an embedding.
        DTypeError, DeviceError, MissingDependencyError: as :func:`read_experts`.
    """
    _check(dtype, device)
    with open_checkpoint(directory) as files:
        # DeepSeek-V3 repeats the embedding in its last layer, which predicts further tokens.
        names = [name for name in files.names if EMBEDDING.search(name) and not LAYER.match(name)]
        if len(names) != 1:
            raise error(
                f"embedding of {files.directory}",
                got=some(names) or "no tensor of a known name",
                wanted="one tensor ...embed_tokens.weight (or wte, word_embeddings, embeddings, tok_embeddings)",
                do="Pass your own hidden states instead.",
            )
        return files.tensor(names[0], (None, None), dtype, device)


def _check(dtype: torch.dtype | None, device: str | torch.device) -> None:
    device_of(device)
    if dtype is not None and dtype not in FLOATS.values():
        raise DTypeError(
            explain(
                "dtype to read as",
                got=dtype,
                wanted=", ".join(str(d) for d in FLOATS.values()),
                do="Leave it out to keep the type that is stored.",
            )
        )
