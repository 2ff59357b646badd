"""Other libraries' layers on our arguments, where they are installed: unquantised, [E, N, K], gate rows before up rows.

A peer is given the arguments once and may prepare what a model would have ready, such as modules and types of ids;
what it returns is the call that is verified and timed. A package is imported when its peer is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedmoe.errors import OptionError, explain
from fusedmoe.target import installed

Call = Callable[[], Tensor]


class NotHereError(Exception):
    """A peer cannot be run on these arguments or on this machine; the text says why."""


@dataclass(frozen=True)
class Library:
    """What runs a peer.

    Attributes:
        package: distribution whose version is shown.
        prepare: x, w13, w2, topk_weights, topk_ids -> the call.
    """

    package: str
    prepare: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Call]

    @property
    def version(self) -> str:
        """Name and version of the package; the name alone where it is not installed."""
        return " ".join(filter(None, (self.package, installed(self.package))))


def _torch_grouped_mm(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Call:
    """PyTorch's grouped product as one would write the layer with it: sort, multiply, activate, multiply, add."""
    grouped_mm: Callable[..., Tensor] | None = getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        message = f"torch {torch.__version__} has no torch._grouped_mm"
        raise NotHereError(message)
    experts = torch.arange(w13.shape[0], device=x.device, dtype=topk_ids.dtype)

    def call() -> Tensor:
        ids, order = topk_ids.flatten().sort(stable=True)
        ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
        token = order // topk_ids.shape[1]
        gate, up = grouped_mm(x[token], w13.transpose(1, 2), offs=ends).chunk(2, dim=1)
        rows = grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        weighted = rows * topk_weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=weighted.dtype).index_add_(0, token, weighted).to(x.dtype)

    return call


def _transformers(implementation: str) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Call]:
    def prepare(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Call:
        """The experts of Transformers' Mixtral around our weights, whose router gives ids in int64."""
        config_class, experts_class = _mixtral()
        config = config_class(
            hidden_size=x.shape[1],
            intermediate_size=w2.shape[2],
            num_local_experts=w13.shape[0],
            num_experts_per_tok=topk_ids.shape[1],
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = experts_class(config)
        experts.gate_up_proj = torch.nn.Parameter(w13, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(w2, requires_grad=False)
        ids = topk_ids.long()
        return lambda: experts(x, ids, topk_weights)

    return prepare


def _mixtral() -> tuple[Any, Any]:
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as cause:
        message = f"Transformers with experts implementations (5.0 or newer) cannot be imported: {cause}"
        raise NotHereError(message) from cause
    return MixtralConfig, MixtralExperts


def _transformers_batched_mm(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Call:
    """It copies the weights of an expert for every slot, so that few tokens fill a memory."""
    need, have = topk_ids.numel() * (w13[0].numel() + w2[0].numel()) * x.element_size(), _free_bytes(x.device)
    if have is not None and need > have:
        message = f"it copies the weights for every slot: {need / 1e9:.0f} GB, of which {have / 1e9:.0f} GB are free"
        raise NotHereError(message)
    return _transformers("batched_mm")(x, w13, w2, topk_weights, topk_ids)


def _free_bytes(device: torch.device) -> int | None:
    """Free memory; None where nobody says."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    if device.type == "cpu" and set(names) <= getattr(os, "sysconf_names", {}).keys():
        pages, size = map(os.sysconf, names)
        return pages * size
    return None


def _vllm(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Call:
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
    except ImportError as cause:
        message = f"vLLM cannot be imported: {cause}"
        raise NotHereError(message) from cause
    layer: Callable[..., Tensor] = fused_experts
    return lambda: layer(x, w13, w2, topk_weights, topk_ids)


PEERS: dict[str, Library] = {
    "torch._grouped_mm": Library("torch", _torch_grouped_mm),
    "transformers-grouped_mm": Library("transformers", _transformers("grouped_mm")),
    "transformers-batched_mm": Library("transformers", _transformers_batched_mm),
    "vllm": Library("vllm", _vllm),
}


def peers_of(names: Iterable[str]) -> tuple[str, ...]:
    """Peers by name, each once; "all" stands for all of them.

    Raises:
        OptionError: no such peer.

    >>> peers_of(["vllm", "vllm"])
    ('vllm',)
    """
    asked = [one for name in names for one in (PEERS if name == "all" else (name,))]
    for name in asked:
        if name not in PEERS:
            wanted = f"{', '.join(PEERS)} or all"
            raise OptionError(explain("peer", got=repr(name), wanted=wanted, do="Choose one of them."))
    return tuple(dict.fromkeys(asked))
