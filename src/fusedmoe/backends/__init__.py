"""Backends: each does the four steps of the layer its own way. Imported only when chosen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from fusedmoe.backends.base import Backend, Transit

#: backend name -> module, which satisfies :class:`fusedmoe.backends.base.Backend`.
BACKENDS: dict[str, str] = {
    "gluon_sm90": "fusedmoe.backends.triton",  # the same pipeline; its plan names other kernels for the GEMMs
    "triton": "fusedmoe.backends.triton",
    "torch": "fusedmoe.backends.torch",
}


def load(name: str) -> Backend:
    """Import a backend's module."""
    return cast("Backend", importlib.import_module(BACKENDS[name]))


def load_transit(name: str) -> Transit:
    """Import what a backend does to rows that come from elsewhere or go there."""
    module = "fusedmoe.backends.transit" if name == "torch" else "fusedmoe.backends.transit_triton"
    return cast("Transit", importlib.import_module(module))
