"""Codes and scales against torch's own casts, table searches and loops over Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from fusedmoe import numerics
from fusedmoe.spec.format import ELEMENTS, SCALES, Inputs

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz}
BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


def values_of(element: str) -> torch.Tensor:
    """All values of an 8-bit float, ascending, without NaN."""
    values = BYTES.view(FLOAT8[element]).double()
    return torch.unique(values[values.isfinite()])


def probes(element: str) -> torch.Tensor:
    """float32 values where rounding can go wrong: values, ties, the neighbours of ties, subnormals, and beyond."""
    values = values_of(element)
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([ties * (1 + 2.0**-20), ties * (1 - 2.0**-20)])
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(2000, generator=g, dtype=torch.float64) * torch.exp2(
        torch.randint(-14, 12, (2000,), generator=g).double()
    )
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, 447.9, 1e5, -1e30, 3e38, math.inf, -math.inf, math.nan])
    return torch.cat([values, ties, near, spread, odd.double()]).float()


@pytest.mark.parametrize("element", FLOAT8)
def test_float8_rounds_as_torch_casts(element):
    x, largest = probes(element), ELEMENTS[element].largest
    wanted = x.clamp(-largest, largest).to(FLOAT8[element])  # torch overflows to NaN; we saturate
    got = numerics.round_to(x, element)
    torch.testing.assert_close(got, wanted.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(numerics.encode(x, element).view(torch.uint8), wanted.view(torch.uint8))
    assert got.isnan().sum() == 1, "only NaN becomes NaN"
    assert got.abs().nan_to_num().max() == largest


@pytest.mark.parametrize("element", FLOAT8)
def test_float64_is_rounded_once(element):
    """By way of float32 all of these would be ties first, and half of them go the wrong way."""
    values = values_of(element)
    ties = (values[1:] + values[:-1]) / 2
    ties = ties[ties != 0]
    up = numerics.round_to(ties + ties.abs() * 2.0**-40, element)
    down = numerics.round_to(ties - ties.abs() * 2.0**-40, element)
    assert up.dtype == torch.float64
    assert torch.equal(up, values[torch.searchsorted(values, ties)])
    assert torch.equal(down, values[torch.searchsorted(values, ties) - 1])


def test_e2m1_is_the_nearest_value_and_even_at_ties():
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    x = [i / 64 for i in range(-8 * 64, 8 * 64 + 1)] + [math.inf, -math.inf, 1e-40, 1e30]

    def code(v: float) -> int:
        distance = [abs(min(abs(v), 6.0) - m) for m in magnitudes]
        nearest = [c for c in range(8) if distance[c] == min(distance)]
        c = nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)
        return c + (8 if math.copysign(1.0, v) < 0 else 0)

    wanted = torch.tensor([code(v) for v in x])
    packed = numerics.encode(torch.tensor(x), "e2m1")
    assert packed.shape == ((len(x) + 1) // 2,)
    assert torch.equal(numerics.unpack(packed)[: len(x)].long(), wanted)
    signed = torch.tensor([*magnitudes, *(-m for m in magnitudes)])
    assert torch.equal(numerics.round_to(torch.tensor(x), "e2m1"), signed[wanted])
    assert torch.equal(numerics.decode(packed, "e2m1", torch.float64)[: len(x)], signed[wanted].double())
    assert numerics.round_to(torch.tensor([math.nan]), "e2m1").isnan().all()


def test_integers_round_to_even_and_saturate():
    x = torch.tensor([0.5, 1.5, -0.5, -2.5, 126.5, 127.4, 127.6, 1e9, -127.5, -128.4, -1e9, math.inf, -math.inf])
    wanted = [0.0, 2.0, -0.0, -2.0, 126.0, 127.0, 127.0, 127.0, -128.0, -128.0, -128.0, 127.0, -128.0]
    assert numerics.round_to(x, "int8").tolist() == wanted
    assert numerics.encode(x, "int8").tolist() == wanted
    assert numerics.round_to(torch.tensor([math.nan]), "int8").tolist() == [0.0]
    shifted = torch.tensor([-3.0, -0.4, 0.5, 1.5, 14.6, 15.5, 99.0, 254.5, 256.0, 1e9])
    assert numerics.encode(shifted, "uint8").tolist() == [0, 0, 0, 2, 15, 16, 99, 254, 255, 255]
    assert numerics.unpack(numerics.encode(shifted, "int4")).tolist() == [0, 0, 0, 2, 15, 15, 15, 15, 15, 15]


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_code_comes_back(element):
    codes = BYTES.view(getattr(torch, ELEMENTS[element].dtype))
    for dtype in (torch.float32, torch.float64):
        values = numerics.decode(codes, element, dtype)
        assert values.dtype == dtype
        assert values.numel() == 256 * ELEMENTS[element].per_byte
        back = numerics.encode(values, element).view(torch.uint8)
        known = ~values.isnan() if values.numel() == 256 else torch.ones(256, dtype=torch.bool)
        assert int(known.sum()) == {"e4m3": 254, "e4m3fnuz": 255}.get(element, 256)
        assert torch.equal(back[known], BYTES[known])
        if element in FLOAT8:
            assert numerics.decode(back.view(codes.dtype)[~known], element, dtype).isnan().all()


def test_pack_puts_the_even_column_low():
    nibbles = torch.tensor([[1, 2, 3], [15, 0, 9]], dtype=torch.uint8)
    packed = numerics.pack(nibbles)
    assert packed.tolist() == [[0x21, 0x03], [0x0F, 0x09]]
    assert numerics.unpack(packed).tolist() == [[1, 2, 3, 0], [15, 0, 9, 0]]
    assert torch.equal(numerics.pack(numerics.unpack(BYTES)), BYTES)


@pytest.mark.parametrize("default", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e8m0_is_a_power_of_two(dtype, default):
    """Whatever type the process creates tensors in; 0 is a subnormal float32."""
    torch.set_default_dtype(default)
    try:
        got = numerics.decode_scale(BYTES, "e8m0", dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == dtype
    assert got[:255].double().tolist() == [2.0 ** (c - 127) for c in range(255)]
    assert got[255].isnan()


@pytest.mark.parametrize("kind", [kind for kind in SCALES if kind != "e8m0"])
def test_other_scales_are_numbers(kind):
    stored = torch.tensor([0.5, 1.25, 448.0, 2.0**-9]).to(getattr(torch, SCALES[kind]))
    assert numerics.decode_scale(stored, kind, torch.float64).tolist() == stored.double().tolist()


@pytest.mark.parametrize(("n_rows", "block_n", "parts"), [(12, 4, 1), (13, 4, 1), (20, 4, 2), (12, 6, 2), (8, 16, 2)])
def test_blocks_start_anew_in_each_part(n_rows, block_n, parts):
    wanted, row = [], -1
    for _ in range(parts):
        for n in range(n_rows // parts):
            row += n % block_n == 0
            wanted.append(row)
    assert numerics.rows_of_scales(n_rows, block_n, parts, row + 1).tolist() == wanted


def test_one_scale_for_all_rows_or_one_for_each_part():
    assert numerics.rows_of_scales(5, 0, 1, 1).tolist() == [0] * 5
    assert numerics.rows_of_scales(6, 0, 2, 1).tolist() == [0] * 6
    assert numerics.rows_of_scales(6, 0, 2, 2).tolist() == [0, 0, 0, 1, 1, 1]


# --- rows ---------------------------------------------------------------------------------------------------------

DYNAMIC = [
    Inputs(element=element, mode=mode, group=12 if mode == "group" else 0)
    for element in ("e4m3", "e4m3fnuz", "int8")
    for mode in ("token", "group", "tensor")
]


def rows(dtype=torch.float32) -> torch.Tensor:
    """[5, 40]: 40 is no multiple of 12; sizes of rows, and of columns within a row, differ a thousandfold."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(5, 40, generator=g, dtype=torch.float64)
    x *= torch.tensor([1.0, 1e-3, 30.0, 1.0, 0.1], dtype=torch.float64)[:, None]
    x[:, 12:24] *= 1e-3
    return x.to(dtype)


