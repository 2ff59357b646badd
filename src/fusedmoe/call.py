"""A checked call: tensors that fit each other, expert matrices seen as [E, N, K]."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.lora import LoRA
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
    workspace: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None  # [bytes] uint8, in one piece or in two
    lora: LoRA | None = None  #           only with adapter_ids
    adapter_ids: torch.Tensor | None = None  # [T] int32 or int64

    def inputs(self) -> Iterator[torch.Tensor]:
        """Every tensor that the layer reads."""
        for value in self._replace(out=None, workspace=None):
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, ExpertMatrix):
                yield from value.tensors().values()
            elif isinstance(value, LoRA):
                yield from value.tensors()

    def workspaces(self) -> tuple[torch.Tensor, ...]:
        """The caller's scratch memory, if any."""
        if self.workspace is None:
            return ()
        return self.workspace if isinstance(self.workspace, tuple) else (self.workspace,)

    @property
    def n_global(self) -> int:
        """Ids at or above this are absent: the length of the map, else E."""
        return self.problem.experts if self.expert_map is None else self.expert_map.shape[0]

    def tokens(self, start: int, stop: int, out: torch.Tensor) -> Call:
        """The call of the tokens ``start .. stop`` alone, with their rows of ``out``."""
        rows, scale, weights = slice(start, stop), self.hidden_states_scale, self.topk_weights
        return self._replace(
            problem=replace(self.problem, tokens=stop - start),
            hidden_states=self.hidden_states[rows],
            topk_weights=None if weights is None else weights[rows],
            topk_ids=self.topk_ids[rows],
            # One scale may serve all tokens.
            hidden_states_scale=scale if scale is None or scale.shape[0] != self.problem.tokens else scale[rows],
            out=out[rows],
            adapter_ids=None if self.adapter_ids is None else self.adapter_ids[rows],
        )
