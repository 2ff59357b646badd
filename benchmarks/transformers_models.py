"""Whole models of Transformers, their experts as fusedmoe, grouped_mm, batched_mm and eager: tokens per second.

``python benchmarks/transformers_models.py --json FILE`` on a GPU; ``--tiny`` anywhere.

Models have the sizes of Qwen3-30B-A3B and gpt-oss-20b and random weights, drawn on the device. Before anything is
timed, the logits of each implementation are compared with those of eager. What is timed: prefill of prompts of 4096
tokens, one and four of them; a decode step at batch 1, 8 and 64 with a static cache that holds 64 tokens, launched
from Python and as a replayed CUDA graph; and in the latter also the experts of all layers alone. A figure is the
median over as many runs as fit in the time of a point; the implementations take turns. "-": does not run (captured,
or within the memory), or time was up.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig, StaticCache

import fusedmoe.integrations.transformers

IMPLEMENTATIONS = ("fusedmoe", "grouped_mm", "batched_mm", "eager")
PROMPT = 4096
CONTEXT = 64
MOST = 100  # runs of a point
ROOM = 128  # of the cache; gpt-oss' sliding window, beyond which its cache is rolled

MODELS: dict[str, Callable[[], Any]] = {
    "qwen3-30b-a3b": lambda: Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
    ),
    "gpt-oss-20b": lambda: GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
    ),
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured point; ``seconds`` None says that there is none, and ``why``."""

    model: str
    what: str
    mode: str
    tokens: int
    implementation: str
    seconds: float | None
    why: str = ""


class Clock:
    """Times calls on a device, within limits: ``point`` seconds for each, ``whole`` for all."""

    def __init__(self, device: torch.device, point: float, whole: float) -> None:
        self.device, self.point, self.end = device, point, time.perf_counter() + whole

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def up(self) -> str:
        """That no time is left for another point, if none is."""
        return "the time of the whole run was up" if time.perf_counter() > self.end else ""

    def medians(
        self, calls: dict[str, Callable[[], object]], before: Callable[[str], object] = lambda name: None
    ) -> dict[str, float]:
        """Median seconds of each call, work on the device included.

        They take turns, another first in each, for a host is not as fast in one second as in the next; each until its
        own time is over. Python collects its garbage before, not within.

        Args:
            calls: by name.
            before: called with the name before each call, outside of its time.
        """
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():  # warms up
            before(name)
            call()
        left = list(calls)
        gc.collect()
        gc.disable()
        while left:
            for name in list(left):
                before(name)
                self.synchronise()
                start = time.perf_counter()
                calls[name]()
                self.synchronise()
                seconds[name].append(time.perf_counter() - start)
                if len(seconds[name]) >= MOST or len(seconds[name]) >= 2 and sum(seconds[name]) > self.point:
                    left.remove(name)
            left = left[1:] + left[:1]
        gc.enable()
        return {name: statistics.median(found) for name, found in seconds.items()}


def ran(call: Callable[[], object]) -> Callable[[], object]:
    """The call, which can be run: it was."""
    call()
    return call


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """A replay of the call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay() -> object:
        graph.replay()
        return call  # the graph works on its tensors, which have to live as long

    return replay


def build(config: Any, device: torch.device) -> Any:
    """The model with random weights in bfloat16, drawn where it lies."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def experts_of(model: Any) -> list[Any]:
    """Experts of every layer."""
    return [layer.mlp.experts for layer in model.model.layers]


