"""The layer with adapters beside the layer without: microseconds and their quotient.

``python benchmarks/lora.py --shape qwen3-30b-a3b --scheme none --json FILE``

For 1, 4 and 16 adapters of rank 16 and 64, every token drawing one of them, and for tokens that all have none. Median
of a replayed graph, L2 emptied before each. Results are compared with the reference first, for up to 32 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch

import fusedmoe
from fusedmoe.bench.routing import draw_routing
from fusedmoe.bench.shapes import Shape, format_for, shape_of
from fusedmoe.bench.timing import time_us
from fusedmoe.testing.cases import random_matrix
from fusedmoe.testing.verify import verify


def adapters(shape: Shape, count: int, rank: int, generator: torch.Generator) -> fusedmoe.LoRA:
    """Slots that are full, one A for gate and up, as PEFT has them for fused parameters."""

    def draw(*sizes: int, fan_in: int) -> torch.Tensor:
        like = {"dtype": torch.bfloat16, "device": generator.device, "generator": generator}
        return torch.randn(count, shape.experts, *sizes, **like).mul_(fan_in**-0.5)  # type: ignore[arg-type]

    h, i = shape.hidden, shape.intermediate
    return fusedmoe.LoRA(
        draw(rank, h, fan_in=h), draw(2 * i, rank, fan_in=rank), draw(rank, i, fan_in=i), draw(h, rank, fan_in=rank)
    )


def draw_ids(tokens: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """An adapter for every token."""
    return torch.randint(count, (tokens,), device=generator.device, generator=generator)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="of fusedmoe bench; repeatable")
    parser.add_argument("--scheme", action="append", help="none or a scheme; repeatable")
    parser.add_argument("--tokens", default="1,8,32,512,2048,8192")
    parser.add_argument("--adapters", default="1,4,16")
    parser.add_argument("--rank", default="16,64")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tokens, counts, ranks = (
        [int(n) for n in text.split(",")] for text in (options.tokens, options.adapters, options.rank)
    )
    device, rows = torch.device("cuda", torch.cuda.current_device()), []
    for shape in map(shape_of, options.shape or ("qwen3-30b-a3b", "mixtral-8x7b")):
        for scheme in options.scheme or ("none",):
            generator = torch.Generator(device).manual_seed(0)
            draw = functools.partial(torch.randn, dtype=torch.bfloat16, device=device, generator=generator)
            e, h, i, form = shape.experts, shape.hidden, shape.intermediate, format_for(scheme, shape)
            w13, w2 = (
                draw(e, n, k) * k**-0.5 if form is None else random_matrix(form, (e, n, k), generator, parts=parts)
                for n, k, parts in ((2 * i, h, 2), (h, i, 1))
            )
            inputs = {n: (draw(n, h), *draw_routing("uniform", n, e, shape.top_k, generator)) for n in tokens}

            def layer(n: int, extra: dict[str, object]) -> torch.Tensor:
                x, weights, ids = inputs[n]  # noqa: B023 - called within this turn
                return fusedmoe.fused_experts(x, w13, w2, weights, ids, **extra)  # type: ignore[arg-type]  # noqa: B023

            fusedmoe.warmup(lambda n: layer(n, {}), tokens, threads=16)
            base = {}
            for n, (x, weights, ids) in inputs.items():
                base[n] = time_us(functools.partial(fusedmoe.fused_experts, x, w13, w2, weights, ids), device)
            for rank in ranks:
                for count in counts:
                    lora = adapters(shape, count, rank, generator)
                    some = {n: {"lora": lora, "adapter_ids": draw_ids(n, count, generator)} for n in tokens}
                    fusedmoe.warmup(lambda n, some=some: layer(n, some[n]), tokens, threads=16)
                    for n, (x, weights, ids) in inputs.items():
                        chosen = some[n]["adapter_ids"]
                        for name, adapter_ids in (("each", chosen), ("none", torch.full_like(chosen, -1))):
                            if name == "none" and (rank, count) != (ranks[0], counts[0]):
                                continue
                            extra = {"lora": lora, "adapter_ids": adapter_ids}
                            call = functools.partial(fusedmoe.fused_experts, x, w13, w2, weights, ids, **extra)
                            if n <= 32:
                                verdict = verify(call(), (x, w13, w2, weights, ids), extra)
                                assert verdict.ok, (shape, scheme, rank, count, n, verdict)
                            us = time_us(call, device)
                            row = {
                                "shape": shape.name, "scheme": scheme, "rank": rank, "adapters": count, "of": name,
                                "tokens": n, "base_us": base[n], "us": us, "quotient": us / base[n],
                            }  # fmt: skip
                            rows.append(row)
                            print(
                                f"{shape.name:14} {scheme:12} rank {rank:3} adapters {count:3} {name}  T = {n:5}  "
                                f"{base[n]:8.1f} us  {us:8.1f} us  {us / base[n]:.2f}",
                                flush=True,
                            )
                    del lora
    if options.json:
        facts = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
