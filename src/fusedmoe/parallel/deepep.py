"""Dispatch and combine by DeepEP (https://github.com/deepseek-ai/DeepEP), where it is installed.

Both take a ``deep_ep.Buffer``, which the caller makes, as it knows the network; nothing here imports the package.
Experts lie in contiguous runs of the same length on all ranks, as DeepEP has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedmoe.errors import OptionError, ShapeError, explain
from fusedmoe.modular import Experts, Prepared

#: Columns that share a scale where DeepEP moves codes.
GROUP = 128


class DeepEP:
    """The high-throughput kernels: rows in the standard format; the combine adds the ranks' parts.

    Rows travel as e4m3 with a scale per 128 columns where the scheme has those, else in bfloat16.
    """

    def __init__(self, buffer: Any, num_experts: int) -> None:
        """``buffer``: a deep_ep.Buffer; ``num_experts``: of all ranks."""
        self.buffer, self.num_experts = buffer, num_experts

    def prepare(self, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Prepared:
        """Quantise and dispatch."""
        _check(layer, hidden_states, self.num_experts, self.buffer.group_size)
        travels = _as_codes(layer)
        x: Any = hidden_states
        if travels:
            codes, scale = layer.encode(hidden_states)
            x = (codes, scale)
        ids = topk_ids.long()
        ids = torch.where((ids >= 0) & (ids < self.num_experts), ids, -1)
        per_rank, per_rdma_rank, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(ids, self.num_experts)
        received, local_ids, weights, _, handle, _ = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=ids,
            topk_weights=topk_weights.float(),
        )
        rows, scale = received if travels else (received, None)
        return Prepared(rows, weights, local_ids, scale, dtype=hidden_states.dtype, state=handle)

    def finalize(self, output: Tensor, prepared: Prepared) -> Tensor:
        """Combine: the ranks' weighted sums are added."""
        combined, _, _ = self.buffer.combine(output, prepared.state)
        return combined  # type: ignore[no-any-return]


class DeepEPLowLatency:
    """The low-latency kernels: rows in the batched format with counts on the device; the combine weighs and adds."""

    def __init__(self, buffer: Any, num_experts: int, max_tokens: int) -> None:
        """``max_tokens``: most tokens of a rank, the same on all."""
        self.buffer, self.num_experts, self.max_tokens = buffer, num_experts, max_tokens

    def prepare(self, layer: Experts, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Prepared:
        """Quantise and dispatch.

        Raises:
            OptionError: router weights on the input, or more tokens than max_tokens.
        """
        _check(layer, hidden_states, self.num_experts, self.buffer.group_size)
        if layer.options.get("apply_router_weight_on_input"):
            got, wanted = "router weights on the input", "weights that the combine applies"
            raise OptionError(explain("batched rows", got=got, wanted=wanted, do="Use DeepEP."))
        if hidden_states.shape[0] > self.max_tokens:
            got, wanted = f"{hidden_states.shape[0]} tokens", f"at most max_tokens = {self.max_tokens}"
            raise OptionError(explain("hidden_states", got=got, wanted=wanted, do="Raise max_tokens on all ranks."))
        ids = topk_ids.long()
        ids = torch.where((ids >= 0) & (ids < self.num_experts), ids, -1)
        travels = _as_codes(layer)
        received, counts, handle, _, _ = self.buffer.low_latency_dispatch(
            hidden_states, ids, self.max_tokens, self.num_experts, use_fp8=travels
        )
        rows, scale = received if travels else (received, None)
        state = (ids, topk_weights.float(), handle)
        # Room for all tokens of all ranks, of which each expert gets its share.
        expected = max(1, self.max_tokens * self.buffer.group_size * ids.shape[1] // self.num_experts)
        return Prepared(
            *(rows, None, None, scale, counts),
            expected_rows=expected,
            dtype=hidden_states.dtype,
            state=state,
        )

    def finalize(self, output: Tensor, prepared: Prepared) -> Tensor:
        """Combine: rows are weighed and added."""
        ids, weights, handle = prepared.state
        combined, _, _ = self.buffer.low_latency_combine(output, ids, weights, handle)
        return combined  # type: ignore[no-any-return]


def _as_codes(layer: Experts) -> bool:
    """The codes that DeepEP moves are those of the scheme; it moves whole groups alone."""
    inputs = layer.inputs
    return (
        layer.hidden_size % GROUP == 0
        and inputs is not None
        and (inputs.element, inputs.mode, inputs.group) == ("e4m3", "group", GROUP)
    )


def _check(layer: Experts, hidden_states: Tensor, num_experts: int, ranks: int) -> None:
    if layer.num_experts * ranks != num_experts:
        got, wanted = f"{layer.num_experts} experts", f"{num_experts} / {ranks} ranks"
        do = "DeepEP wants runs of the same length on all ranks; ExpertParallel takes any placement."
        raise ShapeError(explain("layer", got=got, wanted=wanted, do=do))
    if layer.options.get("expert_map") is not None:
        do = "Make Experts without one: DeepEP hands over local ids."
        raise OptionError(explain("expert_map", got="one", wanted="none", do=do))
    if hidden_states.dtype != torch.bfloat16:
        raise OptionError(
            explain("hidden_states by DeepEP", got=hidden_states.dtype, wanted="bfloat16", do="Use ExpertParallel.")
        )
