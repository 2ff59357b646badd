"""Write safetensors shards in a stream: no tensor is kept, whatever the size of the checkpoint."""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
#: Bytes kept free for the header, which is known last; blanks fill it up. A shard ends when it is full.
_ROOM = 2**20


class Region:
    """Room of one tensor, to be filled from its start."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path, self._offset = path, offset

    def write(self, pieces: Iterable[bytes | ctypes.Array[ctypes.c_char]]) -> None:
        """Append."""
        with self._path.open("r+b") as file:
            file.seek(self._offset)
            for piece in pieces:
                file.write(piece)
            self._offset = file.tell()

    def fill(self, tensor: Tensor) -> None:
        """Append the elements of a tensor."""
        tensor = tensor.cpu().contiguous()
        if tensor.numel():
            self.write([(ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())])


class Writer:
    """Shards of at most ``limit`` bytes (one tensor may be larger), and their index."""

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory, self._limit = directory, limit
        self._shards: list[dict[str, dict[str, object]]] = []
        self._end = self._header = self.total = 0

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard}.part"

    def reserve(self, name: str, kind: str, shape: Iterable[int], size: int) -> Region:
        """Room for ``size`` bytes of a tensor of this safetensors type."""
        entry: dict[str, object] = {"dtype": kind, "shape": list(shape), "data_offsets": [self._end, self._end + size]}
        text = len(json.dumps({name: entry})) + 64
        if not self._shards or self._end and self._end + size > self._limit or self._header + text > _ROOM - 64:
            self._shards.append({})
            self._path(len(self._shards) - 1).write_bytes(b" " * _ROOM)
            self._end = self._header = 0
            entry["data_offsets"] = [0, size]
        region = Region(self._path(len(self._shards) - 1), _ROOM + self._end)
        self._shards[-1][name] = entry
        self._end += size
        self._header += text
        self.total += size
        return region

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor."""
        self.room(name, tensor.dtype, tensor.shape).fill(tensor)

    def room(self, name: str, dtype: torch.dtype, shape: Iterable[int]) -> Region:
        """Room for a tensor."""
        shape = tuple(shape)
        return self.reserve(name, TYPES[dtype], shape, math.prod(shape) * dtype.itemsize)

    def close(self) -> list[str]:
        """Write the headers and the index; returns the names of the files."""
        count = len(self._shards)
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        names = ["model.safetensors"] if count == 1 else names
        for i, (shard, name) in enumerate(zip(self._shards, names, strict=True)):
            header = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
            with self._path(i).open("r+b") as file:
                _start(file, header)
            self._path(i).rename(self._directory / name)
        if count > 1:
            where = {tensor: name for shard, name in zip(self._shards, names, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(where.items()))}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        return names


def _start(file: BinaryIO, header: bytes) -> None:
    assert len(header) <= _ROOM - 8
    file.write(struct.pack("<Q", _ROOM - 8) + header.ljust(_ROOM - 8))
