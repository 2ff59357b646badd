"""The only reader of the environment: typed, read once at first use, printed by ``fusedmoe env``."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

from fusedmoe.errors import OptionError, explain


@dataclass(frozen=True)
class Settings:
    """Settings of this process.

    Attributes:
        backend: ``FUSEDMOE_BACKEND``: "auto", or the backend that every call uses unless it names one.
        shared_memory_cap: ``FUSEDMOE_SHARED_MEMORY_CAP``: bytes of shared memory a program may use, below what
            the device offers; for machines that share a GPU, and for tests. None: the device's own limit.
        workspace_limit: ``FUSEDMOE_WORKSPACE_LIMIT``: bytes of workspace that a call may use unless it says otherwise;
            more tokens than fit are done in chunks. None: no limit.
        batch_invariant: ``FUSEDMOE_BATCH_INVARIANT``: calls that do not say give a row bits that depend on its token
            alone; see :func:`fusedmoe.fused_experts`.
        vllm: ``FUSEDMOE_VLLM``: where vLLM loads its plugins, its Triton experts are replaced by this library's.
        sglang: ``FUSEDMOE_SGLANG``: the same of SGLang and the function of its Triton runner.
        tuned: ``FUSEDMOE_TUNED``: folder with files of ``fusedmoe tune``, read before the package's own; or "none": the
            planner reads no file. None: :func:`cache_folder`.
        interpret: ``TRITON_INTERPRET``: Triton kernels run on the CPU, in Triton's interpreter.
    """

    backend: str = "auto"
    shared_memory_cap: int | None = None
    workspace_limit: int | None = None
    batch_invariant: bool = False
    vllm: bool = False
    sglang: bool = False
    tuned: str | None = None
    interpret: bool = False


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise OptionError(
            explain(f"environment variable {name}", got=repr(text), wanted="a positive integer", do="Unset or fix it.")
        )
    return int(text)


def _yes(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def settings() -> Settings:
    """The settings of this process."""
    return Settings(
        backend=os.environ.get("FUSEDMOE_BACKEND", "auto") or "auto",
        shared_memory_cap=_integer("FUSEDMOE_SHARED_MEMORY_CAP"),
        workspace_limit=_integer("FUSEDMOE_WORKSPACE_LIMIT"),
        batch_invariant=_yes("FUSEDMOE_BATCH_INVARIANT"),
        vllm=_yes("FUSEDMOE_VLLM"),
        sglang=_yes("FUSEDMOE_SGLANG"),
        tuned=os.environ.get("FUSEDMOE_TUNED") or None,
        interpret=_yes("TRITON_INTERPRET"),
    )


@functools.cache
def cache_folder() -> Path | None:
    """Where ``fusedmoe tune`` leaves what it finds; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "fusedmoe" / "tuned"
    except RuntimeError:
        return None
