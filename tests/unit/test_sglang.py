"""The plugin of SGLang: against a stand-in, and the stand-in against the source of 0.5.23 where that is found."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fusedmoe
from fusedmoe.integrations import sglang as plugin
from fusedmoe.settings import Settings
from fusedmoe.testing.verify import relative_error

E, H, I, T, K = 6, 256, 128, 9, 3


class DispatchOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: Any
    topk_output: Any
    hidden_states_pre_quant: Any = None


class TopK(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: Any = None
    packed_topk_ids: Any = None


class CombineInput(NamedTuple):
    hidden_states: torch.Tensor


def info(w13, w2, **fields):
    names = (
        "b13 b2 w13_scale w2_scale w13_zp w2_zp a13_scale a2_scale block_shape",
        "use_mxfp8 use_fp8_w8a8 use_int8_w8a8 use_int8_w8a16 use_int4_w4a16 per_channel_quant fuse_swiglu_interleaved",
    )
    absent, false = (dict.fromkeys(text.split(), value) for text, value in zip(names, (None, False), strict=True))
    return types.SimpleNamespace(w13_weight=w13, w2_weight=w2, **{**absent, **false, **fields})


def runner(**fields):
    values = {
        "activation": "silu", "is_gated": True, "apply_router_weight_on_input": False, "no_combine": False,
        "routed_scaling_factor": None, "gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None,
        "gate_up_interleaved": True,
    }  # fmt: skip
    return types.SimpleNamespace(**(values | fields))


@pytest.fixture
def pool(monkeypatch):
    """SGLang's modules with the function that its Triton runner registers."""
    names = ["triton", "base"]
    places = [f"{plugin._RUNNER}.{name}" for name in names] + ["sglang.srt.layers.moe.token_dispatcher.standard"]
    for place in places:
        parts = place.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    functions = {plugin.KEY: lambda dispatch_output, quant_info, runner_config: "theirs"}
    sys.modules[places[1]].FusedOpPool = types.SimpleNamespace(_fused_funcs=functions)
    sys.modules[places[2]].StandardCombineInput = CombineInput
    monkeypatch.setattr(importlib.metadata, "version", lambda name: plugin.VERSION)
    monkeypatch.setattr(plugin, "settings", lambda: Settings(sglang=True))
    return functions


def test_registered_once_and_only_when_asked_for(pool, monkeypatch, caplog):
    theirs = pool[plugin.KEY]
    monkeypatch.setattr(plugin, "settings", Settings)
    plugin.register()
    assert pool[plugin.KEY] is theirs
    monkeypatch.setattr(plugin, "settings", lambda: Settings(sglang=True))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.24")
    plugin.register()
    assert pool[plugin.KEY] is theirs and "got SGLang 0.5.24; wanted 0.5.23" in caplog.text
    monkeypatch.setattr(importlib.metadata, "version", lambda name: plugin.VERSION)
    plugin.register()
    ours = pool[plugin.KEY]
    assert ours is not theirs and ours.runs_fusedmoe
    plugin.register()
    assert pool[plugin.KEY] is ours
    pool.clear()
    plugin.register()
    assert not pool and "wanted a fused function" in caplog.text


def test_the_entry_point_is_declared():
    (found,) = (e for e in importlib.metadata.entry_points(group="sglang.srt.plugins") if e.name == "fusedmoe")
    assert found.load() is plugin.register


def call(pool, quant_info, config):
    plugin.register()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=generator).bfloat16()
    weights = torch.rand(T, K, generator=generator)
    ids = torch.randint(-1, E, (T, K), generator=generator, dtype=torch.int32)
    before = x.clone()
    result = pool[plugin.KEY](DispatchOutput(x, None, TopK(weights, ids)), quant_info, config)
    assert torch.equal(x, before)
    return result, (x, weights, ids)


def plain(gated=True):
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(E, I * (2 if gated else 1), H, generator=generator) / H**0.5
    return w13.bfloat16(), (torch.randn(E, H, I, generator=generator) / I**0.5).bfloat16()


