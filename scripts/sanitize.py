#!/usr/bin/env python3
"""Every kernel under NVIDIA's compute-sanitizer, on layers small enough for it, against the reference besides.

python scripts/sanitize.py                      memcheck, racecheck and synccheck, one after the other
python scripts/sanitize.py racecheck            one of them
python scripts/sanitize.py --layers             the layers alone, without the tool; on a CPU by Triton's interpreter

Each layer runs twice, over differently poisoned output and workspace, and every tensor is an allocation of its own, so
that a step beyond one is seen. A process a core takes its share of the layers, first without a tool, which compiles
them. Exit status 1: a finding, or a wrong layer.
"""

from __future__ import annotations

import importlib
import itertools
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.runtime import JITFunction

from fusedmoe import kernels
from fusedmoe.checks import check
from fusedmoe.plan.planner import support
from fusedmoe.schemes import formats_of
from fusedmoe.settings import settings
from fusedmoe.spec.activation import Activation
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case, run_poisoned

TOOLS = ("memcheck", "racecheck", "synccheck")
SCHEMES = (None, "fp8_block", "fp8_channel", "int8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4", "nvfp4")
#: Seconds for all layers below one tool.
PATIENCE = 600
#: (tokens, top_k, experts, hidden, intermediate) of each kind of plan. The last, and what is streamed, have more tiles
#: than an H200 has programs, whole ones and parts, so that a program has several.
SHAPES = {
    "single rows": (1, 4, 8, 512, 256),
    "few slots": (8, 2, 4, 512, 256),
    "one launch to sort": (64, 2, 8, 512, 384),
    "streamed": (40, 4, 64, 1024, 512),
    "chunks to sort": (2100, 2, 6, 512, 256),
    "persistent": (1200, 2, 16, 2048, 256),
}
#: Options that go through all that a kernel can be asked for.
OPTIONS = (
    {"ids": "invalid"},
    {"ids": "any", "bias": True, "gate_up_layout": "interleaved", "activation": Activation.of("swigluoai")},
    {"ids": "one", "mapped": True, "on_input": True},
)


def cases() -> Iterator[tuple[str, str, Case]]:
    """What is run: its name, its backend, and the layer."""
    for number, scheme in enumerate(SCHEMES):
        form = None if scheme is None else next(iter(formats_of(scheme)))
        for turn, (kind, shape) in enumerate(SHAPES.items()):
            options = OPTIONS[(number + turn) % len(OPTIONS)]
            case = Case.of(shape, formats=(form, form), **options).fitted()
            for backend in ("triton", "gluon_sm90") if shape[0] > 1 else ("triton",):
                yield f"{kind}, {scheme or 'unquantised'}, {backend}", backend, case
    for kind, shape in SHAPES.items():
        yield f"{kind}, adapters, triton", "triton", Case.of(shape, ranks=(4, 0, 9), ids="invalid")
        for backend in ("triton", "gluon_sm90") if shape[0] >= 64 else ("triton",):
            yield f"{kind}, finite adapters, {backend}", backend, Case.of(shape, ranks=(4, 0, 40, 16), finite=True)


def layers(part: int, parts: int) -> int:
    """Run every ``parts``-th of them; returns how many were wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not settings().interpret:
        sys.exit("There is no GPU: set TRITON_INTERPRET=1.")
    wrong = ran = 0
    for name, backend, case in itertools.islice(cases(), part, None, parts):
        arguments, options = case.draw(device)
        if support(check(*arguments, **options).problem, target_of(device)).get(backend, ("not here",)):
            continue  # it takes no such layer
        print(f"{name} ...", flush=True)  # what hangs is the last that is named
        _, error = run_poisoned(case, str(device), backend)
        ran += 1
        if not error <= case.tolerance:
            wrong += 1
            print(f"WRONG {name}: error {error:.2e}, at most {case.tolerance:.2e}", flush=True)
    print(f"{ran} layers, {wrong} wrong", flush=True)
    return wrong


def own_kernels() -> list[str]:
    """The names of all kernels of this library: the tools are to leave those of PyTorch alone, which take hours."""
    found = set()
    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        functions = vars(importlib.import_module(module.name)).values()
        found |= {one.__name__ for one in functions if isinstance(one, JITFunction)}
    return sorted(found)


def between_groups_of_warps() -> set[tuple[str, int]]:
    """Lines at which Triton's own code hands work to groups of warps: the head of the kernel, and gl.warp_specialize.

    What racecheck reports between them is how Triton 3.6 does that: a byte and a block of arguments in shared memory,
    written before and read behind a barrier of all warps that was not made by __syncthreads, and that it does not see.
    """
    marks = ("def grouped_gemm_sm90(", "def grouped_stream_sm90(", "if CONSUMERS == 2:", "gl.warp_specialize(")
    return {
        (path.name, number)
        for path in Path(kernels.__path__[0]).glob("*_sm90.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip().startswith(marks)
    }


def well(said: str, status: int | None, tool: str) -> bool:
    """Whether a process found nothing, from what it said and its exit status."""
    if status == 0:
        return True
    places = {(file, int(line)) for file, line in re.findall(r"access at \S+ in (\w+\.py):(\d+)", said)}
    return tool == "racecheck" and ", 0 wrong" in said and bool(places) and places <= between_groups_of_warps()


def shared_out(tool: str, command: list[str], environment: dict[str, str]) -> bool:
    """Run all layers in a process a core, below a tool; whether all was well."""
    parts = len(os.sched_getaffinity(0))
    running = [
        subprocess.Popen(
            [*command, sys.executable, __file__, "--layers", str(part), str(parts)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for part in range(parts)
    ]  # fmt: skip
    end, failed = time.monotonic() + PATIENCE, 0
    for one in running:
        try:
            said, _ = one.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.kill()
            said = f"{one.communicate()[0]}\nnot done after {PATIENCE} s"
        print(said, flush=True)  # one after the other, not mixed
        failed += not well(said, one.returncode, tool)
    print(f"{tool}: {failed} of {parts} processes have findings", flush=True)
    return not failed


def main(wanted: list[str]) -> int:
    """Run the tools, one after the other."""
    if unknown := set(wanted) - set(TOOLS):
        sys.exit(f"no tool {', '.join(sorted(unknown))}; there are: {', '.join(TOOLS)}")
    if (program := shutil.which("compute-sanitizer")) is None:
        sys.exit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit.")
    if not shared_out("without a tool", [], {**os.environ}):
        return 1
    apart = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    only = [word for name in own_kernels() for word in ("--kernel-name", f"kernel_name={name}")]
    failed = False
    for tool in wanted or TOOLS:
        failed |= not shared_out(tool, [program, "--tool", tool, "--error-exitcode", "1", *only], apart)
    return int(failed)


if __name__ == "__main__":
    if "--layers" in sys.argv[1:]:
        share = [int(number) for number in sys.argv[2:]] or [0, 1]
        sys.exit(min(1, layers(*share)))
    sys.exit(main(sys.argv[1:]))
