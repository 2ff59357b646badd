"""Quantised and back: bounds that follow from the format's arithmetic, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from fusedmoe.errors import DTypeError, OptionError, ShapeError
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.numerics import decode_scale, round_to
from fusedmoe.quantization import quantize
from fusedmoe.schemes import SCHEMES, format_of, formats_of
from fusedmoe.spec.format import ELEMENTS, Format

#: Blocks that divide neither N / 2 = 19 nor K = 256.
FORMATS = [form for scheme in SCHEMES for form in formats_of(scheme, block=(8, 48))]
E, N, K = 3, 38, 256
#: Relative rounding of a scale to the type in which it is stored.
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-11, "bfloat16": 2.0**-8, "e4m3": 2.0**-4}


def blocks(form: Format, parts: int, n: int = N) -> Iterator[tuple[int, int, slice, slice]]:
    """Row and column of a scale, and the rows and columns of weights that it belongs to."""
    block_n, block_k = form.block[0] or n // parts, form.block[1] or K
    row = 0
    for part in range(parts):
        end = (part + 1) * (n // parts)
        for n0 in range(part * (n // parts), end, block_n):
            for column, k0 in enumerate(range(0, K, block_k)):
                yield row, column, slice(n0, min(n0 + block_n, end)), slice(k0, min(k0 + block_k, K))
            row += 1


def weights(n: int = N) -> torch.Tensor:
    """Sizes differ tenfold between experts, between rows and between groups of 16 columns; one row is nought."""
    g = torch.Generator().manual_seed(0)

    def tenfold(*shape: int) -> torch.Tensor:
        return 10.0 ** (torch.randint(-1, 2, shape, generator=g) / 2)

    w = torch.randn(E, n, K, generator=g) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    w = w * tenfold(E, n, 1) * tenfold(E, 1, K // 16).repeat_interleave(16, 2)
    w[1, 5] = 0.0
    return w


def half_unit(v: torch.Tensor, element: str) -> torch.Tensor:
    """Half the distance of neighbouring values of an element at v."""
    if element in ("int8", "uint8", "int4"):
        return torch.full_like(v, 0.5)
    bits, smallest = {"e4m3": (3, -6), "e4m3fnuz": (3, -7), "e2m1": (1, 0)}[element]
    return torch.exp2(torch.log2(v.abs()).floor().clamp(min=smallest) - bits - 1)


def static(form: Format) -> dict[str, float]:
    return {"input_scale": 0.5} if form.inputs and form.inputs.mode == "static" else {}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_there_and_back(form, parts):
    w = weights()
    q = quantize(w, form, parts=parts, **static(form))
    assert isinstance(q, ExpertMatrix) and q.shape == w.shape and q.format == form and q.parts == parts
    back, w = q.dequantize(torch.float64), w.double()
    scales = decode_scale(q.scale, form.scale, torch.float64)
    largest = ELEMENTS[form.element].largest
    for e in range(E):
        t = 1.0 if q.tensor_scale is None else float(q.tensor_scale[e])
        for row, column, rows, columns in blocks(form, parts):
            piece, s = w[e, rows, columns], float(scales[e, row, column]) * t
            difference = (back[e, rows, columns] - piece).abs()
            amax = float(piece.abs().max())
            rounding = ROUNDING.get(form.scale, 0.0)
            if form.zero:
                levels = 15 if form.element == "int4" else 255
                ideal = (float(piece.max().clamp(min=0)) - float(piece.min().clamp(max=0))) / levels
                # The zero point is rounded, and the scale may be too small for the range: both ends saturate then.
                bound = torch.tensor(s * (0.5 + levels * rounding + 1e-4))
            else:
                ideal = amax / largest
                v = (piece / s).clamp(-largest, largest)
                # Half a unit where it is in range, and what is beyond where the scale was rounded down.
                bound = s * (half_unit(v, form.element) + v.abs() * 2.0**-22) + (piece.abs() - largest * s).clamp(min=0)
            assert bool((difference <= bound).all()), f"expert {e}, block {row}, {column}"
            if amax == 0.0:
                assert float(back[e, rows, columns].abs().max()) == 0.0
            elif form.scale == "e8m0":
                assert ideal / 2 < s <= 2 * ideal
            else:
                smallest = 2.0**-9 if form.scale == "e4m3" else 2.0**-24 if form.scale == "float16" else 0.0
                assert abs(s - ideal) <= rounding * ideal + smallest * t, "largest magnitude to largest code"


@pytest.mark.parametrize("scheme", [name for name, has in SCHEMES.items() if "e8m0" in has.scales])
def test_a_power_of_two_is_the_better_of_its_neighbours(scheme):
    form = format_of(scheme, scale="e8m0")
    w = weights()
    q = quantize(w, form)
    seen = set()
    for row, column, rows, columns in blocks(form, 1):
        piece, c = w[0, rows, columns].double(), int(q.scale[0, row, column])

        def error(c: int, piece: torch.Tensor = piece) -> float:
            unit = 2.0 ** (c - 127)
            return float((round_to(piece / unit, form.element) * unit - piece).square().sum())

        assert error(c) <= min(error(c - 1), error(c + 1)) * (1 + 1e-5)
        seen.add(float(piece.abs().max()) > ELEMENTS[form.element].largest * 2.0 ** (c - 127))
    assert seen == {True, False} or len(list(blocks(form, 1))) < 8, "some saturate, some do not"


@pytest.mark.parametrize("form", [format_of(s, zero=True) for s, has in SCHEMES.items() if has.zero], ids=str)
def test_zero_points_help_where_weights_lie_to_one_side(form):
    w = weights().abs() + 1.0
    shifted = quantize(w, form).dequantize()
    plain = quantize(w, format_of(form.scheme, block=form.block, element=form.element)).dequantize()
    assert float((shifted - w).norm()) < 0.6 * float((plain - w).norm())
    zeros = torch.zeros_like(w)
    assert torch.equal(quantize(zeros, form).dequantize(), zeros)


@pytest.mark.parametrize("form", [f for f in FORMATS if f.scale in ("float32", "e8m0") and not f.zero], ids=str)
def test_what_can_be_written_is_written_exactly(form):
    """Quantising what was dequantised changes nothing."""
    once = quantize(weights(), form, **static(form)).dequantize(torch.float64)
    twice = quantize(once, form, **static(form)).dequantize(torch.float64)
    torch.testing.assert_close(twice, once, rtol=2.0**-20, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floats_and_strides(scheme, dtype):
    w = weights().to(dtype)
    got = quantize(w.transpose(1, 2).contiguous().transpose(1, 2), scheme)
    assert torch.equal(got.dequantize(), quantize(w.float().to(dtype).float(), scheme).dequantize())


@pytest.mark.parametrize("zero", [False, True])
def test_odd_n(zero):
    """A row of zeros more changes no other row."""
    even = weights(8)
    even[:, 7] = 0.0
    schemes = [s for s, has in SCHEMES.items() if has.zero or not zero]
    for scheme in schemes:
        q = quantize(even[:, :7], scheme, zero=zero)
        assert q.shape == (E, 7, K)
        assert torch.equal(q.dequantize(), quantize(even, scheme, zero=zero).dequantize()[:, :7])
    if zero:
        assert quantize(even[:, :7], "int4_w4a16", zero=True).zero.shape == (E, 4, 2)


def test_a_scale_too_small_for_float16_does_not_vanish():
    w = weights() * 1e-7
    q = quantize(w, "fp8_channel", scale_dtype="float16")
    assert q.scale.dtype == torch.float16 and bool((q.scale > 0).all())
    large = quantize(weights() * 1e9, "int8_w8a8", scale_dtype="float16")
    assert bool(large.scale.isfinite().all())
    assert int(large.data.min()) == -127, "symmetric, also where the scale is at its end"


def test_choices_reach_the_format():
    w = weights()
    assert quantize(w, "fp8_block", block=(16, 32)).format == format_of("fp8_block", block=(16, 32))
    assert quantize(w, "int4_w4a16", group=-1, zero=True, scale_dtype="bfloat16").format == format_of(
        "int4_w4a16", group=-1, zero=True, scale="bfloat16"
    )
    assert quantize(w, "int8_w8a8", inputs="tensor").format.inputs.mode == "tensor"
    q = quantize(w, "fp8_tensor", input_scale=0.25)
    assert q.format.inputs.mode == "static" and q.input_scale.tolist() == [0.25]
    assert quantize(w, "fp8_tensor", input_scale=torch.tensor(0.25)).input_scale.tolist() == [0.25]
    assert quantize(w, "fp8_tensor", parts=2).scale.shape == (E, 2, 1)


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel", "int4_w4a16", "nvfp4", "mxfp4"])
def test_of_a_parameter_and_under_autocast(scheme):
    w = torch.nn.Parameter(torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0)))
    want = quantize(w.detach(), scheme)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = quantize(w, scheme)
    for name, tensor in got.tensors().items():
        assert tensor is None or not tensor.requires_grad and tensor.grad_fn is None
        assert tensor is None or torch.equal(tensor.view(torch.uint8), want.tensors()[name].view(torch.uint8))


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-45, torch.inf, torch.nan, torch.tensor(0.0), torch.ones(2)])
def test_a_static_scale_is_a_positive_number(scale):
    with pytest.raises(OptionError, match="input_scale: got .*; wanted a positive number"):
        quantize(torch.ones(1, 4, 32), "fp8_tensor", input_scale=scale)


@pytest.mark.parametrize(
    ("weight", "scheme", "options", "error", "message"),
    [
        ([1.0], "mxfp4", {}, DTypeError, "weight to quantise: got list; wanted a floating-point tensor"),
        (torch.ones(1, 4, 32).int(), "mxfp4", {}, DTypeError, "got torch.int32"),
        (torch.ones(4, 32), "mxfp4", {}, ShapeError, r"got \(4, 32\); wanted \[E, N, K\]"),
        (torch.ones(1, 0, 32), "mxfp4", {}, ShapeError, r"got \(1, 0, 32\)"),
        (torch.ones(1, 4, 32), "fp5", {}, OptionError, "scheme: got 'fp5'; wanted fp8_block"),
        (torch.ones(1, 4, 33), "int4_w4a16", {"group": -1}, ShapeError, "K of .*got 33; wanted even: two codes to a"),
        (torch.ones(1, 4, 48), "mxfp4", {}, ShapeError, "K of .*got 48; wanted a multiple of its group, 32"),
        (torch.ones(1, 5, 32), "fp8_block", {"parts": 2}, ShapeError, "parts: got 2; wanted 1, or 2 for an even N"),
        (torch.ones(1, 4, 32), "fp8_block", {"parts": 3}, ShapeError, "parts: got 3"),
        (torch.ones(1, 4, 32), "mxfp4", {"zero": True}, OptionError, "zero points of scheme 'mxfp4'"),
        (torch.ones(1, 4, 32), "fp8_tensor", {"inputs": "static"}, OptionError, "input_scale .*got none; wanted"),
        (
            torch.ones(1, 4, 32),
            "fp8_tensor",
            {"input_scale": torch.ones(1, device="meta")},
            OptionError,
            "input_scale: ",
        ),
        (torch.ones(1, 4, 32), "mxfp4", {"input_scale": 0.5}, OptionError, "inputs with block .*got static"),
        (torch.full((1, 4, 32), math.nan), "mxfp4", {}, OptionError, "weight to quantise: got values .*wanted finite"),
        (torch.full((1, 4, 32), -math.inf), "int8_w8a16", {}, OptionError, "wanted finite"),
        (torch.full((1, 4, 32), 1e300, dtype=torch.float64), "fp8_block", {}, OptionError, "wanted finite"),
    ],
)
def test_what_cannot_be_quantised_is_refused(weight, scheme, options, error, message):
    with pytest.raises(error, match=message):
        quantize(weight, scheme, **options)