def prefill(model: Any, prompts: int, length: int) -> Callable[[], object]:
    """Logits of the last token of some prompts, without a cache."""
    ids = torch.randint(model.config.vocab_size, (prompts, length), device=model.device)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def cached(model: Any, cache: StaticCache) -> dict[str, Any]:
    """Arguments of a forward with a cache, by the name that the installed version has for it."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def decode(model: Any, batch: int) -> Callable[[], object]:
    """A step of a token for each sequence, over and over at the same position of a static cache."""
    device, config = model.device, model.config
    prompt = torch.randint(config.vocab_size, (batch, CONTEXT), device=device)
    cache = StaticCache(config=config, max_cache_len=ROOM)
    implementation = config._experts_implementation
    model.set_experts_implementation("grouped_mm")  # batched_mm would copy the weights of all these tokens' experts
    given = cached(model, cache)
    model(input_ids=prompt, logits_to_keep=1, **given)
    model.set_experts_implementation(implementation)
    # One tensor for the lengths of all layers: set back by a single launch, not by one a layer.
    lengths = torch.full((len(cache.layers),), CONTEXT, device=device)
    for i, layer in enumerate(cache.layers):
        layer.cumulative_length = lengths[i]
    token = torch.randint(config.vocab_size, (batch, 1), device=device)
    position = torch.full((batch, 1), CONTEXT, device=device)
    mask = (torch.arange(ROOM, device=device) <= CONTEXT).view(1, 1, 1, ROOM).expand(batch, 1, 1, ROOM)
    if config._attn_implementation == "eager":  # adds it
        mask = torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    # gpt-oss takes a mask for each kind of layer.
    kinds = set(getattr(config, "layer_types", None) or ())
    masks = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask

    def step() -> object:
        lengths.fill_(CONTEXT)
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = CONTEXT
        return model(input_ids=token, attention_mask=masks, position_ids=position, **given).logits

    return step


def experts_alone(model: Any, batch: int) -> Callable[[], object]:
    """The experts of all layers, one after the other, on the same tokens, each routed at random."""
    config, device = model.config, model.device
    modules = experts_of(model)
    n_experts, top_k = modules[0].num_experts, config.num_experts_per_tok
    x = torch.randn(batch, config.hidden_size, device=device, dtype=model.dtype)
    choices = torch.rand(len(modules), batch, n_experts, device=device).topk(top_k).indices
    weights = torch.full((batch, top_k), 1 / top_k, device=device, dtype=model.dtype)

    def step() -> object:
        for experts, ids in zip(modules, choices, strict=True):
            out = experts(x, ids, weights)
        return out

    return step


def agreement(model: Any, implementations: list[str]) -> dict[str, float]:
    """Relative difference of the logits of each implementation from those of eager."""
    ids = torch.randint(model.config.vocab_size, (1, 64), device=model.device)
    logits = {}
    for name in ("eager", *implementations):
        model.set_experts_implementation(name)
        logits[name] = model(input_ids=ids, use_cache=False).logits.float()
    want = logits.pop("eager")
    return {name: ((got - want).norm() / want.norm()).item() for name, got in logits.items()}


def refused(model: Any, name: str, mode: str, tokens: int) -> str:
    """Why an implementation cannot be run; empty when it can."""
    if mode == "graph" and name == "eager":
        return "reads the chosen experts on the host"
    if name != "batched_mm":
        return ""
    # It copies the weights of every chosen expert.
    experts = experts_of(model)[0]
    each = sum(p[0].nbytes for p in experts.parameters() if p.dim() == 3)
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else 2**30
    fits = tokens * model.config.num_experts_per_tok * each < free / 2
    return "" if fits else "copies of the chosen experts' weights would not fit"


def points(model: Any, arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """What is timed: (what, mode, tokens, a function that makes the call)."""
    modes = [mode for mode in ("python", "graph") if mode == "python" or model.device.type == "cuda"]
    length = 32 if arguments.tiny else PROMPT
    for batch in arguments.batch:
        for mode in modes:
            yield "decode", mode, batch, lambda batch=batch: decode(model, batch)
        yield "experts alone", modes[-1], batch, lambda batch=batch: experts_alone(model, batch)
    for prompts in (1, 4):
        yield "prefill", "python", prompts * length, lambda prompts=prompts: prefill(model, prompts, length)


def measure(name: str, model: Any, arguments: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """Every point of a model; what matters most first, for the time may run out."""
    for what, mode, tokens, make in points(model, arguments):
        if mode not in (arguments.mode or (mode,)) or what not in (arguments.what or (what,)):
            continue
        calls: dict[str, Callable[[], object]] = {}
        reasons: dict[str, str] = {}
        for implementation in arguments.implementation:
            model.set_experts_implementation(implementation)
            reasons[implementation] = refused(model, implementation, mode, tokens) or clock.up()
            try:
                if not reasons[implementation]:
                    calls[implementation] = captured(make()) if mode == "graph" else ran(make())
            except RuntimeError as error:
                reasons[implementation] = str(error).partition("\n")[0]
        medians = clock.medians(calls, model.set_experts_implementation)
        for implementation, why in reasons.items():
            seconds = medians.get(implementation)
            yield Row(
                model=name,
                what=what,
                mode=mode,
                tokens=tokens,
                implementation=implementation,
                seconds=seconds,
                why=why,
            )


def show(rows: list[Row], layers: dict[str, int], implementations: list[str]) -> None:
    """A table a model: tokens per second, of the experts alone microseconds per layer, and fusedmoe's advantage."""
    for model, n_layers in layers.items():
        print(f"\n{model}, {n_layers} layers\n")
        print(f"| what | tokens | {' | '.join(implementations)} | fusedmoe over the best other |")
        print("| --- " * (len(implementations) + 3) + "|")
        groups: dict[tuple[str, str, int], dict[str, Row]] = {}
        for row in rows:
            if row.model == model:
                groups.setdefault((row.what, row.mode, row.tokens), {})[row.implementation] = row
        for (what, mode, tokens), found in groups.items():
            cells = []
            for name in implementations:
                seconds = found[name].seconds
                if seconds is None:
                    cells.append("-")
                elif what == "experts alone":
                    cells.append(f"{seconds / n_layers * 1e6:.0f} µs a layer")
                else:
                    cells.append(f"{tokens / seconds:.0f} tokens/s")
            others = [r.seconds for n, r in found.items() if n != "fusedmoe" and r.seconds]
            ours = found["fusedmoe"].seconds if "fusedmoe" in found else None
            ratio = f"{min(others) / ours:.2f} times" if ours and others else "-"
            print(f"| {what}, {mode} | {tokens} | {' | '.join(cells)} | {ratio} |")
        for reason in dict.fromkeys(f"{r.implementation}: {r.why}" for r in rows if r.model == model and r.why):
            print(f"  - {reason}")


