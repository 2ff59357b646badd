"""A checked call: tensors that fit each other, expert matrices seen as [E, N, K]."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.spec.problem import Problem


class Call(NamedTuple):
    """The tensors of one call after :func:`fusedmoe.checks.check`, and the problem they pose.

    Shapes: see the glossary in :mod:`fusedmoe.spec`. ``w13`` and ``w2`` are views with K last,
    whatever their storage; nothing was copied.
    """

    problem: Problem
    hidden_states: torch.Tensor  #        [T, H]
    w13: torch.Tensor | ExpertMatrix  #   [E, 2I or I, H]
    w2: torch.Tensor | ExpertMatrix | None  # [E, H, I]; None where the first GEMM is the whole call
    topk_weights: torch.Tensor | None  #  [T, top_k]; None with w2
    topk_ids: torch.Tensor  #             [T, top_k] int32 or int64
    w13_bias: torch.Tensor | None  #      [E, 2I or I]
    w2_bias: torch.Tensor | None  #       [E, H]
    expert_map: torch.Tensor | None  #    [E_global] local id or negative
    hidden_states_scale: torch.Tensor | None  # [T or 1, groups] float32, when hidden states are codes
    out: torch.Tensor | None  #           [T, H]; [S, I] of the first GEMM alone
    workspace: torch.Tensor | None  #     [bytes] uint8

    @property
    def n_global(self) -> int:
        """Ids at or above this are absent: the length of the map, else E."""
        return self.problem.experts if self.expert_map is None else self.expert_map.shape[0]
