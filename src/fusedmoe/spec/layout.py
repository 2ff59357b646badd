"""How expert matrices lie in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

#: Order of the 2I rows of a gated w13: all gate rows then all up rows, or gate, up, gate, up ...
GateUpLayout = Literal["concatenated", "interleaved"]
#: Storage of an expert matrix: [E, out, in] (NK), or [E, in, out] (KN, what Transformers calls is_transposed).
WeightLayout = Literal["NK", "KN"]
#: Arithmetic of float32 operands.
Fp32Precision = Literal["ieee", "tf32"]

GATE_UP_LAYOUTS: tuple[str, ...] = get_args(GateUpLayout)
WEIGHT_LAYOUTS: tuple[str, ...] = get_args(WeightLayout)
FP32_PRECISIONS: tuple[str, ...] = get_args(Fp32Precision)


@dataclass(frozen=True)
class Matrix:
    """What a kernel choice needs to know of an expert matrix [E, N, K], seen as NK whatever its storage.

    ``contiguous`` names the dimension with stride 1 ("K", "N" or "none"); ``tma`` is true when base
    address and strides are multiples of 16 bytes, so that a tensor-map can describe it; ``words`` when rows
    along K are whole words of 32 bits.
    """

    contiguous: Literal["K", "N", "none"]
    tma: bool
    words: bool = True
