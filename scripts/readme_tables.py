#!/usr/bin/env python3
"""The tables of README.md: what the library supports, read from the code, and what a benchmark measured.

python scripts/readme_tables.py            prints them
python scripts/readme_tables.py --write    puts them between the markers of README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fusedmoe import checks
from fusedmoe.plan.arithmetic import multiply_in
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.spec.activation import REQUIRED, TABLE, Activation
from fusedmoe.spec.format import ELEMENTS
from fusedmoe.spec.layout import FP32_PRECISIONS, GATE_UP_LAYOUTS, WEIGHT_LAYOUTS
from fusedmoe.spec.problem import Problem
from fusedmoe.target import KNOWN, Target
from fusedmoe.testing.verify import TOLERANCE

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

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
#: Words for what shares a scale: weights, and the rows that meet them.
SHARED = {"tensor": "expert", "channel": "row", "block": "block"}
MODES = {"token": "per row", "group": "per row and block", "tensor": "for all rows", "static": "that is given"}


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
    yield _row(
        "types, with the relative error that the tests allow an unquantised layer",
        ", ".join(f"`{dtype}` {bound:.1e}" for dtype, bound in TOLERANCE.items()),
    )
    yield _row("products of float32", _code(FP32_PRECISIONS))
    yield _row("activations, gated", ", ".join(_activation(n) for n, (arity, _) in TABLE.items() if arity == 2))
    yield _row("activations, not gated", ", ".join(_activation(n) for n, (arity, _) in TABLE.items() if arity == 1))
    yield _row("rows of `w13`", _code(GATE_UP_LAYOUTS))
    yield _row("storage of experts", f"{_code(WEIGHT_LAYOUTS)}; any strides")
    yield _row("router weights, biases", _types(checks._FLOATS))
    yield _row("expert ids, expert map", f"{_types(checks._INTEGERS)}; an id without an expert adds nothing")
    yield _row("experts per token", f"1 to {checks.MAX_TOP_K}")
    yield _row("experts", f"1 to {checks.MAX_EXPERTS}")


def _schemes() -> Iterable[str]:
    yield _row("scheme", "weights", "scales", "rows", "multiplied as codes on")
    yield _row(*["---"] * 5)
    for name, has in SCHEMES.items():
        groups = {"group": f"{' or '.join(map(str, has.groups))} columns of a row"}
        scales = f"{_code(has.scales)} per {', '.join({**SHARED, **groups}[kind] for kind in has.granularities)}"
        scales += "; one more `float32` per expert" if has.tensor_scale else ""
        weights = _code(has.elements) + ("; with or without zero points" if has.zero else "")
        modes = [mode for mode in has.inputs if mode is not None]
        rows = f"`{has.input_element}`, a scale {', '.join(MODES[mode] for mode in modes)}" if modes else "as they are"
        yield _row(f"`{name}`", weights, scales, rows, _native(name) if modes else "")


def _native(scheme: str) -> str:
    """Devices that multiply the codes of a scheme, of one of its elements, as they are."""
    found = {}
    for device, target in TARGETS.items():
        for element in SCHEMES[scheme].elements:
            gemm = replace(_typical("float16").gate_up_gemm, format=format_of(scheme, element=element))
            if target.vendor != "cpu" and multiply_in(gemm, target) in ELEMENTS:
                found[device] = multiply_in(gemm, target)
    return ", ".join(f"{device} (`{kind}`)" for device, kind in found.items()) or "none; decoded in the kernel"


def _devices() -> Iterable[str]:
    yield _row("device", *(f"backend `{name}`" for name in SUPPORTS))
    yield _row(*["---"] * (len(SUPPORTS) + 1))
    for device, target in TARGETS.items():
        cells = []
        for reasons in SUPPORTS.values():
            taken = [dtype for dtype in TOLERANCE if not reasons(_typical(dtype), target)]
            cells.append(_code(taken) or "no")
        yield _row(device, *cells)


def _typical(dtype: str) -> Problem:
    return Problem(
        tokens=512, top_k=8, experts=128, hidden=2048, intermediate=768, dtype=dtype, activation=Activation("silu")
    )


def supported() -> str:
    """What is accepted, and which device takes what, in Markdown."""
    return "\n".join([*_options(), "", *_schemes(), "", *_devices()])


def _performance() -> Iterable[str]:
    measured: dict[str | None, tuple[dict[str, Any], dict[tuple[str, int], dict[str, Any]]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        for row in data["rows"]:
            rows = measured.setdefault(row["scheme"], (data, {}))[1]
            rows.setdefault((row["shape"], row["tokens"]), row)
    for scheme in (None, *SCHEMES):
        if scheme in measured:
            yield from _measured(scheme, *measured[scheme])
            yield ""


def _measured(scheme: str | None, data: dict[str, Any], rows: dict[tuple[str, int], dict[str, Any]]) -> Iterable[str]:
    """One scheme: where it was measured, time by shape and tokens, and the rates of large calls."""
    shapes, tokens = list(dict.fromkeys(shape for shape, _ in rows)), list(dict.fromkeys(t for _, t in rows))
    ceilings, versions = data["ceilings"], data["versions"]
    kinds = {row["dtype"] for row in rows.values()}
    peers = sorted({row["peer"] for row in rows.values() if row["peer"]})
    rates = ", ".join(f"{kind} {rate:.0f}" for kind, rate in ceilings["tflops"].items())
    yield (
        f"{f'`{scheme}`, ' if scheme else ''}{', '.join(sorted(kinds))}: {data['device']}, torch {versions['torch']}, "
        f"Triton {versions['triton']}; copy {ceilings['bandwidth_gbps']:.0f} GB/s, matrix product {rates} TFLOP/s, "
        f"empty launch {ceilings['launch_us']:.1f} µs in the same run." + _later(data)
    )
    yield ""
    against = f"; times as fast as {' or '.join(peers)}" if peers else ""
    yield _row(f"µs (multiple of the floor{against})", *(f"T = {t}" for t in tokens))
    yield _row(*["---"] * (len(tokens) + 1))
    for shape in shapes:
        yield _row(shape, *(_time(rows.get((shape, t))) for t in tokens))
    if scheme is None:
        yield ""
        yield _row("TFLOP/s", *(f"T = {t}" for t in tokens if t >= 512))
        yield _row(*["---"] * (sum(t >= 512 for t in tokens) + 1))
        for shape in shapes:
            yield _row(shape, *(f"{rows[shape, t]['tflops']:.0f}" for t in tokens if t >= 512))


def _later(data: dict[str, Any]) -> str:
    """A sentence of the rows that were measured again, since their kernels are others now."""
    if (later := data.get("later")) is None:
        return ""
    tokens, copy = ", ".join(map(str, later["tokens"])), later["ceilings"]["bandwidth_gbps"]
    return f" T = {tokens} in a later run: copy {copy:.0f} GB/s."


def _time(row: dict[str, Any] | None) -> str:
    if row is None or row["us"] is None:
        return "" if row is None else "wrong"
    faster = "" if row["faster_than_peer"] is None else f"; {row['faster_than_peer']:.2f}"
    return f"{row['us']:.0f} ({row['times_floor']:.2f}{faster})"


def performance() -> str:
    """The committed measurements, in Markdown."""
    return "\n".join(_performance()).strip()


def replaced(readme: str) -> str:
    """The README's text with fresh tables between its markers."""
    for name, table in (("supported", supported()), ("performance", performance())):
        begin, end = f"<!-- --8<-- [start:{name}] -->", f"<!-- --8<-- [end:{name}] -->"
        before, rest = readme.split(begin)
        _, after = rest.split(end)
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(supported(), performance(), sep="\n\n")
