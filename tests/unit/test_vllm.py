"""The plugin of vLLM: against a stand-in with the signatures of 0.22.1, and against vLLM where it is installed."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types

import pytest
import torch
import vllm_driver

import fusedmoe
from fusedmoe.integrations import vllm as plugin
from fusedmoe.settings import Settings
from fusedmoe.testing.verify import relative_error

E, H, I, T, K = 6, 256, 128, 9, 3


class Activation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"
    SWIGLUOAI = "swigluoai"
    SWIGLUSTEP = "swiglustep"
    SWIGLUOAI_UNINTERLEAVE = "swigluoai_uninterleave"
    SITU = "situ"
    RELU2_NO_MUL = "relu2_no_mul"
    UNKNOWN = "tanh"


@dataclasses.dataclass
class ActivationConfig:
    """What the plugin reads of 0.33's ApplyMoEActivationConfig."""

    clamp_limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    activation_situ_beta: float | None = None
    activation_situ_linear_beta: float | None = None


@dataclasses.dataclass
class Config:
    """What the plugin reads of a FusedMoEQuantConfig."""

    quant_dtype: object = None
    weight_quant_dtype: object = None
    block_shape: list[int] | None = None
    per_act_token_quant: bool = False
    w1_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w1_zp: torch.Tensor | None = None
    w2_zp: torch.Tensor | None = None
    w1_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    a1_scale: torch.Tensor | None = None
    a2_scale: torch.Tensor | None = None
    gemm1_clamp_limit: float | None = None

    @property
    def use_fp8_w8a8(self):
        return self.quant_dtype == torch.float8_e4m3fn

    @property
    def use_int8_w8a8(self):
        return self.quant_dtype == torch.int8

    @property
    def use_int8_w8a16(self):
        return self.quant_dtype is None and self.weight_quant_dtype == torch.int8

    @property
    def use_int4_w4a16(self):
        return self.quant_dtype is None and self.weight_quant_dtype == "int4"


