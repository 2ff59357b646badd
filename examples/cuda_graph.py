"""Decoding with CUDA graphs: one graph for each of some sizes, batches padded up to the next with absent experts.

``python examples/cuda_graph.py``

A padded token has the id -1 for each of its experts: it reads no weight. Without a GPU the same calls run without one.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

import fusedmoe

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 256, 128
SIZES = (1, 2, 4, 8, 16)


class Captured:
    """A layer with a graph for each of SIZES; called like the layer, for up to max(SIZES) tokens.

    The result is a view of memory that the next call of the same size writes.
    """

    def __init__(self, layer: fusedmoe.FusedExperts) -> None:
        device, dtype = layer.w13.device, layer.w13.dtype
        self.inputs = {
            size: (
                torch.zeros(size, HIDDEN, dtype=dtype, device=device),
                torch.zeros(size, TOP_K, device=device),
                torch.full((size, TOP_K), -1, dtype=torch.int32, device=device),
            )
            for size in SIZES
        }
        self.outputs, self.replay = {}, {}
        for size, inputs in reversed(self.inputs.items()):  # the largest first: the others fit into its memory
            layer(*inputs)  # compiles the kernels, which a capture may not
            if device.type != "cuda":
                self.outputs[size] = torch.empty_like(inputs[0])
                self.replay[size] = lambda inputs=inputs, out=self.outputs[size]: layer(*inputs, out=out)
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs[size] = layer(*inputs)
            self.replay[size] = graph.replay

    def __call__(self, hidden: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Fill the captured tensors, replay, and cut the padding off."""
        tokens = hidden.shape[0]
        size = SIZES[bisect_left(SIZES, tokens)]
        for mine, theirs in zip(self.inputs[size], (hidden, weights, ids), strict=True):
            mine[:tokens].copy_(theirs)
        self.inputs[size][2][tokens:].fill_(-1)
        self.replay[size]()
        return self.outputs[size][:tokens]


@torch.inference_mode()
def main() -> None:
    """Compare with the layer itself, for every number of tokens."""
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    # The bits of a token's output are then the same whatever it is padded to, so that they can be compared.
    layer = fusedmoe.FusedExperts(EXPERTS, HIDDEN, INTERMEDIATE, batch_invariant=True, dtype=dtype, device=device)
    captured = Captured(layer)
    for tokens in range(1, max(SIZES) + 1):
        hidden = torch.randn(tokens, HIDDEN, dtype=dtype, device=device)
        logits = torch.randn(tokens, EXPERTS, device=device)
        topk = fusedmoe.softmax_topk(logits, TOP_K, renormalize=True)
        assert torch.equal(captured(hidden, *topk), layer(hidden, *topk)), tokens
    how = "graphs" if device == "cuda" else "no graphs, for want of a GPU"
    print(f"{len(SIZES)} sizes, {how}: the outputs of 1 to {max(SIZES)} tokens are the layer's, to the bit")


if __name__ == "__main__":
    main()
