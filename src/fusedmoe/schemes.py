"""Quantisation schemes by name: the one table that names them all. The equation: :mod:`fusedmoe.spec.format`.

A scheme fixes the type of the codes, which blocks of weights may share a scale, and whether the rows that meet the
weights are quantised too. Kernels, planner, reference and readers work from the :class:`Format` that comes out; a
scheme that is added here is tested, quantised, planned and run without a change elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fusedmoe.errors import OptionError, explain
from fusedmoe.spec.format import Format, InputMode, Inputs

Granularity = Literal["tensor", "channel", "block", "group"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What a scheme allows; the first of each is the default.

    Attributes:
        text: what it is, one line.
        elements: types of weight codes.
        granularities: weights that share a scale: "tensor": those of an expert, "channel": of a row, "block": of a
            rectangle with both sides above 1, "group": of ``group`` columns of a row.
        groups: column counts of a group; empty when the scheme has none.
        scales: types of the scales.
        zero: zero points are allowed.
        tensor_scale: a further scale per expert is part of the format.
        inputs: modes in which rows are quantised; None: they are not.
        input_element: type of the rows' codes.
    """

    text: str
    elements: tuple[str, ...]
    granularities: tuple[Granularity, ...]
    groups: tuple[int, ...] = ()
    scales: tuple[str, ...] = ("float32",)
    zero: bool = False
    tensor_scale: bool = False
    inputs: tuple[InputMode | None, ...] = (None,)
    input_element: Literal["e4m3", "int8"] = "e4m3"


_FP8 = ("e4m3", "e4m3fnuz")
_FLOATS = ("float32", "float16", "bfloat16")
_INTEGER_GROUPS = (128, 64, 32)

SCHEMES: dict[str, Scheme] = {
    "fp8_block": Scheme(
        text="e4m3 weights and rows; a scale per block of weights, and per row and columns of a block",
        elements=_FP8,
        granularities=("block",),
        scales=(*_FLOATS, "e8m0"),
        inputs=("group",),
    ),
    "fp8_channel": Scheme(
        text="e4m3 weights and rows; a scale per row of weights, and per token",
        elements=_FP8,
        granularities=("channel",),
        scales=_FLOATS,
        inputs=("token", "static", "tensor"),
    ),
    "fp8_tensor": Scheme(
        text="e4m3 weights and rows; a scale per expert matrix, and per token or one for all",
        elements=_FP8,
        granularities=("tensor",),
        scales=_FLOATS,
        inputs=("token", "static", "tensor"),
    ),
    "fp8_w8a16": Scheme(
        text="e4m3 weights, rows as they are; a scale per row, block or expert matrix",
        elements=_FP8,
        granularities=("channel", "block", "tensor"),
        scales=(*_FLOATS, "e8m0"),
    ),
    "int8_w8a8": Scheme(
        text="int8 weights and rows; a scale per row, expert matrix or block, and per token, for all, or per group",
        elements=("int8",),
        granularities=("channel", "tensor", "block"),
        scales=_FLOATS,
        inputs=("token", "static", "tensor", "group"),
        input_element="int8",
    ),
    "int8_w8a16": Scheme(
        text="int8 weights, rows as they are; a scale per row or group, with or without zero points",
        elements=("int8", "uint8"),
        granularities=("channel", "group"),
        groups=_INTEGER_GROUPS,
        scales=_FLOATS,
        zero=True,
    ),
    "int4_w4a16": Scheme(
        text="int4 weights, rows as they are; a scale per group or row, with or without zero points",
        elements=("int4",),
        granularities=("group", "channel"),
        groups=_INTEGER_GROUPS,
        scales=_FLOATS,
        zero=True,
    ),
    "mxfp4": Scheme(
        text="e2m1 weights with a power of two per 32 (OCP MX), rows as they are",
        elements=("e2m1",),
        granularities=("group",),
        groups=(32,),
        scales=("e8m0",),
    ),
    "mxfp8": Scheme(
        text="e4m3 weights with a power of two per 32 (OCP MX), rows as they are",
        elements=("e4m3",),
        granularities=("group",),
        groups=(32,),
        scales=("e8m0",),
    ),
    "mxfp4_fp8": Scheme(
        text="e2m1 weights with a power of two per 32, e4m3 rows with a scale per token (W4A8)",
        elements=("e2m1",),
        granularities=("group",),
        groups=(32,),
        scales=("e8m0",),
        inputs=("token", "static", "tensor"),
    ),
    "nvfp4": Scheme(
        text="e2m1 weights with an e4m3 scale per 16 and a float32 scale per expert, rows as they are",
        elements=("e2m1",),
        granularities=("group",),
        groups=(16,),
        scales=("e4m3",),
        tensor_scale=True,
    ),
}


def granularity_of(block: tuple[int, int]) -> Granularity:
    """What shares a scale in blocks of these sides."""
    if block == (0, 0):
        return "tensor"
    if block == (1, 0):
        return "channel"
    return "group" if block[0] == 1 else "block"


