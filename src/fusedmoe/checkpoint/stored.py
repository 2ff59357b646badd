"""Find the experts of one layer among the tensors, by the namings of :mod:`fusedmoe.checkpoint`, and read parts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fusedmoe.checkpoint.files import CONVERT_AGAIN, FLOATS, Files, error, some
from fusedmoe.checkpoint.methods import PLAIN, Method, method_of
from fusedmoe.checkpoint.models import INTERLEAVED, integer, model_type_of
from fusedmoe.errors import CheckpointError
from fusedmoe.spec.format import Format
from fusedmoe.spec.layout import WeightLayout


def _ceil(size: int, unit: int) -> int:
    """How many units cover a size; a unit of 0 is all of it."""
    return -(-size // unit) if unit else 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """One projection [N, K] of all experts: where its tensors are, and how to read a rectangle of one expert.

    Attributes:
        head, tail: the names begin with head + expert + tail; tail None: one tensor holds all experts.
        experts: how many there are.
        method: what the tensors are.
        endings: names' endings of the parts that there are.
        types: safetensors types of the parts, by the first expert.
        shape: (N, K).
        transposed: stored [K, N], all parts that have both sides.
        halves: the rows are two matrices whose blocks of rows start anew, N / 2 rows each.
    """

    files: Files
    head: str
    tail: str | None
    experts: int
    method: Method
    endings: dict[str, str]
    types: dict[str, str]
    shape: tuple[int, int] = (0, 0)
    transposed: bool = False
    halves: bool = False

    def name(self, part: str, expert: int) -> str:
        """Name of the tensor of a part."""
        return self.prefix(expert) + self.endings[part]

    def prefix(self, expert: int) -> str:
        """What the names of an expert's tensors begin with."""
        return self.head if self.tail is None else f"{self.head}{expert}{self.tail}"

    def names(self) -> set[str]:
        """Every tensor name of these experts, also of tensors that add nothing."""
        endings = (*self.endings.values(), *self.method.ignored)
        return {self.prefix(expert) + ending for expert in range(self.experts) for ending in endings}

    def swapped(self, part: str) -> bool:
        """Whether columns come first in the tensor of a part."""
        return self.transposed or self.method.parts[part].transposed

    def alone(self, part: str) -> bool:
        """Whether the tensor of a part has no side for experts: it is of one, or one number of all."""
        one = self.method.parts[part].unit == (0, 0)
        return self.tail is not None or one and self.files.header(self.name(part, 0))[0] in ((), (1,))

    def form(self, block: tuple[int, int] | None = None) -> Format | None:
        """Format of the codes, with other blocks if given; None when not quantised."""
        return self.method.form(self.types, block)

    def counts(self, part: str) -> tuple[int, int]:
        """Rows and columns of the tensor of a part, in its units."""
        (n_rows, n_columns), (unit_n, unit_k) = self.shape, self.method.parts[part].unit
        if part == "scale" and self.halves:
            return 2 * _ceil(n_rows // 2, unit_n), _ceil(n_columns, unit_k)
        return _ceil(n_rows, unit_n), _ceil(n_columns, unit_k)

    def scale_row(self, row: int) -> int:
        """Row of scales of a row of weights."""
        unit, half = self.method.parts["scale"].unit[0], self.shape[0] // 2
        if self.halves and row >= half:
            return _ceil(half, unit) + self.scale_row(row - half)
        return row // unit if unit else 0

    # --- reading --------------------------------------------------------------------------------------------------

    def codes(self, expert: int, rows: range, columns: range) -> Tensor:
        """Canonical bytes of the codes, or the weights themselves, of a rectangle."""
        stored = self.method.parts["data"]
        unit_n, unit_k = stored.unit
        units = _cover(rows, unit_n), _cover(columns, unit_k)
        tensor = stored.decode(self._read("data", expert, *units))
        per = len(units[1]) * unit_k // tensor.shape[1]  # codes in a byte
        first = columns.start - units[1].start * unit_k
        row = rows.start - units[0].start * unit_n
        return tensor[row : row + len(rows), first // per : (first + len(columns)) // per]

    def scales(self, expert: int, rows: range, columns: range, block: tuple[int, int]) -> Tensor:
        """Scales of a rectangle in blocks of these sides, counted from its corner; those stored are whole multiples."""
        row = [self.scale_row(r) for r in _starts(rows, block[0])]
        return self._spread("scale", expert, row, columns, block[1])

    def zeros(self, expert: int, rows: range, columns: range, block: tuple[int, int]) -> Tensor:
        """Zero points of a rectangle, one a byte."""
        unit = self.method.parts["zero"].unit[0]
        units = _cover(rows, unit)
        row = [r - units.start * unit for r in rows]
        return self._spread("zero", expert, row, columns, block[1], units)

    def _spread(
        self, part: str, expert: int, rows: list[int], columns: range, block: int, units: range | None = None
    ) -> Tensor:
        """A part for blocks of columns; ``rows`` count in the tensor, or in what ``units`` of it decode to."""
        stored = self.method.parts[part]
        column = [c // stored.unit[1] if stored.unit[1] else 0 for c in _starts(columns, block)]
        first = range(min(rows), max(rows) + 1) if units is None else units
        tensor = stored.decode(self._read(part, expert, first, range(column[0], column[-1] + 1)))
        row = torch.tensor(rows) - (first.start if units is None else 0)
        plain = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # torch 2.9 indexes no float8
        return plain[row][:, torch.tensor(column) - column[0]].view(tensor.dtype)

    def number(self, part: str, expert: int) -> Tensor:
        """A part that is one number, as float32 [1]."""
        return self.method.parts[part].decode(self._read(part, expert, range(1), range(1)).float()).reshape(1)

    def bias(self, expert: int, rows: range) -> Tensor:
        """Bias of some rows."""
        return self._read("bias", expert, rows, range(1)).flatten()

    def ordered(self, expert: int, columns: range) -> bool:
        """Whether these columns belong to the groups that they lie in."""
        group = self.method.parts["scale"].unit[1]
        order = self._read("order", expert, range(1), columns).flatten()
        return torch.equal(order.long(), torch.arange(columns.start, columns.stop) // (group or self.shape[1]))

    def _read(self, part: str, expert: int, rows: range, columns: range) -> Tensor:
        """Some rows and columns of the tensor of a part, in its own units, rows first: [rows, columns, ...]."""
        name = self.name(part, expert)
        shape, _ = self.files.header(name)
        swapped = self.swapped(part)
        ranges = [(rows, columns), (columns, rows)][swapped]
        counts = self.counts(part)[:: -1 if swapped else 1]
        # Sides of 1 may be left out where they are stored, so that sides are paired by those that are longer.
        sides = [slice(r.start, r.stop) for r, count in zip(ranges, counts, strict=True) if count != 1]
        index: list[int | slice] = [] if self.alone(part) else [expert]
        index += [sides.pop(0) if sides and size != 1 else slice(None) for size in shape[len(index) :]]
        tensor = self.files.read(name, tuple(index))
        tensor = tensor.reshape(len(ranges[0]), len(ranges[1]), *self.method.parts[part].trailing)
        return tensor.transpose(0, 1) if swapped else tensor

    # --- checks ---------------------------------------------------------------------------------------------------

    def check(self, experts: range, first: Projection) -> None:
        """Raise unless the tensors of these experts have shapes and types that fit one another and ``first``."""
        for part in self.endings:
            stored = self.method.parts[part]
            counts = list(self.counts(part))
            if self.swapped(part):
                counts.reverse()
            for expert in experts if self.tail is not None else experts[:1]:
                shape, kind = self.files.header(self.name(part, expert))
                lead = () if self.alone(part) else (self.experts,)
                own = shape[len(lead) :]
                fits = shape[: len(lead)] == lead and _long(own) == _long((*counts, *stored.trailing))
                sides = part != "data" or len(own) == 2 + len(stored.trailing)
                if not fits or not sides or kind != self.types[part] or 0 in shape:
                    raise _unfit(self, part, expert, first)


def _long(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _cover(span: range, unit: int) -> range:
    """Units that a range of weights touches."""
    return range(span.start // unit, _ceil(span.stop, unit)) if unit else range(1)


def _starts(span: range, block: int) -> range:
    """Where the blocks of a range begin; a block of 0 is all of it."""
    return range(span.start, span.stop, block or len(span))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The experts of a layer as they are stored.

    Attributes:
        w13: gate and up, up alone when not gated, or one of both (2I rows).
        w2: down.
        consumed: every tensor name of these experts.
        hidden, intermediate: H and I.
        interleaved: gate and up rows alternate.
    """

    w13: tuple[Projection, ...]
    w2: Projection
    consumed: frozenset[str]
    experts: int
    hidden: int
    intermediate: int
    gated: bool = True
    interleaved: bool = False
    weight_layout: WeightLayout = "NK"

    def check(self, experts: range) -> None:
        """Raise unless the tensors of these experts fit one another, by their headers."""
        for projection in (*self.w13, self.w2):
            projection.check(experts, self.w13[0])


#: Names of gate, up and down of one expert. Without any gate_proj the second naming is not gated.
_SEPARATE = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"))
#: Names of w13 and w2 of all experts.
_FUSED = (("experts.gate_up_proj", "experts.down_proj"), ("input_linear", "output_linear"))
_SEPARATE_NAME = re.compile(r"(\d{1,6})\.(w[123]|(?:gate|up|down)_proj)(\.[a-z0-9_]+)")


def find_layer(files: Files, block: str) -> Layer:
    """Find the experts of a block, and refuse what is inconsistent or not understood."""
    names = files.under(block + "experts.")
    fused = next((fused for fused in _FUSED if any(n.startswith(block + fused[0]) for n in files.under(block))), None)
    layer = _fused_layer(files, block, fused) if fused else _separate_layer(files, block, names)
    # Some models keep the correction bias of the router here; anything else would change the result.
    known = layer.consumed | {block + "experts.e_score_correction_bias"}
    if unknown := [name for name in names if name not in known]:
        raise error(
            f"tensors beside the experts of {block}",
            got=some(unknown),
            wanted=f"only {some(sorted(layer.consumed), 2)} and the like",
            do="Their part in the computation is not known here: build FusedExperts from tensors yourself.",
        )
    return layer


def _projection(files: Files, head: str, tail: str | None, experts: int, modules: tuple[str, ...]) -> Projection:
    """The projection with the method that the configuration and the tensors agree on."""
    method, must = method_of(files.config, modules)
    prefix = head if tail is None else f"{head}0{tail}"
    endings, types = {}, {}
    for part, stored in method.parts.items():
        name = files.first(prefix, stored.endings)
        if name is None:
            if not stored.required:
                continue
            raise error(
                f"experts quantised as {method.name}" if must else "experts",
                got=f"no {' or '.join(prefix + ending for ending in stored.endings)}",
                wanted=f"it, for the {part} of the experts",
                do=CONVERT_AGAIN,
            )
        endings[part], types[part] = name.removeprefix(prefix), files.header(name)[1]
        if types[part] not in stored.types:
            plain = types[part] in FLOATS and part == "data" and must
            raise error(
                f"type of {name}, {part} of experts that are {method.name}",
                got=f"{types[part]}{', which is not quantised' if plain else ''}",
                wanted=" or ".join(stored.types),
                do="If the experts are meant to be unquantised, name them in the list of modules that are left out."
                if plain
                else "Check quantization_config in config.json: it has to say how the experts are quantised.",
            )
    return Projection(files=files, head=head, tail=tail, experts=experts, method=method, endings=endings, types=types)


def _shape(projection: Projection) -> tuple[int, int]:
    """(N, K) by the header of the first expert's codes, and their unit."""
    stored, name = projection.method.parts["data"], projection.name("data", 0)
    shape = projection.files.header(name)[0][projection.tail is None :]
    if len(shape) < 2 or 0 in shape:
        raise error(f"shape of {name}", got=shape, wanted="rows and columns", do=CONVERT_AGAIN)
    n_rows, n_columns = (shape[1], shape[0]) if projection.swapped("data") else (shape[0], shape[1])
    n_rows, n_columns = n_rows * stored.unit[0], n_columns * stored.unit[1]
    true = projection.files.first(projection.prefix(0), (".weight_shape",))
    if true and true.removeprefix(projection.prefix(0)) in projection.method.ignored:  # words may be filled up
        sizes, kind = projection.files.header(true)
        if math.prod(sizes) != 2 or kind not in ("I32", "I64"):  # it may be large, or not a number
            raise error(f"shape or type of {true}", got=f"{sizes} of {kind}", wanted="two integers", do=CONVERT_AGAIN)
        said = projection.files.read(true).flatten().tolist()
        if said[0] != n_rows or not 0 <= n_columns - said[1] < stored.unit[1]:
            raise error(f"{true}", got=said, wanted=f"about {(n_rows, n_columns)}, as {name} says", do=CONVERT_AGAIN)
        n_columns = said[1]
    return n_rows, n_columns


def _separate_layer(files: Files, block: str, names: list[str]) -> Layer:
    found: dict[int, dict[str, set[str]]] = {}
    for name in names:
        if match := _SEPARATE_NAME.fullmatch(name, len(block + "experts.")):
            found.setdefault(int(match[1]), {}).setdefault(match[2], set()).add(match[3])
    parts = next((parts for parts in _SEPARATE if any(parts[2] in expert for expert in found.values())), None)
    if parts is None:
        raise error(
            f"names of the experts of {block}",
            got=some(names),
            wanted="one of the namings listed in fusedmoe.checkpoint",
            do="Build FusedExperts from tensors yourself.",
        )
    experts = _count(files.config, block, max(found) + 1)
    if missing := list(islice((expert for expert in range(experts) if expert not in found), 5)):
        raise error(
            f"experts of {block}",
            got=f"none with number {some(missing)}",
            wanted=f"0-{experts - 1}",
            do=CONVERT_AGAIN,
        )
    gated = any(parts[0] in expert for expert in found.values())
    roles = parts if gated else parts[1:]
    head = f"{block}experts."
    projections = []
    for role in roles:
        modules = (f"{head}0.{role}", head[:-1])
        projection = _projection(files, head, f".{role}", experts, modules)
        projections.append(replace(projection, shape=_shape(projection)))
    # Gate and up have the same parts, or one of them lacks some.
    both = {part: ending for p in projections[:-1] for part, ending in p.endings.items()}
    kinds = {part: kind for p in projections[:-1] for part, kind in p.types.items()}
    projections[:-1] = [replace(p, endings=both | p.endings, types=kinds | p.types) for p in projections[:-1]]
    absent = (
        projection.prefix(e) + ending
        for e in range(experts)
        for role, projection in zip(roles, projections, strict=True)
        for ending in projection.endings.values()
        if ending not in found[e].get(role, ())
    )
    if missing_names := list(islice(absent, 5)):
        raise error(f"experts of {block}", got=f"no {some(missing_names)}", wanted="all of them", do=CONVERT_AGAIN)
    *w13, w2 = projections
    intermediate, hidden = w13[0].shape
    # What does not fit is reported where headers are compared.
    w13 = [replace(p, shape=(intermediate, hidden)) for p in w13]
    w2 = replace(w2, shape=(hidden, intermediate))
    if any(p.types != w13[0].types for p in w13):
        raise _unfit(w13[1], next(part for part in both if w13[1].types[part] != w13[0].types[part]), 0, w13[0])
    if w13[0].method == PLAIN == w2.method and w2.types["data"] != w13[0].types["data"]:
        raise _unfit(w2, "data", 0, w13[0])
    return Layer(
        w13=tuple(w13),
        w2=w2,
        consumed=frozenset().union(*(p.names() for p in (*w13, w2))),
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        gated=gated,
    )


def _fused_layer(files: Files, block: str, fused: tuple[str, str]) -> Layer:
    heads = [block + name for name in fused]
    w13, w2 = (_projection(files, head, None, 1, (head, block + "experts")) for head in heads)
    name13, name2 = (p.name("data", 0) for p in (w13, w2))
    first, second = files.header(name13)[0], files.header(name2)[0]
    plain = w13.method == PLAIN == w2.method
    if (
        len(first) < 3
        or len(second) < 3
        or 0 in first
        or first[0] != second[0]
        or plain
        and w13.types["data"] != w2.types["data"]
    ):
        raise _unfit(w2, "data", 0, w13)
    interleaved = model_type_of(files.config) in INTERLEAVED
    if w13.endings["data"] == "_blocks" and not interleaved:  # gpt-oss's own format: those of others may differ in this
        raise error(
            f"order of gate and up rows of {name13}",
            got=f"model type {model_type_of(files.config)!r}",
            wanted=f"one of {', '.join(sorted(INTERLEAVED))}, which store their experts so",
            do="Build FusedExperts from tensors yourself: fusedmoe.ExpertMatrix takes these codes and scales.",
        )
    experts = _count(files.config, block, first[0])
    if experts != first[0]:
        raise error(f"experts of {block}", got=first[0], wanted=f"{experts}, as config.json says", do=CONVERT_AGAIN)
    (rows, hidden), (out, inner) = _shape(w13), _shape(w2)
    # Both at once would need I = 2I, so the shapes alone decide, square matrices included.
    if (rows, hidden) != (2 * inner, out) and w13.method.either_way and w13.method == w2.method:
        w13, w2 = replace(w13, transposed=True), replace(w2, transposed=True)
        (rows, hidden), (out, inner) = _shape(w13), _shape(w2)
    if (rows, hidden) != (2 * inner, out):
        raise _unfit(w2, "data", 0, w13)
    w13 = replace(w13, experts=experts, shape=(rows, hidden))
    w2 = replace(w2, experts=experts, shape=(hidden, inner))
    if "scale" in w13.endings:
        unit = w13.method.parts["scale"].unit[0]
        stored = files.header(w13.name("scale", 0))[0][1:2]
        w13 = replace(w13, halves=unit != 1 and stored == (2 * _ceil(inner, unit),))
    return Layer(
        w13=(w13,),
        w2=w2,
        consumed=frozenset(w13.names() | w2.names()),
        experts=experts,
        hidden=hidden,
        intermediate=inner,
        interleaved=interleaved,
        weight_layout="KN" if plain and w13.transposed else "NK",  # codes are put together anew
    )


def _count(config: dict[str, Any], block: str, found: int) -> int:
    """Number of experts, on which tensors and configuration must agree when it says one."""
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    wanted = None if "block_configs" in config else integer(config, keys)  # those differ from layer to layer
    if wanted is not None and found > wanted:
        raise error(f"experts of {block}", got=found, wanted=f"{wanted}, as config.json says", do=CONVERT_AGAIN)
    return found if wanted is None else wanted


def _unfit(projection: Projection, part: str, expert: int, first: Projection) -> CheckpointError:
    name, other = projection.name(part, expert), first.name("data", 0)
    (shape, kind), (first_shape, first_kind) = projection.files.header(name), projection.files.header(other)
    return error(
        f"shape or type of {name}",
        got=f"{shape} of {kind}",
        wanted=f"what fits {other}, {first_shape} of {first_kind}",
        do=CONVERT_AGAIN,
    )
