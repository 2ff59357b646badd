"""Compile what a deployment needs before its first request."""

from __future__ import annotations

import importlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from fusedmoe.backends.launch import only_compiling
from fusedmoe.errors import DTypeError, OptionError, explain
from fusedmoe.settings import settings
from fusedmoe.target import Target, known

#: Up to here every number of tokens is looked at; then as many to an octave, and between two that differ.
EVERY = 16
_OCTAVE = 8
#: Calls of more tokens are made one at a time: each has a workspace.
TOGETHER = 4096


@dataclass(frozen=True)
class Warmup:
    """What was compiled.

    Attributes:
        tokens: numbers of tokens that were looked at.
        variants: compiled kernels that calls of so many tokens launch.
        seconds: it took.
    """

    tokens: int
    variants: int
    seconds: float


def warmup(
    call: Callable[[int], object],
    tokens: int | Iterable[int],
    *,
    threads: int | None = None,
    target: str | None = None,
) -> Warmup:
    """Compile and load every kernel that a layer launches for given numbers of tokens, and launch none.

    Later calls then compile nothing: what a kernel is specialised on depends on the types, strides and alignments of
    the arguments and on the number of tokens, and is looked for in all numbers up to the largest. A CUDA graph can be
    captured at once. Triton keeps what it compiled on disk, so that another process only loads it.

    Args:
        call: runs the layer with as many tokens as it is given, as the deployment will: same weights, types and
            options. Whatever in it launches kernels of this library counts: :func:`fusedmoe.fused_experts`,
            :class:`fusedmoe.FusedExperts`, :func:`fusedmoe.expert_linear`, the parts of :mod:`fusedmoe.modular`. None
            is launched, so its results mean nothing. It is called in several threads at once.
        tokens: the most tokens of a call, or the very numbers that occur.
        threads: that compile at a time; None: as many as there are processors, 8 at most.
        target: architecture of a GPU that is not here, "sm_90" or "gfx942": the call's tensors lie on the CPU, and what
            is compiled lies in Triton's cache on disk for a process with the same Triton and Python on such a GPU. No
            other thread may call the library meanwhile.

    Returns:
        What was compiled, and in what time. A layer on the CPU has nothing to compile.

    Raises:
        DTypeError: call is no function, or tokens no integers.
        OptionError: a number is below 1, or nothing can be compiled for such a target here.
        Whatever the call raises.

    >>> import torch, fusedmoe
    >>> layer = fusedmoe.FusedExperts(4, 64, 48)
    >>> x, topk = torch.randn(512, 64), fusedmoe.softmax_topk(torch.randn(512, 4), top_k=2, renormalize=True)
    >>> with torch.no_grad():
    ...     fusedmoe.warmup(lambda n: layer(x[:n], topk.weights[:n], topk.ids[:n]), tokens=512).variants
    0
    """
    start = time.perf_counter()
    if not callable(call):
        wanted = "a function that runs the layer with a number of tokens"
        raise DTypeError(explain("call", got=repr(call), wanted=wanted, do="Give lambda n: layer(x[:n], ...)."))
    numbers = [tokens] if isinstance(tokens, int) else tokens
    if not isinstance(numbers, Iterable):
        raise DTypeError(explain("tokens", got=repr(tokens), wanted="an integer, or several", do="Give the largest T."))
    numbers = list(numbers)
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool):
            do = "Give numbers of tokens."
            raise DTypeError(explain("tokens", got=repr(number), wanted="an integer", do=do))
    if threads is None:
        threads = default_threads()
    for name, number in (*(("tokens", n) for n in numbers), ("threads", threads)):
        if not isinstance(number, int) or number < 1:
            raise OptionError(explain(name, got=repr(number), wanted="at least 1", do="Give a positive integer."))
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def met(n_tokens: int) -> frozenset[object]:
        """The kernels of a call; what is a thread's own is as in the caller's."""
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), only_compiling() as variants:
            if device is not None:
                torch.cuda.set_device(device)
            call(n_tokens)
            # Threads that compile the same at the same time have an object each.
            return frozenset(getattr(kernel, "hash", id(kernel)) for kernel in variants)

    found: dict[int, frozenset[object]] = {}
    there = nullcontext() if target is None else _compiling_for(known(target))
    with there, ThreadPoolExecutor(threads) as pool:

        def look(wanted: Sequence[int]) -> None:
            missing = sorted({n for n in wanted if n not in found})
            found.update({n: met(n) for n in missing if n > TOGETHER})
            few = [n for n in missing if n <= TOGETHER]
            found.update(zip(few, pool.map(met, few), strict=True))

        if isinstance(tokens, int):
            look(_grid(tokens))
            while between := _between(found):
                look(between)
        else:
            look(numbers)
    variants = frozenset().union(*found.values())
    return Warmup(len(found), len(variants), time.perf_counter() - start)


def _compiling_for(target: Target) -> AbstractContextManager[None]:
    if not target.triton or target.unfit or settings().interpret:
        got = "no Triton" if not target.triton else target.unfit or "TRITON_INTERPRET=1"
        do = "See fusedmoe env."
        raise OptionError(explain(f"target {target.arch}", got=got, wanted="Triton's compiler", do=do))
    elsewhere = importlib.import_module("fusedmoe.backends.elsewhere")  # whoever compiles nothing needs no compiler
    there: AbstractContextManager[None] = elsewhere.compiling_for(target)
    return there


def default_threads() -> int:
    """Threads that compile at a time when nobody says how many."""
    return min(8, os.cpu_count() or 1)


def _grid(most: int) -> list[int]:
    """Numbers of tokens to begin with, the largest among them."""
    numbers = {*range(1, min(most, EVERY) + 1), most}
    step = 1
    while EVERY * step < most:
        ends = range(EVERY * step, 2 * EVERY * step + 1, max(1, EVERY * step // _OCTAVE))
        numbers |= {n for n in ends if n <= most}
        step *= 2
    return sorted(numbers)


def _between(found: dict[int, frozenset[object]]) -> list[int]:
    """The middle between any two neighbours that launch different kernels."""
    numbers = sorted(found)
    pairs = itertools.pairwise(numbers)
    return [(low + high) // 2 for low, high in pairs if high > low + 1 and found[low] != found[high]]
