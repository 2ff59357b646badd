"""Named scratch memory of a call, cut out of one buffer: the caller's, or one allocation."""

from __future__ import annotations

import math

import torch

from fusedmoe.errors import DeviceError, DTypeError, WorkspaceError, explain

#: Every named tensor starts a multiple of this many bytes into the buffer: no two share a cache line.
ALIGNMENT = 256
#: The buffer itself starts at a multiple of this many bytes: what tensor maps and vector loads need.
BASE_ALIGNMENT = 16

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _padded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def layout_bytes(layout: Layout) -> int:
    """Bytes of a buffer that holds the layout."""
    return sum(_padded_bytes(shape, dtype) for shape, dtype in layout.values())


class Workspace:
    """Views into one buffer by name; the memory is uninitialised."""

    def __init__(self, layout: Layout, device: torch.device, buffer: torch.Tensor | None = None) -> None:
        need = layout_bytes(layout)
        if buffer is None:
            buffer = torch.empty(need, dtype=torch.uint8, device=device)
        else:
            _check(buffer, need, device)
        self._tensors: dict[str, torch.Tensor] = {}
        start = 0
        for name, (shape, dtype) in layout.items():
            length = math.prod(shape) * dtype.itemsize
            self._tensors[name] = buffer[start : start + length].view(dtype).view(shape)
            start += _padded_bytes(shape, dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _check(buffer: torch.Tensor, need: int, device: torch.device) -> None:
    wanted = f"a contiguous uint8 tensor of at least {need} bytes on {device}, aligned to {BASE_ALIGNMENT} bytes"
    do = "Allocate torch.empty(fusedmoe.workspace_bytes(...), dtype=torch.uint8, device=...)."
    dense = isinstance(buffer, torch.Tensor) and buffer.layout == torch.strided
    if not dense or buffer.dtype != torch.uint8:
        kind = f"{buffer.dtype} {buffer.layout}" if isinstance(buffer, torch.Tensor) else type(buffer).__name__
        raise DTypeError(explain("workspace", got=kind, wanted=wanted, do=do))
    if buffer.device != device:
        raise DeviceError(explain("workspace", got=f"a tensor on {buffer.device}", wanted=wanted, do=do))
    if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.data_ptr() % BASE_ALIGNMENT and need:
        offset = buffer.data_ptr() % BASE_ALIGNMENT
        got = f"shape {tuple(buffer.shape)}, strides {buffer.stride()}, address % {BASE_ALIGNMENT} = {offset}"
        raise WorkspaceError(explain("workspace", got=got, wanted=wanted, do=do))
    if buffer.numel() < need:
        raise WorkspaceError(explain("workspace", got=f"{buffer.numel()} bytes", wanted=wanted, do=do))
