"""Low-rank adapters of the experts: many at once, one or none per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedmoe.errors import DeviceError, DTypeError, OptionError, ShapeError, explain
from fusedmoe.spec.activation import FLOAT32_MAX

MAX_RANK = 256
MAX_SLOTS = 1024

_MATRICES = ("w13_a", "w13_b", "w2_a", "w2_b")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """One adapter of the experts of one layer; see :class:`LoRA` for what it does.

    Every matrix has an expert dimension of E, or of 1 where all experts share it.

    Attributes:
        w13_a: [E, r, H], or [E, 2r, H] when gate and up have an A each: r rows for gate, then r for up.
        w13_b: [E, rows of w13, r], its rows in the order of w13's.
        w2_a: [E, r, I].
        w2_b: [E, H, r].
        scaling: what B A x is multiplied by: alpha / r in most checkpoints.
    """

    w13_a: Tensor
    w13_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        """Check that the matrices fit each other.

        Raises:
            ShapeError: they do not.
        """
        tensors = [getattr(self, name) for name in _MATRICES]
        _check_shapes([tensor.unsqueeze(0) if tensor.dim() == 3 else tensor for tensor in tensors])

    @property
    def rank(self) -> int:
        """Rank r."""
        return self.w2_a.shape[1]

    @property
    def parts(self) -> int:
        """2 when gate and up have an A each, else 1."""
        return self.w13_a.shape[1] // self.rank

    def of_experts(self, chosen: Sequence[int]) -> Adapter:
        """The adapter of some of the experts, in this order: those of a rank. Copies; what all share stays as it is.

        Raises:
            ShapeError: an expert that there is not.
        """
        tensors = {}
        for name in _MATRICES:
            tensor = getattr(self, name)
            if tensor.shape[0] > 1:
                wrong = [one for one in chosen if not isinstance(one, int) or not 0 <= one < tensor.shape[0]]
                if wrong or not len(chosen):
                    wanted, do = f"some of 0 .. {tensor.shape[0] - 1}", "Take those of Placement.experts[rank]."
                    raise ShapeError(explain("experts of an adapter", got=repr(chosen), wanted=wanted, do=do))
                tensor = tensor[torch.tensor(chosen, device=tensor.device)]
            tensors[name] = tensor
        return Adapter(**tensors, scaling=self.scaling)


class LoRA:
    """Adapters of the experts of one layer, stacked in a fixed number of slots.

    With a the adapter of token t, s its scaling, and e an expert of t, :func:`fusedmoe.fused_experts` computes with::

        w13[e] @ x[t] + s[a] * w13_b[a, e] @ (w13_a[a, e] @ x[t])          for w13[e] @ x[t]
        w2[e] @ h     + s[a] * w2_b[a, e] @ (w2_a[a, e] @ h)               for w2[e] @ h

    before biases and router weight; x[t] and h are those that were not quantised. When gate and up have an A each, rows
    0 .. R of w13_a are for the gate rows of w13_b, rows R .. 2R for its up rows. A x is rounded once to the type of the
    layer, its scaling applied before.

    A slot holds an adapter of any rank up to R; what lies beyond its rank, and in slots without an adapter, is never
    used. :meth:`add` and :meth:`remove` write to tensors that stay where they are, in the order of the current stream:
    nothing is compiled anew, and a CUDA graph of the layer replays with what the slots then hold.

    Attributes:
        w13_a: [slots, E or 1, R or 2R, H]; any strides, as of all four; a view of a slice of I is as good.
        w13_b: [slots, E or 1, rows of w13, R].
        w2_a: [slots, E or 1, R, I].
        w2_b: [slots, E or 1, H, R].
        up_a, up_b: None, or where gate and up have tensors of their own: w13_a [slots, E or 1, R, H] and w13_b [slots,
            E or 1, I, R] are gate's then, and these, of the same shapes and strides, are up's.
        scaling: [slots] float32.
        rank: [slots] int32, the rank of the adapter in each slot; 0: none.
        adapter_enabled: [slots] uint8, int8 or int32, 0: as if the slot were empty; or None. A tensor that was given is
            used where it lies, so that writing to it counts from the next call on.
        finite: whether every number in B is finite, those that are not used too: then several adapters are added at
            once, and the kernels of Hopper run with them (`gluon_sm90`, many tokens), in which an infinity or NaN in B
            would reach rows of other adapters; one in A reaches rows of its own. :meth:`empty` and :meth:`of` make it
            so, and :meth:`add` keeps it so.

    >>> lora = LoRA.empty(4, num_experts=8, hidden_size=64, intermediate_size=96, max_rank=16)
    >>> one = Adapter(w13_a=torch.randn(8, 2 * 3, 64), w13_b=torch.randn(8, 192, 3),
    ...               w2_a=torch.randn(8, 3, 96), w2_b=torch.randn(8, 64, 3), scaling=0.5)
    >>> lora.add(2, one)
    >>> lora.rank.tolist()
    [0, 0, 3, 0]
    """

    __slots__ = ("adapter_enabled", "finite", "rank", "scaling", "up_a", "up_b", "w2_a", "w2_b", "w13_a", "w13_b")

    def __init__(
        self,
        w13_a: Tensor,
        w13_b: Tensor,
        w2_a: Tensor,
        w2_b: Tensor,
        *,
        scaling: Tensor | None = None,
        rank: Tensor | None = None,
        adapter_enabled: Tensor | None = None,
        up_a: Tensor | None = None,
        up_b: Tensor | None = None,
        finite: bool = False,
    ) -> None:
        """Put together stacked tensors; they are used where they lie.

        Args:
            w13_a, w13_b, w2_a, w2_b: see the class; float32, float16 or bfloat16, all of one type.
            scaling: [slots] float32; None: 1.
            rank: [slots] int32; None: R in every slot.
            adapter_enabled: [slots] bool, uint8, int8 or int32; None: all.
            up_a, up_b: see the class; both or none.
            finite: a promise, for what is written to these tensors later too; see the class.

        Raises:
            ShapeError, DTypeError, DeviceError: a tensor does not fit.
        """
        tensors = [w13_a, w13_b, w2_a, w2_b]
        _check_shapes(tensors, apart=up_a is not None)
        slots, device = w13_a.shape[0], w13_a.device
        if scaling is None:
            scaling = torch.ones(slots, dtype=torch.float32, device=device)
        if rank is None:
            rank = torch.full((slots,), w2_a.shape[2], dtype=torch.int32, device=device)
        for name, tensor in zip(_MATRICES, tensors, strict=True):
            _check_tensor(name, tensor, (w13_a.dtype,) if w13_a.dtype in _FLOATS else _FLOATS, device)
        for name, vector, dtypes in (
            ("scaling", scaling, (torch.float32,)),
            ("rank", rank, (torch.int32,)),
            ("adapter_enabled", adapter_enabled, (torch.bool, torch.uint8, torch.int8, torch.int32)),
        ):
            if vector is None:
                continue
            _check_tensor(name, vector, dtypes, device)
            if tuple(vector.shape) != (slots,) or not vector.is_contiguous():
                raise ShapeError(
                    explain(
                        f"{name} of LoRA",
                        got=f"shape {tuple(vector.shape)}, strides {vector.stride()}",
                        wanted=f"{(slots,)}, contiguous: one for each slot",
                        do="Give each slot of w13_a one.",
                    )
                )
        for name, up, gate in (("up_a", up_a, w13_a), ("up_b", up_b, w13_b)):
            if up is None and (up_a is None) == (up_b is None):
                continue
            _check_tensor(name, up, (w13_a.dtype,), device)
            assert up is not None, "checked"
            if up.shape != gate.shape or up.stride() != gate.stride():
                got = f"shape {tuple(up.shape)}, strides {up.stride()}"
                wanted = f"{tuple(gate.shape)} and {gate.stride()}, those of gate's"
                raise ShapeError(explain(f"{name} of LoRA", got=got, wanted=wanted, do="Allocate both alike."))
        self.w13_a, self.w13_b, self.w2_a, self.w2_b = tensors
        self.up_a, self.up_b = up_a, up_b
        self.scaling, self.rank, self.finite = scaling, rank, bool(finite)
        if adapter_enabled is not None and adapter_enabled.dtype == torch.bool:
            adapter_enabled = adapter_enabled.view(torch.uint8)
        self.adapter_enabled = adapter_enabled

    @classmethod
    def empty(
        cls,
        slots: int,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        max_rank: int,
        gated: bool = True,
        apart: bool = True,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> LoRA:
        """Slots without adapters.

        Args:
            slots: most adapters at once.
            num_experts, hidden_size, intermediate_size: E, H and I of the layer.
            max_rank: R.
            gated: w13 has 2I rows.
            apart: gate and up may have an A each; without a gate of no effect.
            dtype, device: as of the layer's hidden states; torch's defaults when None.

        Raises:
            ShapeError: a size is not allowed.
        """
        parts, rows = 2 if gated and apart else 1, intermediate_size * (2 if gated else 1)

        def new(*shape: int) -> Tensor:
            return torch.zeros(slots, num_experts, *shape, dtype=dtype, device=device)

        return cls(
            new(parts * max_rank, hidden_size),
            new(rows, max_rank),
            new(max_rank, intermediate_size),
            new(hidden_size, max_rank),
            rank=torch.zeros(slots, dtype=torch.int32, device=device),
            finite=True,
        )

    @classmethod
    def of(cls, adapters: Sequence[Adapter], *, slots: int | None = None, max_rank: int | None = None) -> LoRA:
        """Slots of which the first hold these adapters, with the type and device of the first one's tensors.

        Args:
            adapters: at least one.
            slots: how many; None: as many as there are adapters.
            max_rank: R; None: the largest rank among them.

        Raises:
            OptionError: there are no adapters, or more than slots.
            ShapeError: they do not fit each other.
        """
        slots = len(adapters) if slots is None else slots
        if not 1 <= len(adapters) <= slots:
            got, do = f"{len(adapters)} adapters for {slots} slots", "Use LoRA.empty for slots without adapters."
            raise OptionError(explain("LoRA.of", got=got, wanted="1 to slots", do=do))
        first = adapters[0]
        parts = max(adapter.parts for adapter in adapters)
        rank = max(adapter.rank for adapter in adapters) if max_rank is None else max_rank
        tensors = []
        for name in _MATRICES:
            like: Tensor = getattr(first, name)
            experts = max(getattr(adapter, name).shape[0] for adapter in adapters)
            rows = {"w13_a": parts * rank, "w2_a": rank}.get(name, like.shape[1])
            columns = rank if name.endswith("_b") else like.shape[2]
            tensors.append(like.new_zeros(slots, experts, rows, columns))
        lora = cls(*tensors, rank=torch.zeros(slots, dtype=torch.int32, device=first.w2_a.device), finite=True)
        for slot, adapter in enumerate(adapters):
            lora.add(slot, adapter)
        return lora

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which the constructor takes them."""
        tensors = [self.w13_a, self.w13_b, self.w2_a, self.w2_b, self.scaling, self.rank]
        if self.up_a is not None and self.up_b is not None:
            tensors += [self.up_a, self.up_b]
        return tensors if self.adapter_enabled is None else [*tensors, self.adapter_enabled]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], *, finite: bool) -> LoRA:
        """The inverse of :meth:`tensors`."""
        vectors, others = ("scaling", "rank"), ("up_a", "up_b", "adapter_enabled")
        names = (*vectors, *(others[:2] if len(tensors) > 7 else ()), *(others[2:] if len(tensors) % 2 else ()))
        return cls(*tensors[:4], finite=finite, **dict(zip(names, tensors[4:], strict=True)))

    @property
    def distances(self) -> tuple[int, ...]:
        """Bytes from gate's tensors to up's, A and B, where they have one each: launches depend on them."""
        if self.up_a is None or self.up_b is None:
            return ()
        return self.up_a.data_ptr() - self.w13_a.data_ptr(), self.up_b.data_ptr() - self.w13_b.data_ptr()

    def w13(self, *, interleaved: bool) -> tuple[Tensor, Tensor]:
        """A [slots, E or 1, R or 2R, H] and B [slots, E or 1, rows of w13, R]; copies where gate and up are apart."""
        if self.up_a is None or self.up_b is None:
            return self.w13_a, self.w13_b
        b = torch.stack([self.w13_b, self.up_b], 3 if interleaved else 2)
        return torch.cat([self.w13_a, self.up_a], 2), b.flatten(2, 3)

    @property
    def slots(self) -> int:
        """Most adapters at once."""
        return self.w13_a.shape[0]

    @property
    def max_rank(self) -> int:
        """R, the largest rank that a slot holds."""
        return self.w2_a.shape[2]

    @property
    def parts(self) -> int:
        """2 when gate and up have an A each, else 1."""
        return 2 if self.up_a is not None else self.w13_a.shape[2] // self.max_rank

    def add(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot, in place of what it holds; cast to the type of the slots.

        Raises:
            OptionError: there is no such slot; gate and up have tensors of their own; the scaling is no finite
                number; or it has numbers that are not finite, in the type of the slots, and the slots promise that.
            ShapeError: the adapter does not fit the slots, or its rank is above R.
        """
        self._check_slot(slot)
        rank = adapter.rank
        if rank > self.max_rank:
            do = f"Make the slots with max_rank={rank}."
            raise ShapeError(explain("rank of the adapter", got=rank, wanted=f"at most {self.max_rank}", do=do))
        if adapter.parts > self.parts:
            got, do = "an A each for gate and up", "Make the slots with apart=True."
            raise ShapeError(explain("w13_a of the adapter", got=got, wanted="slots with one A for both", do=do))
        if self.up_a is not None or self.up_b is not None:
            got, wanted = "gate and up in tensors of their own", "one for both, whose rows are in the order of w13's"
            do = "Write to the tensors, or make the slots with LoRA.empty."
            raise OptionError(explain("slots to add to", got=got, wanted=wanted, do=do))
        views = {
            "w13_a": self.w13_a[slot].unflatten(1, (self.parts, self.max_rank))[:, :, :rank],
            "w13_b": self.w13_b[slot, :, :, :rank],
            "w2_a": self.w2_a[slot, :, :rank],
            "w2_b": self.w2_b[slot, :, :, :rank],
        }
        for name, view in views.items():
            value: Tensor = getattr(adapter, name)
            if name == "w13_a":
                value = value.unflatten(1, (adapter.parts, rank))
            experts = value.shape[0]
            if value.shape[-2:] != view.shape[-2:] or experts not in (1, view.shape[0]):
                raise ShapeError(
                    explain(
                        f"{name} of the adapter",
                        got=tuple(getattr(adapter, name).shape),
                        wanted=f"what fits slots of {tuple(getattr(self, name).shape[1:])}",
                        do="Adapters in slots must be of one layer.",
                    )
                )
        scaling = adapter.scaling
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not abs(scaling) <= FLOAT32_MAX:
            do = "It is alpha / r in most checkpoints."
            raise OptionError(explain("scaling of the adapter", got=repr(scaling), wanted="a finite number", do=do))
        # Detached: what was trained would make the slots of all a part of its graph.
        values: dict[str, Tensor] = {name: getattr(adapter, name).detach().to(self.w13_a.dtype) for name in views}
        if self.finite and not all(value.isfinite().all() for value in values.values()):
            got, do = "an infinity or NaN", "Look at how it was trained, or make slots of a type with a larger range."
            raise OptionError(explain(f"adapter in {self.w13_a.dtype}", got=got, wanted="finite numbers", do=do))
        for name, view in views.items():
            value = values[name]
            view.copy_(value.unflatten(1, (adapter.parts, rank)) if name == "w13_a" else value)
        self.scaling[slot] = adapter.scaling
        self.rank[slot] = rank

    def remove(self, slot: int) -> None:
        """Empty a slot; tokens that still name it have no adapter.

        Raises:
            OptionError: there is no such slot.
        """
        self._check_slot(slot)
        self.rank[slot] = 0

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            do = "Make the layer's LoRA with more slots."
            raise OptionError(explain("slot", got=slot, wanted=f"0 to {self.slots - 1}", do=do))


def _check_tensor(name: str, tensor: object, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise DTypeError(explain(f"{name} of LoRA", got=got, wanted=wanted, do=f"Cast {name}."))
    if tensor.device != device:
        do = f"Move it: {name}.to('{device}')."
        raise DeviceError(explain(f"{name} of LoRA", got=f"a tensor on {tensor.device}", wanted=device, do=do))


def _check_shapes(tensors: Sequence[object], *, apart: bool = False) -> None:
    """Shapes [slots, experts, ...] of the four matrices; ``apart``: those of w13 are gate's alone."""
    for name, tensor in zip(_MATRICES, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tensor.dim() != 4 or 0 in tensor.shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            wanted = "[slots, E, r, in] (A) or [slots, E, out, r] (B); of one adapter without slots"
            raise ShapeError(explain(name, got=got, wanted=wanted, do="Stack experts and adapters."))
    a13, b13, a2, b2 = (tuple(t.shape) for t in tensors if isinstance(t, Tensor))
    slots, rank = a13[0], a2[2]
    if slots > MAX_SLOTS or not 1 <= rank <= MAX_RANK:
        got = f"{slots} slots of rank {rank}"
        wanted = f"at most {MAX_SLOTS} slots, and a rank of 1 to {MAX_RANK}"
        raise ShapeError(explain("LoRA", got=got, wanted=wanted, do="Use fewer slots, or a lower rank."))
    gated = b13[2] == 2 * a2[3]
    parts = (1, 2) if gated and not apart else (1,)
    rows = (a2[3],) if apart else (a2[3], 2 * a2[3])
    experts = {shape[1] for shape in (a13, b13, a2, b2)} - {1}
    fits = {
        "w13_a": a13[2] in [part * rank for part in parts],
        "w13_b": b13[0] == slots and b13[2] in rows and b13[3] == rank,
        "w2_a": a2[0] == slots,
        "w2_b": b2[0] == slots and b2[2] == a13[3] and b2[3] == rank,
    }
    if not all(fits.values()) or len(experts) > 1:
        wrong = next((name for name, fit in fits.items() if not fit), "w13_a")
        raise ShapeError(
            explain(
                f"{wrong} of LoRA",
                got=", ".join(f"{n} {s}" for n, s in zip(_MATRICES, (a13, b13, a2, b2), strict=True)),
                wanted="w13_a [slots, E, R or 2R, H], w13_b [slots, E, rows of w13, R], w2_a [slots, E, R, I], "
                "w2_b [slots, E, H, R], each with E or 1",
                do="Pad adapters of other ranks with anything, and say their ranks in rank.",
            )
        )
