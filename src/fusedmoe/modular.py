"""The layer in three steps, for engines that own dispatch, memory and the final reduction.

::

    prepare    hidden states, ids, weights -> Prepared     quantise; dispatch to the ranks that have the experts
    apply      Prepared -> output                          the experts, in memory that the caller owns
    finalize   output, Prepared -> hidden states [T, H]    nothing; weigh and reduce; or a communication library

A :class:`PrepareFinalize` has the first and the last step, :class:`Experts` the one in between, and :func:`run` calls
all three. Two activation formats lie between them:

* standard: rows [T, H] with ids and weights [T, top_k]. The output [T, H] is weighted and reduced.
* batched: rows [E, T_max, H] with the number of rows of each expert, on the device. The output [E, T_max, H] is neither
  weighted nor reduced; rows past an expert's count are not read, and may hold anything in the output too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedmoe import backends, experts
from fusedmoe.backends.workspace import in_two, layout_bytes
from fusedmoe.checks import check
from fusedmoe.errors import DTypeError, LayoutError, OptionError, ShapeError, WorkspaceError, explain, require_integer
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
from fusedmoe.nn import FLOATS, LARGEST, FusedExperts, require_tensor
from fusedmoe.plan.config import Plan
from fusedmoe.plan.planner import choose, tokens_before_breaks
from fusedmoe.settings import settings
from fusedmoe.spec.format import ELEMENTS, Inputs
from fusedmoe.spec.problem import Problem
from fusedmoe.target import target_of

#: More than a call takes, and few enough that no product of sizes leaves 64 bits.
MOST_TOKENS = 2**26


class WorkspaceShapes(NamedTuple):
    """Shapes that :meth:`Experts.apply` wants, in elements of the type of the layer."""

    workspace13: tuple[int, ...]
    workspace2: tuple[int, ...]
    output: tuple[int, ...]


class Prepared(NamedTuple):
    """What a prepare step hands to the experts, in one of the two activation formats.

    Attributes:
        hidden_states: [T', H], or [E, T_max, H] when ``counts`` are given.
        topk_weights, topk_ids: [T', top_k]; None when batched.
        hidden_states_scale: of hidden states that are codes.
        counts: [E] int32 or int64, rows of each expert, on the device.
        expert_map: what ids stand for, when not the experts' own map.
        expected_rows: see :meth:`Experts.apply`.
        dtype: type of the layer.
        state: what the finalize step wants to know.
    """

    hidden_states: Tensor
    topk_weights: Tensor | None
    topk_ids: Tensor | None
    hidden_states_scale: Tensor | None = None
    counts: Tensor | None = None
    expert_map: Tensor | None = None
    expected_rows: int | None = None
    dtype: torch.dtype | None = None
    state: Any = None


class PrepareFinalize(Protocol):
    """How rows come to the experts, and what becomes of their output."""

    def prepare(self, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Prepared:
        """Quantise and dispatch."""

    def finalize(self, output: Tensor, prepared: Prepared) -> Tensor:
        """[T, H], weighted and reduced, on the rank and in the order that the tokens came from."""


class Experts:
    """Experts with their options, which write into memory of the caller's.

    >>> import torch, fusedmoe
    >>> layer = Experts(torch.randn(4, 96, 64), torch.randn(4, 64, 48))
    >>> layer.workspace_shapes(5, 2, torch.float32).output
    (5, 64)
    """

    def __init__(
        self,
        w13: Tensor | ExpertMatrix,
        w2: Tensor | ExpertMatrix,
        *,
        backend: str | None = None,
        workspace_limit: int | None = None,
        **options: Any,
    ) -> None:
        """Hold tensors and options; nothing is copied.

        Args:
            w13, w2: as :func:`fusedmoe.fused_experts` takes them.
            backend, workspace_limit: as there.
            options: activation, gate_up_layout, weight_layout, w13_bias, w2_bias, apply_router_weight_on_input,
                expert_map, emulate, fp32_precision, as there; checked with every call.
        """
        self.w13, self.w2, self.backend, self.workspace_limit, self.options = w13, w2, backend, workspace_limit, options

    @classmethod
    def of(cls, layer: FusedExperts | Experts) -> Experts:
        """The experts of a module, sharing its tensors."""
        if isinstance(layer, Experts):
            return layer
        names = (
            "activation", "gate_up_layout", "weight_layout", "w13_bias", "w2_bias", "emulate", "expert_map",
            "apply_router_weight_on_input", "batch_invariant",
        )  # fmt: skip
        options = {name: getattr(layer, name) for name in names}
        return cls(layer._matrix("w13"), layer._matrix("w2"), backend=layer.backend, **options)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.w13.shape[0])

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.w2.shape[2 if self.options.get("weight_layout") == "KN" else 1])

    @property
    def device(self) -> torch.device:
        """Where the experts lie."""
        return self.w13.device

    @property
    def inputs(self) -> Inputs | None:
        """How w13 quantises the rows that it multiplies; None when it does not."""
        return self.w13.format.inputs if isinstance(self.w13, ExpertMatrix) else None

    def kernels(self) -> backends.base.Transit:
        """What the backend does to rows that travel."""
        return transit_of(self.device, self.backend)

    def encode(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of rows as the layer itself would make them, so that less has to travel.

        Rows as they are, and None, where w13 takes rows as they are, or has one scale for all rows of a call, which is
        not known before all of them are in one place.
        """
        inputs = self.inputs
        if inputs is None or inputs.mode == "tensor":
            return hidden_states, None
        assert isinstance(self.w13, ExpertMatrix), "which has inputs"
        return self.kernels().encode(hidden_states, inputs, self.w13.input_scale)

    def workspace_shapes(
        self,
        tokens: int,
        top_k: int,
        dtype: torch.dtype,
        *,
        batched: bool = False,
        codes: bool = False,
        global_num_experts: int | None = None,
        expected_rows: int | None = None,
        lora: LoRA | None = None,
    ) -> WorkspaceShapes:
        """Shapes of the memory for a call, which are enough for calls of fewer tokens too.

        Args:
            tokens: T, or T_max when batched.
            top_k: experts of a token; of no effect when batched.
            dtype: type of the layer, and of the memory.
            batched: the activation format.
            codes: hidden states come with a scale.
            global_num_experts: length of the expert map that :meth:`apply` gets; None: that of the options, if any.
            expected_rows, lora: as :meth:`apply` gets them.

        Raises:
            OptionError, DTypeError: a number or the type is none.
            Others as :func:`fusedmoe.fused_experts`.
        """
        do = "Pass the largest that calls will have."
        require_integer("tokens", tokens, 0, MOST_TOKENS, do=do)
        require_integer("top_k", top_k, 1, MOST_TOKENS, do=do)
        if global_num_experts is not None:
            require_integer("global_num_experts", global_num_experts, 1, LARGEST, do="Pass the map's length.")
        if dtype not in FLOATS:
            raise DTypeError(explain("dtype", got=repr(dtype), wanted=" or ".join(map(str, FLOATS)), do="See apply."))
        expert_map = None if batched else self.options.get("expert_map")
        if global_num_experts is not None and not batched:
            expert_map = torch.empty(global_num_experts, dtype=torch.int32, device=self.device)
        rows, top_k, lead = (self.num_experts * tokens, 1, (self.num_experts, tokens)) if batched else (
            tokens, top_k, (tokens,))  # fmt: skip
        kind = dtype if codes else None
        none = torch.empty(1, dtype=torch.int32, device=self.device)  # expanded, it has a shape and no memory

        def planned(n_tokens: int) -> tuple[Problem, Plan]:
            adapters = {"lora": lora, "adapter_ids": none.expand(n_tokens)}
            options = {**self.options, "expert_map": expert_map, **adapters}
            x, weights, ids, scale = self._stand_ins(n_tokens, top_k, dtype, codes=codes)
            call = check(x, self.w13, self.w2, weights, ids, hidden_states_scale=scale, dtype=kind, **options)
            problem = _expecting(call.problem, expected_rows, sparse=batched)
            return problem, choose(problem, target_of(self.device), self.backend)

        problem, plan = planned(rows)
        experts.tokens_at_a_time(problem, plan, self.workspace_limit)  # raises
        first, second = 0, 0
        for n_tokens in (rows, *tokens_before_breaks(problem, target_of(self.device))):
            n_bytes = self._bytes(*planned(n_tokens))
            first, second = max(first, n_bytes[0]), max(second, n_bytes[1])
        size = dtype.itemsize
        return WorkspaceShapes((-(-first // size),), (-(-second // size),), (*lead, self.hidden_size))

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
        workspace13: Tensor | None = None,
        workspace2: Tensor | None = None,
        *,
        hidden_states_scale: Tensor | None = None,
        counts: Tensor | None = None,
        expert_map: Tensor | None = None,
        expected_rows: int | None = None,
        lora: LoRA | None = None,
        adapter_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the experts; returns ``output``.

        Args:
            output: [T, H], or [E, T_max, H] when batched. May share memory with workspace13, but in chunks.
            hidden_states, topk_weights, topk_ids, hidden_states_scale: as :func:`fusedmoe.fused_experts` takes them;
                or, batched, [E, T_max, H] with ``counts``, no ids, no weights, and scales [E, T_max, groups].
            workspace13, workspace2: contiguous memory of any type, at least :meth:`workspace_shapes`, whatever is in
                it; allocated when None. Neither may share memory with hidden states.
            counts: [E] int32 or int64: rows of each expert, on the device; they are not read on the host.
            expert_map: in place of that of the options.
            expected_rows: rows that an expert has as a rule, where that is far fewer than there is room for: tiles are
                chosen for as many. Any number gives a right result.
            lora, adapter_ids: as fused_experts takes them; batched, [E, T_max] ids.

        Raises:
            OptionError: counts together with ids, or neither; one workspace without the other.
            ShapeError, DTypeError, WorkspaceError: a shape, type or size does not fit.
            LayoutError: the output of chunks shares memory with workspace13.
            Others as fused_experts.
        """
        options = {**self.options, "lora": lora, "adapter_ids": adapter_ids}
        require_tensor("output", output)
        require_tensor("hidden_states", hidden_states)
        if hidden_states_scale is not None:
            require_tensor("hidden_states_scale", hidden_states_scale)
        if expert_map is not None:
            options["expert_map"] = expert_map
        if counts is not None:
            hidden_states, topk_weights, topk_ids, hidden_states_scale, output_rows = self._flat(
                output, hidden_states, topk_weights, topk_ids, hidden_states_scale, counts
            )
            options["expert_map"] = None
            if lora is not None and adapter_ids is not None:
                require_tensor("adapter_ids", adapter_ids)
                if adapter_ids.shape != output.shape[:2]:
                    what, said = "adapter_ids of batched rows", tuple(adapter_ids.shape)
                    wanted, do = f"{tuple(output.shape[:2])}, [E, T_max]", "Dispatch each row's id with it."
                    raise ShapeError(explain(what, got=said, wanted=wanted, do=do))
                options["adapter_ids"] = adapter_ids.reshape(-1)
        elif topk_weights is None or topk_ids is None:
            do = "Pass topk_weights and topk_ids, or the counts of batched rows."
            raise OptionError(explain("experts of the rows", got="none", wanted="ids or counts", do=do))
        else:
            output_rows = output
        if (workspace13 is None) != (workspace2 is None):
            raise OptionError(explain("workspaces", got="one", wanted="both or none", do="See workspace_shapes."))
        coded = hidden_states_scale is not None
        call = check(
            *(hidden_states, self.w13, self.w2, topk_weights, topk_ids),
            hidden_states_scale=hidden_states_scale,
            dtype=output.dtype if coded else None,
            out=output_rows,
            **options,
        )
        call = call._replace(problem=_expecting(call.problem, expected_rows, sparse=counts is not None))
        plan = choose(call.problem, target_of(self.device), self.backend)
        if workspace13 is not None and workspace2 is not None:
            call = call._replace(workspace=(_bytes("workspace13", workspace13), _bytes("workspace2", workspace2)))
            shared = output.untyped_storage().data_ptr() == workspace13.untyped_storage().data_ptr()
            if shared and experts.tokens_at_a_time(call.problem, plan, self.workspace_limit) < call.problem.tokens:
                got = "memory of workspace13, and a workspace_limit that makes several chunks"
                do = "Give the output memory of its own: one chunk's is the next one's workspace."
                raise LayoutError(explain("output", got=got, wanted="one of the two", do=do))
        experts.run(call, plan, self.workspace_limit)
        return output

    def _flat(
        self,
        output: Tensor,
        hidden_states: Tensor,
        topk_weights: Tensor | None,
        topk_ids: Tensor | None,
        scale: Tensor | None,
        counts: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """Batched rows as rows of one choice each; those past an expert's count have an absent one."""
        if topk_weights is not None or topk_ids is not None:
            do = "Weights are the finalize step's."
            raise OptionError(explain("batched rows", got="ids or weights", wanted="counts alone", do=do))
        n_experts, n_hidden, device = self.num_experts, self.hidden_size, self.device
        if hidden_states.dim() != 3 or hidden_states.shape[0] != n_experts:
            got, wanted = tuple(hidden_states.shape), f"[{n_experts}, T_max, {n_hidden}]"
            do = "Give every expert the same number of rows."
            raise ShapeError(explain("batched rows", got=got, wanted=wanted, do=do))
        if not isinstance(counts, Tensor) or counts.dtype not in (torch.int32, torch.int64):
            kind = getattr(counts, "dtype", type(counts).__name__)
            raise DTypeError(explain("counts", got=kind, wanted="a tensor of int32 or int64", do="Cast it."))
        if tuple(counts.shape) != (n_experts,) or counts.device != device:
            said = f"{tuple(counts.shape)} on {counts.device}"
            do = "Count the rows of each expert."
            raise ShapeError(explain("counts", got=said, wanted=f"({n_experts},) on {device}", do=do))
        if tuple(output.shape) != tuple(hidden_states.shape):
            shapes = tuple(output.shape), tuple(hidden_states.shape)
            raise ShapeError(explain("output", got=shapes[0], wanted=shapes[1], do="See workspace_shapes."))
        n_rows = hidden_states.shape[1]
        expert = torch.arange(n_experts, dtype=counts.dtype, device=device)[:, None]
        row = torch.arange(n_rows, dtype=counts.dtype, device=device)
        ids = torch.where(row < counts[:, None], expert, -1).view(-1, 1)
        weights = torch.ones(1, 1, device=device).expand(n_experts * n_rows, 1)
        if scale is not None and scale.dim() == 3:
            scale = scale.reshape(n_experts * n_rows, -1)
        return hidden_states.reshape(-1, n_hidden), weights, ids, scale, output.view(-1, n_hidden)

    def _stand_ins(
        self, tokens: int, top_k: int, dtype: torch.dtype, *, codes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Hidden states, weights, ids and scales that have a shape and no memory."""
        inputs, groups = self.inputs, 1
        if codes:
            if inputs is None:
                do = "Leave out codes."
                raise OptionError(explain("codes", got="a w13 that takes rows as they are", wanted="one", do=do))
            dtype = getattr(torch, ELEMENTS[inputs.element].dtype)
            groups = math.ceil(self.hidden_size / inputs.group) if inputs.group else 1

        def empty(columns: int, kind: torch.dtype = torch.float32) -> Tensor:
            # Rows of stride 0 are as aligned as the first one.
            return torch.empty(1, columns, dtype=kind, device=self.device).expand(tokens, -1)

        scale = empty(groups) if codes else None
        return empty(self.hidden_size, dtype), empty(top_k), empty(top_k, torch.int32), scale

    def _bytes(self, problem: Problem, plan: Plan) -> tuple[int, int]:
        chunk = experts.tokens_at_a_time(problem, plan, self.workspace_limit)
        if chunk < problem.tokens:
            problem = replace(problem, tokens=chunk)
        first, second = in_two(backends.load(plan.backend).workspace_layout(problem, plan))
        return layout_bytes(first), layout_bytes(second)


def _expecting(problem: Problem, expected_rows: int | None, *, sparse: bool) -> Problem:
    """The problem of such rows, and whose mean of rows is the expected one."""
    problem = replace(problem, sparse=True) if sparse else problem
    if expected_rows is None:
        return problem
    do = "Leave it out where every row may be used."
    require_integer("expected_rows", expected_rows, 1, MOST_TOKENS, do=do)
    return replace(problem, known_experts=max(problem.known_experts, -(-problem.slots // expected_rows)))


def _bytes(name: str, buffer: Tensor) -> Tensor:
    if not isinstance(buffer, Tensor) or not buffer.is_contiguous() or buffer.is_neg():
        got = "a view of other memory" if isinstance(buffer, Tensor) else type(buffer).__name__
        do = "Allocate what Experts.workspace_shapes says."
        raise WorkspaceError(explain(name, got=got, wanted="a contiguous tensor", do=do))
    return buffer.view(-1).view(torch.uint8)


def transit_of(device: torch.device, backend: str | None = None) -> backends.base.Transit:
    """What a backend (None: that of the process) does to rows that travel."""
    target = target_of(device)
    on_device = target.triton and (target.vendor != "cpu" or target.interpret)
    name = settings().backend if backend is None else backend
    return backends.load_transit("triton" if on_device and name != "torch" else "torch")


def run(path: PrepareFinalize, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """Prepare, apply, finalize: what :func:`fusedmoe.fused_experts` computes, by way of ``path``.

    Args:
        path: the first and the last step.
        layer: the experts of this rank.
        hidden_states: [T, H].
        topk_weights, topk_ids: [T, top_k].

    Returns:
        [T, H] in the type of hidden_states.
    """
    prepared = path.prepare(layer, hidden_states, topk_weights, topk_ids)
    rows = prepared.hidden_states
    output = torch.empty(rows.shape, dtype=prepared.dtype or rows.dtype, device=rows.device)
    layer.apply(
        *(output, rows, prepared.topk_weights, prepared.topk_ids),
        hidden_states_scale=prepared.hidden_states_scale,
        counts=prepared.counts,
        expert_map=prepared.expert_map,
        expected_rows=prepared.expected_rows,
    )
    return path.finalize(output, prepared)


class Standard:
    """Everything stays where it is: rows are quantised, the output is finished.

    >>> import torch
    >>> layer = Experts(torch.randn(4, 96, 64), torch.randn(4, 64, 48))
    >>> run(Standard(), layer, torch.randn(5, 64), torch.rand(5, 2), torch.randint(4, (5, 2))).shape
    torch.Size([5, 64])
    """

    def prepare(self, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Prepared:
        """Quantise where the scheme does."""
        rows, scale = layer.encode(hidden_states)
        return Prepared(rows, topk_weights, topk_ids, scale, dtype=hidden_states.dtype)

    def finalize(self, output: Tensor, prepared: Prepared) -> Tensor:
        """Nothing is left to do."""
        return output


class Batched:
    """Tokens of one process in the batched format: what a dispatcher of fixed capacity per expert hands over."""

    def __init__(self, max_tokens: int) -> None:
        """``max_tokens``: T_max, rows of an expert."""
        self.max_tokens = max_tokens

    def prepare(self, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Prepared:
        """Copy each token to a row of each of its experts, in the order of slots.

        A token whose expert has no row left, because tokens chose it twice, becomes NaN.

        Raises:
            OptionError: the router weight is applied on the input, before the rows are weighed here.
            ShapeError: more tokens than an expert has rows for.
        """
        if layer.options.get("apply_router_weight_on_input"):
            do = "Multiply hidden states first, which is the same for one expert a token without biases."
            got, wanted = "router weights on the input", "weights that the finalize step applies"
            raise OptionError(explain("batched rows", got=got, wanted=wanted, do=do))
        if hidden_states.shape[0] > self.max_tokens:
            wanted, do = f"at most max_tokens = {self.max_tokens}", "Raise max_tokens."
            raise ShapeError(explain("hidden_states", got=f"{hidden_states.shape[0]} tokens", wanted=wanted, do=do))
        n_experts, n_rows = layer.num_experts, self.max_tokens
        rows, scale = layer.encode(hidden_states)
        ids = topk_ids.reshape(-1).long()
        if (expert_map := layer.options.get("expert_map")) is not None:
            known = (ids >= 0) & (ids < expert_map.shape[0])
            ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
        live = (ids >= 0) & (ids < n_experts)
        ids = torch.where(live, ids, n_experts)
        chosen = torch.nn.functional.one_hot(ids, n_experts + 1)
        place = (chosen.cumsum(0) - chosen).gather(1, ids[:, None])[:, 0]
        over = live & (place >= n_rows)  # only where tokens chose an expert twice, and then there is no right answer
        topk_weights = topk_weights.masked_fill(over.view(topk_ids.shape), torch.nan)
        # The last row takes what has no expert.
        index = torch.where(live & ~over, ids * n_rows + place, n_experts * n_rows)
        token = torch.arange(ids.numel(), device=ids.device) // topk_ids.shape[1]

        def spread(x: Tensor) -> Tensor:
            batched = x.new_empty(n_experts * n_rows + 1, x.shape[1])
            bits = batched.view(torch.uint8) if x.itemsize == 1 else batched
            bits[index] = x.view(bits.dtype)[token]
            return batched[:-1].view(n_experts, n_rows, x.shape[1])

        state = (torch.where(over, 0, index).view(topk_ids.shape), topk_weights, layer)
        counts = chosen[:, :n_experts].sum(0)
        scale = None if scale is None else spread(scale)
        expected = max(1, ids.numel() // n_experts)
        return Prepared(
            *(spread(rows), None, None, scale, counts),
            expected_rows=expected,
            dtype=hidden_states.dtype,
            state=state,
        )

    def finalize(self, output: Tensor, prepared: Prepared) -> Tensor:
        """Weigh, and sum each token's rows in the order of its slots, in float32."""
        index, weights, layer = prepared.state
        out = output.new_empty(index.shape[0], output.shape[2])
        result: Tensor = layer.kernels().reduce(output.flatten(0, 1), index, weights, out)
        return result
