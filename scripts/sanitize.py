#!/usr/bin/env python3
"""Every kernel under NVIDIA's compute-sanitizer, on layers small enough for it, against the reference besides.

python scripts/sanitize.py                      memcheck, racecheck and synccheck, one after the other
python scripts/sanitize.py racecheck            one of them
python scripts/sanitize.py --layers             the layers alone, without the tool; on a CPU by Triton's interpreter

Each layer runs twice, over differently poisoned output and workspace, and every tensor is an allocation of its own, so
that a step beyond one is seen. Exit status 1: a finding, or a wrong layer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from fusedmoe.checks import check
from fusedmoe.plan.planner import support
from fusedmoe.schemes import formats_of
from fusedmoe.settings import settings
from fusedmoe.spec.activation import Activation
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case, run_poisoned

TOOLS = ("memcheck", "racecheck", "synccheck")
SCHEMES = (None, "fp8_block", "fp8_channel", "int8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4", "nvfp4")
#: (tokens, top_k, experts, hidden, intermediate) of each kind of plan. The last has more tiles than an H200 has
#: multiprocessors, whole ones and parts, so that a program has several.
SHAPES = {
    "single rows": (1, 4, 8, 512, 256),
    "few slots": (8, 2, 4, 512, 256),
    "one chunk": (64, 2, 8, 512, 384),
    "several chunks": (700, 2, 6, 512, 256),
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
            for backend in ("triton", "gluon_sm90") if shape[0] >= 64 else ("triton",):
                yield f"{kind}, {scheme or 'unquantised'}, {backend}", backend, case
    for kind, shape in SHAPES.items():
        yield f"{kind}, adapters, triton", "triton", Case.of(shape, ranks=(4, 0, 9), ids="invalid")


def layers() -> int:
    """Run them; returns how many were wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not settings().interpret:
        sys.exit("There is no GPU: set TRITON_INTERPRET=1.")
    wrong = ran = 0
    for name, backend, case in cases():
        arguments, options = case.draw(device)
        if support(check(*arguments, **options).problem, target_of(device)).get(backend, ("not here",)):
            continue  # it takes no such layer
        _, error = run_poisoned(case, str(device), backend)
        ran += 1
        if not error <= case.tolerance:
            wrong += 1
            print(f"WRONG {name}: error {error:.2e}, at most {case.tolerance:.2e}", flush=True)
    print(f"{ran} layers, {wrong} wrong", flush=True)
    return wrong


def main(wanted: list[str]) -> int:
    """Run the tools on a process of its own each."""
    if unknown := set(wanted) - set(TOOLS):
        sys.exit(f"no tool {', '.join(sorted(unknown))}; there are: {', '.join(TOOLS)}")
    if (program := shutil.which("compute-sanitizer")) is None:
        sys.exit("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit.")
    again = [sys.executable, __file__, "--layers"]
    if subprocess.run(again, check=False).returncode:  # compiles every kernel without the tool
        return 1
    failed = 0
    for tool in wanted or TOOLS:
        print(f"$ {tool}", flush=True)
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [program, "--tool", tool, "--error-exitcode", "1", *again]
        failed |= subprocess.run(command, env=environment, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(min(1, layers()) if "--layers" in sys.argv[1:] else main(sys.argv[1:]))
