"""What a backend is: a module with these functions, called in this order by ``fusedmoe.experts.run``.

The types of ``schedule``, ``hidden`` and ``rows`` are the backend's own business; nobody else looks inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

from fusedmoe.backends.workspace import Workspace
from fusedmoe.call import Call
from fusedmoe.plan.config import Plan
from fusedmoe.spec.format import Inputs
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
        """Second GEMM with bias and router weight: rows of width H, or the sums of ``combine``, in ``call.out``."""

    def combine(self, call: Call, plan: Plan, schedule: Any, rows: Any, work: Workspace, out: torch.Tensor) -> None:
        """Sum the rows of a token in slot order, in float32, into ``out`` [T, H]; absent experts add +0."""


class Places(NamedTuple):
    """Where experts are: place p of rank r is number r * each + p. The last row is that of an absent expert."""

    of: torch.Tensor  #      [E + 1, copies] int32, -1 where there is none
    copies: torch.Tensor  #  [E + 1] int32: how many of them are true
    ranks: int
    each: int


class Sends(NamedTuple):
    """Tokens on their way to ranks. Rows are in the order of ranks, then of tokens; a token goes to a rank once."""

    places: torch.Tensor  #  [T, top_k] int32: of each slot; -1 where the expert is absent
    counts: torch.Tensor  #  [ranks] int64: rows for each rank
    token: torch.Tensor  #   [rows] int64: token of a row; something in range where there is no row
    answer: torch.Tensor  #  [T, top_k]: row with the answer of a rank, at the first slot for that rank; else -1


class Rows(NamedTuple):
    """Parts of messages."""

    hidden_states: torch.Tensor  #   [R, H], of the type that travels
    scale: torch.Tensor | None  #    [R, groups] float32
    places: torch.Tensor  #          [R, top_k] int32
    weights: torch.Tensor  #         [R, top_k] float32
    adapters: torch.Tensor | None  # [R] int32, slots of adapters, where they travel


class Transit(Protocol):
    """Rows before they travel, and after."""

    def encode(self, x: torch.Tensor, inputs: Inputs, static: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [T, H] and float32 scales [T, groups] of rows, as the layer itself would make them.

        Modes "token", "group" and "static".
        """

    def reduce(
        self, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        """``out[t] = sum_j weights[t, j] * rows[index[t, j]]``, in the order of j, in float32, rounded once.

        rows [R, H], index [T, n] integers, out [T, H]. Where an index is outside [0, R) nothing is added or read.
        Weights None are 1.
        """

    def sends(self, topk_ids: torch.Tensor, places: Places, rank: int, capacity: int | None) -> Sends:
        """Which tokens [T, top_k] of this rank go to which rank.

        Of several copies of an expert a slot takes the one that a hash of its token's number says: the same in every
        run, and as many slots for each copy as chance would give, whatever tokens an expert gets. Rows for a rank
        follow those for the one before; with a capacity they start at rank * capacity.
        """

    def pack(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        weights: torch.Tensor,
        adapter_ids: torch.Tensor | None,
        sends: Sends,
        capacity: int | None,
        out: Rows,
    ) -> None:
        """Write messages: the rows of ``sends``; with a capacity, those that nobody fills have absent places."""