class TritonExperts:
    """The methods of vLLM's that the plugin's class has in common with it, and what they were called with."""

    def __init__(self, config, **moe):
        self.quant_config = config
        self.moe_config = types.SimpleNamespace(**{"in_dtype": torch.bfloat16, "activation": Activation.SILU} | moe)
        self.called = 0

    @property
    def expects_unquantized_inputs(self):
        return False

    def workspace_shapes(self, M, N, K, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation):
        return (M, topk, max(N // 2, K)), (M, topk, max(N, K)), (M, K)

    def apply(
        self, output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map,
        a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
    ):  # fmt: skip
        self.called += 1
        return "base"


class TritonWNA16Experts(TritonExperts):
    pass


@pytest.fixture
def stand_in(monkeypatch):
    """Modules of those names, with those classes."""
    names = ["vllm", "vllm.envs"]
    path = plugin._MODULE.split(".")
    names += [".".join(path[: i + 1]) for i in range(1, len(path))]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules[plugin._MODULE]
    package = sys.modules[plugin._MODULE.rpartition(".experts.")[0]]
    for place in (module, package):
        place.TritonExperts, place.TritonWNA16Experts = TritonExperts, TritonWNA16Experts
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.22.1")
    monkeypatch.setattr(plugin, "settings", lambda: Settings(vllm=True))
    return module, package


def test_nothing_happens_unless_asked_for(stand_in, monkeypatch):
    monkeypatch.setattr(plugin, "settings", Settings)
    plugin.register()
    assert stand_in[0].TritonExperts is TritonExperts


def test_both_classes_are_replaced_once_wherever_they_are_named(stand_in):
    plugin.register()
    module, package = stand_in
    first = module.TritonExperts, module.TritonWNA16Experts
    assert first == (package.TritonExperts, package.TritonWNA16Experts)
    assert all(
        ours.runs_fusedmoe and ours is not base
        for ours, base in zip(first, (TritonExperts, TritonWNA16Experts), strict=True)
    )
    assert issubclass(first[0], TritonExperts) and issubclass(first[1], TritonWNA16Experts)
    assert first[0].__name__ == "TritonExperts"
    plugin.register()
    assert (module.TritonExperts, module.TritonWNA16Experts) == first


@pytest.mark.parametrize(("version", "replaced"), [
    ("0.22.0", False), ("0.22.1", True), ("0.22.1+cu130", True), ("0.33.0", True), ("0.33.2rc1", True),
    ("0.34.0", False), ("dev", False),
])  # fmt: skip
def test_versions(stand_in, version, replaced, monkeypatch, caplog):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with caplog.at_level(logging.WARNING, "fusedmoe.vllm"):
        plugin.register()
    assert (stand_in[0].TritonExperts is not TritonExperts) == replaced
    assert replaced or f"got vLLM {version}; wanted 0.22.1 to 0.33" in caplog.text


def test_a_vllm_without_these_classes_is_left_alone(stand_in, caplog):
    del stand_in[0].TritonWNA16Experts
    plugin.register()
    assert stand_in[0].TritonExperts is TritonExperts
    assert "wanted TritonExperts and TritonWNA16Experts" in caplog.text


def test_no_vllm_at_all(monkeypatch, caplog):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setattr(plugin, "settings", lambda: Settings(vllm=True))
    plugin.register()
    assert "got vLLM none" in caplog.text


def test_the_entry_point_is_declared():
    (found,) = (e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "fusedmoe")
    assert found.load() is plugin.register


#: What vLLM's layers hand over: name -> (scheme and choices, kind of the rows' scale).
FORMS = {
    "none": (None, None),
    "fp8_block": (("fp8_block", {}), "block"),
    "fp8_channel": (("fp8_channel", {}), "token"),
    "fp8_tensor, per token": (("fp8_tensor", {}), "token"),
    "fp8_tensor, dynamic": (("fp8_tensor", {"inputs": "tensor"}), "tensor"),
    "fp8_tensor, static": (("fp8_tensor", {"inputs": "static"}), "static"),
    "int8_w8a8": (("int8_w8a8", {}), "token"),
    "int8_w8a16": (("int8_w8a16", {"group": -1}), None),
    "int4_w4a16": (("int4_w4a16", {"group": 64}), None),
    "int4_w4a16, zero points": (("int4_w4a16", {"group": 64, "zero": True}), None),
}


def layer_of(form, gated=True, dtype=torch.bfloat16):
    """A config, two tensors of codes as vLLM has them, and the same matrices for the reference."""
    choice, rows = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, I * (2 if gated else 1), H, generator=generator) / H**0.5
    w2 = torch.randn(E, H, I, generator=generator) / I**0.5
    if choice is None:
        return Config(), w13.to(dtype), w2.to(dtype), (w13.to(dtype), w2.to(dtype))
    scheme, options = choice
    static = {"input_scale": torch.tensor(0.02)} if rows == "static" else {}
    matrices = [
        fusedmoe.quantize(w, scheme, parts=parts, **options, **static)
        for w, parts in ((w13, 2 if gated and scheme == "fp8_block" else 1), (w2, 1))
    ]
    a, b = matrices
    kind = None if rows is None else torch.int8 if scheme == "int8_w8a8" else torch.float8_e4m3fn
    config = Config(
        quant_dtype=kind,
        weight_quant_dtype="int4" if scheme == "int4_w4a16" else torch.int8 if scheme == "int8_w8a16" else kind,
        block_shape=[128, 128] if rows == "block" else None,
        per_act_token_quant=rows == "token",
        w1_scale=a.scale.flatten() if scheme == "fp8_tensor" else a.scale,
        w2_scale=b.scale.flatten() if scheme == "fp8_tensor" else b.scale,
        w1_zp=a.zero,
        w2_zp=b.zero,
        a1_scale=a.input_scale,
        a2_scale=b.input_scale,
    )
    return config, a.data, b.data, (a, b)


def quantised_rows(x, form, config):
    """Rows as vLLM's prepare step hands them to the experts."""
    rows = FORMS[form][1]
    if rows is None:
        return x, None
    x = x.float()
    largest = 127.0 if config.quant_dtype == torch.int8 else 448.0
    grouped = x.unflatten(1, (-1, 128)) if rows == "block" else x.unsqueeze(1)
    if rows == "static":
        scale = config.a1_scale.reshape(1, 1)
        codes = x / scale
    elif rows == "tensor":
        scale = (x.abs().max() / largest).reshape(1, 1)
        codes = x / scale
    else:
        scale = grouped.abs().amax(2) / largest
        codes = (grouped / scale[..., None]).flatten(1)
    codes = codes.clamp(-largest, largest)
    return (codes.round() if largest == 127 else codes).to(config.quant_dtype), scale


def call(experts, w1, w2, x, scale, activation=Activation.SILU, **changes):
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(T, K, generator=generator)
    ids = torch.randint(E, (T, K), generator=generator, dtype=torch.int32)
    output = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    shapes = experts.workspace_shapes(T, w1.shape[1], x.shape[1], K, E, E, None, activation)
    arguments = {
        "output": output, "hidden_states": x, "w1": w1, "w2": w2, "topk_weights": weights, "topk_ids": ids,
        "activation": activation, "global_num_experts": -1, "expert_map": None, "a1q_scale": scale, "a2_scale": None,
        "workspace13": output.view(-1), "workspace2": torch.empty(0, dtype=torch.bfloat16), "expert_tokens_meta": None,
        "apply_router_weight_on_input": False,
    }  # fmt: skip
    arguments |= changes
    return experts.apply(**arguments), output, weights, arguments["topk_ids"], shapes


@pytest.mark.parametrize("form", FORMS)
def test_every_scheme_that_vllm_has(stand_in, form):
    config, w1, w2, matrices = layer_of(form)
    experts = plugin.experts_class(TritonExperts)(config)
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    rows, scale = quantised_rows(x, form, config)
    result, output, weights, ids, shapes = call(experts, w1, w2, rows, scale)
    assert result is None and not experts.called
    assert shapes == ((0,), (0,), (T, H))
    extra = {} if scale is None else {"hidden_states_scale": scale}
    want = fusedmoe.reference.fused_experts(rows, *matrices, weights, ids, **extra)
    assert relative_error(output, want) < 2.0**-6
    made = experts._fusedmoe_made
    call(experts, w1, w2, rows, scale)
    assert experts._fusedmoe_made is made  # not put together anew
    if form != "none":
        assert made[0].data.data_ptr() == w1.data_ptr()
        call(experts, w1.clone(), w2, rows, scale)
        assert experts._fusedmoe_made is not made


#: vLLM's activation, parameters that its layers have -> ours.
ACTIVATIONS = [
    (Activation.SILU, {}, ("silu", {})),
    (Activation.SILU, {"clamp_limit": 0.5}, ("silu", {"limit": 0.5})),
    (Activation.SILU, {"clamp_limit": 0}, ("silu", {})),  # no clamp
    (Activation.SILU, {"clamp_limit": -1.0}, ("silu", {})),
    (Activation.GELU, {}, ("gelu", {})),
    (Activation.GELU, {"clamp_limit": 0.0}, ("gelu", {})),
    (Activation.SWIGLUOAI, {}, ("swigluoai", {})),
    (Activation.SWIGLUSTEP, {}, ("swiglustep", {})),
    (Activation.RELU2_NO_MUL, {}, ("relu2_no_mul", {})),
    (Activation.SWIGLUOAI_UNINTERLEAVE, {"clamp_limit": 0.5}, ("swigluoai", {"alpha": 1.0, "beta": 0.0, "limit": 0.5})),
    (Activation.SWIGLUOAI_UNINTERLEAVE, {"clamp_limit": 0.5, "alpha": 1.7, "beta": 1.0},
     ("swigluoai", {"alpha": 1.7, "beta": 1.0, "limit": 0.5})),
    (Activation.SITU, {"activation_situ_beta": 0.8}, ("situ", {"beta": 0.8})),
    (Activation.SITU, {"activation_situ_beta": 0.8, "activation_situ_linear_beta": 0.5},
     ("situ", {"beta": 0.8, "linear_beta": 0.5})),
    (Activation.SITU, {"activation_situ_beta": 0.8, "activation_situ_linear_beta": -1.0}, ("situ", {"beta": 0.8})),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(ACTIVATIONS)))
