"""Expert parallelism on the GPUs of this machine: dispatch, experts and combine apart, the whole, and one GPU alone.

``NCCL_NVLS_ENABLE=0 python benchmarks/parallel.py --json FILE --plot FILE``

NVLink multicast is off (NCCL_NVLS_ENABLE=0, which the script sets unless it is set already): some machines do not allow
it, and all-to-all does not use it. Starts one process per GPU itself; ``--ranks 2`` takes some. Needs torch and triton,
and matplotlib for the picture. Two GPUs take about two minutes.

Every rank has T tokens with uniform random experts. "alone" is one GPU with its share: E / R experts, T tokens that
choose all of their top_k among them, one call of the layer, a replayed graph. Times are medians, of the slowest rank,
with 256 MB written before each call so that L2 is cold. "exact" reads the number of rows on the host, launched call by
call; "graph" is the padded mode, a replayed CUDA graph; each with the tokens in 1 and in 2 parts. Dispatch, experts and
combine apart are those of the exact mode in one part: the first has the exchange of counts in it, the last the sum.
"efficiency" is alone / the best. Before it is timed, a layer is verified on the first tokens of every rank against the
reference.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fusedmoe
from fusedmoe import reference
from fusedmoe.bench import plot
from fusedmoe.bench.routing import draw_routing
from fusedmoe.bench.shapes import SHAPES, Shape, format_for, shape_of
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.modular import Experts
from fusedmoe.parallel import ExpertParallel, Placement
from fusedmoe.testing.cases import random_matrix
from fusedmoe.testing.ranks import Ranks
from fusedmoe.testing.verify import relative_error, tolerance, true_float32

LAYERS = (SHAPES["qwen3-30b-a3b"], Shape("dsv3", 256, 8, 7168, 2048))
TOKENS = (128, 1024, 8192)
SCHEMES = ("none", "fp8_block")
FLUSH = 256 << 20
REPEATS, VERIFIED = 15, 32
WAYS = ("exact", "exact, 2 parts", "graph", "graph, 2 parts")


def draw_experts(shape: Shape, count: int, scheme: str, generator: torch.Generator) -> Experts:
    """Random experts, in bfloat16 or codes."""
    form, h, i = format_for(scheme, shape), shape.hidden, shape.intermediate

    def draw(n: int, k: int, parts: int) -> Tensor | ExpertMatrix:
        if form is not None:
            return random_matrix(form, (count, n, k), generator, parts=parts)
        w = torch.empty(count, n, k, dtype=torch.bfloat16, device=generator.device)
        return w.normal_(0.0, k**-0.5, generator=generator)

    return Experts(draw(2 * i, h, 2), draw(h, i, 1))


def median_us(call: Callable[[], object]) -> float:
    """Median over REPEATS calls that the ranks start together: as many on all ranks, as calls wait for each other."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    together = torch.zeros(1, device="cuda")
    times = []
    for number in range(REPEATS + 2):
        flush.zero_()
        dist.all_reduce(together)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(1e3 * start.elapsed_time(end))
    return slowest(statistics.median(times))


def slowest(value: float) -> float:
    """The largest of all ranks."""
    found = torch.tensor([value], device="cuda")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def replay(call: Callable[[], object]) -> Callable[[], object]:
    """A captured graph of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def steps_us(layer: ExpertParallel, arguments: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float, float]:
    """Dispatch, experts and combine of the exact mode, one after the other."""
    path, flush = layer.transport, torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    out, together = torch.empty_like(arguments[0]), torch.zeros(1, device="cuda")
    times: list[list[float]] = []
    for number in range(REPEATS + 2):
        flush.zero_()
        dist.all_reduce(together)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        marks[0].record()
        part = path.layout(*arguments)
        path.exchange_counts([part], 1)
        path.send(part)
        prepared = path.prepared(part)
        marks[1].record()
        rows = prepared.hidden_states
        answers = torch.empty(rows.shape, dtype=out.dtype, device=out.device)
        assert layer.layer is not None
        layer.layer.apply(
            *(answers, rows, prepared.topk_weights, prepared.topk_ids),
            hidden_states_scale=prepared.hidden_states_scale,
            expert_map=prepared.expert_map,
        )
        marks[2].record()
        path.send_back(part, answers)
        path.reduce(part, out)
        marks[3].record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append([1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
    dispatch, experts, combine = (slowest(statistics.median(column)) for column in zip(*times, strict=True))
    return dispatch, experts, combine


def error_of(layer: ExpertParallel, experts: Experts, arguments: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative error on the first tokens of all ranks, each of which computes its experts' part; and its bound."""
    got = layer(*arguments)
    n_tokens = min(VERIFIED, got.shape[0])
    x, weights, ids = ([torch.empty_like(t[:n_tokens]) for _ in range(dist.get_world_size())] for t in arguments)
    for parts, own in zip((x, weights, ids), arguments, strict=True):
        dist.all_gather(parts, own[:n_tokens].contiguous())
    every_x, every_weight, every_id = (torch.cat(parts) for parts in (x, weights, ids))
    expert_map = layer.transport.expert_map  # the placement is contiguous and even: places are ids
    with true_float32():
        want = reference.fused_experts(
            *(every_x, experts.w13, experts.w2, every_weight, every_id), expert_map=expert_map, dtype=torch.float32
        )
    dist.all_reduce(want)
    mine = want[dist.get_rank() * n_tokens :][:n_tokens]
    forms = [w.format if isinstance(w, ExpertMatrix) else None for w in (experts.w13, experts.w2)]
    return slowest(relative_error(got[:n_tokens], mine)), tolerance(torch.bfloat16, *forms) + 2.0**-8


