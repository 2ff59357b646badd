"""A layer with adapters, compiled for every target: no spills, and within shared memory. Needs no GPU."""

from __future__ import annotations

import re

import pytest
import torch

from fusedmoe import LoRA, experts
from fusedmoe.checks import check
from fusedmoe.plan.planner import choose
from fusedmoe.plan.validity import shared_bytes
from fusedmoe.schemes import format_of
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN
from fusedmoe.testing import codegen
from fusedmoe.testing.cases import storage_of
from fusedmoe.testing.codegen import compiling_for

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)

#: (tokens, top_k, experts, hidden, intermediate): single rows, few slots, 16 rows, 64 rows, tall.
SHAPES = {
    "single": (1, 4, 128, 2048, 768),
    "few": (8, 1, 128, 2048, 768),
    "16 rows": (32, 8, 128, 2048, 768),
    "64 rows": (512, 8, 128, 2048, 768),
    "tall": (8192, 8, 64, 2048, 768),
}


#: ptxas stops at 128 or 168 registers, so that one more program fits, for this many bytes around a loop over adapters.
SPILLED = 32


def empty_matrix(scheme, shape, parts=1):
    if scheme == "none":
        return torch.empty(shape, dtype=torch.bfloat16)
    from fusedmoe import ExpertMatrix

    form = format_of(scheme)
    tensors = {name: torch.empty(sizes, dtype=dtype) for name, (sizes, dtype) in storage_of(form, shape, parts).items()}
    return ExpertMatrix(form, **tensors, parts=parts if form.block[0] > 1 else None)


def in_tensors_of_their_own(lora):
    """The same with a tensor each for gate and up."""
    rank, rows = lora.max_rank, lora.w13_b.shape[2] // 2
    (a, up_a), (b, up_b) = (
        (torch.empty_like(t[:, :, :size]), torch.empty_like(t[:, :, :size]))
        for t, size in ((lora.w13_a, rank), (lora.w13_b, rows))
    )
    return LoRA(a, b, lora.w2_a, lora.w2_b, up_a=up_a, up_b=up_b, finite=True)


def compile_layer(
    target, shape, scheme="none", rank=64, dtype=torch.bfloat16, chosen="triton", apart=False, pad=0, **options
):
    tokens, top_k, n_experts, hidden, intermediate = shape
    parts = 2 if options.get("gate_up_layout") != "interleaved" else 1
    w13 = empty_matrix(scheme, (n_experts, 2 * intermediate, hidden), parts)
    w2 = empty_matrix(scheme, (n_experts, hidden, intermediate))
    if scheme == "none":
        w13, w2 = w13.to(dtype), w2.to(dtype)
    lora = LoRA.empty(
        4, num_experts=n_experts, hidden_size=hidden, intermediate_size=intermediate, max_rank=rank, dtype=dtype
    )
    lora = in_tensors_of_their_own(lora) if apart else lora
    lora.w13_a = torch.empty(*lora.w13_a.shape[:3], hidden + pad, dtype=dtype)[..., :hidden]
    x, ids = torch.empty(tokens, hidden + pad, dtype=dtype)[:, :hidden], torch.zeros(tokens, top_k, dtype=torch.int64)
    adapters = {"lora": lora, "adapter_ids": torch.zeros(tokens, dtype=torch.int64)}
    call = check(x, w13, w2, torch.empty(tokens, top_k), ids, **adapters, **options)
    plan = choose(call.problem, KNOWN[target], chosen)
    with compiling_for(target) as compiled:
        experts.run(call, plan)
    return call.problem, plan.triton, compiled


def gemms(compiled):
    return [kernel for kernel in compiled if kernel.name in ("grouped_gemm", "grouped_gemv")]


@pytest.mark.parametrize(
    ("target", "shape"),
    [(t, s) for t in codegen.TARGETS for s in (SHAPES if t == "sm_90" else ("few", "64 rows"))],
)
def test_no_spills_within_shared_memory(target, shape):
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    problem, plan, compiled = compile_layer(target, SHAPES[shape], dtype=dtype)
    assert len(gemms(compiled)) == 4  # two that shrink
    assert [k.name for k in compiled].count("by_adapter") == plan.shrink.by_adapter
    for kernel in compiled:
        assert kernel.stack_bytes <= SPILLED, kernel
        assert kernel.shared_bytes <= KNOWN[target].shared_bytes, kernel
    _, gate_up, _, down = gemms(compiled)
    assert gate_up.shared_bytes <= shared_bytes(plan.gate_up, problem.gate_up_gemm, KNOWN[target])
    assert down.shared_bytes <= shared_bytes(plan.down, problem.down_gemm, KNOWN[target])


