"""Put the experts of a layer, or a slice of them, together from their projections."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmoe.checkpoint.files import CONVERT_AGAIN, FLOATS, error
from fusedmoe.checkpoint.stored import Layer, Projection
from fusedmoe.errors import OptionError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.numerics import pack
from fusedmoe.spec.format import ELEMENTS, SCALES, Format

#: Blocks are not re-cut to fewer rows or columns than this: smaller ones serve no tile of a matrix product.
LEAST = 32


def check_range(name: str, wanted: tuple[int, int] | None, size: int) -> range:
    """A range of 0 .. size, all of it when None."""
    if wanted is None:
        return range(size)
    fits = isinstance(wanted, tuple) and len(wanted) == 2 and all(type(end) is int for end in wanted)
    if not fits or not 0 <= wanted[0] < wanted[1] <= size:
        do = "Give every rank a range of its own that is not empty."
        raise OptionError(explain(name, got=wanted, wanted=f"(start, stop) within 0 .. {size}", do=do))
    return range(*wanted)


class Source(NamedTuple):
    """Rows of a projection that become rows of w13, in this order; ``live`` of them are wanted, others are zeros."""

    projection: Projection
    rows: range
    live: range


class Cut(NamedTuple):
    """What to read of a layer for a slice of the intermediate size, and the blocks that come out."""

    w13: tuple[Source, ...]
    columns: range
    w13_block: tuple[int, int] | None
    w2_block: tuple[int, int] | None
    parts: int


def cut(layer: Layer, wanted: range) -> Cut:
    """Slice the layer; the rule is in :func:`fusedmoe.checkpoint.read_experts`.

    Raises:
        CheckpointError: blocks run over from gate into up rows and cannot be cut here.
    """
    first, form13, form2 = layer.w13[0], layer.w13[0].form(), layer.w2.form()
    blocks13 = form13.block if form13 else (1, 1)
    size, whole = layer.intermediate, range(layer.intermediate)
    fused = layer.gated and len(layer.w13) == 1
    through = fused and not layer.interleaved and not first.halves  # blocks may run over from gate into up rows

    def starts(start: int) -> tuple[int, ...]:
        if layer.interleaved:
            return (2 * start,)
        return (start, size + start) if through else (start,)

    def row_block(span: range) -> int:
        return math.gcd(blocks13[0], *starts(span.start)) if blocks13[0] > 1 else blocks13[0]

    def column_block(span: range) -> int:
        if form2 is None or form2.block[1] == 0:
            return 0
        # Groups divide the columns; the last block may be cut short.
        ends = (span.start, span.stop) if form2.block[0] == 1 else (span.start,)
        return math.gcd(form2.block[1], *ends)

    packed = form2 is not None and form2.per_byte == 2 and form2.block[1] == 0

    def fits(span: range) -> bool:
        rows = row_block(span) >= min(LEAST, blocks13[0])
        columns = form2 is None or column_block(span) >= min(LEAST, form2.block[1])
        return rows and columns and not (packed and (span.start % LEAST or span.stop % LEAST and span.stop != size))

    span = wanted
    if not fits(span) and wanted != whole:
        unit = math.lcm(_unit(blocks13[0]), LEAST if packed else _unit(form2.block[1] if form2 else 0))
        span = range(wanted.start // unit * unit, min(-(-wanted.stop // unit) * unit, size))
    if fused and wanted == whole and not fits(span):  # as it is stored: blocks run through
        sources: tuple[Source, ...] = (Source(first, range(2 * size), range(2 * size)),)
        return Cut(sources, whole, form13.block if form13 else None, form2.block if form2 else None, 1)
    if not fits(span):
        raise error(
            f"slice {wanted.start} .. {wanted.stop} of the intermediate size {size}",
            got=f"blocks of {blocks13[0]} rows that run over from gate into up rows",
            wanted=f"an intermediate size that has at least {LEAST} in common with them",
            do="Read the layer whole.",
        )
    step, offsets = (2, (0,)) if layer.interleaved else (1, (0, size) if fused else (0,) * len(layer.w13))
    projections = layer.w13 if len(layer.w13) == len(offsets) else layer.w13 * len(offsets)
    sources = tuple(
        Source(p, _scaled(span, step, offset), _scaled(wanted, step, offset))
        for p, offset in zip(projections, offsets, strict=True)
    )
    return Cut(
        sources,
        span,
        (row_block(span), blocks13[1]) if form13 else None,
        (form2.block[0], column_block(span)) if form2 else None,
        2 if len(sources) == 2 and blocks13[0] != 1 else 1,
    )


def _unit(block: int) -> int:
    """The smallest part of a block that it may be re-cut to."""
    return next((d for d in range(min(LEAST, block), block + 1) if d and block % d == 0), 1)


def _scaled(span: range, step: int, offset: int) -> range:
    return range(offset + step * span.start, offset + step * span.stop)


def read_matrix(
    sources: tuple[Source, ...],
    columns: range,
    experts: range,
    *,
    block: tuple[int, int] | None,
    parts: int = 1,
    dtype: torch.dtype | None,
    device: torch.device | str,
    tick: Callable[[], None],
) -> Tensor | ExpertMatrix:
    """Rows of the sources below one another, for each of the experts."""
    first = sources[0].projection
    n_rows = sum(len(source.rows) for source in sources)
    form = first.form(block)
    if form is None:
        sides = (len(columns), n_rows) if first.transposed else (n_rows, len(columns))
        weight = torch.empty((len(experts), *sides), dtype=dtype or FLOATS[first.types["data"]], device=device)
        rows_first = weight.transpose(1, 2) if first.transposed else weight
        for i, expert in enumerate(experts):
            row = 0
            for projection, rows, _ in sources:
                rows_first[i, row : row + len(rows)].copy_(projection.codes(expert, rows, columns))
                row += len(rows)
            tick()
        return weight
    scale_rows = sum(-(-len(source.rows) // form.block[0]) if form.block[0] else 1 for source in sources)
    scale_columns = -(-len(columns) // form.block[1]) if form.block[1] else 1
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "data": ((n_rows, len(columns) // form.per_byte), ELEMENTS[form.element].dtype),
        "scale": ((scale_rows, scale_columns), SCALES[form.scale]),
    }
    if form.zero:
        shapes["zero"] = ((-(-n_rows // form.per_byte), scale_columns), "uint8")
    if form.tensor_scale:
        shapes["tensor_scale"] = ((len(sources),), "float32")
    out = {
        name: torch.empty((len(experts), *shape), dtype=getattr(torch, kind), device=device)
        for name, (shape, kind) in shapes.items()
    }
    for i, expert in enumerate(experts):
        for name, tensor in _expert(sources, columns, expert, form).items():
            out[name][i].copy_(tensor)
        tick()
    if form.tensor_scale:
        scales = out["tensor_scale"]
        if bool((scales == scales[:, :1]).all()):
            out["tensor_scale"] = scales[:, 0].contiguous()
        else:
            parts = len(sources)
    if form.inputs is not None and form.inputs.mode == "static":
        # Of all experts, so that every rank quantises alike; a few numbers.
        numbers = [
            p.number("input_scale", e) for p in dict.fromkeys(s.projection for s in sources) for e in range(p.experts)
        ]
        out["input_scale"] = torch.cat(numbers).amax().reshape(1).to(device)
        if not bool((out["input_scale"] > 0).all() and out["input_scale"].isfinite().all()):
            got, name = out["input_scale"].item(), first.name("input_scale", 0)
            raise error(f"largest of {name} and its like", got=got, wanted="a positive number", do=CONVERT_AGAIN)
    return ExpertMatrix(form, parts=parts, **out)  # type: ignore[arg-type]


def _expert(sources: tuple[Source, ...], columns: range, expert: int, form: Format) -> dict[str, Tensor]:
    """The canonical tensors of one expert."""
    pieces: dict[str, list[Tensor]] = {"data": [], "scale": [], "zero": [], "tensor_scale": []}
    for projection, rows, live in sources:
        _check_order(projection, expert, columns)
        codes = projection.codes(expert, rows, columns)
        scales = projection.scales(expert, rows, columns, form.block)
        # A row of zeros gives an activation of zero. Its code is 0, or its own scales are.
        of_neighbours = [r - rows.start for r in rows if r not in live]
        if of_neighbours and ELEMENTS[form.element].zero == 0 and not form.zero:
            codes = codes.clone()
            codes.view(torch.uint8)[of_neighbours] = 0
        elif of_neighbours:
            scales[of_neighbours] = 0
        pieces["data"].append(codes.view(torch.uint8))  # fp8 codes cannot be concatenated everywhere
        pieces["scale"].append(scales)
        if "zero" in projection.endings:
            zero = projection.zeros(expert, rows, columns, form.block)
            if not form.zero and bool((zero != ELEMENTS[form.element].zero).any()):
                raise error(
                    f"zero points {projection.name('zero', expert)}",
                    got="some",
                    wanted=f"{ELEMENTS[form.element].zero} everywhere: config.json says that codes are symmetric",
                    do="Correct sym or checkpoint_format in config.json: version 1 stores zero points less one.",
                )
            pieces["zero"].append(zero)
        if form.tensor_scale:
            pieces["tensor_scale"].append(projection.number("tensor_scale", expert))
    out = {"data": torch.cat(pieces["data"]), "scale": torch.cat(pieces["scale"])}
    out["data"] = out["data"].view(getattr(torch, ELEMENTS[form.element].dtype))
    if form.zero:
        zero = torch.cat(pieces["zero"])
        out["zero"] = pack(zero.T).T if form.per_byte == 2 else zero
    if form.tensor_scale:
        out["tensor_scale"] = torch.cat(pieces["tensor_scale"])
    return out


def _check_order(projection: Projection, expert: int, columns: range) -> None:
    if "order" in projection.endings and not projection.ordered(expert, columns):
        raise error(
            f"order of columns {projection.name('order', expert)}",
            got="groups of columns in the order of activations (desc_act, actorder)",
            wanted="column k in group k // group_size",
            do="It needs a permutation of the inputs, and cannot be sliced: quantise with desc_act=False.",
        )


def read_bias(
    sources: tuple[Source, ...], experts: range, *, dtype: torch.dtype | None, device: torch.device | str
) -> Tensor | None:
    """[E, rows], or None where there is none; 0 in rows that are not wanted."""
    first = sources[0].projection
    if "bias" not in first.endings:
        return None
    size = (len(experts), sum(len(source.rows) for source in sources))
    bias = torch.zeros(size, dtype=dtype or FLOATS[first.types["bias"]], device=device)
    for i, expert in enumerate(experts):
        row = 0
        for projection, rows, live in sources:
            start = row + live.start - rows.start
            bias[i, start : start + len(live)].copy_(projection.bias(expert, live))
            row += len(rows)
    return bias