@torch.no_grad()
def measure(shape: Shape, scheme: str, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """One layer on this rank and all others."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if shape.experts % ranks or shape.experts // ranks < shape.top_k:
        raise SystemExit(f"{shape.name}: {shape.experts} experts are no share of {ranks} ranks with top_k each")
    generator = torch.Generator("cuda").manual_seed(rank)
    placement = Placement.contiguous(shape.experts, ranks)
    experts = draw_experts(shape, shape.experts // ranks, scheme, generator)
    how = {"placement": placement, "top_k": shape.top_k, "dtype": torch.bfloat16}
    rows = []
    for n_tokens in tokens:
        x = torch.empty(n_tokens, shape.hidden, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        arguments = (x, *draw_routing("uniform", n_tokens, shape.experts, shape.top_k, generator))
        out = torch.empty_like(x)
        layers = {
            way: ExpertParallel(
                None, experts, parts=1 + ("2" in way), max_tokens=n_tokens if "graph" in way else None, **how
            )
            for way in WAYS
        }
        error, bound = error_of(layers["exact"], experts, arguments)
        if not error <= bound:
            raise SystemExit(f"{shape.name} {scheme} T = {n_tokens}: error {error:.1e} > {bound:.1e}")
        us = {}
        for way, layer in layers.items():
            call = functools.partial(layer, *arguments, out=out)
            call()
            us[way] = median_us(replay(call) if "graph" in way else call)
        dispatch, apart, combine = steps_us(layers["exact"], arguments)
        share = draw_routing("uniform", n_tokens, shape.experts // ranks, shape.top_k, generator)

        alone = functools.partial(fusedmoe.fused_experts, x, experts.w13, experts.w2, *share, out=out)
        alone_us, best = median_us(replay(alone)), min(us.values())
        sent = layers["exact"].transport
        rows.append(
            {
                "shape": shape.name,
                "scheme": scheme,
                "tokens": n_tokens,
                "ranks": ranks,
                "us": us,
                "dispatch_us": dispatch,
                "experts_us": apart,
                "combine_us": combine,
                "alone_us": alone_us,
                "efficiency": alone_us / best,
                "row_bytes": sent.wire.row_bytes,
                "error": error,
                "tolerance": bound,
            }
        )
        if rank == 0:
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    ways = "  ".join(f"{way} {us:.0f}" for way, us in row["us"].items())
    return (
        f"{row['shape']:14} {row['scheme']:10} T={row['tokens']:<5} alone {row['alone_us']:.0f} us | {ways} | "
        f"dispatch {row['dispatch_us']:.0f} experts {row['experts_us']:.0f} combine {row['combine_us']:.0f} | "
        f"efficiency {row['efficiency']:.2f}"
    )


def about() -> dict[str, Any]:
    """What was measured on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {"device": properties.name, "torch": torch.__version__, "triton": triton.__version__, "nccl": nccl,
            "fusedmoe": fusedmoe.__version__, "ranks": dist.get_world_size()}  # fmt: skip


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> Iterator[Path]:
    """Bars of the steps, of every way, and of one GPU alone."""
    plot.require_matplotlib()
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["shape"], row["scheme"]) for row in rows))
    figure = Figure(figsize=(plot.WIDTH * 2, plot.HEIGHT * -(-len(panels) // 2) + 0.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        group = [row for row in rows if (row["shape"], row["scheme"]) == panel]
        width = 0.8 / (len(WAYS) + 2)
        for place, row in enumerate(group):
            floor = row["alone_us"]
            axis.bar(place, 1.0, width, color=plot.COLOURS[7], label="one GPU alone" if not place else None)
            bottom = 0.0
            for step, colour in zip(("dispatch", "experts", "combine"), plot.COLOURS[:3], strict=True):
                height = row[f"{step}_us"] / floor
                label = f"{step} (exact)" if not place else None
                axis.bar(place + width, height, width, bottom=bottom, color=colour, label=label)
                bottom += height
            for number, (way, us) in enumerate(row["us"].items()):
                label = way if not place else None
                axis.bar(place + (2 + number) * width, us / floor, width, color=plot.COLOURS[3 + number], label=label)
            axis.text(place, 1.02, f"{floor:.0f} µs", fontsize=7, ha="center")
        axis.set_xticks([p + 2.5 * width for p in range(len(group))], [f"T = {row['tokens']} a rank" for row in group])
        axis.set_ylabel("time / one GPU with its share")
        axis.set_title(" ".join(panel), loc="left")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=8, loc="outside lower center")
    yield from plot.save(figure, path)


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count())
    parser.add_argument("--shape", action="append", help="of fusedmoe bench, or dsv3; repeatable")
    parser.add_argument("--scheme", action="append", help="none or a scheme; repeatable")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="of a rank, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.ranks < 2:
        raise SystemExit("needs two GPUs")
    if options.plot is not None:
        plot.require_matplotlib()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    known = {shape.name: shape for shape in LAYERS}
    shapes = [known.get(name) or shape_of(name) for name in options.shape or known]
    tokens = tuple(map(int, options.tokens.split(",")))
    pool, rows = Ranks(options.ranks, "nccl", timeout_s=300.0), []
    try:
        facts = pool.run(about)[0]
        for shape in shapes:
            for scheme in options.scheme or SCHEMES:
                rows += pool.run(measure, shape, scheme, tokens)[0]
    finally:
        pool.close()
    command = " ".join(["python", "benchmarks/parallel.py", *sys.argv[1:]])
    if options.json is not None:
        text = json.dumps({"command": command, **facts, "rows": rows}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        title = f"Expert parallelism, {facts['ranks']} x {facts['device']}, NCCL {facts['nccl']}"
        for path in draw(rows, options.plot, title):
            print(path)


if __name__ == "__main__":
    main()
