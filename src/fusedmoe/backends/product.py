"""One of the two GEMMs of a call, as a launch of either kind of kernel takes it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.kernels import arrange, store
from fusedmoe.kernels.operands import Epilogue, Output, Parameters, Rows, Steps
from fusedmoe.plan.config import KernelConfig
from fusedmoe.spec.layout import GateUpLayout
from fusedmoe.spec.problem import Gemm

#: Policies of a result that is stored as it is.
PLAIN: dict[str, Any] = {
    "STORE": store.numbers,
    "ARRANGE": arrange.as_they_are,
    "ENCODE": None,
    "LARGEST": 0.0,
    "OUT_GROUP": 0,
}


class Product(NamedTuple):
    """What is multiplied, what follows the sum, and where it is stored."""

    gemm: Gemm
    config: KernelConfig
    x: Rows
    w: torch.Tensor | ExpertMatrix
    multiply: str  #               type of the operands, by the plan's name for it
    out: Output
    e: Epilogue
    epilogue: Any
    stored: dict[str, Any]  #      policies of the store
    up: int = 0  #                 row of the first up row of a concatenated w13
    p: Parameters = Parameters(None, None, None, None)
    activation: Any = None
    gate_up: GateUpLayout | None = None
    steps: Steps | None = None  # of adapters, where the kernel adds them so

    def programs(self, tiles: int, n_sm: int) -> int:
        """Size of the grid: one program per tile, or as many as a persistent kernel has."""
        count = tiles * math.ceil(self.gemm.columns / self.config.block_n)
        return min(count, n_sm * self.config.programs_per_sm) if self.config.programs_per_sm else count
