"""How a call is run: frozen values that print well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: Most slots that the path without a schedule takes; also the width of its id vectors.
FEW = 64
#: Operands that are loaded by tensor map.
Maps = Literal["none", "w", "xw"]
#: Where the intermediate becomes codes.
Requantise = Literal["none", "epilogue", "kernel"]


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """One launch of the grouped GEMM. ``block_n`` counts output columns: a gated tile multiplies 2 block_n rows.

    Attributes:
        block_m: rows of a tile; 1: a row alone, which the kernel of single rows multiplies without tensor cores.
        group_m: tiles that share a block of weights before the next block.
        maps: the left / the right operand is loaded by tensor map ("none", "w", "xw").
        programs_per_sm: 0 for one program per tile, else a persistent grid of n_sm times this many.
        flatten: one software pipeline over the tiles of a persistent program.
        swap: weights are the left operand of a product, rows the right one.
        pairs: gate and up rows alternate in a tile wherever they lie, so that it multiplies them as one operand.
        words: weights are decoded by the word of 32 bits (NVIDIA, 4-bit codes and integers).
        scale_weights: scales of groups of K are applied to words as they are decoded even where a step lies in one
            group, and its product could be scaled instead. So the products add up in one sum.
        specialised: a warp-specialised kernel of Hopper. Tiles of 128 rows: ``warps`` are those of one group of
            consumers, of which there are 8 in all. Lower ones, of the kernel that streams weights: 4.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group_m: int = 1
    maps: Maps = "none"
    programs_per_sm: int = 0
    flatten: bool = False
    swap: bool = False
    pairs: bool = False
    words: bool = False
    scale_weights: bool = False
    specialised: bool = False

    @property
    def streams(self) -> bool:
        """The kernel of Hopper for few rows an expert, which streams weights."""
        return self.specialised and self.block_m < 128


@dataclass(frozen=True, kw_only=True)
class ShrinkPlan:
    """The launches that compute A x for adapters.

    Attributes:
        by_adapter: tokens are sorted by adapter first, so that a tile of an expert that has several has few adapters.
        turns: programs that share the columns of all adapters in a tile of rows, at most.
        gate_up: of hidden states.
        down: of the intermediate.
    """

    by_adapter: bool
    turns: int
    gate_up: KernelConfig
    down: KernelConfig


@dataclass(frozen=True, kw_only=True)
class TritonPlan:
    """The portable pipeline; both GEMMs share block_m.

    Attributes:
        few: no schedule: every program reads all ids and finds its own rows, or those of one slot.
        gather: copy the tokens into sorted rows first, so that gate-up loads them by tensor map.
        overlap: a launch starts while the one before it ends, and waits on the device (programmatic dependent launch).
        combine_block: output columns of a program of the last step.
        multiply: types in which the two GEMMs multiply.
        requantise: where the intermediate becomes codes: in gate-up's epilogue, in a kernel of its own, or nowhere.
        unrounded: the intermediate is float32 before a kernel of its own makes codes of it, as it is in an epilogue.
        shrink: where there are adapters.
    """

    few: bool
    gather: bool
    overlap: bool
    gate_up: KernelConfig
    down: KernelConfig
    combine_block: int
    multiply: tuple[str, str]
    requantise: Requantise = "none"
    unrounded: bool = False
    shrink: ShrinkPlan | None = None

    @property
    def single(self) -> bool:
        """Every row is multiplied alone, and the second GEMM adds up the rows of a token."""
        return self.gate_up.block_m == 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The backend that takes a problem, how, and what the others said.

    Attributes:
        backend: its name.
        triton: its kernels, when it is a Triton backend.
        why: reason of the choice, one line.
        refused: backend -> every reason why it does not take this problem.
    """

    backend: str
    triton: TritonPlan | None = None
    why: str = ""
    refused: tuple[tuple[str, tuple[str, ...]], ...] = ()
