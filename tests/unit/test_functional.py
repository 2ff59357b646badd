"""The public function on the CPU: every error a caller can make, compilation, workspace, out."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing

import fusedmoe
from fusedmoe import reference
from fusedmoe.errors import (
    DeviceError,
    DTypeError,
    GradientError,
    LayoutError,
    OptionError,
    ShapeError,
    UnsupportedError,
    WorkspaceError,
)
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.schemes import format_of, formats_of
from fusedmoe.testing.cases import OPTIONS, Case, pairwise, random_matrix
from fusedmoe.testing.verify import relative_error
from fusedmoe.torch_ops import flatten, format_of_words, format_to_words

T, K, E, H, I = 6, 2, 4, 32, 24


def arguments(**replace):
    a = {
        "hidden_states": torch.randn(T, H),
        "w13": torch.randn(E, 2 * I, H),
        "w2": torch.randn(E, H, I),
        "topk_weights": torch.rand(T, K),
        "topk_ids": torch.randint(E, (T, K)),
    }
    return {**a, **replace}


#: what is wrong -> (arguments to replace, error, words that its message must contain)
MISTAKES = {
    "hidden states of three dimensions": (
        {"hidden_states": torch.randn(2, 3, H)},
        ShapeError,
        ["hidden_states", "3 dimensions", "[T, H]", "flatten"],
    ),
    "hidden states no tensor": ({"hidden_states": [[1.0]]}, DTypeError, ["hidden_states", "list", "torch.Tensor"]),
    "hidden states sparse": (
        {"hidden_states": torch.eye(T, H).to_sparse()},
        LayoutError,
        ["hidden_states", "sparse_coo", "to_dense"],
    ),
    "hidden states nested": (
        {"hidden_states": torch.nested.nested_tensor([torch.randn(2, H), torch.randn(3, H)], layout=torch.jagged)},
        LayoutError,
        ["hidden_states", "nested", "to_dense"],
    ),
    "hidden states that negate": (
        {"hidden_states": torch.randn(T, H, dtype=torch.complex64).conj().imag},
        LayoutError,
        ["hidden_states", "negates", "resolve_neg"],
    ),
    "hidden states of integers": (
        {"hidden_states": torch.ones(T, H, dtype=torch.int32)},
        DTypeError,
        ["hidden_states", "int32", "float32 or float16 or bfloat16"],
    ),
    "weights of another type": (
        {"w13": torch.randn(E, 2 * I, H).bfloat16()},
        DTypeError,
        ["w13", "bfloat16", "float32", "autocast"],
    ),
    "quantised weights without scales": (
        {"w2": torch.ones(E, H, I, dtype=torch.int8)},
        DTypeError,
        ["w2", "int8", "scales"],
    ),
    "w13 stored KN": ({"w13": torch.randn(E, H, 2 * I)}, ShapeError, ["w13", f"{H}", "weight_layout='KN'"]),
    "w13 of two dimensions": ({"w13": torch.randn(2 * I, H)}, ShapeError, ["w13", "2 dimensions", "[E, 2I, H]"]),
    "odd rows of a gated w13": ({"w13": torch.randn(E, 2 * I + 1, H)}, ShapeError, ["even", "gated", "_no_mul"]),
    "no experts": ({"w13": torch.randn(0, 2 * I, H)}, ShapeError, ["0 experts", "1 to 4096"]),
    "w2 of other experts": (
        {"w2": torch.randn(E + 1, H, I)},
        ShapeError,
        ["w2", f"({E + 1}, {H}, {I})", "same experts"],
    ),
    "w2 transposed": ({"w2": torch.randn(E, I, H)}, ShapeError, ["w2", f"({E}, {I}, {H})", "weight_layout='KN'"]),
    "bias of the wrong width": ({"w13_bias": torch.randn(E, I)}, ShapeError, ["w13_bias", f"({E}, {2 * I})"]),
    "bias of the wrong type": ({"w2_bias": torch.ones(E, H).int()}, DTypeError, ["w2_bias", "int32"]),
    "ids of floats": ({"topk_ids": torch.rand(T, K)}, DTypeError, ["topk_ids", "float32", "int32 or int64"]),
    "ids of other tokens": ({"topk_ids": torch.zeros(T + 1, K).long()}, ShapeError, ["topk_ids", f"{T + 1} rows"]),
    "ids of one dimension": ({"topk_ids": torch.zeros(T).long()}, ShapeError, ["topk_ids", "[T, top_k]"]),
    "no choices": (
        {"topk_ids": torch.zeros(T, 0).long(), "topk_weights": torch.rand(T, 0)},
        ShapeError,
        ["top_k = 0", "1 to 64"],
    ),
    "65 choices": (
        {"topk_ids": torch.zeros(T, 65).long(), "topk_weights": torch.rand(T, 65)},
        ShapeError,
        ["top_k = 65", "1 to 64"],
    ),
    "router weights of another shape": (
        {"topk_weights": torch.rand(T, K + 1)},
        ShapeError,
        ["topk_weights", "shape of topk_ids"],
    ),
    "more slots than kernels count": (
        {
            name: torch.zeros(2**26 // K + 1, width, dtype=dtype, device="meta")
            for name, width, dtype in (
                ("hidden_states", H, torch.float32),
                ("topk_ids", K, torch.int64),
                ("topk_weights", K, torch.float32),
            )
        }
        | {"w13": torch.empty(E, 2 * I, H, device="meta"), "w2": torch.empty(E, H, I, device="meta")},
        ShapeError,
        ["topk_ids", f"{2**26 // K + 1} tokens", f"at most {2**26}", "Split"],
    ),
    "a flag that is none": ({"emulate": torch.ones(2)}, OptionError, ["emulate", "Tensor", "True or False"]),
    "a precision that is no text": ({"fp32_precision": ["ieee"]}, OptionError, ["fp32_precision", "['ieee']"]),
    "a backend that is no text": ({"backend": ["torch"]}, OptionError, ["backend", "['torch']"]),
    "a number of experts that is none": ({"global_num_experts": "4"}, OptionError, ["global_num_experts", "4"]),
    "unknown activation": ({"activation": "swish"}, OptionError, ["'swish'", "silu", "gelu_tanh"]),
    "activation no name": ({"activation": 3}, OptionError, ["int", "fusedmoe.Activation"]),
    "unknown gate/up layout": (
        {"gate_up_layout": "split"},
        OptionError,
        ["gate_up_layout", "'split'", "'interleaved'"],
    ),
    "unknown weight layout": ({"weight_layout": "TN"}, OptionError, ["weight_layout", "'NK' or 'KN'"]),
    "unknown precision": ({"fp32_precision": "bf16x3"}, OptionError, ["fp32_precision", "'ieee' or 'tf32'"]),
    "unknown backend": ({"backend": "cuda"}, OptionError, ["backend", "'cuda'", "triton, torch"]),
    "map of two dimensions": ({"expert_map": torch.zeros(2, 2).int()}, ShapeError, ["expert_map", "[E_global]"]),
    "map of floats": ({"expert_map": torch.zeros(4)}, DTypeError, ["expert_map", "int32 or int64"]),
    "map with steps": ({"expert_map": torch.zeros(16).int()[::2]}, LayoutError, ["expert_map", "contiguous"]),
    "empty map": ({"expert_map": torch.zeros(0).int()}, ShapeError, ["expert_map", "no entries"]),
    "map of another length": (
        {"expert_map": torch.zeros(8).int(), "global_num_experts": 9},
        OptionError,
        ["global_num_experts", "8, the length"],
    ),
    "global experts without a map": ({"global_num_experts": 8}, OptionError, ["global_num_experts", "expert_map"]),
    "out of another shape": ({"out": torch.empty(T, H + 1)}, ShapeError, ["out", f"({T}, {H})"]),
    "out of another type": ({"out": torch.empty(T, H).half()}, DTypeError, ["out", "float16"]),
    "out expanded": ({"out": torch.empty(1, H).expand(T, H)}, LayoutError, ["out", "memory of its own"]),
    "out whose rows overlap": (
        {"out": torch.empty(T + H).as_strided((T, H), (1, 1))},
        LayoutError,
        ["out", "memory of its own"],
    ),
    "weights on another device": (
        {"w13": torch.empty(E, 2 * I, H, device="meta")},
        DeviceError,
        ["w13", "meta", "cpu", ".to("],
    ),
    "ids on another device": ({"topk_ids": torch.zeros(T, K, device="meta").long()}, DeviceError, ["topk_ids", "meta"]),
    "workspace of another type": (
        {"workspace": torch.empty(10)},
        DTypeError,
        ["workspace", "uint8", "workspace_bytes"],
    ),
    "a tuple of workspaces": (
        {"workspace": (torch.empty(512, dtype=torch.uint8),) * 2},
        DTypeError,
        ["workspace", "tuple", "uint8", "workspace_bytes"],
    ),
    "workspace of two dimensions": (
        {"workspace": torch.empty(2, 8, dtype=torch.uint8)},
        WorkspaceError,
        ["workspace", "(2, 8)"],
    ),
    "workspace on another device": (
        {"workspace": torch.empty(8, dtype=torch.uint8, device="meta")},
        DeviceError,
        ["workspace", "meta"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained(mistake):
    replace, error, words = MISTAKES[mistake]
    with pytest.raises(error) as raised:
        fusedmoe.fused_experts(**arguments(**replace))
    assert isinstance(raised.value, fusedmoe.FusedMoEError)
    for word in [*words, "got", "wanted"]:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("gelu", {"limit": 1.0}, ["'gelu'", "no parameter 'limit'"]),
        ("situ", {}, ["'situ'", "needs 'beta'"]),
        ("silu", {"limit": -1.0}, ["limit", "-1.0", "above 0"]),
        ("silu", {"limit": "7"}, ["limit", "'7'", "a number"]),
        ("swigluoai", {"alpha": float("nan")}, ["alpha", "nan"]),
        ("situ", {"beta": 0.0}, ["beta", "above 0"]),
    ],
)
def test_activation_parameters_are_checked(name, parameters, words):
    with pytest.raises(OptionError) as raised:
        fusedmoe.Activation(name, **parameters)
    for word in words:
        assert word in str(raised.value)


def test_out_may_not_be_the_input():
    x = torch.randn(T, H)
    with pytest.raises(LayoutError, match="shared with hidden_states"):
        fusedmoe.fused_experts(**arguments(hidden_states=x, out=x))


def test_the_workspace_may_hold_no_argument():
    memory = torch.zeros(4096, dtype=torch.uint8)
    weights = memory[: 4 * T * K].view(torch.float32).view(T, K)
    with pytest.raises(LayoutError, match="workspace: got memory that is shared with topk_weights"):
        fusedmoe.fused_experts(**arguments(topk_weights=weights, workspace=memory))
    a = arguments(topk_weights=weights, workspace=memory[64:])
    assert fusedmoe.fused_experts(**a).shape == (T, H)


def test_gradients_of_scales_are_refused_too():
    w13 = fusedmoe.quantize(torch.randn(E, 2 * I, H), "fp8_channel", parts=2)
    w13.scale.requires_grad_()
    with pytest.raises(GradientError, match="w13 requires grad"):
        fusedmoe.fused_experts(**arguments(w13=w13))


def test_gradients_are_refused_not_dropped():
    for name in ("hidden_states", "w13", "w2", "topk_weights"):
        a = arguments()
        a[name].requires_grad_()
        with pytest.raises(GradientError, match=f"{name} requires grad"):
            fusedmoe.fused_experts(**a)
        with torch.no_grad():
            assert not fusedmoe.fused_experts(**a).requires_grad


def test_tensors_that_are_spread_over_ranks_are_refused():
    """A DTensor's address is 0."""
    from torch.distributed.tensor import DTensor

    class Spread(torch.Tensor):
        to_local = DTensor.to_local

    for name in ("hidden_states", "w13", "topk_ids"):
        a = arguments()
        a[name] = a[name].as_subclass(Spread)
        with pytest.raises(LayoutError, match=f"{name}: got a DTensor, .*Pass {name}.to_local"):
            fusedmoe.fused_experts(**a)


