"""What other libraries hand over: Transformers' expert parallelism, and a stand-in of DeepEP's interface."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fusedmoe
from fusedmoe.errors import OptionError, ShapeError
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.modular import Experts, run
from fusedmoe.numerics import quantise_inputs
from fusedmoe.parallel import DeepEP, DeepEPLowLatency
from fusedmoe.parallel.deepep import _as_codes
from fusedmoe.schemes import format_of
from fusedmoe.spec.format import Inputs
from fusedmoe.testing.cases import Case
from fusedmoe.testing.verify import relative_error

E, K, H, I = 8, 3, 256, 64
CASE = Case(tokens=26, top_k=K, experts=E, hidden=H, intermediate=I, ids="uniform")
BLOCKS = (format_of("fp8_block"),) * 2
CHANNELS = (format_of("fp8_channel"),) * 2


def drawn(case):
    (x, w13, w2, weights, ids), options = case.draw(seed=2)
    return (x, weights, ids), w13, w2, {name: options[name] for name in ("w13_bias", "w2_bias")}


def share(w13, w2, biases):
    """The half of this rank."""
    chosen = slice(dist.get_rank() * E // 2, (dist.get_rank() + 1) * E // 2)
    half = [w.experts(chosen.start, chosen.stop) if isinstance(w, ExpertMatrix) else w[chosen] for w in (w13, w2)]
    return half, {name: None if bias is None else bias[chosen] for name, bias in biases.items()}


# --- Transformers ---------------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    """What an experts module of Transformers looks like to its expert parallelism."""

    num_experts = E // 2

    def __init__(self, half, biases, seen):
        super().__init__()
        self.half, self.biases, self.seen = half, biases, seen

    def forward(self, hidden_states, top_k_index, top_k_weights):
        self.seen.append((tuple(top_k_index.shape), int(top_k_index.max()), top_k_weights.float().unique().tolist()))
        return fusedmoe.fused_experts(hidden_states, *self.half, top_k_weights, top_k_index, **self.biases)


def by_transformers(name):
    expert_parallel = pytest.importorskip("transformers.distributed.expert_parallel")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    alone = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))["tp"]
    (x, weights, ids), w13, w2, biases = drawn(CASE.of((26, K, E, H, I), dtype="float32", bias=True, ids="uniform"))
    seen = []
    module = Module(*share(w13, w2, biases), seen)
    ids = ids.long()
    with torch.no_grad():
        if name == "AllReduceEP":
            got = expert_parallel.AllReduceEP(module, mesh, mesh)(x, ids, weights)
            rows = slice(None)
        else:
            rows = slice(0, 17) if dist.get_rank() == 0 else slice(17, 26)
            got = expert_parallel.AllToAllEP(module, mesh, alone)(x[rows], ids[rows], weights[rows])
        want = fusedmoe.fused_experts(x, w13, w2, weights, ids, **biases)[rows]
    return relative_error(got, want), seen


@pytest.mark.parametrize("name", ["AllReduceEP", "AllToAllEP"])
def test_transformers_feeds_the_layer(two, name):
    pytest.importorskip("transformers.distributed.expert_parallel")
    for error, seen in two.run(by_transformers, name):
        assert error < 5e-7
        (shape, largest, unique) = seen[0]
        if name == "AllReduceEP":
            assert shape[1] == K and largest == E // 2, "absent experts have the id after the last"
            assert 0.0 in unique
        else:
            assert shape[1] == 1 and largest < E // 2 and unique == [1.0], "one choice each, of weight one"


def test_the_example_runs():
    example = Path(__file__).parents[2] / "examples" / "expert_parallel.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, check=True, capture_output=True, text=True, env=hidden, timeout=100)
    found = re.search(r"2 ranks, 16 experts on cpu: largest relative difference (\S+)", done.stdout)
    assert found is not None, done.stdout
    assert float(found[1]) < 1e-6


# --- DeepEP ---------------------------------------------------------------------------------------------------------


class Buffer:
    """Stands in for deep_ep.Buffer: its signatures, and what it says of shapes, types and order, over gloo."""

    def __init__(self):
        self.rank, self.group_size = dist.get_rank(), dist.get_world_size()

    def everyone(self, value):
        values = [None] * self.group_size
        bits = [v.view(torch.uint8) if getattr(v, "dtype", None) == torch.float8_e4m3fn else v for v in value]
        dist.all_gather_object(values, bits if isinstance(value, tuple) else value)
        return values

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None):
        assert topk_idx.dtype == torch.int64
        each = num_experts // self.group_size
        ranks = torch.arange(self.group_size)
        in_rank = ((topk_idx // each)[:, :, None] == ranks).logical_and((topk_idx >= 0)[:, :, None]).any(1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
        num_tokens_per_expert=None, topk_idx=None, topk_weights=None, expert_alignment=1,
    ):  # fmt: skip
        codes, scale = x if isinstance(x, tuple) else (x, None)
        assert codes.dtype == (torch.bfloat16 if scale is None else torch.float8_e4m3fn)
        assert scale is None or (scale.dtype, tuple(scale.shape)) == (torch.float32, (codes.shape[0], H // 128))
        assert topk_weights.dtype == torch.float32
        each = len(num_tokens_per_expert) // self.group_size
        assert num_tokens_per_rank.tolist() == is_token_in_rank.sum(0).tolist()
        rows, ids, weights, scales, source = [], [], [], [], []
        everyone = self.everyone((codes, scale, is_token_in_rank, topk_idx, topk_weights))
        for rank, (c, s, goes, i, w) in enumerate(everyone):
            chosen = goes[:, self.rank]
            local = i[chosen] - self.rank * each
            absent = (i[chosen] < 0) | (local < 0) | (local >= each)
            rows.append(c[chosen])
            ids.append(local.masked_fill(absent, -1))
            weights.append(w[chosen].masked_fill(absent, 0.0))
            source += [(rank, t) for t in chosen.nonzero().flatten().tolist()]
            if s is not None:
                scales.append(s[chosen])
        per_expert = [int((torch.cat(ids) == e).sum()) for e in range(each)]
        received = torch.cat([r.view(torch.uint8) for r in rows]).view(codes.dtype)
        received = received if scale is None else (received, torch.cat(scales))
        return received, torch.cat(ids), torch.cat(weights), per_expert, (source, codes.shape[0]), None

    def combine(self, x, handle, topk_weights=None):
        source, count = handle
        assert x.dtype == torch.bfloat16 and x.shape[0] == len(source)
        total = torch.zeros(count, x.shape[1])
        for there, rows in self.everyone((source, x)):
            for (rank, token), row in zip(there, rows, strict=True):
                if rank == self.rank:
                    total[token] += row.float()
        return total.bfloat16(), None, None

    def low_latency_dispatch(self, x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, use_fp8=True):
        assert x.dtype == torch.bfloat16 and topk_idx.dtype == torch.int64
        each, most = num_experts // self.group_size, num_max_dispatch_tokens_per_rank * self.group_size
        rows = torch.full((each, most, x.shape[1]), float("nan"), dtype=torch.bfloat16)  # beyond the count: anything
        counts, source = torch.zeros(each, dtype=torch.int32), {}
        for rank, (c, i) in enumerate(self.everyone((x, topk_idx))):
            for t, j in (i // each == self.rank).logical_and(i >= 0).nonzero().tolist():
                e = int(i[t, j]) - self.rank * each
                rows[e, counts[e]] = c[t]
                source[e, int(counts[e])] = (rank, t, j)
                counts[e] += 1
        if not use_fp8:
            return rows, counts, source, None, None
        inputs = Inputs(element="e4m3", mode="group", group=128)
        codes, scale = quantise_inputs(rows.view(-1, x.shape[1]), inputs)
        # As DeepEP has it: the columns of scales are the slow dimension.
        scale = scale.view(each, most, -1).transpose(1, 2).contiguous().transpose(1, 2)
        return (codes.to(torch.float8_e4m3fn).view(rows.shape), scale), counts, source, None, None

    def low_latency_combine(self, x, topk_idx, topk_weights, handle):
        assert x.dtype == torch.bfloat16 and topk_weights.dtype == torch.float32
        rows = {where: x[place] for place, where in handle.items()}
        found = {where: row for other in self.everyone(rows) for where, row in other.items() if where[0] == self.rank}
        total = torch.zeros(topk_idx.shape[0], x.shape[2])
        for (_, t, j), row in sorted(found.items(), key=lambda item: item[0]):
            total[t] += row.float() * topk_weights[t, j]
        return total.bfloat16(), None, None


def by_deepep(kind, case):
    (x, weights, ids), w13, w2, biases = drawn(case)
    half, own = share(w13, w2, biases)
    layer = Experts(*half, **own)
    rows = slice(0, 17) if dist.get_rank() == 0 else slice(17, 26)
    path = DeepEP(Buffer(), E) if kind == "throughput" else DeepEPLowLatency(Buffer(), E, 20)
    ids[3] = torch.tensor([-1, E, ids[3, 2]])  # absent ones
    got = run(path, layer, x[rows], weights[rows], ids[rows])
    whole = fusedmoe.fused_experts(x, w13, w2, weights, ids, **biases)
    return got, whole[rows]


@pytest.mark.parametrize("kind", ["throughput", "latency"])
@pytest.mark.parametrize("formats", [(None, None), BLOCKS, CHANNELS], ids=["bf16", "fp8_block", "fp8_channel"])
def test_deepep(two, kind, formats):
    case = Case(
        tokens=26, top_k=K, experts=E, hidden=H, intermediate=128, dtype="bfloat16", bias=True, ids="uniform",
        formats=formats,
    )  # fmt: skip
    for got, want in two.run(by_deepep, kind, case):
        assert got.dtype == torch.bfloat16
        # Each rank's part, or each expert's, is rounded once more.
        assert relative_error(got, want) < 2.0**-7


@pytest.mark.parametrize(("hidden", "travels"), [(256, True), (192, False)])
def test_deepep_moves_codes_of_whole_groups(hidden, travels):
    w13, w2 = torch.randn(2, 128, hidden), torch.randn(2, hidden, 64)
    layer = Experts(fusedmoe.quantize(w13, "fp8_block", parts=2), fusedmoe.quantize(w2, "fp8_block"))
    assert _as_codes(layer) is travels


class One:
    """A buffer of one rank."""

    group_size = 1


def test_what_deepep_cannot_do():
    layer = Experts(torch.randn(4, 8, 16).bfloat16(), torch.randn(4, 16, 4).bfloat16())
    x, weights, ids = torch.randn(3, 16).bfloat16(), torch.rand(3, 2), torch.zeros(3, 2).long()

    def fails(path, what, error, x: Tensor = x, **options):
        layer.options = options
        with pytest.raises(error, match=what):
            path.prepare(layer, x, weights, ids)

    for path in (DeepEP(One(), 4), DeepEPLowLatency(One(), 4, 2)):
        fails(path, "expert_map: got one; wanted none", OptionError, expert_map=torch.arange(4))
        fails(path, "hidden_states by DeepEP: got torch.float32; wanted bfloat16", OptionError, x=x.float())
        fails(type(path)(One(), 8, *[2] * (path.__class__ is DeepEPLowLatency)), "layer: got 4 experts", ShapeError)
    fails(path, "hidden_states: got 3 tokens; wanted at most max_tokens = 2", OptionError)
    fails(path, "batched rows: got router weights on the input", OptionError, apply_router_weight_on_input=True)
