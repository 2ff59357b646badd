"""The physical floor of a call: the time below which no kernel on that device can be."""

from __future__ import annotations

from dataclasses import dataclass

from fusedmoe.spec.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device was measured to reach on the simplest work.

    Attributes:
        bandwidth_gbps: a large copy, bytes read plus bytes written, in 1e9 bytes a second.
        tflops: the vendor's library on one large dense matrix product in the type of the layer.
        launch_us: one launch that does next to nothing, the way that calls are timed.
    """

    bandwidth_gbps: float
    tflops: float
    launch_us: float


#: An H200 (sm_90). Bandwidth, launch and the bfloat16 rate were measured on one: a copy of 2 GiB, an empty kernel in
#: a CUDA graph, cuBLAS 8192^3. float16 is taken to be as fast; float32 is the data sheet's rate without tensor cores.
H200: dict[str, Ceilings] = {
    "bfloat16": Ceilings(bandwidth_gbps=4235.0, tflops=808.0, launch_us=3.9),
    "float16": Ceilings(bandwidth_gbps=4235.0, tflops=808.0, launch_us=3.9),
    "float32": Ceilings(bandwidth_gbps=4235.0, tflops=67.0, launch_us=3.9),
}


@dataclass(frozen=True, kw_only=True)
class Floor:
    """A floor in microseconds, and what it is made of.

    Attributes:
        weights_us: reading the weights of the distinct experts once, at the measured bandwidth.
        math_us: the two matrix products at the measured rate.
        launch_us: one empty launch.
    """

    weights_us: float
    math_us: float
    launch_us: float

    @property
    def us(self) -> float:
        """max(weights, math) + launch."""
        return max(self.weights_us, self.math_us) + self.launch_us

    @property
    def bound(self) -> str:
        """What the call is bound by at best: "weights" or "math"."""
        return "weights" if self.weights_us >= self.math_us else "math"


def floor_of(problem: Problem, ceilings: Ceilings, *, distinct: float | None = None) -> Floor:
    """The floor of a call.

        us = max(bytes of the distinct experts' weights / bandwidth, flops / rate) + launch

    Args:
        problem: the call.
        ceilings: of the device, for the type of the problem.
        distinct: distinct experts among the ids; expected number under uniform routing when None.

    >>> from fusedmoe.spec.activation import Activation
    >>> silu = Activation("silu")
    >>> sizes = {"experts": 8, "top_k": 2, "hidden": 4096, "intermediate": 14336, "dtype": "bfloat16"}
    >>> one = Problem(tokens=1, activation=silu, **sizes)
    >>> round(floor_of(one, H200["bfloat16"]).us, 1), floor_of(one, H200["bfloat16"]).bound
    (170.3, 'weights')
    """
    weight_bytes = problem.weight_bytes
    if distinct is not None:
        weight_bytes = distinct * problem.expert_bytes
    return Floor(
        weights_us=weight_bytes / ceilings.bandwidth_gbps / 1e3,
        math_us=problem.flops / ceilings.tflops / 1e6,
        launch_us=ceilings.launch_us,
    )
