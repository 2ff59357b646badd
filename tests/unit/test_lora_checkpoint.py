"""Adapters that PEFT saved, against the weights that PEFT itself merges."""

from __future__ import annotations

import json

import pytest
import torch

import fusedmoe
from fusedmoe import CheckpointError, DTypeError, LoRA, ShapeError
from fusedmoe.checkpoint.adapters import read_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

# PEFT's and Transformers' own, of each other.
pytestmark = pytest.mark.filterwarnings(*(f"ignore::{kind}Warning" for kind in ("User", "Future", "Runtime")))

E, H, I = 4, 32, 24
SIZES = {"num_experts": E, "hidden_size": H, "intermediate_size": I}


class Expert(torch.nn.Module):
    def __init__(self, names):
        super().__init__()
        for name, (rows, columns) in names.items():
            setattr(self, name, torch.nn.Linear(columns, rows, bias=False))


class Experts(torch.nn.Module):
    """layers.<n>.mlp.experts.<e>.<name>, as models with a module per expert have them."""

    def __init__(self, names):
        super().__init__()
        layer = torch.nn.Module()
        layer.mlp = torch.nn.Module()
        layer.mlp.experts = torch.nn.ModuleList([Expert(names) for _ in range(E)])
        layer.attention = torch.nn.Linear(H, H)
        self.layers = torch.nn.ModuleList([torch.nn.Module(), layer])

    def forward(self, x):
        return x


def fused_model(kind):
    torch.manual_seed(0)
    common = {
        "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50,
        "intermediate_size": I, "head_dim": 16,
    }  # fmt: skip
    if kind == "qwen3":
        config = transformers.Qwen3MoeConfig(num_experts=E, num_experts_per_tok=2, moe_intermediate_size=I, **common)
    else:
        config = transformers.GptOssConfig(num_local_experts=E, num_experts_per_tok=2, **common)
    return transformers.AutoModelForCausalLM.from_config(config)


