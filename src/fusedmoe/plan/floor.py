"""The physical floor of a call: the time below which no kernel on that device can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fusedmoe.plan.arithmetic import multiply_in
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device was measured to reach on the simplest work.

    Attributes:
        bandwidth_gbps: a large copy, bytes read plus bytes written, in 1e9 bytes a second.
        tflops: the vendor's library on one large dense matrix product, by type of the operands (a type of the layer or
            of codes); 1e12 operations a second. A type that the library does not multiply is missing.
        launch_us: one launch that does next to nothing, the way that calls are timed.
    """

    bandwidth_gbps: float
    tflops: Mapping[str, float]
    launch_us: float


#: An H200 (sm_90). Bandwidth, launch and the rates of bfloat16 and e4m3 were measured on one: a copy of 2 GiB, an empty
#: kernel in a CUDA graph, cuBLAS 8192^3. float16 is taken to be as fast as bfloat16, int8 as e4m3, as the data sheet
#: has it; float32 is its rate without tensor cores.
H200 = Ceilings(
    bandwidth_gbps=4235.0,
    tflops={"bfloat16": 808.0, "float16": 808.0, "float32": 67.0, "e4m3": 1443.0, "int8": 1443.0},
    launch_us=3.9,
)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A floor in microseconds, and what it is made of.

    Attributes:
        weights_us: reading the weights of the distinct experts once, with their scales, at the measured bandwidth.
        math_us: the two matrix products at the measured rates; None where one was not measured.
        launch_us: one empty launch.
    """

    weights_us: float
    math_us: float | None
    launch_us: float

    @property
    def us(self) -> float:
        """max(weights, math) + launch."""
        return max(self.weights_us, self.math_us or 0.0) + self.launch_us

    @property
    def bound(self) -> str:
        """What the call is bound by at best: "weights" or "math"."""
        if self.math_us is None:
            return "weights (the rate of its products was not measured)"
        return "weights" if self.weights_us >= self.math_us else "math"


def types_of(problem: Problem, target: Target) -> tuple[str, str]:
    """In which types a device multiplies for the two GEMMs of a call."""
    return multiply_in(problem.gate_up_gemm, target), multiply_in(problem.down_gemm, target)


def floor_of(problem: Problem, target: Target, ceilings: Ceilings, *, distinct: float | None = None) -> Floor:
    """The floor of a call.

        us = max(bytes of the distinct experts' weights / bandwidth, sum over GEMMs of flops / rate) + launch

    Args:
        problem: the call.
        target: the device; it decides in which type codes are multiplied.
        ceilings: of the device.
        distinct: distinct experts among the ids; expected number under uniform routing when None.

    >>> from fusedmoe.spec.activation import Activation
    >>> from fusedmoe.target import KNOWN
    >>> silu = Activation("silu")
    >>> sizes = {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336, "dtype": "bfloat16"}
    >>> one = floor_of(Problem(tokens=1, activation=silu, **sizes), KNOWN["sm_90"], H200)
    >>> round(one.us, 1), one.bound
    (170.3, 'weights')
    """
    weight_bytes = problem.weight_bytes
    if distinct is not None:
        weight_bytes = distinct * problem.expert_bytes
    math_us: float | None = 0.0
    for kind, rows in zip(types_of(problem, target), (problem.w13_rows, problem.intermediate), strict=True):
        rate = ceilings.tflops.get(kind)
        flops = 2 * problem.slots * problem.hidden * rows
        math_us = None if rate is None or math_us is None else math_us + flops / rate / 1e6
    return Floor(weights_us=weight_bytes / ceilings.bandwidth_gbps / 1e3, math_us=math_us, launch_us=ceilings.launch_us)
