"""The search itself: pure, so that it is tested with any clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target
from fusedmoe.tune.space import Tiles, neighbours, starts

#: Neighbours of a GEMM that are measured, unless all are.
KEEP = 12
#: A kind of tiles whose start is slower than the best by this is left.
HOPELESS = 1.5
#: What is not faster by this is not faster: figures of the same kernels differ by as much.
NOISE = 0.02
#: Finalists that are measured again, at length.
FINAL = 3


class Measure(Protocol):
    """Something that runs tiles."""

    def prepare(self, candidates: Sequence[Tiles]) -> None:
        """These will be measured: compile them."""

    def time(self, tiles: Tiles, *, careful: bool) -> float | None:
        """Microseconds of the layer; None when it fails or its result is wrong."""


class Found(NamedTuple):
    """The result for one number of tokens; tiles None: none is faster than the planner's."""

    tiles: Tiles | None
    us: float
    planned_us: float
    tried: int


def search(
    problem: Problem,
    target: Target,
    planned: Tiles,
    measure: Measure,
    *,
    keep: int | None = KEEP,
    more: Callable[[], bool] = lambda: True,
    note: Callable[[Tiles, float], None] = lambda tiles, us: None,
) -> Found | None:
    """Find the fastest tiles: for each kind, first those of gate-up, then those of down beside the best of them.

    Neighbours of the fastest so far are measured, and then those of what is fastest now.

    Args:
        problem, target: what is run where.
        planned: the planner's own tiles, which come first.
        measure: runs them.
        keep: neighbours to measure for each GEMM and kind, None: all, and every kind to its end.
        more: there is time left.
        note: told of each new best.

    Returns:
        None when even the planner's tiles cannot be measured.
    """
    times: dict[Tiles, float | None] = {}

    def best() -> Tiles | None:
        right = _in_order(times)
        return list(times)[right[0][1]] if right else None

    def run(candidates: Sequence[Tiles]) -> None:
        fresh = [tiles for tiles in candidates if tiles not in times]
        if times and not more():
            return
        measure.prepare(fresh)
        for tiles in fresh:
            if times and not more():
                return
            before = best()
            us = times[tiles] = measure.time(tiles, careful=False)
            if us is not None and (before is None or us < (times[before] or us)):
                note(tiles, us)

    kinds = [planned, *(start for start in starts(problem, target) if _kind(start) != _kind(planned))]
    run(kinds)
    for start in sorted(kinds, key=lambda one: times.get(one) or float("inf")):
        leader, us = best(), times.get(start)
        if leader is None or us is None or keep is not None and us > HOPELESS * (times[leader] or us):
            continue
        for gate_up in (True, True, False, False):  # the second time around what the first time found
            run(neighbours(_fastest(times, start), problem, target, gate_up=gate_up, keep=keep))
    finalists = [list(times)[n] for _, n in _in_order(times)[:FINAL]]
    planned_us = None if times.get(planned) is None else measure.time(planned, careful=True)
    if planned_us is None:
        return None
    final = {tiles: measure.time(tiles, careful=True) for tiles in finalists if tiles != planned}
    right = _in_order(final)
    if not right or right[0][0] > (1 - NOISE) * planned_us:
        return Found(None, planned_us, planned_us, len(times))
    us, n = right[0]
    return Found(list(final)[n], us, planned_us, len(times))


def _in_order(times: dict[Tiles, float | None]) -> list[tuple[float, int]]:
    """Times that there are, the least first, and their places."""
    return sorted((us, n) for n, us in enumerate(times.values()) if us is not None)


def _kind(tiles: Tiles) -> tuple[object, ...]:
    return tiles.few, tiles.gate_up.block_m, tiles.backend


def _fastest(times: dict[Tiles, float | None], like: Tiles) -> Tiles:
    """The fastest of a kind that was measured."""
    return min(
        (tiles for tiles, us in times.items() if us is not None and _kind(tiles) == _kind(like)),
        key=lambda tiles: times[tiles] or 0.0,
    )
