"""Quantise expert matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fusedmoe.errors import DTypeError, LayoutError, OptionError, ShapeError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.numerics import AMAX_FLOOR, encode, pack, power_of_two, round_to
from fusedmoe.schemes import format_of
from fusedmoe.spec.activation import FLOAT32_MAX
from fusedmoe.spec.format import ELEMENTS, SCALES, Format

__all__ = ["quantize"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def quantize(
    weight: Tensor,
    scheme: str | Format,
    *,
    parts: int = 1,
    block: tuple[int, int] | None = None,
    group: int | None = None,
    inputs: str | None = None,
    zero: bool = False,
    scale_dtype: str | None = None,
    input_scale: Tensor | float | None = None,
) -> ExpertMatrix:
    """Quantise expert matrices, expert by expert; round to nearest, no calibration.

    Symmetric codes: scale = max |w| of the block / largest code. With zero points: scale = (max - min) / 15 or 255
    over a range that includes 0. e8m0: the power of two, of the two that are next to max |w| / largest code, with the
    smaller squared error. nvfp4: tensor_scale = max |w| of the expert / (448 * 6), scale = e4m3(max |w| / 6 /
    tensor_scale).

    Args:
        weight: [E, N, K] float32, float16, bfloat16 or float64.
        scheme: a name of ``fusedmoe.SCHEMES``, or a Format, which then says what block, group, inputs, zero and
            scale_dtype say.
        parts: 2 when gate rows are followed by up rows (w13, concatenated), so that no block straddles them.
        block, group, inputs, zero: choices of the scheme; see :func:`fusedmoe.schemes.format_of`.
        scale_dtype: type of the scales; the scheme's first when None.
        input_scale: the static scale of the rows, with inputs="static".

    Returns:
        The expert matrix, on the device of weight.

    Raises:
        OptionError: the scheme does not allow a choice, or a weight is not finite.
        ShapeError, DTypeError: as :class:`ExpertMatrix`.

    >>> import torch
    >>> w = quantize(torch.randn(2, 64, 128), "int4_w4a16", group=32, zero=True)
    >>> w.data.shape, w.zero.shape, bool((w.dequantize() - w.dequantize()).abs().max() == 0)
    (torch.Size([2, 64, 64]), torch.Size([2, 32, 4]), True)
    """
    if not isinstance(weight, Tensor) or weight.dtype not in _FLOATS:
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise DTypeError(explain("weight to quantise", got=got, wanted="a floating-point tensor", do="Cast it."))
    if weight.dim() != 3 or 0 in weight.shape:
        raise ShapeError(
            explain("weight to quantise", got=tuple(weight.shape), wanted="[E, N, K]", do="Stack the experts.")
        )
    if weight.layout != torch.strided or weight.is_meta:
        kind = "a tensor without numbers (meta)" if weight.is_meta else str(weight.layout)
        raise LayoutError(explain("weight to quantise", got=kind, wanted="a dense tensor", do="Call .to_dense()."))
    if not isinstance(scheme, Format):
        static = "static" if input_scale is not None else None
        scheme = format_of(scheme, block=block, group=group, inputs=inputs or static, zero=zero, scale=scale_dtype)
    if scheme.per_byte == 2 and weight.shape[2] % 2:
        raise ShapeError(
            explain(
                f"K of scheme {scheme.scheme!r}", got=weight.shape[2], wanted="even: two codes to a byte", do="Pad K."
            )
        )
    if type(parts) is not int or parts not in (1, 2) or weight.shape[1] % parts:
        raise ShapeError(explain("parts", got=parts, wanted="1, or 2 for an even N", do="See ExpertMatrix."))
    # A parameter's scales would hold all that they were computed from; autocast stacks no codes.
    with torch.autocast(weight.device.type, enabled=False):
        pieces = [_quantise(w, scheme, parts) for w in weight.detach()]
        data, scale, zero_points, tensor_scale = (
            None if pieces[0][i] is None else torch.stack([piece[i] for piece in pieces])  # type: ignore[misc]
            for i in range(4)
        )
    assert data is not None and scale is not None
    if input_scale is not None:
        if isinstance(input_scale, Tensor):
            there = input_scale.layout == torch.strided and not input_scale.is_meta
            one = there and input_scale.numel() == 1 and input_scale.dtype in _FLOATS
        else:
            one = isinstance(input_scale, (int, float)) and abs(input_scale) <= FLOAT32_MAX
        number = float(input_scale) if one else 0.0
        if not torch.finfo(torch.float32).tiny <= number <= FLOAT32_MAX:
            wanted, do = "a positive number, or a floating-point tensor of one", "It is the static scale of the rows."
            raise OptionError(explain("input_scale", got=repr(input_scale), wanted=wanted, do=do))
        input_scale = torch.full((1,), number, dtype=torch.float32, device=weight.device)
    return ExpertMatrix(
        scheme, data, scale, zero=zero_points, tensor_scale=tensor_scale, input_scale=input_scale, parts=parts
    )


def _quantise(w: Tensor, form: Format, parts: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scales, zero points and tensor scale of one matrix [N, K]."""
    w = w.to(torch.float32)
    if not bool(w.isfinite().all()):
        got = "values that are NaN, infinite, or beyond float32"
        raise OptionError(explain("weight to quantise", got=got, wanted="finite numbers", do="Check the checkpoint."))
    n_rows, n_columns = w.shape
    block_n, block_k = form.block[0] or n_rows // parts, form.block[1] or n_columns
    w = w.reshape(parts, n_rows // parts, n_columns)
    w = functional.pad(w, (0, -n_columns % block_k, 0, -w.shape[1] % block_n))  # zeros change no largest magnitude
    padded = w.shape
    w = w.reshape(-1, block_n, padded[2] // block_k, block_k)  # scales are [rows, 1, columns, 1]
    largest, element = ELEMENTS[form.element].largest, form.element
    zero = tensor_scale = None
    if form.zero:
        levels = 15 if element == "int4" else 255
        low, high = w.amin((1, 3), keepdim=True).clamp(max=0), w.amax((1, 3), keepdim=True).clamp(min=0)
        scale = _stored((high - low).clamp(min=AMAX_FLOOR) / levels, form)
        zero = (-low / scale.float()).round().clamp(0, levels)
        values = w / scale.float() + zero
        zero = zero.to(torch.uint8)[:, 0, :, 0]
        if form.per_byte == 2:
            zero = pack(zero.T).T
    else:
        amax = w.abs().amax((1, 3), keepdim=True).clamp(min=AMAX_FLOOR)
        if form.scale == "e8m0":
            exponent = _exponent(w, amax, element)
            scale, divisor = (exponent + 127).to(torch.uint8), power_of_two(exponent, torch.float32)
        elif form.tensor_scale:
            tensor_scale = amax.max() / (448.0 * largest)
            scale = _stored(amax / largest / tensor_scale, form)
            divisor = scale.float() * tensor_scale
        else:
            scale = _stored(amax / largest, form)
            divisor = scale.float()
        values = w / divisor
        if element in ("int8", "uint8", "int4"):  # symmetric: -128 and -8 stay unused
            values = values.round().clamp(-largest, largest) + ELEMENTS[element].zero
    values = values.reshape(padded)[:, : n_rows // parts, :n_columns].reshape(n_rows, n_columns)
    return encode(values, element), scale[:, 0, :, 0], zero, tensor_scale


def _exponent(w: Tensor, amax: Tensor, element: str) -> Tensor:
    """Of the two powers of two next to the ideal scale: the lower saturates a few values, the upper is coarser."""
    low = torch.frexp(amax / ELEMENTS[element].largest)[1] - 1
    errors = []
    for exponent in (low, low + 1):
        unit = power_of_two(exponent, w.dtype)
        errors.append((round_to(w / unit, element) * unit - w).square().sum((1, 3), keepdim=True))
    return torch.where(errors[0] <= errors[1], low, low + 1).clamp(-127, 127)


def _stored(scale: Tensor, form: Format) -> Tensor:
    """Scales in the type in which they are stored, never 0 and never infinite."""
    dtype = getattr(torch, SCALES[form.scale])
    limits = torch.finfo(dtype)
    return scale.clamp(limits.smallest_normal * limits.eps, limits.max).to(dtype)
