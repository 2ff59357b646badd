"""The table of schemes, and what comes of a choice."""

from __future__ import annotations

import pytest
import torch

from fusedmoe.errors import OptionError
from fusedmoe.schemes import SCHEMES, format_of, formats_of, granularity_of
from fusedmoe.spec.format import ELEMENTS, SCALES, Format

FORMATS = [form for scheme in SCHEMES for form in formats_of(scheme, block=(64, 96))]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_speaks_of_known_things(scheme):
    has = SCHEMES[scheme]
    assert has.text
    assert set(has.elements) <= set(ELEMENTS) and set(has.scales) <= set(SCALES)
    assert bool(has.groups) == ("group" in has.granularities)
    assert format_of(scheme) in list(formats_of(scheme)), "the defaults are one of the choices"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_formats_of_a_scheme_are_all_its_choices(scheme):
    """Each allowed value of each choice occurs, and no format occurs twice."""
    has, forms = SCHEMES[scheme], list(formats_of(scheme, block=(64, 96)))
    assert len(set(forms)) == len(forms)
    assert {f.element for f in forms} == set(has.elements)
    assert {f.scale for f in forms} == set(has.scales)
    assert {granularity_of(f.block) for f in forms} == set(has.granularities)
    assert {f.block[1] for f in forms if granularity_of(f.block) == "group"} == set(has.groups)
    assert {f.zero for f in forms} == ({False, True} if has.zero else {False})
    assert {f.inputs.mode if f.inputs else None for f in forms} == set(has.inputs)
    assert {f.tensor_scale for f in forms} == {has.tensor_scale}


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_format_follows_from_its_own_words(form):
    again = format_of(
        form.scheme,
        block=form.block,
        inputs=form.inputs.mode if form.inputs else None,
        zero=form.zero,
        element=form.element,
        scale=form.scale,
    )
    assert again == form and hash(again) == hash(form)
    if form.inputs:
        assert form.inputs.group == (form.block[1] if form.inputs.mode == "group" else 0)
        assert form.inputs.element.startswith("int8" if form.element == "int8" else "e4m3")
        assert (form.inputs.element == "e4m3fnuz") == (form.element == "e4m3fnuz"), "both operands have one type"
    assert not (form.zero and form.element == "int8"), "codes less a zero point are unsigned"


