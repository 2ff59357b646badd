"""The layer with adapters beside the layer without: microseconds and their quotient.

``python benchmarks/lora.py --shape qwen3-30b-a3b --scheme none --json FILE``

For 1, 4 and 16 adapters of rank 16 and 64, every token drawing one of them, and for tokens that all have none. Median
of a replayed graph, L2 emptied before each. Results are compared with the reference first, for up to 32 tokens. The
last column is the bytes that have to be read over those of the layer without: the weights of each chosen expert, and A
and B of each adapter with a token there. A layer that is at the limit of memory cannot have a smaller quotient.

``--apart``: an A each for gate and up, and tensors of their own for both, as vLLM has them for most models.

``--vllm`` times vLLM's own adapters beside them, those of 0.22.1: its Triton experts without and with the same
adapters, as ``against_vllm.py`` has them, and their quotient; and this library's in their place, as the plugin puts
them there. Results with adapters are compared with the reference where ours are. Of quantised layers the plugin's
alone: vLLM's experts ignore adapters there, or multiply A with codes of quantised rows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import fusedmoe
from fusedmoe.bench import Layer, Shape, default_device, draw_layer, format_for, problem_of, shape_of, time_us
from fusedmoe.cli.environment import name_of
from fusedmoe.integrations.vllm import experts_class, prepare_adapters, why_no_adapters
from fusedmoe.testing.verify import Oracle

#: Relative error that vLLM's result may have. More than ours: it rounds to the type of the layer before it adds an
#: adapter, and after, for each expert of a token.
VLLM_TOLERANCE = 2e-2


def adapters(shape: Shape, count: int, rank: int, generator: torch.Generator, *, apart: bool) -> fusedmoe.LoRA:
    """Slots that are full, one A for gate and up, as PEFT has them for fused parameters, or a pair of tensors each."""

    def draw(*sizes: int, fan_in: int) -> torch.Tensor:
        like = {"dtype": torch.bfloat16, "device": generator.device, "generator": generator}
        return torch.randn(count, shape.experts, *sizes, **like).mul_(fan_in**-0.5)  # type: ignore[arg-type]

    h, i = shape.hidden, shape.intermediate
    pairs = [(draw(rank, h, fan_in=h), draw(i if apart else 2 * i, rank, fan_in=rank)) for _ in range(1 + apart)]
    (a, b), (up_a, up_b) = pairs[0], pairs[1] if apart else (None, None)
    down = draw(rank, i, fan_in=i), draw(h, rank, fan_in=rank)
    return fusedmoe.LoRA(a, b, *down, up_a=up_a, up_b=up_b, finite=True)


def draw_ids(tokens: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """An adapter for every token."""
    return torch.randint(count, (tokens,), device=generator.device, generator=generator)


def more_bytes(lora: fusedmoe.LoRA, expert_bytes: float, ids: torch.Tensor, adapter_ids: torch.Tensor) -> float:
    """Bytes of weights and adapters over those of weights."""
    pairs = (adapter_ids[:, None] * lora.w13_a.shape[1] + ids).unique().numel()
    matrices = (lora.w13_a, lora.w13_b, lora.up_a, lora.up_b, lora.w2_a, lora.w2_b)
    each = sum(t[0, 0].numel() * t.itemsize for t in matrices if t is not None)
    return 1 + pairs * each / (ids.unique().numel() * expert_bytes)


def vllm_context(lora: fusedmoe.LoRA, adapter_ids: torch.Tensor, top_k: int) -> Any:
    """VLLM's form of the adapters and of the adapter of each token.

    Its stacked tensors have the shapes of ours: one slice of w13, as it has them for adapters of fused parameters, or
    one each for gate and up; and a scaling, which it multiplies into B, of 1.
    """
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext

    (count, experts), tokens, device = lora.w13_a.shape[:2], adapter_ids.shape[0], adapter_ids.device
    # All that it reads of the engine's configuration; the second is the engine's default.
    config = SimpleNamespace(max_loras=count, specialize_active_lora=False)
    wrapper = PunicaWrapperGPU(tokens, tokens, device, lora_config=config)
    wrapper.token_mapping_meta.prepare_tensors(adapter_ids)  # waits for the device, so before a graph is captured
    a, b = ([t for t in pair if t is not None] for pair in ((lora.w13_a, lora.up_a), (lora.w13_b, lora.up_b)))
    return MoELoRAContext(
        w13_lora_a_stacked=tuple(a),
        w13_lora_b_stacked=tuple(b),
        w2_lora_a_stacked=(lora.w2_a,),
        w2_lora_b_stacked=(lora.w2_b,),
        adapter_enabled=torch.ones(count + 1, dtype=torch.int32, device=device),
        max_loras=count,
        top_k=top_k,
        w13_num_slices=len(a),
        fully_sharded=False,
        tp_rank=0,
        tp_size=1,
        local_num_experts=experts,
        punica_wrapper=wrapper,
        use_tuned_config=False,  # no folder of tables for adapters: blocks follow from those of the layer
    )


def vllm_call(
    layer: Layer,
    inputs: tuple[torch.Tensor, ...],
    lora: fusedmoe.LoRA | None = None,
    adapter_ids: torch.Tensor | None = None,
    *,
    plugin: bool = False,
) -> Callable[[], torch.Tensor]:
    """A call of vLLM's Triton experts with these rows, router weights and ids, or of the plugin's in their place; the
    result lies in vLLM's workspace.

    With adapters, vLLM's sort pairs of token and expert once more, by adapter and expert, unless they are few, and a
    kernel after each of the two products adds B (A x) to what that stored.
    """
    from against_vllm import configured, kernel, operands
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    x, _, ids = inputs
    moe, quant = configured(layer, x.shape[0])
    experts = kernel(experts_class(TritonExperts) if plugin else TritonExperts, moe, quant)
    if lora is not None and adapter_ids is not None:
        experts.fused_experts.set_lora_context(vllm_context(lora, adapter_ids, ids.shape[1]))
        reason = plugin and why_no_adapters(experts.fused_experts._lora_context, moe.in_dtype)
        assert not reason, reason
    return functools.partial(experts.apply, activation=moe.activation, **operands(layer, *inputs))


def vllm_columns(
    call: Callable[[], torch.Tensor], base_us: float, oracle: Oracle | None, device: torch.device, name: str = "vllm"
) -> dict[str, float | None]:
    """Times of a class of experts of vLLM without adapters and with, their quotient, and its error where there is a
    reference.
    """
    error = None
    if oracle is not None:
        verdict = oracle.verdict(call())
        error = verdict.error
        assert verdict.ok if name == "plugin" else error < VLLM_TOLERANCE, (name, verdict)
    us = time_us(call, device)
    found = {"base_us": base_us, "us": us, "quotient": us / base_us, "error": error}
    return {f"{name}_{key}": value for key, value in found.items()}


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="of fusedmoe bench; repeatable")
    parser.add_argument("--scheme", action="append", help="none or a scheme; repeatable")
    parser.add_argument("--tokens", default="1,8,32,512,2048,8192")
    parser.add_argument("--adapters", default="1,4,16")
    parser.add_argument("--rank", default="16,64")
    parser.add_argument("--apart", action="store_true", help="gate and up in tensors of their own")
    parser.add_argument("--vllm", action="store_true", help="vLLM's own adapters too, and the plugin's in vLLM")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = default_device()
    with contextlib.ExitStack() as stack:
        if options.vllm:
            from against_vllm import configuration

            prepare_adapters()
            stack.enter_context(configuration(device))
        rows = table(options, device)
    if options.json:
        facts = {"device": name_of(device), "torch": torch.__version__}
        if options.vllm:
            facts["vllm"] = importlib.metadata.version("vllm")
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1), encoding="utf-8")


def table(options: argparse.Namespace, device: torch.device) -> list[dict[str, object]]:
    """Measure and print each point."""
    rows: list[dict[str, object]] = []
    shapes, schemes = options.shape or ("qwen3-30b-a3b", "mixtral-8x7b"), options.scheme or ("none",)
    for shape, scheme in itertools.product(map(shape_of, shapes), schemes):
        for row in of_layer(shape, scheme, options, device):
            rows.append(row)
            print(line(row), flush=True)
    return rows


def of_layer(
    shape: Shape, scheme: str, options: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, object]]:
    """The points of a layer."""
    tokens, counts, ranks = (
        [int(n) for n in text.split(",")] for text in (options.tokens, options.adapters, options.rank)
    )
    drawn = draw_layer(shape, dtype=torch.bfloat16, device=device, scheme=scheme)
    inputs = {n: (x, *topk) for n in tokens for x, _, _, *topk in (drawn.call(n),)}
    classes = () if not options.vllm else ("vllm", "plugin") if scheme == "none" else ("plugin",)

    def call(n: int, **extra: Any) -> Callable[[], torch.Tensor]:
        x, weights, ids = inputs[n]
        return functools.partial(fusedmoe.fused_experts, x, drawn.w13, drawn.w2, weights, ids, **extra)

    fusedmoe.warmup(lambda n: call(n)(), tokens, threads=16)
    base = {n: time_us(call(n), device) for n in tokens}
    theirs = {
        (n, name): time_us(vllm_call(drawn, inputs[n], plugin=name == "plugin"), device)
        for n in tokens
        for name in classes
    }
    expert_bytes = problem_of(shape, 1, torch.bfloat16, form=format_for(scheme, shape)).expert_bytes
    for rank, count in itertools.product(ranks, counts):
        lora = adapters(shape, count, rank, drawn.generator, apart=options.apart)
        each = {n: draw_ids(n, count, drawn.generator) for n in tokens}
        fusedmoe.warmup(lambda n, lora=lora, each=each: call(n, lora=lora, adapter_ids=each[n])(), tokens, threads=16)
        kinds = ("each", "none") if (rank, count) == (ranks[0], counts[0]) else ("each",)
        for n, kind in itertools.product(tokens, kinds):
            x, weights, ids = inputs[n]
            extra = {"lora": lora, "adapter_ids": each[n] if kind == "each" else torch.full_like(each[n], -1)}
            ours, oracle = call(n, **extra), None
            if n <= 32 or n == 2048:
                oracle = Oracle((x, drawn.w13, drawn.w2, weights, ids), extra, x.dtype)
                verdict = oracle.verdict(ours())
                assert verdict.ok, (shape, scheme, rank, count, n, verdict)
            us = time_us(ours, device)
            row = {
                "shape": shape.name, "scheme": scheme, "rank": rank, "adapters": count, "apart": options.apart,
                "of": kind, "tokens": n, "base_us": base[n], "us": us, "quotient": us / base[n],
                "bytes": more_bytes(lora, expert_bytes, ids, each[n]) if kind == "each" else 1.0,
            }  # fmt: skip
            for name in classes if kind == "each" else ():
                one = vllm_call(drawn, inputs[n], **extra, plugin=name == "plugin")
                row |= vllm_columns(one, theirs[n, name], oracle, device, name)
            yield row


def line(row: dict[str, Any]) -> str:
    """A point as it is printed."""
    said = (
        f"{row['shape']:14} {row['scheme']:12} rank {row['rank']:3} adapters {row['adapters']:3} {row['of']}  "
        f"T = {row['tokens']:5}  {row['base_us']:8.1f} us  {row['us']:8.1f} us  {row['quotient']:.2f}  "
        f"bytes {row['bytes']:.2f}"
    )
    for name in ("vllm", "plugin"):
        if f"{name}_us" in row:
            base_us, us, quotient, error = (row[f"{name}_{key}"] for key in ("base_us", "us", "quotient", "error"))
            said += f"  {name} {base_us:8.1f} us  {us:8.1f} us  {quotient:.2f}"
            said += "" if error is None else f"  error {error:.1e}"
    return said


if __name__ == "__main__":
    main()
