"""The layer on many devices, by torch.distributed: experts apart, or slices of every expert. See docs/parallel.md.

>>> from fusedmoe.parallel import Placement
>>> Placement.contiguous(5, 3).experts
((0, 1), (2, 3), (4,))
"""

from __future__ import annotations

from fusedmoe.parallel.all_to_all import AllToAll
from fusedmoe.parallel.deepep import DeepEP, DeepEPLowLatency
from fusedmoe.parallel.experts import ExpertParallel
from fusedmoe.parallel.placement import Placement
from fusedmoe.parallel.tensor import TensorParallel, intermediate_slice

__all__ = [
    "AllToAll",
    "DeepEP",
    "DeepEPLowLatency",
    "ExpertParallel",
    "Placement",
    "TensorParallel",
    "intermediate_slice",
]
