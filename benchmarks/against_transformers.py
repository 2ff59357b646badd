"""The layer beside Transformers' own experts on the same tensors, in one run.

``python benchmarks/against_transformers.py``

Prints microseconds (median) of each and the ratio. On a CPU only the ratio means anything; set OMP_NUM_THREADS to the
number of cores that are really free.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import fusedmoe

CASES = {
    "mixtral-like E8 k2 H512 I1024": (
        MixtralExperts,
        MixtralConfig(hidden_size=512, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2),
    ),
    "qwen3-like E64 k8 H512 I256": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=512, moe_intermediate_size=256, num_experts=64, num_experts_per_tok=8),
    ),
}


def once_us(call: Callable[[], object], device: str) -> float:
    """Time of one call, its work on the device included."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


@torch.no_grad()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1,16,256")
    parser.add_argument("--implementation", default="eager", help="Transformers' experts implementation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    for name, (experts_class, config) in CASES.items():
        config._experts_implementation = arguments.implementation
        for dtype in (torch.float32, torch.bfloat16):
            experts = experts_class(config).to(arguments.device, dtype)
            for p in experts.parameters():
                p.normal_(0, p.shape[-1] ** -0.5)
            n_experts = experts.gate_up_proj.shape[0]
            for n_tokens in map(int, arguments.tokens.split(",")):
                x = torch.randn(n_tokens, config.hidden_size, device=arguments.device, dtype=dtype)
                scores = torch.rand(n_tokens, n_experts, device=arguments.device)
                weights, ids = scores.softmax(1).topk(config.num_experts_per_tok, 1)
                calls = (
                    lambda x=x, ids=ids, weights=weights, experts=experts: experts(x, ids, weights.to(x.dtype)),
                    lambda x=x, ids=ids, weights=weights, experts=experts: fusedmoe.fused_experts(
                        x, experts.gate_up_proj, experts.down_proj, weights, ids
                    ),
                )
                theirs, ours = (call() for call in calls)
                error = ((ours - theirs).norm() / theirs.norm()).item()
                if error > 2e-2:
                    raise SystemExit(f"{name}: the two differ by {error:.1e}")
                pairs = [[once_us(call, arguments.device) for call in calls] for _ in range(30)]
                a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
                print(f"{name}  {dtype!s:15} T={n_tokens:<4} Transformers {a:8.0f}  fusedmoe {b:8.0f}  {a / b:.2f}x")


if __name__ == "__main__":
    main()