def format_of(
    scheme: str,
    *,
    block: tuple[int, int] | None = None,
    group: int | None = None,
    inputs: str | None = None,
    zero: bool = False,
    element: str | None = None,
    scale: str | None = None,
) -> Format:
    """The format of a scheme with these choices.

    Args:
        scheme: key of :data:`SCHEMES`.
        block: rows and columns that share a scale, 0 for all: (128, 128), (1, 0) a row, (0, 0) the matrix.
        group: columns of a row that share a scale, -1 for all; another way to say block=(1, group).
        inputs: "token", "group", "tensor" or "static"; the scheme's first when None.
        zero: with zero points.
        element, scale: types; the scheme's first when None.

    Raises:
        OptionError: the scheme does not exist, or does not allow the choice.

    >>> str(format_of("int4_w4a16", group=64))
    'int4_w4a16 1x64 float32'
    """
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise OptionError(explain("scheme", got=repr(scheme), wanted=" or ".join(SCHEMES), do="Choose one of them."))
    has = SCHEMES[scheme]

    def refuse(what: str, got: object, wanted: object) -> OptionError:
        return OptionError(
            explain(f"{what} of scheme {scheme!r}", got=got, wanted=wanted, do="Leave it out for the default.")
        )

    if block is not None and group is not None:
        raise refuse("block and group", f"block={block}, group={group}", "one of them")
    if group is not None:
        block = (1, 0 if group == -1 else group)
    if block is None:
        default = "block" if inputs == "group" and "block" in has.granularities else has.granularities[0]
        first = has.groups[0] if has.groups else 0
        block = {"tensor": (0, 0), "channel": (1, 0), "block": (128, 128), "group": (1, first)}[default]
    sides = block if isinstance(block, (tuple, list)) else ()
    fits = len(sides) == 2 and all(isinstance(side, int) and side >= 0 for side in sides)
    block = (block[0], block[1]) if fits else block  # a list, from a configuration file, has no hash
    kind = granularity_of(block) if fits else None
    if kind not in has.granularities or kind == "block" and min(block) < 2:
        raise refuse("block", block, " or ".join(has.granularities))
    if kind == "group" and block[1] not in has.groups:
        raise refuse("group", block[1], " or ".join(map(str, has.groups)))
    if zero and not has.zero:
        raise refuse("zero points", "some", "none")
    elements = tuple(e for e in has.elements if not (zero and e == "int8"))  # codes less a zero point are unsigned
    element = element or elements[0]
    if not isinstance(element, str) or element not in elements:
        raise refuse("element", element, " or ".join(elements))
    scale = scale or has.scales[0]
    if not isinstance(scale, str) or scale not in has.scales:
        raise refuse("type of scales", scale, " or ".join(has.scales))
    if not isinstance(inputs, (str, type(None))):
        raise refuse("inputs", inputs, " or ".join(mode or "none" for mode in has.inputs))
    mode = inputs or (has.inputs[0] if kind != "block" or "group" not in has.inputs else "group")
    if mode not in has.inputs or (mode == "group") != (kind == "block" and has.inputs != (None,)):
        allowed = [m or "none" for m in has.inputs if (m == "group") == (kind == "block") or m is None]
        raise refuse(f"inputs with block {block}", inputs, " or ".join(allowed))
    quantised = None
    if mode is not None:
        code = "int8" if has.input_element == "int8" else "e4m3fnuz" if element == "e4m3fnuz" else "e4m3"
        quantised = Inputs(element=code, mode=mode, group=block[1] if mode == "group" else 0)  # type: ignore[arg-type]
    return Format(
        scheme=scheme,
        element=element,
        block=block,
        scale=scale,
        zero=zero,
        tensor_scale=has.tensor_scale,
        inputs=quantised,
    )


def formats_of(scheme: str, block: tuple[int, int] = (128, 128)) -> Iterator[Format]:
    """Every format that a scheme allows, with this block where it has blocks: what has to be tested.

    >>> [str(form) for form in formats_of("mxfp4_fp8")][:2]
    ['mxfp4_fp8 1x32 e8m0 e4m3/token', 'mxfp4_fp8 1x32 e8m0 e4m3/static']
    """
    has = SCHEMES[scheme]
    sides: dict[Granularity, list[tuple[int, int]]] = {"tensor": [(0, 0)], "channel": [(1, 0)], "block": [block]}
    sides["group"] = [(1, size) for size in has.groups]
    choices = itertools.product(
        has.elements,
        itertools.chain.from_iterable(sides[kind] for kind in has.granularities),
        has.scales,
        (False, True),
        has.inputs,
    )
    for element, shares, scale, zero, inputs in choices:
        with contextlib.suppress(OptionError):  # not every choice goes with every other
            yield format_of(scheme, block=shares, inputs=inputs, zero=zero, element=element, scale=scale)
