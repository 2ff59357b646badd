"""First calls at the same time: in threads, in processes that were forked after the import, and in new ones."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

import fusedmoe
from fusedmoe.testing.cases import Case

CASE = Case.of((20, 2, 4, 33, 24), dtype="float32", bias=True)
#: Threads that begin together, where nothing was called before; and a process that was forked.
FIRST_CALLS = """
import threading, torch, fusedmoe
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x, w13, w2 = (torch.randn(*s, generator=generator) for s in ((9, 16), (4, 24, 16), (4, 16, 12)))
logits = torch.randn(9, 4, generator=generator)
gate, results = threading.Barrier(8), []
def work():
    gate.wait()
    topk = fusedmoe.softmax_topk(logits, 2, renormalize=True)
    w = fusedmoe.quantize(w13, "fp8_channel", parts=2)
    results.append((fusedmoe.fused_experts(x, w13, w2, *topk), fusedmoe.fused_experts(x, w, w2, *topk)))
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join(60)
assert len(results) == 8
assert all(all(torch.equal(a, b) for a, b in zip(r, results[0])) for r in results)
print("ok")
"""
FORKED = """
import os, torch, fusedmoe, fusedmoe.functional, fusedmoe.nn, fusedmoe.checkpoint, fusedmoe.torch_ops
pid = os.fork()
if pid == 0:
    layer = fusedmoe.FusedExperts(4, 16, 8)
    out = layer(torch.randn(5, 16), torch.rand(5, 2), torch.randint(4, (5, 2)))
    os._exit(0 if out.isfinite().all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print("ok")
"""


@pytest.mark.parametrize("code", [FIRST_CALLS, FORKED], ids=["threads", "fork"])
def test_first_calls(code, python):
    assert python(code).strip() == "ok"


def _call(seed: int) -> torch.Tensor:
    arguments, options = CASE.draw(seed=seed)
    return fusedmoe.fused_experts(*arguments, **options)


def test_new_processes():
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_call, range(4))
    assert all(torch.equal(got, _call(seed)) for seed, got in enumerate(found))


def test_threads_leave_the_precision_of_the_process_alone():
    library = torch.backends.mkldnn.matmul
    before = library.fp32_precision
    library.fp32_precision = "bf16"
    wrong, gate = [], threading.Barrier(4)
    arguments, options = Case.of((64, 2, 4, 64, 48), dtype="float32").draw()
    want = fusedmoe.reference.fused_experts(*arguments, **options)

    def work() -> None:
        gate.wait()
        for _ in range(50):
            out = fusedmoe.fused_experts(*arguments, **options)
            wrong.append(float((out - want).norm() / want.norm()) > 1e-6)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = library.fp32_precision
    finally:
        library.fp32_precision = before
    assert len(wrong) == 200 and not any(wrong)
    assert after == "bf16"
