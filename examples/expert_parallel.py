"""A layer with its experts on all ranks, and the same layer on one.

``torchrun --nproc-per-node 2 examples/expert_parallel.py``

On GPUs over NCCL, else on CPUs over gloo. Every rank has tokens of its own, a different number of them, and gets their
outputs. At the end each compares with the layer that has all experts, and the first rank prints what it found.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

import fusedmoe
from fusedmoe.parallel import ExpertParallel, Placement

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 256, 128


def draw(device: torch.device, dtype: torch.dtype) -> tuple[fusedmoe.FusedExperts, torch.Tensor]:
    """The whole layer and its router, the same on every rank."""
    torch.manual_seed(0)
    layer = fusedmoe.FusedExperts(EXPERTS, HIDDEN, INTERMEDIATE, dtype=dtype)
    return layer.to(device), torch.randn(EXPERTS, HIDDEN, dtype=dtype).to(device)


@torch.no_grad()
def main() -> None:
    """Run the layer both ways."""
    if "RANK" not in os.environ:
        sys.exit("Start one process a GPU: torchrun --nproc-per-node 2 examples/expert_parallel.py")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    # Both kinds: ExpertParallel tells ranks of each other's errors on the host.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole, router = draw(device, torch.bfloat16 if on_gpu else torch.float32)

    # A real program reads its own experts: FusedExperts.from_checkpoint(path, layer, experts=(start, stop)).
    mine = list(Placement.contiguous(EXPERTS, ranks).experts[rank])
    share = fusedmoe.FusedExperts.of(whole.w13[mine], whole.w2[mine])
    layer = ExpertParallel(dist.device_mesh.init_device_mesh(device.type, (ranks,)), share, top_k=TOP_K)

    torch.manual_seed(1 + rank)
    tokens = torch.randn(100 + 10 * rank, HIDDEN, dtype=router.dtype, device=device)
    topk = fusedmoe.softmax_topk(tokens @ router.T, TOP_K, renormalize=True)
    got, want = layer(tokens, topk.weights, topk.ids), whole(tokens, topk.weights, topk.ids)

    error = ((got - want).float().norm() / want.float().norm()).reshape(1)
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if rank == 0:
        print(f"{ranks} ranks, {EXPERTS} experts on {device.type}: largest relative difference {error.item():.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
