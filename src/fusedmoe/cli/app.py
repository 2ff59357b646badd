"""The commands: options in, exit code out. What they do is in the modules beside this one and below."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fusedmoe.atomic import replacing
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
from fusedmoe.cli.quantize import quantize
from fusedmoe.cli.tuning import tune, warmup
from fusedmoe.errors import FusedMoEError, OptionError, explain

if TYPE_CHECKING:
    import torch

    from fusedmoe.bench import Shape

#: Exit codes beside 0.
WRONG, REFUSED = 1, 2

Invariant = Annotated[
    bool, typer.Option("--batch-invariant", help="A row's bits depend on its own token alone, whatever T is.")
]


class _Commands(TyperGroup):
    """An error of the library is a message on stderr and exit code 2, not a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FusedMoEError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(REFUSED) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="The experts of a mixture-of-experts layer as fused GPU kernels.",
    epilog="Exit codes: 0 fine, 1 a result was wrong, 2 wrong usage or an error that the library explains.",
)

app.command("quantize")(quantize)
app.command("tune")(tune)
app.command("warmup")(warmup)


@app.command()
def run(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Directory in the Hugging Face format; without, a small Qwen3-MoE is written and used."),
    ] = None,
    layer: Annotated[int, typer.Option(min=0, help="Layer of the checkpoint.")] = 0,
    hidden: Annotated[
        Path | None, typer.Option(help='safetensors file with a tensor "hidden_states" [..., H].')
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text: its tokens' embeddings, scaled to unit RMS, are the hidden states.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Random hidden states, when neither of these is given.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; as stored when left out.")] = None,
    device: Device = None,
    backend: Backend = None,
    output: Annotated[
        Path | None, typer.Option(help="safetensors file to write: output, hidden_states, topk_weights, topk_ids.")
    ] = None,
    json: Json = False,
) -> None:
    """Run the experts of a checkpoint's layer, verify the result against the reference, and time it."""
    from fusedmoe.bench import dtype_of
    from fusedmoe.cli import show
    from fusedmoe.cli.run import Job, run_layer

    if hidden is not None and text is not None:
        raise OptionError(explain("--hidden and --text", got="both", wanted="one of them", do="Leave one out."))
    job = Job(
        layer=layer,
        hidden=hidden,
        text=text,
        tokens=tokens,
        dtype=None if dtype is None else dtype_of(dtype),
        device=device_from(device),
        backend=backend,
        output=output,
    )
    report = run_layer(checkpoint, job)
    if json:
        typer.echo(as_json({**asdict(report), "ok": report.ok}))
    else:
        show.report(report)
    if not report.ok:
        raise typer.Exit(WRONG)


@app.command("explain")
def explain_command(
    shape: Annotated[str | None, typer.Option(help="A known model (see bench), or E,top_k,H,I.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="E, in place of --shape.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts per token.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="H.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="I.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="T.")] = 128,
    dtype: DType = "bfloat16",
    activation: Activation = "silu",
    interleaved: Interleaved = False,
    weight_layout: Annotated[str, typer.Option(help="Storage of the experts, NK or KN.")] = "NK",
    scheme: Scheme = "none",
    arch: Annotated[
        str | None, typer.Option(help="sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, gfx942 or cpu; this device.")
    ] = None,
    backend: Backend = None,
    batch_invariant: Invariant = False,
    json: Json = False,
) -> None:
    """Say how a call would be run: backend, kernels, tiles, workspace and floor, and why the others not."""
    from fusedmoe.bench import dtype_of, shape_of
    from fusedmoe.cli import show
    from fusedmoe.cli.explanation import explain_call

    sizes = (experts, top_k, hidden, intermediate)
    if (shape is None) == (None in sizes) or shape is not None and any(sizes):
        raise OptionError(
            explain(
                "sizes of the layer",
                got="an incomplete or a double description",
                wanted="--shape, or all of --experts, --top-k, --hidden and --intermediate",
                do="Write for example --shape qwen3-30b-a3b.",
            )
        )
    found = explain_call(
        shape_of(shape if shape is not None else ",".join(map(str, sizes))),
        tokens,
        dtype=dtype_of(dtype),
        activation=activation,
        gate_up_layout=layout_of(interleaved),
        weight_layout=weight_layout,
        scheme=scheme,
        arch=arch,
        backend=backend,
        batch_invariant=batch_invariant,
    )
    if json:
        typer.echo(as_json(found))
    else:
        show.explanation(found)


@app.command()
def env(json: Json = False) -> None:
    """Print versions, devices, settings and backends."""
    from fusedmoe.cli import show
    from fusedmoe.cli.environment import environment

    found = environment()
    if json:
        typer.echo(as_json(found))
    else:
        show.environment(found)


@app.command()
def check(
    device: Device = None,
    backend: Backend = None,
    fuzz: Annotated[
        int | None, typer.Option(min=1, help="Run so many random problems instead, against the reference.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random problems; drawn, and printed, when left out.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that compile, as many as CPUs, at most 16; or share random problems, 1."),
    ] = None,
    json: Json = False,
) -> None:
    """Test every capability on this machine's device, one line each; or random problems."""
    from fusedmoe.cli import show
    from fusedmoe.selftest import selftest

    where = device_from(device)
    if fuzz is not None:
        _fuzz(where, fuzz, seed, jobs or 1, json=json)
        return
    results = []
    for result in selftest(where, backend, jobs):
        results.append(result)
        if not json:
            show.capability(result)
    ok = all(result.ok for result in results)
    if json:
        typer.echo(as_json({"device": str(where), "ok": ok, "results": [asdict(result) for result in results]}))
    else:
        failed = sum(not result.ok for result in results)
        typer.echo(f"{len(results) - failed} of {len(results)} passed on {where}")
    if not ok:
        raise typer.Exit(WRONG)