def test_formats_have_names_of_their_own():
    assert len({(str(form), form.element) for form in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    ("scheme", "choices", "wanted"),
    [
        ("fp8_block", {}, Format(scheme="fp8_block", element="e4m3", block=(128, 128), inputs=None)),
        ("fp8_block", {"block": [64, 32]}, Format(scheme="fp8_block", element="e4m3", block=(64, 32), inputs=None)),
        ("fp8_w8a16", {}, Format(scheme="fp8_w8a16", element="e4m3", block=(1, 0))),
        ("int4_w4a16", {"group": -1}, Format(scheme="int4_w4a16", element="int4", block=(1, 0))),
        ("int4_w4a16", {"group": 32}, Format(scheme="int4_w4a16", element="int4", block=(1, 32))),
        ("int8_w8a16", {"zero": True}, Format(scheme="int8_w8a16", element="uint8", block=(1, 0), zero=True)),
        ("mxfp4", {}, Format(scheme="mxfp4", element="e2m1", block=(1, 32), scale="e8m0")),
        ("nvfp4", {}, Format(scheme="nvfp4", element="e2m1", block=(1, 16), scale="e4m3", tensor_scale=True)),
    ],
)
def test_choices(scheme, choices, wanted):
    got = format_of(scheme, **choices)
    assert isinstance(hash(got), int)
    for field in ("scheme", "element", "block", "scale", "zero", "tensor_scale"):
        assert getattr(got, field) == getattr(wanted, field)


@pytest.mark.parametrize(
    ("scheme", "choices", "mode", "element", "group"),
    [
        ("fp8_block", {"block": (64, 32)}, "group", "e4m3", 32),
        ("fp8_channel", {}, "token", "e4m3", 0),
        ("fp8_channel", {"element": "e4m3fnuz", "inputs": "static"}, "static", "e4m3fnuz", 0),
        ("fp8_tensor", {"inputs": "tensor"}, "tensor", "e4m3", 0),
        ("int8_w8a8", {}, "token", "int8", 0),
        ("int8_w8a8", {"inputs": "group"}, "group", "int8", 128),
        ("int8_w8a8", {"block": (32, 64)}, "group", "int8", 64),
        ("mxfp4_fp8", {}, "token", "e4m3", 0),
    ],
)
def test_inputs(scheme, choices, mode, element, group):
    inputs = format_of(scheme, **choices).inputs
    assert (inputs.mode, inputs.element, inputs.group) == (mode, element, group)


@pytest.mark.parametrize(
    ("scheme", "choices", "message"),
    [
        ("fp9", {}, "scheme: got 'fp9'; wanted fp8_block or fp8_channel"),
        ("mxfp4", {"block": (1, 32), "group": 32}, "block and group of scheme 'mxfp4': got block="),
        ("fp8_channel", {"block": (128, 128)}, r"block of scheme 'fp8_channel': got \(128, 128\); wanted channel"),
        ("fp8_block", {"block": (1, 1)}, r"block of .*got \(1, 1\); wanted block"),
        ("fp8_block", {"block": (128, 1)}, r"block of .*got \(128, 1\); wanted block"),
        ("fp8_block", {"block": (0, 128)}, r"block of .*got \(0, 128\)"),
        ("fp8_block", {"block": (128, -1)}, r"block of .*got \(128, -1\)"),
        ("fp8_block", {"block": (128,)}, r"block of .*got \(128,\)"),
        ("fp8_block", {"block": (1.5, 128)}, r"block of .*got \(1.5, 128\)"),
        ("int4_w4a16", {"group": 48}, "group of scheme 'int4_w4a16': got 48; wanted 128 or 64 or 32"),
        ("int4_w4a16", {"block": (1, 16)}, "group of scheme 'int4_w4a16': got 16"),
        ("mxfp4", {"group": -1}, r"block of scheme 'mxfp4': got \(1, 0\); wanted group"),
        ("mxfp4", {"element": "e4m3"}, "element of scheme 'mxfp4': got e4m3; wanted e2m1"),
        ("int8_w8a16", {"element": "int8", "zero": True}, "element of scheme 'int8_w8a16': got int8; wanted uint8"),
        ("mxfp8", {"scale": "float32"}, "type of scales of scheme 'mxfp8': got float32; wanted e8m0"),
        ("fp8_channel", {"zero": True}, "zero points of scheme 'fp8_channel': got some; wanted none"),
        ("fp8_w8a16", {"inputs": "token"}, "inputs with block .*of scheme 'fp8_w8a16': got token; wanted none"),
        ("fp8_block", {"inputs": "token"}, "got token; wanted group"),
        ("int8_w8a8", {"block": (1, 0), "inputs": "group"}, "got group; wanted token or static or tensor"),
        ("int8_w8a8", {"block": (64, 64), "inputs": "static"}, "got static; wanted group"),
    ],
)
def test_what_a_scheme_does_not_allow_is_refused(scheme, choices, message):
    with pytest.raises(OptionError, match=message):
        format_of(scheme, **choices)


@pytest.mark.parametrize(
    ("scheme", "choices", "bits"),
    [
        ("mxfp4", {}, 4 + 8 / 32),
        ("mxfp8", {}, 8 + 8 / 32),
        ("nvfp4", {}, 4 + 8 / 16),
        ("int4_w4a16", {"scale": "bfloat16"}, 4 + 16 / 128),
        ("int4_w4a16", {"group": 32, "zero": True}, 4 + (32 + 4) / 32),
        ("int8_w8a16", {"group": 64, "zero": True}, 8 + (32 + 8) / 64),
        ("fp8_block", {}, 8 + 32 / 128**2),
        ("fp8_channel", {}, 8),
    ],
)
def test_bits_per_weight(scheme, choices, bits):
    assert format_of(scheme, **choices).bits_per_weight() == bits


def test_granularities():
    assert [granularity_of(b) for b in ((0, 0), (1, 0), (1, 32), (128, 128), (2, 96))] == [
        "tensor", "channel", "group", "block", "block",
    ]  # fmt: skip


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_largest_code_is_a_value(element):
    """``largest`` and ``step`` say what the codes are: the step is that of a typical code, a third of the largest."""
    kind = ELEMENTS[element]
    if kind.per_byte == 1 and kind.dtype.startswith("float8"):
        assert torch.finfo(getattr(torch, kind.dtype)).max == kind.largest
        assert 2.0**-4 <= kind.step <= 2.0**-3, "neighbours of a mantissa of 3 bits"
    elif element == "e2m1":
        assert kind.largest == 6.0 and 2.0**-2 <= kind.step <= 2.0**-1
    else:
        assert kind.largest == 2 ** (3 if kind.per_byte == 2 else 7) - 1
        assert 0.5 < kind.step * kind.largest / 3 < 2