@pytest.mark.parametrize("rank", [1, 16, 200])
def test_ranks(rank):
    for shape in ("single", "few", "tall"):
        _, _, compiled = compile_layer("sm_90", SHAPES[shape], rank=rank)
        assert [k.name for k in compiled if k.stack_bytes > SPILLED] == []


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4"])
def test_schemes(scheme):
    for shape in ("single", "64 rows", "tall"):
        _, _, compiled = compile_layer("sm_90", SHAPES[shape], scheme=scheme)
        assert [(k.name, k.stack_bytes) for k in compiled if k.stack_bytes > SPILLED] == []


@pytest.mark.parametrize("apart", [True, False])
def test_rows_of_a_that_are_not_aligned_are_not_read_as_if_they_were(apart):
    """Triton 3.6 took the remainder of a remainder for a multiple of its divisor."""
    for pad, at_once in ((0, True), (1, False)):
        _, _, compiled = compile_layer("sm_90", SHAPES["tall"], rank=16, apart=apart, pad=pad)
        shrink, *_ = gemms(compiled)
        found = re.findall(r"cp\.async\.c[ag]\.\S+ \[[^\]]+\], \[[^\]]+\], 0x10|ld\.global\S*\.v4", shrink.asm["ptx"])
        assert bool(found) == at_once


@pytest.mark.skipif(not KNOWN["sm_90"].gluon, reason="needs Gluon as it is in Triton 3.6 and newer")
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize(("rank", "apart"), [(64, False), (8, True)])
@pytest.mark.parametrize("shape", [(8192, 8, 64, 2048, 768), (2100, 2, 8, 128, 4096)], ids=["gathered", "copied"])
def test_steps_of_hopper(shape, rank, apart, layout):
    """More steps of the same sum: one group of products, copied 16 bytes at a time, and each tile with its own."""
    activation = "silu" if layout == "concatenated" else "swigluoai"
    options = {"gate_up_layout": layout, "activation": activation}
    _, plan, compiled = compile_layer("sm_90", shape, rank=rank, chosen="gluon_sm90", apart=apart, **options)
    kernels = [kernel for kernel in compiled if kernel.name == "grouped_gemm_sm90"]
    for kernel, config in zip(kernels, (plan.gate_up, plan.down), strict=True):
        consumers = 8 // config.warps
        assert kernel.stack_bytes == 0, kernel
        assert kernel.registers * 384 <= 65536
        assert kernel.count(r"WARPGROUP\.ARRIVE") == consumers, "serialised products have one each"
        assert kernel.count(r"HGMMA[.\w]*") > 0
        widths = {copy.rpartition(".")[2] for copy in re.findall(r"LDGSTS[.][.\w]*", kernel.sass())}
        assert widths == {"128"}
        # Of the first tile, and in the loop over tiles, where consumers hear of the next with live rows and without:
        # Triton 3.6 dropped what it took to be the same for all of them.
        told = len(re.findall(r"%more\w* = tt\.load", kernel.asm["ttgir"]))
        assert told == 2 * 2 + 3 * consumers
    assert [kernel.complaints() for kernel in kernels] == [[], []]


def test_interleaved():
    options = {"gate_up_layout": "interleaved", "activation": "swigluoai"}
    for shape in ("single", "few", "tall"):
        _, _, compiled = compile_layer("sm_90", SHAPES[shape], **options)
        assert [k.name for k in compiled if k.stack_bytes > SPILLED] == []


def test_tokens_do_not_make_variants():
    """Numbers of tokens with one plan are compiled once."""
    shape = SHAPES["tall"]
    hashes = set()
    for tokens in (8192, 8191, 8000):
        _, _, compiled = compile_layer("sm_90", (tokens, *shape[1:]))
        hashes.add(tuple(k.asm["ttir"] for k in compiled))
    assert len(hashes) == 1
