"""Activations as device functions: ``f(gate, up, p)`` or ``f(x, p)``, float32 in, float32 out.

Equations: :class:`fusedmoe.spec.activation.Activation`; the oracle is ``fusedmoe.reference``.
Parameters stand on the right of an operator: Triton's interpreter lets a constexpr on the left swallow a tensor.
They create no tensor, so that a warp-specialised kernel can call them too, and they keep NaN:
minimum and maximum propagate it (the hardware's default would drop it).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _at_most(x, limit):
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within(x, limit):
    return tl.maximum(_at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) cancels near 0, where its odd Taylor polynomial is exact to float32.
    z = tl.minimum(tl.abs(x), 20.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp(-2.0 * z)
    large = (1.0 - e) / (1.0 + e)
    q = x * x
    small = 1.0 + q * (-1.0 / 3.0 + q * (2.0 / 15.0 + q * (-17.0 / 315.0 + q * (62.0 / 2835.0))))
    return tl.where(z < 0.25, x * small, tl.where(x < 0, -large, large))


@triton.jit
def silu_no_mul(x, p):
    return x * _sigmoid(x)


@triton.jit
def gelu_no_mul(x, p):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh_no_mul(x, p):
    return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def relu2_no_mul(x, p):
    r = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return r * r


@triton.jit
def identity_no_mul(x, p):
    return x


@triton.jit
def silu(gate, up, p):
    if p.limit is not None:
        gate = _at_most(gate, p.limit)
        up = _within(up, p.limit)
    return gate * _sigmoid(gate) * up


@triton.jit
def gelu(gate, up, p):
    return gelu_no_mul(gate, p) * up


@triton.jit
def gelu_tanh(gate, up, p):
    return gelu_tanh_no_mul(gate, p) * up


@triton.jit
def relu2(gate, up, p):
    return relu2_no_mul(gate, p) * up


@triton.jit
def swigluoai(gate, up, p):
    gate = _at_most(gate, p.limit)
    up = _within(up, p.limit)
    return gate * _sigmoid(gate * p.alpha) * (up + p.beta)


@triton.jit
def swiglustep(gate, up, p):
    return _at_most(gate * _sigmoid(gate), p.limit) * _within(up, p.limit)


@triton.jit
def situ(gate, up, p):
    if p.linear_beta is not None:
        up = _tanh(up / p.linear_beta) * p.linear_beta
    return _tanh(gate / p.beta) * p.beta * _sigmoid(gate) * up
