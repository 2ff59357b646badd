"""fusedmoe quantize: what it writes is read back, and everything that it must refuse."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fusedmoe.checkpoint import read_embedding, read_experts, read_router, writer
from fusedmoe.cli import run as running
from fusedmoe.cli.app import app
from fusedmoe.plan.floor import Ceilings
from fusedmoe.quantization import quantize
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.spec.format import ELEMENTS

E, H, I = 3, 128, 192
LAYERS = (1, 3)


def draw(*sizes, seed=0):
    return (torch.randn(sizes, generator=torch.Generator().manual_seed(seed)) / sizes[-1] ** 0.5).to(torch.bfloat16)


def others():
    tensors = {"model.embed_tokens.weight": draw(16, H), "lm_head.weight": draw(16, H), "model.norm.weight": draw(H)}
    for layer in (*LAYERS, 0):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = draw(H, H, seed=layer)
        tensors[f"model.layers.{layer}.self_attn.sinks"] = torch.arange(3)
    for layer in LAYERS:
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = draw(E, H, seed=9)
        tensors[f"model.layers.{layer}.mlp.router.weight"] = draw(E, H, seed=9)
    return tensors


def separate():
    shapes = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {
        f"model.layers.{layer}.mlp.experts.{e}.{name}.weight": draw(*shape, seed=100 * layer + 10 * e + i)
        for layer in LAYERS
        for e in range(E)
        for i, (name, shape) in enumerate(shapes.items())
    }


def fused(bias=True, transposed=False):
    tensors = {}
    for layer in LAYERS:
        head = f"model.layers.{layer}.mlp.experts."
        for i, (name, shape) in enumerate({"gate_up_proj": (2 * I, H), "down_proj": (H, I)}.items()):
            weight = draw(E, *shape, seed=layer + i)
            tensors[head + name] = weight.transpose(1, 2).contiguous() if transposed else weight
            if bias:
                tensors[f"{head}{name}_bias"] = draw(E, shape[0], seed=layer + i + 5)
    return tensors


def write(directory, tensors, **config):
    directory.mkdir()
    base = {"model_type": "qwen3_moe", "hidden_act": "silu", "num_experts_per_tok": 2, "norm_topk_prob": True}
    (directory / "config.json").write_text(json.dumps({**base, **config}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "pytorch_model.bin").write_bytes(b"pickle")
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in", {**others(), **separate()})


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments), "--device", "cpu"])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def concatenated(stored):
    """w13 and its bias with gate rows first."""
    w13, bias = stored.w13, stored.w13_bias
    if stored.weight_layout == "KN":
        w13 = w13.transpose(1, 2)
    if stored.gate_up_layout == "interleaved":
        w13 = torch.cat([w13[:, 0::2], w13[:, 1::2]], 1)
        bias = None if bias is None else torch.cat([bias[:, 0::2], bias[:, 1::2]], 1)
    return w13, bias


CHOICES = [
    ("fp8_block", {}, "fp8"),
    ("fp8_block", {"block": (64, 32)}, "fp8"),
    ("fp8_channel", {}, "compressed-tensors"),
    ("fp8_tensor", {}, "compressed-tensors"),
    ("fp8_w8a16", {}, "compressed-tensors"),
    ("fp8_w8a16", {"block": (128, 128)}, "compressed-tensors"),
    ("fp8_w8a16", {"block": (0, 0)}, "compressed-tensors"),
    ("int8_w8a8", {}, "compressed-tensors"),
    ("int8_w8a8", {"block": (0, 0)}, "compressed-tensors"),
    ("int8_w8a8", {"block": (64, 64)}, "compressed-tensors"),
    ("int8_w8a16", {}, "compressed-tensors"),
    ("int8_w8a16", {"group": 64, "zero": True}, "compressed-tensors"),
    ("int4_w4a16", {"group": 64}, "compressed-tensors"),
    ("int4_w4a16", {"group": 32, "zero": True}, "compressed-tensors"),
    ("int4_w4a16", {"group": -1, "zero": True}, "compressed-tensors"),
    ("mxfp4", {}, "fusedmoe"),
    ("mxfp8", {}, "fusedmoe"),
    ("mxfp4_fp8", {}, "fusedmoe"),
    ("nvfp4", {}, "fusedmoe"),
]


def test_every_scheme_is_tried():
    assert {scheme for scheme, *_ in CHOICES} == set(SCHEMES)


def options(choice):
    words = ["--zero"] if choice.get("zero") else []
    words += ["--group", choice["group"]] if "group" in choice else []
    return words + (["--block", "x".join(map(str, choice["block"]))] if "block" in choice else [])


@pytest.mark.parametrize(("scheme", "choice", "method"), CHOICES, ids=str)
def test_round_trip(scheme, choice, method, source, tmp_path):
    target = tmp_path / "out"
    found = json.loads(invoke(source, target, "--scheme", scheme, *options(choice), "--json").stdout)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == found["method"] == method
    plain, back = (read_experts(directory, LAYERS[1]) for directory in (source, target))
    element = "uint8" if scheme == "int8_w8a16" else None
    scale = "bfloat16" if scheme in ("int8_w8a16", "int4_w4a16") else None
    form = format_of(scheme, **choice, element=element, scale=scale)
    assert back.w13.format == back.w2.format == form
    assert torch.equal(back.w13.dequantize(), quantize(plain.w13, form, parts=2).dequantize())
    assert torch.equal(back.w2.dequantize(), quantize(plain.w2, form).dequantize())
    assert torch.equal(read_embedding(target), read_embedding(source))
    assert torch.equal(read_router(target, 3).weight, read_router(source, 3).weight)

    assert [row["layer"] for row in found["layers"]] == list(LAYERS)
    for row in found["layers"]:
        before, after = (read_experts(directory, row["layer"]) for directory in (source, target))
        for name in ("w13", "w2"):
            weight, made = getattr(before, name).double(), getattr(after, name).dequantize(torch.float64)
            error = ((made - weight).norm() / weight.norm()).item()
            assert row[name] == pytest.approx(error, rel=1e-3)
            assert 0 < row[name] <= row[f"{name}_max"] < ELEMENTS[form.element].step
            each = ((made - weight).flatten(1).norm(dim=1) / weight.flatten(1).norm(dim=1)).max().item()
            assert row[f"{name}_max"] == pytest.approx(each, rel=1e-3)


def test_everything_else_is_copied(source, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_ROOM", 4096)
    target = tmp_path / "out"
    result = invoke(source, target, "--scheme", "int4_w4a16", "--group", 64)
    assert "layer" in result.stdout and "worst expert" in result.stdout and "int4_w4a16 1x64" in result.stdout
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    files = {path.name for path in target.iterdir()}
    assert files == {"config.json", "tokenizer.json", "model.safetensors.index.json", *index.values()}
    tensors = {}
    for file in set(index.values()):
        tensors |= load_file(target / file)
    for name, tensor in others().items():
        assert torch.equal(tensors[name], tensor), name
    names = {name.removesuffix("weight") for name in separate()}
    assert set(tensors) == set(others()) | {
        n + e for n in names for e in ("weight_packed", "weight_scale", "weight_shape")
    }
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    ignored = config["quantization_config"]["ignore"]
    matrices = {n.removesuffix(".weight") for n, t in others().items() if t.dim() > 1}
    assert set(ignored) == matrices


def test_shards_end_at_their_limit(tmp_path):
    tensors = {**others(), **separate(), "model.embed_tokens.weight": draw(8192, H), "lm_head.weight": draw(2048, H)}
    source, target = write(tmp_path / "in", tensors), tmp_path / "out"
    invoke(source, target, "--scheme", "mxfp8", "--shard-gb", 0.001)
    sizes = [path.stat().st_size - 2**20 for path in target.glob("model-*.safetensors")]
    # The embedding alone is larger than the limit, and has a file of its own.
    assert len(sizes) == 3 and sorted(size > 1e6 for size in sizes) == [False, False, True]
    assert torch.equal(read_embedding(target), tensors["model.embed_tokens.weight"])


def test_shards_end_when_their_header_is_full(source, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_ROOM", 2048)
    target = tmp_path / "out"
    invoke(source, target, "--scheme", "fp8_channel")
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert list(file.keys())
    assert torch.equal(read_embedding(target), read_embedding(source))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("scheme", ["fp8_channel", "mxfp4"])
def test_fused(scheme, model_type, transposed, tmp_path):
    source = write(tmp_path / "in", {**others(), **fused(transposed=transposed)}, model_type=model_type)
    target = tmp_path / "out"
    found = json.loads(invoke(source, target, "--scheme", scheme, "--json").stdout)
    own = scheme == "mxfp4" and model_type == "gpt_oss"
    assert found["method"] == {"fp8_channel": "compressed-tensors", "mxfp4": "mxfp4" if own else "fusedmoe"}[scheme]
    plain, back = (read_experts(directory, 1) for directory in (source, target))
    assert back.gate_up_layout == ("interleaved" if own else "concatenated")
    w13, bias = concatenated(plain)
    made = back.w13.dequantize()
    if own:
        made = torch.cat([made[:, 0::2], made[:, 1::2]], 1)
        assert torch.equal(back.w13_bias, plain.w13_bias)
    else:
        assert torch.equal(back.w13_bias, bias)
    assert torch.equal(made, quantize(w13.contiguous(), back.w13.format).dequantize())
    assert torch.equal(back.w2_bias, plain.w2_bias)
    assert back.activation == plain.activation


@pytest.mark.parametrize("scheme", ["fp8_tensor", "mxfp4"])
def test_run_takes_it(scheme, source, tmp_path, monkeypatch):
    ceilings = Ceilings(bandwidth_gbps=10.0, tflops={"float32": 0.1, "bfloat16": 0.1}, launch_us=1.0)
    monkeypatch.setattr(running, "measure_ceilings", lambda *_: ceilings)
    invoke(source, tmp_path / "out", "--scheme", scheme)
    arguments = ["run", str(tmp_path / "out"), "--layer", "3", "--tokens", "9", "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = json.loads(result.stdout)
    assert found["ok"] and found["dtype"] == "bfloat16"
    assert [text.split()[0] for text in found["formats"]] == [scheme] * 2


# ------------------------------------------------------------------------------------------------- refusals


def test_refusals_leave_nothing_behind(source, tmp_path):
    target = tmp_path / "out"

    def refused(match, *arguments):
        result = invoke(*arguments, code=2)
        assert match in result.stderr.replace("\n", " ")
        assert not target.exists() and not list(tmp_path.glob("*.incomplete"))

    refused("wanted fp8_block or ", source, target, "--scheme", "fp9")
    refused("wanted 128 or 64 or 32", source, target, "--scheme", "int4_w4a16", "--group", 48)
    refused("Choose a group that divides K", source, target, "--scheme", "int4_w4a16", "--group", 128)
    refused("zero points", source, target, "--scheme", "fp8_block", "--zero")
    refused("--block: got '128'", source, target, "--scheme", "fp8_block", "--block", "128")
    refused("which is no directory", tmp_path / "none", target, "--scheme", "fp8_block")
    invoke(source, target, "--scheme", "fp8_block")
    result = invoke(source, target, "--scheme", "fp8_block", code=2)
    assert "which exists; wanted a new directory" in result.stderr
    result = invoke(target, tmp_path / "again", "--scheme", "fp8_block", code=2)
    assert "method 'fp8' in config.json; wanted an unquantised checkpoint" in result.stderr
    assert not (tmp_path / "again").exists()


def test_no_experts(tmp_path):
    source = write(tmp_path / "in", others())
    assert "a layer with experts" in invoke(source, tmp_path / "out", "--scheme", "fp8_block", code=2).stderr


def test_values_that_are_not_finite(tmp_path):
    tensors = separate()
    tensors[f"model.layers.{LAYERS[1]}.mlp.experts.2.up_proj.weight"][0, 0] = torch.nan
    source = write(tmp_path / "in", {**others(), **tensors})
    assert "wanted finite numbers" in invoke(source, tmp_path / "out", "--scheme", "fp8_block", code=2).stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.incomplete"))


@pytest.mark.parametrize(("scheme", "bits"), [("int4_w4a16", 4), ("int8_w8a16", 8)])
def test_compressed_tensors_unpacks(scheme, bits, source, tmp_path):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    invoke(source, tmp_path / "out", "--scheme", scheme, "--group", 64, "--zero")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    head, stored = "model.layers.3.mlp.experts.2.down_proj.weight", read_experts(tmp_path / "out", 3)
    codes = helpers.unpack_from_int32(tensors[f"{head}_packed"], bits, torch.Size([H, I]))
    zeros = helpers.unpack_from_int32(tensors[f"{head}_zero_point"], bits, torch.Size([H, I // 64]), packed_dim=0)
    scale = tensors[f"{head}_scale"].float()
    weight = (codes.float() - zeros.float().repeat_interleave(64, 1)) * scale.repeat_interleave(64, 1)
    assert torch.equal(weight, stored.w2.dequantize()[2])


def test_transformers_loads_block_fp8(tmp_path):
    """The directory as Transformers reads it, which dequantises block fp8 on the CPU."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from fusedmoe.cli.sample import write_sample

    source, target = tmp_path / "in", tmp_path / "out"
    write_sample(source)
    invoke(source, target, "--scheme", "fp8_block", "--block", "32x32")
    dequantised = transformers.FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(
        target, quantization_config=dequantised, dtype=torch.float32
    )
    for layer in range(2):
        experts, stored = model.model.layers[layer].mlp.experts, read_experts(target, layer)
        assert torch.equal(experts.gate_up_proj, stored.w13.dequantize())
        assert torch.equal(experts.down_proj, stored.w2.dequantize())
