"""Routers: logits [T, E] -> the experts of each token and their weights.

Plain torch in float32, on any device, without host synchronisation: a call can be captured in a CUDA graph.
Experts come best first; of equal scores it is unspecified which is taken, as with ``torch.topk``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedmoe.errors import DeviceError, DTypeError, LayoutError, OptionError, ShapeError, explain
from fusedmoe.spec.activation import FLOAT32_MAX


class TopK(NamedTuple):
    """What a router says: the second and third tensor that :func:`fusedmoe.fused_experts` needs, in its order."""

    weights: Tensor  #  [T, top_k] float32
    ids: Tensor  #      [T, top_k] int64, as in Transformers


def softmax_topk(
    router_logits: Tensor, top_k: int, *, renormalize: bool, n_group: int = 1, topk_group: int = 1
) -> TopK:
    """The most probable experts (Mixtral: renormalize; Qwen3-MoE: renormalize if ``norm_topk_prob``).

        p = softmax(logits);  ids = argtop_k(p);  w = p[ids], or p[ids] / sum(p[ids]) with renormalize

    Of fewer groups than there are, ids are chosen inside the best (DeepSeek-V2, ``group_limited_greedy``):

        score of a group = its largest p;  keep the topk_group best of n_group groups

    Args:
        router_logits: [T, E], any floating dtype.
        top_k: experts per token, 1 to the number of experts in kept groups.
        renormalize: whether the weights of a token sum to 1.
        n_group: number of groups, each of E / n_group neighbours.
        topk_group: groups kept.

    Raises:
        ShapeError, DTypeError, OptionError: see the message.

    >>> softmax_topk(torch.tensor([[0.0, 2.0, 1.0]]), 2, renormalize=True).ids
    tensor([[1, 2]])
    """
    _check(router_logits, top_k)
    _check_groups(router_logits.shape[1], top_k, n_group, topk_group)
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    ids = _in_best_groups(probabilities, n_group, topk_group, largest=1).topk(top_k, dim=-1).indices
    weights = probabilities.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return TopK(weights, ids)


def topk_softmax(router_logits: Tensor, top_k: int) -> TopK:
    """The experts with the largest logits, weighted by the softmax of those logits alone (gpt-oss).

        ids = argtop_k(logits);  w = softmax(logits[ids])

    Args:
        router_logits: [T, E], any floating dtype, the router's bias included.
        top_k: experts per token, 1 to E.

    Raises:
        ShapeError, DTypeError, OptionError: see the message.

    >>> topk_softmax(torch.tensor([[0.0, 1.0, 1.0]]), 2).weights
    tensor([[0.5000, 0.5000]])
    """
    _check(router_logits, top_k)
    logits, ids = router_logits.float().topk(top_k, dim=-1)
    return TopK(torch.softmax(logits, dim=-1), ids)


def sigmoid_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> TopK:
    """Sigmoid scores, chosen with a correction bias inside the best groups of experts (DeepSeek-V3).

        s = sigmoid(logits);  c = s + correction_bias
        score of a group = sum of its two largest c;  keep the topk_group best of n_group groups
        ids = argtop_k(c in kept groups);  w = s[ids] / (sum(s[ids]) + 1e-20) * routed_scaling_factor

    Args:
        router_logits: [T, E], any floating dtype. DeepSeek-V3 computes them in float32.
        top_k: experts per token, 1 to the number of experts in kept groups.
        correction_bias: [E] floating, or None for zeros. It decides who is chosen, not the weights.
        n_group: number of groups, each of E / n_group neighbours.
        topk_group: groups kept.
        renormalize: False leaves out the division.
        routed_scaling_factor: multiplies the weights in the end.

    Raises:
        ShapeError, DTypeError, LayoutError, DeviceError, OptionError: see the message.
    """
    _check(router_logits, top_k)
    _check_groups(router_logits.shape[1], top_k, n_group, topk_group)
    _check_bias(correction_bias, router_logits)
    if not isinstance(routed_scaling_factor, (int, float)) or not abs(routed_scaling_factor) <= FLOAT32_MAX:
        wanted, do = "a number that float32 holds", "It stands in the model's configuration."
        raise OptionError(explain("routed_scaling_factor", got=repr(routed_scaling_factor), wanted=wanted, do=do))
    scores = router_logits.float().sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.float()
    ids = _in_best_groups(choice, n_group, topk_group, largest=2).topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        # All scores of a token may underflow to 0; its weights are then 0, not NaN.
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return TopK(weights * float(routed_scaling_factor), ids)


def _in_best_groups(choice: Tensor, n_group: int, topk_group: int, *, largest: int) -> Tensor:
    """[T, E] with -inf outside of the groups whose ``largest`` largest numbers have the largest sums."""
    if topk_group == n_group:
        return choice
    grouped = choice.view(-1, n_group, choice.shape[1] // n_group)  # [T, n_group, E / n_group]
    of_group = grouped.topk(min(largest, grouped.shape[2]), dim=-1).values.sum(dim=-1)
    kept = of_group.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(of_group, dtype=torch.bool).scatter(1, kept, False)
    return torch.where(dropped.unsqueeze(-1), -torch.inf, grouped).flatten(1)


def _check(router_logits: Tensor, top_k: int) -> None:
    if not isinstance(router_logits, Tensor) or not router_logits.dtype.is_floating_point:
        got = router_logits.dtype if isinstance(router_logits, Tensor) else type(router_logits).__name__
        do = "Pass the output of the router's linear layer."
        raise DTypeError(explain("router_logits", got=got, wanted="a tensor of a floating dtype", do=do))
    if router_logits.layout != torch.strided:
        do = "Call router_logits.to_dense()."
        raise LayoutError(explain("router_logits", got=router_logits.layout, wanted="a dense tensor", do=do))
    if router_logits.dim() != 2:
        shape = tuple(router_logits.shape)
        do = "Flatten batch and sequence into tokens: logits.flatten(0, -2)."
        raise ShapeError(explain("shape of router_logits", got=shape, wanted="[T, E]", do=do))
    _check_integer("top_k", top_k, router_logits.shape[1], "the number of experts in router_logits")


def _check_integer(name: str, value: int, largest: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        wanted = f"an integer from 1 to {largest}, {what}"
        raise OptionError(explain(name, got=repr(value), wanted=wanted, do="See the model's configuration."))


def _check_groups(n_experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    _check_integer("n_group", n_group, n_experts, "the number of experts in router_logits")
    _check_integer("topk_group", topk_group, n_group, "which is n_group")
    if n_experts % n_group:
        wanted = f"a divisor of the {n_experts} experts in router_logits"
        raise OptionError(explain("n_group", got=n_group, wanted=wanted, do="Groups must be of equal size."))
    candidates = topk_group * (n_experts // n_group)
    if top_k > candidates:
        wanted = f"at most {candidates}: {topk_group} kept groups of {n_experts // n_group} experts"
        raise OptionError(explain("top_k", got=top_k, wanted=wanted, do="Raise topk_group or lower top_k."))


def _check_bias(correction_bias: Tensor | None, router_logits: Tensor) -> None:
    if correction_bias is None:
        return
    what, do = "correction_bias", "DeepSeek-V3 calls it e_score_correction_bias."
    if not isinstance(correction_bias, Tensor) or not correction_bias.dtype.is_floating_point:
        got = correction_bias.dtype if isinstance(correction_bias, Tensor) else type(correction_bias).__name__
        raise DTypeError(explain(what, got=got, wanted="a tensor of a floating dtype", do=do))
    if correction_bias.layout != torch.strided:
        do = "Make it one: .to_dense()."
        raise LayoutError(explain(what, got=correction_bias.layout, wanted="a dense tensor", do=do))
    if correction_bias.shape != router_logits.shape[1:]:
        shape, wanted = tuple(correction_bias.shape), f"[E] = ({router_logits.shape[1]},), as router_logits say"
        raise ShapeError(explain(f"shape of {what}", got=shape, wanted=wanted, do=do))
    if correction_bias.device != router_logits.device:
        wanted = f"{router_logits.device}, where router_logits are"
        raise DeviceError(explain(f"device of {what}", got=correction_bias.device, wanted=wanted, do="Move one."))
