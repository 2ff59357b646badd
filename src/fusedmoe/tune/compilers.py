"""Processes that compile candidates while this one has the device.

The launches of each candidate are compiled in processes that never touch the device
(:mod:`fusedmoe.backends.elsewhere`), into Triton's cache on disk, where they are found.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch

from fusedmoe import experts
from fusedmoe.backends.launch import only_compiling
from fusedmoe.bench import Shape, draw_layer
from fusedmoe.call import Call
from fusedmoe.checks import check
from fusedmoe.plan.config import Plan
from fusedmoe.target import Target
from fusedmoe.tune.space import Tiles

_log = logging.getLogger("fusedmoe")


class Work(NamedTuple):
    """What all candidates have in common.

    Attributes:
        options: those of :func:`fusedmoe.bench.draw_layer` that are not the layer's shape, type and scheme.
    """

    shape: Shape
    dtype: torch.dtype
    scheme: str
    target: Target
    options: dict[str, Any]


class Compilers:
    """``jobs`` of them, as :func:`fusedmoe.backends.elsewhere.processes` counts them."""

    def __init__(self, work: Work, jobs: int | None = None) -> None:
        # It needs Triton, which a process that only asks what can be tuned does not.
        from fusedmoe.backends import elsewhere

        self._pool = elsewhere.processes(jobs, initializer=_start, initargs=(work,))

    def close(self) -> None:
        """End them."""
        self._pool.shutdown(cancel_futures=True)

    def compile(self, tokens: int, candidates: Sequence[Tiles]) -> int:
        """Compile what calls of so many tokens launch with these tiles; returns how many could be.

        What could not is found out where it is run; if the processes died, all is compiled there.
        """
        try:
            return sum(self._pool.map(_compile, [tokens] * len(candidates), candidates))
        except BrokenProcessPool as cause:
            _log.warning("Processes that compile ended (%s): this one compiles, which takes longer.", cause)
            return 0


#: Of a process, which does nothing else.
_own: dict[str, Any] = {}


def _start(work: Work) -> None:
    torch.set_num_threads(1)
    like = {"dtype": work.dtype, "device": torch.device("cpu"), "scheme": work.scheme, **work.options}
    layer = draw_layer(work.shape, **like, values=False)
    _own.update(work=work, layer=layer)


@functools.lru_cache(maxsize=1)
def _call(tokens: int) -> Call:
    layer = _own["layer"]
    arguments = layer.call(tokens)
    return check(*arguments, out=torch.empty_like(arguments[0]), batch_invariant=False, **layer.options)


def _compile(tokens: int, tiles: Tiles) -> bool:
    from fusedmoe.backends import elsewhere

    target = _own["work"].target
    try:
        call = _call(tokens)
        with torch.no_grad(), elsewhere.compiling_for(target), only_compiling():
            experts.run(call, Plan(backend=tiles.backend, triton=tiles.plan(call.problem, target)))
    except Exception:  # noqa: BLE001 - what does not compile is no candidate, which is found out where it is run
        return False
    return True
