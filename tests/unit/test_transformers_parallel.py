"""Tensor and expert parallelism of Transformers over two processes of this file, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

PROMPT = torch.arange(3, 17).view(2, 7)


@pytest.mark.parametrize(
    ("mode", "name"),
    [("tp", "mixtral.MixtralExperts"), ("ep", "mixtral.MixtralExperts"), ("ep", "gpt_oss.GptOssExperts")],
)
def test_two_ranks(mode, name, tmp_path):
    pytest.importorskip("accelerate")
    if tuple(map(int, version("transformers").split(".")[:2])) < (5, 18):
        pytest.skip("older versions of Transformers are told in other words")
    from tiny_models import build

    model = build(name)
    model.save_pretrained(tmp_path)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.save(model(input_ids=PROMPT).logits, tmp_path / "logits.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, mode, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists(), "both got to the end"


def rank(mode: str, directory: Path) -> None:
    """What one of the processes does."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from fusedmoe.integrations.transformers import NAME, interface

    seen = []
    real = interface.fused_experts

    def spy(x, w13, w2, weights, ids, **options):
        seen.append((w13, w2, ids))
        return real(x, w13, w2, weights, ids, **options)

    interface.fused_experts = spy
    torch.distributed.init_process_group("gloo")
    how = {"tp_plan": "auto"} if mode == "tp" else {"distributed_config": DistributedConfig(tp_size=2, ep_size=2)}
    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation=NAME, **how).eval()
    with torch.no_grad():
        got = model(input_ids=PROMPT).logits
    want = torch.load(directory / "logits.pt")
    assert (got - want).norm() / want.norm() < 2e-6
    w13, w2, ids = seen[0]
    if mode == "tp":  # half of the rows of gate and of up
        assert w13.shape == (4, 48, 32) and w2.shape == (4, 32, 24)
    else:  # half of the experts; others are named by the id after the last
        assert w13.shape[0] == 2 and ids.max() == 2
    torch.distributed.barrier()
    (directory / f"rank{torch.distributed.get_rank()}").touch()
    os._exit(0)  # gloo's threads have been seen to abort a process at its end


if __name__ == "__main__":
    rank(sys.argv[1], Path(sys.argv[2]))