def test_activations(stand_in, row):
    activation, given, (name, parameters) = ACTIVATIONS[row]
    config, w1, w2, matrices = layer_of("none", gated=not name.endswith("_no_mul"))
    config.w1_bias, config.w2_bias = torch.randn(E, w1.shape[1]), torch.randn(E, H)
    found = [plugin.experts_class(TritonExperts)(config)]
    found[0].activation_config = ActivationConfig(**given)
    if given.keys() <= {"clamp_limit"} and activation != Activation.SWIGLUOAI_UNINTERLEAVE:  # as 0.22.1 has it
        config = dataclasses.replace(config, gemm1_clamp_limit=given.get("clamp_limit"))
        found.append(plugin.experts_class(TritonExperts)(config))
    x = torch.randn(T, H, dtype=torch.bfloat16)
    for experts in found:
        result, output, weights, ids, _ = call(experts, w1, w2, x, None, activation)
        assert result is None and not experts.called
        want = fusedmoe.reference.fused_experts(
            x, *matrices, weights, ids, activation=fusedmoe.Activation(name, **parameters),
            gate_up_layout="interleaved" if activation == Activation.SWIGLUOAI else "concatenated",
            w13_bias=config.w1_bias, w2_bias=config.w2_bias,
        )  # fmt: skip
        assert relative_error(output, want) < 2.0**-6


def test_swigluoai_of_fp8_blocks(stand_in):
    """Whose blocks run over rows of gate and up alike."""
    config, w1, w2, (a, b) = layer_of("fp8_block")
    experts = plugin.experts_class(TritonExperts)(config)
    x = torch.randn(T, H, dtype=torch.bfloat16)
    rows, scale = quantised_rows(x, "fp8_block", config)
    result, output, weights, ids, _ = call(experts, w1, w2, rows, scale, Activation.SWIGLUOAI)
    assert result is None and not experts.called
    a = fusedmoe.ExpertMatrix("fp8_block", a.data, a.scale, parts=1)
    want = fusedmoe.reference.fused_experts(
        rows, a, b, weights, ids, hidden_states_scale=scale, activation="swigluoai", gate_up_layout="interleaved"
    )
    assert relative_error(output, want) < 2.0**-6


