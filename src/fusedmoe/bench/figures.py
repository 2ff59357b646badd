"""Figures of other libraries from files, to be printed beside ours."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedmoe.checkpoint.files import json_object
from fusedmoe.errors import CheckpointError, OptionError, explain
from fusedmoe.schemes import format_of


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Figures of another library, to be printed beside ours: (shape, tokens) -> microseconds; scheme as in Row."""

    name: str
    device: str
    dtype: str
    scheme: str | None
    source: str
    us: dict[tuple[str, int], float]


def read_peer(path: str | os.PathLike[str]) -> Peer:
    """Read a file as in ``benchmarks/peers``.

    Raises:
        OptionError: it cannot be read, or has another form.
    """
    try:
        data: Any = json_object(Path(path))
        us = {(str(s), int(t)): float(v) for s, row in data["us"].items() for t, v in row.items()}
        scheme = None if data["scheme"] is None else format_of(str(data["scheme"])).scheme
        return Peer(**{key: str(data[key]) for key in ("name", "device", "dtype", "source")}, scheme=scheme, us=us)
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise OptionError(
            explain(
                f"figures of a peer in {os.fspath(path)}",
                got=f"{type(cause).__name__}: {cause}",
                wanted='JSON with "name", "device", "dtype", "scheme" (or null), "source" and '
                '"us": {shape: {tokens: microseconds}}',
                do="See the files in benchmarks/peers.",
            )
        ) from cause
