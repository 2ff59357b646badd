"""Random problems against the reference, in poisoned memory: schemes, options, sizes and routings at random.

A kernel is compiled for the sizes and options of a layer, not for its tokens or its routing. So problems are drawn
layer by layer, EACH of one, which bounds the number of kernels; layers are shared out among processes, which compile
at the same time and run on the same device.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusedmoe.checks import check
from fusedmoe.plan.planner import support
from fusedmoe.schemes import SCHEMES
from fusedmoe.target import target_of
from fusedmoe.testing.cases import OPTIONS, QUANTISED_OPTIONS, Case, formats_of, run_poisoned
from fusedmoe.testing.isolation import couples_rows

#: Problems of one layer.
EACH = 10
#: (top_k, experts, hidden, intermediate): tiles that are full, ragged, and narrower than any; few and many experts.
LAYERS = (
    (1, 1, 16, 16),
    (2, 8, 256, 384),
    (8, 64, 128, 96),
    (3, 5, 33, 80),
    (6, 60, 192, 352),
    (4, 128, 96, 64),
    (2, 3, 1025, 320),
    (64, 256, 64, 96),
    (8, 1100, 48, 32),
    (2, 7, 640, 272),
)
TOKENS = (1, 2, 3, 5, 8, 13, 16, 21, 33, 64, 100, 129, 200, 400, 700, 1100)
#: Of adapters, where a layer has them; 0: a slot without one.
RANKS = ((3,), (16,), (5, 0, 24), (64, 1), (8, 8, 8, 8))
#: For the interpreter, which takes milliseconds for what a GPU does in nanoseconds.
SMALL_LAYERS, SMALL_TOKENS = ((1, 1, 16, 16), (2, 3, 48, 32), (3, 5, 33, 24)), (1, 3, 17, 40)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One problem.

    Attributes:
        case, backend, batch_invariant, seed: say all of it, for :func:`fusedmoe.testing.cases.run_poisoned`.
        error, tolerance: relative error against the reference, and its bound; error None: the call raised.
        detail: what it raised.
    """

    case: Case
    backend: str
    batch_invariant: bool
    seed: int
    error: float | None
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """The error keeps the bound."""
        return self.error is not None and self.error <= self.tolerance


def fuzz(count: int, seed: int, device: torch.device, *, jobs: int = 1, small: bool = False) -> Iterator[Outcome]:
    """Run about ``count`` problems, the same for the same seed; a failure is an outcome and never raises.

    Args:
        count: of problems, in layers of :data:`EACH`.
        seed: of everything that is drawn.
        device: where.
        jobs: processes that share the work; 1: this one alone.
        small: tiny layers, for the interpreter.
    """
    work = [(seed, index, str(device), small) for index in range(math.ceil(count / EACH))]
    if jobs == 1:
        for one in work:
            yield from _layer(one)
        return
    # A process that was forked could not use the driver.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for one, future in [(one, pool.submit(_layer, one)) for one in work]:
            try:
                yield from future.result()
            except BrokenExecutor as cause:  # a process died, and with it the pool
                yield _failed(draw_layer(_chooser(one), small=small), "any", False, 0, cause)


def _layer(work: tuple[int, int, str, bool]) -> list[Outcome]:
    """The problems of one layer."""
    _, _, name, small = work
    chooser, device = _chooser(work), torch.device(name)
    case = draw_layer(chooser, small=small)
    backend = _backend(case, chooser, device)
    batch_invariant = chooser.random() < 0.25 and not couples_rows(case) and not case.ranks
    outcomes = []
    for _ in range(EACH):
        tokens = chooser.choice(SMALL_TOKENS if small else TOKENS)
        one = replace(case, tokens=tokens, ids=chooser.choice(OPTIONS["ids"]))
        outcomes.append(_outcome(one, backend, batch_invariant, chooser.randrange(2**31), name))
    return outcomes


def _chooser(work: tuple[int, int, str, bool]) -> random.Random:
    return random.Random(f"{work[0]} {work[1]}")


def draw_layer(chooser: random.Random, *, small: bool = False) -> Case:
    """A case with everything that kernels are compiled for."""
    top_k, experts, hidden, intermediate = chooser.choice(SMALL_LAYERS if small else LAYERS)
    options: dict[str, Any] = {name: chooser.choice(values) for name, values in OPTIONS.items()}
    quantised = {name: chooser.choice(values) for name, values in QUANTISED_OPTIONS.items()}
    which = quantised.pop("quantised")
    if chooser.random() < 0.75:
        first, second = (chooser.choice(formats_of(chooser.choice(tuple(SCHEMES)))) for _ in range(2))
        options |= quantised
        options["formats"] = {"both": (first, second), "w13": (first, None), "w2": (None, second)}[which]
    if chooser.random() < 0.25:
        adapters = {"ranks": chooser.choice(RANKS), "apart": chooser.random() < 0.5, "shared": chooser.random() < 0.25}
        options |= {**adapters, "codes": False}  # adapters multiply what was not quantised
    return Case.of((1, top_k, experts, hidden, intermediate), **options).fitted()


def _backend(case: Case, chooser: random.Random, device: torch.device) -> str:
    """The planner's choice, or one of those that take the layer."""
    arguments, options = case.draw(device)
    reasons = support(check(*arguments, **options).problem, target_of(device))
    return chooser.choice(["auto", "auto", *(name for name, against in reasons.items() if not against)])


def _outcome(case: Case, backend: str, batch_invariant: bool, seed: int, device: str) -> Outcome:
    try:
        _, error = run_poisoned(case, device, backend, seed, batch_invariant=batch_invariant)
    except Exception as cause:  # noqa: BLE001 - whatever goes wrong is the outcome
        return _failed(case, backend, batch_invariant, seed, cause)
    how: dict[str, Any] = {"backend": backend, "batch_invariant": batch_invariant, "seed": seed}
    return Outcome(case=case, error=error, tolerance=case.tolerance, **how)


def _failed(case: Case, backend: str, batch_invariant: bool, seed: int, cause: Exception) -> Outcome:
    how: dict[str, Any] = {"backend": backend, "batch_invariant": batch_invariant, "seed": seed}
    detail = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    return Outcome(case=case, error=None, tolerance=case.tolerance, detail=detail, **how)
