"""What quantised rows promise, in Triton's interpreter: zeros, NaN, saturation, and whose magnitudes make a scale."""

from __future__ import annotations

import pytest
import torch

import fusedmoe
import fusedmoe.backends.rows
from fusedmoe import backends, reference
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.testing.cases import Case
from fusedmoe.testing.verify import relative_error, tolerance

if not settings().interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

T, TOP_K, E, H, I = 20, 2, 4, 64, 48
#: Every way to quantise rows: (scheme, choices).
ROWS = {
    "fp8 token": ("fp8_channel", {}),
    "fp8 group": ("fp8_block", {"block": (32, 32)}),
    "fp8 tensor": ("fp8_tensor", {"inputs": "tensor"}),
    "fp8 static": ("fp8_tensor", {"inputs": "static"}),
    "int8 token": ("int8_w8a8", {}),
    "int8 group": ("int8_w8a8", {"block": (32, 32)}),
    "int8 tensor": ("int8_w8a8", {"inputs": "tensor"}),
    "int8 static": ("int8_w8a8", {"inputs": "static"}),
    "mxfp4 token": ("mxfp4_fp8", {}),
}


def layer(rows, tokens=T):
    scheme, choices = ROWS[rows]
    hidden, intermediate = (H, 64) if scheme.startswith("mx") else (H, I)
    g = torch.Generator().manual_seed(0)
    static = {"input_scale": 0.02} if choices.get("inputs") == "static" else {}
    w13 = fusedmoe.quantize(torch.randn(E, 2 * intermediate, hidden, generator=g) / 8, scheme, **choices, **static)
    w2 = fusedmoe.quantize(torch.randn(E, hidden, intermediate, generator=g) / 7, scheme, **choices, **static)
    x = torch.randn(tokens, hidden, generator=g)
    ids = torch.rand(tokens, E, generator=g).argsort(1)[:, :TOP_K]
    return x, w13, w2, torch.rand(tokens, TOP_K, generator=g) + 0.2, ids


def run(arguments, **options):
    return fusedmoe.fused_experts(*arguments, backend="triton", gate_up_layout="interleaved", **options)


def expected(arguments):
    return reference.fused_experts(*arguments, gate_up_layout="interleaved")


@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("tokens", [3, T])
@pytest.mark.parametrize("rows", ROWS)
def test_tokens_of_zeros_give_zeros_and_harm_no_other(rows, tokens, emulate):
    x, *rest = layer(rows, tokens)
    x[1] = 0.0
    out = run((x, *rest), emulate=emulate)
    assert out[1].abs().sum() == 0
    assert relative_error(out, expected((x, *rest))) < tolerance(x.dtype, rest[0].format, rest[1].format)


@pytest.mark.parametrize("rows", ROWS)
def test_a_token_of_nan_stays_alone(rows):
    x, *rest = layer(rows)
    clean = run((x, *rest))
    x = x.clone()
    x[7, 5] = float("nan")
    dirty = run((x, *rest))
    assert dirty[7].isnan().all()
    others = [t for t in range(T) if t != 7]
    if "tensor" in rows:  # one scale for all: the NaN does not count, the magnitudes beside it no longer do
        assert not dirty[others].isnan().any()
    else:
        assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("elements", [32, 256], ids=["columns in steps", "rows together"])
@pytest.mark.parametrize("rows", [name for name in ROWS if "group" not in name])
def test_a_tile_of_rows_changes_no_bit(rows, elements, monkeypatch):
    """Whether a program has a row, part of one, or several, some of them absent or NaN, and not all of them there."""
    x, w13, w2, weights, ids = layer(rows)
    ids[3], ids[4, 0] = -1, E
    x[7, 5] = float("nan")
    alone = run((x, w13, w2, weights, ids))
    monkeypatch.setattr(backends.rows, "_ELEMENTS", elements)
    monkeypatch.setattr(backends.rows, "_MANY_ROWS", 1)
    out = run((x, w13, w2, weights, ids))
    assert torch.equal(out.nan_to_num(1e9), alone.nan_to_num(1e9))
    if "tensor" not in rows:
        assert out[7].isnan().all() and not out[3].any()


@pytest.mark.parametrize("rows", ["fp8 static", "int8 static"])
def test_a_given_scale_saturates(rows):
    x, *rest = layer(rows)
    x = x * 1e6
    out = run((x, *rest))
    assert out.isfinite().all()
    assert relative_error(out, expected((x, *rest))) < tolerance(x.dtype, rest[0].format, rest[1].format)


@pytest.mark.parametrize("rows", ["fp8 tensor", "int8 tensor"])
def test_rows_that_no_expert_needs_make_no_scale(rows):
    """Padding of a CUDA graph: its ids name no expert, its hidden states may be anything."""
    x, w13, w2, weights, ids = layer(rows)
    ids[::3] = -1
    clean = run((x, w13, w2, weights, ids))
    x = x.clone()
    x[::3] = 1e30
    assert torch.equal(run((x, w13, w2, weights, ids)), clean)


@pytest.mark.parametrize("rows", [rows for rows in ROWS if "static" not in rows])
def test_magnitudes_of_any_size(rows):
    for size in (1e-30, 1e-12, 1e12):
        x, *rest = layer(rows)
        out = run((x * size, *rest))
        assert out.isfinite().all()


def _spread(tensor: torch.Tensor, step: int) -> torch.Tensor:
    """The same values, the last expert ``step`` elements away: a view of memory that is reserved but hardly touched."""
    strides = (step // (tensor.shape[0] - 1), *tensor.contiguous().stride()[1:])
    size = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1
    return torch.empty(size, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("matrix", ["w13", "w2"])
@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        ("fp8_block", "data"),
        ("fp8_block", "scale"),
        ("fp8_channel", "scale"),
        ("int4_w4a16", "data"),
        ("int4_w4a16", "scale"),
        ("int4_w4a16", "zero"),
        ("nvfp4", "scale"),
        ("nvfp4", "tensor_scale"),
    ],
)
def test_offsets_beyond_2_to_31(scheme, part, matrix, tokens):
    form = format_of(scheme, zero=True) if part == "zero" else format_of(scheme)
    arguments, options = Case.of((tokens, 2, 3, 64, 32), formats=(form, form), ids="any").fitted().draw()
    want = fusedmoe.fused_experts(*arguments, backend="triton", **options)
    index = {"w13": 1, "w2": 2}[matrix]
    made = arguments[index]
    parts = made.tensors()
    parts[part] = _spread(parts[part], 2**31 + 8)
    far = ExpertMatrix(form, parts=made.parts, **parts)
    assert getattr(far, part).stride(0) * (made.shape[0] - 1) > 2**31
    arguments = (*arguments[:index], far, *arguments[index + 1 :])
    assert torch.equal(fusedmoe.fused_experts(*arguments, backend="triton", **options), want)


@pytest.mark.parametrize("tokens", [3, 40])
def test_scales_of_hidden_states_beyond_2_to_31(tokens):
    form = format_of("fp8_block")
    arguments, options = Case.of((tokens, 2, 3, 256, 32), formats=(form, form), codes=True).draw()
    want = fusedmoe.fused_experts(*arguments, backend="triton", **options)
    options["hidden_states_scale"] = _spread(options["hidden_states_scale"], 2**31 + 8)
    assert torch.equal(fusedmoe.fused_experts(*arguments, backend="triton", **options), want)
