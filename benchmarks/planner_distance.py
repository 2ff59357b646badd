"""How far the planner without files is from the best tiles that a search finds: the geometric mean over points.

    python benchmarks/planner_distance.py --write DIR [--keep 48] [--shapes ...] [--schemes ...] [--routing ...]
                                          [--tokens ...]

A point is a shape, a scheme, a law of routing and a number of tokens: by default five shapes, bfloat16, uniform, eight
numbers of tokens. DIR keeps what was measured, and a run that was interrupted goes on where it was. Without --keep
every neighbour of every kind of tiles is measured, hundreds to a point; with it, that many to a GEMM and kind, the
likeliest first.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path

import torch

from fusedmoe.bench import ROUTINGS, SHAPES, default_device, dtype_of, shape_of
from fusedmoe.tune import tune

TOKENS = (1, 8, 32, 128, 512, 2048, 4096, 8192)
#: What the planner is to keep.
TARGET = 1.10


def main() -> None:
    """Measure, and print a line per point and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--keep", type=int)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=["none"])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=ROUTINGS[:1])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, help="for a shape, scheme and routing; without end")
    parser.add_argument("--jobs", type=int)
    given = parser.parse_args()
    device, start, distances = default_device(), time.monotonic(), []
    for shape, scheme, routing in itertools.product(given.shapes, given.schemes, given.routing):
        for step in tune(
            shape_of(shape),
            given.tokens,
            dtype=dtype_of(given.dtype),
            device=device,
            scheme=scheme,
            routing=routing,
            folder=given.write / routing,
            command=f"python benchmarks/planner_distance.py --routing {routing}",
            keep=given.keep,
            seconds=given.seconds,
            jobs=given.jobs,
        ):
            entry = step.entry
            if entry is None or not entry.us or not entry.planned_us:
                continue
            distances.append(entry.planned_us / entry.us)
            said = f"planned {entry.planned_us:9.1f} us, best {entry.us:9.1f} us, {distances[-1]:.3f}"
            tried = "measured before" if step.resumed else f"{step.tried} tried"
            print(f"{shape:15} {scheme:12} {routing:8} T {step.tokens:6}: {said}, {tried}", flush=True)
        torch.cuda.empty_cache()
    if not distances:
        raise SystemExit("nothing was measured")
    mean = math.exp(sum(map(math.log, distances)) / len(distances))
    verdict = "kept" if mean <= TARGET else "missed"
    print(f"{len(distances)} points, {time.monotonic() - start:.0f} s: {mean:.3f} of the best in the geometric mean, "
          f"worst {max(distances):.3f}; {TARGET:.2f} is {verdict}")  # fmt: skip


if __name__ == "__main__":
    main()
