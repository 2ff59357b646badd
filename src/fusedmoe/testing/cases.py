"""Problems to test a backend on: outputs of order one, every option, and pairwise grids of options."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusedmoe import schemes
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.functional import fused_experts, workspace_bytes
from fusedmoe.lora import LoRA
from fusedmoe.numerics import encode, pack, quantise_inputs
from fusedmoe.reference.activations import activate
from fusedmoe.schemes import SCHEMES, granularity_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import ELEMENTS, SCALES, Format
from fusedmoe.spec.layout import GateUpLayout, WeightLayout
from fusedmoe.testing.verify import expected, relative_error, tolerance

#: Every activation, with parameters that its limits bite on inputs of order one.
ACTIVATIONS = (
    Activation("silu"),
    Activation("silu", limit=0.7),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("swigluoai", limit=1.0),
    Activation("swiglustep", limit=0.5),
    Activation("situ", beta=0.8),
    Activation("situ", beta=1.5, linear_beta=0.6),
    Activation("silu_no_mul"),
    Activation("gelu_no_mul"),
    Activation("gelu_tanh_no_mul"),
    Activation("relu2_no_mul"),
)

#: Ids that name no expert, whatever their number; E and E + 1 are two more. All fit int32.
ABSENT = (-1, -7, 2**31 - 1, -(2**31))

#: Every option of a case but its sizes, for :func:`pairwise`.
OPTIONS: dict[str, Sequence[Any]] = {
    "dtype": ("float32", "float16", "bfloat16"),
    "activation": ACTIVATIONS,
    "gate_up_layout": ("concatenated", "interleaved"),
    "weight_layout": ("NK", "KN"),
    "bias": (False, True),
    "on_input": (False, True),
    "mapped": (False, True),
    "ids": ("uniform", "any", "one", "invalid", "absent"),
    "id_dtype": ("int32", "int64"),
    "router_dtype": ("float32", "float16", "bfloat16"),
    "pad": (0, 3, 8),
}


#: Further options of a case with quantised matrices; ``quantised``: which of the two are.
QUANTISED_OPTIONS: dict[str, Sequence[Any]] = {
    "quantised": ("both", "w13", "w2"),
    "parts": (2, 1),
    "codes": (False, True),
    "emulate": (False, True),
}

#: Blocks of weights to test, of schemes that have blocks; (32, 48) divides few sizes.
BLOCKS = ((128, 128), (32, 48))

#: Elements of a float32 temporary while matrices are drawn.
PIECE = 1 << 26


@functools.cache
def formats_of(scheme: str) -> tuple[Format, ...]:
    """Formats of a scheme in which every two of its choices occur together, as far as it allows them to."""
    allowed = list(dict.fromkeys(form for block in BLOCKS for form in schemes.formats_of(scheme, block)))

    def pairs(form: Format) -> set[Any]:
        return set(itertools.combinations(enumerate((form.block, form.inputs, form.zero, form.element, form.scale)), 2))

    kept, missing = [], set().union(*map(pairs, allowed))
    while missing:
        kept.append(max(allowed, key=lambda form: len(pairs(form) & missing)))
        missing -= pairs(kept[-1])
    return tuple(kept)


def storage_of(form: Format, shape: tuple[int, int, int], parts: int = 1) -> dict[str, tuple[Any, torch.dtype]]:
    """Shapes and types of the tensors of an expert matrix [E, N, K]."""
    n_experts, n_rows, n_columns = shape
    element, (block_n, block_k) = ELEMENTS[form.element], form.block
    columns = -(-n_columns // block_k) if block_k else 1
    rows = parts * -(-n_rows // parts // block_n) if block_n else parts
    found: dict[str, tuple[Any, torch.dtype]] = {
        "data": ((n_experts, n_rows, n_columns // element.per_byte), getattr(torch, element.dtype)),
        "scale": ((n_experts, rows, columns), getattr(torch, SCALES[form.scale])),
    }
    if form.zero:
        found["zero"] = ((n_experts, -(-n_rows // element.per_byte), columns), torch.uint8)
    if form.tensor_scale:
        found["tensor_scale"] = ((n_experts, 2) if parts == 2 else (n_experts,), torch.float32)
    if form.inputs is not None and form.inputs.mode == "static":
        found["input_scale"] = ((1,), torch.float32)
    return found


def empty_matrix(
    form: Format, shape: tuple[int, int, int], *, parts: int = 1, device: torch.device | str = "cpu"
) -> ExpertMatrix:
    """An expert matrix [E, N, K] without values."""
    tensors: dict[str, Any] = {
        name: torch.empty(sizes, dtype=dtype, device=device)
        for name, (sizes, dtype) in storage_of(form, shape, parts).items()
    }
    return ExpertMatrix(form, **tensors, parts=parts if form.block[0] > 1 else None)


def random_matrix(
    form: Format,
    shape: tuple[int, int, int],
    generator: torch.Generator,
    *,
    parts: int = 1,
    input_scale: float = 1.0,
) -> ExpertMatrix:
    """Random codes and scales [E, N, K], on the device of the generator; the weights' standard deviation is K^-0.5.

    Every second expert has codes a tenth as large and scales ten times as large, so that the scale of another one shows
    in the result; scales of neighbouring blocks differ by up to 4, zero points by up to a third of their range.
    """
    n_experts, n_rows, n_columns = shape
    element, device = ELEMENTS[form.element], generator.device
    storage = storage_of(form, shape, parts)
    columns = storage["scale"][0][2]
    spread = torch.full((n_experts, 1, 1), element.largest / 2, device=device)
    spread[1::2] /= 10
    zero = None
    if form.zero:
        low, high = (5, 12) if form.per_byte == 2 else (90, 166)
        zero = torch.randint(low, high, (n_experts, n_rows, columns), generator=generator, device=device)
    data = torch.empty(storage["data"][0], dtype=storage["data"][1], device=device)
    step = max(1, PIECE // (n_rows * n_columns))
    for first in range(0, n_experts, step):
        some = slice(first, min(first + step, n_experts))
        value = torch.randn(some.stop - first, n_rows, n_columns, generator=generator, device=device)
        value *= spread[some]
        if zero is not None:
            value += zero[some].repeat_interleave(form.block[1] or n_columns, 2)[:, :, :n_columns]
        else:
            value += element.zero
        data[some] = encode(value, form.element)
    scale = torch.exp2(2 * torch.rand(storage["scale"][0], generator=generator, device=device) - 1)
    size, tensor_scale = n_columns**-0.5 / spread, None
    if form.tensor_scale:  # block scales around 32, well inside their range
        scale, tensor_scale = 32 * scale, size.flatten() / 32
        if parts == 2:
            tensor_scale = tensor_scale[:, None] * torch.tensor([1.0, 0.6], device=device)
    else:
        scale = scale * size
    if form.scale == "e8m0":
        scale = scale.log2().round() + 127
    if zero is not None:
        zero = zero.to(torch.uint8)
        zero = pack(zero.transpose(1, 2)).transpose(1, 2) if form.per_byte == 2 else zero
    return ExpertMatrix(
        form,
        data,
        scale.to(storage["scale"][1]),
        zero=zero,
        tensor_scale=tensor_scale,
        input_scale=torch.full((1,), input_scale, device=device) if "input_scale" in storage else None,
        parts=parts,
    )


def _poisoned(tensor: torch.Tensor, pad: int, *, transposed: bool = False) -> torch.Tensor:
    """The same values, in memory that has ``pad`` columns of NaN, or of large codes, beside them."""
    if tensor.dim() == 1:
        return _poisoned(tensor[:, None], pad)[:, 0]
    if transposed:
        return _poisoned(tensor.transpose(-1, -2), pad).transpose(-1, -2)
    poison = float("nan") if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else 85
    shape = (*tensor.shape[:-1], tensor.shape[-1] + pad)
    buffer = torch.full(shape, poison, dtype=tensor.dtype, device=tensor.device)
    buffer[..., : tensor.shape[-1]] = tensor
    return buffer[..., : tensor.shape[-1]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem.

    Attributes:
        ids: "uniform" (distinct), "any" (duplicates), "one" (all on one expert), "invalid" (a third name no expert),
            "absent" (none does).
        pad: columns of NaN beside every matrix, so that strides are odd.
        formats: of w13 and w2; None: a plain tensor of the layer's type. With one of them quantised weight_layout "KN"
            makes matrices that are transposed views, which "NK" is then the option for.
        parts: 2: in a gated, concatenated w13 the blocks of scales start anew at the up rows; 1: they do not.
        codes: hidden states are codes with their scale, where the format of w13 has codes for them.
        emulate: the option of that name.
        ranks: of the adapters, whose slots are made for 3 more than the largest; 0: a slot that is full of NaN. Half of
            the tokens have none of them, or name a slot that is not there.
        finite: slots are made for the next multiple of 8 from the largest rank on, and have 7 in the place of NaN.
        apart: gate and up have an A each; "tensors": tensors of their own, where there is a gate.
        shared: experts share A of w13 and B of w2.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    dtype: str = "bfloat16"
    activation: Activation = field(default_factory=lambda: Activation("silu"))
    gate_up_layout: GateUpLayout = "concatenated"
    weight_layout: WeightLayout = "NK"
    bias: bool = False
    on_input: bool = False
    mapped: bool = False
    ids: str = "uniform"
    id_dtype: str = "int64"
    router_dtype: str = "float32"
    pad: int = 0
    formats: tuple[Format | None, Format | None] = (None, None)
    parts: int = 2
    codes: bool = False
    emulate: bool = False
    ranks: tuple[int, ...] = ()
    finite: bool = False
    apart: bool | str = True
    shared: bool = False

    @classmethod
    def of(cls, shape: tuple[int, int, int, int, int], **options: Any) -> Case:
        """A case of sizes (tokens, top_k, experts, hidden, intermediate)."""
        sizes: dict[str, Any] = dict(zip(("tokens", "top_k", "experts", "hidden", "intermediate"), shape, strict=True))
        return cls(**sizes, **options)

    def fitted(self) -> Case:
        """With H and I rounded up to what groups and packed codes divide."""
        sizes = []
        for size, form in zip((self.hidden, self.intermediate), self.formats, strict=True):
            unit = 1
            if form is not None:
                unit = math.lcm(form.per_byte, form.block[1] if granularity_of(form.block) == "group" else 1)
            sizes.append(-(-size // unit) * unit)
        return replace(self, hidden=sizes[0], intermediate=sizes[1])

    @property
    def tolerance(self) -> float:
        """The largest relative error that the arithmetic allows; see :func:`fusedmoe.testing.verify.tolerance`."""
        slots = self.tokens * self.top_k
        codes = (self.tokens * self.hidden, slots * self.intermediate)
        return tolerance(self.dtype, *self.formats, codes=codes)

    def draw(self, device: str | torch.device = "cpu", seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and options of ``fused_experts``."""
        g = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        n_rows = self.intermediate * (2 if self.activation.gated else 1)
        quantised = self.formats != (None, None)

        def bias(n: int) -> torch.Tensor | None:
            return torch.randn(self.experts, n, generator=g, device=device) if self.bias else None

        x = torch.randn(self.tokens, self.hidden, generator=g, device=device)
        if quantised:  # so that the scale of another token shows
            x = x * torch.exp2(2 * torch.rand(self.tokens, 1, generator=g, device=device) - 1)
        n_global = self.experts + 3 if self.mapped else self.experts
        expert_map = None
        if self.mapped:
            expert_map = torch.full((n_global,), -1, dtype=torch.int32, device=device)
            here, beyond, _ = torch.randperm(n_global, generator=g, device=device).split([self.experts, 1, 2])
            expert_map[here] = torch.arange(self.experts, dtype=torch.int32, device=device)
            expert_map[beyond] = self.experts  # out of range: absent
        w13 = self._matrix(0, n_rows, self.hidden, g)
        w2 = self._matrix(1, self.hidden, self.intermediate, g)
        options: dict[str, Any] = {
            "activation": self.activation,
            "gate_up_layout": self.gate_up_layout,
            "weight_layout": "NK" if quantised else self.weight_layout,
            "w13_bias": bias(n_rows),
            "w2_bias": bias(self.hidden),
            "apply_router_weight_on_input": self.on_input,
            "expert_map": expert_map,
            "emulate": self.emulate,
        }
        x = x.to(dtype)
        inputs = None if self.formats[0] is None else self.formats[0].inputs
        if self.codes and inputs is not None:
            numbers, scale = quantise_inputs(x, inputs, w13.input_scale)
            x = numbers.to(getattr(torch, ELEMENTS[inputs.element].dtype))
            options |= {"hidden_states_scale": _poisoned(scale, self.pad), "dtype": dtype}
        if self.ranks:
            options |= self._adapters(n_rows, g)
        weights = torch.rand(self.tokens, self.top_k, generator=g, device=device) + 0.1
        router_dtype = getattr(torch, self.router_dtype)
        return (_poisoned(x, self.pad), w13, w2, weights.to(router_dtype), self._ids(n_global, g)), options

    def _adapters(self, n_rows: int, g: torch.Generator) -> dict[str, Any]:
        """Options lora and adapter_ids; what lies beyond a rank, or in an empty slot, is NaN, or 7."""
        parts = 2 if self.apart and self.activation.gated else 1
        slots, one = len(self.ranks), 1 if self.shared else self.experts
        largest = -(-max(self.ranks) // 8) * 8 if self.finite else max(self.ranks) + 3
        unused = 7.0 if self.finite else float("nan")
        shapes = (
            (one, parts, largest, self.hidden),
            (self.experts, n_rows, largest),
            (self.experts, 1, largest, self.intermediate),
            (one, self.hidden, largest),
        )
        tensors = []
        for shape in shapes:
            values = torch.randn(slots, *shape, generator=g, device=g.device)
            of_a = len(shape) == 4
            for slot, rank in enumerate(self.ranks):
                values[slot] *= (shape[-1] if of_a else max(1, rank)) ** -0.5
                (values[slot, :, :, rank:] if of_a else values[slot, ..., rank:]).fill_(unused)
            values = values.flatten(2, 3) if of_a else values
            tensors.append(_poisoned(values.to(getattr(torch, self.dtype)), self.pad))
        held = torch.tensor(self.ranks, dtype=torch.int32, device=g.device)
        scaling = torch.rand(slots, generator=g, device=g.device) + 0.5
        up = {}
        if parts == 2 and self.apart == "tensors":
            ups = slice(1, None, 2) if self.gate_up_layout == "interleaved" else slice(self.intermediate, None)
            gates = slice(0, None, 2) if self.gate_up_layout == "interleaved" else slice(0, self.intermediate)
            a, b = tensors[:2]
            up = {"up_a": _poisoned(a[:, :, largest:], self.pad), "up_b": _poisoned(b[:, :, ups], self.pad)}
            tensors[:2] = _poisoned(a[:, :, :largest], self.pad), _poisoned(b[:, :, gates], self.pad)
        lora = LoRA(*tensors, rank=held, scaling=scaling, finite=self.finite, **up)
        ids = torch.randint(slots, (self.tokens,), generator=g, device=g.device)
        none = torch.tensor([-1, -9, slots, 2**31 - 1], device=g.device)
        others = none[torch.randint(4, (self.tokens,), generator=g, device=g.device)]
        ids = torch.where(torch.rand(self.tokens, generator=g, device=g.device) < 0.5, ids, others)
        return {"lora": lora, "adapter_ids": ids.to(getattr(torch, self.id_dtype))}

    def _matrix(self, index: int, n: int, k: int, g: torch.Generator) -> Any:
        form, transposed = self.formats[index], self.weight_layout == "KN"
        if form is None:
            w = torch.randn(self.experts, n, k, generator=g, device=g.device) * k**-0.5
            w = _poisoned(w.to(getattr(torch, self.dtype)), self.pad, transposed=transposed)
            return w.transpose(1, 2) if transposed and self.formats == (None, None) else w
        concatenated = self.activation.gated and self.gate_up_layout == "concatenated"
        parts = self.parts if index == 0 and concatenated else 1
        input_scale = 1.0
        if form.inputs is not None:  # the largest values saturate
            input_scale = (4.0 if index == 0 else self._largest_activated(g)) / ELEMENTS[form.inputs.element].largest
        matrix = random_matrix(form, (self.experts, n, k), g, parts=parts, input_scale=input_scale)
        packed = matrix.data if form.per_byte == 2 else None
        return matrix.map(lambda t: _poisoned(t, self.pad, transposed=transposed and t is not packed and t.dim() == 3))

    def _largest_activated(self, g: torch.Generator) -> float:
        """About the largest intermediate value."""
        h = torch.randn(4096, 2, generator=g, device=g.device) * (1.5 if self.bias else 1.2)
        return float(activate(h, self.activation, "interleaved").abs().max())

    def _ids(self, n_global: int, g: torch.Generator) -> torch.Tensor:
        shape, device = (self.tokens, self.top_k), g.device
        if self.ids == "uniform" and self.top_k <= n_global:
            ids = torch.rand(self.tokens, n_global, generator=g, device=device).argsort(1)[:, : self.top_k]
        elif self.ids == "one":
            ids = torch.randint(n_global, (1, 1), generator=g, device=device).expand(shape)
        else:
            ids = torch.randint(n_global, shape, generator=g, device=device)
        if self.ids in ("invalid", "absent"):
            absent = torch.tensor([n_global, n_global + 1, *ABSENT], device=device)
            replace = torch.rand(shape, generator=g, device=device) < (1 / 3 if self.ids == "invalid" else 2)
            ids = torch.where(replace, absent[torch.randint(len(absent), shape, generator=g, device=device)], ids)
        return ids.to(getattr(torch, self.id_dtype))


def run_poisoned(
    case: Case, device: str = "cpu", backend: str = "triton", seed: int = 0, *, batch_invariant: bool = False
) -> tuple[torch.Tensor, float]:
    """Run a case twice with dirty output and workspace; return the output and its error against the reference.

    Raises:
        AssertionError: the output has a NaN, or the two runs differ by a bit, so something was read that was never
            written or lies beside an operand.
    """
    arguments, options = case.draw(device, seed)
    how = {**options, "backend": backend, "batch_invariant": batch_invariant}
    size = workspace_bytes(*arguments, **how)
    outputs = []
    for poison in (0xFF, 0x7F):  # NaN; large numbers, and ids in range
        out = torch.full(arguments[0].shape, float("nan"), dtype=getattr(torch, case.dtype), device=device)
        workspace = torch.full((size,), poison, dtype=torch.uint8, device=device)
        outputs.append(fused_experts(*arguments, out=out, workspace=workspace, **how))
    assert torch.equal(*outputs), "the output depends on memory that nothing wrote, or that lies beside an operand"
    return outputs[0], relative_error(outputs[0], expected(arguments, options))


def quantised_cases(shapes: Sequence[tuple[int, int, int, int, int]], seed: int = 0) -> list[Case]:
    """Cases over these shapes in which every two options occur together, a scheme being one, and every format once."""
    grid = pairwise({"scheme": tuple(SCHEMES), "shape": shapes, **OPTIONS, **QUANTISED_OPTIONS}, seed)
    for scheme in SCHEMES:  # pairs of options may need fewer rows of a scheme than it has formats
        missing = len(formats_of(scheme)) - sum(row["scheme"] == scheme for row in grid)
        grid += [{**row, "scheme": scheme} for row in grid[: max(0, missing)]]
    turn, cases = dict.fromkeys(SCHEMES, 0), []
    for row in grid:
        options = dict(row)
        scheme, which = options.pop("scheme"), options.pop("quantised")
        formats = formats_of(scheme)
        one, two = (formats[(turn[scheme] + i) % len(formats)] for i in (0, 1))
        turn[scheme] += 1
        chosen = {"both": (one, two), "w13": (one, None), "w2": (None, one)}[which]
        cases.append(Case.of(**options, formats=chosen).fitted())
    return cases


def pairwise(options: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows such that every pair of values of every two options occurs in one: greedy, the same for the same seed."""
    names = list(options)
    chooser = random.Random(seed)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }

    def covers(row: Mapping[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        pairs: Iterable[tuple[str, str]] = itertools.combinations(names, 2)
        return {((a, row[a]), (b, row[b])) for a, b in pairs} & missing

    rows = []
    while missing:
        start = min(missing)
        candidates = []
        for _ in range(30):
            row = {name: chooser.randrange(len(options[name])) for name in names}
            row.update(dict(start))
            candidates.append(row)
        best = max(candidates, key=lambda row: len(covers(row)))
        missing -= covers(best)
        rows.append({name: options[name][index] for name, index in best.items()})
    return rows
