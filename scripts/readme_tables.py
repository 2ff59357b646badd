#!/usr/bin/env python3
"""The tables of README.md: what the library supports, read from the code, and what a benchmark measured.

python scripts/readme_tables.py            prints them
python scripts/readme_tables.py --write    puts them between the markers of README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from fusedmoe import checks, schemes
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.spec.activation import REQUIRED, TABLE, Activation
from fusedmoe.spec.layout import FP32_PRECISIONS, GATE_UP_LAYOUTS, WEIGHT_LAYOUTS
from fusedmoe.spec.problem import Problem
from fusedmoe.target import KNOWN, Target

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "h200-bf16.json"

#: Devices to ask the planner about.
TARGETS = {
    "NVIDIA sm_75": KNOWN["sm_75"],
    "NVIDIA sm_80": KNOWN["sm_80"],
    "NVIDIA sm_90": KNOWN["sm_90"],
    "NVIDIA sm_100": KNOWN["sm_100"],
    "AMD gfx942": KNOWN["gfx942"],
    "Intel XPU": Target("intel", "xpu", 0, 64, 131072),
    "CPU": Target("cpu"),
    "CPU, Triton's interpreter": Target("cpu", interpret=True),
}


def _code(words: Iterable[object]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _types(dtypes: Iterable[torch.dtype]) -> str:
    return _code(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _activation(name: str) -> str:
    parameters = [
        f"{parameter} {'required' if default is REQUIRED else 'optional' if default is None else f'= {default}'}"
        for parameter, default in TABLE[name][1].items()
    ]
    return f"`{name}`" + (f" ({', '.join(parameters)})" if parameters else "")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _options() -> Iterable[str]:
    yield _row("what", "accepted")
    yield _row("---", "---")
    for name in schemes.SCHEMES:
        scheme = schemes.load(name)
        bounds = ", ".join(f"`{dtype}` {scheme.TOLERANCE[dtype]:.1e}" for dtype in scheme.DTYPES)
        yield _row(f"scheme `{name}`: types, with the relative error that the tests allow", bounds)
    yield _row("products of float32", _code(FP32_PRECISIONS))
    yield _row("activations, gated", ", ".join(_activation(n) for n, (arity, _) in TABLE.items() if arity == 2))
    yield _row("activations, not gated", ", ".join(_activation(n) for n, (arity, _) in TABLE.items() if arity == 1))
    yield _row("rows of `w13`", _code(GATE_UP_LAYOUTS))
    yield _row("storage of experts", f"{_code(WEIGHT_LAYOUTS)}; any strides")
    yield _row("router weights, biases", _types(checks._FLOATS))
    yield _row("expert ids, expert map", f"{_types(checks._INTEGERS)}; an id without an expert adds nothing")
    yield _row("experts per token", f"1 to {checks.MAX_TOP_K}")
    yield _row("experts", f"1 to {checks.MAX_EXPERTS}")


def _devices() -> Iterable[str]:
    dtypes = tuple(dict.fromkeys(dtype for name in schemes.SCHEMES for dtype in schemes.load(name).DTYPES))
    yield _row("device", *(f"backend `{name}`" for name in SUPPORTS))
    yield _row(*["---"] * (len(SUPPORTS) + 1))
    for device, target in TARGETS.items():
        cells = []
        for reasons in SUPPORTS.values():
            taken = [dtype for dtype in dtypes if not reasons(_typical(dtype), target)]
            cells.append(_code(taken) or "no")
        yield _row(device, *cells)


def _typical(dtype: str) -> Problem:
    return Problem(
        tokens=512, top_k=8, experts=128, hidden=2048, intermediate=768, dtype=dtype, activation=Activation("silu")
    )


def supported() -> str:
    """What is accepted, and which device takes what, in Markdown."""
    return "\n".join([*_options(), "", *_devices()])


def _performance() -> Iterable[str]:
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {(row["shape"], row["tokens"]): row for row in data["rows"]}
    shapes, tokens = (list(dict.fromkeys(key[i] for key in rows)) for i in (0, 1))
    ceilings, versions = data["ceilings"], data["versions"]
    yield (
        f"{data['device']}, bfloat16, torch {versions['torch']}, Triton {versions['triton']}; copy "
        f"{ceilings['bandwidth_gbps']:.0f} GB/s, matrix product {ceilings['tflops']:.0f} TFLOP/s, empty launch "
        f"{ceilings['launch_us']:.1f} µs in the same run."
    )
    yield ""
    yield _row("µs (multiple of the floor; times as fast as vLLM 0.22.1)", *(f"T = {t}" for t in tokens))
    yield _row(*["---"] * (len(tokens) + 1))
    for shape in shapes:
        cells = []
        for t in tokens:
            row = rows[shape, t]
            cells.append(f"{row['us']:.0f} ({row['times_floor']:.2f}; {row['faster_than_peer']:.2f})")
        yield _row(shape, *cells)
    yield ""
    yield _row("TFLOP/s", *(f"T = {t}" for t in tokens if t >= 512))
    yield _row(*["---"] * (sum(t >= 512 for t in tokens) + 1))
    for shape in shapes:
        yield _row(shape, *(f"{rows[shape, t]['tflops']:.0f}" for t in tokens if t >= 512))


def performance() -> str:
    """The committed measurement, in Markdown."""
    return "\n".join(_performance())


def replaced(readme: str) -> str:
    """The README's text with fresh tables between its markers."""
    for name, table in (("supported", supported()), ("performance", performance())):
        begin, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(supported(), performance(), sep="\n\n")
