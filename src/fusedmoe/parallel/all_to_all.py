"""Dispatch and combine by all-to-all of torch.distributed: NCCL on GPUs, gloo on CPUs.

Rows for a rank go there once, however many of its experts their token chose, with the places of all of the token's
experts and its router weights; what belongs to other ranks the receiver's expert map makes absent. Each rank answers
with one row per row, the weighted sum over its own experts in the type of the layer, and a token's answers are added in
float32 in the order of its first slot for each rank, and rounded once::

    out[t] = sum over ranks r of  round(sum over slots j with an expert on r of w[t, j] * y[t, j])

Exact: ranks first tell each other how many rows come, which the host reads; only those travel. Padded, with a capacity:
every rank has room for all tokens of every other, nothing is read on the host, all shapes are fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fusedmoe.backends.base import Rows, Sends, Transit
from fusedmoe.errors import DeviceError, DTypeError, GradientError, OptionError, ShapeError, explain
from fusedmoe.modular import Experts, Prepared
from fusedmoe.parallel.control import Control, said
from fusedmoe.parallel.placement import Placement
from fusedmoe.parallel.wire import Wire


@dataclass
class Part:
    """Some of the tokens of a call, on their way."""

    hidden_states: Tensor
    topk_weights: Tensor
    adapter_ids: Tensor | None
    sends: Sends
    sent: list[int] | None = None  #      rows for each rank; None: the capacity
    received: list[int] | None = None  #  rows of each rank
    messages: Tensor | None = None
    answers: Tensor | None = None
    kept: list[Any] = field(default_factory=list)  # what a transfer still reads
    work: dist.Work | None = None


class AllToAll:
    """The first and the last step of the layer, for :func:`fusedmoe.modular.run`.

    Here a rank whose experts fail leaves the others to their timeout; :class:`fusedmoe.parallel.ExpertParallel`, which
    makes one of these (``.transport``), tells them.
    """

    def __init__(
        self,
        group: ProcessGroup,
        control: Control,
        placement: Placement,
        wire: Wire,
        *,
        kernels: Transit,
        static: Tensor | None = None,
        max_tokens: int | None = None,
        parts: int = 1,
        device: torch.device | None = None,
    ) -> None:
        """What all ranks have agreed on.

        Args:
            group: of the data.
            control: beside it.
            placement: of the experts.
            wire: form of a row.
            kernels: what a backend does to rows.
            static: scale of rows, where the scheme has it.
            max_tokens: most tokens of a rank, for the padded mode.
            parts: into which they are split.
            device: of the rows.
        """
        self.group, self.control, self.placement, self.wire = group, control, placement, wire
        self.kernels, self.static, self.max_tokens = kernels, static, max_tokens
        self.capacity = None if max_tokens is None else -(-max_tokens // parts)
        self.rank, self.ranks = control.rank, control.ranks
        self.device = device or torch.device("cpu")
        self.table = placement.table(self.device)
        self.expert_map = placement.expert_map(self.rank, self.device)

    # --- steps, each for one part of the tokens -------------------------------------------------------------------

    def check(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        out: Tensor | None = None,
        adapter_ids: Tensor | None = None,
    ) -> None:
        """Arguments that every rank can send.

        Raises:
            ShapeError, DTypeError, DeviceError, GradientError: one does not fit.
            OptionError: more tokens than max_tokens, or adapters that do not travel.
        """
        wire = self.wire
        tensors = {"hidden_states": hidden_states, "topk_weights": topk_weights, "topk_ids": topk_ids}
        given = {name: tensor for name, tensor in (("out", out), ("adapter_ids", adapter_ids)) if tensor is not None}
        for name, tensor in {**tensors, **given}.items():
            if not isinstance(tensor, Tensor):
                got = type(tensor).__name__
                raise DTypeError(explain(name, got=got, wanted="a torch.Tensor", do="Convert it."))
            if tensor.device != self.device:
                raise DeviceError(explain(name, got=tensor.device, wanted=self.device, do="Move it there."))
        if hidden_states.dim() != 2 or hidden_states.shape[1] != wire.hidden:
            do = "Flatten leading dimensions."
            form = f"[T, {wire.hidden}]"
            raise ShapeError(explain("hidden_states", got=tuple(hidden_states.shape), wanted=form, do=do))
        if hidden_states.dtype != wire.dtype:
            do = "Cast them, or say dtype= when the layer is made."
            raise DTypeError(explain("hidden_states", got=hidden_states.dtype, wanted=wire.dtype, do=do))
        shape = (hidden_states.shape[0], wire.top_k)
        for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            if tuple(tensor.shape) != shape:
                do = "Pass what the router returned for these tokens."
                raise ShapeError(explain(name, got=tuple(tensor.shape), wanted=shape, do=do))
        if adapter_ids is not None and not wire.adapters:
            got, do = "rows that travel without them", "Make ExpertParallel with adapters=True, on all ranks."
            raise OptionError(explain("adapter_ids", got=got, wanted="a layer made for adapters", do=do))
        if adapter_ids is not None and tuple(adapter_ids.shape) != shape[:1]:
            do = "Give one for each token, -1 for none."
            raise ShapeError(explain("adapter_ids", got=tuple(adapter_ids.shape), wanted=shape[:1], do=do))
        for name, ids in (("topk_ids", topk_ids), ("adapter_ids", adapter_ids)):
            if ids is not None and ids.dtype not in (torch.int32, torch.int64):
                do = "Cast them to int32."
                raise DTypeError(explain(name, got=ids.dtype, wanted="int32 or int64", do=do))
        if not topk_weights.is_floating_point():
            do = "Cast them to float32."
            raise DTypeError(explain("topk_weights", got=topk_weights.dtype, wanted="a float type", do=do))
        if out is not None and (out.shape, out.dtype) != (hidden_states.shape, wire.dtype):
            got, wanted = f"{tuple(out.shape)} {out.dtype}", f"{tuple(hidden_states.shape)} {wire.dtype}"
            raise ShapeError(explain("out", got=got, wanted=wanted, do="Allocate torch.empty_like(hidden_states)."))
        if torch.is_grad_enabled() and (hidden_states.requires_grad or topk_weights.requires_grad):
            do = "Call it under torch.no_grad() or torch.inference_mode()."
            raise GradientError(explain("an argument that requires grad", got="grad mode", wanted="inference", do=do))
        if self.max_tokens is not None and shape[0] > self.max_tokens:
            got, wanted = f"{shape[0]} tokens", f"at most max_tokens = {self.max_tokens}"
            raise OptionError(explain("hidden_states", got=got, wanted=wanted, do="Raise max_tokens on all ranks."))

    def layout(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, adapter_ids: Tensor | None = None
    ) -> Part:
        """Decide which token goes where."""
        if self.wire.adapters and adapter_ids is None:
            adapter_ids = topk_ids.new_full(topk_ids.shape[:1], -1)
        sends = self.kernels.sends(topk_ids, self.table, self.rank, self.capacity)
        return Part(hidden_states, topk_weights, adapter_ids, sends)

    def blank(self) -> Part:
        """No tokens, for a rank that has to take part in what it cannot do."""
        wire = self.wire
        x = torch.empty(0, wire.hidden, dtype=wire.dtype, device=self.device)
        empty = torch.empty(0, wire.top_k, device=self.device)
        return self.layout(x, empty, empty.int())

    def exchange_counts(self, parts: list[Part], n_parts: int, error: BaseException | None = None) -> None:
        """How many rows come from where: a collective that the host waits for. Padded: nothing to do.

        Raises:
            ParallelError: a rank has failed. The error itself, where this one has.
        """
        if self.capacity is not None:
            return
        doing = "preparing the dispatch"
        if error is None:
            counts = torch.stack([part.sends.counts for part in parts], 1)
        else:
            counts = torch.full((self.ranks, n_parts), -1, dtype=torch.int64, device=self.device)
        others = torch.empty_like(counts)
        with self.control.unless(error), said("exchange of row counts"):
            dist.all_to_all_single(others, counts, group=self.group)
            both = torch.stack((counts, others)).tolist()
        if error is not None or any(count < 0 for row in both[1] for count in row):
            self.control.tell(error, doing)
        for number, part in enumerate(parts):
            part.sent, part.received = ([row[number] for row in side] for side in both)

    def send(self, part: Part) -> None:
        """Start the rows on their way."""
        wire, sends = self.wire, part.sends
        x, scale = part.hidden_states, None
        if wire.inputs is not None:
            x, scale = self.kernels.encode(x, wire.inputs, self.static)
        n_rows = sends.token.shape[0] if part.sent is None else sum(part.sent)
        messages = torch.empty(n_rows, wire.row_bytes, dtype=torch.uint8, device=self.device)
        self.kernels.pack(*(x, scale, part.topk_weights, part.adapter_ids), sends, self.capacity, wire.views(messages))
        n_received = n_rows if part.received is None else sum(part.received)
        part.messages = messages.new_empty(n_received, wire.row_bytes)
        part.kept = [messages]
        with said("dispatch"):
            part.work = dist.all_to_all_single(
                part.messages, messages, part.received, part.sent, group=self.group, async_op=True
            )

    def receive(self, part: Part) -> Rows:
        """The rows of all ranks for this one's experts."""
        assert part.messages is not None and part.work is not None, "sent"
        with said("dispatch"):
            part.work.wait()
        part.kept = []
        return self.wire.views(part.messages)

    def send_back(self, part: Part, output: Tensor) -> None:
        """Start the answers on their way."""
        n_rows = part.sends.token.shape[0] if part.sent is None else sum(part.sent)
        part.answers = output.new_empty(n_rows, self.wire.hidden)
        part.kept = [output]
        with said("combine"):
            part.work = dist.all_to_all_single(
                part.answers.view(torch.uint8),
                output.view(torch.uint8),
                part.sent,
                part.received,
                group=self.group,
                async_op=True,
            )

    def reduce(self, part: Part, out: Tensor) -> Tensor:
        """The sum of a token's answers."""
        assert part.answers is not None and part.work is not None, "sent back"
        with said("combine"):
            part.work.wait()
        part.kept = []
        return self.kernels.reduce(part.answers, part.sends.answer, None, out)

    # --- the protocol of fusedmoe.modular -------------------------------------------------------------------------

    def prepare(self, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Prepared:
        """Quantise and dispatch."""
        self.check(hidden_states, topk_weights, topk_ids)
        part = self.layout(hidden_states, topk_weights, topk_ids)
        self.exchange_counts([part], 1)
        self.send(part)
        return self.prepared(part)

    def prepared(self, part: Part) -> Prepared:
        """What was received, as the experts take it."""
        rows = self.receive(part)
        return Prepared(
            *(rows.hidden_states, rows.weights, rows.places, rows.scale),
            expert_map=self.expert_map,
            dtype=self.wire.dtype,
            state=part,
        )

    def finalize(self, output: Tensor, prepared: Prepared) -> Tensor:
        """Combine."""
        part: Part = prepared.state
        self.send_back(part, output)
        return self.reduce(part, torch.empty_like(part.hidden_states))