#: scheme and choices -> fields of SGLang's quant_info.
FORMS = {
    ("fp8_block", ()): {"use_fp8_w8a8": True, "block_shape": [128, 128]},
    ("fp8_channel", ()): {"use_fp8_w8a8": True, "per_channel_quant": True},
    ("fp8_tensor", (("inputs", "tensor"),)): {"use_fp8_w8a8": True},
    ("fp8_tensor", (("inputs", "static"),)): {"use_fp8_w8a8": True},
    ("int8_w8a8", ()): {"use_int8_w8a8": True, "per_channel_quant": True},
    ("int8_w8a16", (("group", 64),)): {"use_int8_w8a16": True, "block_shape": [0, 64]},
    ("int4_w4a16", (("group", 64), ("zero", True))): {"use_int4_w4a16": True, "block_shape": [0, 64]},
}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_schemes(pool, form):
    scheme, choices = form[0], dict(form[1])
    w13, w2 = plain()
    static = {"input_scale": torch.tensor(0.02)} if choices.get("inputs") == "static" else {}
    a = fusedmoe.quantize(w13, scheme, parts=2 if scheme == "fp8_block" else 1, **choices, **static)
    b = fusedmoe.quantize(w2, scheme, **choices, **static)
    scales = [w.scale.flatten() if scheme == "fp8_tensor" else w.scale for w in (a, b)]
    quant_info = info(
        a.data, b.data, w13_scale=scales[0], w2_scale=scales[1],
        w13_zp=a.zero, w2_zp=b.zero, a13_scale=a.input_scale, a2_scale=b.input_scale, **FORMS[form],
    )  # fmt: skip
    config = runner()
    result, (x, weights, ids) = call(pool, quant_info, config)
    want = fusedmoe.reference.fused_experts(x, a, b, weights, ids)
    assert relative_error(result.hidden_states, want) < 2.0**-6
    made = a.data._fusedmoe_made
    call(pool, quant_info, config)
    assert a.data._fusedmoe_made is made
    call(pool, quant_info, runner(activation="gelu"))
    assert a.data._fusedmoe_made is not made


#: fields of the runner's config -> our activation and layout.
ACTIVATIONS = [
    ({}, ("silu", {}), "concatenated"),
    ({"swiglu_limit": 0.5}, ("silu", {"limit": 0.5}), "concatenated"),
    ({"swiglu_limit": 0.0}, ("silu", {}), "concatenated"),
    ({"gemm1_clamp_limit": 0.5}, ("swiglustep", {"limit": 0.5}), "concatenated"),
    ({"gemm1_alpha": 1.5, "gemm1_clamp_limit": 0.5}, ("swigluoai", {"alpha": 1.5, "limit": 0.5}), "interleaved"),
    ({"gemm1_alpha": 1.5, "gemm1_clamp_limit": 0.5, "gate_up_interleaved": False},
     ("swigluoai", {"alpha": 1.5, "limit": 0.5}), "concatenated"),
    ({"activation": "gelu"}, ("gelu", {}), "concatenated"),
    ({"activation": "gelu_tanh"}, ("gelu_tanh", {}), "concatenated"),
    ({"activation": "situ", "gemm1_clamp_limit": 2.0}, ("situ", {"beta": 4.0, "linear_beta": 2.0}), "concatenated"),
    ({"activation": "relu2", "is_gated": False}, ("relu2_no_mul", {}), "concatenated"),
    ({"is_gated": False}, ("silu_no_mul", {}), "concatenated"),
]  # fmt: skip


@pytest.mark.parametrize("row", range(len(ACTIVATIONS)))
def test_activations_biases_and_factors(pool, row):
    fields, (name, parameters), layout = ACTIVATIONS[row]
    w13, w2 = plain(fields.get("is_gated", True))
    biases = torch.randn(E, w13.shape[1]), torch.randn(E, H)
    result, (x, weights, ids) = call(
        pool, info(w13, w2, b13=biases[0], b2=biases[1]), runner(routed_scaling_factor=2.5, **fields)
    )
    want = fusedmoe.reference.fused_experts(
        x, w13, w2, weights, ids, activation=fusedmoe.Activation(name, **parameters), gate_up_layout=layout,
        w13_bias=biases[0], w2_bias=biases[1],
    )  # fmt: skip
    assert relative_error(result.hidden_states, 2.5 * want) < 2.0**-6


def test_the_rest_is_sglangs_own(pool, caplog):
    plugin._say.cache_clear()
    w13, w2 = plain()
    with caplog.at_level(logging.INFO, "fusedmoe.sglang"):
        for quant_info, config, reason in (
            (info(w13, w2, use_mxfp8=True), runner(), "quantisation is unknown"),
            (info(w13, w2, fuse_swiglu_interleaved=True), runner(), "rows of w13 were permuted"),
            (info(w13, w2), runner(no_combine=True), "rows are asked for"),
            (info(w13, w2), runner(activation="silu_rounded"), "activation silu_rounded"),
            (info(w13, w2), runner(activation="gelu", gemm1_alpha=1.0), "activation gelu"),
            (info(w13, w2), runner(activation="tanh", is_gated=False), "activation tanh"),
        ):
            assert call(pool, quant_info, config)[0] == "theirs"
            assert reason in caplog.text


