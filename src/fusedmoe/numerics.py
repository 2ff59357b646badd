"""Codes and scales in plain torch: the definition that every kernel is tested against.

Rounding is to nearest even and saturates; NaN stays NaN in floating-point codes, and becomes 0 in integer ones, whose
scale carries it. A dynamic scale is max(amax, AMAX_FLOOR) / largest code: never 0, so that nothing divides by zero.
Arithmetic is in the type of the argument, float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedmoe.spec.format import ELEMENTS, Inputs

#: Smallest largest magnitude that a dynamic scale is made for.
AMAX_FLOOR = 1e-10
#: e2m1 magnitudes by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def wide(x: Tensor) -> Tensor:
    """As float32, or float64 where it is that already."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent as bits: exact on every device, which a power function need not be."""
    return ((exponent.long() + 1023) << 52).view(torch.float64).to(dtype)


def round_to(x: Tensor, element: str) -> Tensor:
    """Values rounded to the nearest of an element's, saturating; in the type of ``x``, float32 or float64."""
    largest = ELEMENTS[element].largest
    if element in ("int8", "uint8", "int4"):
        return torch.nan_to_num(x.round().clamp(-largest - 1, largest), nan=0.0)
    mantissa, smallest = (1, 0) if element == "e2m1" else (3, -6 if element == "e4m3" else -7)
    x = x.clamp(-largest, largest)  # first, for an infinity has no exponent; what is largest is a value of the element
    integer, exponent = (torch.int64, 0x7FF << 52) if x.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    power = (x.view(integer) & exponent).view(x.dtype)  # of two, at or below |x|
    unit = power.clamp(min=2.0**smallest) * 2.0**-mantissa
    return (x / unit).round() * unit


def encode(x: Tensor, element: str) -> Tensor:
    """Codes of values: one a byte, or (4-bit elements) two, the low nibble the even k. Integers: zero points are in x.

    ``uint8`` and ``int4`` take codes that are already shifted to 0 .. 255 and 0 .. 15. Only e4m3 and e4m3fnuz have a
    NaN; elsewhere the code of one is arbitrary, and its scale has to be NaN.
    """
    kind = ELEMENTS[element]
    if element in ("uint8", "int4"):
        codes = x.round().clamp(0, 255 if element == "uint8" else 15).to(torch.uint8)
    elif element == "e2m1":
        value = round_to(x, element)
        grid = torch.tensor(E2M1, dtype=x.dtype, device=x.device)
        sign = torch.signbit(value).to(torch.uint8) << 3
        codes = torch.bucketize(value.abs().contiguous(), grid, out_int32=True).clamp(max=7).to(torch.uint8) | sign
    else:
        return round_to(x, element).to(getattr(torch, kind.dtype))
    return pack(codes) if kind.per_byte == 2 else codes


def pack(nibbles: Tensor) -> Tensor:
    """[..., K] codes below 16 as bytes [..., ceil(K / 2)], the low nibble first."""
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`, [..., 2 * bytes]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def decode(codes: Tensor, element: str, dtype: torch.dtype) -> Tensor:
    """Values of codes, before zero points; unsigned integers as they are."""
    if ELEMENTS[element].per_byte == 2:
        codes = unpack(codes)
    if element == "e2m1":
        grid = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=codes.device)
        return grid[codes.int()]
    return codes.to(dtype)


def decode_scale(scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Scales as numbers; see :data:`fusedmoe.spec.format.SCALES`."""
    if kind != "e8m0":
        return scale.to(dtype)
    return power_of_two(scale.int() - 127, dtype).masked_fill(scale == 255, torch.nan)


def rows_of_scales(n_rows: int, block_n: int, parts: int, rows: int) -> Tensor:
    """Scale row of each weight row [N]. With 2 parts the blocks start anew at the second half of the rows.

    ``rows``: how many scale rows there are; a matrix of 2 parts may still have one scale for all.
    """
    if block_n == 0:
        return torch.arange(n_rows) // (n_rows // rows)
    half = n_rows // parts
    row = torch.arange(n_rows)
    return (row % half) // block_n + (row // half) * -(-half // block_n)


def input_scale(x: Tensor, inputs: Inputs, live: Tensor | None = None) -> Tensor:
    """Dynamic scales of rows x [R, K]: [R, 1], [R, ceil(K / group)] or, mode "tensor", [1, 1].

    ``live`` [R] bool: rows that count in mode "tensor". NaN is ignored.
    """
    magnitude = torch.nan_to_num(wide(x).abs(), nan=0.0, posinf=torch.inf)
    if inputs.mode == "group":
        n_groups = -(-x.shape[1] // inputs.group)
        padded = torch.nn.functional.pad(magnitude, (0, n_groups * inputs.group - x.shape[1]))
        amax = padded.view(x.shape[0], n_groups, inputs.group).amax(-1)
    elif inputs.mode == "token":
        amax = magnitude.amax(1, keepdim=True)
    else:
        magnitude = magnitude if live is None else magnitude[live]
        amax = magnitude.amax().view(1, 1) if magnitude.numel() else magnitude.new_zeros(1, 1)
    return amax.clamp(min=AMAX_FLOOR) / ELEMENTS[inputs.element].largest


def spread_input_scale(scale: Tensor, inputs: Inputs, n_columns: int) -> Tensor:
    """Scales of :func:`input_scale` per column, broadcastable to [R, K]."""
    if inputs.mode != "group":
        return scale
    return scale.repeat_interleave(inputs.group, 1)[:, :n_columns]


def quantise_inputs(
    x: Tensor, inputs: Inputs, static: Tensor | None = None, live: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes as numbers [R, K] and scales [R or 1, groups]; ``x`` is about codes * :func:`spread_input_scale`.

    Args:
        x: [R, K].
        inputs: how.
        static: the scale of mode "static".
        live: [R] rows that count in mode "tensor".
    """
    x = wide(x)
    scale = static.to(x.dtype).reshape(1, 1) if static is not None else input_scale(x, inputs, live)
    codes = round_to(x / spread_input_scale(scale, inputs, x.shape[1]), inputs.element)
    if inputs.element == "int8":  # an integer cannot be NaN: its scale is, for the row
        scale = torch.where(x.isnan().any(1, keepdim=True), torch.nan, scale)
    return codes, scale
