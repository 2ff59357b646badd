"""On a GPU: memory, ids, devices, streams, processes and sizes, over backends and schemes; see docs/guarantees.md."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fusedmoe
from fusedmoe import reference
from fusedmoe.checks import check
from fusedmoe.plan.planner import support
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.target import target_of
from fusedmoe.testing.cases import ABSENT, Case, random_matrix, run_poisoned
from fusedmoe.testing.verify import expected, relative_error, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

BACKENDS = ("triton", "gluon_sm90")
#: A path without a schedule, one launch for it, three, gathered rows.
SHAPES = ((4, 8, 64, 256, 192), (100, 8, 64, 256, 192), (600, 8, 64, 256, 192), (2100, 2, 8, 128, 4096))


def drawn(shape, scheme, backend, **options):
    """A case and its arguments, where the backend takes them."""
    form = None if scheme == "none" else format_of(scheme)
    case = Case.of(shape, formats=(form, form), **options).fitted()
    arguments, options = case.draw("cuda")
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    if support(check(*arguments, **options).problem, target)[backend]:
        pytest.skip(f"{backend} does not take it")
    return case, arguments, {**options, "backend": backend}


def allocations() -> int:
    return torch.cuda.memory_stats()["allocation.all.allocated"]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_the_declared_workspace_is_all_the_memory(scheme, shape, backend):
    _, arguments, options = drawn(shape, scheme, backend, bias=True)
    n_bytes = fusedmoe.workspace_bytes(*arguments, **options)
    out = fusedmoe.fused_experts(*arguments, **options)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # What was asked for: what the allocator hands out depends on the blocks that it has at hand.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    fusedmoe.fused_experts(*arguments, **options)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert out.nbytes < peak <= n_bytes + out.nbytes
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    count = allocations()
    fusedmoe.fused_experts(*arguments, out=out, workspace=workspace, **options)
    assert allocations() == count


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["none", *SCHEMES])
def test_a_capture_allocates_what_is_declared(scheme, backend):
    case, arguments, options = drawn((600, 8, 64, 256, 192), scheme, backend)
    out = torch.empty_like(arguments[0])
    workspace = torch.empty(fusedmoe.workspace_bytes(*arguments, **options), dtype=torch.uint8, device="cuda")
    fusedmoe.fused_experts(*arguments, out=out, workspace=workspace, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count = allocations()  # in here: the first capture of a process has two of its own
        fusedmoe.fused_experts(*arguments, out=out, workspace=workspace, **options)
        assert allocations() == count
    for kind in ("one", "invalid", "absent"):
        other, _ = replace(case, ids=kind).draw("cuda", seed=3)
        for index in (0, 3, 4):
            arguments[index].copy_(other[index])
        out.fill_(float("nan"))
        workspace.fill_(0xFF)
        graph.replay()
        torch.cuda.synchronize()
        verdict = verify(out, arguments, {k: v for k, v in options.items() if k != "backend"})
        assert verdict.ok, (kind, verdict)


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("tokens", [1, 4, 40, 600])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_id_and_any_entry_of_a_map(dtype, mapped, tokens, backend):
    _, arguments, options = drawn((tokens, 4, 6, 64, 96), "none", backend)
    wild = [*ABSENT, 6, 7, 8, 9, *([] if dtype == torch.int32 else [2**63 - 1, -(2**63), 2**32, 2**32 + 1])]
    g = torch.Generator("cuda").manual_seed(0)

    def drawn_from(values, *sizes):
        values = torch.tensor(values, device="cuda")
        return values[torch.randint(len(values), sizes, generator=g, device="cuda")].to(dtype)

    if mapped:
        options["expert_map"] = drawn_from([*wild, *range(6)], 9)
    arguments = (*arguments[:4], drawn_from([*wild, *range(6)], tokens, 4))
    out = torch.full_like(arguments[0], float("nan"))
    workspace = torch.full((fusedmoe.workspace_bytes(*arguments, **options),), 0x7F, dtype=torch.uint8, device="cuda")
    fusedmoe.fused_experts(*arguments, out=out, workspace=workspace, **options)
    del options["backend"]
    want = expected(arguments, options)
    assert relative_error(out, want) < 2.0**-6
    absent = want.abs().sum(1) == 0
    assert not torch.count_nonzero(out[absent]) and not torch.signbit(out[absent]).any()  # +0


# --- devices, streams, threads, processes -----------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scheme", ["none", "fp8_block", "int8_w8a8", "int4_w4a16", "fp8_tensor"])
@pytest.mark.parametrize("tokens", [4, 600])
def test_another_device_than_the_current_one(tokens, scheme):
    form = None if scheme == "none" else format_of(scheme)
    case = Case.of((tokens, 8, 64, 256, 256), formats=(form, form)).fitted()
    with torch.cuda.device(0):
        here, error = run_poisoned(case, "cuda:0", "auto")
        assert error < case.tolerance
        there, error = run_poisoned(case, "cuda:1", "auto")
        assert error < case.tolerance
        assert torch.cuda.current_device() == 0
    assert there.device.index == 1 and torch.equal(here.cpu(), there.cpu())


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("scheme", ["none", "fp8_block", "int4_w4a16"])
def test_streams_and_threads(scheme, backend):
    _, arguments, options = drawn((300, 8, 32, 256, 256), scheme, backend)
    want = fusedmoe.fused_experts(*arguments, **options)
    torch.cuda.synchronize()
    found: list[torch.Tensor] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x = arguments[0].clone()  # nothing but the stream orders it before the call
            found.extend(fusedmoe.fused_experts(x, *arguments[1:], **options) for _ in range(5))
        stream.synchronize()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20 and all(torch.equal(one, want) for one in found)


FIRST_CALLS = """
import os, sys, threading, torch, fusedmoe
from fusedmoe.testing.cases import Case
import fusedmoe.functional, fusedmoe.nn, fusedmoe.checkpoint, fusedmoe.torch_ops, fusedmoe.backends.triton
assert not torch.cuda.is_initialized()
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
found, gate = [], threading.Barrier(4)
arguments, options = Case.of((300, 8, 32, 256, 192)).draw("cuda")
def work():
    gate.wait()
    found.append(fusedmoe.fused_experts(*arguments, **options))
    torch.cuda.synchronize()
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 4 and all(torch.equal(one, found[0]) for one in found)
sys.stdout.flush()
os._exit(0)
"""


def test_first_calls_in_threads_of_forked_and_concurrent_processes(tmp_path):
    """Two processes with an empty cache of kernels, each of which forks after the import and calls in four threads."""
    source = str(Path(fusedmoe.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FIRST_CALLS]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    for one in both:
        said, _ = one.communicate(timeout=400)
        assert one.returncode == 0, said


# --- sizes ------------------------------------------------------------------------------------------------------------


def enough(gib: int) -> None:
    if torch.cuda.get_device_properties(0).total_memory < gib * 2**30:
        pytest.skip(f"needs {gib} GiB")


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4", "nvfp4"])
def test_more_than_2_to_31_codes(scheme):
    """w13 and w2 beyond 2^31 codes, packed ones beyond 2^31 bytes; the first and the last experts compared."""
    enough(100)
    form = format_of(scheme)
    n_experts, hidden, intermediate = (600, 4096, 2048) if form.per_byte == 2 else (300, 4096, 2048)
    g = torch.Generator("cuda").manual_seed(0)
    w13 = random_matrix(form, (n_experts, 2 * intermediate, hidden), g, parts=2)
    w2 = random_matrix(form, (n_experts, hidden, intermediate), g)
    assert w13.data.numel() > 2**31 and w2.data.numel() > 2**31
    x = torch.randn(256, hidden, generator=g, device="cuda").bfloat16()
    ids = torch.randint(4, (256, 2), generator=g, device="cuda")
    ids[:, 1] = n_experts - 1 - ids[:, 1]
    weights = torch.rand(256, 2, generator=g, device="cuda")
    out = fusedmoe.fused_experts(x, w13, w2, weights, ids)
    verdict = verify(out, (x, w13, w2, weights, ids), {})
    assert verdict.ok, verdict


@pytest.mark.parametrize("top_k", [1, 64])
def test_many_tokens_and_experts(top_k):
    """T = 262144, E = 4096, top_k = 64: 2^24 slots; rows of the last tile are compared."""
    enough(100)
    tokens = 262144 if top_k == 64 else 2**20
    case = Case.of((tokens, top_k, 4096, 64, 32), ids="any")
    arguments, options = case.draw("cuda")
    out = fusedmoe.fused_experts(*arguments, **options)
    ends = torch.cat([torch.arange(256), torch.arange(tokens - 256, tokens)]).cuda()
    x, w13, w2, weights, ids = arguments
    want = reference.fused_experts(x[ends], w13, w2, weights[ends], ids[ends])
    assert relative_error(out[ends], want) < case.tolerance
    assert out.isfinite().all()


@pytest.mark.parametrize(("tokens", "experts"), list(itertools.product((1, 33), (1, 3, 385, 1023, 1025, 4096))))
def test_any_number_of_experts(tokens, experts):
    case = Case.of((tokens, min(64, experts), experts, 33, 48), ids="uniform")
    _, error = run_poisoned(case, "cuda", "auto")
    assert error < case.tolerance
