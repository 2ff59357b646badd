"""What happens to an accumulator before it is stored: ``f(acc, e, weight, expert, slot, live, col, inside) -> acc``,
where :func:`weight_of` has the router weights of its rows.

All float32; the one cast is the store. Epilogues transform what they are given and create nothing.
Two orders exist, because two orders are asked for:

* ``weigh_then_bias``: ``w (W x) + b``, the gate-up GEMM when the router weight acts on the input
  (``W (w x) = w (W x)``, here without rounding ``w x``);
* ``bias_then_weigh``: ``w (W a + b)``, the down GEMM: the bias is weighted.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_bias(acc, e, expert, col, inside):
    if e.bias is not None:
        address = e.bias + expert.to(tl.int64) * e.bias_stride_e + col.to(tl.int64) * e.bias_stride_n
        acc += tl.load(address, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def weight_of(e, slot, live):
    """Router weights of slots; none where the epilogue has none."""
    if e.weight is not None:
        token = (slot // e.top_k).to(tl.int64)
        address = e.weight + token * e.weight_stride_t + (slot % e.top_k).to(tl.int64) * e.weight_stride_j
        return tl.load(address, mask=live, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def weigh(acc, e, weight):
    if e.weight is not None:
        acc *= weight[:, None]
    return acc


@triton.jit
def weigh_then_bias(acc, e, weight, expert, slot, live, col, inside):
    return add_bias(weigh(acc, e, weight), e, expert, col, inside)


@triton.jit
def bias_then_weigh(acc, e, weight, expert, slot, live, col, inside):
    return weigh(add_bias(acc, e, expert, col, inside), e, weight)
