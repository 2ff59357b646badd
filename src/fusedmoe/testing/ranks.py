"""Processes that stand for ranks: run a function on all of them, and get what each returned or raised.

>>> ranks = Ranks(2)
>>> ranks.run(sum, [1, 2])
[3, 3]
>>> ranks.close()
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """A process group of this many processes of this machine, for tests and measurements.

    Functions are found again by their file and name, so they are to be plain functions of a module or a test file.
    """

    def __init__(self, ranks: int, backend: str = "gloo", *, timeout_s: float = 30.0) -> None:
        """Start; with NCCL rank r takes GPU r."""
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self._folder.name) / "meeting")
        self._pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, ranks, backend, meeting, timeout_s)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned or, as a value, raised; an EOFError for one that died."""
        task = pickle.dumps((*_where(function), arguments))
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # dead already
                pipe.send_bytes(task)
        found: list[Any] = []
        for pipe in self._pipes:
            try:
                found.append(pickle.loads(pipe.recv_bytes()))  # noqa: S301 - from our own processes
            except (EOFError, OSError) as cause:
                found.append(EOFError(f"the process has ended: {type(cause).__name__}"))
        return found

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned; the first exception is raised."""
        found = self.outcomes(function, *arguments)
        for rank, one in enumerate(found):
            if isinstance(one, Exception):
                raise RuntimeError(f"rank {rank}: {one!r}") from one  # noqa: TRY004 - an outcome, no argument
        return found

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(1.0)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _where(function: Callable[..., Any]) -> tuple[str, str]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (code.co_filename if code else function.__module__), function.__name__


@functools.cache
def _module(path: str) -> Any:
    if not path.endswith(".py"):
        return importlib.import_module(path)
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_in_ranks", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _work(pipe: Any, rank: int, ranks: int, backend: str, meeting: str, timeout_s: float) -> None:
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    while True:
        try:
            path, name, arguments = pickle.loads(pipe.recv_bytes())  # noqa: S301 - from the process that started this
        except EOFError:
            dist.destroy_process_group()
            return
        try:
            result = getattr(_module(path), name)(*arguments)
        except Exception as cause:  # noqa: BLE001 - it is the outcome
            result = cause.with_traceback(None)
        try:
            message = pickle.dumps(result)
        except Exception:  # noqa: BLE001 - an exception that cannot travel
            message = pickle.dumps(RuntimeError(f"{type(result).__name__}: {result}"))
        pipe.send_bytes(message)