@pytest.mark.parametrize("mixture", ["a scale per row, then one", "a static scale, then none", "e8m0", "bytes of e8m0"])
def test_mixtures_that_run_here(stand_in, mixture):
    """The two matrices differ in what shares a scale; or scales are powers of two."""
    form = {"a scale per row, then one": "fp8_channel", "a static scale, then none": "fp8_tensor, static"}
    form = form.get(mixture, "fp8_block")
    config, w1, w2, (a, b) = layer_of(form)
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    rows, scale = quantised_rows(x, form, config)
    if form == "fp8_channel":
        other, _, w2, (_, b) = layer_of("fp8_tensor, per token")
        config.w2_scale = other.w2_scale
    elif form == "fp8_block":
        exponents = [(torch.frexp(w.scale)[1] + 126).to(torch.uint8) for w in (a, b)]
        a, b = (
            fusedmoe.ExpertMatrix(form, w.data, bits, parts=w.parts) for w, bits in zip((a, b), exponents, strict=True)
        )
        kind = torch.uint8 if mixture.startswith("bytes") else torch.float8_e8m0fnu
        config.w1_scale, config.w2_scale = (bits.view(kind) for bits in exponents)
    else:
        config.a2_scale, b = None, fusedmoe.ExpertMatrix("fp8_tensor", b.data, b.scale, inputs="tensor")
    experts = plugin.experts_class(TritonExperts)(config)
    result, output, weights, ids, shapes = call(experts, w1, w2, rows, scale)
    assert result is None and not experts.called and shapes[0] == (0,)
    want = fusedmoe.reference.fused_experts(rows, a, b, weights, ids, hidden_states_scale=scale)
    assert relative_error(output, want) < 2.0**-6
    assert experts._fusedmoe_made[0].scale.data_ptr() == config.w1_scale.data_ptr()


def test_expert_map_and_router_weight_on_the_input(stand_in):
    """By which vLLM's prepare step multiplies the rows."""
    config, w1, w2, matrices = layer_of("none")
    experts = plugin.experts_class(TritonExperts)(config)
    x = torch.randn(T, H, dtype=torch.bfloat16)
    expert_map = torch.tensor([3, -1, 0, 5, -1, 1, 2, 4], dtype=torch.int32)
    ids = torch.randint(8, (T, 1), dtype=torch.int32)
    changes = {
        "expert_map": expert_map, "global_num_experts": 8, "topk_ids": ids, "topk_weights": torch.rand(T, 1),
        "apply_router_weight_on_input": True,
    }  # fmt: skip
    _, output, *_ = call(experts, w1, w2, x * changes["topk_weights"].bfloat16(), None, **changes)
    want = fusedmoe.reference.fused_experts(
        x, *matrices, changes["topk_weights"], ids, expert_map=expert_map, apply_router_weight_on_input=True
    )
    assert relative_error(output, want) < 2.0**-6


def adapters_of(slices=2, slots=3, rank=8):
    """What the plugin reads of a MoELoRAContext, the ids of a batch, and the same adapters as this library has them."""
    g = torch.Generator().manual_seed(5)

    def draw(*sizes):
        return (torch.randn(slots, E, *sizes, generator=g) * sizes[-1] ** -0.5).bfloat16()

    a13, b13 = [draw(rank, H) for _ in range(slices)], [draw(2 * I // slices, rank) for _ in range(slices)]
    a2, b2 = draw(rank, I), draw(H, rank)
    ids = torch.randint(-1, slots, (T + 4,), generator=g).int()
    enabled = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    prepared = types.SimpleNamespace(forgetting=True)
    meta = types.SimpleNamespace(meta_args=lambda n, active: (ids[:n], None), prepare_tensors=prepared)
    context = types.SimpleNamespace(
        w13_lora_a_stacked=tuple(a13), w13_lora_b_stacked=tuple(b13), w2_lora_a_stacked=(a2,), w2_lora_b_stacked=(b2,),
        adapter_enabled=enabled, fully_sharded=False, local_token_lora_mapping=None,
        punica_wrapper=types.SimpleNamespace(token_mapping_meta=meta),
    )  # fmt: skip
    mask = enabled[:slots] != 0
    return context, ids, fusedmoe.LoRA(torch.cat(a13, 2), torch.cat(b13, 2), a2, b2, adapter_enabled=mask)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("base", [TritonExperts, TritonWNA16Experts])
def test_adapters_of_vllm(stand_in, base, slices):
    """One A for gate and up, or one each; a slot that is masked; what a slot holds later; tokens that travelled."""
    config, w1, w2, matrices = layer_of("none")
    x = torch.randn(T, H, dtype=torch.bfloat16)
    experts = plugin.experts_class(base)(config)
    experts._lora_context, ids, lora = adapters_of(slices)
    for turn in range(3):
        if turn == 1:
            experts._lora_context.w13_lora_b_stacked[-1].mul_(-1)
            lora.w13_b[:, :, -2 * I // slices :].mul_(-1)
            experts._lora_context.adapter_enabled.fill_(1)
            lora.adapter_enabled.fill_(1)
        if turn == 2:
            ids = ids.roll(3)
            experts._lora_context.local_token_lora_mapping = ids[:T]
        result, output, weights, chosen, shapes = call(experts, w1, w2, x, None)
        assert result is None and experts.called == 0
        assert shapes == ((0,), (0,), (T, H))
        want, without = (
            fusedmoe.reference.fused_experts(x, *matrices, weights, chosen, **given)
            for given in ({"lora": lora, "adapter_ids": ids[:T]}, {})
        )
        assert relative_error(output, want) < 2.0**-6 < relative_error(without, want)
    experts._lora_context = None
    _, output, *_ = call(experts, w1, w2, x, None)
    assert relative_error(output, without) < 2.0**-6


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][1] is not None])
def test_rows_of_a_quantised_layer_with_adapters_come_as_they_are(stand_in, form):
    config, w1, w2, matrices = layer_of(form)
    experts = plugin.experts_class(TritonExperts)(config)
    assert not experts.expects_unquantized_inputs
    experts._lora_context, ids, lora = adapters_of()
    assert experts.expects_unquantized_inputs
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(2), dtype=torch.bfloat16)
    result, output, weights, chosen, _ = call(experts, w1, w2, x, None)
    assert result is None and not experts.called
    want = fusedmoe.reference.fused_experts(x, *matrices, weights, chosen, lora=lora, adapter_ids=ids[:T])
    assert relative_error(output, want) < 2.0**-6
    experts._lora_context.fully_sharded = True
    assert not experts.expects_unquantized_inputs
    experts._lora_context, experts.moe_config.activation = adapters_of()[0], Activation.UNKNOWN
    assert not experts.expects_unquantized_inputs


