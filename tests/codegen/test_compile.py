"""Every Triton kernel, in the configurations the planner ships, compiled for every target. Needs no GPU."""

from __future__ import annotations

import math

import pytest
import torch

import fusedmoe
from fusedmoe import experts, functional
from fusedmoe.backends import triton as backend
from fusedmoe.backends.workspace import layout_bytes
from fusedmoe.checks import check
from fusedmoe.cli.explanation import _launches
from fusedmoe.plan.arithmetic import bytes_of, multiply_in
from fusedmoe.plan.config import Plan
from fusedmoe.plan.planner import choose, support
from fusedmoe.plan.validity import shared_bytes
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN, Target, target_of
from fusedmoe.testing import codegen
from fusedmoe.testing.cases import empty_matrix
from fusedmoe.testing.codegen import Compiled, compiling_for

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)

TARGETS = {name: KNOWN[name] for name in codegen.TARGETS}
#: (tokens, top_k, experts, hidden, intermediate): one for each form that the planner knows
SHAPES = {
    "single": (1, 4, 128, 2048, 768),
    "single, wide": (1, 8, 128, 7168, 2048),
    "few": (8, 1, 128, 2048, 256),
    "few, wide": (8, 2, 8, 7168, 2048),
    "16 rows": (32, 8, 128, 2048, 768),
    "32 rows": (512, 8, 256, 7168, 256),
    "64 rows": (512, 8, 128, 2048, 768),
    "128 rows": (4096, 8, 256, 7168, 256),
    "tall": (32768, 8, 128, 2048, 768),
    "tall, ragged": (32768, 4, 128, 2880, 2880),
    "tall, gathered": (16384, 2, 8, 4096, 14336),
}


#: Where nothing was run, a shape of each kind of kernel will do.
SOME_SHAPES = ("single", "few", "16 rows", "64 rows", "tall", "tall, ragged")

#: Kernels of the two GEMMs.
PRODUCTS = "grouped_gemm", "grouped_gemv"


def compile_layer(target: str, shape, dtype=torch.float16, form=None, chosen="triton", **options):
    tokens, top_k, n_experts, hidden, intermediate = shape
    gated = not str(options.get("activation", "")).endswith("_no_mul")
    e = lambda *s: torch.empty(*s, dtype=dtype)  # noqa: E731
    w13, w2 = e(n_experts, intermediate * (2 if gated else 1), hidden), e(n_experts, hidden, intermediate)
    if form is not None:
        parts = 2 if gated and options.get("gate_up_layout") != "interleaved" else 1
        w13, w2 = empty_matrix(form, w13.shape, parts=parts), empty_matrix(form, w2.shape)
    if options.get("weight_layout") == "KN":
        w13, w2 = e(n_experts, hidden, w13.shape[1]), e(n_experts, intermediate, hidden)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    call = check(e(tokens, hidden), w13, w2, torch.empty(tokens, top_k), ids, **options)
    plan = choose(call.problem, TARGETS[target], chosen)
    with compiling_for(target) as compiled:
        experts.run(call, plan)
    return call.problem, plan.triton, compiled


@pytest.mark.parametrize(
    ("target", "shape"), [(t, s) for t in TARGETS for s in (SHAPES if t == "sm_90" else SOME_SHAPES)]
)
def test_no_spills_within_shared_memory(target, shape):
    problem, plan, compiled = compile_layer(target, SHAPES[shape])
    names = [kernel.name for kernel in compiled]
    route = [] if plan.few else ["route"] if problem.slots <= 4096 else ["count", "offsets", "scatter"]
    products = ["grouped_gemv", "grouped_gemv"] if plan.single else ["grouped_gemm", "grouped_gemm", "combine"]
    assert plan.single == shape.startswith("single")
    assert names == route + ["gather"] * plan.gather + products
    for kernel in compiled:
        assert kernel.stack_bytes == 0, kernel
        assert kernel.shared_bytes <= TARGETS[target].shared_bytes, kernel
    gate_up, down = (kernel for kernel in compiled if kernel.name in PRODUCTS)
    assert gate_up.shared_bytes <= shared_bytes(plan.gate_up, problem.gate_up_gemm, TARGETS[target])
    assert down.shared_bytes <= shared_bytes(plan.down, problem.down_gemm, TARGETS[target])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_other_types(target, dtype):
    for shape in ("single", "few", "64 rows", "tall") if target == "sm_90" else ("few", "tall"):
        if target == "sm_75" and dtype == torch.bfloat16:
            with pytest.raises(NotImplementedError, match="sm_75 has no bfloat16"):
                compile_layer(target, SHAPES[shape], dtype)
            continue
        _, _, compiled = compile_layer(target, SHAPES[shape], dtype)
        assert [k.name for k in compiled if k.stack_bytes] == []


