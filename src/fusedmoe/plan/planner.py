"""Problem x Target -> Plan: the best backend that says yes, and why the others do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from fusedmoe.errors import OptionError, UnsupportedError, explain
from fusedmoe.plan import heuristics, tables
from fusedmoe.plan.config import Plan, TritonPlan
from fusedmoe.plan.heuristics import adapted, assemble, sm90_plan, triton_plan, why_portable
from fusedmoe.plan.invariance import alike, anchor_tokens
from fusedmoe.plan.validity import why_not_plan
from fusedmoe.settings import settings
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target


def _torch(problem: Problem, target: Target) -> list[str]:
    """PyTorch's own kernels take every problem."""
    return []


def _gluon_sm90(problem: Problem, target: Target) -> list[str]:
    """The pipeline of Triton with the warp-specialised GEMMs of Hopper."""
    reasons = _triton(problem, target)
    if not reasons:
        reasons += why_not_plan(sm90_plan(problem, target), problem, target)
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
        reasons += why_not_plan(triton_plan(problem, target), problem, target)
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

    Tiles are those of a file of ``fusedmoe tune`` that speaks for the problem, else of the heuristics. Batch-invariant
    calls are planned without files: their bits must not depend on which were there.

    Raises:
        OptionError: no backend of that name.
        UnsupportedError: none can, or the named one cannot; every reason of every backend is in the message.
    """
    # As text, so that what is no name is an unknown name.
    name = settings().backend if backend is None else str(backend)
    if problem.batch_invariant:
        return _choose_alike(problem, target, name)
    return _measured(problem, target, name) or _choose(problem, target, name)


def untuned(problem: Problem, target: Target, backend: str = "auto") -> Plan:
    """The plan without any file, that of the heuristics; raises as :func:`choose` does."""
    return _choose(problem, target, backend)


def read_files_again() -> None:
    """Forget what files of measured tiles said, and the plans made of it: one has changed."""
    tables.read.cache_clear()
    _measured.cache_clear()


def tokens_before_breaks(problem: Problem, target: Target) -> list[int]:
    """Token counts below the problem's after which a call may be planned otherwise, and with less workspace."""
    measured = [] if problem.batch_invariant else tables.tokens_before_breaks(problem, target)
    return [*heuristics.tokens_before_breaks(problem), *measured]


@functools.lru_cache(maxsize=4096)
def _measured(problem: Problem, target: Target, backend: str) -> Plan | None:
    """The plan of a file, if one speaks for the problem, with tiles that can run it, on a backend that may be used."""
    # Rows without an adapter keep the bits of the layer without adapters: they are planned alike.
    found = tables.lookup(replace(problem, adapters=None), target)
    if found is None:
        return None
    entry, path = found
    if (
        entry.gate_up is None
        or entry.down is None
        or entry.backend not in PLANS
        or backend not in ("auto", entry.backend)
    ):
        return None
    gate_up = adapted(entry.gate_up, problem, problem.gate_up_gemm, target)
    down = adapted(entry.down, problem, problem.down_gemm, target)
    plan = assemble(problem, target, few=entry.few, gate_up=gate_up, down=down)
    if SUPPORTS[entry.backend](problem, target) or why_not_plan(plan, problem, target):
        return None
    why = f"measured for {entry.slots} slots" + (f", {entry.date}" if entry.date else "") + f": {path}"
    before = [name for name in SUPPORTS if backend == "auto" and name != entry.backend]
    faster = ("slower than what was measured",)
    refused = ((name, tuple(SUPPORTS[name](problem, target)) or faster) for name in before)
    return Plan(backend=entry.backend, triton=plan, why=why, refused=tuple(refused))


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
