"""Tables for people; programs take ``--json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusedmoe.bench import Peer, Row
from fusedmoe.plan.floor import Ceilings
from fusedmoe.selftest import Result

if TYPE_CHECKING:
    from fusedmoe.cli.run import Report


def _console() -> Console:
    return Console(highlight=False)


def _facts(title: str, facts: Mapping[str, object]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(str(value)))
    _console().print(table)


def _us(value: float) -> str:
    return f"{value:.1f} µs" if value < 1e4 else f"{value / 1e3:.1f} ms"


def report(found: Report) -> None:
    """The result of ``fusedmoe run``."""
    facts = {
        "checkpoint": f"{found.checkpoint}; layer {found.layer}",
        "hidden states": f"{found.hidden_states}: {found.tokens} x {found.hidden}",
        "experts": f"{found.experts}, {found.top_k} per token, {found.distinct} in use, intermediate size "
        f"{found.intermediate}, {found.activation}",
        "type, device": f"{found.dtype}, {found.device}",
        "backend": f"{found.backend}: {found.why}",
        **{f"not {name}": "; ".join(reasons) for name, reasons in found.refused.items()},
        "config": found.config,
        "time": _us(found.us),
        "floor": f"{_us(found.floor_us)}, bound by {found.floor_bound}; the time is {found.times_floor:.2f} times that",
        "error": f"{found.error:.2e}, relative, against the reference in {found.reference} on {found.rows} tokens",
        "tolerance": f"{found.tolerance:.2e}",
        **({"written": found.output} if found.output else {}),
        "result": "right" if found.ok else "WRONG",
    }
    _facts("fusedmoe run", facts)


def explanation(found: dict[str, Any]) -> None:
    """The result of ``fusedmoe explain``."""
    target, problem, floor = found["target"], found["problem"], found["floor"]
    facts = {
        "target": f"{target['arch'] or target['vendor']} ({target['like']}): {target['n_sm']} multiprocessors, "
        f"{target['shared_bytes']} bytes of shared memory",
        "call": f"T {problem['tokens']}, E {problem['experts']}, top_k {problem['top_k']}, H {problem['hidden']}, "
        f"I {problem['intermediate']}, {problem['dtype']}, {problem['activation']['name']}",
        "weights": "; ".join(
            f"{name} {one['format']}, {one['bytes_per_weight']:.3g} bytes each, multiplied as {one['multiplied_as']}"
            for name, one in found["weights"].items()
        ),
        "backend": f"{found['backend']}: {found['why']}",
        **{f"not {name}": "; ".join(reasons) for name, reasons in found["others"].items()},
        "workspace": "unknown without the backend's package"
        if found["workspace_bytes"] is None
        else f"{found['workspace_bytes']} bytes",
        "floor": found["floor_source"]
        if floor is None
        else f"{_us(floor['us'])}, bound by {floor['bound']} ({found['floor_source']})",
    }
    _facts("fusedmoe explain", facts)
    table = Table(title="launches", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("kernel", no_wrap=True)
    table.add_column("config", overflow="fold")
    for launch in found["launches"]:
        table.add_row(launch["kernel"], " ".join(f"{k}={v}" for k, v in launch.get("config", {}).items()))
    _console().print(table)


def environment(found: dict[str, Any]) -> None:
    """The result of ``fusedmoe env``."""
    _facts("versions", {name: version or "not installed" for name, version in found["versions"].items()})
    for device in found["devices"]:
        facts = ", ".join(f"{k}={v}" for k, v in device.items() if k not in ("device", "name"))
        _facts("", {device["device"]: f"{device['name']}: {facts}"})
    _facts("settings", {one["variable"]: f"{name} = {one['value']}" for name, one in found["settings"].items()})
    _facts(
        "backends, for bfloat16 on the default device",
        {
            name: "available" if one["available"] else "; ".join(one["reasons"])
            for name, one in found["backends"].items()
        },
    )


def capability(result: Result) -> None:
    """One line of ``fusedmoe check``."""
    error = "" if result.error is None else f"  {result.error:.1e}"
    mark = "[green]ok  [/green]" if result.ok else "[red]FAIL[/red]"
    _console().print(f"{mark}  {escape(result.name):<32}{error}  {escape(result.detail)}".rstrip(), soft_wrap=True)


def ceilings(found: Ceilings, device: str, types: Iterable[str], peers: Sequence[Peer]) -> None:
    """What ``fusedmoe bench`` measured before anything else."""
    rates = [
        f"{kind} {found.tflops[kind]:.3g} TFLOP/s" if kind in found.tflops else f"{kind} unknown, PyTorch has none here"
        for kind in sorted(types)
    ]
    _facts(
        "fusedmoe bench",
        {
            "device": device,
            "ceilings": f"copy {found.bandwidth_gbps:.0f} GB/s read + written, matrix product {', '.join(rates)}, "
            f"empty launch {found.launch_us:.1f} µs",
            "floor": "max(weights of the distinct experts / copy, flops / matrix product) + empty launch",
            **{
                f"{peer.name}, {peer.scheme or peer.dtype}": f"{peer.device}, {peer.dtype}. {peer.source}"
                for peer in peers
            },
        },
    )


def beside(row: Row, peers: Sequence[Peer]) -> dict[str, Any]:
    """The figure for a row of the first peer that has one, and how many times faster the row is."""
    for peer in peers:
        us = peer.us.get((row.shape, row.tokens))
        if us is not None and (peer.dtype, peer.scheme) == (row.dtype, row.scheme):
            return {"peer": peer.name, "peer_us": us, "faster_than_peer": None if row.us is None else us / row.us}
    return {"peer": None, "peer_us": None, "faster_than_peer": None}


def rows(found: Sequence[Row], peers: Sequence[Peer]) -> None:
    """The rows of one shape and scheme."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    skewed = any(row.routing != "uniform" for row in found)
    heads = ["shape", "format", *(["routing"] if skewed else []), "T", "µs", "TFLOP/s", "floor µs", "x floor", "error"]
    hosted = any(row.host_us is not None for row in found)
    heads += ["host µs"] if hosted else []
    heads += ["peer", "peer µs", "times faster"] if peers else []
    for head in [*heads, "backend"]:
        left = head in ("shape", "format", "routing", "peer", "backend")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    table.add_column("config", overflow="fold")
    for row in found:
        facts = [row.shape, row.format or row.dtype, *([row.routing] if skewed else []), str(row.tokens)]
        figures = _figures(row)
        if hosted:
            figures.append("" if row.host_us is None else f"{row.host_us:.0f}")
        if peers:
            name, *numbers = beside(row, peers).values()
            figures += [name or "", *("" if value is None else f"{value:.2f}" for value in numbers)]
        table.add_row(*facts, *figures, row.backend, escape(_remark(row)))
    # A file has no width of its own; there a row stays on its line.
    console = _console()
    (console if console.is_terminal else Console(highlight=False, width=320)).print(table)


def _figures(row: Row) -> list[str]:
    """µs, TFLOP/s, floor, multiple of it, error."""
    floor = f"{row.floor_us:.1f}"
    if row.us is None or row.tflops is None or row.error is None:
        error = (
            "" if row.error is None else f"{row.error:.1e} > {row.tolerance:.1e}" if row.wrong else f"{row.error:.1e}"
        )
        return ["WRONG" if row.wrong else "-", "", floor, "", error]
    return [f"{row.us:.1f}", f"{row.tflops:.3g}", floor, f"{row.times_floor:.2f}", f"{row.error:.1e}"]


def _remark(row: Row) -> str:
    """How a row came about, or why it has no figure."""
    graph = "launched anew each time, without a CUDA graph" if row.graph is False else ""
    library = "" if row.library.startswith("fusedmoe ") else row.library
    return "; ".join(part for part in (library, row.config, graph, row.reason) if part)
