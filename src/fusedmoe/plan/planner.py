"""Problem x Target -> Plan: the best backend that says yes, and why the others do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from fusedmoe.errors import OptionError, UnsupportedError, explain
from fusedmoe.plan.config import Plan, TritonPlan
from fusedmoe.plan.heuristics import sm90_plan, triton_plan, why_portable
from fusedmoe.plan.invariance import alike, anchor_tokens
from fusedmoe.plan.validity import why_not
from fusedmoe.settings import settings
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target


def _torch(problem: Problem, target: Target) -> list[str]:
    """PyTorch's own kernels take every problem."""
    return []


def _against(plan: TritonPlan, problem: Problem, target: Target) -> list[str]:
    """Every reason against the kernels of a plan."""
    gemms = {"gate-up": (plan.gate_up, problem.gate_up_gemm), "down": (plan.down, problem.down_gemm)}
    return [f"{name}: {reason}" for name, (config, gemm) in gemms.items() for reason in why_not(config, gemm, target)]


def _gluon_sm90(problem: Problem, target: Target) -> list[str]:
    """The pipeline of Triton with the warp-specialised GEMMs of Hopper."""
    reasons = _triton(problem, target)
    if not reasons:
        reasons += _against(sm90_plan(problem, target), problem, target)
    return reasons


def _triton(problem: Problem, target: Target) -> list[str]:
    reasons = []
    if not target.triton:
        reasons.append("the package triton is not installed")
    if target.unfit:
        reasons.append(target.unfit)
    if target.vendor == "cpu" and not target.interpret:
        reasons.append("Triton has no CPU target (TRITON_INTERPRET=1 runs it in its interpreter, for tests)")
    if target.vendor == "nvidia" and target.capability < 75:
        reasons.append(f"{target.arch} is older than sm_75")
    if target.vendor == "nvidia" and target.capability < 80 and problem.dtype == "bfloat16":
        reasons.append(f"{target.arch} has no bfloat16 arithmetic (sm_80 and newer have)")
    if not reasons:
        reasons += _against(triton_plan(problem, target), problem, target)
    return reasons


#: Backends, best first: name -> every reason why it cannot take a problem, none when it can.
SUPPORTS: dict[str, Callable[[Problem, Target], list[str]]] = {
    "gluon_sm90": _gluon_sm90,
    "triton": _triton,
    "torch": _torch,
}
#: Backend -> its kernels for a problem that it supports; those without have none to choose.
PLANS: dict[str, Callable[[Problem, Target], TritonPlan]] = {"gluon_sm90": sm90_plan, "triton": triton_plan}
#: Backend -> why the next one is faster for a problem that it supports; None when it is not.
SLOWER: dict[str, Callable[[Problem, Target], str | None]] = {"gluon_sm90": why_portable}


def support(problem: Problem, target: Target) -> dict[str, tuple[str, ...]]:
    """Every backend with every reason why it does not take the problem."""
    return {name: tuple(reasons(problem, target)) for name, reasons in SUPPORTS.items()}


def choose(problem: Problem, target: Target, backend: str | None = None) -> Plan:
    """The plan for a problem; ``backend`` None takes the process's setting, any but "auto" must be able to take it.

    Raises:
        OptionError: no backend of that name.
        UnsupportedError: none can, or the named one cannot; every reason of every backend is in the message.
    """
    # As text, so that what is no name is an unknown name.
    how = _choose_alike if problem.batch_invariant else _choose
    return how(problem, target, settings().backend if backend is None else str(backend))


@functools.lru_cache(maxsize=4096)
def _choose_alike(problem: Problem, target: Target, backend: str) -> Plan:
    """The plan of a batch-invariant call: of its own, with the arithmetic of the anchor's; else the anchor's."""
    tokens = anchor_tokens(problem)
    anchor, own = (_choose(replace(problem, tokens=n), target, backend) for n in (tokens, problem.tokens))
    if anchor.triton is None:
        return replace(anchor, why=f"{anchor.why}; batch-invariant: row by row")
    if own.triton is not None and (found := alike(own.triton, anchor.triton, problem, target)):
        return replace(own, triton=found, why=f"{own.why}; batch-invariant: tiles that add up as for {tokens} tokens")
    return replace(anchor, why=f"{anchor.why}; batch-invariant: the tiles of {tokens} tokens, as no others add up so")


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, target: Target, backend: str) -> Plan:
    if backend != "auto" and backend not in SUPPORTS:
        raise OptionError(
            explain(
                "backend", got=repr(backend), wanted=f"'auto' or one of {', '.join(SUPPORTS)}", do="See fusedmoe env."
            )
        )
    refused: list[tuple[str, tuple[str, ...]]] = []
    for name, reasons in SUPPORTS.items():
        if backend not in ("auto", name):
            continue
        if why := tuple(reasons(problem, target)):
            refused.append((name, why))
            continue
        if backend == "auto" and name in SLOWER and (slower := SLOWER[name](problem, target)):
            refused.append((name, (slower,)))
            continue
        kernels = PLANS[name](problem, target) if name in PLANS else None
        asked = "asked for" if backend == name else "the first in order of speed that takes it"
        return Plan(backend=name, triton=kernels, why=asked, refused=tuple(refused))
    listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused)
    raise UnsupportedError(
        explain(
            "no backend takes this call" if backend == "auto" else f"backend {backend!r} does not take this call",
            got=listing,
            wanted="a backend without reasons against it",
            do="Use backend='torch', which runs everywhere.",
        )
    )
