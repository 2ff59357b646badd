"""Named scratch memory of a call, cut out of one buffer: the caller's, or one allocation.

Or out of two buffers of the caller's, as engines own them: what the last step reads lies in the second, so that the
output may lie in the first.
"""

from __future__ import annotations

import math

import torch

from fusedmoe.errors import DeviceError, DTypeError, WorkspaceError, explain

#: Every named tensor starts a multiple of this many bytes into the buffer: no two share a cache line.
ALIGNMENT = 256
#: The buffer itself starts at a multiple of this many bytes: what tensor maps and vector loads need.
BASE_ALIGNMENT = 16

#: What the sum of a token's rows reads: the rows, and where each slot's lies. When it writes, all else is dead.
LAST = ("rows", "row")

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _padded_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def layout_bytes(layout: Layout) -> int:
    """Bytes of a buffer that holds the layout."""
    return sum(_padded_bytes(shape, dtype) for shape, dtype in layout.values())


def in_two(layout: Layout) -> tuple[Layout, Layout]:
    """The layout of workspace13, which the output may share, and of workspace2.

    Without rows the last step is a GEMM that reads nearly all there is: then nothing lies where the output may be.
    """
    if "rows" not in layout:
        return {}, layout
    first = {name: tensor for name, tensor in layout.items() if name not in LAST}
    return first, {name: tensor for name, tensor in layout.items() if name in LAST}


class Workspace:
    """Views into one buffer, or two, by name; the memory is uninitialised.

    Attributes:
        buffers: what the views are of.
    """

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        buffer: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self.buffers: tuple[torch.Tensor, ...]
        if isinstance(buffer, tuple):
            self.buffers = buffer
            for name, part, one in zip(("workspace13", "workspace2"), in_two(layout), buffer, strict=True):
                _check(one, layout_bytes(part), device, name, "Allocate what Experts.workspace_shapes says.")
                self._cut(part, one)
            return
        need = layout_bytes(layout)
        if buffer is None:
            buffer = torch.empty(need, dtype=torch.uint8, device=device)
        else:
            do = "Allocate torch.empty(fusedmoe.workspace_bytes(...), dtype=torch.uint8, device=...)."
            _check(buffer, need, device, "workspace", do)
        self.buffers = (buffer,)
        self._cut(layout, buffer)

    def _cut(self, layout: Layout, buffer: torch.Tensor) -> None:
        start = 0
        for name, (shape, dtype) in layout.items():
            length = math.prod(shape) * dtype.itemsize
            self._tensors[name] = buffer[start : start + length].view(dtype).view(shape)
            start += _padded_bytes(shape, dtype)

    def update(self, **tensors: torch.Tensor) -> None:
        """Tensors that lie elsewhere, by name."""
        self._tensors.update(tensors)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _check(buffer: torch.Tensor, need: int, device: torch.device, name: str, do: str) -> None:
    wanted = f"a contiguous uint8 tensor of at least {need} bytes on {device}, aligned to {BASE_ALIGNMENT} bytes"
    dense = isinstance(buffer, torch.Tensor) and buffer.layout == torch.strided
    if not dense or buffer.dtype != torch.uint8:
        kind = f"{buffer.dtype} {buffer.layout}" if isinstance(buffer, torch.Tensor) else type(buffer).__name__
        raise DTypeError(explain(name, got=kind, wanted=wanted, do=do))
    if buffer.device != device:
        raise DeviceError(explain(name, got=f"a tensor on {buffer.device}", wanted=wanted, do=do))
    if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.data_ptr() % BASE_ALIGNMENT and need:
        offset = buffer.data_ptr() % BASE_ALIGNMENT
        got = f"shape {tuple(buffer.shape)}, strides {buffer.stride()}, address % {BASE_ALIGNMENT} = {offset}"
        raise WorkspaceError(explain(name, got=got, wanted=wanted, do=do))
    if buffer.numel() < need:
        raise WorkspaceError(explain(name, got=f"{buffer.numel()} bytes", wanted=wanted, do=do))