def test_a_backend_that_cannot_says_why():
    with pytest.raises(UnsupportedError, match="Triton has no CPU target.*backend='torch'"):
        fusedmoe.fused_experts(**arguments(), backend="triton")
    assert list(SUPPORTS) == ["gluon_sm90", "triton", "torch"]


def test_workspace_too_small(monkeypatch):
    from fusedmoe.backends import torch as backend

    monkeypatch.setattr(backend, "workspace_layout", lambda *_: {"scratch": ((100,), torch.float32)})
    assert fusedmoe.workspace_bytes(**arguments()) == 512
    with pytest.raises(WorkspaceError, match="511 bytes.*at least 512 bytes"):
        fusedmoe.fused_experts(**arguments(), workspace=torch.empty(511, dtype=torch.uint8))


def test_no_tokens():
    a = arguments(hidden_states=torch.randn(0, H), topk_ids=torch.zeros(0, K).long(), topk_weights=torch.rand(0, K))
    assert fusedmoe.fused_experts(**a).shape == (0, H)
    out = torch.empty(0, H)
    assert fusedmoe.fused_experts(**a, out=out) is out


def test_meta_tensors_give_the_shape():
    out = fusedmoe.fused_experts(**{name: tensor.to("meta") for name, tensor in arguments().items()})
    assert out.device.type == "meta"
    assert out.shape == (T, H)