def trained(model, **options):
    """A PEFT model whose B is not zero."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, **options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return adapted


def delta(adapter, e):
    """Of w13 and w2 of one expert, float64."""
    a13, b13, a2, b2 = (getattr(adapter, name)[e].double() for name in ("w13_a", "w13_b", "w2_a", "w2_b"))
    if adapter.parts == 2:
        gate, up = a13.chunk(2)
        w13 = torch.cat([b13[:I] @ gate, b13[I:] @ up])
    else:
        w13 = b13 @ a13
    return adapter.scaling * w13, adapter.scaling * b2 @ a2


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"experts.down_proj": 11}}], ids=str)
@pytest.mark.parametrize("targets", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj"), ("down_proj",)])
@pytest.mark.parametrize("kind", ["qwen3", "gpt_oss"])
def test_fused_parameters(kind, targets, options, tmp_path):
    model = fused_model(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [f"mlp.experts.{name}" for name in targets]
    adapted = trained(model, target_parameters=names, target_modules=[], **options)
    adapted.save_pretrained(tmp_path)
    after = adapted.merge_and_unload().state_dict()
    found = read_adapter(tmp_path, 1, **SIZES)
    assert found.parts == 1
    for e in range(E):
        for name, ours in zip(("gate_up_proj", "down_proj"), delta(found, e), strict=True):
            key = f"model.layers.1.mlp.experts.{name}"
            want = (after[key][e] - before[key][e]).double()
            want = want.T if kind == "gpt_oss" else want  # stored [in, out]
            torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-5)
            assert (want != 0).any() == (name in targets)
    assert read_adapter(tmp_path, 7, **SIZES) is None


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")], ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_a_module_per_expert(gated, names, tmp_path):
    gate, up, down = names
    shapes = {up: (I, H), down: (H, I), **({gate: (I, H)} if gated else {})}
    model = Experts(shapes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # Ranks and scalings that differ from matrix to matrix.
    ranks = {f"layers.1.mlp.experts.2.{down}": 7}
    adapted = trained(model, target_modules=[*shapes, "attention"], rank_pattern=ranks)
    adapted.save_pretrained(tmp_path)
    after = adapted.merge_and_unload().state_dict()
    found = read_adapter(tmp_path, 1, **SIZES, gated=gated)
    assert found.rank == 7 and found.parts == (2 if gated else 1)
    for e in range(E):
        change = {
            name: after[key] - before[key] for name in shapes if (key := f"layers.1.mlp.experts.{e}.{name}.weight")
        }
        w13 = torch.cat([change[gate], change[up]]) if gated else change[up]
        for ours, want in zip(delta(found, e), (w13, change[down]), strict=True):
            torch.testing.assert_close(ours, want.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hidden", [H, 2 * I, I])
def test_older_order_of_fused_parameters(hidden, tmp_path):
    """[E, out, in] parameters whose A meets the outputs, as PEFT once had them; one pair may fit both orders."""
    a13, b13 = torch.randn(E * 3, 2 * I), torch.randn(hidden, 3 * E)
    a2, b2 = torch.randn(E * 3, hidden), torch.randn(I, 3 * E)
    prefix = "base_model.model.model.layers.0.mlp.experts."
    write(tmp_path, {
        f"{prefix}lora_A.weight": a13, f"{prefix}lora_B.weight": b13,
        f"{prefix}base_layer.lora_A.weight": a2, f"{prefix}base_layer.lora_B.weight": b2,
    })  # fmt: skip
    found = read_adapter(tmp_path, 0, **SIZES | {"hidden_size": hidden})
    for a, b, index in ((a13, b13, 0), (a2, b2, 1)):
        want = torch.einsum("ore,eri->eio", b.view(-1, 3, E), a.view(E, 3, -1)) * 5 / 3
        for e in range(E):
            torch.testing.assert_close(delta(found, e)[index], want[e].double(), rtol=1e-5, atol=1e-5)


def test_an_order_that_no_size_tells(tmp_path):
    """gate_up alone, [E, 2I, H] with H = 2I: by the version of PEFT, which older adapters do not name."""
    sizes, prefix = SIZES | {"hidden_size": 2 * I}, "base_model.model.model.layers.0.mlp.experts."
    a, b = torch.randn(E * 3, 2 * I), torch.randn(2 * I, 3 * E)
    tensors = {f"{prefix}lora_A.weight": a, f"{prefix}lora_B.weight": b}
    for version in ("0.19.1", "0.21.2", "1.0.0.dev0"):
        write(tmp_path, tensors, peft_version=version)
        want = torch.einsum("ore,eri->eoi", b.view(-1, 3, E), a.view(E, 3, -1)) * 5 / 3
        torch.testing.assert_close(
            delta(read_adapter(tmp_path, 0, **sizes), 1)[0], want[1].double(), rtol=1e-5, atol=1e-5
        )
    for version in (None, "0.18.1", "0.19.0", "new", 3):
        write(tmp_path, tensors, peft_version=version)
        with pytest.raises(CheckpointError, match=f"fit both orders, peft_version {version!r}; wanted PEFT 0.19.1"):
            read_adapter(tmp_path, 0, **sizes)
    down = {f"{prefix}base_layer.lora_A.weight": torch.ones(E * 3, I), f"{prefix}base_layer.lora_B.weight": b}
    wide = {f"{prefix}lora_A.weight": torch.ones(E * 3, 2 * I), f"{prefix}lora_B.weight": torch.ones(H, 3 * E)}
    write(tmp_path, {**wide, **down, f"{prefix}base_layer.lora_B.weight": torch.ones(H, 3 * E)})
    with pytest.raises(CheckpointError, match="fit no one order"):
        read_adapter(tmp_path, 0, **SIZES)


def test_a_parameter_that_no_size_tells(tmp_path):
    prefix = "base_model.model.model.layers.0.mlp.experts."
    tensors = {f"{prefix}lora_A.weight": torch.ones(E * 3, H), f"{prefix}lora_B.weight": torch.ones(H, 3 * E)}
    write(tmp_path, tensors, peft_version="0.21.2")
    with pytest.raises(CheckpointError, match="parameter of .*lora_A.weight: got shapes that fit both"):
        read_adapter(tmp_path, 0, num_experts=E, hidden_size=H, intermediate_size=H, gated=False)


def test_an_adapter_runs_in_the_layer(tmp_path):
    model = fused_model("qwen3").double()
    experts = model.model.layers[0].mlp.experts
    w13, w2 = experts.gate_up_proj.detach().float().clone(), experts.down_proj.detach().float().clone()
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = trained(model, target_parameters=names, target_modules=[])
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().model.layers[0].mlp.experts
    x, topk = torch.randn(9, H), fusedmoe.softmax_topk(torch.randn(9, E), top_k=2, renormalize=True)
    lora = LoRA.empty(3, **SIZES, max_rank=4)
    lora.add(1, read_adapter(tmp_path, 0, **SIZES))
    ids = torch.tensor([1, -1, 1, 0, 1, 1, 2, 1, 1])
    arguments = (topk.weights, topk.ids)
    out = fusedmoe.fused_experts(x, w13, w2, *arguments, lora=lora, adapter_ids=ids)
    base = fusedmoe.fused_experts(x, w13, w2, *arguments)
    want = fusedmoe.fused_experts(
        x, merged.gate_up_proj.detach().float(), merged.down_proj.detach().float(), *arguments
    )
    torch.testing.assert_close(out, torch.where((ids == 1)[:, None], want, base), rtol=1e-4, atol=1e-4)


CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 5}


def write(path, tensors, **config):
    safetensors_torch.save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG | config), encoding="utf-8")


def good(**changes):
    prefix = "base_model.model.layers.0.mlp.experts."
    tensors = {f"{prefix}lora_A.weight": torch.ones(E * 3, H), f"{prefix}lora_B.weight": torch.ones(2 * I, 3 * E)}
    for name, value in changes.items():
        key = prefix + name.replace("__", ".")
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        ({}, {"peft_type": "LOHA"}, "peft_type of .*got 'LOHA'; wanted 'LORA'"),
        ({}, {"use_dora": True}, "use_dora of the adapter: got True"),
        ({}, {"bias": "all"}, "bias of the adapter: got 'all'"),
        ({}, {"lora_alpha": "5"}, "lora_alpha of the adapter: got '5'; wanted a number"),
        ({}, {"lora_alpha": float("nan")}, "lora_alpha of the adapter: got nan"),
        ({}, {"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern of the adapter: .*name of a module"),
        ({}, {"alpha_pattern": [1]}, "alpha_pattern of the adapter: .*an object"),
        ({"lora_B__weight": None}, {}, "factors of the adapter: got one without the other"),
        ({"lora_magnitude_vector": torch.ones(3)}, {}, "tensor of the adapter: got .*lora_magnitude_vector"),
        ({"lora_A__weight": torch.ones(E * 3, H + 1)}, {}, "tensors .*lora_A.weight and lora_B: got shapes"),
        ({"lora_A__weight": torch.ones(E * 3 + 1, H)}, {}, "lora_B: got shapes"),
        ({}, {"r": 6}, "rank of .*lora_A.weight: got 3; wanted 6, as adapter_config.json says"),
        ({}, {"rank_pattern": {"experts.gate_up_proj": 12}}, "rank of .*lora_A.weight: got 3; wanted 12"),
        ({"lora_A__weight": torch.ones(3, H, 1)}, {}, "wanted a matrix of floats"),
        ({"lora_A__weight": torch.ones(E * 3, H).int()}, {}, "wanted a matrix of floats"),
        ({"0__up_proj__lora_A__weight": torch.ones(3, H)}, {}, "factors of the adapter: got one without the other"),
        ({"9__up_proj__lora_A__weight": torch.ones(3, H)}, {}, "wanted experts 0 to 3"),
        (
            {"0__up_proj__lora_A__weight": torch.ones(3, H), "0__up_proj__lora_B__weight": torch.ones(I, 3)},
            {},
            "got gate_up and gate or up",
        ),
        (
            {"0__down_proj__lora_A__weight": torch.ones(3, I), "0__down_proj__lora_B__weight": torch.ones(H, 2)},
            {},
            "got A of rank 3, B of rank 2",
        ),
    ],
)
def test_what_is_refused(tensors, config, says, tmp_path):
    write(tmp_path, good(**tensors), **config)
    with pytest.raises(CheckpointError, match=says):
        read_adapter(tmp_path, 0, **SIZES)


def test_broken_directories(tmp_path):
    with pytest.raises(CheckpointError, match="wanted a directory with adapter_config.json"):
        read_adapter(tmp_path / "none", 0, **SIZES)
    write(tmp_path, good())
    assert read_adapter(tmp_path, 0, **SIZES).rank == 3
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="intact safetensors file"):
        read_adapter(tmp_path, 0, **SIZES)
    path.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="never opened"):
        read_adapter(tmp_path, 0, **SIZES)


def test_a_rank_by_patterns_that_are_no_names_is_that_of_the_tensors(tmp_path):
    write(tmp_path, good(), r=6, rank_pattern={r".*experts.*": 3})
    assert read_adapter(tmp_path, 0, **SIZES).rank == 3


def test_wrong_sizes(tmp_path):
    write(tmp_path, good())
    for experts in (2, 6, 12):
        with pytest.raises(CheckpointError, match="rank of .*wanted 3, as adapter_config.json says"):
            read_adapter(tmp_path, 0, **(SIZES | {"num_experts": experts}))
    for change, error in (({"num_experts": 0}, ShapeError), ({"hidden_size": "32"}, DTypeError)):
        with pytest.raises(error):
            read_adapter(tmp_path, 0, **(SIZES | change))
    with pytest.raises(ShapeError):
        read_adapter(tmp_path, -1, **SIZES)
