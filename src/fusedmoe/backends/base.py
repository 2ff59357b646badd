"""What a backend is: a module with these functions, called in this order by ``fusedmoe.experts.run``.

The types of ``schedule``, ``hidden`` and ``rows`` are the backend's own business; nobody else looks inside.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from fusedmoe.backends.workspace import Workspace
from fusedmoe.call import Call
from fusedmoe.plan.config import Plan
from fusedmoe.spec.problem import Problem


class Backend(Protocol):
    """The four steps of the layer, and the scratch memory they need."""

    def workspace_layout(self, problem: Problem, plan: Plan) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Named scratch tensors: name -> (shape, dtype). They arrive uninitialised in every step."""

    def route(self, call: Call, plan: Plan, work: Workspace) -> Any:
        """Sort the live slots by expert; ids outside [0, n_global), or unmapped, get no row."""

    def gate_up(self, call: Call, plan: Plan, schedule: Any, work: Workspace) -> Any:
        """First GEMM with bias and activation: hidden rows of width I; alone, into ``call.out`` by slot."""

    def down(self, call: Call, plan: Plan, schedule: Any, hidden: Any, work: Workspace) -> Any:
        """Second GEMM with bias and router weight: rows of width H."""

    def combine(self, call: Call, plan: Plan, schedule: Any, rows: Any, work: Workspace, out: torch.Tensor) -> None:
        """Sum the rows of a token in slot order, in float32, into ``out`` [T, H]; absent experts add +0."""