@torch.inference_mode()
def main() -> int:
    """Build, compare, time, print; 1 when logits disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable; both when left out")
    parser.add_argument("--implementation", action="append", choices=IMPLEMENTATIONS, help="repeatable; all")
    parser.add_argument("--mode", action="append", choices=("python", "graph"), help="repeatable; both")
    parser.add_argument(
        "--what", action="append", choices=("decode", "experts alone", "prefill"), help="repeatable; all"
    )
    parser.add_argument("--layers", type=int, help="fewer layers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="of decode")
    parser.add_argument("--point", type=float, default=0.7, help="seconds of a point")
    parser.add_argument("--limit", type=float, default=220, help="seconds of the whole run, then points are left out")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try this script anywhere")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args()
    arguments.implementation = arguments.implementation or list(IMPLEMENTATIONS)
    device = torch.device(arguments.device)
    clock = Clock(device, 0.05 if arguments.tiny else arguments.point, arguments.limit)
    rows: list[Row] = []
    layers: dict[str, int] = {}
    logits: dict[str, dict[str, float]] = {}
    for name in arguments.model or MODELS:
        config = MODELS[name]()
        if arguments.tiny:
            sizes = {key: value for key, value in TINY.items() if hasattr(config, key)}
            config = type(config)(**sizes, num_experts_per_tok=2)
        if arguments.layers:
            config = type(config)(**{**config.to_dict(), "num_hidden_layers": arguments.layers, "layer_types": None})
        start = time.perf_counter()
        model = build(config, device)
        clock.synchronise()
        layers[name] = config.num_hidden_layers
        size = sum(p.nbytes for p in model.parameters()) / 2**30
        print(f"{name}: {size:.1f} GiB in {time.perf_counter() - start:.0f} s", flush=True)
        others = [i for i in arguments.implementation if i != "eager"]
        logits[name] = agreement(model, others)
        print("logits beside eager: " + ", ".join(f"{i} {e:.1e}" for i, e in logits[name].items()), flush=True)
        rows += measure(name, model, arguments, clock)
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    show(rows, layers, arguments.implementation)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"\n{machine}, torch {torch.__version__}, Transformers {transformers.__version__}")
    if arguments.json:
        said = {
            "device": machine,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fusedmoe": fusedmoe.__version__,
            "layers": layers,
            "logits": logits,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    # Two implementations in bfloat16 differ by their rounding, and by the tokens that it routes elsewhere.
    bound = {name: max(0.03, 2 * errors.get("grouped_mm", 0.05)) for name, errors in logits.items()}
    wrong = [n for n, e in logits.items() if not e.get("fusedmoe", 0) < bound[n] or math.isnan(e.get("fusedmoe", 0))]
    if wrong:
        print(f"logits disagree: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
