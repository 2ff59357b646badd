"""A row on the wire: a message of bytes with the hidden state, its scales, places and router weights, its adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedmoe.backends.base import Rows
from fusedmoe.spec.format import ELEMENTS, Inputs

#: Every part of a row starts at a multiple of this many bytes: what vector loads and tensor maps need.
ALIGNMENT = 16


@dataclass(frozen=True)
class Wire:
    """Form of a message; the same on all ranks.

    Attributes:
        hidden: H.
        top_k: experts of a token.
        dtype: type of the layer.
        inputs: how rows are quantised before they travel; None: they travel in the type of the layer.
        adapters: the slot of each token's adapter travels with it.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype
    inputs: Inputs | None
    adapters: bool = False

    @property
    def row_dtype(self) -> torch.dtype:
        """Type of a row on the wire."""
        return self.dtype if self.inputs is None else getattr(torch, ELEMENTS[self.inputs.element].dtype)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        if self.inputs is None:
            return 0
        return math.ceil(self.hidden / self.inputs.group) if self.inputs.mode == "group" else 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Bytes of hidden state, scales, places and weights, padded; behind the weights the slot of the adapter."""
        last = 4 * (self.top_k + self.adapters)
        lengths = (self.hidden * self.row_dtype.itemsize, 4 * self.groups, 4 * self.top_k, last)
        return tuple(-(-length // ALIGNMENT) * ALIGNMENT for length in lengths)  # type: ignore[return-value]

    @property
    def row_bytes(self) -> int:
        """Bytes of a message."""
        return sum(self.sizes)

    def views(self, messages: Tensor) -> Rows:
        """Parts of messages [R, row_bytes] uint8."""
        a, b, c, _ = self.sizes

        def part(start: int, count: int, dtype: torch.dtype) -> Tensor:
            return messages[:, start : start + count * dtype.itemsize].view(dtype)

        return Rows(
            part(0, self.hidden, self.row_dtype),
            part(a, self.groups, torch.float32) if self.groups else None,
            part(a + b, self.top_k, torch.int32),
            part(a + b + c, self.top_k, torch.float32),
            part(a + b + c + 4 * self.top_k, 1, torch.int32)[:, 0] if self.adapters else None,
        )
