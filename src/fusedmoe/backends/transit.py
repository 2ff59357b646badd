"""Rows before they travel and after, in plain torch, without a host synchronisation; see :class:`base.Transit`."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedmoe.backends.base import Places, Rows, Sends
from fusedmoe.lora import MAX_SLOTS
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


def choose(topk_ids: Tensor, places: Places, rank: int) -> Tensor:
    """Place of each slot [T, top_k] int32."""
    n_experts, most = places.of.shape[0] - 1, places.of.shape[1]
    ids = topk_ids.long()
    ids = torch.where((ids >= 0) & (ids < n_experts), ids, n_experts)
    if most == 1:
        return places.of[:, 0][ids]
    token = torch.arange(ids.shape[0], device=ids.device)[:, None]
    # The upper half of a product with 2^32 / golden ratio (Knuth, TAOCP 3, 6.4); ranks start apart.
    mixed = ((token + 7919 * rank) * 2654435769 & 0xFFFFFFFF) >> 16
    return places.of.view(-1)[ids * most + mixed % places.copies[ids]]


def sends(topk_ids: Tensor, places: Places, rank: int, capacity: int | None) -> Sends:
    """Which tokens go to which rank, once each, and where the answers of each token will be."""
    (n_tokens, top_k), ranks, device = topk_ids.shape, places.ranks, topk_ids.device
    chosen = choose(topk_ids, places, rank)
    to = torch.where(chosen >= 0, chosen // places.each, ranks).long()
    goes = torch.zeros(n_tokens, ranks + 1, dtype=torch.int64, device=device).scatter_(1, to, 1)
    goes[:, ranks] = 0
    ends = goes.cumsum(0)
    counts = goes.sum(0)[:ranks]
    size = rows_of(n_tokens, top_k, ranks, capacity)
    base = counts.cumsum(0) - counts if capacity is None else torch.arange(ranks, device=device) * capacity
    row = ends - goes + torch.nn.functional.pad(base, (0, 1))
    row = torch.where(goes > 0, row, size)
    numbers = torch.arange(n_tokens, device=device)[:, None].expand(-1, ranks + 1)
    token = torch.zeros(size + 1, dtype=torch.int64, device=device)
    token.scatter_(0, row.reshape(-1), numbers.reshape(-1))
    again = (to[:, :, None] == to[:, None, :]).tril(-1).any(2)
    answer = torch.where((to < ranks) & ~again, row.gather(1, to), -1)
    return Sends(chosen, counts, token[:size], answer)


def rows_of(n_tokens: int, top_k: int, ranks: int, capacity: int | None) -> int:
    """Rows that there may be."""
    return n_tokens * min(ranks, top_k) if capacity is None else ranks * capacity


def pack(
    x: Tensor, scale: Tensor | None, weights: Tensor, adapter_ids: Tensor | None, sends: Sends, capacity: int | None,
    out: Rows,
) -> None:  # fmt: skip
    """Write messages."""
    n_rows = out.places.shape[0]
    token = sends.token[:n_rows]
    if x.shape[0]:
        pairs = [(x, out.hidden_states), (sends.places, out.places), (weights.to(torch.float32), out.weights)]
        if scale is not None and out.scale is not None:
            pairs.append((scale, out.scale))
        if adapter_ids is not None and out.adapters is not None:
            slots = torch.where((adapter_ids >= 0) & (adapter_ids < MAX_SLOTS), adapter_ids, -1)
            pairs.append((slots.to(torch.int32)[:, None], out.adapters[:, None]))
        for source, target in pairs:
            bits, target_bits = words(source, target)
            torch.index_select(bits, 0, token, out=target_bits)
    if capacity is not None:
        nobody = torch.arange(capacity, device=token.device) >= sends.counts[:, None]
        out.places.masked_fill_(nobody.view(-1, 1), -1)


def words(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the widest integers that they divide into: rows are copied bit by bit."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    spans = (x.shape[1], x.stride(0), x.storage_offset(), out.stride(0), out.storage_offset())
    for word in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if x.stride(1) == 1 and all(span * x.itemsize % word.itemsize == 0 for span in spans):
            return x.view(word), out.view(word)
    return x, out
