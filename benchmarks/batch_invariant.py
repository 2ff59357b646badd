"""What the batch-invariant mode costs: the layer's time with it over that without, and the geometric mean over a grid.

    python benchmarks/batch_invariant.py [--shapes ...] [--schemes ...] [--tokens ...] [--json FILE]

Both calls are verified, and then timed in turns (without, with, with, without), each the median of a replayed graph, L2
emptied before each. Where both have the same plan they launch the same kernels: the cost is 1, and nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from pathlib import Path

import torch

import fusedmoe
from fusedmoe.bench import SHAPES, Layer, default_device, draw_layer, shape_of, time_us
from fusedmoe.checks import check
from fusedmoe.plan.planner import choose
from fusedmoe.target import target_of
from fusedmoe.testing.verify import Oracle

SCHEMES = ("none", "fp8_block", "fp8_channel", "int8_w8a8", "int8_w8a16", "int4_w4a16", "mxfp4")
TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)
#: What the mode may cost.
TARGET = 1.10


def cost(layer: Layer, tokens: int) -> dict[str, object]:
    """Times of both calls and their ratio; no times where the plan is the same.

    Raises:
        SystemExit: a result is wrong.
    """
    arguments, device = layer.call(tokens), layer.generator.device
    plans = [
        choose(check(*arguments, batch_invariant=mode, **layer.options).problem, target_of(device), "auto")
        for mode in (False, True)
    ]
    if plans[0].triton == plans[1].triton and plans[0].backend == plans[1].backend:
        return {"tokens": tokens, "us": None, "invariant_us": None, "cost": 1.0}
    oracle, times = Oracle(arguments, layer.options, layer.dtype), ([], [])
    calls = [
        functools.partial(fusedmoe.fused_experts, *arguments, batch_invariant=mode, **layer.options)
        for mode in (False, True)
    ]
    for call in calls:
        if not (verdict := oracle.verdict(call())).ok:
            raise SystemExit(f"{layer.shape.name} T = {tokens}: error {verdict.error:.2e} > {verdict.tolerance:.2e}")
    for mode in (0, 1, 1, 0):
        times[mode].append(time_us(calls[mode], device, warm_up_s=0.05))
    us, invariant = map(min, times)
    return {"tokens": tokens, "us": us, "invariant_us": invariant, "cost": invariant / us}


@torch.no_grad()
def main() -> None:
    """Print a line per shape and scheme, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path)
    given, rows, device = parser.parse_args(), [], default_device()
    for shape, scheme in itertools.product(given.shapes, given.schemes):
        layer = draw_layer(shape_of(shape), dtype=torch.bfloat16, device=device, scheme=scheme)
        found = [cost(layer, tokens) for tokens in given.tokens]
        rows += [{"shape": shape, "scheme": scheme, **row} for row in found]
        print(f"{shape:15} {scheme:12} " + " ".join(f"{row['tokens']}: {row['cost']:.3f}" for row in found), flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    costs = {tokens: [row["cost"] for row in rows if row["tokens"] == tokens] for tokens in given.tokens}
    for tokens, some in (*costs.items(), ("all", [row["cost"] for row in rows])):
        mean = math.exp(sum(map(math.log, some)) / len(some))
        print(f"T {tokens}: {mean:.3f} in the geometric mean of {len(some)}, at most {max(some):.3f}")
    print(f"{TARGET:.2f} is {'kept' if mean <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
