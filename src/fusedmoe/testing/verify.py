"""Compare what a call returned with the reference: one measure, and the bound that a scheme states for it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedmoe import reference
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.spec.format import ELEMENTS, Format

#: Up to this many tokens all rows are verified; above, SAMPLE rows drawn at random.
FULL, SAMPLE = 2048, 512
#: Up to this many multiply-adds the reference computes in float64 whatever the type of the layer.
SMALL = 1 << 32


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How far a result is from the reference.

    Attributes:
        error: ||got - want|| / ||want||; infinite where a value is NaN or infinite and should not be.
        tolerance: the bound that the scheme states for the type.
        reference: type in which the reference was computed.
        rows: tokens that were compared.
    """

    error: float
    tolerance: float
    reference: str
    rows: int

    @property
    def ok(self) -> bool:
        """The error keeps the bound."""
        return self.error <= self.tolerance


#: Relative error of an unquantised layer, ||out - ref|| / ||ref|| against float64 on the same inputs: a few roundings of
#: independent sign to the type (intermediate, rows, output), so about 2 units of 2^-(mantissa bits + 1).
#: float32 has no such roundings beyond its accumulation.
TOLERANCE = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def tolerance(dtype: torch.dtype | str, *formats: Format | None) -> float:
    """The largest relative error that the arithmetic allows a layer of this type with matrices of these formats.

    Weights that are decoded to the type of the layer are rounded once more. A row that differs from the reference's
    by a relative d before it is quantised gets another code where a boundary lies between the two: a share d / step
    of its codes changes by one step, an error of sqrt(step * d). d: a rounding to the type of the layer, and what
    the tensor cores lose in sums of fp8 products, which they keep to about 14 bits.
    """
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    total = bound
    for form in formats:
        if form is not None:
            total += bound / 2
        if form is not None and form.inputs is not None:
            total += 1.5 * (ELEMENTS[form.inputs.element].step * max(bound / 2, 2.0**-13)) ** 0.5
    return total


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64; 0 where both are 0, infinite where it is no number."""
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    if difference == 0.0:
        return 0.0
    error = difference / size if size else math.inf
    return error if math.isfinite(error) else math.inf


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Multiply float32 as float32, whatever the process asked for, on every device."""
    libraries: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [library.fp32_precision for library in libraries]
    try:
        for library in libraries:
            library.fp32_precision = "ieee"
        yield
    finally:
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision


@torch.no_grad()
def verify(
    out: Tensor, arguments: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], options: Mapping[str, Any]
) -> Verdict:
    """Compare ``out`` with the reference on the same arguments, on their device.

    Args:
        out: [T, H], what :func:`fusedmoe.fused_experts` returned.
        arguments: its positional arguments: hidden_states, w13, w2, topk_weights, topk_ids.
        options: those of its options that :func:`fusedmoe.reference.fused_experts` has.
    """
    x, w13, w2, topk_weights, topk_ids = arguments
    if x.shape[0] > FULL:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(x.shape[0], generator=generator)[:SAMPLE].to(x.device)
        out, x, topk_weights, topk_ids = out[rows], x[rows], topk_weights[rows], topk_ids[rows]
    per_expert = math.prod(w13.shape[1:]) + math.prod(w2.shape[1:])
    exact = x.dtype == torch.float32 or topk_ids.numel() * per_expert <= SMALL
    dtype = torch.float64 if exact else torch.float32
    with true_float32():
        want = reference.fused_experts(x, w13, w2, topk_weights, topk_ids, dtype=dtype, **options)
    return Verdict(
        error=relative_error(out, want),
        tolerance=tolerance(
            out.dtype, *(w.format if isinstance(w, ExpertMatrix) else None for w in (w13, w2))
        ),
        reference=str(dtype).removeprefix("torch."),
        rows=x.shape[0],
    )
