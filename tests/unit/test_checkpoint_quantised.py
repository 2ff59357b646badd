"""Reading quantised checkpoints: every format written here by its own description, and sliced in every way."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import save_file

from fusedmoe import reference
from fusedmoe.checkpoint import read_experts
from fusedmoe.errors import CheckpointError, OptionError
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.nn import FusedExperts

E, H, I, LAYER = 3, 128, 256, 2
PREFIX = f"model.layers.{LAYER}.mlp.experts."
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
Tensors = dict[str, torch.Tensor]


@dataclass
class Form:
    """A format: its quantization_config, and one drawn projection [N, K] as stored tensors and as numbers."""

    config: dict
    draw: object
    scheme: str
    inputs: str | None = None
    exact: bool = True  # the sum of slices is the layer but for rounding in float64


def spread(scale: torch.Tensor, block_n: int, block_k: int, n: int, k: int) -> torch.Tensor:
    rows, columns = torch.arange(n) // block_n, torch.arange(k) // block_k
    return scale.double()[rows][:, columns]


def fp8(n, k, g, scale_shape, block, name="weight_scale", dtype=torch.float32, static=False):
    codes = torch.randn(n, k, generator=g).to(torch.float8_e4m3fn)
    scale = (torch.rand(scale_shape, generator=g) + 0.5) / k**0.5
    if dtype == torch.float8_e8m0fnu:
        scale = 2.0 ** torch.randint(-5, -2, scale_shape, generator=g)
    scale = scale.to(dtype)
    tensors = {"weight": codes, name: scale}
    if static:
        tensors["input_scale"] = torch.rand((), generator=g) * 0.02 + 0.01
    blocks = scale.float().double().reshape(-(-n // block[0]), -(-k // block[1]))
    return tensors, codes.double() * spread(blocks, *block, n, k)


def block_fp8(n, k, g, block=(128, 128), **options):
    return fp8(n, k, g, (-(-n // block[0]), -(-k // block[1])), block, **options)


def int8(n, k, g):
    codes = torch.randint(-127, 128, (n, k), generator=g, dtype=torch.int8)
    scale = (torch.rand(n, 1, generator=g) + 0.5) / 80 / k**0.5
    return {"weight": codes, "weight_scale": scale}, codes.double() * scale.double()


def words(codes: torch.Tensor, bits: int, order=None) -> torch.Tensor:
    """Codes [R, C] below 2^bits as int32 [R, ceil(C / per)]: code i of a word is column order[i], low bits first."""
    per = 32 // bits
    codes = torch.nn.functional.pad(codes.long(), (0, -codes.shape[1] % per))
    codes = codes.reshape(codes.shape[0], -1, per)
    word = sum(codes[..., order[i] if order else i] << (bits * i) for i in range(per))
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def integers(n, k, g, bits, group, zero, dtype):
    top, size = 2**bits, group if group > 0 else k
    codes = torch.randint(0, top, (n, k), generator=g)
    zeros = torch.randint(1, top, (n, k // size), generator=g) if zero else torch.full((n, k // size), top // 2)
    scale = ((torch.rand(n, k // size, generator=g) + 0.5) * 4 / top / k**0.5).to(dtype)
    w = (codes - spread(zeros, 1, size, n, k)) * spread(scale, 1, size, n, k)
    return codes, zeros, scale, w


def packed(n, k, g, bits=4, group=64, zero=False):
    codes, zeros, scale, w = integers(n, k, g, bits, group, zero, torch.bfloat16)
    tensors = {"weight_packed": words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if zero:
        tensors["weight_zero_point"] = words(zeros.T, bits).T
    return tensors, w


def gptq(n, k, g, bits=4, group=64, sym=False, version=1, g_idx=True):
    codes, zeros, scale, w = integers(n, k, g, bits, group, not sym, torch.float16)
    less = 1 if version == 1 else 0
    tensors = {
        "qweight": words(codes, bits).T,
        "qzeros": words((zeros - less).T.contiguous().T.T, bits),
        "scales": scale.T,
    }
    if g_idx:
        tensors["g_idx"] = (torch.arange(k) // (group if group > 0 else k)).int()
    return tensors, w


def awq(n, k, g, group=64):
    codes, zeros, scale, w = integers(n, k, g, 4, group, True, torch.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": words(codes.T, 4, order), "qzeros": words(zeros.T, 4, order), "scales": scale.T}
    return tensors, w


def e2m1(n, k, g):
    codes = torch.randint(0, 16, (n, k), generator=g)
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8), E2M1[codes]


def nvfp4(n, k, g, weight, scale2, invert):
    data, values = e2m1(n, k, g)
    scale = (torch.rand(n, k // 16, generator=g) * 100 + 50).to(torch.float8_e4m3fn)
    glob = torch.tensor(0.0005)
    if not invert:  # ModelOpt has one of gate and one of up, compressed-tensors one for both
        glob *= torch.rand((), generator=g) + 0.5
    tensors = {weight: data, "weight_scale": scale, scale2: 1 / glob if invert else glob}
    return tensors, values * spread(scale.float(), 1, 16, n, k) * (1 / tensors[scale2] if invert else glob).double()


def mx(n, k, g, element, weight="weight", scale="weight_scale"):
    exponent = torch.randint(120, 124, (n, k // 32), generator=g).to(torch.uint8)
    if element == "e2m1":
        data, values = e2m1(n, k, g)
    else:
        data = torch.randn(n, k, generator=g).to(torch.float8_e4m3fn)
        values = data.double()
    return {weight: data, scale: exponent}, values * spread(2.0 ** (exponent.double() - 127), 1, 32, n, k)


def with_input(drawn, name):
    """And a scale of inputs, which adds nothing to the weights."""
    return drawn[0] | {name: torch.tensor([3.0])}, drawn[1]


def deepseek_v4(n, k, g):
    tensors, w = mx(n, k, g, "e2m1", scale="scale")
    return {"weight": tensors["weight"].view(torch.int8), "scale": tensors["scale"].view(torch.float8_e8m0fnu)}, w


def four_sides(drawn):
    """Scales of blocks as ModelOpt has them: [rows, 1, columns, 1]."""
    tensors, w = drawn
    return tensors | {"weight_scale": tensors["weight_scale"][:, None, :, None]}, w


def compressed(form, weights, inputs=None, **more):
    group = {"targets": ["Linear"], "weights": {"dynamic": False, "symmetric": True, **weights}}
    group["input_activations"] = inputs
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, **more}


FLOAT8, INT8 = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
TOKEN8 = {**FLOAT8, "strategy": "token", "dynamic": True, "symmetric": True}
TENSOR8 = {**FLOAT8, "strategy": "tensor"}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MX4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False}
GPTQ_VERSIONS = {1: "gptq", 2: "gptq_v2"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


def pack_config(bits, group, zero):
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return compressed("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": not zero, **strategy})


FORMS = {
    "deepseek": Form(
        DEEPSEEK, lambda n, k, g: block_fp8(n, k, g, name="weight_scale_inv"), "fp8_block", "group", exact=False
    ),
    "ue8m0": Form(
        DEEPSEEK,
        lambda n, k, g: block_fp8(n, k, g, name="weight_scale_inv", dtype=torch.float8_e8m0fnu),
        "fp8_block",
        "group",
        exact=False,
    ),
    "block-64x32": Form(
        {**DEEPSEEK, "weight_block_size": [64, 32]},
        lambda n, k, g: block_fp8(n, k, g, (64, 32), name="weight_scale_inv"),
        "fp8_block",
        "group",
        exact=False,
    ),
    "fp8-tensor-static": Form(
        {"quant_method": "fp8", "activation_scheme": "static"},
        lambda n, k, g: fp8(n, k, g, (), (n, k), static=True),
        "fp8_tensor",
        "static",
    ),
    "fp8-tensor-dynamic": Form(
        {"quant_method": "fp8"}, lambda n, k, g: fp8(n, k, g, (1,), (n, k)), "fp8_tensor", "token", exact=False
    ),
    "ct-fp8-channel": Form(
        compressed("float-quantized", {**FLOAT8, "strategy": "channel"}, TOKEN8),
        lambda n, k, g: fp8(n, k, g, (n, 1), (1, k), dtype=torch.bfloat16),
        "fp8_channel",
        "token",
        exact=False,
    ),
    "ct-fp8-channel-static": Form(
        compressed("naive-quantized", {**FLOAT8, "strategy": "channel"}, {**FLOAT8, "strategy": "tensor"}),
        lambda n, k, g: fp8(n, k, g, (n, 1), (1, k), static=True),
        "fp8_channel",
        "static",
    ),
    "ct-fp8-tensor": Form(
        compressed("float-quantized", TENSOR8, {**TENSOR8, "dynamic": True}),
        lambda n, k, g: fp8(n, k, g, (1,), (n, k)),
        "fp8_tensor",
        "tensor",
        exact=False,
    ),
    "ct-fp8-block": Form(
        compressed(
            "float-quantized",
            {**FLOAT8, "strategy": "block", "block_structure": [128, 128]},
            {**FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True},
        ),
        block_fp8,
        "fp8_block",
        "group",
        exact=False,
    ),
    "ct-fp8-weight-only": Form(
        compressed("float-quantized", {**FLOAT8, "strategy": "block", "block_structure": [128, 64]}),
        lambda n, k, g: block_fp8(n, k, g, (128, 64)),
        "fp8_w8a16",
    ),
    "ct-int8": Form(
        compressed("int-quantized", {**INT8, "strategy": "channel"}, {**TOKEN8, "type": "int"}),
        int8,
        "int8_w8a8",
        "token",
        exact=False,
    ),
    "ct-int8-weight-only": Form(compressed("int-quantized", {**INT8, "strategy": "channel"}), int8, "int8_w8a16"),
    **{
        f"ct-int{bits}-{group}{'-zero' * zero}": Form(
            pack_config(bits, group, zero),
            lambda n, k, g, b=bits, s=group, z=zero: packed(n, k, g, b, s, z),
            "int4_w4a16" if bits == 4 else "int8_w8a16",
        )
        for bits, group, zero in [
            *((4, 64, False), (4, 128, True), (4, -1, False)),
            *((4, -1, True), (8, 32, True), (8, -1, False)),
        ]
    },
    **{
        f"gptq{version}-int{bits}-{group}{'-sym' * sym}": Form(
            {**GPTQ, "bits": bits, "group_size": group, "sym": sym, "checkpoint_format": GPTQ_VERSIONS[version]},
            lambda n, k, g, b=bits, s=group, y=sym, v=version: gptq(n, k, g, b, s, y, v),
            "int4_w4a16" if bits == 4 else "int8_w8a16",
        )
        for version, bits, group, sym in [
            *((1, 4, 64, False), (1, 4, 128, True), (2, 4, -1, False)),
            *((1, 8, 32, False), (2, 8, 64, True)),
        ]
    },
    "gptq-trivial-desc_act": Form({**GPTQ, "desc_act": True}, gptq, "int4_w4a16"),
    "awq": Form(AWQ, awq, "int4_w4a16"),
    "awq-channel": Form({**AWQ, "group_size": -1}, lambda n, k, g: awq(n, k, g, -1), "int4_w4a16"),
    "ct-nvfp4": Form(
        compressed("nvfp4-pack-quantized", NVFP4),
        lambda n, k, g: nvfp4(n, k, g, "weight_packed", "weight_global_scale", True),
        "nvfp4",
    ),
    "modelopt-nvfp4": Form(
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        lambda n, k, g: nvfp4(n, k, g, "weight", "weight_scale_2", False),
        "nvfp4",
    ),
    "own-mxfp4": Form(
        {"quant_method": "fusedmoe", "scheme": "mxfp4", "block": [1, 32]}, lambda n, k, g: mx(n, k, g, "e2m1"), "mxfp4"
    ),
    "own-mxfp8": Form(
        {"quant_method": "fusedmoe", "scheme": "mxfp8", "block": [1, 32]}, lambda n, k, g: mx(n, k, g, "e4m3"), "mxfp8"
    ),
}  # fmt: skip

#: The same tensors under other words.
WORDED_OTHERWISE = {
    "ct-nvfp4-w4a4": Form(
        compressed("nvfp4-pack-quantized", NVFP4, {**NVFP4, "dynamic": "local"}),
        lambda n, k, g: with_input(nvfp4(n, k, g, "weight_packed", "weight_global_scale", True), "input_global_scale"),
        "nvfp4",
    ),
    "ct-mxfp4": Form(
        compressed("mxfp4-pack-quantized", MX4, {**MX4, "dynamic": True}),
        lambda n, k, g: mx(n, k, g, "e2m1", weight="weight_packed"),
        "mxfp4",
    ),
    "ct-mxfp8": Form(
        compressed("mxfp8-quantized", {**MX4, "num_bits": 8}, {**MX4, "num_bits": 8, "dynamic": True}),
        lambda n, k, g: mx(n, k, g, "e4m3"),
        "mxfp8",
    ),
    "deepseek-v4": Form({**DEEPSEEK, "expert_dtype": "fp4", "scale_fmt": "ue8m0"}, deepseek_v4, "mxfp4"),
    "deepseek-v4-fp8": Form(
        {**DEEPSEEK, "expert_dtype": "fp8"}, lambda n, k, g: block_fp8(n, k, g, name="scale"), "fp8_block", "group"
    ),
    "modelopt-nvfp4-w4a16": Form(
        {"quant_method": "modelopt", "quant_algo": "w4a16_nvfp4"},
        lambda n, k, g: nvfp4(n, k, g, "weight", "weight_scale_2", False),
        "nvfp4",
    ),
    "modelopt-mxfp8": Form(
        {"quant_method": "modelopt", "quant_algo": "MXFP8"}, lambda n, k, g: mx(n, k, g, "e4m3"), "mxfp8"
    ),
    "modelopt-fp8-channel": Form(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        lambda n, k, g: fp8(n, k, g, (n,), (1, k)),
        "fp8_channel",
        "token",
    ),
    "modelopt-fp8-blocks": Form(
        {"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"},
        lambda n, k, g: four_sides(block_fp8(n, k, g)),
        "fp8_w8a16",
    ),
    "modelopt-mixed": Form(
        {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                f"model.layers.{LAYER}.self_attn.q_proj": {"quant_algo": "FP8"},
                f"model.layers.{LAYER}.mlp.exp": {"quant_algo": "FP8"},
                **{f"{PREFIX}{e}.{n}_proj": {"quant_algo": "NVFP4"} for e in range(E) for n in ("gate", "up", "down")},
            },
        },
        lambda n, k, g: with_input(nvfp4(n, k, g, "weight", "weight_scale_2", False), "input_scale"),
        "nvfp4",
    ),
    "auto-round-gptq": Form(
        {**GPTQ, "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "sym": True},
        lambda n, k, g: gptq(n, k, g, sym=True, g_idx=False),
        "int4_w4a16",
    ),
    "auto-round-awq": Form(
        {"quant_method": "auto-round", "bits": 4, "group_size": 64, "packing_format": "auto_round:auto_awq"},
        awq,
        "int4_w4a16",
    ),
    "auto-round-own": Form(
        {
            **GPTQ,
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {
                f"model.layers.{LAYER}.mlp.gate": {"bits": 16, "data_type": "float"},
                r".*\.experts\.": {"bits": 8, "group_size": 32},
            },
        },
        lambda n, k, g: gptq(n, k, g, bits=8, group=32),
        "int8_w8a16",
    ),
}


def layer(form: Form, n_inner: int = I, bias: bool = False, experts: int = E):
    """Stored tensors, and gate, up and down as numbers: [E, I, H], [E, I, H], [E, H, I]."""
    tensors, numbers = {}, {"gate_proj": [], "up_proj": [], "down_proj": []}
    for e in range(experts):
        for p, name in enumerate(numbers):
            n, k = (H, n_inner) if name == "down_proj" else (n_inner, H)
            g = torch.Generator().manual_seed(100 * e + p)
            stored, w = form.draw(n, k, g)
            numbers[name].append(w)
            tensors |= {f"{PREFIX}{e}.{name}.{key}": value for key, value in stored.items()}
            if bias:
                tensors[f"{PREFIX}{e}.{name}.bias"] = torch.randn(n, generator=g).to(torch.bfloat16)
    return tensors, {name: torch.stack(w) for name, w in numbers.items()}


def write(directory: Path, tensors: Tensors, quantization: dict | None, **config) -> None:
    base = {"model_type": "qwen3_moe", "hidden_act": "silu", "num_experts_per_tok": 2, **config}
    if quantization is not None:
        base["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(base))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")


def same(matrix: ExpertMatrix, wanted: torch.Tensor) -> None:
    got = matrix.dequantize(torch.float64)
    assert got.shape == wanted.shape
    assert ((got - wanted).abs() <= 1e-12 * wanted.abs().amax()).all()


@pytest.mark.parametrize("name", [*FORMS, *WORDED_OTHERWISE])
def test_reads_what_is_stored(name, tmp_path):
    form = (FORMS | WORDED_OTHERWISE)[name]
    tensors, w = layer(form, bias=True)
    write(tmp_path, tensors, form.config)
    stored = read_experts(tmp_path, LAYER)
    same(stored.w13, torch.cat([w["gate_proj"], w["up_proj"]], 1))
    same(stored.w2, w["down_proj"])
    if stored.w13.format.tensor_scale:
        assert stored.w13.tensor_scale.shape == ((E, 2) if name.startswith("modelopt") else (E,))
        assert stored.w2.tensor_scale.shape == (E,)
    for matrix in (stored.w13, stored.w2):
        assert matrix.format.scheme == form.scheme
        assert (matrix.format.inputs and matrix.format.inputs.mode) == form.inputs
    assert torch.equal(stored.w13_bias[1, I:], tensors[f"{PREFIX}1.up_proj.bias"])
    assert torch.equal(stored.w2_bias[1], tensors[f"{PREFIX}1.down_proj.bias"])
    if form.inputs == "static":
        scales = [tensors[f"{PREFIX}{e}.{p}_proj.input_scale"] for e in range(E) for p in ("gate", "up")]
        assert stored.w13.input_scale == max(scales) > min(scales)
    part = read_experts(tmp_path, LAYER, experts=(1, 3))
    same(part.w13, torch.cat([w["gate_proj"], w["up_proj"]], 1)[1:])
    same(part.w2, w["down_proj"][1:])
    assert part.w13.input_scale == stored.w13.input_scale
    assert part.expert_map().tolist() == [-1, 0, 1] and stored.expert_map() is None


#: Ragged, on a word, inside a group, on a block of 128, down to one column.
SPLITS = [(0, 128, 256), (0, 64, 160, 256), (0, 96, 224, 256), (0, 100, 101, 256), (0, 8, 250, 256)]


def run(stored, x, weights, ids, dequantised=True):
    w13, w2 = (
        (w.dequantize(torch.float64) if dequantised and isinstance(w, ExpertMatrix) else w)
        for w in (stored.w13, stored.w2)
    )
    return reference.fused_experts(
        *(x, w13, w2, weights, ids),
        activation=stored.activation,
        gate_up_layout=stored.gate_up_layout,
        weight_layout=stored.weight_layout,
        w13_bias=stored.w13_bias,
        w2_bias=stored.w2_bias,
        expert_map=stored.expert_map(),
    )


def routed(experts: int = E, hidden: int = H):
    g = torch.Generator().manual_seed(5)
    ids = torch.rand(12, experts, generator=g).topk(2).indices
    return torch.randn(12, hidden, generator=g), torch.rand(12, 2, generator=g), ids


def check_slices(directory, splits, exact=True):
    whole = read_experts(directory, LAYER)
    x = routed(whole.num_experts, whole.w13.shape[1 if whole.weight_layout == "KN" else 2])
    wanted, parts, rough = run(whole, *x), [], []
    for start, stop in itertools.pairwise(splits):
        part = read_experts(directory, LAYER, intermediate=(start, stop))
        parts.append(run(part, *x))
        rough.append(run(part, *x, dequantised=False))
        assert (part.w2_bias is None) == (whole.w2_bias is None or start > 0)
        width = part.w2.shape[2] if part.weight_layout == "NK" else part.w2.shape[1]
        assert stop - start <= width <= stop - start + 62, "extended by less than 32 on each side"
    error = (sum(parts) - wanted).norm() / wanted.norm()
    assert error < 1e-12
    wanted = run(whole, *x, dequantised=False)
    error = (sum(rough) - wanted).norm() / wanted.norm()
    assert error < (1e-12 if exact else 0.06)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_slices_add_up(name, splits, tmp_path):
    form = FORMS[name]
    write(tmp_path, layer(form, bias=True)[0], form.config)
    check_slices(tmp_path, splits, form.exact)


@pytest.mark.parametrize("splits", SPLITS, ids=str)
@pytest.mark.parametrize("kind", ["separate", "fused", "KN", "interleaved", "not gated"])
def test_unquantised_slices_add_up(kind, splits, tmp_path):
    g = torch.Generator().manual_seed(0)
    prefix, config = PREFIX, {}
    if kind == "separate" or kind == "not gated":
        names = ("up_proj", "down_proj") if kind == "not gated" else ("gate_proj", "up_proj", "down_proj")
        shapes = {f"{e}.{n}": (H, I) if n == "down_proj" else (I, H) for e in range(E) for n in names}
        tensors = {f"{prefix}{n}.weight": torch.randn(s, generator=g) / s[1] ** 0.5 for n, s in shapes.items()}
        tensors |= {f"{prefix}{n}.bias": torch.randn(s[0], generator=g) for n, s in shapes.items()}
    else:
        w13, w2 = torch.randn(E, 2 * I, H, generator=g) / H**0.5, torch.randn(E, H, I, generator=g) / I**0.5
        if kind != "fused":
            w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
        tensors = {f"{prefix}gate_up_proj": w13, f"{prefix}down_proj": w2}
        tensors |= {f"{prefix}gate_up_proj_bias": torch.randn(E, 2 * I), f"{prefix}down_proj_bias": torch.randn(E, H)}
        config = {"model_type": "gpt_oss"} if kind == "interleaved" else {}
    write(tmp_path, tensors, None, **config)
    check_slices(tmp_path, splits)
    assert read_experts(tmp_path, LAYER, intermediate=(8, 250)).w2.numel() == E * H * 242


# ------------------------------------------------------------------------------------- fused and interleaved


def gpt_oss(n_inner=I):
    g = torch.Generator().manual_seed(0)
    tensors, numbers = {}, {}
    for name, n, k in (("gate_up_proj", 2 * n_inner, H), ("down_proj", H, n_inner)):
        data, values = zip(*(e2m1(n, k, g) for _ in range(E)), strict=True)
        scale = torch.randint(120, 124, (E, n, k // 32), generator=g).to(torch.uint8)
        tensors[f"{PREFIX}{name}_blocks"] = torch.stack(data).reshape(E, n, k // 32, 16)
        tensors[f"{PREFIX}{name}_scales"] = scale
        tensors[f"{PREFIX}{name}_bias"] = torch.randn(E, n, generator=g).to(torch.bfloat16)
        numbers[name] = torch.stack(values) * 2.0 ** (scale.double() - 127).repeat_interleave(32, 2)
    return tensors, numbers


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


PUZZLE = {"model_type": "gpt_oss_puzzle", "num_local_experts": 2 * E, "block_configs": []}


@pytest.mark.parametrize("config", [{"model_type": "gpt_oss"}, PUZZLE], ids=lambda config: config["model_type"])
def test_gpt_oss(config, tmp_path):
    tensors, w = gpt_oss()
    write(tmp_path, tensors, MXFP4, **config)
    stored = read_experts(tmp_path, LAYER)
    assert (stored.gate_up_layout, stored.weight_layout) == ("interleaved", "NK")
    assert stored.w13.format.scheme == stored.w2.format.scheme == "mxfp4"
    same(stored.w13, w["gate_up_proj"])
    same(stored.w2, w["down_proj"])
    assert torch.equal(stored.w13_bias, tensors[f"{PREFIX}gate_up_proj_bias"])
    # Transformers' own reading of the same bytes, which it returns transposed.
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    for matrix, name in ((stored.w13, "gate_up_proj"), (stored.w2, "down_proj")):
        blocks, scales = (tensors[f"{PREFIX}{name}_{part}"] for part in ("blocks", "scales"))
        theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(matrix.dequantize(), theirs.transpose(1, 2))


def test_order_of_rows_of_mxfp4_is_not_guessed(tmp_path):
    write(tmp_path, gpt_oss()[0], MXFP4, model_type="other")
    fails(tmp_path, "order of gate and up rows of .*_blocks: got model type 'other'; wanted one of gpt_oss, ")


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_gpt_oss_slices_add_up(splits, tmp_path):
    write(tmp_path, gpt_oss()[0], MXFP4, model_type="gpt_oss")
    check_slices(tmp_path, splits)


@pytest.mark.parametrize(
    ("size", "block"),
    [(256, (128, 128)), (192, (128, 128)), (24, (128, 128)), (40, (16, 16)), (256, None)],
    ids=str,
)
def test_fused_fp8_of_transformers(size, block, tmp_path):
    """FP8Experts: gate and up rows in one tensor, whose blocks run through, or start anew where there are too few."""
    g = torch.Generator().manual_seed(0)
    tensors, numbers = {}, []
    for name, n, k, least in (("gate_up_proj", 2 * size, H, 2), ("down_proj", H, size, 1)):
        codes = torch.randn(E, n, k, generator=g).to(torch.float8_e4m3fn)
        rows = max(-(-n // block[0]), least) if block else least
        scale = torch.rand(E, rows, -(-k // block[1]) if block else 1, generator=g) + 0.5
        tensors |= {f"{PREFIX}{name}": codes, f"{PREFIX}{name}_scale_inv": scale}
        per_row = n // 2 if rows == 2 and least == 2 else block[0] if block else n
        index = torch.arange(n) // per_row, torch.arange(k) // (block[1] if block else k)
        numbers.append(codes.double() * scale.double()[:, index[0]][:, :, index[1]])
    config = {**DEEPSEEK, "weight_block_size": block} if block else {"quant_method": "fp8"}
    write(tmp_path, tensors, config)
    stored = read_experts(tmp_path, LAYER)
    same(stored.w13, numbers[0])
    same(stored.w2, numbers[1])
    if size == 40:
        with pytest.raises(CheckpointError, match="blocks of 16 rows that run over from gate into up rows"):
            read_experts(tmp_path, LAYER, intermediate=(0, 20))
        return
    half = size // 2 + 3
    check_slices(tmp_path, (0, half, size), exact=False)


@pytest.mark.parametrize("columns_first", [True, False])
@pytest.mark.parametrize("algorithm", ["NVFP4", "FP8"])
def test_fused_tensors_of_modelopt(algorithm, columns_first, tmp_path):
    """Llama 4: [E, K, N] as the model has them, codes and scales alike, and numbers that all experts share."""
    g = torch.Generator().manual_seed(0)
    tensors, numbers = {}, []
    sizes = (("gate_up_proj", 2 * I, H, 0.0007), ("down_proj", H, I, 0.0002))
    for name, n, k, of_all in ((PREFIX + name, n, k, torch.tensor(number)) for name, n, k, number in sizes):
        if algorithm == "NVFP4":
            codes, values = map(torch.stack, zip(*(e2m1(n, k, g) for _ in range(E)), strict=True))
            scale = (torch.rand(E, n, k // 16, generator=g) * 100 + 50).to(torch.float8_e4m3fn)
            tensors |= {f"{name}_weight_scale": scale, f"{name}_weight_scale_2": of_all}
            numbers.append(values * scale.double().repeat_interleave(16, 2) * of_all.double())
        else:
            codes = torch.randn(E, n, k, generator=g).to(torch.float8_e4m3fn)
            tensors[f"{name}_weight_scale"] = of_all
            numbers.append(codes.double() * of_all.double())
        tensors |= {name: codes, f"{name}_input_scale": of_all * 3}
    if columns_first:
        tensors = {name: tensor.transpose(1, 2) if tensor.dim() == 3 else tensor for name, tensor in tensors.items()}
    write(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": algorithm})
    stored = read_experts(tmp_path, LAYER)
    assert stored.weight_layout == "NK" and stored.gate_up_layout == "concatenated"
    same(stored.w13, numbers[0])
    same(stored.w2, numbers[1])
    if algorithm == "FP8":
        assert stored.w13.input_scale == 3 * torch.tensor(0.0007)
    part = read_experts(tmp_path, LAYER, experts=(1, 3))
    same(part.w13, numbers[0][1:])
    check_slices(tmp_path, (0, 64, 160, 256), exact=algorithm == "NVFP4")
    name = f"{PREFIX}down_proj_weight_scale"
    wrong = torch.ones(E + 1) if algorithm == "FP8" else tensors[name][:, :, 1:]
    write(tmp_path, {**tensors, name: wrong}, {"quant_method": "modelopt", "quant_algo": algorithm})
    fails(tmp_path, f"shape or type of {name}")


@pytest.mark.parametrize(
    ("form", "hidden", "size", "start"),
    [
        ("deepseek", 72, 100, 33),
        ("ct-fp8-weight-only", 200, 130, 129),
        ("ct-fp8-channel", 35, 27, 13),
        ("ct-int8", 35, 27, 13),
        ("ct-int8--1", 35, 27, 13),  # words that are filled up
        ("ct-int4--1", 36, 44, 5),
        ("ct-int4--1-zero", 36, 44, 32),
        ("ct-int8-32-zero", 64, 96, 50),
        ("gptq2-int4--1", 40, 56, 33),
        ("awq", 64, 192, 100),
        ("own-mxfp4", 96, 160, 50),
    ],
)
def test_ragged_sizes(form, hidden, size, start, tmp_path, monkeypatch):
    for name, value in (("H", hidden), ("I", size)):
        monkeypatch.setitem(globals(), name, value)
    tensors, w = layer(FORMS[form], size, bias=True)
    write(tmp_path, tensors, FORMS[form].config)
    stored = read_experts(tmp_path, LAYER)
    same(stored.w13, torch.cat([w["gate_proj"], w["up_proj"]], 1))
    same(stored.w2, w["down_proj"])
    check_slices(tmp_path, (0, start, size), FORMS[form].exact)


def test_experts_and_intermediate_at_once(tmp_path):
    form = FORMS["deepseek"]
    write(tmp_path, layer(form)[0], form.config)
    x = routed()
    wanted = run(read_experts(tmp_path, LAYER), *x)
    parts = [
        run(read_experts(tmp_path, LAYER, experts=e, intermediate=i), *x)
        for e in ((0, 1), (1, 3))
        for i in ((0, 100), (100, 256))
    ]
    assert (sum(parts) - wanted).norm() / wanted.norm() < 1e-12


def test_blocks_are_re_cut_or_the_slice_is_extended(tmp_path):
    form = FORMS["deepseek"]
    write(tmp_path, layer(form)[0], form.config)
    recut = read_experts(tmp_path, LAYER, intermediate=(192, 256))
    assert recut.w13.format.block == (64, 128) and recut.w2.format.block == (128, 64)
    assert recut.w13.shape == (E, 128, H) and recut.w2.format.inputs.group == 64
    extended = read_experts(tmp_path, LAYER, intermediate=(100, 256))
    assert extended.w13.shape == (E, 2 * 160, H) and extended.w13.format.block == (32, 128)
    rows = extended.w13.dequantize()
    assert (
        not rows[:, [*range(4), *range(160, 164)]].any() and rows[:, 4:160].any(2).all() and rows[:, 164:].any(2).all()
    )
    form = FORMS["ct-int4-128-zero"]
    write(tmp_path, layer(form)[0], form.config)
    assert read_experts(tmp_path, LAYER, intermediate=(0, 64)).w2.format.block == (1, 64)
    assert read_experts(tmp_path, LAYER, intermediate=(0, 60)).w2.shape == (E, H, 64)


def test_groups_that_no_scheme_has_are_cut(tmp_path):
    form = Form(pack_config(4, 256, True), lambda n, k, g: packed(n, k, g, 4, 256 if k == 256 else 128, True), "")
    form.config = compressed("pack-quantized", {})
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "dynamic": False}
    form.config["config_groups"] = {
        "down": {"targets": ["re:.*down_proj$"], "weights": {**weights, "group_size": 256}, "input_activations": None},
        "rest": {"targets": ["Linear"], "weights": {**weights, "group_size": 128}, "input_activations": None},
    }
    tensors, w = layer(form)
    write(tmp_path, tensors, form.config)
    stored = read_experts(tmp_path, LAYER)
    assert stored.w2.format.block == (1, 128) and stored.w2.scale.shape[2] == 2
    same(stored.w2, w["down_proj"])
    check_slices(tmp_path, (0, 96, 256))


# ------------------------------------------------------------------------------------ which modules, which method


PLAIN_NAMES = [
    ("ignore", "re:.*experts.*"),
    ("ignore", f"model.layers.{LAYER}.mlp"),
    ("modules_to_not_convert", "experts"),
    ("modules_to_not_convert", "model.layers.*.mlp.experts"),
    ("ignored_layers", f"model.layers.{LAYER}.mlp.experts.0.gate_proj"),
]


def plain():
    g = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {f"{PREFIX}{e}.{n}.weight": torch.randn(s, generator=g) for e in range(E) for n, s in shapes.items()}


@pytest.mark.parametrize(("key", "pattern"), PLAIN_NAMES)
def test_modules_that_are_left_out_are_unquantised(key, pattern, tmp_path):
    tensors = plain()
    patterns = (
        [pattern] if "0.gate_proj" not in pattern else [pattern.replace("gate", p) for p in ("gate", "up", "down")]
    )
    write(tmp_path, tensors, {**DEEPSEEK, key: [*patterns, "lm_head"]})
    assert torch.equal(read_experts(tmp_path, LAYER).w2[1], tensors[f"{PREFIX}1.down_proj.weight"])


@pytest.mark.parametrize("pattern", ["gate", "mlp.gate", "lm_head", "re:.*mlp.gate$", "model.layers.22", "expert"])
def test_modules_that_are_left_out_do_not_cover_others(pattern, tmp_path):
    form = FORMS["deepseek"]
    tensors, w = layer(form)
    write(tmp_path, tensors, {**form.config, "modules_to_not_convert": [pattern]})
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])
    write(tmp_path, plain(), {**form.config, "modules_to_not_convert": [pattern]})
    with pytest.raises(CheckpointError, match="got F32, which is not quantised; wanted F8_E4M3.*name them in the list"):
        read_experts(tmp_path, LAYER)


ENDLESS = ["re:(a+)+$", r"re:(\w+\.?)*!", "re:" + ".*" * 30 + "!", "*" * 30, "re:((?:x{9}){9}){9}"]


@pytest.mark.parametrize("pattern", ENDLESS)
def test_patterns_that_would_search_for_hours_are_refused(pattern, tmp_path):
    form, bare = FORMS["deepseek"], pattern.removeprefix("re:")
    for config in (
        {**form.config, "modules_to_not_convert": [pattern]},
        {**GPTQ, "dynamic": {f"-:{bare}": {}}},
        {**WORDED_OTHERWISE["auto-round-gptq"].config, "extra_config": {bare: {"bits": 16}}},
    ):
        write(tmp_path, layer(form)[0], config)
        with pytest.raises(CheckpointError, match="could take too long to search"):
            read_experts(tmp_path, LAYER)


def test_w13_quantised_and_w2_not(tmp_path):
    form = FORMS["ct-fp8-channel"]
    tensors, w = layer(form)
    bare = plain()
    tensors = {name: t for name, t in tensors.items() if "down_proj" not in name}
    tensors |= {name: t for name, t in bare.items() if "down_proj" in name}
    write(tmp_path, tensors, {**form.config, "ignore": ["re:.*down_proj"]})
    stored = read_experts(tmp_path, LAYER)
    same(stored.w13, torch.cat([w["gate_proj"], w["up_proj"]], 1))
    assert torch.equal(stored.w2[2], bare[f"{PREFIX}2.down_proj.weight"])
    check_slices(tmp_path, (0, 100, 256), exact=False)


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config"])
def test_configuration_in_the_text_part(part, tmp_path):
    form = FORMS["deepseek"]
    tensors, w = layer(form)
    write(tmp_path, tensors, None, **{part: {"quantization_config": form.config, "hidden_act": "silu"}})
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])
    write(tmp_path, tensors, form.config, **{part: {"quantization_config": None, "num_experts_per_tok": 3}})
    stored = read_experts(tmp_path, LAYER)
    same(stored.w2, w["down_proj"])
    assert stored.top_k == 3


def test_configuration_in_a_file_of_modelopt(tmp_path):
    form = FORMS["modelopt-nvfp4"]
    tensors, w = layer(form)
    write(tmp_path, tensors, None)
    said = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    path = tmp_path / "hf_quant_config.json"
    path.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])
    path.write_text(json.dumps({"quantization": {**said, "exclude_modules": ["model.layers*"]}}))
    write(tmp_path, plain(), None)
    assert isinstance(read_experts(tmp_path, LAYER).w2, torch.Tensor)


def test_type_of_experts_outside_of_the_quantisation(tmp_path):
    tensors, w = layer(WORDED_OTHERWISE["deepseek-v4"])
    write(tmp_path, tensors, DEEPSEEK, expert_dtype="fp4")
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])
    write(tmp_path, tensors, DEEPSEEK)
    fails(tmp_path, "type of .*gate_proj.weight, data of experts that are fp8: got I8; wanted F8_E4M3")


# ------------------------------------------------------------------------------------------------- refusals


def fails(directory, match, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_experts(directory, LAYER, **options)
    assert ": got " in str(caught.value) and "; wanted " in str(caught.value)


def changed(form: str, change, config=None):
    tensors, _ = layer(FORMS[form])
    change(tensors)
    return tensors, {**FORMS[form].config, **(config or {})}


def last(ending):
    return f"{PREFIX}{E - 1}.up_proj.{ending}"


def put(ending, value):
    return lambda tensors: tensors.__setitem__(last(ending), value(tensors[last(ending)]))


def true_shape(value):
    return lambda tensors: tensors.update({f"{PREFIX}0.up_proj.weight_shape": value})


@pytest.mark.parametrize(
    ("form", "change", "config", "match"),
    [
        ("deepseek", lambda t: None, {"quant_method": "hqq"}, "method 'hqq' in config.json; wanted one of fp8, "),
        ("deepseek", lambda t: None, {"quant_method": ["fp8"]}, "method .'fp8'. in config.json; wanted one of fp8, "),
        (
            "deepseek",
            lambda t: None,
            {"weight_block_size": [0, 0]},
            "shape or type of .*weight_scale_inv",
        ),
        ("deepseek", lambda t: None, {"weight_block_size": [128]}, "quantization_config of method 'fp8'.*IndexError"),
        ("deepseek", lambda t: None, {"weight_block_size": "x"}, "quantization_config of method 'fp8'"),
        ("deepseek", lambda t: None, {"weight_block_size": [64, 64]}, "shape or type of .*weight_scale_inv"),
        ("deepseek", lambda t: None, {"activation_scheme": "static"}, "no .*input_scale or .*activation_scale"),
        ("deepseek", lambda t: t.pop(last("weight_scale_inv")), {}, "got no .*2.up_proj.weight_scale_inv"),
        ("deepseek", put("weight_scale_inv", lambda s: s[:1]), {}, "shape or type of .*2.up_proj.weight_scale_inv"),
        ("deepseek", put("weight_scale_inv", lambda s: s.half()), {}, "shape or type of .*weight_scale_inv"),
        ("deepseek", put("weight", lambda s: s.view(torch.int8)), {}, "shape or type of .*2.up_proj.weight"),
        ("deepseek", lambda t: t.update({last("g_idx"): torch.zeros(2)}), {}, "tensors beside the experts .*g_idx"),
        ("fp8-tensor-static", put("input_scale", lambda s: s * torch.inf), {}, "got inf; wanted a positive number"),
        ("ct-int4-64", lambda t: t.update({last("weight_g_idx"): torch.zeros(H).int()}), {}, "experts.*weight_g_idx"),
        ("ct-int4-64", true_shape(torch.ones(2).char()), {}, r"weight_shape: got \(2,\) of I8; wanted two"),
        ("ct-int4-64", true_shape(torch.tensor([torch.nan, 1])), {}, r"weight_shape: got \(2,\) of F32; wanted two"),
        ("ct-int4-64", true_shape(torch.ones(64, 64).long()), {}, r"weight_shape: got \(64, 64\) of I64; wanted two"),
        ("ct-int4-64", true_shape(torch.tensor([3, 4])), {}, r"weight_shape: got \[3, 4\]; wanted about"),
        ("gptq1-int4-64", put("g_idx", lambda s: s.flip(0)), {}, "order of activations .desc_act, actorder.; wanted"),
        ("gptq1-int4-64", lambda t: None, {"desc_act": True, "bits": 3}, "got 3 bits; wanted 4 or 8"),
        ("gptq1-int4-64", lambda t: None, {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; wanted 'gptq'"),
        ("gptq1-int4-64", lambda t: None, {"sym": True}, "zero points .*wanted 8 everywhere"),
        ("gptq1-int4-128-sym", lambda t: None, {"checkpoint_format": "gptq_v2"}, "version 1 stores zero points less"),
        ("gptq1-int4-64", lambda t: None, {"group_size": 0}, "got group size 0"),
        ("gptq1-int4-64", lambda t: None, {"group_size": 48}, "shape or type of .*scales"),
        ("awq", lambda t: None, {"quant_method": "auto-round", "packing_format": "auto_round"}, "packing_format 'auto"),
        ("awq", lambda t: None, {"version": "gemv"}, "got version 'gemv'"),
        ("awq", lambda t: None, {"zero_point": False}, "zero_point False; wanted version 'gemm' of 4 bits with zero"),
        (
            "modelopt-nvfp4",
            lambda t: None,
            {"quant_algo": "W4A8"},
            "quant_algo 'W4A8'; wanted NVFP4, W4A16_NVFP4, MXFP8, FP8",
        ),
        (
            "own-mxfp4",
            lambda t: None,
            {"scheme": "mxfp5"},
            "of method 'fusedmoe' in config.json: got OptionError: scheme: got 'mxfp5'",
        ),
    ],
)
def test_refused(form, change, config, match, tmp_path):
    write(tmp_path, *changed(form, change, config))
    fails(tmp_path, match)


@pytest.mark.parametrize(
    ("form", "weights", "inputs", "match"),
    [
        (
            "pack-quantized",
            {"num_bits": 4, "type": "int", "group_size": 64, "actorder": "group"},
            None,
            "actorder 'group'",
        ),
        ("pack-quantized", {"num_bits": 3, "type": "int", "group_size": 64}, None, "got 3 bits"),
        ("pack-quantized", {"num_bits": 4, "type": "int", "group_size": 64}, {**TOKEN8, "type": "int"}, "wanted none"),
        ("int-quantized", {**INT8, "strategy": "channel", "symmetric": False}, None, "weights with zero points"),
        ("int-quantized", {**INT8, "strategy": "channel"}, {**INT8, "strategy": "token", "symmetric": False}, "inputs"),
        ("float-quantized", {**FLOAT8, "strategy": "channel"}, {**FLOAT8, "strategy": "token"}, "dynamic per token"),
        ("marlin-24", {"num_bits": 4, "type": "int"}, None, "wanted a format that is known here"),
        ("mxfp6-pack-quantized", {"num_bits": 6, "type": "float"}, None, "wanted a format that is known here"),
    ],
)
def test_refused_of_compressed_tensors(form, weights, inputs, match, tmp_path):
    write(tmp_path, plain(), compressed(form, weights, inputs))
    fails(tmp_path, match)


def test_group_that_is_too_small(tmp_path):
    tensors, _ = layer(Form({}, lambda n, k, g: gptq(n, k, g, group=16), ""))
    write(tmp_path, tensors, {**GPTQ, "group_size": 16})
    fails(tmp_path, "group of scheme 'int4_w4a16': got 16; .*wanted a scheme of fusedmoe.SCHEMES")


def test_static_ordering_of_weights_is_natural(tmp_path):
    form = FORMS["ct-int4-64"]
    config = json.loads(json.dumps(form.config))
    config["config_groups"]["group_0"]["weights"]["actorder"] = "static"
    tensors, w = layer(form)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        columns = torch.arange(I if "down" in name else H)
        tensors[name.replace("weight_packed", "weight_g_idx")] = (columns // 64).int()
    write(tmp_path, tensors, config)
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])


def test_largest_stored_zero_point_of_gptq_is_zero(tmp_path):
    form = FORMS["gptq1-int4-64"]
    tensors, _ = layer(form)
    tensors = {name: torch.full_like(t, -1) if name.endswith("qzeros") else t for name, t in tensors.items()}
    write(tmp_path, tensors, form.config)
    assert not read_experts(tmp_path, LAYER).w13.zero.any()


def test_dynamic_overrides_of_gptq(tmp_path):
    form = FORMS["gptq1-int8-32"]
    tensors, w = layer(form)
    override = {"dynamic": {r"+:.*\.experts\.": {"bits": 8, "group_size": 32}, r"-:.*self_attn": {}}}
    write(tmp_path, tensors, {**GPTQ, **override})
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])
    override["dynamic"] |= {r"-:.*experts.*": {}, ".*": {"bits": 3}}  # the first that fits decides
    write(tmp_path, tensors, {**GPTQ, **override})
    same(read_experts(tmp_path, LAYER).w2, w["down_proj"])
    write(tmp_path, plain(), {**GPTQ, "dynamic": {r"-:.*experts.*": {}}})
    assert isinstance(read_experts(tmp_path, LAYER).w2, torch.Tensor)


def test_modules_that_auto_round_and_modelopt_leave_out(tmp_path):
    config = WORDED_OTHERWISE["auto-round-gptq"].config
    for name in (f"{PREFIX[:-1]}", rf"model\.layers\.{LAYER}\..*"):
        write(tmp_path, plain(), {**config, "extra_config": {name: {"bits": 16, "data_type": "float"}}})
        assert isinstance(read_experts(tmp_path, LAYER).w2, torch.Tensor)
    layers = {f"{PREFIX}0.gate": {"quant_algo": "NVFP4"}}
    write(tmp_path, plain(), {"quant_method": "modelopt", "quant_algo": "mixed_precision", "quantized_layers": layers})
    assert isinstance(read_experts(tmp_path, LAYER).w2, torch.Tensor)


@pytest.mark.parametrize("option", ["experts", "intermediate"])
@pytest.mark.parametrize("value", [(0, 0), (-1, 2), (1, 257), (2, 1), [0, 1], (0, 1.5)], ids=str)
def test_ranges_are_checked(option, value, tmp_path):
    write(tmp_path, plain(), None)
    with pytest.raises(OptionError, match=f"{option}: got .*; wanted .start, stop. within 0"):
        read_experts(tmp_path, LAYER, **{option: value})


def test_only_the_slice_is_read(tmp_path, monkeypatch):
    from fusedmoe.checkpoint.files import Files

    form = FORMS["deepseek"]
    write(tmp_path, layer(form)[0], form.config)
    read, original = [], Files.read

    def counted(self, name, index=()):
        tensor = original(self, name, index)
        read.append((name, tensor.numel()))
        return tensor

    monkeypatch.setattr(Files, "read", counted)
    read_experts(tmp_path, LAYER, experts=(1, 2), intermediate=(64, 128))
    assert {name.removeprefix(PREFIX)[0] for name, _ in read} == {"1"}
    assert sum(size for name, size in read if name.endswith(".weight")) == 3 * 64 * H


# ----------------------------------------------------------------------------------- the real producers


def test_packed_by_compressed_tensors(tmp_path):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for bits, group in ((4, 64), (8, 32)):
        g = torch.Generator().manual_seed(0)
        half, tensors, w = 2 ** (bits - 1), {}, {}
        for e in range(E):
            for name, n, k in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
                codes = torch.randint(-half, half, (n, k), generator=g, dtype=torch.int8)
                zero = torch.randint(-half, half, (n, k // group), generator=g, dtype=torch.int8)
                scale = torch.rand(n, k // group, generator=g)
                tensors |= {
                    f"{PREFIX}{e}.{name}.weight_packed": helpers.pack_to_int32(codes, bits),
                    f"{PREFIX}{e}.{name}.weight_zero_point": helpers.pack_to_int32(zero, bits, packed_dim=0),
                    f"{PREFIX}{e}.{name}.weight_scale": scale,
                    f"{PREFIX}{e}.{name}.weight_shape": torch.tensor([n, k]),
                }
                codes, zero = codes.double(), zero.double().repeat_interleave(group, 1)
                w.setdefault(name, []).append((codes - zero) * scale.double().repeat_interleave(group, 1))
        write(tmp_path, tensors, pack_config(bits, group, True))
        stored = read_experts(tmp_path, LAYER)
        same(stored.w13, torch.cat([torch.stack(w["gate_proj"]), torch.stack(w["up_proj"])], 1))
        same(stored.w2, torch.stack(w["down_proj"]))


@pytest.mark.parametrize("block", [(32, 64), None], ids=str)
def test_quantised_by_transformers(block, tmp_path):
    fine = pytest.importorskip("transformers.integrations.finegrained_fp8")
    from types import SimpleNamespace

    said = SimpleNamespace(weight_block_size=block, scale_fmt="float")
    quantiser = SimpleNamespace(quantization_config=said)
    tensors, w = {}, {}
    for name, weight in plain().items():
        made = fine.Fp8Quantize(quantiser).convert({name: weight})
        tensors |= made
        back = fine.Fp8Dequantize(quantiser)
        w[name] = back._dequantize_one(*made.values(), output_dtype=torch.float32)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block}
    write(tmp_path, tensors, config)
    stored = read_experts(tmp_path, LAYER)
    for e in range(E):
        gate, up, down = (w[f"{PREFIX}{e}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(stored.w13.dequantize()[e], torch.cat([gate, up]))
        assert torch.equal(stored.w2.dequantize()[e], down)


# ------------------------------------------------------------------------------------------ the module


@pytest.mark.parametrize("name", ["deepseek", "ct-int4-128-zero", "fp8-tensor-static", "modelopt-nvfp4"])
@torch.no_grad()
def test_module(name, tmp_path):
    form = FORMS[name]
    write(tmp_path, layer(form)[0], form.config)
    stored = read_experts(tmp_path, LAYER)
    x = routed()
    got = FusedExperts.from_checkpoint(tmp_path, LAYER)(*x)
    wanted = run(stored, *x, dequantised=False)
    assert (got - wanted).norm() / wanted.norm() < 0.02
    ranks = [FusedExperts.from_checkpoint(tmp_path, LAYER, experts=span) for span in ((0, 1), (1, 3))]
    assert (sum(rank(*x) for rank in ranks) - got).norm() / got.norm() < 1e-5