GRID = pairwise(OPTIONS)


@pytest.mark.parametrize("row", range(len(GRID)))
def test_default_backend_over_options(row):
    case = Case(tokens=40, top_k=3, experts=7, hidden=33, intermediate=48, **GRID[row])
    args, options = case.draw(seed=row)
    out = torch.full((40, 33), float("nan"), dtype=args[0].dtype)
    assert fusedmoe.fused_experts(*args, out=out, **options) is out
    # The torch backend rounds the products to the type before bias and activation: one rounding more.
    bound = {"float32": 1e-6, "float16": 2.0**-9, "bfloat16": 2.0**-6}[case.dtype]
    assert relative_error(out, reference.fused_experts(*args, **options)) < bound, case


@pytest.mark.parametrize("form", ["eager", "aot_eager"])
def test_compiled_whole_with_dynamic_tokens(form):
    options = {"activation": fusedmoe.Activation("swigluoai", limit=2.0), "gate_up_layout": "interleaved"}

    def layer(x, w13, w2, weights, ids):
        return fusedmoe.fused_experts(x * 2, w13, w2, weights, ids, **options) + 1

    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend(form)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=frames)
    with torch.no_grad():
        for tokens in (5, 7, 17, 40):  # no other size is equal, or the compiler would tie the two together
            a = list(arguments().values())
            a[0], a[3], a[4] = torch.randn(tokens, H), torch.rand(tokens, K), torch.randint(E, (tokens, K))
            assert torch.equal(compiled(*a), layer(*a))
    assert frames.frame_count <= 2


