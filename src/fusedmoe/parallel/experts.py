"""Expert parallelism: every rank holds some of the experts, tokens go where theirs are."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fusedmoe.errors import OptionError, ShapeError, UnsupportedError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
from fusedmoe.modular import Experts, transit_of
from fusedmoe.nn import FusedExperts
from fusedmoe.parallel.all_to_all import AllToAll, Part
from fusedmoe.parallel.control import Control, group_of
from fusedmoe.parallel.placement import Placement
from fusedmoe.parallel.wire import Wire
from fusedmoe.spec.format import Inputs


class ExpertParallel:
    """The whole layer on every rank, with the experts of all ranks; see :mod:`fusedmoe.parallel.all_to_all`.

    Every rank calls it with tokens of its own, as many as it has, none at all too, and gets their outputs. Making one
    and calling it are collectives: all ranks of the group take part, with calls in the same order.
    """

    def __init__(
        self,
        group: ProcessGroup | DeviceMesh | None,
        layer: Experts | FusedExperts | None,
        *,
        top_k: int,
        placement: Placement | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_tokens: int | None = None,
        parts: int = 1,
        adapters: bool = False,
    ) -> None:
        """Agree with the other ranks.

        Args:
            group: a process group, a mesh of one dimension, or None for all ranks.
            layer: this rank's experts, in the order that the placement says; None where it has none.
            top_k: experts of a token.
            placement: None: contiguous, in runs as long as each rank has experts.
            dtype: of hidden states; None: of w13, or bfloat16 where it is quantised.
            device: of hidden states where there are no experts; None: the current CUDA device if there is one.
            max_tokens: most tokens of a rank in a call: the padded mode, in which nothing is read on the host and all
                shapes are fixed, so that a call can be captured in a CUDA graph; None: the exact mode.
            parts: split the tokens of a call so that the experts of one part work while another one travels.
            adapters: calls may have adapters: the slot of each token's travels with it, and hidden states travel
                unquantised, which is what adapters multiply.

        Raises:
            OptionError, ShapeError: ranks do not fit together; on all of them.
            UnsupportedError: the scheme has one scale for all rows of a call, which no rank knows.
            ParallelError: a rank did not answer.
        """
        self.group = group_of(group)
        self.control = Control(self.group)
        self.layer: Experts | None = None
        self.parts, self.max_tokens, self.adapters = parts, max_tokens, bool(adapters)
        error: Exception | None = None
        try:
            self.layer = None if layer is None else Experts.of(layer)
            mine = self._mine(top_k, placement, dtype)
        except Exception as cause:  # noqa: BLE001 - told to the other ranks, then raised
            error, mine = cause, None
        everyone = self.control.gather((mine, None if error is None else f"{type(error).__name__}: {error}"))
        if any(failed is not None for _, failed in everyone):
            self.control.tell(error, "making ExpertParallel")
        wire, static, placement = _agreed([facts for facts, _ in everyone])
        self.device = torch.device(device) if device is not None else _device(self.layer)
        self.transport = AllToAll(
            *(self.group, self.control, placement, wire),
            kernels=transit_of(self.device) if self.layer is None else self.layer.kernels(),
            static=None if static is None else torch.tensor([static], device=self.device),
            max_tokens=max_tokens,
            parts=parts,
            device=self.device,
        )

    def _mine(self, top_k: int, placement: Placement | None, dtype: torch.dtype | None) -> dict[str, object]:
        """What the other ranks want to know."""
        for name, value in (("top_k", top_k), ("parts", self.parts), ("max_tokens", self.max_tokens)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                do = "See ExpertParallel."
                raise OptionError(explain(name, got=repr(value), wanted="an integer above 0", do=do))
        facts: dict[str, object] = {"top_k": top_k, "parts": self.parts, "max_tokens": self.max_tokens}
        facts["adapters"] = self.adapters
        facts |= {"placement": placement, "experts": 0, "hidden": None, "inputs": None, "static": None, "dtype": dtype}
        if placement is not None and placement.ranks != self.control.ranks:
            got, wanted = f"{placement.ranks} ranks", f"{self.control.ranks}, those of the group"
            raise OptionError(explain("placement", got=got, wanted=wanted, do="Place experts on every rank."))
        layer, count = self.layer, 0
        if layer is not None:
            count, w13 = layer.num_experts, layer.w13
            plain = None if isinstance(w13, ExpertMatrix) else w13.dtype
            static = w13.input_scale if isinstance(w13, ExpertMatrix) else None
            formats = [w.format for w in (w13, layer.w2) if isinstance(w, ExpertMatrix)]
            if any(form.inputs is not None and form.inputs.mode == "tensor" for form in formats):
                got, wanted = "one scale for all rows of a call", "a scale per row, which each rank can compute alone"
                do = "Make the matrices with ExpertMatrix(..., inputs='token'), or 'static'."
                raise UnsupportedError(explain("rows of the scheme", got=got, wanted=wanted, do=do))
            facts |= {"experts": count, "hidden": layer.hidden_size, "dtype": dtype or plain or torch.bfloat16}
            facts |= {"inputs": layer.inputs, "static": None if static is None else float(static)}
        if placement is not None and count != len(placement.experts[self.control.rank]):
            wanted = f"{len(placement.experts[self.control.rank])}, as the placement has for rank {self.control.rank}"
            raise ShapeError(explain("layer", got=f"{count} experts", wanted=wanted, do="Slice the weights so."))
        return facts

    def __call__(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *,
        lora: LoRA | None = None,
        adapter_ids: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run the layer: as :func:`fusedmoe.fused_experts` on the tokens of this rank with the experts of all.

        Args:
            hidden_states: [T, H] of this rank.
            topk_weights, topk_ids: [T, top_k]; ids among all experts, an id outside adds nothing.
            lora: adapters of this rank's experts (:meth:`fusedmoe.Adapter.of_experts`), in the same slots on all ranks.
            adapter_ids: [T] of this rank's tokens, as :func:`fusedmoe.fused_experts` takes them.
            out: [T, H], written and returned.

        Raises:
            OptionError: adapter_ids for a layer that was made without adapters.
            ParallelError: another rank failed, or did not answer within the timeout of the group.
            Others as fused_experts, on the rank where it happens.
        """
        gradients = torch.is_grad_enabled()
        with torch.no_grad():
            return self._run(hidden_states, topk_weights, topk_ids, lora, adapter_ids, out, gradients=gradients)

    def _run(
        self,
        hidden_states: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        lora: LoRA | None,
        adapter_ids: Tensor | None,
        out: Tensor | None,
        *,
        gradients: bool,
    ) -> Tensor:
        path, error = self.transport, None
        try:
            with torch.set_grad_enabled(gradients):
                path.check(hidden_states, topk_weights, topk_ids, out, adapter_ids)
            if out is None:
                out = torch.empty_like(hidden_states)
            tensors = hidden_states, topk_weights, topk_ids, *(() if adapter_ids is None else (adapter_ids,))
            parts = [path.layout(*some) for some in self._split(*tensors)]
        except Exception as cause:  # noqa: BLE001 - told to the other ranks, then raised
            error = cause
            parts = [path.blank() for _ in range(self.parts)]
        path.exchange_counts(parts, self.parts, error)
        for part in parts:
            path.send(part)
        for part in parts:
            output, error = self._apply(part, lora, error, gradients=gradients)
            path.send_back(part, output)  # whatever is in it after an error: nobody will read it
        # On the host, beside the work of a GPU.
        if not _capturing(self.device):
            self.control.agree(error, "running the experts")
        elif error is not None:
            raise error
        assert out is not None, "an error was raised before"
        for part, rows in zip(parts, self._split(out), strict=True):
            path.reduce(part, rows[0])
        return out

    def _split(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        n_tokens = tensors[0].shape[0]
        stops = [n_tokens * part // self.parts for part in range(self.parts + 1)]
        return [tuple(x[a:b] for x in tensors) for a, b in itertools.pairwise(stops)]

    def _apply(
        self, part: Part, lora: LoRA | None, error: Exception | None, *, gradients: bool
    ) -> tuple[Tensor, Exception | None]:
        """The experts of this rank on the rows of all; an error is kept until the others know."""
        prepared = self.transport.prepared(part)
        rows, messages = prepared.hidden_states, part.messages
        assert messages is not None, "received"
        output = torch.empty(rows.shape, dtype=self.transport.wire.dtype, device=rows.device)
        if error is None and self.layer is not None and rows.shape[0]:
            try:
                with torch.set_grad_enabled(gradients):
                    self.layer.apply(
                        *(output, rows, prepared.topk_weights, prepared.topk_ids),
                        hidden_states_scale=prepared.hidden_states_scale,
                        expert_map=prepared.expert_map,
                        lora=lora,
                        adapter_ids=None if lora is None else self.transport.wire.views(messages).adapters,
                    )
            except Exception as cause:  # noqa: BLE001 - told to the other ranks, then raised
                error = cause
        return output, error


def _agreed(everyone: list[dict[str, object]]) -> tuple[Wire, float | None, Placement]:
    """What all ranks have in common, from what each said; the same on all of them.

    Raises:
        OptionError: two differ.
    """

    def same(name: str, *, of_experts: bool = False) -> object:
        said = [(rank, facts[name]) for rank, facts in enumerate(everyone) if not of_experts or facts["experts"]]
        if not said:
            do = "Give at least one rank experts."
            raise OptionError(explain("layer", got="no expert on any rank", wanted="some", do=do))
        first, value = said[0]
        for rank, other in said:
            if other != value:
                got = f"{value} on rank {first}, {other} on rank {rank}"
                what, do = f"{name} of ExpertParallel", "Make them agree."
                raise OptionError(explain(what, got=got, wanted="the same", do=do))
        return value

    hidden, inputs = same("hidden", of_experts=True), same("inputs", of_experts=True)
    dtype, static = same("dtype", of_experts=True), same("static", of_experts=True)
    top_k = same("top_k")
    same("parts")
    same("max_tokens")
    adapters = bool(same("adapters"))
    placement = same("placement")
    if placement is None:
        counts = [facts["experts"] for facts in everyone]
        assert all(isinstance(count, int) for count in counts), "counted"
        placement = Placement.of_counts(counts)  # type: ignore[arg-type]
    assert isinstance(hidden, int) and isinstance(top_k, int) and isinstance(dtype, torch.dtype), "checked"
    assert isinstance(placement, Placement) and (inputs is None or isinstance(inputs, Inputs)), "checked"
    assert static is None or isinstance(static, float), "checked"
    return Wire(hidden, top_k, dtype, None if adapters else inputs, adapters), static, placement


def _device(layer: Experts | None) -> torch.device:
    if layer is not None:
        return layer.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