def naive_scale(x: list[list[float]], inputs: Inputs, live: list[bool]) -> list[list[float]]:
    """Scale of each column of each row, written out."""
    size = inputs.group if inputs.mode == "group" else len(x[0])

    def amax(v: list[float]) -> float:
        return max([1e-10, *(abs(a) for a in v if not math.isnan(a))])

    everything = amax([a for row, is_live in zip(x, live, strict=True) if is_live for a in row])
    largest = ELEMENTS[inputs.element].largest
    if inputs.mode == "tensor":
        return [[everything / largest] * len(row) for row in x]
    return [[amax(row[k // size * size : k // size * size + size]) / largest for k in range(len(row))] for row in x]


@pytest.mark.parametrize("inputs", DYNAMIC, ids=str)
def test_a_scale_takes_the_largest_magnitude_to_the_largest_code(inputs):
    x = rows(torch.float64)
    live = torch.tensor([True, True, False, True, True])
    x[1, 20] = math.nan  # among the smallest, so that whatever stood in its place would be the largest
    x[4] = 0.0
    wanted = torch.tensor(naive_scale(x.tolist(), inputs, live.tolist()), dtype=torch.float64)
    scale = numerics.input_scale(x, inputs, live)
    assert scale.shape == {"token": (5, 1), "group": (5, 4), "tensor": (1, 1)}[inputs.mode]
    spread = numerics.spread_input_scale(scale, inputs, 40).expand(5, 40)
    torch.testing.assert_close(spread, wanted, rtol=1e-15, atol=0)
    assert numerics.input_scale(x.float(), inputs, live).dtype == torch.float32
    assert numerics.input_scale(x.bfloat16(), inputs, live).dtype == torch.float32
    if inputs.mode == "tensor":
        assert float(scale) < float(numerics.input_scale(x, inputs)), "the largest row is not live"


@pytest.mark.parametrize("inputs", DYNAMIC, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_come_back_to_half_a_unit(inputs, dtype):
    x = rows(dtype)
    codes, scale = numerics.quantise_inputs(x, inputs)
    spread = numerics.spread_input_scale(scale, inputs, 40).double()
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    v = (x.double() / spread).abs()
    if inputs.element == "int8":
        unit = torch.ones_like(v)
    else:
        smallest = -6 if inputs.element == "e4m3" else -7
        unit = torch.exp2(torch.log2(v).floor().clamp(min=smallest) - 3)
    # The quotient is rounded to float32 before it is rounded to a code.
    assert bool(((codes.double() * spread - x.double()).abs() <= spread * (unit / 2 + v * 2.0**-23)).all())
    assert codes.abs().max() == ELEMENTS[inputs.element].largest
    exact = numerics.encode(codes, inputs.element)
    assert torch.equal(exact.to(codes.dtype), codes), "codes are values of the element"


@pytest.mark.parametrize("inputs", DYNAMIC, ids=str)
@pytest.mark.parametrize("n_rows", [0, 3])
def test_nothing_but_zeros_gives_zeros(inputs, n_rows):
    codes, scale = numerics.quantise_inputs(torch.zeros(n_rows, 40), inputs, live=torch.zeros(n_rows, dtype=torch.bool))
    assert codes.shape == (n_rows, 40)
    assert bool((codes == 0).all()) and bool((scale > 0).all()) and bool(scale.isfinite().all())


@pytest.mark.parametrize("inputs", [*DYNAMIC, *(Inputs(element=e, mode="static") for e in ("e4m3", "int8"))], ids=str)
def test_nan_stays_in_its_row(inputs):
    static = torch.tensor([0.25]) if inputs.mode == "static" else None
    x = rows()

    def back(x: torch.Tensor) -> torch.Tensor:
        codes, scale = numerics.quantise_inputs(x, inputs, static)
        return (codes * numerics.spread_input_scale(scale, inputs, 40)).expand(5, 40)

    clean = back(x)
    x[1, 30] = math.nan  # in no group, and no row, that it is the largest of
    got = back(x)
    assert got[1, 30].isnan()
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(got[others], clean[others])
    if inputs.element == "int8":
        assert got[1].isnan().all(), "an integer cannot say it"
    else:
        assert got[1].isnan().sum() == 1


@pytest.mark.parametrize("element", ["e4m3", "e4m3fnuz", "int8"])
def test_a_static_scale_saturates(element):
    largest = ELEMENTS[element].largest
    x = torch.tensor([[0.5 * largest, -0.5 * largest, 300.0, -300.0, 1e30, 0.5]])
    codes, scale = numerics.quantise_inputs(x, Inputs(element=element, mode="static"), torch.tensor([0.5]))
    low = -128.0 if element == "int8" else -largest
    assert scale.tolist() == [[0.5]]
    assert codes.tolist()[0][:2] == [largest, -largest]
    assert codes.tolist()[0][2:] == [min(600.0, largest), max(-600.0, low), largest, 1.0]
