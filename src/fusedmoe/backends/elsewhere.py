"""Compile for a device that is not here: on a machine without a GPU, or in a process that leaves the GPU to another.

Launchers run as they are, on tensors of the CPU; what is compiled is what a call on the device would launch: same
specialisation, same options, same tensor maps. So it lies in Triton's cache under the name by which a process with the
device looks for it, if Triton and Python are the same there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fusedmoe.errors import OptionError, explain
from fusedmoe.target import Target, standing_for

#: Processes at most: each takes 0.4 GB, and a second or more to start.
MOST = 16


def processes(jobs: int | None = None, **options: Any) -> ProcessPoolExecutor:
    """``jobs`` processes that may compile while this one has the device; None: as many as there are processors,
    :data:`MOST` at most. They start when there is work.

    Threads of one process take turns in Triton's front end, and a fork would have the device of this process.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs or min(MOST, os.cpu_count() or 1), context, **options)


class Driver:
    """Stands in for a GPU driver: knows its target, loads and launches nothing."""

    def __init__(self, target: Target) -> None:
        self._target = triton_target(target)
        self._name = target.arch

    def get_current_target(self) -> GPUTarget:
        """Of its kernels."""
        return self._target

    def get_current_device(self) -> str:
        """A key of Triton's caches by device, nothing more."""
        return self._name

    def get_current_stream(self, device: object) -> int:
        """None is used."""
        return 0


def triton_target(target: Target) -> GPUTarget:
    """As Triton says it.

    Raises:
        OptionError: no architecture that kernels are compiled for without its driver.
    """
    if target.vendor == "nvidia":
        return GPUTarget("cuda", target.capability, 32)
    if target.vendor == "amd":
        return GPUTarget("hip", target.arch, 64 if target.arch.startswith("gfx9") else 32)
    got, wanted = target.arch or target.vendor, "one of NVIDIA's or AMD's"
    raise OptionError(explain("target", got=repr(got), wanted=wanted, do="Compile where that device is."))


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Within, in all threads, tensors on the CPU stand for tensors on ``target``.

    Launches have to be left out (:func:`fusedmoe.backends.launch.only_compiling`, :func:`fusedmoe.warmup`): there is
    nothing to launch on.
    """
    before = driver._active
    driver.set_active(Driver(target))
    try:
        with standing_for(target):
            yield
    finally:
        driver._active = before
