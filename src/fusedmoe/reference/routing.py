"""The routers as loops over tokens, in float64 on Python numbers.

Every function takes logits [T, E] and returns weights float64 [T, top_k] and ids int64 [T, top_k],
best first; of equal scores the lower id comes first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def softmax_topk(
    router_logits: Tensor, top_k: int, *, renormalize: bool, n_group: int = 1, topk_group: int = 1
) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest of p = softmax(logits); divided by their sum with ``renormalize``.

    DeepSeek-V2: inside the ``topk_group`` best of ``n_group`` groups, each as good as its largest p.
    """

    def route(logits: list[float]) -> tuple[list[float], list[int]]:
        p = _softmax(logits)
        ids = _in_groups(p, top_k, n_group, topk_group, largest=1)
        weights = [p[e] for e in ids]
        return (_normalized(weights) if renormalize else weights), ids

    return _each_token(router_logits, top_k, route)


def topk_softmax(router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The ``top_k`` largest logits; weights are the softmax of those."""

    def route(logits: list[float]) -> tuple[list[float], list[int]]:
        ids = _largest(logits, top_k)
        return _softmax([logits[e] for e in ids]), ids

    return _each_token(router_logits, top_k, route)


def sigmoid_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3: choose by s + bias inside the best groups, weigh by s = sigmoid(logits).

    A group scores the sum of its two largest s + bias; the ``topk_group`` best of ``n_group`` groups stay.
    """
    n_experts = router_logits.shape[1]
    bias = [0.0] * n_experts if correction_bias is None else correction_bias.double().tolist()

    def route(logits: list[float]) -> tuple[list[float], list[int]]:
        s = [1.0 / (1.0 + math.exp(-z)) if z > -700.0 else 0.0 for z in logits]
        choice = [score + b for score, b in zip(s, bias, strict=True)]
        ids = _in_groups(choice, top_k, n_group, topk_group, largest=2)
        weights = [s[e] for e in ids]
        if renormalize:
            weights = _normalized(weights)
        return [routed_scaling_factor * w for w in weights], ids

    return _each_token(router_logits, top_k, route)


def _each_token(
    router_logits: Tensor, top_k: int, route: Callable[[list[float]], tuple[list[float], list[int]]]
) -> tuple[Tensor, Tensor]:
    routed = [route(logits) for logits in router_logits.double().tolist()]
    weights = torch.tensor([w for w, _ in routed], dtype=torch.float64).reshape(len(routed), top_k)
    ids = torch.tensor([i for _, i in routed], dtype=torch.int64).reshape(len(routed), top_k)
    return weights.to(router_logits.device), ids.to(router_logits.device)


def _in_groups(choice: list[float], top_k: int, n_group: int, topk_group: int, *, largest: int) -> list[int]:
    """Of the groups whose ``largest`` largest have the largest sums."""
    size = len(choice) // n_group
    groups = [sum(sorted(choice[g * size : (g + 1) * size])[-largest:]) for g in range(n_group)]
    kept = _largest(groups, topk_group)
    candidates = sorted(e for g in kept for e in range(g * size, (g + 1) * size))
    return [candidates[i] for i in _largest([choice[e] for e in candidates], top_k)]


def _largest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def _softmax(values: Sequence[float]) -> list[float]:
    largest = max(values)
    return _normalized([math.exp(v - largest) for v in values])


def _normalized(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [w / total if total else 0.0 for w in weights]
