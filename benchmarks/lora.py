"""The layer with adapters beside the layer without: microseconds and their quotient.

``python benchmarks/lora.py --shape qwen3-30b-a3b --scheme none --json FILE``

For 1, 4 and 16 adapters of rank 16 and 64, every token drawing one of them, and for tokens that all have none. Median
of a replayed graph, L2 emptied before each. Results are compared with the reference first, for up to 32 tokens. The
last column is the bytes that have to be read over those of the layer without: the weights of each chosen expert, and A
and B of each adapter with a token there. A layer that is at the limit of memory cannot have a smaller quotient.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path

import torch

import fusedmoe
from fusedmoe.bench import Shape, default_device, draw_layer, format_for, problem_of, shape_of, time_us
from fusedmoe.cli.environment import name_of
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


def more_bytes(lora: fusedmoe.LoRA, expert_bytes: float, ids: torch.Tensor, adapter_ids: torch.Tensor) -> float:
    """Bytes of weights and adapters over those of weights."""
    pairs = (adapter_ids[:, None] * lora.w13_a.shape[1] + ids).unique().numel()
    matrices = (lora.w13_a, lora.w13_b, lora.w2_a, lora.w2_b)
    each = sum(t[0, 0].numel() * t.itemsize for t in matrices)
    return 1 + pairs * each / (ids.unique().numel() * expert_bytes)


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
    device, rows = default_device(), []
    for shape in map(shape_of, options.shape or ("qwen3-30b-a3b", "mixtral-8x7b")):
        for scheme in options.scheme or ("none",):
            drawn = draw_layer(shape, dtype=torch.bfloat16, device=device, scheme=scheme)
            generator, w13, w2 = drawn.generator, drawn.w13, drawn.w2
            inputs = {n: (x, *topk) for n in tokens for x, _, _, *topk in (drawn.call(n),)}
            expert_bytes = problem_of(shape, 1, torch.bfloat16, form=format_for(scheme, shape)).expert_bytes

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
                            least = 1.0 if name == "none" else more_bytes(lora, expert_bytes, ids, adapter_ids)
                            row = {
                                "shape": shape.name, "scheme": scheme, "rank": rank, "adapters": count, "of": name,
                                "tokens": n, "base_us": base[n], "us": us, "quotient": us / base[n], "bytes": least,
                            }  # fmt: skip
                            rows.append(row)
                            print(
                                f"{shape.name:14} {scheme:12} rank {rank:3} adapters {count:3} {name}  T = {n:5}  "
                                f"{base[n]:8.1f} us  {us:8.1f} us  {us / base[n]:.2f}  bytes {least:.2f}",
                                flush=True,
                            )
                    del lora
    if options.json:
        facts = {"device": name_of(device), "torch": torch.__version__}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
