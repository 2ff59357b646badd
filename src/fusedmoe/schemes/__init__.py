"""Quantisation schemes: one file each. This table is the only other place that knows their names."""

from __future__ import annotations

import importlib
from types import ModuleType

#: scheme name -> module. A module has NAME, DTYPES, TOLERANCE and the device functions ``step`` and ``finish``.
SCHEMES: dict[str, str] = {"dense": "fusedmoe.schemes.dense"}


def load(name: str) -> ModuleType:
    """Import the module of a scheme; it can be imported without Triton, only its device functions need it."""
    return importlib.import_module(SCHEMES[name])