def test_a_thousand_numbers_of_tokens_compile_at_most_thrice():
    """The first; any, when it has changed; and one token, which torch always compiles for itself."""
    layer = fusedmoe.FusedExperts(E, 16, 8)
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=frames)
    g = torch.Generator().manual_seed(0)
    sizes = [1, 2, 3, 16, 8, E, *torch.randint(1, 5000, (994,), generator=g).tolist()]
    x, weights, ids = torch.randn(5000, 16), torch.rand(5000, K), torch.randint(E, (5000, K))
    with torch.no_grad():
        for tokens in sizes:
            compiled(x[:tokens], weights[:tokens], ids[:tokens])
        assert torch.equal(compiled(x[:777], weights[:777], ids[:777]), layer(x[:777], weights[:777], ids[:777]))
    assert frames.frame_count <= 3


@pytest.mark.parametrize("alone", [False, True])
def test_a_gradient_is_refused_when_compiled_too(alone):
    """It would be left out of the sum, with a warning of torch's at most."""
    a = arguments()

    def layer(x):
        if alone:
            return x.sum() + fusedmoe.expert_linear(x, a["w13"], a["topk_ids"]).sum()
        return x.sum() + fusedmoe.fused_experts(**(a | {"hidden_states": x})).sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    x = a["hidden_states"].clone().requires_grad_()
    with pytest.raises(Exception, match="gradient of a compiled layer: got a backward pass; wanted inference"):
        compiled(x).backward()
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_a_mistake_is_explained_when_compiled_too():
    compiled = torch.compile(
        lambda a: fusedmoe.fused_experts(**a, global_num_experts=E + 1), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad(), pytest.raises(OptionError, match="global_num_experts"):
        compiled(arguments())


def test_exported_with_dynamic_tokens():
    layer = fusedmoe.FusedExperts(E, H, I)
    inputs = (torch.randn(5, H), torch.rand(5, K), torch.randint(E, (5, K)))
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    with torch.no_grad():
        program = torch.export.export(
            layer, inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}), strict=True
        )
        other = (torch.randn(9, H), torch.rand(9, K), torch.randint(E, (9, K)))
        assert torch.equal(program.module()(*other), layer(*other))


def quantised(scheme, **choices):
    """Arguments of a layer of H = 128 and I = 64 in a scheme."""
    w13, w2 = torch.randn(E, 128, 128) / 11, torch.randn(E, 128, 64) / 8
    parts = {"w13": fusedmoe.quantize(w13, scheme, parts=2, **choices), "w2": fusedmoe.quantize(w2, scheme, **choices)}
    return arguments(hidden_states=torch.randn(T, 128), **parts)


@pytest.mark.parametrize("scheme", [None, "int8_w8a8", "int4_w4a16", "mxfp4"])
def test_operator_is_well_formed(scheme):
    choices = {"group": 32} if scheme == "int4_w4a16" else {}
    x, w13, w2, weights, ids = (quantised(scheme, **choices) if scheme else arguments()).values()
    args = (
        x, *flatten(w13), *flatten(w2), weights, ids, None, None, None, None, None, None, False,
        "silu", None, None, None, None, "concatenated", "NK", False, "ieee", [], False, None, "auto", None, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedmoe.fused_experts.default, args)


