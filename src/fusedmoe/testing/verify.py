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


#: Relative error of an unquantised layer, ||out - ref|| / ||ref|| against float64 on the same inputs: a few roundings
#: of independent sign to the type (intermediate, rows, output), so about 2 units of 2^-(mantissa bits + 1).
#: float32 has no such roundings beyond its accumulation.
TOLERANCE = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}
#: How far float32 sums, scales and quotients are from float64 ones.
FLOAT32 = 2.0**-22
#: How far sums of e4m3 products are: Hopper's tensor cores cut what is below 14 bits of every 32 products and the sum
#: so far. Simulated on normal random codes: 2e-5 sqrt(K), and 1.3e-4 where every 128 are added to a float32 sum.
SUMS = 2.0**-10


def tolerance(
    dtype: torch.dtype | str,
    w13: Format | None = None,
    w2: Format | None = None,
    *,
    codes: tuple[float, float] = (math.inf, math.inf),
) -> float:
    """The largest relative error that the arithmetic allows a layer of this type with matrices of these formats.

    Without formats: TOLERANCE. Weights that are decoded to the type of the layer, to meet rows as they are, are rounded
    once more: half of it, for each matrix.

    Rows that are quantised have the codes of the reference, but for values that lie so near to the boundary of two
    codes that rounding decides: a share p of codes is the neighbour of the right one, a relative error of
    step * sqrt(p). With u the rounding of the layer's type:

        rows of w13    p = u / 8 + FLOAT32 / step    values of few bits lie on boundaries (measured on normal numbers:
                                                     u / 8 for int8, u / 64 for e4m3); float32 against float64
        rows of w2     p = d / step                  a value that is off by d * itself crosses one with that probability
                       d = u + FLOAT32 + 1.5 e13     it may have been stored in the type of the layer first, and
                                                     inherits the error e13 of the rows of w13, as gate and as up;
                       d += SUMS                     where w13 multiplies e4m3: see there

    Of n codes no more than n p + 2 sqrt(n p) + 1 are taken to be wrong.

    Args:
        dtype: of the layer.
        w13, w2: formats of the matrices, None where they are plain.
        codes: how many values of hidden states and of the intermediate are quantised; without end: the shares above.
    """
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    unit, total = bound / 2, bound
    distance = unit + FLOAT32
    for form in (w13, w2):
        if form is not None and form.inputs is None:
            total += unit
        if form is not None and form.inputs is not None and form.inputs.element == form.element != "int8":
            total += SUMS
    if w13 is not None and w13.inputs is not None:
        step = ELEMENTS[w13.inputs.element].step
        error = _neighbours(step, unit / 8 + FLOAT32 / step, codes[0])
        total += 2 * error
        distance += 1.5 * error + (SUMS if w13.element == w13.inputs.element != "int8" else 0.0)
    if w2 is not None and w2.inputs is not None:
        step = ELEMENTS[w2.inputs.element].step
        total += 1.5 * _neighbours(step, distance / step, codes[1])
    return total


def _neighbours(step: float, share: float, n: float) -> float:
    """Relative error of n codes when about this share of them is off by a step."""
    few = (2 * math.sqrt(n * share) + 1) / n if 0 < n < math.inf else 0.0
    return step * math.sqrt(min(1.0, share + few))


def expected(arguments: tuple[Any, ...], options: Mapping[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """What the reference, computing in ``dtype``, makes of arguments and options of :func:`fusedmoe.fused_experts`."""
    options = {name: value for name, value in options.items() if name != "dtype"}  # there: of the output
    return reference.fused_experts(*arguments, dtype=dtype, **options)


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


class Oracle:
    """What the reference makes of a call, computed once, to compare several results with.

    Args:
        arguments, options, dtype: as :func:`verify` has them; type of the layer.
    """

    @torch.no_grad()
    def __init__(self, arguments: tuple[Any, ...], options: Mapping[str, Any], dtype: torch.dtype) -> None:
        x, w13, w2, topk_weights, topk_ids = arguments
        formats = [w.format if isinstance(w, ExpertMatrix) else None for w in (w13, w2)]
        inputs = [form.inputs for form in formats if form is not None]
        modes = {one.mode for one in inputs if one is not None}
        self._rows: Tensor | None = None
        if x.shape[0] > FULL and "tensor" not in modes:  # where all rows share a scale, that of a sample is another
            generator = torch.Generator().manual_seed(0)
            rows = self._rows = torch.randperm(x.shape[0], generator=generator)[:SAMPLE].to(x.device)
            x, topk_weights, topk_ids = x[rows], topk_weights[rows], topk_ids[rows]
            scale = options.get("hidden_states_scale")
            if scale is not None and scale.numel() > 1:
                options = {**options, "hidden_states_scale": scale[rows]}
            if (adapter_ids := options.get("adapter_ids")) is not None:
                options = {**options, "adapter_ids": adapter_ids[rows]}
        per_expert = math.prod(w13.shape[1:]) + math.prod(w2.shape[1:])
        exact = dtype == torch.float32 or topk_ids.numel() * per_expert <= SMALL
        kind = torch.float64 if exact else torch.float32
        with true_float32():
            self._want = expected((x, w13, w2, topk_weights, topk_ids), options, kind)
        codes = (x.numel(), topk_ids.numel() * w2.shape[2])
        self._tolerance = tolerance(dtype, *formats, codes=codes)

    @torch.no_grad()
    def verdict(self, out: Tensor) -> Verdict:
        """Compare a result [T, H] with it."""
        return Verdict(
            error=relative_error(out if self._rows is None else out[self._rows], self._want),
            tolerance=self._tolerance,
            reference=str(self._want.dtype).removeprefix("torch."),
            rows=self._want.shape[0],
        )


def verify(out: Tensor, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Verdict:
    """Compare ``out`` with the reference on the same arguments, on their device.

    Args:
        out: [T, H], what :func:`fusedmoe.fused_experts` returned.
        arguments: its positional arguments: hidden_states, w13, w2, topk_weights, topk_ids.
        options: those of its options that :func:`fusedmoe.reference.fused_experts` has, and dtype.
    """
    return Oracle(arguments, options, out.dtype).verdict(out)
