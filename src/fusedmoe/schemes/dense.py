"""Scheme ``dense``: weights and activations in one floating-point type, no scales.

acc = sum_k x[., k] w[., k]         float32 accumulation; float32 operands multiply in float32
"""

from __future__ import annotations

from fusedmoe._compat import jit, tl

NAME = "dense"

#: Types of hidden states and weights, as torch names them.
DTYPES = ("float32", "float16", "bfloat16")

#: Relative error of a layer, ||out - ref|| / ||ref|| against float64 on the same inputs: a few roundings of
#: independent sign to the type (intermediate, rows, output), so about 2 units of 2^-(mantissa bits + 1).
#: float32 has no such roundings beyond its accumulation.
TOLERANCE = {"float32": 1e-6, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@jit
def step(acc, a, b, x, w, PRECISION: tl.constexpr):
    """Add one K step: a [BLOCK_M, BLOCK_K], b [BLOCK_K, BLOCK_N]."""
    if a.dtype == tl.float32:
        # A sum of step sums errs by far less than one running sum over K. Any max_num_imprecise_acc but 0 (of no
        # other effect on float32) keeps the compiler from folding the addition into the dot again.
        return acc + tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=1)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def finish(acc, x, w):
    """Nothing is left for the accumulator: there are no scales."""
    return acc
