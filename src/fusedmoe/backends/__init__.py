"""Backends: each does the four steps of the layer its own way. Imported only when chosen."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from fusedmoe.backends.base import Backend, Transit

#: backend name -> module of this package, which satisfies :class:`fusedmoe.backends.base.Backend`.
BACKENDS: dict[str, str] = {
    "gluon_sm90": ".triton",  # the same pipeline; its plan names other kernels for the GEMMs
    "triton": ".triton",
    "torch": ".torch",
}


def load(name: str) -> Backend:
    """Import a backend's module."""
    return cast("Backend", importlib.import_module(BACKENDS[name], __name__))


def load_transit(name: str) -> Transit:
    """Import what a backend does to rows that come from elsewhere or go there."""
    module = ".transit" if name == "torch" else ".transit_triton"
    return cast("Transit", importlib.import_module(module, __name__))
