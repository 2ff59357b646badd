"""Compile what a call would launch, for any target, on a machine without a GPU.

The launchers run as they are, on CPU tensors; only the last step, the launch, is left out. So what is
compiled is what a device would get: same specialisation, same options, same tensor maps.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction

#: Targets by the names used in this project.
TARGETS = {
    "sm_75": GPUTarget("cuda", 75, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """Stands in for a GPU driver: knows its target, launches nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name]

    def get_current_device(self) -> str:
        return self.name  # a key of Triton's per-device caches, nothing more

    def get_current_stream(self, device: object) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel and what its machine code says."""

    name: str
    target: str
    shared_bytes: int
    registers: int
    stack_bytes: int
    asm: Any

    def sass(self) -> str:
        """Machine code as text (NVIDIA only)."""
        return _sass(self.asm["cubin"])

    def count(self, instruction: str) -> int:
        """How often an instruction occurs in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass()))

    def complaints(self) -> list[str]:
        """What NVIDIA's assembler says of the PTX beside its statistics: performance that it gave up, for example."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(self.asm["ptx"], encoding="utf-8")
            arch = re.findall(r"\.target\s+(\w+)", self.asm["ptx"])[0]
            binary = Path(folder) / "kernel.cubin"
            command = [_assembler(TARGETS[self.target].arch), "-v", f"-arch={arch}", str(source), "-o", str(binary)]
            said = subprocess.run(command, check=True, capture_output=True, text=True)
        return re.findall(r".*\((?:C\d+)\).*", said.stdout + said.stderr)


def _assembler(arch: Any) -> str:
    """The one that Triton takes for a target: it brings two."""
    try:
        return str(get_ptxas(arch).path)
    except TypeError:  # Triton 3.5 has one
        return str(get_ptxas().path)


@functools.lru_cache(maxsize=8)
def _sass(binary: bytes) -> str:
    """Kept for the next question: it takes a second for a large kernel."""
    return _tool("cuobjdump", "-sass", binary)


def _tool(name: str, flag: str, binary: bytes) -> str:
    path = _BINARIES / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([str(path), flag, file.name], check=True, capture_output=True, text=True).stdout


def _describe(kernel: Any, target: str) -> Compiled:
    registers = stack = 0
    if "cubin" in kernel.asm:
        usage = _tool("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
        registers = int(re.findall(r"REG:(\d+)", usage)[-1])
        stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    elif "amdgcn" in kernel.asm:
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", kernel.asm["amdgcn"])[-1])
        stack = 4 * int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"])[-1])
    return Compiled(kernel.metadata.name, target, kernel.metadata.shared, registers, stack, kernel.asm)


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list[Compiled]]:
    """Within the context every Triton launch compiles for ``target`` and is left out; yields what was compiled."""
    compiled: list[Compiled] = []
    run = JITFunction.run

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_describe(kernel, target))
        return kernel

    before = driver._active
    driver.set_active(_Driver(target))
    JITFunction.run = only_compile
    try:
        yield compiled
    finally:
        JITFunction.run = run
        driver._active = before
