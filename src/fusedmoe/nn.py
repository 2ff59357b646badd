"""The experts of a mixture-of-experts layer as a :class:`torch.nn.Module`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from fusedmoe import checkpoint
from fusedmoe.checkpoint import ExpertsCheckpoint, read_experts
from fusedmoe.errors import DTypeError, LayoutError, OptionError, ShapeError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.functional import fused_experts
from fusedmoe.lora import LoRA
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import Format
from fusedmoe.spec.layout import GATE_UP_LAYOUTS, WEIGHT_LAYOUTS, GateUpLayout, WeightLayout
from fusedmoe.target import device_of

__all__ = ["FusedExperts"]


class FusedExperts(torch.nn.Module):
    """Experts that hold their weights; computes what :func:`fusedmoe.fused_experts` computes.

    For inference only: the parameters are created with ``requires_grad=False``, because the kernels have no
    backward, and a layer that detached its output without a word would train the rest of a model on wrong
    gradients. With gradients on and an input or a parameter that requires one, forward raises GradientError.

    Attributes:
        w13: [E, 2I, H] ([E, I, H] when the activation is not gated); [E, H, 2I] with weight_layout "KN". The codes
            when quantised (see :class:`fusedmoe.ExpertMatrix`).
        w2: [E, H, I]; [E, I, H] with weight_layout "KN"; likewise.
        w13_bias: [E, 2I] ([E, I] when not gated) with ``bias=True``, else None.
        w2_bias: [E, H] with ``bias=True``, else None.
        w13_scale, w13_zero, w13_tensor_scale, w13_input_scale, and of w2: buffers, those that the format has.
        expert_map: see :func:`fusedmoe.fused_experts`; a buffer that is not in the state dict, or None.

    A quantised layer is made by :meth:`of` or :meth:`from_checkpoint`. Its codes and scales keep their types whatever
    ``.to(dtype)`` says, and its state dict holds the formats, which have to agree when it is loaded.

    >>> layer = FusedExperts(8, 64, 32, device="meta")
    >>> tuple(layer.w13.shape), tuple(layer.w2.shape)
    ((8, 64, 64), (8, 64, 32))
    """

    w13: torch.nn.Parameter
    w2: torch.nn.Parameter
    w13_bias: torch.nn.Parameter | None
    w2_bias: torch.nn.Parameter | None
    expert_map: torch.Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str | Activation = "silu",
        gate_up_layout: GateUpLayout = "concatenated",
        weight_layout: WeightLayout = "NK",
        bias: bool = False,
        apply_router_weight_on_input: bool = False,
        expert_map: torch.Tensor | None = None,
        emulate: bool = False,
        batch_invariant: bool | None = None,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Allocate the parameters and initialise them as :class:`torch.nn.Linear` does.

        Args:
            num_experts, hidden_size, intermediate_size: E, H and I.
            activation, gate_up_layout, weight_layout, apply_router_weight_on_input, expert_map, emulate,
                batch_invariant, backend: options of :func:`fusedmoe.fused_experts`.
            bias: have w13_bias and w2_bias.
            dtype, device: of the parameters; the defaults of torch when None, so that
                ``with torch.device("meta")`` works.

        Raises:
            ShapeError: a size is not an integer above 0.
            OptionError: an unknown activation or layout.
            DTypeError, DeviceError: dtype is no type of a layer, device none of this machine, expert_map no tensor.
        """
        super().__init__()
        _check_storage(dtype, device, expert_map)
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < LARGEST:
                wanted = f"an integer above 0 and below {LARGEST}"
                raise ShapeError(explain(name, got=repr(size), wanted=wanted, do="Pass the true size."))
        for name, layout, known in (
            ("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS),
            ("weight_layout", weight_layout, WEIGHT_LAYOUTS),
        ):
            if not isinstance(layout, str) or layout not in known:
                raise OptionError(
                    explain(name, got=repr(layout), wanted=" or ".join(map(repr, known)), do="See fused_experts.")
                )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = Activation.of(activation)
        self.gate_up_layout: GateUpLayout = gate_up_layout
        self.weight_layout: WeightLayout = weight_layout
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.emulate = emulate
        self.batch_invariant = batch_invariant
        self.backend = backend
        self._matrices: dict[str, tuple[tuple[torch.Tensor, ...], ExpertMatrix]] = {}

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        rows = intermediate_size * (2 if self.activation.gated else 1)
        shapes = [(rows, hidden_size), (hidden_size, intermediate_size)]
        w13, w2 = shapes if weight_layout == "NK" else [shape[::-1] for shape in shapes]
        self.w13 = parameter(num_experts, *w13)
        self.w2 = parameter(num_experts, *w2)
        self.register_parameter("w13_bias", parameter(num_experts, rows) if bias else None)
        self.register_parameter("w2_bias", parameter(num_experts, hidden_size) if bias else None)
        self.register_buffer("expert_map", expert_map, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-b, b), b = 1 / sqrt(K), with K = H for w13 and I for w2.

        Raises:
            OptionError: the experts are quantised.
        """
        if self._formats():
            got, do = "quantised experts", "Load a state dict, or make the layer anew."
            raise OptionError(explain("reset_parameters", got=got, wanted="unquantised ones", do=do))
        for parameters, inner in (
            ((self.w13, self.w13_bias), self.hidden_size),
            ((self.w2, self.w2_bias), self.intermediate_size),
        ):
            bound = 1 / math.sqrt(inner)
            for parameter in parameters:
                if parameter is not None:
                    torch.nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def of(
        cls,
        w13: torch.Tensor | ExpertMatrix,
        w2: torch.Tensor | ExpertMatrix,
        *,
        w13_bias: torch.Tensor | None = None,
        w2_bias: torch.Tensor | None = None,
        activation: str | Activation = "silu",
        weight_layout: WeightLayout = "NK",
        **options: Any,
    ) -> FusedExperts:
        """Experts that hold these tensors, which become parameters and buffers without a copy.

        Args:
            w13, w2: as :func:`fusedmoe.fused_experts` takes them, quantised or not.
            w13_bias, w2_bias: likewise; one may be there without the other.
            activation, weight_layout, options: as of the class, but for bias, dtype and device.

        Raises:
            ShapeError, OptionError: as the class.

        >>> import fusedmoe
        >>> w13, w2 = (fusedmoe.quantize(torch.randn(4, 64, 64), "int4_w4a16", group=32) for _ in range(2))
        >>> layer = FusedExperts.of(w13, w2, activation="relu2_no_mul")
        >>> sorted(layer.state_dict())
        ['formats._extra_state', 'w13', 'w13_scale', 'w2', 'w2_scale']
        """
        for name, tensor in (("w13", w13), ("w2", w2), ("w13_bias", w13_bias), ("w2_bias", w2_bias)):
            if isinstance(tensor, ExpertMatrix) and name in ("w13", "w2"):
                continue
            if "bias" not in name or tensor is not None:
                require_tensor(name, tensor)
                _require_float(name, tensor)
        if len(w2.shape) != 3:
            raise ShapeError(
                explain("w2", got=tuple(w2.shape), wanted="[E, H, I], or [E, I, H] as KN", do="Stack the experts.")
            )
        n_experts, hidden, intermediate = w2.shape
        if weight_layout == "KN":
            hidden, intermediate = intermediate, hidden
        layer = cls(
            *(n_experts, hidden, intermediate),
            activation=activation,
            weight_layout=weight_layout,
            device="meta",
            **options,
        )
        for name, matrix in (("w13", w13), ("w2", w2)):
            wanted = tuple(getattr(layer, name).shape)
            if tuple(matrix.shape) != wanted:
                do = "Choose the activation (gated or not) and the weight_layout of these experts."
                raise ShapeError(explain(name, got=tuple(matrix.shape), wanted=wanted, do=do))
            layer._hold(name, matrix)
        for name, bias in (("w13_bias", w13_bias), ("w2_bias", w2_bias)):
            layer.register_parameter(name, None if bias is None else torch.nn.Parameter(bias, requires_grad=False))
        return layer

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | os.PathLike[str],
        layer: int,
        *,
        experts: tuple[int, int] | None = None,
        intermediate: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        progress: bool | None = None,
        emulate: bool = False,
        batch_invariant: bool | None = None,
        backend: str | None = None,
    ) -> FusedExperts:
        """Read the routed experts of one layer of a Hugging Face checkpoint, all or a slice, quantised or not.

        Args and errors: see :func:`fusedmoe.checkpoint.read_experts`. The tensors that were read become parameters
        and buffers, without another copy. With a range of experts, ids stay those of the whole layer (the layer has
        an ``expert_map``), and experts of other ranks add nothing. The outputs of all ranks add up to the layer.
        """
        stored = read_experts(
            directory,
            layer,
            experts=experts,
            intermediate=intermediate,
            dtype=dtype,
            device=device,
            progress=progress,
        )
        return cls.of_checkpoint(stored, emulate=emulate, batch_invariant=batch_invariant, backend=backend)

    @classmethod
    def of_checkpoint(
        cls,
        stored: ExpertsCheckpoint,
        *,
        emulate: bool = False,
        batch_invariant: bool | None = None,
        backend: str | None = None,
    ) -> FusedExperts:
        """Experts that hold what :func:`fusedmoe.checkpoint.read_experts` has read, without a copy."""
        return cls.of(
            stored.w13,
            stored.w2,
            w13_bias=stored.w13_bias,
            w2_bias=stored.w2_bias,
            activation=stored.activation,
            gate_up_layout=stored.gate_up_layout,
            weight_layout=stored.weight_layout,
            apply_router_weight_on_input=stored.apply_router_weight_on_input,
            expert_map=stored.expert_map(),
            emulate=emulate,
            batch_invariant=batch_invariant,
            backend=backend,
        )

    # --- quantised matrices: parameters, buffers, and the one value they make --------------------------------------

    def _hold(self, name: str, matrix: torch.Tensor | ExpertMatrix) -> None:
        data = matrix.data if isinstance(matrix, ExpertMatrix) else matrix
        self.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
        if isinstance(matrix, ExpertMatrix):
            for part, tensor in matrix.tensors().items():
                if part != "data":
                    self.register_buffer(f"{name}_{part}", tensor)
            if "formats" not in self._modules:
                self.formats = _Formats()
            self.formats.of[name] = (matrix.format, matrix.parts)

    def _formats(self) -> dict[str, tuple[Format, int]]:
        formats = self._modules.get("formats")
        return formats.of if isinstance(formats, _Formats) else {}

    def _matrix(self, name: str) -> torch.Tensor | ExpertMatrix:
        """w13 or w2 for a call; the value is made, and with that checked, only when a tensor is another one."""
        formats = self._formats()
        if name not in formats:
            return getattr(self, name)  # type: ignore[no-any-return]
        parts = [part for part in _PARTS if f"{name}_{part}" in self._buffers]
        tensors = (getattr(self, name), *(getattr(self, f"{name}_{part}") for part in parts))
        kept = self._matrices.get(name)
        if (
            kept is None
            or len(kept[0]) != len(tensors)
            or any(a is not b for a, b in zip(kept[0], tensors, strict=True))
        ):
            form, halves = formats[name]
            data, *others = tensors
            kept = tensors, ExpertMatrix(form, data, parts=halves, **dict(zip(parts, others, strict=True)))
            if not torch.compiler.is_compiling():  # torch.export's tensors are none of the layer's
                self._matrices[name] = kept
        return kept[1]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedExperts:
        """Move, and cast but for codes and scales, whose types are part of their meaning."""
        formats = self._formats()
        fixed = {id(getattr(self, name)) for name in formats}
        fixed |= {
            id(b) for name in formats for part in _PARTS if (b := self._buffers.get(f"{name}_{part}")) is not None
        }

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if id(tensor) not in fixed or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        self._matrices.clear()
        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        hidden_states_scale: torch.Tensor | None = None,
        dtype: torch.dtype | None = None,
        lora: LoRA | None = None,
        adapter_ids: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the experts; equation and types: :func:`fusedmoe.fused_experts`.

        Args:
            hidden_states: [..., H].
            topk_weights: [..., top_k], or [T, top_k] with T the product of the leading dimensions.
            topk_ids: as topk_weights.
            hidden_states_scale: of hidden states that are codes: as fused_experts takes it, or [..., groups].
            dtype: type of the layer when hidden states are codes.
            lora: adapters, see :class:`fusedmoe.LoRA`.
            adapter_ids: [...] or [T], the slot in lora of each token's adapter, -1 for none.
            out: [..., H], where the result goes; allocated when None.

        Returns:
            [..., H].

        Raises:
            ShapeError: leading dimensions of the arguments differ.
            LayoutError: the leading dimensions of out cannot be flattened without a copy.
            Others as :func:`fusedmoe.fused_experts`, GradientError among them.
        """
        scale = hidden_states_scale
        for name, tensor, needed in (
            ("hidden_states", hidden_states, True),
            ("topk_weights", topk_weights, True),
            ("topk_ids", topk_ids, True),
            ("hidden_states_scale", scale, False),
            ("out", out, False),
        ):
            if needed or tensor is not None:
                require_tensor(name, tensor)
        lead = hidden_states.shape[:-1]
        tokens = math.prod(lead)
        for name, tensor in (("topk_weights", topk_weights), ("topk_ids", topk_ids), ("out", out)):
            if tensor is None or tensor.shape[:-1] == lead:
                continue
            if name == "out" or tensor.shape[:-1] != (tokens,):
                raise ShapeError(
                    explain(
                        f"leading dimensions of {name}",
                        got=tuple(tensor.shape),
                        wanted=f"{(*lead, '...')}, as hidden_states {tuple(hidden_states.shape)}",
                        do="Give all arguments the same leading dimensions.",
                    )
                )
        if scale is not None and scale.dim() > 2 and scale.shape[:-1] == lead:
            scale = scale.reshape(tokens, -1)
        result = fused_experts(
            hidden_states.reshape(tokens, *hidden_states.shape[-1:]),
            self._matrix("w13"),
            self._matrix("w2"),
            topk_weights.reshape(tokens, *topk_weights.shape[-1:]),
            topk_ids.reshape(tokens, *topk_ids.shape[-1:]),
            hidden_states_scale=scale,
            dtype=dtype,
            emulate=self.emulate,
            batch_invariant=self.batch_invariant,
            activation=self.activation,
            gate_up_layout=self.gate_up_layout,
            weight_layout=self.weight_layout,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
            expert_map=self.expert_map,
            lora=lora,
            adapter_ids=None if adapter_ids is None else adapter_ids.reshape(-1),
            backend=self.backend,
            out=None if out is None else _flat(out, tokens),
        )
        return result.view(hidden_states.shape) if out is None else out

    def extra_repr(self) -> str:
        """Sizes, then the options that are not the defaults."""
        parts = [f"{self.num_experts}, {self.hidden_size}, {self.intermediate_size}, activation={self.activation}"]
        for name, default in (
            ("gate_up_layout", "concatenated"),
            ("weight_layout", "NK"),
            ("apply_router_weight_on_input", False),
            ("emulate", False),
            ("batch_invariant", None),
            ("backend", None),
        ):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        parts += [] if self.expert_map is None else [f"of {self.expert_map.shape[0]} experts"]
        parts += [f"bias={self.w13_bias is not None or self.w2_bias is not None}"]
        formats = self._formats()
        parts += [f"{name}={form}" for name, (form, _) in formats.items()]
        parts += [f"dtype={getattr(self, name).dtype}" for name in ("w13", "w2") if name not in formats][:1]
        return ", ".join(parts)


#: Types that weights may be held in; float64 is not one that a layer computes in, but may be cast.
FLOATS = tuple(checkpoint.files.FLOATS.values())
#: Sizes below it make no address that 64 bits cannot hold.
LARGEST = 2**20
#: Tensors of an ExpertMatrix beside its codes.
_PARTS = ("scale", "zero", "tensor_scale", "input_scale")


class _Formats(torch.nn.Module):
    """Formats of w13 and w2 as extra state; a tensor, as files of tensors hold nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, tuple[Format, int]] = {}

    def get_extra_state(self) -> torch.Tensor:
        """JSON as bytes."""
        said = {name: {**asdict(form), "parts": parts} for name, (form, parts) in self.of.items()}
        return torch.tensor(list(json.dumps(said, sort_keys=True).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Compare."""
        own = json.loads(bytes(self.get_extra_state().tolist()))
        try:
            got = json.loads(bytes(state.tolist()))
        except (AttributeError, RecursionError, RuntimeError, TypeError, ValueError):
            got = repr(state)
        if got != own:
            do = "Load it into a layer that was made from matrices of the same formats."
            raise OptionError(explain("formats of quantised experts in a state dict", got=got, wanted=own, do=do))


def require_tensor(name: str, value: object) -> None:
    """Raise DTypeError or LayoutError unless it is a dense tensor."""
    if not isinstance(value, torch.Tensor):
        got, do = type(value).__name__, "Convert it with torch.as_tensor."
        raise DTypeError(explain(name, got=got, wanted="a torch.Tensor", do=do))
    if value.layout != torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else str(value.layout)
        raise LayoutError(explain(name, got=got, wanted="a dense tensor", do=f"Call {name}.to_dense()."))


def _require_float(name: str, value: Any) -> None:
    if value.dtype not in FLOATS:
        do = "Quantised experts are a fusedmoe.ExpertMatrix, which has their scales."
        raise DTypeError(explain(name, got=value.dtype, wanted=" or ".join(map(str, FLOATS)), do=do))


def _check_storage(dtype: object, device: Any, expert_map: object) -> None:
    """Where and as what parameters are made."""
    if dtype is not None and dtype not in FLOATS:
        do = "Quantised layers are made by FusedExperts.of."
        raise DTypeError(explain("dtype", got=repr(dtype), wanted=" or ".join(map(str, FLOATS)), do=do))
    if device is not None:
        device_of(device)
    if expert_map is not None:
        require_tensor("expert_map", expert_map)


def _flat(out: torch.Tensor, tokens: int) -> torch.Tensor:
    """View out [..., H] as [T, H]; a copy would take the result and lose it."""
    try:
        return out.view(tokens, *out.shape[-1:])
    except RuntimeError as error:
        raise LayoutError(
            explain(
                "out",
                got=f"shape {tuple(out.shape)} with strides {out.stride()}",
                wanted="leading dimensions that can be flattened without a copy",
                do="Pass a contiguous out.",
            )
        ) from error
