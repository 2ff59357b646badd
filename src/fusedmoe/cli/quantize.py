"""``fusedmoe quantize``: a checkpoint's experts into another directory, with a report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fusedmoe.cli.options import Json, as_json, device_from
from fusedmoe.errors import OptionError, explain


def _block(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().replace("x", ",").split(",")
    if len(sides) != 2 or not all(side.strip().isdecimal() for side in sides):
        wanted = "rows x columns, such as 128x128, 0 for all"
        raise OptionError(explain("--block", got=repr(text), wanted=wanted, do="Write for example 128x128."))
    return int(sides[0]), int(sides[1])


def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Unquantised checkpoint in the Hugging Face format.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make; it must not exist.")],
    scheme: Annotated[str, typer.Option(help="Name of a scheme, such as fp8_block, int4_w4a16 or mxfp4.")],
    group: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 for all.")] = None,
    block: Annotated[str | None, typer.Option(help="Rows and columns that share a scale, such as 128x128.")] = None,
    zero: Annotated[bool, typer.Option("--zero", help="With zero points.")] = False,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Limit of a file, in 10^9 bytes.")] = 5.0,
    device: Annotated[str | None, typer.Option(help="Where to compute; the first GPU, else the CPU.")] = None,
    json: Json = False,
) -> None:
    """Quantise the experts of a checkpoint, rounding to nearest, and report the errors of each layer."""
    from fusedmoe.checkpoint.convert import quantize_checkpoint

    made = quantize_checkpoint(
        source,
        target,
        scheme,
        group=group,
        block=_block(block),
        zero=zero,
        shard_bytes=int(shard_gb * 1e9),
        device=device_from(device),
    )
    if json:
        typer.echo(as_json({"target": str(target), **asdict(made)}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("layer", "experts", "w13 error", "worst expert", "w2 error", "worst expert"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in made.layers:
        errors = (row.w13, row.w13_max, row.w2, row.w2_max)
        table.add_row(str(row.layer), str(row.experts), *(f"{error:.2e}" for error in errors))
    console = Console(highlight=False)
    console.print(table)
    sizes = f"{made.bytes_before / 1e9:.3g} GB -> {made.bytes_after / 1e9:.3g} GB in {len(made.files)} files"
    console.print(f"{made.format}, as {made.method}: {sizes}, {target}", markup=False, soft_wrap=True)
