"""The commands ``fusedmoe warmup`` and ``fusedmoe tune``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusedmoe.cli.options import (
    Activation,
    Backend,
    Bias,
    Device,
    DType,
    Interleaved,
    Json,
    Scheme,
    as_json,
    device_from,
    integers,
    layout_of,
)
from fusedmoe.errors import OptionError, explain

if TYPE_CHECKING:
    from fusedmoe.tune import Progress
    from fusedmoe.tune.space import Tiles

_Shape = Annotated[str, typer.Argument(help="A known model (see bench), E,top_k,H,I, or the path of a config.json.")]
_Threads = Annotated[int | None, typer.Option(min=1, help="Threads that compile; as many as CPUs, at most 8.")]


def warmup(
    shape: _Shape,
    scheme: Scheme = "none",
    tokens: Annotated[int, typer.Option(min=1, help="The largest T.")] = 8192,
    dtype: DType = "bfloat16",
    activation: Activation = "silu",
    interleaved: Interleaved = False,
    bias: Bias = False,
    device: Device = None,
    backend: Backend = None,
    target: Annotated[
        str | None, typer.Option(help="For a GPU that is not here: its architecture, such as sm_90 or gfx942.")
    ] = None,
    threads: _Threads = None,
    json: Json = False,
) -> None:
    """Compile every kernel for T = 1 to --tokens into Triton's cache on disk, where later processes find them."""
    import torch

    import fusedmoe
    from fusedmoe.bench import draw_layer, dtype_of, shape_of

    if target is not None and device is not None:
        got, do = f"--device {device} --target {target}", "Leave one of them out."
        raise OptionError(explain("options", got=got, wanted="a GPU that is here, or one that is not", do=do))
    layer = draw_layer(
        shape_of(shape),
        dtype=dtype_of(dtype),
        device=device_from(device) if target is None else torch.device("cpu"),
        scheme=scheme,
        activation=activation,
        gate_up_layout=layout_of(interleaved),
        bias=bias,
        values=False,
    )
    x, w13, w2, weights, ids = layer.call(tokens)

    def call(n: int) -> object:
        return fusedmoe.fused_experts(x[:n], w13, w2, weights[:n], ids[:n], backend=backend, **layer.options)

    done = fusedmoe.warmup(call, tokens, threads=threads, target=target)
    if json:
        typer.echo(as_json(asdict(done)))
    else:
        typer.echo(f"{done.variants} kernels for T = 1 to {tokens} in {done.seconds:.1f} s")


def tune(
    shape: _Shape,
    scheme: Scheme = "none",
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, such as 1,8,32; powers of two to 8192.")
    ] = None,
    routing: Annotated[str, typer.Option(help="How experts are drawn: uniform or zipf.")] = "uniform",
    dtype: DType = "bfloat16",
    activation: Activation = "silu",
    interleaved: Interleaved = False,
    bias: Bias = False,
    device: Device = None,
    write: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the file; the user's cache, which the planner reads.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="For all together; 100, without end if exhaustive.")
    ] = None,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Measure every neighbour, not the likeliest.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the file has already.")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes that compile; as many as CPUs, at most 16.")
    ] = None,
    vllm: Annotated[bool, typer.Option("--vllm", help="Write beside it the file that vLLM would look for.")] = False,
    from_vllm: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Measure nothing: take the tiles of a tuned file of vLLM.")
    ] = None,
) -> None:
    """Find the fastest tiles of a layer on this device, number of tokens by number of tokens, and write them down."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress as Bar

    from fusedmoe.bench import dtype_of, routing_of, shape_of
    from fusedmoe.tune import KEEP, SECONDS, TOKENS, export, take_over, tune as search

    layer: dict[str, Any] = {
        "dtype": dtype_of(dtype), "device": device_from(device), "scheme": scheme, "folder": write,
        "activation": activation, "gate_up_layout": layout_of(interleaved),
    }  # fmt: skip
    one = shape_of(shape)
    command = "fusedmoe tune " + " ".join(sys.argv[2:])
    if from_vllm is not None:
        written, refused = take_over(one, _text(from_vllm), command=command, **layer)
        for n, reasons in refused.items():
            typer.echo(f"T {n}: left out: {'; '.join(reasons)}", err=True)
        typer.echo(f"written: {written}")
        return
    counts = sorted(set(TOKENS if tokens is None else integers("--tokens", tokens)))
    path: Path | None = None
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=len(counts))
        for step in search(
            one,
            counts,
            routing=routing_of(routing),
            command=command,
            keep=None if exhaustive else KEEP,
            seconds=seconds or (None if exhaustive else SECONDS),
            jobs=jobs,
            again=again,
            bias=bias,
            note=lambda step: bar.update(task, description=escape(_best(step))),
            **layer,
        ):
            typer.echo(_line(step))
            bar.update(task, completed=counts.index(step.tokens) + 1)
            path = step.path
    if path is None:
        raise OptionError(
            explain("tuning", got="no time of any call", wanted="one that runs", do="Try fusedmoe check.")
        )
    typer.echo(f"written: {path}")
    if vllm:
        typer.echo(f"written: {export(one, **layer)}")


def _best(step: Progress) -> str:
    """The best so far, on one line."""
    return f"T {step.tokens}" + ("" if step.tiles is None else f": {step.us:.1f} us, {_tiles(step.tiles)}")


def _tiles(tiles: Tiles) -> str:
    from fusedmoe.bench.layer import describe_tile, path_of

    path = path_of(few=tiles.few, gate_up=tiles.gate_up)
    return f"{path}; {describe_tile(tiles.gate_up)}; {describe_tile(tiles.down)}"


def _line(step: Progress) -> str:
    """The result for a number of tokens, on one line."""
    entry, said = step.entry, "in the file already" if step.resumed else f"{step.tried} tried"
    if entry is None or entry.us is None or entry.planned_us is None:
        return f"T {step.tokens}: as planned; {said}"
    if entry.gate_up is None:
        return f"T {step.tokens}: {entry.us:.1f} us, as planned; {said}"
    gain = entry.planned_us / entry.us - 1
    said += "" if step.tiles is None else f"; {_tiles(step.tiles)}"
    return f"T {step.tokens}: {entry.us:.1f} us, planned {entry.planned_us:.1f} (+{gain:.0%}); {said}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise OptionError(explain(f"file {path}", got=cause, wanted="a readable file", do="Check the path.")) from cause