@pytest.mark.parametrize("options", [
    {"gate_up_layout": "interleaved"},
    {"weight_layout": "KN"},
    {"activation": "swigluoai", "gate_up_layout": "interleaved", "weight_layout": "KN"},
    {"activation": "gelu_tanh"},
    {"activation": "relu2_no_mul"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_layouts_and_activations(target, options):
    for shape in ("single", "few", "tall"):
        _, _, compiled = compile_layer(target, SHAPES[shape], torch.bfloat16, **options)
        assert [k.name for k in compiled if k.stack_bytes] == []


@pytest.mark.parametrize("shape", ["64 rows", "128 rows", "tall", "tall, ragged", "tall, gathered"])
def test_hopper_multiplies_with_wgmma(shape):
    """WGMMA in flight, one group per product and K step: serialised, ptxas would put a wait behind each."""
    _, plan, compiled = compile_layer("sm_90", SHAPES[shape], torch.bfloat16)
    gate_up, down = (kernel for kernel in compiled if kernel.name == "grouped_gemm")
    for kernel, products, config in ((gate_up, 2, plan.gate_up), (down, 1, plan.down)):
        assert kernel.count(r"HGMMA[.\w]*") == products * config.block_k // 16
        assert kernel.count(r"HMMA[.\w]*") == 0
        assert kernel.count(r"WARPGROUP\.ARRIVE") == products
        if config.maps != "none":
            assert kernel.count(r"UTMALDG[.\w]*") >= config.stages
    assert all(kernel.count(r"ACQBULK") for kernel in compiled[1:]), "each launch waits for the one before it"


#: The default of every scheme, and what differs in the kernel: zero points, short groups, one scale for all.
FORMATS = [
    *(format_of(scheme) for scheme in SCHEMES),
    format_of("int4_w4a16", group=32, zero=True),
    format_of("int8_w8a8", inputs="group"),
    format_of("fp8_tensor", inputs="static"),
    format_of("fp8_tensor", inputs="tensor"),
    format_of("fp8_channel", element="e4m3fnuz"),  # AMD's own, which gfx942 multiplies as it is
]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_schemes_compile_without_spills(target, form):
    dtype = torch.float16 if target == "sm_75" else torch.bfloat16
    shapes = ("single", "64 rows", "tall")
    turn = (FORMATS.index(form) + list(TARGETS).index(target)) % 3
    for shape in shapes if target == "sm_90" else shapes[turn : turn + 1]:
        problem, plan, compiled = compile_layer(target, SHAPES[shape], dtype, form=form)
        gate_up, down = (kernel for kernel in compiled if kernel.name in PRODUCTS)
        assert [kernel for kernel in compiled if kernel.stack_bytes] == []
        assert gate_up.shared_bytes <= shared_bytes(plan.gate_up, problem.gate_up_gemm, TARGETS[target])
        assert down.shared_bytes <= shared_bytes(plan.down, problem.down_gemm, TARGETS[target])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_hopper_multiplies_what_a_scheme_says(form):
    """WGMMA of the codes' type whatever the number of tokens: mma.sync has no fp8 there, so few rows are swapped.

    But where programs are so few that each has half a tile of weights, less than WGMMA takes: there mma.sync
    multiplies int8 as it is and fp8 as float16, which holds every code.
    """
    unswapped = 0
    for shape in ("few", "few, wide", "16 rows", "64 rows", "tall"):
        _, plan, compiled = compile_layer("sm_90", SHAPES[shape], torch.bfloat16, form=form)
        kernels = [kernel for kernel in compiled if kernel.name == "grouped_gemm"]
        for kernel, multiply, tile in zip(kernels, plan.multiply, (plan.gate_up, plan.down), strict=True):
            warp_group = tile.swap or tile.block_m >= 64
            operands = {"e4m3": "e4m3" if warp_group else "f16", "int8": "s8", "float16": "f16", "bfloat16": "bf16"}
            wanted = ("wgmma" if warp_group else "mma", operands[multiply])
            assert {(instruction, operand) for instruction, _, operand in kernel.products()} == {wanted}
            unswapped += not warp_group
            assert shape == "few" or warp_group
    assert unswapped <= 2


#: Formats whose codes Hopper multiplies as they are, and the step of K that their scales are applied to.
MULTIPLIED = [
    None,
    format_of("fp8_block"),
    format_of("fp8_channel"),
    format_of("fp8_tensor", inputs="static"),
    format_of("fp8_tensor", inputs="tensor"),
    format_of("int8_w8a8"),
]
#: Formats that its warp-specialised kernels decode on their way to the tensor cores.
DECODED = [
    format_of("mxfp4"),
    format_of("nvfp4"),
    format_of("mxfp4_fp8"),
    format_of("int4_w4a16", group=32),
    format_of("int8_w8a16", group=64),
    format_of("int8_w8a16"),
]
#: Formats whose kernels differ in a scale or in how a code is widened from one that is compiled for more shapes.
ALIKE = [*MULTIPLIED[3:5], *DECODED[1:]]


@pytest.mark.parametrize("form", [*MULTIPLIED, *DECODED], ids=str)
def test_specialised_kernels_of_hopper(form):
    """Warps with other registers, WGMMA of the right type, one group in flight for each sum, and nothing spilled."""
    some = (
        ("128 rows", {"gate_up_layout": "interleaved", "activation": "swigluoai"}),
        ("tall, ragged", {"dtype": torch.bfloat16, "activation": "relu2_no_mul"}),
    )
    more = (("64 rows", {}), ("tall, gathered", {"dtype": torch.bfloat16}))
    for shape, options in some if form in ALIKE else (*some, *more):
        problem, plan, compiled = compile_layer("sm_90", SHAPES[shape], form=form, chosen="gluon_sm90", **options)
        gate_up, down = (kernel for kernel in compiled if kernel.name == "grouped_gemm_sm90")
        for kernel, config, gemm in (
            (gate_up, plan.gate_up, problem.gate_up_gemm),
            (down, plan.down, problem.down_gemm),
        ):
            assert kernel.stack_bytes == 0, (shape, kernel)
            assert kernel.registers * 384 <= 65536, "12 warps start with these"
            assert kernel.shared_bytes <= shared_bytes(config, gemm, TARGETS["sm_90"])
            wanted = {1: "QGMMA", 2: "HGMMA"}[bytes_of(multiply_in(gemm, TARGETS["sm_90"]))]
            wanted = "IGMMA" if multiply_in(gemm, TARGETS["sm_90"]) == "int8" else wanted
            assert kernel.count(wanted + r"[.\w]*") > 0
            assert kernel.count(r"[HI]MMA[.\w]*") == 0
            consumers, sums = 8 // config.warps, 2 if gemm.grouped or config.words else 1
            assert kernel.count(r"WARPGROUP\.ARRIVE") == consumers * sums, "serialised products have one each"
            assert kernel.count(r"USETMAXREG[.\w]*") > 0
            assert kernel.count(r"UTMALDG[.\w]*") > 0
            assert (kernel.count(r"LDGSTS[.\w]*") > 0) == (config.maps == "w"), "rows are gathered where not by map"
            assert kernel.count("ACQBULK") > 0, "each launch waits for the one before it"
        if shape == "tall, gathered":  # takes seconds
            assert gate_up.complaints() + down.complaints() == []


@pytest.mark.parametrize("form", MULTIPLIED, ids=str)
def test_streaming_kernels_of_hopper(form):
    """Two groups of 4 warps with other registers, WGMMA of the right type, and nothing spilled or serialised."""
    some = (
        ((8, 8, 128, 2048, 768), {}),
        ((128, 8, 128, 2048, 768), {"gate_up_layout": "interleaved", "activation": "swigluoai"}),
        ((256, 8, 128, 2048, 768), {"dtype": torch.bfloat16}),
        ((16, 8, 128, 1040, 320), {"dtype": torch.bfloat16, "activation": "relu2_no_mul"}),
        ((256, 8, 128, 1040, 320), {"activation": "gelu"}),  # up rows start inside of a block that shares a scale
    )
    for shape, options in some[1:3] if form in ALIKE else some:
        problem, plan, compiled = compile_layer("sm_90", shape, form=form, chosen="gluon_sm90", **options)
        gemms = [kernel for kernel in compiled if kernel.name == "grouped_stream_sm90"]
        matrices = (plan.gate_up, problem.gate_up_gemm), (plan.down, problem.down_gemm)
        for kernel, (config, gemm) in zip(gemms, matrices, strict=True):
            assert kernel.stack_bytes == 0, (shape, kernel)
            assert kernel.shared_bytes <= shared_bytes(config, gemm, TARGETS["sm_90"])
            assert config.programs_per_sm * kernel.registers * 256 <= 65536
            assert config.programs_per_sm * (kernel.shared_bytes + 1024) <= 228 * 1024
            wanted = {1: "QGMMA", 2: "HGMMA"}[bytes_of(multiply_in(gemm, TARGETS["sm_90"]))]
            wanted = "IGMMA" if multiply_in(gemm, TARGETS["sm_90"]) == "int8" else wanted
            assert kernel.count(wanted + r"[.\w]*") > 0
            assert kernel.count(r"[HI]MMA[.\w]*") == 0
            assert kernel.count(r"WARPGROUP\.ARRIVE") == 2, "one for each sum; serialised products have one each"
            for instruction in ("USETMAXREG", "UTMALDG", "LDGSTS", "ACQBULK"):
                assert kernel.count(instruction + r"[.\w]*") > 0, instruction
        if form is None or form == format_of("fp8_block"):
            assert [line for kernel in gemms for line in kernel.complaints()] == []


def test_complaints_of_the_assembler_are_heard():
    ptx = ".version 8.4\n.target sm_90a\n.address_size 64\n"
    ptx += ".visible .entry k() { setmaxnreg.inc.sync.aligned.u32 240; ret; }"
    kernel = Compiled("k", "sm_90", 0, 0, 0, {"ptx": ptx})
    (complaint,) = kernel.complaints()
    assert "C7508" in complaint and "'setmaxnreg' ignored" in complaint


@pytest.mark.parametrize("form", [None, *FORMATS], ids=str)
def test_explain_lists_what_is_launched(form):
    for shape in ("single", "few", "64 rows", "tall"):
        problem, how, compiled = compile_layer("sm_90", SHAPES[shape], torch.bfloat16, form=form)
        told = _launches(problem, Plan(backend="triton", triton=how))
        assert sorted(launch["kernel"].split(",")[0] for launch in told) == sorted(kernel.name for kernel in compiled)


@pytest.mark.parametrize("form", MULTIPLIED, ids=str)
def test_explain_lists_what_is_launched_on_hopper(form):
    for shape in ("16 rows", "tall, gathered"):
        problem, how, compiled = compile_layer("sm_90", SHAPES[shape], torch.bfloat16, form, "gluon_sm90")
        told = _launches(problem, Plan(backend="gluon_sm90", triton=how))
        assert sorted(launch["kernel"].split(",")[0] for launch in told) == sorted(kernel.name for kernel in compiled)


@pytest.mark.parametrize("scheme", ["fp8_block", "mxfp8", "nvfp4"])
def test_ampere_decodes_fp8(scheme):
    """A device without the type decodes in the kernel; its compiler refuses even a load of it."""
    _, plan, compiled = compile_layer("sm_80", SHAPES["few"], torch.bfloat16, form=format_of(scheme))
    assert plan.multiply[0] == ("float16" if scheme == "fp8_block" else "bfloat16")
    assert all(kernel.count(r"HMMA[.\w]*") > 0 for kernel in compiled if kernel.name == "grouped_gemm")


@pytest.mark.parametrize("target", TARGETS)
def test_memory_cap_is_kept(target):
    """Whatever a device offers, a configuration that fits is found: never an OutOfResources error."""
    t = TARGETS[target]
    for cap in (65536, 101376, 166912, 232448):
        small = Target(t.vendor, t.arch, t.capability, t.n_sm, min(cap, t.shared_bytes))
        for tokens, top_k, n_experts, hidden, intermediate in SHAPES.values():
            for dtype in (torch.float16, torch.float32):
                e = lambda *s: torch.empty(*s, dtype=dtype, device="meta")  # noqa: E731, B023
                ids = torch.empty(tokens, top_k, dtype=torch.int32, device="meta")
                weights = e(n_experts, 2 * intermediate, hidden), e(n_experts, hidden, intermediate)
                problem = check(e(tokens, hidden), *weights, e(tokens, top_k), ids).problem
                assert support(problem, small)["triton"] == ()
                plan = choose(problem, small, "triton").triton
                assert shared_bytes(plan.gate_up, problem.gate_up_gemm, small) <= cap
                assert shared_bytes(plan.down, problem.down_gemm, small) <= cap


@pytest.mark.parametrize("sizes", [(8, 128, 32, 16), (2, 8, 4096, 14336), (64, 4096, 16, 16), (1, 1, 64, 64)])
def test_a_workspace_for_more_tokens_serves_fewer(sizes):
    top_k, n_experts, hidden, intermediate = sizes
    e = lambda *s: torch.empty(*s, dtype=torch.bfloat16, device="meta")  # noqa: E731
    assert_grows(top_k, e(n_experts, 2 * intermediate, hidden), e(n_experts, hidden, intermediate), "sm_90")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("form", [*FORMATS, format_of("fp8_block", block=(64, 64))], ids=str)
def test_a_workspace_of_a_scheme_for_more_tokens_serves_fewer(form, target):
    for top_k, n_experts, hidden, intermediate in ((8, 128, 2048, 768), (2, 8, 4096, 14336)):
        w13 = empty_matrix(form, (n_experts, 2 * intermediate, hidden), parts=2, device="meta")
        w2 = empty_matrix(form, (n_experts, hidden, intermediate), device="meta")
        dtype = torch.float16 if target == "sm_75" else torch.bfloat16
        assert_grows(top_k, w13, w2, target, dtype)


def assert_grows(top_k, w13, w2, target, dtype=torch.bfloat16):
    before = 0
    for tokens in sorted({*range(1, 40), *(2**i + d for i in range(6, 18) for d in (-1, 0, 1))}):
        x = torch.empty(tokens, w13.shape[2], dtype=dtype, device="meta")
        w = torch.empty(tokens, top_k, device="meta")
        problem = check(x, w13, w2, w, torch.empty(tokens, top_k, dtype=torch.int64, device="meta")).problem
        plan = choose(problem, TARGETS[target], "triton")
        now = layout_bytes(backend.workspace_layout(problem, plan))
        assert now >= before, tokens
        before = now


@pytest.mark.parametrize("form", [None, format_of("fp8_block"), format_of("fp8_channel")], ids=str)
def test_a_workspace_for_more_tokens_serves_fewer_whichever_backend_is_chosen(form, monkeypatch):
    """Backends take turns as T grows, and one may need less than the one before it."""
    monkeypatch.setattr(functional, "target_of", lambda device: TARGETS["sm_90"])
    e = lambda *s: torch.empty(*s, dtype=torch.bfloat16, device="meta")  # noqa: E731
    for top_k, n_experts, hidden, intermediate in ((8, 128, 2048, 768), (2, 8, 4096, 14336)):
        w13, w2 = (n_experts, 2 * intermediate, hidden), (n_experts, hidden, intermediate)
        w13, w2 = (
            e(*s) if form is None else empty_matrix(form, s, parts=p, device="meta") for s, p in ((w13, 2), (w2, 1))
        )
        before, chosen = 0, set()
        for tokens in sorted({2**i + d for i in range(17) for d in (-1, 0, 1)} - {0}):
            arguments = e(tokens, hidden), w13, w2, e(tokens, top_k), e(tokens, top_k).long()
            plan = choose(check(*arguments).problem, TARGETS["sm_90"])
            chosen.add(plan.backend)
            now = fusedmoe.workspace_bytes(*arguments)
            assert now >= before, tokens
            assert now >= layout_bytes(backend.workspace_layout(check(*arguments).problem, plan))
            before = now
        assert chosen == {"triton", "gluon_sm90"}


@pytest.mark.parametrize("form", [
    format_of("mxfp4"), format_of("nvfp4"), format_of("int4_w4a16", group=32), format_of("int8_w8a16", group=-1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"activation": "swigluoai", "gate_up_layout": "interleaved"}], ids=str)
def test_decoded_weights_of_gpt_oss_do_not_spill(form, options):
    """Gate and up in one product, and columns that fill no whole number of tiles, at many rows an expert."""
    biases = {"w13_bias": torch.empty(32, 5760), "w2_bias": torch.empty(32, 2880)}
    _, plan, compiled = compile_layer("sm_90", (8192, 4, 32, 2880, 2880), torch.bfloat16, form, **options, **biases)
    assert plan.gate_up.block_m == 128 and plan.gate_up.words
    assert [kernel.name for kernel in compiled if kernel.stack_bytes] == []


@pytest.mark.parametrize(
    ("scheme", "gemm", "shape"),
    [(scheme, "down", (32, 2, 8, 4096, 14336)) for scheme in ("mxfp4", "int4_w4a16", "int8_w8a16", "fp8_channel")]
    + [(scheme, "gate_up", (512, 8, 256, 7168, 256)) for scheme in ("mxfp4", "int4_w4a16")],
)
def test_long_steps_do_not_spill(scheme, gemm, shape):
    """Of 256 columns: a long down GEMM of few rows, gate and up of 32."""
    _, plan, compiled = compile_layer("sm_90", shape, torch.bfloat16, format_of(scheme))
    assert getattr(plan, gemm).block_k == 256
    for kernel in compiled:
        assert kernel.stack_bytes == 0 and kernel.shared_bytes <= TARGETS["sm_90"].shared_bytes, kernel


@pytest.mark.parametrize("sizes", [(2048, 768), (2880, 2880)], ids=str)
@pytest.mark.parametrize("tokens", [8, 128, 512, 8192])
def test_scales_of_a_row_are_loaded_together(tokens, sizes):
    """Not byte by byte, of 32 rows at a time, which takes the level-1 cache longer than all of the weights."""
    _, plan, compiled = compile_layer(
        "sm_90", (tokens, 4, 32, *sizes), torch.bfloat16, format_of("mxfp4"), "auto" if tokens == 8192 else "triton"
    )
    assert plan.gate_up.words and plan.gate_up.specialised == (tokens == 8192)
    kernels = [kernel for kernel in compiled if kernel.name.startswith("grouped_gemm")]
    assert [kernel.count(r"LDG\.E\.U8[.\w]*") for kernel in kernels] == [0, 0]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("form", "intermediate", "wide"),
    [
        (format_of("mxfp4"), 2880, 16),
        (format_of("int4_w4a16", group=32), 704, 16),
        (None, 360, 16),
        (format_of("fp8_channel"), 2880, 16),
        (format_of("fp8_channel"), 360, 8),  # as many bytes as rows of weights are multiples of
    ],
    ids=str,
)
def test_operands_are_copied_wide(target, form, intermediate, wide):
    """Strides that 16 does not divide, such as 360 words of 8 codes, or elements, are multiples of 16 bytes too."""
    for tokens in (8, 128):
        _, _, compiled = compile_layer(target, (tokens, 4, 32, 2880, intermediate), torch.bfloat16, form)
        for kernel, least in zip((k for k in compiled if k.name == "grouped_gemm"), (16, wide), strict=True):
            copies = kernel.count(r"LDGSTS[.\w]*")
            assert copies > 0
            # Tiles of sm_80 have fewer bytes of weights than 16 for each thread.
            narrow = least < 16 or target == "sm_80"
            assert kernel.count(r"LDGSTS[.\w]*\.(128|64)" if narrow else r"LDGSTS[.\w]*\.128") == copies
            assert kernel.count(r"LDG\.E\.(U8|U16)[.\w]*") < 64  # of scales, biases and ids alone


def test_tokens_do_not_make_variants():
    """What changes from call to call is never specialised on: any T of a path runs the same variants, which have the
    same code before anything is optimised, attributes of their arguments included.
    """
    seen = {}
    for tokens in (129, 131, 144, 160, 255):
        _, _, compiled = compile_layer("sm_90", (tokens, 8, 128, 256, 128), torch.bfloat16)
        seen[tokens] = [kernel.asm["ttir"] for kernel in compiled]
    first = seen[129]
    assert all(math.prod(a == b for a, b in zip(first, s, strict=True)) for s in seen.values())


@pytest.mark.parametrize(
    "form", [None, *(format_of(s) for s in ("fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "mxfp4"))], ids=str
)
def test_a_batch_invariant_layer_multiplies_alike_for_every_number_of_tokens(form):
    """One kind of product, of the same number of columns, in every tile; and none of the tiles it borrows spills."""
    kinds: set[tuple[frozenset[tuple[str, int, str]], ...]] = set()
    chosen = "auto" if target_of(torch.device("cpu")).gluon else "triton"
    for tokens, intermediate in ((1, 768), (1, 256), (32, 768), (512, 768), (512, 384), (4096, 768), (32768, 768)):
        shape = (tokens, 8, 128, 2048, intermediate)
        problem, _, compiled = compile_layer(
            "sm_90", shape, torch.bfloat16, form=form, chosen=chosen, batch_invariant=True
        )
        gemms = [kernel for kernel in compiled if kernel.name.startswith("grouped_")]
        assert [kernel.name for kernel in compiled if kernel.stack_bytes] == []
        kinds.add(tuple(frozenset(kernel.products()) for kernel in gemms))
    if form is not None and multiply_in(problem.gate_up_gemm, TARGETS["sm_90"]) == "int8":
        return  # integers have one sum, whatever adds them up
    assert len(kinds) == 1
    assert all(len(kind) == 1 for kind in next(iter(kinds)))
