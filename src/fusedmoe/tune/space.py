"""Which tiles are worth measuring: neighbours of the planner's that can run, the likeliest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import NamedTuple

from fusedmoe.plan.arithmetic import bytes_of, multiply_in
from fusedmoe.plan.config import FEW, KernelConfig, TritonPlan
from fusedmoe.plan.heuristics import assemble, single_plan, sm90_plan, tiles_of_height
from fusedmoe.plan.invariance import HEIGHTS
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.plan.validity import shared_bytes, step_bytes, why_not, why_not_plan, wide
from fusedmoe.spec.problem import Gemm, Problem
from fusedmoe.target import Target

#: Multiply-adds of 16 bits in the time of a byte from memory, and bytes from L2 in that time, within a factor of two
#: on every GPU that the library knows; bytes that must be on their way to a multiprocessor to keep memory busy, and
#: that a step lasts whatever it loads. They only rank tiles.
FLOPS, CACHE, FLYING, LEAST = 160.0, 2.5, 36864, 4096
#: Rows of an expert from which on the tiles of 128 of the warp-specialised kernel are tried.
SPECIALISED = 8
#: Cost of filling and draining a program's pipeline, in bytes as well.
START = 16384


class Tiles(NamedTuple):
    """Everything that is searched for."""

    few: bool
    gate_up: KernelConfig
    down: KernelConfig

    @classmethod
    def of(cls, plan: TritonPlan) -> Tiles:
        """Those of a plan."""
        return cls(plan.few, plan.gate_up, plan.down)

    @property
    def backend(self) -> str:
        """The one that runs them."""
        return "gluon_sm90" if self.gate_up.specialised or self.down.specialised else "triton"

    def plan(self, problem: Problem, target: Target) -> TritonPlan:
        """The plan that has them."""
        return assemble(problem, target, few=self.few, gate_up=self.gate_up, down=self.down)

    def can_run(self, problem: Problem, target: Target) -> bool:
        """Nothing speaks against them."""
        return not SUPPORTS[self.backend](problem, target) and not why_not_plan(
            self.plan(problem, target), problem, target
        )


def starts(problem: Problem, target: Target) -> list[Tiles]:
    """A point to start from for each kind of tiles: the specialised, single rows, and each height with and without a
    schedule.

    Tiles much higher than an expert's rows, or much lower, are left out.
    """
    found = []
    rows = problem.slots / problem.active_experts
    if not SUPPORTS["gluon_sm90"](problem, target):
        plan = sm90_plan(problem, target)
        if rows >= SPECIALISED or plan.gate_up.streams:
            found.append(Tiles.of(plan))
    if problem.slots <= FEW and rows <= 2:
        found.append(Tiles.of(single_plan(problem, target)))
    for few in (True, False) if problem.slots <= FEW else (False,):
        for block_m in HEIGHTS:
            if not (rows / 8 <= block_m <= max(16, 4 * rows) or block_m == HEIGHTS[-1] < rows):
                continue
            found.append(Tiles(few, *tiles_of_height(problem, target, block_m, few=few)))
    return [tiles for tiles in dict.fromkeys(found) if tiles.can_run(problem, target)]


def neighbours(
    start: Tiles, problem: Problem, target: Target, *, gate_up: bool, keep: int | None = None
) -> list[Tiles]:
    """``start`` with other tiles of one of its GEMMs, no more than ``keep`` (None: all).

    The nearest come first, in how many choices they differ, and of those the cheapest by :func:`cost`.
    """
    name, gemm = ("gate_up", problem.gate_up_gemm) if gate_up else ("down", problem.down_gemm)
    own: KernelConfig = getattr(start, name)
    others = [other for other in dict.fromkeys(_variants(own, gemm, target)) if other != own]
    others.sort(key=lambda other: (_distance(own, other), cost(other, gemm, problem, target)))
    tiles = (start._replace(gate_up=other) if gate_up else start._replace(down=other) for other in others)
    valid = (one for one in tiles if not why_not_plan(one.plan(problem, target), problem, target))
    return list(itertools.islice(valid, keep))


def _distance(one: KernelConfig, other: KernelConfig) -> float:
    """Choices in which two tiles differ; stages, which others leave room for or take it from, are half a one."""
    differ = [field.name for field in fields(one) if getattr(one, field.name) != getattr(other, field.name)]
    return len(differ) - 0.5 * ("stages" in differ)


def _variants(own: KernelConfig, gemm: Gemm, target: Target) -> Iterator[KernelConfig]:
    """Tiles of the same height that can run."""
    choices: dict[str, list[int | str | bool]] = {"stages": [2, 3, 4, 5], "group_m": [own.group_m, 1, 8]}
    if own.block_m == 1:
        choices = {"block_n": [1, 2, 4, 8], "block_k": [128, 256, 512, 1024, 2048], "warps": [1, 2, 4]}
    elif own.streams:
        width = gemm.width
        choices = {"block_n": [128 // width, 256 // width], "stages": [3, 4, 5, 6], "programs_per_sm": [1, 2]}
    elif own.specialised:
        choices |= {"stages": [2, 3, 4], "warps": [4, 8], "maps": ["w", "xw"]}
    else:
        width, size = gemm.width, bytes_of(multiply_in(gemm, target))
        choices |= {"block_n": [n // width for n in (32, 64, 128, 256)], "warps": [4, 8]}
        choices["block_k"] = [own.block_k] if gemm.grouped else [n // size for n in (64, 128, 256)]
        if own.block_m < 64:  # no block of weights is shared by several tiles of an expert
            choices["group_m"] = [own.group_m]
        elif target.capability >= 90 and not own.words:
            choices |= {"maps": ["none", "w", "xw"], "programs_per_sm": [0, 1], "flatten": [False, True]}
    for values in itertools.product(*choices.values()):
        other = replace(own, **dict(zip(choices, values, strict=True)))  # type: ignore[arg-type]
        if other.flatten and not other.programs_per_sm or other.programs_per_sm and other.maps != "xw":
            continue
        if gemm.columns * 2 > other.block_n and not why_not(other, gemm, target):
            yield other


def cost(config: KernelConfig, gemm: Gemm, problem: Problem, target: Target) -> float:
    """A time in arbitrary units: of memory, L2 or products, whichever is longest, with what the last wave wastes."""
    active = problem.active_experts
    tiles_m = active * math.ceil(problem.slots / active / config.block_m)
    programs = tiles_m * -(-gemm.columns // config.block_n)
    steps = -(-gemm.inner // config.block_k)
    step = step_bytes(config, gemm, target)
    rate = FLOPS * 2 / bytes_of(multiply_in(gemm, target))
    products = config.block_m * wide(config, gemm) * config.block_k / rate
    weights = (
        active
        * gemm.columns
        * gemm.inner
        * gemm.width
        * step
        / (config.block_k * (wide(config, gemm) + config.block_m))
    )
    each = max(products, step / CACHE, LEAST) * steps + START
    resident = max(1, min(4, target.shared_bytes // max(1, shared_bytes(config, gemm, target))))
    waves = programs / (target.n_sm * resident)
    waste = math.ceil(waves) / waves if waves > 1 and not config.programs_per_sm else 1.0
    shallow = max(1.0, FLYING / (step * max(1, config.stages - 1) * resident))
    return max(programs * each, weights * shallow) * waste
