"""Tensor parallelism: every rank holds a slice of the intermediate of every expert, and outputs are added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fusedmoe.errors import DTypeError, OptionError, ShapeError, UnsupportedError, explain
from fusedmoe.lora import Adapter, LoRA
from fusedmoe.modular import Experts
from fusedmoe.nn import FusedExperts, require_tensor
from fusedmoe.parallel.control import Control, group_of, said
from fusedmoe.parallel.experts import ExpertParallel
from fusedmoe.spec.layout import GATE_UP_LAYOUTS


class TensorParallel:
    """The layer on a slice of the intermediate, and an all-reduce.

    With I_r the columns of rank r, of w2 and of what the activation returns::

        out = sum over r of  round(sum_j w[j] * w2[:, I_r] @ f(w13[I_r] @ x))

    Each rank rounds its part to the type of the layer, and the all-reduce adds in that type. ``w2_bias`` may be on
    one rank alone: ``FusedExperts.from_checkpoint(..., intermediate=(start, stop))`` and :func:`intermediate_slice`
    leave it with the slice that starts at 0. Every rank calls it with the same tokens, and with the same adapters of
    theirs, each cut like the layer.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        layer: Experts | FusedExperts | Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """Take the layer on this rank's slice: experts, or an ExpertParallel over another dimension of a mesh."""
        self.group = group_of(group)
        self.control = Control(self.group)
        self.layer = Experts.of(layer) if isinstance(layer, Experts | FusedExperts) else layer

    def __call__(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        lora: LoRA | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Tensor:
        """[T, H], the same on all ranks.

        Args:
            hidden_states, topk_weights, topk_ids, adapter_ids: as :func:`fusedmoe.fused_experts` takes them.
            lora: slots for this rank's slice, filled with what :func:`intermediate_slice` cuts from adapters.

        Raises:
            UnsupportedError: adapters for a function of the caller's, that knows none.
            ParallelError: another rank failed, or did not answer within the timeout of the group.
            Others as :func:`fusedmoe.fused_experts`, on the rank where it happens.
        """
        error: Exception | None = None
        output = hidden_states
        try:
            output = self._mine(hidden_states, topk_weights, topk_ids, lora, adapter_ids)
        except Exception as cause:  # noqa: BLE001 - told to the other ranks, then raised
            error = cause
        if not (output.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.control.agree(error, "running the experts")
        elif error is not None:
            raise error
        with said("all-reduce"):
            dist.all_reduce(output, group=self.group)
        return output

    def _mine(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        lora: LoRA | None,
        adapter_ids: Tensor | None,
    ) -> Tensor:
        """This rank's part of the sum."""
        require_tensor("hidden_states", hidden_states)
        if isinstance(self.layer, Experts):
            output = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
            return self.layer.apply(output, hidden_states, topk_weights, topk_ids, lora=lora, adapter_ids=adapter_ids)
        if isinstance(self.layer, ExpertParallel):
            return self.layer(hidden_states, topk_weights, topk_ids, lora=lora, adapter_ids=adapter_ids)
        if lora is not None and adapter_ids is not None:
            got, wanted = type(self.layer).__name__, "experts, or an ExpertParallel made with adapters=True"
            do = "Give it one of these, or merge the adapters into the weights."
            raise UnsupportedError(explain("layer of TensorParallel with lora", got=got, wanted=wanted, do=do))
        return self.layer(hidden_states, topk_weights, topk_ids)


@overload
def intermediate_slice(layer: Experts, start: int, stop: int) -> Experts: ...
@overload
def intermediate_slice(layer: Adapter, start: int, stop: int, *, gate_up_layout: str | None = None) -> Adapter: ...
def intermediate_slice(
    layer: Experts | Adapter, start: int, stop: int, *, gate_up_layout: str | None = None
) -> Experts | Adapter:
    """Unquantised experts, or an adapter of any, of the columns ``start .. stop`` of the intermediate.

    Copies gate and up rows, nothing else. Of an adapter, w2_b and A of w13 are those of every slice.

    Args:
        layer: what to cut.
        start, stop: columns of w2.
        gate_up_layout: of the adapter's w13_b: that of the layer, "concatenated" when None; experts know their own.

    Raises:
        ShapeError: the slice is empty or outside, or the experts are quantised: readers of checkpoints slice those.
        DTypeError: layer is neither experts nor an adapter.
        OptionError: gate_up_layout is none, or given with experts.
    """
    if not isinstance(layer, (Experts, Adapter)):
        got, wanted = type(layer).__name__, "fusedmoe.modular.Experts, or an Adapter"
        raise DTypeError(explain("layer to slice", got=got, wanted=wanted, do="Call modular.Experts.of(layer)."))
    if gate_up_layout not in ((None,) if isinstance(layer, Experts) else (None, *GATE_UP_LAYOUTS)):
        wanted = "that of the experts" if isinstance(layer, Experts) else f"one of {GATE_UP_LAYOUTS}"
        do = "Leave it out." if isinstance(layer, Experts) else "Say what the layer has."
        raise OptionError(explain("gate_up_layout", got=repr(gate_up_layout), wanted=wanted, do=do))
    if isinstance(layer, Adapter):
        cut = _Cut(start, stop, layer.w2_a.shape[2], gate_up_layout)
        w13_b, w2_a = cut.rows(layer.w13_b), cut.columns(layer.w2_a)
        return Adapter(w13_a=layer.w13_a, w13_b=w13_b, w2_a=w2_a, w2_b=layer.w2_b, scaling=layer.scaling)
    options, w13, w2 = dict(layer.options), layer.w13, layer.w2
    if not isinstance(w13, Tensor) or not isinstance(w2, Tensor):
        do = "Read the slice: FusedExperts.from_checkpoint(..., intermediate=(start, stop))."
        raise ShapeError(explain("intermediate_slice", got="quantised experts", wanted="tensors", do=do))
    stored = options.get("weight_layout", "NK")
    if stored == "KN":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    cut = _Cut(start, stop, w2.shape[2], options.get("gate_up_layout"))
    if (bias := options.get("w13_bias")) is not None:
        options["w13_bias"] = cut.rows(bias)
    if start:
        options["w2_bias"] = None
    parts = cut.rows(w13), cut.columns(w2)
    if stored == "KN":
        parts = parts[0].transpose(1, 2), parts[1].transpose(1, 2)
    return Experts(*parts, backend=layer.backend, workspace_limit=layer.workspace_limit, **options)


class _Cut:
    """Columns ``start .. stop`` of an intermediate of ``size``."""

    def __init__(self, start: int, stop: int, size: int, gate_up_layout: str | None) -> None:
        if not all(isinstance(end, int) for end in (start, stop)) or not 0 <= start < stop <= size:
            do = "Divide I among the ranks."
            raise ShapeError(explain("intermediate_slice", got=(start, stop), wanted=f"within 0 .. {size}", do=do))
        self.start, self.stop, self.size, self.gate_up_layout = start, stop, size, gate_up_layout

    def columns(self, x: Tensor) -> Tensor:
        """Of w2 [E, H, I], or of what else has I last."""
        return x[:, :, self.start : self.stop]

    def rows(self, x: Tensor) -> Tensor:
        """Of w13 [E, 2I or I, H], or of what else has its rows second."""
        start, stop, size = self.start, self.stop, self.size
        if x.shape[1] == size:
            return x[:, start:stop]
        if self.gate_up_layout == "interleaved":
            return x[:, 2 * start : 2 * stop]
        return torch.cat((x[:, start:stop], x[:, size + start : size + stop]), 1)