class Layer:
    """What vLLM's layers with adapters hold, and how they load one."""

    def __init__(self, context):
        for name in ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked"):
            setattr(self, name, getattr(context, name))

    def set_lora(self, index, lora_a, lora_b):
        for stacked, given in (
            ((*self.w13_lora_a_stacked, *self.w2_lora_a_stacked), lora_a),
            ((*self.w13_lora_b_stacked, *self.w2_lora_b_stacked), lora_b),
        ):
            for tensor, one in zip(stacked, given, strict=True):
                tensor[index] = one


def test_what_is_not_finite_stays_with_its_adapter(stand_in, monkeypatch):
    """Layers that load it keep B finite; which the kernels are promised, unless there are no such layers."""
    config, w1, w2, matrices = layer_of("none")
    experts = plugin.experts_class(TritonExperts)(config)
    experts._lora_context, ids, lora = adapters_of()
    x = torch.randn(T, H, dtype=torch.bfloat16)
    call(experts, w1, w2, x, None)
    assert not experts._fusedmoe_adapters.finite
    module = types.ModuleType(plugin._LAYERS)
    own = {"set_lora": Layer.set_lora, "__module__": plugin._LAYERS}
    module.FusedMoEWithLoRA = type("FusedMoEWithLoRA", (Layer,), own)
    module.FusedMoE3DWithLoRA = type("FusedMoE3DWithLoRA", (module.FusedMoEWithLoRA,), own)
    module.BaseLayerWithLoRA, before = Layer, Layer.set_lora  # imported, and a base of layers without experts
    for name in ("vllm.lora", "vllm.lora.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, plugin._LAYERS, module)
    plugin.register()
    assert Layer.set_lora is before
    first = module.FusedMoEWithLoRA.set_lora
    assert first is not Layer.set_lora and module.FusedMoE3DWithLoRA.set_lora is not first
    plugin.register()
    assert module.FusedMoEWithLoRA.set_lora is first
    experts = plugin.experts_class(TritonExperts)(config)
    context, ids, _ = adapters_of()
    experts._lora_context = context
    ids[:4] = torch.tensor([0, -1, 2, 0])
    layer = module.FusedMoE3DWithLoRA(context)
    a, b = ([t[0].clone() for t in (*w13, *w2)] for w13, w2 in (
        (context.w13_lora_a_stacked, context.w2_lora_a_stacked), (context.w13_lora_b_stacked, context.w2_lora_b_stacked)
    ))  # fmt: skip
    b[1][2, 5, 3], b[2][4, 7, 0] = float("inf"), float("nan")
    layer.set_lora(0, a, b)
    assert torch.isnan(context.w13_lora_a_stacked[1][0, 2, 3]).all()
    assert torch.isnan(context.w2_lora_a_stacked[0][0, 4, 0]).all()
    assert sum(int(t[0].isnan().sum()) for t in (*context.w13_lora_a_stacked, *context.w2_lora_a_stacked)) == H + I
    assert all(t.isfinite().all() for t in (*context.w13_lora_b_stacked, *context.w2_lora_b_stacked))
    chosen = torch.full((T, K), 2, dtype=torch.int32)
    _, output, weights, *_ = call(experts, w1, w2, x, None, topk_ids=chosen)
    assert experts._fusedmoe_adapters.finite
    want = fusedmoe.reference.fused_experts(x, *matrices, weights, chosen, lora=lora, adapter_ids=ids[:T])
    own = ids[:T] == 0
    assert output[own].isnan().all() and relative_error(output[~own], want[~own]) < 2.0**-6


@pytest.mark.parametrize(("of_a", "of_b"), [(1, E), (E, 1), (1, 1)])
def test_matrices_that_experts_share_are_isolated_too(of_a, of_b):
    a, b = torch.zeros(2, of_a, 4, 8), torch.zeros(2, of_b, 6, 4)
    stacked = {"w13_lora_a_stacked": (), "w13_lora_b_stacked": (), "w2_lora_a_stacked": (a,), "w2_lora_b_stacked": (b,)}
    given = torch.ones(of_a, 4, 8), torch.ones(of_b, 6, 4)
    given[1][-1, 5, 2] = float("inf")
    plugin.isolating(Layer.set_lora)(Layer(types.SimpleNamespace(**stacked)), 1, given[:1], given[1:])
    assert a[1, -1, 2].isnan().all() and a[1].isnan().sum() == 8 * (1 if of_b == E or of_a == 1 else of_a)
    assert b.isfinite().all() and b[1].sum() == 24 * of_b - 1 and not a[0].any()


def test_the_rest_runs_in_vllms_own_class_with_its_workspaces(stand_in, caplog):
    plugin._say.cache_clear()
    config, w1, w2, _ = layer_of("none")
    x = torch.randn(T, H, dtype=torch.bfloat16)
    made = plugin.experts_class(TritonExperts)
    emulated, other = made(config), made(Config(weight_quant_dtype="nvfp4"))
    sharded, wide, lopsided, stale = ((made(config), adapters_of()[0]) for _ in range(4))
    del stale[1].punica_wrapper.token_mapping_meta.prepare_tensors
    for experts, context in (sharded, wide, lopsided, stale):
        experts._lora_context = context
    sharded[1].fully_sharded = True
    wide[1].w2_lora_a_stacked = (wide[1].w2_lora_a_stacked[0].float(),)
    lopsided[1].w13_lora_b_stacked = (lopsided[1].w13_lora_b_stacked[0], torch.zeros(3, E, I, 9).bfloat16()[..., :8])
    emulated.quantization_emulation = True
    limited, older = (made(dataclasses.replace(config, gemm1_clamp_limit=3.0)) for _ in range(2))
    with caplog.at_level(logging.INFO, "fusedmoe.vllm"):
        for experts, activation, reason in (
            (sharded[0], Activation.SILU, "adapters are sharded along their ranks"),
            (wide[0], Activation.SILU, "adapters in torch.float32 meet rows in torch.bfloat16"),
            (lopsided[0], Activation.SILU, "adapters of gate and up are laid out differently"),
            (stale[0], Activation.SILU, "slots of tokens may be those of the batch before"),
            (emulated, Activation.SILU, "quantisation is emulated"),
            (other, Activation.SILU, "weights of nvfp4 with rows of None"),
            (made(config), Activation.UNKNOWN, "activation: got tanh"),
            (made(config), Activation.SWIGLUOAI_UNINTERLEAVE, "activation: got swigluoai_uninterleave;"),
            (made(config), Activation.SITU, "'situ' needs 'beta'"),
            (limited, Activation.GELU, "gelu with limit 3.0"),
            (older, Activation.SWIGLUOAI_UNINTERLEAVE, "swigluoai_uninterleave with limit 3.0"),
        ):
            result, _, _, _, shapes = call(experts, w1, w2, x, None, activation)
            assert result == "base" and experts.called == 1
            assert shapes == ((T, K, H), (T, K, 2 * I), (T, H))
            assert reason in caplog.text


def weight_only(bits, group, zero=False):
    """What vLLM has of codes of this many bits with scales of groups of columns; and weights."""
    sizes = (E, 512, 512), (E, 512, 256)
    w1, w2 = (torch.zeros(*size[:2], size[2] * bits // 8, dtype=torch.uint8) for size in sizes)
    scales = [torch.ones(*size[:2], -(-size[2] // group)) for size in sizes]
    config = Config(weight_quant_dtype="int4" if bits == 4 else torch.int8, w1_scale=scales[0], w2_scale=scales[1])
    if zero:
        config.w1_zp, config.w2_zp = (scale[:, :: 8 // bits].to(torch.uint8) for scale in scales)
    return config, w1, w2


def changed(form, **changes):
    config, w1, w2, _ = layer_of(form)
    return dataclasses.replace(config, **changes), w1, w2


#: What a layer may have that does not run here: name -> (config and weights, a part of the reason).
UNFIT = {
    "int4 in groups of 16": (lambda: weight_only(4, 16), "scale of scheme 'int4_w4a16'"),
    "int8 in groups of 16": (lambda: weight_only(8, 16, zero=True), "scale of scheme 'int8_w8a16'"),
    "int4 in groups of 256": (lambda: weight_only(4, 256, zero=True), "scale of scheme 'int4_w4a16'"),
    "int8 in groups of 256": (lambda: weight_only(8, 256), "scale of scheme 'int8_w8a16'"),
    "blocks of a row": (lambda: changed("fp8_block", block_shape=[1, 128]), "block of scheme 'fp8_block'"),
    "scales of no form": (lambda: changed("fp8_block", w2_scale=torch.ones(E, 3, 1)), "scale of scheme 'fp8_block'"),
    "scales of no type": (
        lambda: changed("fp8_channel", w1_scale=torch.ones(E, 2 * I, dtype=torch.int32)),
        "scale of scheme 'fp8_channel': got torch.int32",
    ),
    "no scales": (lambda: changed("fp8_channel", w1_scale=None), "scale of an expert matrix: got NoneType"),
    "a static scale per expert": (
        lambda: changed("fp8_tensor, static", a2_scale=torch.ones(E)),
        "input_scale of scheme 'fp8_tensor'",
    ),
    "weights of no type": (lambda: changed("fp8_channel", weight_quant_dtype="int4"), "data of scheme 'fp8_channel'"),
    "biases of no form": (lambda: changed("none", w1_bias=torch.ones(E, I)), "w13_bias"),
    "too large a limit": (lambda: changed("none", gemm1_clamp_limit=float("inf")), "limit of activation 'silu'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_here_is_known_before_a_call(stand_in, caplog, name):
    plugin._say.cache_clear()
    (config, w1, w2), reason = UNFIT[name][0](), UNFIT[name][1]
    experts = plugin.experts_class(TritonWNA16Experts if "groups" in name else TritonExperts)(config)
    hidden = w2.shape[1]
    with caplog.at_level(logging.INFO, "fusedmoe.vllm"):
        for turn in (1, 2):
            result, _, _, _, shapes = call(experts, w1, w2, torch.randn(T, hidden, dtype=torch.bfloat16), None)
            assert result == "base" and experts.called == turn
            assert shapes == ((T, K, max(w1.shape[1] // 2, hidden)), (T, K, max(w1.shape[1], hidden)), (T, hidden))
    assert caplog.text.count("a layer runs in vLLM's own") == 1 and reason in caplog.text


@pytest.mark.parametrize("setting", ["VLLM_BATCH_INVARIANT", "FUSEDMOE_BATCH_INVARIANT"])
@pytest.mark.parametrize("form", ["fp8_tensor, dynamic", "fp8_tensor, static"])
def test_rows_that_share_a_dynamic_scale_are_not_batch_invariant_here(stand_in, monkeypatch, form, setting):
    """Nor are adapters; and rows that vLLM's class takes come quantised."""
    if setting.startswith("VLLM"):
        sys.modules["vllm.envs"].VLLM_BATCH_INVARIANT = True
    else:
        for place in (plugin, fusedmoe.checks):
            monkeypatch.setattr(place, "settings", lambda: Settings(vllm=True, batch_invariant=True))
    config, w1, w2, _ = layer_of(form)
    rows, scale = quantised_rows(torch.randn(T, H, dtype=torch.bfloat16), form, config)
    experts = plugin.experts_class(TritonExperts)(config)
    result, _, _, _, shapes = call(experts, w1, w2, rows, scale)
    assert (result == "base") == (shapes[0] != (0,)) == (form == "fp8_tensor, dynamic")
    experts._lora_context = adapters_of()[0]
    assert not experts.expects_unquantized_inputs
    result, _, _, _, shapes = call(experts, w1, w2, rows, scale)
    assert result == "base" and shapes[0] != (0,)


def test_rows_come_quantised_to_a_layer_with_adapters_that_does_not_fit(stand_in):
    """Asked before the layer's weights were seen."""
    config, w1, w2 = UNFIT["scales of no form"][0]()
    experts = plugin.experts_class(TritonExperts)(config)
    experts._lora_context = adapters_of()[0]
    assert not experts.expects_unquantized_inputs
    rows, scale = quantised_rows(torch.randn(T, H, dtype=torch.bfloat16), "fp8_block", config)
    assert call(experts, w1, w2, rows, scale)[0] == "base"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_tried_is_what_runs(stand_in, monkeypatch, form, gated):
    """Matrices that hold nothing have the format and the shape of those of the call; they are tried once."""
    config, w1, w2, _ = layer_of(form, gated)
    activation = Activation.SILU if gated else Activation.RELU2_NO_MUL
    tried, asked = [], []
    own, why_not = plugin.matrices, plugin.why_not
    monkeypatch.setattr(plugin, "matrices", lambda *args: tried.append(own(*args)) or tried[-1])
    monkeypatch.setattr(plugin, "why_not", lambda *args: asked.append(args) or why_not(*args))
    experts = plugin.experts_class(TritonExperts)(config)
    rows, scale = quantised_rows(torch.randn(T, H, dtype=torch.bfloat16), form, config)
    for _ in range(2):
        assert call(experts, w1, w2, rows, scale, activation)[0] is None
    assert len(asked) == 1 and len(tried) == 2
    for blank, made in zip(*tried, strict=True):
        assert blank.shape == made.shape
        assert form == "none" or (dataclasses.replace(blank.format, element=made.format.element) == made.format)
        assert form in ("none", "int8_w8a16") or blank.format == made.format  # of bytes or signed: alike in all else


# --- vLLM itself ------------------------------------------------------------------------------------------------------

installed = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")


@installed
def test_signatures_of_the_installed_vllm(monkeypatch):
    import inspect

    module = importlib.import_module(plugin._MODULE)
    monkeypatch.setattr(plugin, "settings", lambda: Settings(vllm=True))
    for name in plugin.NAMES:
        base = getattr(module, name)
        base = base.__mro__[1] if getattr(base, "runs_fusedmoe", False) else base
        assert (
            list(inspect.signature(base.apply).parameters)[1:]
            == list(inspect.signature(TritonExperts.apply).parameters)[1:]
        )
        asked = (list(inspect.signature(kind.workspace_shapes).parameters) for kind in (base, TritonExperts))
        assert next(asked) == next(asked)
        ours = plugin.experts_class(base)
        assert not ours.__abstractmethods__


@installed
@pytest.mark.parametrize("form", FORMS)
def test_configurations_of_the_installed_vllm(form):
    """The properties that the plugin reads have the values that the stand-in has."""
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    config, *_ = layer_of(form)
    theirs = FusedMoEQuantConfig.make(
        config.quant_dtype, weight_dtype=config.weight_quant_dtype, block_shape=config.block_shape,
        per_act_token_quant=config.per_act_token_quant, w1_scale=config.w1_scale, w2_scale=config.w2_scale,
        a1_scale=config.a1_scale, a2_scale=config.a2_scale, w1_zp=config.w1_zp, w2_zp=config.w2_zp,
    )  # fmt: skip
    assert plugin.kind_of(theirs) == plugin.kind_of(config) != None  # noqa: E711


@installed
def test_parameters_of_activations_of_the_installed_vllm():
    module = importlib.import_module("vllm.model_executor.layers.fused_moe.activation")
    theirs = getattr(module, "ApplyMoEActivationConfig", None)
    known = {activation.value for activation in module.MoEActivation}
    if theirs is None:  # 0.22.1
        assert not known & {"swigluoai_uninterleave", "situ"}
    else:
        assert known >= {"swigluoai_uninterleave", "situ"}
        assert dataclasses.asdict(theirs()) == dataclasses.asdict(ActivationConfig())


@pytest.fixture
def benchmark(monkeypatch):
    """The script that drives vLLM's modular kernel, and what vLLM wants to be there."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # which vLLM calls wherever it is
    with vllm_driver.driver("cpu") as module:
        yield module


@installed
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", ["none", "weight on input", "int8_w8a16", "int4_w4a16"])
def test_in_vllms_own_modular_kernel(benchmark, scheme, bias):
    """Its prepare and finalize steps and workspaces; rows that are quantised need operators that a CPU has not."""
    on_input = scheme == "weight on input"
    shape, scheme = ("6,1,256,128", "none") if on_input else ("6,3,256,128", scheme)
    layer = benchmark.draw_layer(
        benchmark.shape_of(shape), dtype=torch.bfloat16, device=torch.device("cpu"), scheme=scheme, bias=bias
    )
    layer.options["apply_router_weight_on_input"] = on_input
    for tokens in (1, 9):
        assert benchmark.measured(layer, tokens, eager=False)["fusedmoe_ok"]


@installed
@pytest.mark.parametrize("slices", [1, 2])
def test_adapters_in_vllms_own_modular_kernel(benchmark, slices):
    from vllm.model_executor.layers.fused_moe.experts import lora_context, triton_moe

    layer = benchmark.draw_layer(
        benchmark.shape_of(f"{E},{K},{H},{I}"), dtype=torch.bfloat16, device=torch.device("cpu"), scheme="none"
    )
    moe, quant = benchmark.configured(layer, T)
    kernel = benchmark.kernel(plugin.experts_class(triton_moe.TritonExperts), moe, quant)
    found, ids, lora = adapters_of(slices)
    kernel.fused_experts.set_lora_context(
        lora_context.MoELoRAContext(
            **vars(found), max_loras=lora.slots, top_k=K, w13_num_slices=slices, tp_rank=0, tp_size=1,
            local_num_experts=E, use_tuned_config=False,
        )
    )  # fmt: skip
    x, _, _, weights, chosen = arguments = layer.call(T)
    out = kernel.apply(activation=moe.activation, **benchmark.operands(layer, x, weights, chosen))
    want = fusedmoe.reference.fused_experts(*arguments, lora=lora, adapter_ids=ids[:T])
    assert relative_error(out, want) < 2.0**-6


@installed
def test_what_the_installed_vllm_keeps_about_adapters():
    plugin.prepare_adapters()
    layers = importlib.import_module(plugin._LAYERS)
    assert plugin._layers_isolate() and hasattr(layers.FusedMoE3DWithLoRA.set_lora, "isolating")
    assert not hasattr(layers.BaseLayerWithLoRA.set_lora, "isolating")
    told = importlib.import_module(plugin._SLOTS_OF_TOKENS).LoRAKernelMeta.make(2, 8, "cpu")
    told.prepare_tensors(torch.tensor([1, 0, -1], dtype=torch.int32))
    assert told.meta_args(3, False)[0].tolist() == [1, 0, -1]
    told.prepare_tensors(torch.tensor([-1, -1, -1], dtype=torch.int32))
    assert told.meta_args(8, False)[0].tolist() == [-1] * 8
    plugin.prepare_adapters()
    assert not hasattr(vars(type(told))["prepare_tensors"].__wrapped__, "forgetting")
