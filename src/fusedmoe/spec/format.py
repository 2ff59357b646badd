"""How the numbers of an expert matrix are stored, and what becomes of the rows it multiplies: one equation for all.

    w[n, k] = (q[n, k] - z[n, k // bk]) * s[n // bn, k // bk] * t

q: codes, z: zero points (0 where there are none), s: scales of blocks of bn rows and bk columns, t: one scale per
expert (1 where there is none). A scheme is a choice of these; see :mod:`fusedmoe.schemes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from fusedmoe.errors import OptionError, explain

InputMode = Literal["token", "group", "tensor", "static"]


class Element(NamedTuple):
    """A type of codes.

    ``dtype``: torch type of the storage; ``per_byte``: codes in a byte; ``largest``: magnitude that quantisation
    maps the largest value to; ``zero``: code of 0 where there are no zero points; ``step``: distance of neighbouring
    codes relative to a typical value, for error bounds.
    """

    dtype: str
    per_byte: int
    largest: float
    zero: int
    step: float


#: Two codes in a byte: the low nibble holds the even k.
ELEMENTS: dict[str, Element] = {
    "e4m3": Element("float8_e4m3fn", 1, 448.0, 0, 0.09),
    "e4m3fnuz": Element("float8_e4m3fnuz", 1, 240.0, 0, 0.09),
    "int8": Element("int8", 1, 127.0, 0, 0.03),
    "uint8": Element("uint8", 1, 127.0, 128, 0.03),
    "int4": Element("uint8", 2, 7.0, 8, 0.3),
    "e2m1": Element("uint8", 2, 6.0, 0, 0.3),
}

#: Type of scales -> torch type of their storage. e8m0: the byte c means 2^(c - 127), 255 is NaN.
SCALES: dict[str, str] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "e8m0": "uint8",
    "e4m3": "float8_e4m3fn",
}


_SEE = "fusedmoe.schemes.format_of makes formats that fit together."


def _one_of(what: str, got: object, allowed: Iterable[str]) -> None:
    if not isinstance(got, str) or got not in allowed:
        raise OptionError(explain(what, got=repr(got), wanted=" or ".join(allowed), do=_SEE))


def _side(value: object) -> bool:
    """A number of rows or columns that a kernel can count with."""
    return isinstance(value, int) and 0 <= value < 2**31


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Quantisation of the rows that an expert matrix multiplies, symmetric: x = code * scale.

    ``mode`` "token": a scale per row, "group": per row and ``group`` columns, "tensor": one over all live rows, all
    three from the largest magnitude, computed in the call; "static": one that was given with the matrix.
    """

    element: Literal["e4m3", "e4m3fnuz", "int8"]
    mode: InputMode
    group: int = 0

    def __post_init__(self) -> None:
        _one_of("element of inputs", self.element, ("e4m3", "e4m3fnuz", "int8"))
        _one_of("mode of inputs", self.mode, get_args(InputMode))
        if not _side(self.group) or (self.mode == "group") != (self.group > 0):
            wanted = "a positive number of columns in mode 'group', else 0"
            raise OptionError(explain("group of inputs", got=repr(self.group), wanted=wanted, do=_SEE))


@dataclass(frozen=True, kw_only=True)
class Format:
    """Storage of an expert matrix [E, N, K].

    Attributes:
        scheme: its name, for people and messages; nothing is decided by it.
        element: key of ELEMENTS.
        block: rows and columns (bn, bk) of weights that share a scale; 0 means all.
        scale: key of SCALES.
        zero: has zero points.
        tensor_scale: has a further float32 scale per expert.
        inputs: how the rows it multiplies are quantised; None when they are not.
    """

    scheme: str
    element: str
    block: tuple[int, int]
    scale: str = "float32"
    zero: bool = False
    tensor_scale: bool = False
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        _one_of("element", self.element, ELEMENTS)
        _one_of("type of scales", self.scale, SCALES)
        if not isinstance(self.block, tuple) or len(self.block) != 2 or not all(map(_side, self.block)):
            wanted = "(rows, columns), numbers from 0, which stands for all"
            raise OptionError(explain("block", got=repr(self.block), wanted=wanted, do=_SEE))
        if self.inputs is not None and not isinstance(self.inputs, Inputs):
            raise OptionError(explain("inputs", got=repr(self.inputs), wanted="Inputs or None", do=_SEE))

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return ELEMENTS[self.element].per_byte

    def bits_per_weight(self) -> float:
        """Bits of a weight with its share of scales and zero points, where blocks are finite."""
        bits = 8.0 / self.per_byte
        if self.block[1]:
            scale = 8 if self.scale in ("e8m0", "e4m3") else 16 if self.scale != "float32" else 32
            bits += (scale + (8 / self.per_byte if self.zero else 0)) / ((self.block[0] or 4096) * self.block[1])
        return bits

    def __str__(self) -> str:
        """The scheme, and what of it is a choice: ``int4_w4a16 1x128 float16 zero``."""
        words = [self.scheme, "x".join(str(side or "all") for side in self.block), self.scale]
        words += ["zero"] if self.zero else []
        words += [f"{self.inputs.element}/{self.inputs.mode}"] if self.inputs else []
        return " ".join(words)
