"""Which experts tokens choose: all alike, or some far more often than others."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedmoe.errors import OptionError, explain

#: Laws by which a token's experts are drawn.
ROUTINGS = ("uniform", "zipf")


def routing_of(text: str) -> str:
    """A law by name.

    Raises:
        OptionError: no such law.
    """
    if text not in ROUTINGS:
        raise OptionError(explain("routing", got=repr(text), wanted=" or ".join(ROUTINGS), do="Choose one of them."))
    return text


def draw_routing(
    routing: str, tokens: int, experts: int, top_k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Router weights and ids, each [tokens, top_k]; the experts of a token are distinct.

    "uniform": every expert is as likely. "zipf": the expert of rank r in a random order is drawn with probability
    proportional to 1 / r, without replacement: the top k of log p + g, where g is Gumbel noise.
    """
    device = generator.device
    if routing == "uniform":
        scores = torch.rand(tokens, experts, device=device, generator=generator)
    else:
        rank = torch.randperm(experts, device=device, generator=generator) + 1
        # Minus the logarithm of an exponential variable has the Gumbel distribution.
        waits = torch.empty(tokens, experts, device=device).exponential_(generator=generator)
        scores = -rank.log() - waits.log()
    weights, ids = torch.softmax(scores, 1).topk(top_k, dim=1)
    return weights, ids.int()
