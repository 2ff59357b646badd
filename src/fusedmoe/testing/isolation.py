"""What else is in a batch must not show in a row: the two promises that a comparison with the reference cannot test."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fusedmoe.functional import fused_experts
from fusedmoe.testing.cases import Case


def couples_rows(case: Case) -> bool:
    """A scheme of the case has one dynamic scale for all rows, by which each depends on all."""
    first, second = (None if form is None or form.inputs is None else form.inputs.mode for form in case.formats)
    return second == "tensor" or first == "tensor" and not case.codes


def some_tokens(arguments: tuple[Any, ...], options: dict[str, Any], rows: Tensor) -> tuple[Any, dict[str, Any]]:
    """The call with these tokens alone, in this order."""
    x, w13, w2, weights, ids = arguments
    scale = options.get("hidden_states_scale")
    if scale is not None and scale.numel() > 1:
        options = {**options, "hidden_states_scale": scale[rows]}
    return (x[rows], w13, w2, weights[rows], ids[rows]), options


@torch.no_grad()
def batch_variant_rows(
    case: Case,
    sizes: Iterable[int],
    device: str = "cpu",
    backend: str | None = None,
    seed: int = 0,
    *,
    batch_invariant: bool = True,
) -> dict[int, int]:
    """Rows whose bits change with the batch, with or without batch-invariant mode: number of tokens -> how many rows.

    All tokens of the case are one batch; then as many as each size says are drawn from it, in another order, so that a
    token has other neighbours, another place, and neighbours with other experts.
    """
    arguments, options = case.draw(device, seed)
    options |= {"batch_invariant": batch_invariant, "backend": backend}
    whole = fused_experts(*arguments, **options)
    chooser = torch.Generator().manual_seed(seed)
    found = {}
    for size in sizes:
        rows = torch.randperm(case.tokens, generator=chooser)[:size].to(device)
        few, their_options = some_tokens(arguments, options, rows)
        part = fused_experts(*few, **their_options)
        found[size] = int((_bits(part) != _bits(whole[rows])).any(1).sum())
    return found


@torch.no_grad()
def disturbed_rows(
    case: Case, value: float = float("nan"), device: str = "cpu", backend: str | None = None, seed: int = 0
) -> tuple[int, bool]:
    """What a NaN or an infinity in the hidden states of one token does: how many other rows change, and whether its own
    shows it.
    """
    case = replace(case, codes=False, ids="uniform", mapped=False)
    arguments, options = case.draw(device, seed)
    clean = fused_experts(*arguments, backend=backend, **options)
    token = case.tokens // 2
    arguments[0][token, case.hidden // 2] = value
    dirty = fused_experts(*arguments, backend=backend, **options)
    others = torch.arange(case.tokens, device=clean.device) != token
    changed = int((_bits(dirty) != _bits(clean))[others].any(1).sum())
    return changed, not bool(torch.isfinite(dirty[token]).all())


def _bits(tensor: Tensor) -> Tensor:
    """Elements as integers: NaNs are equal when their bits are, and 0 is not -0."""
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)
