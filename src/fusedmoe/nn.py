"""The experts of a mixture-of-experts layer as a :class:`torch.nn.Module`."""

from __future__ import annotations

import math
import os

import torch

from fusedmoe.checkpoint import read_experts
from fusedmoe.errors import LayoutError, OptionError, ShapeError, explain
from fusedmoe.functional import fused_experts
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GATE_UP_LAYOUTS, WEIGHT_LAYOUTS, GateUpLayout, WeightLayout

__all__ = ["FusedExperts"]


class FusedExperts(torch.nn.Module):
    """Experts that hold their weights; computes what :func:`fusedmoe.fused_experts` computes.

    For inference only: the parameters are created with ``requires_grad=False``, because the kernels have no
    backward, and a layer that detached its output without a word would train the rest of a model on wrong
    gradients. With gradients on and an input or a parameter that requires one, forward raises GradientError.

    Attributes:
        w13: [E, 2I, H] ([E, I, H] when the activation is not gated); [E, H, 2I] with weight_layout "KN".
        w2: [E, H, I]; [E, I, H] with weight_layout "KN".
        w13_bias: [E, 2I] ([E, I] when not gated) with ``bias=True``, else None.
        w2_bias: [E, H] with ``bias=True``, else None.

    >>> layer = FusedExperts(8, 64, 32, device="meta")
    >>> tuple(layer.w13.shape), tuple(layer.w2.shape)
    ((8, 64, 64), (8, 64, 32))
    """

    w13: torch.nn.Parameter
    w2: torch.nn.Parameter
    w13_bias: torch.nn.Parameter | None
    w2_bias: torch.nn.Parameter | None

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
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """Allocate the parameters and initialise them as :class:`torch.nn.Linear` does.

        Args:
            num_experts, hidden_size, intermediate_size: E, H and I.
            activation, gate_up_layout, weight_layout, apply_router_weight_on_input, backend: options of
                :func:`fusedmoe.fused_experts`.
            bias: have w13_bias and w2_bias.
            dtype, device: of the parameters; the defaults of torch when None, so that
                ``with torch.device("meta")`` works.

        Raises:
            ShapeError: a size is not an integer above 0.
            OptionError: an unknown activation or layout.
        """
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ShapeError(explain(name, got=repr(size), wanted="an integer above 0", do="Pass the true size."))
        for name, layout, known in (
            ("gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS),
            ("weight_layout", weight_layout, WEIGHT_LAYOUTS),
        ):
            if layout not in known:
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
        self.backend = backend

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        rows = intermediate_size * (2 if self.activation.gated else 1)
        shapes = [(rows, hidden_size), (hidden_size, intermediate_size)]
        w13, w2 = shapes if weight_layout == "NK" else [shape[::-1] for shape in shapes]
        self.w13 = parameter(num_experts, *w13)
        self.w2 = parameter(num_experts, *w2)
        self.register_parameter("w13_bias", parameter(num_experts, rows) if bias else None)
        self.register_parameter("w2_bias", parameter(num_experts, hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from U(-b, b), b = 1 / sqrt(K), with K = H for w13 and I for w2."""
        for parameters, inner in (
            ((self.w13, self.w13_bias), self.hidden_size),
            ((self.w2, self.w2_bias), self.intermediate_size),
        ):
            bound = 1 / math.sqrt(inner)
            for parameter in parameters:
                if parameter is not None:
                    torch.nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | os.PathLike[str],
        layer: int,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        backend: str | None = None,
    ) -> FusedExperts:
        """Read the routed experts of one layer of a Hugging Face checkpoint.

        Args and errors: see :func:`fusedmoe.checkpoint.read_experts`. The tensors that were read become the
        parameters, without another copy.
        """
        stored = read_experts(directory, layer, dtype=dtype, device=device)
        hidden, intermediate = stored.w2.shape[1:] if stored.weight_layout == "NK" else stored.w2.shape[:0:-1]
        experts = cls(
            stored.w2.shape[0],
            hidden,
            intermediate,
            activation=stored.activation,
            gate_up_layout=stored.gate_up_layout,
            weight_layout=stored.weight_layout,
            apply_router_weight_on_input=stored.apply_router_weight_on_input,
            backend=backend,
            device="meta",
        )
        for name in ("w13", "w2", "w13_bias", "w2_bias"):
            tensor = getattr(stored, name)
            parameter = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
            experts.register_parameter(name, parameter)
        return experts

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the experts; equation and types: :func:`fusedmoe.fused_experts`.

        Args:
            hidden_states: [..., H].
            topk_weights: [..., top_k], or [T, top_k] with T the product of the leading dimensions.
            topk_ids: as topk_weights.
            out: [..., H], where the result goes; allocated when None.

        Returns:
            [..., H].

        Raises:
            ShapeError: leading dimensions of the arguments differ.
            LayoutError: the leading dimensions of out cannot be flattened without a copy.
            Others as :func:`fusedmoe.fused_experts`, GradientError among them.
        """
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
        result = fused_experts(
            hidden_states.reshape(tokens, *hidden_states.shape[-1:]),
            self.w13,
            self.w2,
            topk_weights.reshape(tokens, *topk_weights.shape[-1:]),
            topk_ids.reshape(tokens, *topk_ids.shape[-1:]),
            activation=self.activation,
            gate_up_layout=self.gate_up_layout,
            weight_layout=self.weight_layout,
            w13_bias=self.w13_bias,
            w2_bias=self.w2_bias,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
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
            ("backend", None),
        ):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join([*parts, f"bias={self.w13_bias is not None}", f"dtype={self.w13.dtype}"])


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
