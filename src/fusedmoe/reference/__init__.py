"""The definition of the layer in plain torch: obvious, exact, slow. What every backend is tested against.

It shares no code with the kernels and no algorithm with the backends.
"""

from __future__ import annotations

from fusedmoe.reference.activations import activate
from fusedmoe.reference.experts import fused_experts
from fusedmoe.reference.routing import sigmoid_topk, softmax_topk, topk_softmax

__all__ = ["activate", "fused_experts", "sigmoid_topk", "softmax_topk", "topk_softmax"]