def _fuzz(device: torch.device, count: int, seed: int | None, jobs: int, *, json: bool) -> None:
    """Random problems: a line for each that is wrong, and one for all."""
    import secrets
    import time

    from fusedmoe.cli.environment import name_of, versions
    from fusedmoe.target import target_of
    from fusedmoe.testing.fuzz import fuzz

    seed = secrets.randbelow(2**32) if seed is None else seed
    typer.echo(f"seed {seed}", err=json)
    start, ran, wrong, worst = time.monotonic(), 0, [], 0.0
    for outcome in fuzz(count, seed, device, jobs=jobs, small=target_of(device).interpret):
        ran += 1
        if not outcome.ok:
            wrong.append(outcome)
            typer.echo(f"FAIL {outcome}", err=json)
        worst = max(worst, (outcome.error or 0.0) / outcome.tolerance)
    seconds = time.monotonic() - start
    if json:
        found = {"device": name_of(device), "versions": versions(), "seed": seed, "problems": ran, "seconds": seconds}
        typer.echo(as_json({**found, "worst": worst, "wrong": [asdict(outcome) for outcome in wrong]}))
    else:
        typer.echo(
            f"{ran} random problems on {name_of(device)}, seed {seed}: {len(wrong)} wrong; "
            f"the largest error is {worst:.2f} of its bound; {seconds:.0f} s"
        )
    if wrong:
        raise typer.Exit(WRONG)


@app.command()
def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A known model, E,top_k,H,I, or the path of a config.json; repeatable; all known models."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, such as 1,8,32.")] = None,
    dtype: DType = "bfloat16",
    scheme: Annotated[
        list[str] | None, typer.Option(help="Quantisation scheme of the experts, or none; repeatable; none.")
    ] = None,
    activation: Activation = "silu",
    interleaved: Interleaved = False,
    bias: Bias = False,
    device: Device = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="auto, gluon_sm90, triton or torch; repeatable: side by side on the same arguments."),
    ] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="How experts are drawn, uniform or zipf; repeatable; uniform.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Another library, run beside ours where it is installed: torch._grouped_mm, transformers-grouped_mm, "
            "transformers-batched_mm, vllm or all; repeatable."
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None, typer.Option(help="Figures of another library, as in benchmarks/peers; repeatable.")
    ] = None,
    batch_invariant: Invariant = False,
    json: Annotated[str | None, typer.Option(metavar="FILE", help="Write JSON there; - is stdout, alone.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw a roofline and bars: FILE.png and FILE.svg.")
    ] = None,
) -> None:
    """Time the layer at the sizes of known models: microseconds, TFLOP/s, multiple of the floor. Verified first."""
    from fusedmoe import bench as benchmark
    from fusedmoe.bench import plot as drawing
    from fusedmoe.cli import show
    from fusedmoe.cli.environment import name_of, versions

    if plot is not None:
        drawing.require_matplotlib()
    where, kind = device_from(device), benchmark.dtype_of(dtype)
    shapes = [benchmark.shape_of(name) for name in shape or benchmark.SHAPES]
    counts = benchmark.TOKENS_CPU if where.type == "cpu" else benchmark.TOKENS
    if tokens is not None:
        counts = tuple(integers("--tokens", tokens))
    schemes = scheme or ["none"]
    figures = [benchmark.read_peer(path) for path in beside or ()]
    how: dict[str, Any] = {
        "dtype": kind,
        "activation": activation,
        "gate_up_layout": layout_of(interleaved),
        "bias": bias,
        "device": where,
        "backends": backend or [None],
        "routings": [benchmark.routing_of(name) for name in routing or ["uniform"]],
        "peers": benchmark.peers_of(peer or ()),
        "batch_invariant": batch_invariant,
    }
    types = _types(shapes, schemes, counts[0], kind, where)
    ceilings = benchmark.measure_ceilings(where, types)
    quiet = json == "-"
    if not quiet:
        show.ceilings(ceilings, name_of(where), types, figures)
    rows = []
    for name in schemes:
        for one in shapes:
            fresh = list(benchmark.bench(one, counts, ceilings=ceilings, scheme=name, **how))
            rows += fresh
            if not quiet:
                show.rows(fresh, figures)
    found = {
        "versions": versions(),
        "device": name_of(where),
        "ceilings": asdict(ceilings),
        "rows": [{**asdict(row), **show.beside(row, figures)} for row in rows],
        "beside": [{key: getattr(one, key) for key in ("name", "device", "scheme", "source")} for one in figures],
    }
    if quiet:
        typer.echo(as_json(found))
    elif json is not None:
        _write(Path(json), as_json(found) + "\n")
    if plot is not None:
        files = drawing.plot([asdict(row) for row in rows], asdict(ceilings), plot, title=name_of(where))
        typer.echo(f"written: {', '.join(map(str, files))}", err=quiet)
    if any(row.wrong for row in rows):
        raise typer.Exit(WRONG)


def _types(
    shapes: Iterable[Shape], schemes: Iterable[str], tokens: int, dtype: torch.dtype, device: torch.device
) -> set[str]:
    """The types in which the device will multiply, whose rates have to be measured."""
    from fusedmoe.bench import format_for, problem_of
    from fusedmoe.plan.floor import types_of
    from fusedmoe.target import target_of

    target = target_of(device)
    problems = [problem_of(one, tokens, dtype, form=format_for(name, one)) for one in shapes for name in schemes]
    return {kind for problem in problems for kind in types_of(problem, target)}


def _write(path: Path, text: str) -> None:
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as cause:
        raise OptionError(
            explain(f"file {path}", got=cause.strerror, wanted="a file that can be written", do="Choose another.")
        ) from cause
