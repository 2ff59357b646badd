"""The layer under a bound on its workspace: time and peak memory, whole and in chunks.

``python benchmarks/chunks.py --tokens 65536 --json FILE``

Prints microseconds (median of a replayed graph, L2 emptied before each) and the peak of what a call allocates, without
a limit and with a half, a quarter and an eighth of its workspace. Chunks have the bits of the whole, or the script
fails.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch

import fusedmoe
from fusedmoe.bench.routing import draw_routing
from fusedmoe.bench.shapes import format_for, shape_of
from fusedmoe.bench.timing import time_us
from fusedmoe.testing.cases import random_matrix


def peak(call: functools.partial[torch.Tensor]) -> int:
    """Bytes that a call allocates at most."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="of fusedmoe bench; repeatable")
    parser.add_argument("--scheme", action="append", help="none or a scheme; repeatable")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, rows = torch.device("cuda", torch.cuda.current_device()), []
    for shape in map(shape_of, options.shape or ("qwen3-30b-a3b", "dsv3-ep8")):
        for scheme in options.scheme or ("none", "fp8_block"):
            generator = torch.Generator(device).manual_seed(0)
            draw = functools.partial(torch.randn, dtype=torch.bfloat16, device=device, generator=generator)
            e, h, i, form = shape.experts, shape.hidden, shape.intermediate, format_for(scheme, shape)
            w13, w2 = (
                draw(e, n, k) * k**-0.5 if form is None else random_matrix(form, (e, n, k), generator, parts=parts)
                for n, k, parts in ((2 * i, h, 2), (h, i, 1))
            )
            x = draw(options.tokens, h)
            arguments = (x, w13, w2, *draw_routing("uniform", options.tokens, e, shape.top_k, generator))
            need, want, first = fusedmoe.workspace_bytes(*arguments), fusedmoe.fused_experts(*arguments), None
            for share in (1, 2, 4, 8):
                out = torch.empty_like(x)
                limit = None if share == 1 else need // share
                call = functools.partial(fusedmoe.fused_experts, *arguments, out=out, workspace_limit=limit)
                memory, us = peak(call), time_us(call, device)
                if not torch.equal(out, want):
                    raise SystemExit(f"{shape.name} {scheme}: chunks differ from the whole")
                first = first or us
                print(
                    f"{shape.name:14} {scheme:10} T={options.tokens} 1/{share} of the workspace: {us:8.0f} us "
                    f"({us / first:.3f}), peak {memory / 2**20:.0f} MiB of {need / 2**20:.0f}"
                )
                rows.append({"shape": shape.name, "scheme": scheme, "tokens": options.tokens, "share": share, "us": us,
                             "times_whole": us / first, "limit": limit, "peak_bytes": memory})  # fmt: skip
    if options.json is not None:
        name = torch.cuda.get_device_name(device)
        options.json.write_text(json.dumps({"device": name, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