def test_formats_travel_as_words():
    for form in itertools.chain.from_iterable(map(formats_of, fusedmoe.SCHEMES)):
        assert format_of_words(format_to_words(form)) == form


def test_a_quantised_layer_compiles():
    a = quantised("fp8_channel")
    w13, w2 = a.pop("w13"), a.pop("w2")

    def layer(hidden_states, topk_weights, topk_ids):
        return fusedmoe.fused_experts(hidden_states, w13, w2, topk_weights, topk_ids) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**a), layer(**a))


#: what is wrong -> (scheme, arguments and options to replace, error, words of its message)
QUANTISED_MISTAKES = {
    "codes without their scale": (
        None,
        {"w13": torch.zeros(E, 2 * I, H, dtype=torch.float8_e4m3fn)},
        DTypeError,
        ["w13", "float8_e4m3fn", "ExpertMatrix"],
    ),
    "KN": ("fp8_channel", {"weight_layout": "KN"}, OptionError, ["weight_layout", "'KN'", "transposed views"]),
    "a scale of rows that are no codes": (
        "fp8_w8a16",
        {"hidden_states_scale": torch.ones(T)},
        OptionError,
        ["hidden_states_scale", "takes rows as they are"],
    ),
    "a scale of rows for plain weights": (
        None,
        {"hidden_states_scale": torch.ones(T)},
        OptionError,
        ["hidden_states_scale", "plain w13"],
    ),
    "a scale and rows of floats": (
        "fp8_channel",
        {"hidden_states_scale": torch.ones(T)},
        DTypeError,
        ["hidden_states", "float32", "float8_e4m3fn"],
    ),
    "codes without a scale": (
        "fp8_channel",
        {"hidden_states": torch.zeros(T, 128, dtype=torch.float8_e4m3fn)},
        DTypeError,
        ["hidden_states", "float8_e4m3fn", "float32"],
    ),
    "scales of too few rows": (
        "fp8_block",
        {"hidden_states": torch.zeros(T, 128, dtype=torch.float8_e4m3fn), "hidden_states_scale": torch.ones(T - 1, 1)},
        ShapeError,
        ["hidden_states_scale", f"({T - 1}, 1)", f"({T}, 1)"],
    ),
    "scales of rows of another type": (
        "fp8_channel",
        {"hidden_states": torch.zeros(T, 128, dtype=torch.float8_e4m3fn), "hidden_states_scale": torch.ones(T).half()},
        DTypeError,
        ["hidden_states_scale", "float16", "float32"],
    ),
    "a type that no layer has": (
        "fp8_channel",
        {
            "hidden_states": torch.zeros(T, 128, dtype=torch.float8_e4m3fn),
            "hidden_states_scale": torch.ones(T),
            "dtype": torch.int32,
        },
        DTypeError,
        ["dtype", "int32", "bfloat16"],
    ),
    "a type beside hidden states that have one": (
        "fp8_channel",
        {"dtype": torch.float16},
        OptionError,
        ["dtype", "float16", "float32", "hidden_states_scale"],
    ),
    "another inner size": ("fp8_channel", {"hidden_states": torch.randn(T, 64)}, ShapeError, ["w13", "128", "64"]),
    "two parts and interleaved rows": (
        "fp8_tensor",
        {"gate_up_layout": "interleaved"},
        OptionError,
        ["parts of w13", "concatenated"],
    ),
    "two tensor scales and interleaved rows": (
        "nvfp4",
        {
            "gate_up_layout": "interleaved",
            "w13": random_matrix(format_of("nvfp4"), (E, 128, 128), torch.Generator(), parts=2),
        },
        OptionError,
        ["parts of w13", "concatenated"],
    ),
    "on another device": (
        "fp8_channel",
        {"hidden_states": torch.randn(T, 128, device="meta")},
        DeviceError,
        ["w13", "cpu", "meta"],
    ),
}


@pytest.mark.parametrize("mistake", QUANTISED_MISTAKES)
def test_quantised_mistakes(mistake):
    scheme, replace, error, words = QUANTISED_MISTAKES[mistake]
    a = {**(quantised(scheme) if scheme else arguments()), **replace}
    with pytest.raises(error) as caught:
        fusedmoe.fused_experts(**a)
    assert [word for word in words if word not in str(caught.value)] == []
