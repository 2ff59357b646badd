"""What a call would launch on any target, compiled on a machine without a GPU, and what its machine code says."""

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
from triton.backends.nvidia.compiler import get_ptxas

from fusedmoe.backends import elsewhere
from fusedmoe.backends.launch import only_compiling
from fusedmoe.target import KNOWN

#: Targets that tests compile for.
TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942")

_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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

    def products(self) -> set[tuple[str, int, str]]:
        """Kinds of matrix products in the PTX, which is read in no time: instruction, columns, type of operands."""
        found = re.findall(
            r"\b(wgmma|mma)(?:\.mma_async)?\.sync\.aligned\.m\d+n\d+k(\d+)(?:\.row\.col)?(?:\.satfinite)?\.\w+\.(\w+)\.",
            self.asm["ptx"],
        )
        return {(instruction, int(columns), operand) for instruction, columns, operand in found}

    def complaints(self) -> list[str]:
        """What NVIDIA's assembler says of the PTX beside its statistics: performance that it gave up, for example."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(self.asm["ptx"], encoding="utf-8")
            arch = re.findall(r"\.target\s+(\w+)", self.asm["ptx"])[0]
            binary = Path(folder) / "kernel.cubin"
            command = [_assembler(KNOWN[self.target].capability), "-v", f"-arch={arch}", str(source), "-o", str(binary)]
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
    """Within, this thread's launches compile for ``target`` and are left out; afterwards the list has the kernels."""
    compiled: list[Compiled] = []
    with elsewhere.compiling_for(KNOWN[target]), only_compiling() as kernels:
        yield compiled
    compiled += [_describe(kernel, target) for kernel in kernels]