def groups(bits, size):
    """Codes of this many bits with scales of groups of columns."""
    w13, w2 = (torch.zeros(E, n, k * bits // 8, dtype=torch.uint8) for n, k in ((2 * I, H), (H, I)))
    scales = [torch.ones(E, w.shape[1], w.shape[2] * 8 // bits // size) for w in (w13, w2)]
    form = {f"use_int{bits}_w{bits}a16": True, "block_shape": [0, size]}
    return info(w13, w2, w13_scale=scales[0], w2_scale=scales[1], **form)


def fp8(w13_scale, w2_scale, **fields):
    w13, w2 = (w.to(torch.float8_e4m3fn) for w in plain())
    return info(w13, w2, w13_scale=w13_scale, w2_scale=w2_scale, use_fp8_w8a8=True, **fields)


#: What a layer may have that does not run here: quant_info, fields of the runner's config, a part of the reason.
UNFIT = {
    "int4": (lambda: groups(4, 16), {}, "scale of scheme 'int4_w4a16'"),
    "int8": (lambda: groups(8, 16), {}, "scale of scheme 'int8_w8a16'"),
    "blocks": (
        lambda: fp8(torch.ones(E, 2, 2), torch.ones(E, 3, 1), block_shape=[128, 128]), {}, "scale of scheme 'fp8_block'"
    ),
    "limit": (lambda: info(*plain()), {"gemm1_clamp_limit": 0.0}, "limit of activation 'swiglustep'"),
    "biases": (lambda: info(*plain(), b13=torch.ones(E, I)), {}, "w13_bias"),
    "padded": (lambda: info(*(torch.nn.functional.pad(w, (0, 128)) for w in plain())), {}, "inner size 384"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_here_is_sglangs_own(pool, caplog, name):
    plugin._say.cache_clear()
    make, fields, reason = UNFIT[name]
    quant_info, config = make(), runner(**fields)
    with caplog.at_level(logging.INFO, "fusedmoe.sglang"):
        for _ in range(2):
            assert call(pool, quant_info, config)[0] == "theirs"
    assert caplog.text.count("a layer runs in SGLang's own") == 1 and reason in caplog.text


def test_scales_of_the_two_matrices_may_be_of_two_forms(pool):
    w13, w2 = plain()
    a, b = fusedmoe.quantize(w13, "fp8_channel"), fusedmoe.quantize(w2, "fp8_tensor")
    quant_info = info(
        a.data, b.data, w13_scale=a.scale, w2_scale=b.scale.flatten(), use_fp8_w8a8=True, per_channel_quant=True
    )
    result, (x, weights, ids) = call(pool, quant_info, runner())
    want = fusedmoe.reference.fused_experts(x, a, b, weights, ids)
    assert relative_error(result.hidden_states, want) < 2.0**-6


# --- SGLang itself, whose modules want a GPU: as text -----------------------------------------------------------------

SOURCE = importlib.util.find_spec("sglang")
installed = pytest.mark.skipif(SOURCE is None, reason="needs SGLang")


@pytest.fixture(scope="module")
def source():
    """Classes and functions of a module of SGLang by name."""

    def read(module):
        path = Path(SOURCE.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}

    return read


def fields(node):
    """Annotated fields of a class, and their defaults."""
    found = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return {item.target.id: None if item.value is None else ast.literal_eval(item.value) for item in found}


@installed
def test_what_sglang_hands_over_has_the_fields_of_the_stand_ins(source):
    theirs = fields(source(f"{plugin._RUNNER}.triton")["TritonMoeQuantInfo"])
    assert theirs == vars(info(None, None))
    theirs = fields(source(f"{plugin._RUNNER}.base")["MoeRunnerConfig"])
    assert vars(runner()).items() <= theirs.items()
    standard = source("sglang.srt.layers.moe.token_dispatcher.standard")
    assert list(fields(standard["StandardDispatchOutput"])) == list(DispatchOutput._fields)
    assert list(fields(standard["StandardCombineInput"])) == list(CombineInput._fields)
    topk = source("sglang.srt.layers.moe.topk")
    for name in ("StandardTopKOutput", "StandardTopKOutputPacked"):
        assert set(fields(topk[name])) <= set(TopK._fields)


@installed
def test_the_function_that_is_wrapped_is_where_it_was(source):
    """Registered in the pool's dictionary under this key, with these arguments."""
    pool = source(f"{plugin._RUNNER}.base")["FusedOpPool"]
    assert "_fused_funcs" in fields(pool)
    registered = [
        node
        for node in source(f"{plugin._RUNNER}.triton").values()
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and decorator.func.id == "register_fused_func"
        and tuple(map(ast.literal_eval, decorator.args)) == plugin.KEY
    ]  # fmt: skip
    (function,) = registered
    ours = inspect.signature(plugin.wrapped(lambda dispatch_output, quant_info, runner_config: None))
    assert [argument.arg for argument in function.args.args] == list(ours.parameters)


@installed
def test_plugins_are_loaded_from_this_group(source):
    path = Path(SOURCE.submodule_search_locations[0], "srt", "plugins", "__init__.py")
    assert 'GENERAL_PLUGINS_GROUP = "sglang.srt.plugins"' in path.read_text(encoding="utf-8")
