"""Rows before they travel and after, in plain torch, without a host synchronisation; see :class:`base.Transit`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedmoe.backends.base import Sends
from fusedmoe.numerics import quantise_inputs, wide
from fusedmoe.spec.format import ELEMENTS, Inputs

#: Elements of a float32 temporary.
PIECE = 1 << 22


def encode(x: Tensor, inputs: Inputs, static: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows."""
    codes, scale = quantise_inputs(x, inputs, static)
    scale = scale.to(torch.float32).expand(x.shape[0], -1)
    return codes.to(getattr(torch, ELEMENTS[inputs.element].dtype)), scale.contiguous()


def reduce(rows: Tensor, index: Tensor, weights: Tensor | None, out: Tensor) -> Tensor:
    """Weigh and sum the rows of each token."""
    n_rows = rows.shape[0]
    if n_rows == 0:
        return out.zero_()
    step = max(1, PIECE // max(1, rows.shape[1]))
    for start in range(0, index.shape[0], step):
        piece = index[start : start + step].long()
        absent = (piece < 0) | (piece >= n_rows)
        total = torch.zeros_like(out[start : start + step], dtype=wide(out[:0]).dtype)
        for j, row in enumerate(piece.clamp(0, n_rows - 1).unbind(1)):
            y = rows.index_select(0, row).to(total.dtype)
            if weights is not None:
                y = y * weights[start : start + step, j : j + 1].to(total.dtype)
            total += y.masked_fill(absent[:, j : j + 1], 0.0)
        out[start : start + step] = total
    return out


def sends(places: Tensor, ranks: int, each: int, capacity: int | None) -> Sends:
    """Which tokens go to which rank, once each, and where the answers of each token will be."""
    n_tokens, top_k = places.shape
    device = places.device
    rank = torch.where(places >= 0, places // each, ranks).long()
    goes = torch.zeros(n_tokens, ranks + 1, dtype=torch.int64, device=device).scatter_(1, rank, 1)
    goes[:, ranks] = 0
    ends = goes.cumsum(0)
    counts = goes.sum(0)[:ranks]
    if capacity is None:
        size, base = n_tokens * min(ranks, top_k), counts.cumsum(0) - counts
    else:
        size, base = ranks * capacity, torch.arange(ranks, device=device) * capacity
    row = ends - goes + torch.nn.functional.pad(base, (0, 1))
    row = torch.where(goes > 0, row, size)
    numbers = torch.arange(n_tokens, device=device)[:, None].expand(-1, ranks + 1)
    token = torch.zeros(size + 1, dtype=torch.int64, device=device)
    token.scatter_(0, row.reshape(-1), numbers.reshape(-1))
    again = (rank[:, :, None] == rank[:, None, :]).tril(-1).any(2)
    answer = torch.where((rank < ranks) & ~again, row.gather(1, rank), -1)
    return Sends(counts, token[:size], answer)
