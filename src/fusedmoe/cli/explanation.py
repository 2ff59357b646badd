"""How a call would be run, on this device or on one of a table, without running it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import torch

from fusedmoe import backends
from fusedmoe.backends.workspace import layout_bytes
from fusedmoe.bench import Shape, default_device, format_for, measure_ceilings, problem_of
from fusedmoe.errors import OptionError, explain
from fusedmoe.plan.config import KernelConfig, Plan
from fusedmoe.plan.floor import H200, Floor, floor_of, types_of
from fusedmoe.plan.planner import choose, support
from fusedmoe.spec.layout import GateUpLayout, WeightLayout
from fusedmoe.spec.problem import Problem
from fusedmoe.target import KNOWN, Target, target_of

#: Targets that can be asked about without having one: what such a device is called, and its facts.
ARCHS = {
    arch: (name, Target("cpu") if arch == "cpu" else KNOWN[arch])
    for arch, name in {
        "sm_75": "T4",
        "sm_80": "A100",
        "sm_86": "RTX A6000",
        "sm_89": "L40S",
        "sm_90": "H200",
        "sm_100": "B200",
        "gfx942": "MI300X",
        "cpu": "a CPU",
    }.items()
}


def explain_call(
    shape: Shape,
    tokens: int,
    *,
    dtype: torch.dtype,
    activation: str = "silu",
    gate_up_layout: GateUpLayout = "concatenated",
    weight_layout: str = "NK",
    scheme: str = "none",
    arch: str | None = None,
    backend: str | None = None,
    batch_invariant: bool = False,
) -> dict[str, Any]:
    """Everything that ``fusedmoe explain`` prints.

    Raises:
        OptionError: unknown arch, activation, layout, scheme or backend, or a scheme that does not fit the sizes.
        UnsupportedError: the backend that was asked for does not take the call.
    """
    device = default_device()
    here = target_of(device)
    target, kind = here, f"this machine's {device.type}"
    if arch is not None and arch != (here.arch or here.vendor):
        if arch not in ARCHS:
            raise OptionError(
                explain("--arch", got=repr(arch), wanted=", ".join(ARCHS), do="Leave it out for this device.")
            )
        kind, target = ARCHS[arch]
    problem = problem_of(
        shape,
        tokens,
        dtype,
        activation=activation,
        gate_up_layout=gate_up_layout,
        weight_layout=cast("WeightLayout", weight_layout),
        form=format_for(scheme, shape),
        batch_invariant=batch_invariant,
    )
    plan = choose(problem, target, backend)
    floor, source = _floor(problem, target, device if target == here else None)
    return {
        "target": {"like": kind, **asdict(target)},
        "problem": asdict(problem),
        "weights": _weights(problem, target),
        "backend": plan.backend,
        "why": plan.why,
        "others": _others(problem, target, plan),
        "launches": _launches(problem, plan),
        "workspace_bytes": _workspace_bytes(problem, plan),
        "floor": None if floor is None else {**asdict(floor), "us": floor.us, "bound": floor.bound},
        "floor_source": source,
    }


def _weights(problem: Problem, target: Target) -> dict[str, dict[str, Any]]:
    """Format of each matrix, bytes of a weight with its share of scales, and the type that it is multiplied in."""
    types = types_of(problem, target)
    found = {}
    for name, gemm, kind in zip(("w13", "w2"), (problem.gate_up_gemm, problem.down_gemm), types, strict=True):
        found[name] = {
            "format": problem.dtype if gemm.format is None else str(gemm.format),
            "bytes_per_weight": problem.itemsize if gemm.format is None else gemm.format.bits_per_weight() / 8,
            "multiplied_as": kind,
        }
    return found


def _floor(problem: Problem, target: Target, device: torch.device | None) -> tuple[Floor | None, str]:
    uniform = "expected distinct experts under uniform routing"
    if device is not None:
        ceilings = measure_ceilings(device, types_of(problem, target))
        return floor_of(problem, target, ceilings), f"ceilings measured here, now; {uniform}"
    if target == ARCHS["sm_90"][1]:
        return floor_of(problem, target, H200), f"nominal ceilings of an H200, not measured here; {uniform}"
    return None, "unknown: the ceilings of this device have to be measured on one"


def _others(problem: Problem, target: Target, plan: Plan) -> dict[str, list[str]]:
    """Every other backend with the reasons against it."""
    refused = dict(plan.refused)
    return {
        name: list(reasons or refused.get(name, ())) or ["takes it too, but was not chosen"]
        for name, reasons in support(problem, target).items()
        if name != plan.backend
    }


def _layout(problem: Problem, plan: Plan) -> dict[str, Any] | None:
    """Scratch tensors of the plan; None where the backend's package is missing."""
    try:
        return backends.load(plan.backend).workspace_layout(problem, plan)
    except ImportError:
        return None


def _workspace_bytes(problem: Problem, plan: Plan) -> int | None:
    layout = _layout(problem, plan)
    return None if layout is None else layout_bytes(layout)


def _launches(problem: Problem, plan: Plan) -> list[dict[str, Any]]:
    """Kernels in the order of their launches, the grouped GEMMs with their configuration."""
    if plan.triton is None:
        return [{"kernel": "PyTorch's own, one matrix product per expert that has rows"}]
    how = plan.triton
    several = "base" in (_layout(problem, plan) or {})  # the table of a sort in chunks
    sort = [] if how.few else ["count", "offsets", "scatter"] if several else ["route"]
    tokens, hidden = problem.gate_up_gemm.inputs, problem.down_gemm.inputs
    rows = []
    if tokens:
        rows = ["zero", "amax", "quantise_rows"] if tokens.mode == "tensor" else [_quantise(tokens.mode)]
    elif how.gate_up.words:
        rows = ["arrange"]
    # The maximum over all rows of the intermediate is taken by gate-up's epilogue.
    start = ["zero"] if hidden and hidden.mode == "tensor" else []
    return [
        *({"kernel": name} for name in sort),
        *({"kernel": f"{name}, hidden states"} for name in rows),
        *([{"kernel": "gather"}] if how.gather else []),
        *({"kernel": f"{name}, intermediate"} for name in start),
        {"kernel": f"{_gemm(how.gate_up)}, gate-up and activation", "config": asdict(how.gate_up)},
        *([{"kernel": f"{_quantise(hidden.mode)}, intermediate"}] if hidden and how.requantise == "kernel" else []),
        {"kernel": f"{_gemm(how.down)}, down and router weight", "config": asdict(how.down)},
        *([] if how.single else [{"kernel": "combine", "config": {"block_h": how.combine_block}}]),
    ]


def _gemm(config: KernelConfig) -> str:
    if config.block_m == 1:
        return "grouped_gemv"
    return "grouped_stream_sm90" if config.streams else "grouped_gemm_sm90" if config.specialised else "grouped_gemm"


def _quantise(mode: str) -> str:
    """The kernel that makes codes of rows."""
    return "quantise_groups" if mode == "group" else "quantise_rows"
