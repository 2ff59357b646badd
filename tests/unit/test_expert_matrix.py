"""Expert matrices against their equation, block by block, and every message of the constructor."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator

import pytest
import torch

import fusedmoe
from fusedmoe.errors import DeviceError, DTypeError, LayoutError, OptionError, ShapeError
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.schemes import SCHEMES, format_of, formats_of, granularity_of
from fusedmoe.spec.format import Format

#: Blocks that divide neither N / 2 = 23 nor K = 256.
FORMATS = [form for scheme in SCHEMES for form in formats_of(scheme, block=(8, 48))]
E, N, K = 3, 46, 256
SCALE_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def blocks(form: Format, n: int, k: int, parts: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Row and column of a scale, and the rows and columns of weights that it belongs to."""
    block_n, block_k = form.block[0] or n // parts, form.block[1] or k
    row = 0
    for part in range(parts):
        end = (part + 1) * (n // parts)
        for n0 in range(part * (n // parts), end, block_n):
            for column, k0 in enumerate(range(0, k, block_k)):
                yield row, column, slice(n0, min(n0 + block_n, end)), slice(k0, min(k0 + block_k, k))
            row += 1


def draw(form: Format, n: int = N, k: int = K, parts: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of random bits; codes of 8-bit floats are kept from NaN. Scales of experts differ tenfold."""
    g = torch.Generator().manual_seed(seed)

    def bits(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=g).to(torch.uint8)

    places = [(row, column) for row, column, _, _ in blocks(form, n, k, parts)]
    rows, columns = (max(axis) + 1 for axis in zip(*places, strict=True))
    packed = form.element in ("int4", "e2m1")
    data = bits(E, n, k // 2 if packed else k)
    if form.element.startswith("e4m3"):
        data = torch.where((data & 0x7F) % 0x7F == 0, 1, data).view(
            torch.float8_e4m3fn if form.element == "e4m3" else torch.float8_e4m3fnuz
        )
    elif form.element == "int8":
        data = data.view(torch.int8)
    size = torch.rand(E, rows, columns, generator=g) + 0.5
    if form.scale == "e8m0":
        scale = (127 + 10 * torch.arange(E)[:, None, None] + (8 * size).int()).to(torch.uint8)
    elif form.scale == "e4m3":
        scale = (size * 10.0 ** torch.arange(E)[:, None, None]).to(torch.float8_e4m3fn)
    else:
        scale = (size * 10.0 ** -torch.arange(E)[:, None, None]).to(SCALE_TYPES[form.scale])
    tensors = {"data": data, "scale": scale}
    if form.zero:
        tensors["zero"] = bits(E, (n + 1) // 2 if packed else n, columns)
    if form.tensor_scale:
        tensors["tensor_scale"] = torch.tensor([[0.1, 3.0, 20.0], [7.0, 0.2, 1.0]][:parts]).T.squeeze(1)
    if form.inputs is not None and form.inputs.mode == "static":
        tensors["input_scale"] = torch.tensor([0.7])
    return tensors


def numbers(form: Format, t: dict[str, torch.Tensor], n: int, k: int, parts: int) -> torch.Tensor:
    """The equation, in float64."""
    data = t["data"]
    if form.element in ("int4", "e2m1"):
        codes = torch.empty(E, n, k, dtype=torch.long)
        codes[..., 0::2], codes[..., 1::2] = data.long() % 16, data.long() // 16
        w = torch.tensor(E2M1, dtype=torch.float64)[codes] if form.element == "e2m1" else codes.double()
    else:
        w = data.double()
    out = torch.empty(E, n, k, dtype=torch.float64)
    for e in range(E):
        for row, column, rows, columns in blocks(form, n, k, parts):
            piece = w[e, rows, columns]
            if form.zero and form.element == "int4":
                z = [int(t["zero"][e, i // 2, column]) >> 4 * (i % 2) & 15 for i in range(rows.start, rows.stop)]
                piece = piece - torch.tensor(z)[:, None]
            elif form.zero:
                piece = piece - t["zero"][e, rows, column].double()[:, None]
            else:
                piece = piece - {"int4": 8, "uint8": 128}.get(form.element, 0)
            s = t["scale"][e, row, column]
            s = 2.0 ** (int(s) - 127) if form.scale == "e8m0" else float(s)
            of_parts = t["tensor_scale"][e].expand(parts) if form.tensor_scale else torch.ones(parts)
            out[e, rows, columns] = piece * s * float(of_parts[rows.start * parts // n])
    return out


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_numbers_are_the_equation(form, parts):
    tensors = draw(form, parts=parts)
    w = ExpertMatrix(form, **tensors, parts=parts)
    wanted = numbers(form, tensors, N, K, parts)
    assert w.shape == (E, N, K) and w.format is form and w.parts == parts
    torch.testing.assert_close(w.dequantize(torch.float64), wanted, rtol=1e-15, atol=0)
    torch.testing.assert_close(w.dequantize().double(), wanted, rtol=2.0**-22, atol=0)
    torch.testing.assert_close(w.dequantize_expert(1, torch.bfloat16).double(), wanted[1], rtol=2.0**-8, atol=0)
    assert w.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("form", [f for f in FORMATS if granularity_of(f.block) in ("channel", "group")], ids=str)
def test_odd_n(form):
    """Zero points of int4 then fill half of a last byte."""
    tensors = draw(form, n=7)
    got = ExpertMatrix(form, **tensors).dequantize(torch.float64)
    torch.testing.assert_close(got, numbers(form, tensors, 7, K, 1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_any_strides(form):
    """Transposed where codes are not packed, else with gaps; scales and zero points transposed."""
    tensors = draw(form, parts=2)
    wanted = ExpertMatrix(form, **tensors, parts=2).dequantize()
    strided = {}
    for name, tensor in tensors.items():
        if name == "data" and form.per_byte == 2:
            strided[name] = torch.cat([tensor, tensor], 2)[:, :, : K // 2]
        elif tensor.dim() == 3:
            strided[name] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            strided[name] = torch.stack([tensor, tensor], 1)[:, 0]
    w = ExpertMatrix(form, **strided, parts=2)
    assert w.data.data_ptr() == strided["data"].data_ptr() and not w.data.is_contiguous()
    assert torch.equal(w.dequantize(), wanted)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_manners_of_a_tensor(form):
    tensors = draw(form, parts=2)
    w = ExpertMatrix(form, **tensors, parts=2)
    assert w.device == torch.device("cpu")
    assert w.nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert w.tensors().keys() == tensors.keys()
    part = w.experts(1, 3)
    assert part.shape == (2, N, K) and part.parts == 2
    assert part.data.data_ptr() == w.data[1].data_ptr(), "a view"
    assert torch.equal(part.dequantize(), w.dequantize()[1:])
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    for other in (w.map(torch.clone), w.to("cpu"), copy.deepcopy(w), torch.load(file, weights_only=False)):
        assert other.parts == 2 and other.format == form
        assert torch.equal(other.dequantize(), w.dequantize())
    cloned = w.map(torch.clone)
    assert cloned.data.data_ptr() != w.data.data_ptr()
    assert w.to("meta").data.device.type == "meta"
    assert repr(w) == f"ExpertMatrix((3, 46, 256), {form}, device='cpu')"


def test_a_nan_of_e8m0_is_a_nan_of_its_group():
    tensors = draw(format_of("mxfp4"))
    tensors["scale"][1, 5, 2] = 255
    w = ExpertMatrix("mxfp4", **tensors).dequantize()
    assert w[1, 5, 64:96].isnan().all()
    assert w.isnan().sum() == 32


# --- what the tensors say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [f for s in SCHEMES for f in formats_of(s)], ids=str)
def test_a_name_and_the_tensors_say_the_format(form):
    """But for the mode of the rows, where there is more than one without a static scale."""
    tensors = draw(form, n=260, k=512)
    inputs = form.inputs.mode if form.inputs and form.inputs.mode != "static" else None
    assert ExpertMatrix(form.scheme, **tensors, inputs=inputs).format == form


@pytest.mark.parametrize(
    ("scheme", "shape", "wanted"),
    [
        ("fp8_tensor", (E,), (E, 1, 1)),
        ("fp8_channel", (E, N), (E, N, 1)),
        ("fp8_w8a16", (E,), (E, 1, 1)),
        ("int8_w8a8", (E, 1), (E, 1, 1)),
        ("int8_w8a8", (E, N), (E, N, 1)),
        ("int4_w4a16", (E, N), (E, N, 1)),
    ],
)
def test_dimensions_of_one_may_be_left_out(scheme, shape, wanted):
    block = (0, 0) if wanted[1] == 1 else (1, 0)
    tensors = draw(format_of(scheme, block=block))
    full = ExpertMatrix(scheme, **tensors)
    tensors["scale"] = tensors["scale"].reshape(shape)
    w = ExpertMatrix(scheme, **tensors)
    assert w.format == full.format and w.format.block == block
    assert tuple(w.scale.shape) == wanted
    assert torch.equal(w.dequantize(), full.dequantize())


def test_parts_follow_from_the_rows_of_scales_where_they_differ():
    form = format_of("fp8_block", block=(8, 48))
    assert ExpertMatrix(form, **draw(form, parts=1)).parts == 1
    assert ExpertMatrix(form, **draw(form, n=34, parts=2)).parts == 2, "6 rows are two times 3; in one run they are 5"
    assert ExpertMatrix(form, **draw(form, n=N, parts=2)).parts == 1, "6 rows of scales either way"
    tensor = format_of("fp8_tensor")
    assert ExpertMatrix(tensor, **draw(tensor, parts=2)).parts == 2
    one = ExpertMatrix(tensor, **draw(tensor), parts=2)
    assert one.parts == 2 and one.scale.shape[1] == 1, "one scale for both parts"
    nvfp4 = format_of("nvfp4")
    assert ExpertMatrix(nvfp4, **draw(nvfp4)).parts == 1
    assert ExpertMatrix(nvfp4, **draw(nvfp4), parts=2).tensor_scale.shape == (E,), "one for both parts"
    assert ExpertMatrix(nvfp4, **draw(nvfp4, parts=2)).parts == 2, "two tensor scales"
    with pytest.raises(ShapeError, match=r"tensor_scale .*got \(3, 2\); wanted \(3,\)"):
        ExpertMatrix(nvfp4, **draw(nvfp4, parts=2), parts=1)
    torch.testing.assert_close(
        one.dequantize(torch.float64), numbers(tensor, draw(tensor), N, K, 1), rtol=1e-15, atol=0
    )


def test_a_static_scale_may_have_any_shape_of_one_element():
    tensors = draw(format_of("fp8_tensor", inputs="static"))
    for shape in ((), (1,), (1, 1)):
        w = ExpertMatrix("fp8_tensor", **(tensors | {"input_scale": torch.full(shape, 0.5)}))
        assert w.format.inputs.mode == "static"
        assert w.input_scale.tolist() == [0.5]


# --- errors -------------------------------------------------------------------------------------------------------


def wrong(scheme: str, changed: dict, **options):
    """Tensors of the scheme's first format, with some replaced."""
    form = format_of(scheme, **options)
    tensors = draw(form)
    for name, change in changed.items():
        value = change(tensors.get(name)) if callable(change) else change
        tensors[name] = value
    return form, tensors


ERRORS = [
    ("fp8_channel", {"data": [[1]]}, {}, DTypeError, r"data of an expert matrix: got list; wanted a torch.Tensor \[E"),
    ("fp8_channel", {"scale": 0.5}, {}, DTypeError, r"scale of an expert matrix: got float; wanted a torch.Tensor"),
    ("fp8_channel", {"scale": None}, {}, DTypeError, r"scale of an expert matrix: got NoneType"),
    ("fp8_channel", {"data": lambda t: t[0]}, {}, ShapeError, r"data .*got \(46, 256\); wanted \[E, N, K\]"),
    ("fp8_channel", {"data": lambda t: t[:, :0]}, {}, ShapeError, r"got \(3, 0, 256\)"),
    ("fp8_channel", {"data": lambda t: t.float()}, {}, DTypeError, "got torch.float32; wanted torch.float8_e4m3fn"),
    ("int8_w8a8", {"data": lambda t: t.view(torch.uint8)}, {}, DTypeError, "got torch.uint8; wanted torch.int8"),
    ("mxfp4", {"data": lambda t: t.view(torch.int8)}, {}, DTypeError, "got torch.int8; wanted torch.uint8"),
    ("mxfp4", {"scale": lambda t: t.float()}, {}, DTypeError, "scale .*got torch.float32; wanted torch.uint8"),
    ("nvfp4", {"scale": lambda t: t.float()}, {}, DTypeError, "scale .*wanted torch.float8_e4m3fn"),
    ("fp8_channel", {"scale": lambda t: t.double()}, {}, DTypeError, "scale .*got torch.float64; wanted torch.float32"),
    ("mxfp4", {"data": lambda t: t.mT.contiguous().mT}, {}, LayoutError, "got strides .*wanted packed codes with st"),
    ("int4_w4a16", {"data": lambda t: t[:, :, :100]}, {}, ShapeError, "K of .*got 200; wanted a multiple of its"),
    ("mxfp8", {"data": lambda t: t[:, :, :250]}, {}, ShapeError, "K of .*got 250; wanted a multiple of its group, 32"),
    ("fp8_channel", {"scale": lambda t: t[:, :5]}, {}, ShapeError, r"scale .*got \(3, 5, 1\); wanted \(3, 46, 1\)"),
    ("fp8_channel", {"scale": lambda t: t[:2]}, {}, ShapeError, r"got \(2, 46, 1\); wanted \(3, 46, 1\)"),
    ("fp8_channel", {"scale": lambda t: t[..., None]}, {}, ShapeError, r"got \(3, 46, 1, 1\); wanted \(3, 46, 1\)"),
    ("fp8_block", {"scale": lambda t: t[:, :, :1]}, {}, ShapeError, r"got \(3, 1, 1\); wanted \(3, 1, 2\)"),
    ("fp8_tensor", {"scale": lambda t: t.expand(3, 3, 1)}, {}, ShapeError, r"wanted \(3, 1, 1\) or \(3, 2, 1\)"),
    ("int4_w4a16", {"scale": lambda t: t[:, :, :1]}, {}, ShapeError, r"got \(3, 46, 1\); wanted \(3, 46, 2\)"),
    ("int4_w4a16", {"zero": None}, {"zero": True}, OptionError, r"zero of .*got none; wanted torch.uint8 \(3, 23, 2\)"),
    ("int4_w4a16", {"zero": torch.ones(3, 23, 2)}, {}, OptionError, r"zero .*got one; wanted none"),
    ("mxfp4", {"zero": torch.ones(3, 46, 8)}, {}, OptionError, "zero .*wanted none: it has no place"),
    ("int4_w4a16", {"zero": lambda t: t[:, :9]}, {"zero": True}, ShapeError, r"got \(3, 9, 2\); wanted \(3, 23, 2\)"),
    ("int8_w8a16", {"zero": lambda t: t[:, :23]}, {"zero": True}, ShapeError, r"got \(3, 23, 1\); wanted \(3, 46, 1\)"),
    ("int4_w4a16", {"zero": lambda t: t.float()}, {"zero": True}, DTypeError, "got torch.float32; wanted torch.uint8"),
    ("int4_w4a16", {"zero": 8}, {"zero": True}, DTypeError, "zero of an expert matrix: got int"),
    ("nvfp4", {"tensor_scale": None}, {}, OptionError, r"tensor_scale .*got none; wanted torch.float32 \(3,\)"),
    ("nvfp4", {"tensor_scale": lambda t: t[:1]}, {}, ShapeError, r"tensor_scale .*got \(1,\); wanted \(3,\)"),
    ("nvfp4", {"tensor_scale": torch.ones(3, 3)}, {}, ShapeError, r"tensor_scale .*got \(3, 3\); wanted \(3, 2\)"),
    ("mxfp4", {"tensor_scale": torch.ones(3)}, {}, OptionError, "tensor_scale .*wanted none"),
    ("fp8_tensor", {"input_scale": None}, {"inputs": "static"}, OptionError, r"got none; wanted torch.float32 \(1,\)"),
    ("fp8_tensor", {"input_scale": torch.ones(3)}, {"inputs": "static"}, ShapeError, r"got \(3,\); wanted \(1,\)"),
    ("fp8_tensor", {"input_scale": torch.ones(1).half()}, {"inputs": "static"}, DTypeError, "got torch.float16"),
    ("fp8_tensor", {"input_scale": 0.5}, {"inputs": "static"}, DTypeError, "input_scale of an expert .*got float"),
    ("fp8_tensor", {"input_scale": torch.ones(1)}, {}, OptionError, "input_scale .*got one; wanted none"),
    ("fp8_tensor", {"input_scale": 0.5}, {}, OptionError, "input_scale .*got one; wanted none"),
    ("fp8_channel", {"scale": lambda t: t.to("meta")}, {}, DeviceError, "scale .*got meta; wanted cpu, where data"),
    ("nvfp4", {"tensor_scale": lambda t: t.to("meta")}, {}, DeviceError, "tensor_scale .*got meta; wanted cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "changed", "options", "error", "message"), ERRORS)
def test_what_does_not_fit_is_refused(scheme, changed, options, error, message):
    form, tensors = wrong(scheme, changed, **options)
    with pytest.raises(error, match=message):
        ExpertMatrix(form, **tensors)


def test_the_tensors_as_they_are_drawn_fit():
    """So that each error above is of what was changed."""
    for scheme, _, options, _, _ in ERRORS:
        form, tensors = wrong(scheme, {}, **options)
        assert math.isfinite(float(ExpertMatrix(form, **tensors).dequantize().sum()))


def test_wrong_names_and_parts():
    tensors = draw(format_of("fp8_channel"), n=7)
    with pytest.raises(OptionError, match="scheme: got 'w8a8'; wanted fp8_block"):
        ExpertMatrix("w8a8", **tensors)
    for parts in (0, 2, 3):
        with pytest.raises(OptionError, match=f"parts: got {parts}; wanted 1, or 2 for an even N"):
            ExpertMatrix("fp8_channel", **tensors, parts=parts)
    tensors = draw(format_of("fp8_tensor"), n=7)
    with pytest.raises(ShapeError, match=r"wanted \(3, 1, 1\)\. "):
        ExpertMatrix("fp8_tensor", tensors["data"], tensors["scale"].expand(3, 2, 1))
    with pytest.raises(OptionError, match="inputs with block"):
        ExpertMatrix("fp8_tensor", **tensors, inputs="group")
    tensors = draw(format_of("int8_w8a16"))
    with pytest.raises(DTypeError, match="data .*got torch.int8; wanted torch.uint8"):
        ExpertMatrix("int8_w8a16", **tensors, zero=torch.zeros(E, N, 1, dtype=torch.uint8))


def test_types_of_torchs_own_for_bytes():
    w = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    a, b = fusedmoe.quantize(w, "mxfp4"), fusedmoe.quantize(w, "fp8_block", scale_dtype="e8m0")
    for matrix in (a, b):
        scale = matrix.scale.view(torch.float8_e8m0fnu)
        data = matrix.data.view(torch.float4_e2m1fn_x2) if matrix is a else matrix.data
        same = ExpertMatrix(matrix.format.scheme, data, scale)
        assert same.format == matrix.format and same.scale.dtype == torch.uint8
        assert same.scale.data_ptr() == matrix.scale.data_ptr()
        assert torch.equal(same.dequantize(), matrix.dequantize())
