"""Measure which tiles are fastest for a layer on this device: ``fusedmoe tune``; see docs/tuning.md."""

from __future__ import annotations

from fusedmoe.tune.search import KEEP
from fusedmoe.tune.session import SECONDS, TOKENS, Progress, export, take_over, tune

__all__ = ["KEEP", "SECONDS", "TOKENS", "Progress", "export", "take_over", "tune"]
