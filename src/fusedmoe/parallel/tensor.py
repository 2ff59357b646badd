"""Tensor parallelism: every rank holds a slice of the intermediate of every expert, and outputs are added up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fusedmoe.errors import ShapeError, explain
from fusedmoe.modular import Experts, Standard, run
from fusedmoe.nn import FusedExperts
from fusedmoe.parallel.control import Control, group_of, said


class TensorParallel:
    """The layer on a slice of the intermediate, and an all-reduce.

    With I_r the columns of rank r, of w2 and of what the activation returns::

        out = sum over r of  round(sum_j w[j] * w2[:, I_r] @ f(w13[I_r] @ x))

    Each rank rounds its part to the type of the layer, and the all-reduce adds in that type. ``w2_bias`` may be on
    one rank alone: ``FusedExperts.from_checkpoint(..., intermediate=(start, stop))`` and :func:`intermediate_slice`
    leave it with the slice that starts at 0. Every rank calls it with the same tokens.
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

    def __call__(self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """[T, H], the same on all ranks.

        Raises:
            ParallelError: another rank failed, or did not answer within the timeout of the group.
            Others as :func:`fusedmoe.fused_experts`, on the rank where it happens.
        """
        error: Exception | None = None
        output = hidden_states
        try:
            if isinstance(self.layer, Experts):
                output = run(Standard(), self.layer, hidden_states, topk_weights, topk_ids)
            else:
                output = self.layer(hidden_states, topk_weights, topk_ids)
        except Exception as cause:  # noqa: BLE001 - told to the other ranks, then raised
            error = cause
        if not (output.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.control.agree(error, "running the experts")
        elif error is not None:
            raise error
        with said("all-reduce"):
            dist.all_reduce(output, group=self.group)
        return output


def intermediate_slice(layer: Experts, start: int, stop: int) -> Experts:
    """Unquantised experts of the columns ``start .. stop`` of the intermediate; copies gate and up rows, nothing else.

    Raises:
        ShapeError: the slice is empty or outside, or the experts are quantised: readers of checkpoints slice those.
    """
    options, w13, w2 = dict(layer.options), layer.w13, layer.w2
    if not isinstance(w13, Tensor) or not isinstance(w2, Tensor):
        do = "Read the slice: FusedExperts.from_checkpoint(..., intermediate=(start, stop))."
        raise ShapeError(explain("intermediate_slice", got="quantised experts", wanted="tensors", do=do))
    stored = options.get("weight_layout", "NK")
    if stored == "KN":
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    size = w2.shape[2]
    if not all(isinstance(end, int) for end in (start, stop)) or not 0 <= start < stop <= size:
        do = "Divide I among the ranks."
        raise ShapeError(explain("intermediate_slice", got=(start, stop), wanted=f"within 0 .. {size}", do=do))

    def rows(x: Tensor) -> Tensor:
        if x.shape[1] == size:
            return x[:, start:stop]
        if options.get("gate_up_layout") == "interleaved":
            return x[:, 2 * start : 2 * stop]
        return torch.cat((x[:, start:stop], x[:, size + start : size + stop]), 1)

    if (bias := options.get("w13_bias")) is not None:
        options["w13_bias"] = rows(bias)
    if start:
        options["w2_bias"] = None
    parts = rows(w13), w2[:, :, start:stop]
    if stored == "KN":
        parts = parts[0].transpose(1, 2), parts[1].transpose(1, 2)
    return Experts(*parts, backend=layer.backend, workspace_limit=layer.workspace_limit, **options)
