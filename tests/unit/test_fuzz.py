"""Every public entry under random arguments: a right result or an error of the library that explains itself.

tests/fuzzing.py says how to repeat a run, and how to make it longer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import fusedmoe
from fusedmoe import checkpoint
from fusedmoe.bench import shape_of
from fusedmoe.checkpoint.convert import quantize_checkpoint
from fusedmoe.errors import CheckpointError
from fusedmoe.spec.format import Format, Inputs

hypothesis = pytest.importorskip("hypothesis")
from fuzzing import (  # noqa: E402
    ANYTHING,
    DTYPES,
    JUNK,
    NAMES,
    NUMBERS,
    OPTIONAL,
    POSITIONS,
    SCHEMES,
    E,
    H,
    I,
    K,
    T,
    explained,
    fuzz,
    layer,
)  # fmt: skip

safetensors = pytest.importorskip("safetensors.torch")
load_file, save_file = safetensors.load_file, safetensors.save_file
st = hypothesis.strategies

# --- the layer --------------------------------------------------------------------------------------------------------


@fuzz(500)
@hypothesis.given(st.data())
def test_fused_experts(data):
    scheme = data.draw(st.sampled_from([None, None, "fp8_block", "int8_w8a8", "int4_w4a16", "nvfp4"]))
    arguments = layer(scheme)
    for name in data.draw(st.sets(st.sampled_from((*POSITIONS, *OPTIONAL)), max_size=2)):
        arguments[name] = data.draw(ANYTHING)
    for name in data.draw(st.sets(st.sampled_from(tuple(NAMES)), max_size=2)):
        arguments[name] = data.draw(NAMES[name])
    with explained():
        out = fusedmoe.fused_experts(**arguments)
        assert out.shape == arguments["hidden_states"].shape
    arguments.pop("out", None), arguments.pop("workspace", None)
    with explained():
        assert fusedmoe.workspace_bytes(**arguments) >= 0


IDS = st.one_of(st.sampled_from([-1, -7, E, E + 1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)]), st.integers(0, E - 1))


@fuzz(100)
@hypothesis.given(
    st.lists(IDS, min_size=T * K, max_size=T * K),
    st.one_of(st.none(), st.lists(IDS, min_size=1, max_size=6)),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_any_id_and_any_map_entry_is_harmless(ids, entries, dtype):
    arguments = layer()
    fits = torch.iinfo(dtype)
    ids, entries = ([max(fits.min, min(fits.max, i)) for i in some or ()] for some in (ids, entries))
    arguments["topk_ids"] = torch.tensor(ids, dtype=dtype).view(T, K)
    if entries:
        arguments["expert_map"] = torch.tensor(entries, dtype=dtype)
    out = fusedmoe.fused_experts(**arguments)
    want = fusedmoe.reference.fused_experts(**arguments)
    assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-4)


@fuzz(150)
@hypothesis.given(st.data())
def test_module(data):
    arguments = {"num_experts": E, "hidden_size": H, "intermediate_size": I}
    options = {
        **dict.fromkeys(arguments, NUMBERS),
        **{k: NAMES[k] for k in ("activation", "gate_up_layout", "weight_layout", "emulate", "backend", "dtype")},
        "bias": st.booleans(),
        "expert_map": ANYTHING,
        "device": st.sampled_from(["cpu", "meta", "nonsense", 7, [], "cuda:99"]),
    }
    for name in data.draw(st.sets(st.sampled_from(tuple(options)), max_size=2)):
        arguments[name] = data.draw(options[name])
    with explained():
        module = fusedmoe.FusedExperts(**arguments)
        inputs = layer()
        call = {name: inputs[name] for name in ("hidden_states", "topk_weights", "topk_ids")}
        for name in data.draw(st.sets(st.sampled_from((*call, "hidden_states_scale", "out")), max_size=2)):
            call[name] = data.draw(ANYTHING)
        module(**call)


@fuzz(150)
@hypothesis.given(st.data())
def test_module_of_tensors(data):
    inputs = layer(data.draw(st.sampled_from([None, "fp8_channel", "mxfp4"])))
    arguments = {name: inputs[name] for name in ("w13", "w2")}
    for name in data.draw(st.sets(st.sampled_from((*arguments, "w13_bias", "w2_bias", "expert_map")), max_size=2)):
        arguments[name] = data.draw(ANYTHING)
    with explained():
        module = fusedmoe.FusedExperts.of(**arguments)
        state = module.state_dict()
        for name in data.draw(st.sets(st.sampled_from(sorted(state)), max_size=1)):
            if name == "formats._extra_state":  # the rest is torch's own
                module.load_state_dict({**state, name: data.draw(ANYTHING)})


@fuzz(300)
@hypothesis.given(st.data())
def test_routers(data):
    logits = data.draw(st.one_of(st.just(torch.randn(T, E)), ANYTHING))
    top_k = data.draw(st.one_of(st.integers(1, E), JUNK))
    router = data.draw(st.sampled_from(["softmax_topk", "topk_softmax", "sigmoid_topk"]))
    options = {"renormalize": data.draw(st.booleans())} if router != "topk_softmax" else {}
    if router == "sigmoid_topk":
        for name, values in {
            "correction_bias": ANYTHING,
            "n_group": NUMBERS,
            "topk_group": NUMBERS,
            "routed_scaling_factor": NUMBERS,
        }.items():
            if data.draw(st.booleans()):
                options[name] = data.draw(values)
    with explained():
        topk = getattr(fusedmoe, router)(logits, top_k, **options)
        assert topk.ids.shape == (logits.shape[0], top_k) == topk.weights.shape


# --- quantised matrices -----------------------------------------------------------------------------------------------

CHOICES = {
    "block": st.one_of(st.tuples(st.integers(-2, 200), st.integers(-2, 200)), JUNK),
    "group": NUMBERS,
    "inputs": st.one_of(st.sampled_from(["token", "group", "tensor", "static"]), JUNK),
}


@fuzz(400)
@hypothesis.given(st.data())
def test_expert_matrix(data):
    scheme = data.draw(st.sampled_from(tuple(fusedmoe.SCHEMES)))
    made = layer(scheme)["w13"]
    arguments = {**made.tensors(), "scheme": scheme}
    changes = {
        "scheme": SCHEMES,
        **dict.fromkeys(("data", "scale", "zero", "tensor_scale", "input_scale"), ANYTHING),
        **CHOICES,
        "parts": NUMBERS,
    }
    for name in data.draw(st.sets(st.sampled_from(tuple(changes)), max_size=2)):
        arguments[name] = data.draw(changes[name])
    with explained():
        matrix = fusedmoe.ExpertMatrix(**arguments)
        inputs = layer()
        fusedmoe.fused_experts(**{**inputs, "w13": matrix, "hidden_states": torch.randn(T, matrix.shape[2])})


@fuzz(300)
@hypothesis.given(st.data())
def test_quantize(data):
    arguments = {"weight": torch.randn(E, I, H), "scheme": data.draw(st.sampled_from(tuple(fusedmoe.SCHEMES)))}
    changes = {
        "weight": ANYTHING,
        "scheme": SCHEMES,
        **CHOICES,
        "parts": NUMBERS,
        "zero": st.booleans(),
        "scale_dtype": st.one_of(st.sampled_from(["float32", "float16", "e8m0"]), JUNK),
        "input_scale": st.one_of(st.floats(), ANYTHING),
    }
    for name in data.draw(st.sets(st.sampled_from(tuple(changes)), max_size=3)):
        arguments[name] = data.draw(changes[name])
    with explained():
        matrix = fusedmoe.quantize(**arguments)
        assert matrix.shape == arguments["weight"].shape


@fuzz(300)
@hypothesis.given(st.data())
def test_formats_and_activations(data):
    with explained():
        name = data.draw(NAMES["activation"])
        parameters = {p: data.draw(NUMBERS) for p in data.draw(st.sets(st.sampled_from(["alpha", "beta", "limit"])))}
        fusedmoe.Activation(name, **parameters)
    with explained():
        inputs = data.draw(st.one_of(st.none(), JUNK))
        if data.draw(st.booleans()):
            mode, group = data.draw(st.sampled_from(["token", "group", "row", None])), data.draw(NUMBERS)
            inputs = Inputs(element=data.draw(st.sampled_from(["e4m3", "int8", "int3", None])), mode=mode, group=group)
        element = data.draw(st.one_of(st.sampled_from(["e4m3", "int4", "e2m1"]), JUNK))
        form = Format(scheme="own", element=element, block=data.draw(CHOICES["block"]), inputs=inputs)
        fusedmoe.quantize(torch.randn(1, 32, 64), form)


# --- files ------------------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
VALUES = st.one_of(
    JSON, st.integers(-300, 300), st.sampled_from([2**31, -(2**63), 10**40, "../x", "re:(a+)+$", "*" * 40])
)
KEYS = (*CONFIG, "text_config", "quantization_config", "n_group", "swiglu_limit", "torch_dtype", "scoring_func")


def small() -> dict[str, torch.Tensor]:
    """A layer of two experts with its router."""
    g = torch.Generator().manual_seed(0)
    head = "model.layers.0.mlp."
    found = {f"{head}gate.weight": torch.randn(2, 32, generator=g), "model.embed_tokens.weight": torch.ones(4, 32)}
    for expert in range(2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"{head}experts.{expert}.{name}.weight"] = torch.randn(32, 32, generator=g)
    return found


@functools.cache
def stored(scheme: str | None) -> dict[str, bytes]:
    """Files of a checkpoint, quantised or not."""
    with tempfile.TemporaryDirectory() as path:
        source = Path(path) / "plain"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(CONFIG))
        save_file(small(), source / "model.safetensors")
        if scheme is not None:
            group = {"group": 32} if 32 in fusedmoe.SCHEMES[scheme].groups else {}
            quantize_checkpoint(source, Path(path) / "made", scheme, **group, progress=False)
            source = Path(path) / "made"
        return {file.name: file.read_bytes() for file in source.iterdir()}


STORED = st.sampled_from([None, "fp8_block", "fp8_channel", "int8_w8a8", "int4_w4a16", "int8_w8a16", "mxfp4", "nvfp4"])


@contextlib.contextmanager
def directory(scheme: str | None = None):
    """A checkpoint in a directory of its own, with a secret beside it."""
    with tempfile.TemporaryDirectory() as path:
        (Path(path) / "secret.txt").write_text("secret")
        inner = Path(path) / "model"
        inner.mkdir()
        for name, content in stored(scheme).items():
            (inner / name).write_bytes(content)
        yield inner


def places(value, at=()):
    """The way to every value inside a value of JSON."""
    if at:
        yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*at, key))


def put(value, at, new):
    """Replace what lies there; what was replaced before has no insides."""
    with contextlib.suppress(IndexError, KeyError, TypeError):
        for key in at[:-1]:
            value = value[key]
        value[at[-1]] = new


def everything_that_reads(path: Path) -> None:
    """Each reader by itself, and a conversion, which is whole or not there."""
    for read in (
        lambda: checkpoint.read_experts(path, 0),
        lambda: checkpoint.read_router(path, 0)(torch.randn(2, 32)),
        lambda: checkpoint.read_embedding(path),
        lambda: shape_of(str(path)),
    ):
        with explained():
            read()
    target = path.parent / "target"
    with explained():
        quantize_checkpoint(path, target, "int8_w8a8", progress=False)
        checkpoint.read_experts(target, 0)
    written = [one for one in path.parent.iterdir() if one.name not in ("secret.txt", path.name)]
    assert written in ([], [target])
    assert not any(one.read_text(errors="ignore") == "secret" for one in path.parent.glob("target/*"))
    if target.exists():
        shutil.rmtree(target)


@fuzz(100)
@hypothesis.given(st.data())
def test_arguments_of_the_readers(data):
    ranges = st.one_of(st.tuples(st.integers(-3, 40), st.integers(-3, 40)), JUNK)
    changes = {
        "directory": st.one_of(JUNK, st.text(max_size=5)),
        "layer": NUMBERS,
        "experts": ranges,
        "intermediate": ranges,
        "dtype": st.one_of(st.sampled_from(DTYPES), JUNK),
        "device": st.sampled_from(["cpu", "meta", "nonsense", "cuda:99", [], 1.5]),
    }
    with directory(data.draw(STORED)) as path:
        arguments = {"directory": path, "layer": 0}
        for name in data.draw(st.sets(st.sampled_from(sorted(changes)), max_size=2)):
            arguments[name] = data.draw(changes[name])
        with explained():
            fusedmoe.FusedExperts.from_checkpoint(**arguments)
        for name in ("experts", "intermediate"):
            arguments.pop(name, None)
        with explained():
            router = checkpoint.read_router(**arguments)
            router(data.draw(st.one_of(st.just(torch.randn(3, 32)), JUNK, st.sampled_from([torch.ones(3, 32).int()]))))


@fuzz(300)
@hypothesis.given(st.data())
def test_broken_configuration(data):
    with directory(data.draw(STORED)) as path:
        config = json.loads((path / "config.json").read_text())
        known = [at for at in places(config) if at[0] != "transformers_version"]
        for at in data.draw(st.sets(st.sampled_from(known), max_size=2)):
            put(config, at, data.draw(VALUES))
        for key in data.draw(st.sets(st.sampled_from(KEYS), max_size=1)):
            config[key] = data.draw(VALUES)
        if isinstance(config.get("quantization_config"), dict) and data.draw(st.booleans()):
            config["quantization_config"]["ignore"] = [data.draw(VALUES)]
        text = json.dumps(config)
        cut = data.draw(st.integers(0, len(text))) if data.draw(st.integers(0, 4)) == 0 else len(text)
        (path / "config.json").write_text(text[:cut])
        everything_that_reads(path)


@fuzz(300)
@hypothesis.given(st.data())
def test_broken_tensors(data):
    """Bytes of the file changed, or its end gone, or tensors of other shapes and types under the right names."""
    with directory(data.draw(STORED)) as path:
        file = path / "model.safetensors"
        how = data.draw(st.sampled_from(["cut", "bytes", "tensors"]))
        if how == "tensors":
            found = load_file(file)
            for name in data.draw(st.sets(st.sampled_from(sorted(found)), min_size=1, max_size=2)):
                shape = data.draw(st.lists(st.sampled_from([0, 1, 16, 32, 64]), max_size=4))
                dtype = data.draw(st.sampled_from([d for d in DTYPES if d != torch.complex64]))
                found[name] = torch.ones(shape).to(dtype)
            save_file(found, file)
        else:
            content = bytearray(file.read_bytes())
            if how == "cut":
                content = content[: data.draw(st.integers(0, len(content)))]
            for place in data.draw(st.lists(st.integers(0, 700), max_size=3)) if how == "bytes" else ():
                content[place] = data.draw(st.integers(0, 255))
            file.write_bytes(content)
        everything_that_reads(path)


@fuzz(200)
@hypothesis.given(st.data())
def test_broken_index(data):
    with directory() as path:
        names = list(small())
        (path / "model.safetensors").rename(path / "a.safetensors")
        weight_map = dict.fromkeys(names, "a.safetensors")
        for name in data.draw(st.sets(st.sampled_from(names), max_size=2)):
            weight_map[name] = data.draw(
                st.one_of(
                    st.text(max_size=10), st.sampled_from(["../secret.txt", "/etc/passwd", "b.safetensors"]), JSON
                )
            )
        text = json.dumps({"weight_map": data.draw(st.one_of(st.just(weight_map), JSON))})
        (path / "model.safetensors.index.json").write_text(text[: data.draw(st.sampled_from([None, None, 40]))])
        everything_that_reads(path)


LINKS = ["config.json", "model.safetensors", "generation_config.json"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("to", ["../secret.txt", "/etc/passwd", "..", "loop", "pipe", "/dev/zero"])
def test_links_out_of_the_directory(name, to):
    with directory() as path:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(name if to == "loop" else to)
        os.mkfifo(path / "pipe")  # who reads it waits for ever
        everything_that_reads(path)
        if name != "generation_config.json":
            with pytest.raises(CheckpointError):
                checkpoint.read_experts(path, 0)


# --- the command line -------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.text(max_size=8),
    st.integers(-5, 5000).map(str),
    st.sampled_from(["8,2,64,96", "0,0,0,0", "1,2,3", "../secret.txt", "/dev/zero", "{pipe}", "{checkpoint}", "{out}"]),
    st.sampled_from(
        [*fusedmoe.SCHEMES, "none", "bfloat16", "fp32", "sm_90", "cpu", "torch", "triton", "128x128", "KN"]
    ),
)
OPTIONS = {
    "explain": [
        "shape",
        "experts",
        "top-k",
        "hidden",
        "tokens",
        "dtype",
        "activation",
        "weight-layout",
        "scheme",
        "arch",
    ],
    "run": ["layer", "hidden", "text", "tokens", "dtype", "device", "backend", "output"],
    "quantize": ["scheme", "group", "block", "device"],
    "bench": ["shape", "tokens", "dtype", "scheme", "backend", "routing", "peer", "beside"],
}


@fuzz(40)
@hypothesis.given(st.data())
def test_command_line(data):
    runner, app = pytest.importorskip("typer.testing").CliRunner(), pytest.importorskip("fusedmoe.cli.app").app
    command = data.draw(st.sampled_from(sorted(OPTIONS)))
    words = {name: data.draw(WORDS) for name in data.draw(st.sets(st.sampled_from(OPTIONS[command]), max_size=3))}
    if command in ("explain", "bench"):
        words.setdefault("shape", "4,2,64,32")
    if command == "bench":
        words |= {"tokens": "1"} if words.get("tokens", "1").isdecimal() else {}
    if command == "quantize":
        words.setdefault("scheme", "fp8_block")
    with directory() as path:
        os.mkfifo(path.parent / "pipe")
        there = {"{pipe}": path.parent / "pipe", "{checkpoint}": path, "{out}": path.parent / "out.safetensors"}
        positional = {"run": [path], "quantize": [path, path.parent / "target"]}.get(command, [])
        options = [part for name, word in words.items() for part in (f"--{name}", str(there.get(word, word)))]
        here, own = Path.cwd(), path.parent / "own"  # where names without a directory lead to
        own.mkdir()
        os.chdir(own)
        try:
            result = runner.invoke(app, [command, *map(str, positional), *options])
        finally:
            os.chdir(here)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        assert result.exit_code in (0, 2), result.output
        left = {one.name for one in path.parent.iterdir()} - {"secret.txt", "model", "pipe", "own"}
        assert left <= {"target", "out.safetensors"}
        assert not left or result.exit_code == 0 or words.get("output") == "{out}"
