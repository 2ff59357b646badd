"""The command line: output, JSON and exit codes of every command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
from typer.testing import CliRunner

from fusedmoe import bench as benchmark, cli, functional, selftest
from fusedmoe.atomic import replacing
from fusedmoe.bench import SHAPES, format_for
from fusedmoe.cli import environment, explanation, run as running
from fusedmoe.cli.app import app
from fusedmoe.cli.environment import VARIABLES
from fusedmoe.cli.explanation import ARCHS
from fusedmoe.plan.floor import Ceilings
from fusedmoe.plan.planner import SUPPORTS
from fusedmoe.schemes import SCHEMES
from fusedmoe.settings import Settings
from fusedmoe.target import KNOWN
from fusedmoe.testing import fuzz as fuzzing
from fusedmoe.tune import session

H = 128


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def data(*arguments, code=0):
    return json.loads(invoke(*arguments, code=code).stdout)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """On the CPU, also where there is a GPU; ceilings are measured in their own test."""
    ceilings = Ceilings(bandwidth_gbps=10.0, tflops={"float32": 0.1, "bfloat16": 0.1}, launch_us=1.0)
    for module in (benchmark, running, explanation):
        monkeypatch.setattr(module, "measure_ceilings", lambda device, types: ceilings)
    for module in (benchmark, environment, explanation):
        monkeypatch.setattr(module, "default_device", lambda: torch.device("cpu"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    pytest.importorskip("transformers")
    from fusedmoe.cli.sample import write_sample

    directory = tmp_path_factory.mktemp("qwen3-moe")
    write_sample(directory)
    return directory


@pytest.fixture
def plain(tmp_path):
    """A checkpoint written by hand."""
    safetensors = pytest.importorskip("safetensors.torch")
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes, fan_in=1):
        return torch.randn(sizes, generator=generator) / fan_in**0.5

    experts = {
        f"model.layers.3.mlp.experts.{e}.{name}.weight": draw(n, k, fan_in=k)
        for e in range(4)
        for name, n, k in (("gate_proj", 24, 32), ("up_proj", 24, 32), ("down_proj", 32, 24))
    }
    router = {"model.layers.3.mlp.gate.weight": draw(4, 32)}
    embedding = {"model.embed_tokens.weight": draw(50, 32)}
    directory = tmp_path / "plain"
    directory.mkdir()
    safetensors.save_file({**experts, **router, **embedding}, directory / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_experts_per_tok": 2, "norm_topk_prob": True, "hidden_act": "silu"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_run_without_a_checkpoint_writes_one_and_says_so():
    pytest.importorskip("transformers")
    shown = invoke("run", "--tokens", 9).output
    for words in ("none given", "Qwen3-MoE", "removed afterwards", "random", "backend", "floor", "tolerance", "right"):
        assert words in shown


def test_run_as_json(sample):
    found = data("run", sample, "--tokens", 9, "--layer", 1, "--json")
    assert (found["tokens"], found["experts"], found["top_k"], found["hidden"]) == (9, 16, 4, H)
    assert (found["dtype"], found["backend"], found["reference"]) == ("bfloat16", "torch", "float64")
    assert found["ok"] and 0 < found["error"] <= found["tolerance"]
    assert found["times_floor"] == pytest.approx(found["us"] / found["floor_us"])
    assert "Triton has no CPU target" in found["refused"]["triton"][0]


def test_run_on_hidden_states_of_a_file(sample, tmp_path):
    from safetensors.torch import load_file, save_file

    from fusedmoe import FusedExperts, reference
    from fusedmoe.checkpoint import read_router

    hidden = torch.randn(2, 5, H)
    save_file({"hidden_states": hidden, "other": torch.ones(1)}, tmp_path / "hidden.safetensors")
    out = tmp_path / "out.safetensors"
    found = data(
        "run", sample, "--hidden", tmp_path / "hidden.safetensors", "--dtype", "fp32", "--output", out, "--json"
    )
    assert found["tokens"] == 10 and found["dtype"] == "float32" and found["output"] == str(out)
    written = load_file(out)
    assert torch.equal(written["hidden_states"], hidden.reshape(10, H))
    layer = FusedExperts.from_checkpoint(sample, 0, dtype=torch.float32)
    topk = read_router(sample, 0, dtype=torch.float32)(hidden)
    assert torch.equal(written["topk_ids"], topk.ids)
    want = reference.fused_experts(hidden.reshape(10, H), layer.w13, layer.w2, topk.weights, topk.ids)
    assert (written["output"] - want).norm() < 1e-6 * want.norm()


def test_run_on_text_without_a_tokenizer_takes_its_bytes(sample):
    found = data("run", sample, "--text", "naïve", "--json")
    assert found["tokens"] == 6 and "bytes are the ids" in found["hidden_states"]


def test_run_on_text_with_the_tokenizer_of_the_checkpoint(plain):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"two": 7, "words": 8, "?": 0}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(plain)
    found = data("run", plain, "--layer", 3, "--text", "two words more", "--json")
    assert found["tokens"] == 3 and "the checkpoint's tokenizer" in found["hidden_states"]


def test_run_that_is_wrong_exits_with_1(monkeypatch, plain):
    right = running.fused_experts
    monkeypatch.setattr(running, "fused_experts", lambda *a, **options: right(*a, **options) * 1.01)
    assert "WRONG" in invoke("run", plain, "--layer", 3, code=1).stdout
    assert data("run", plain, "--layer", 3, "--json", code=1)["ok"] is False
    monkeypatch.setattr(running, "fused_experts", lambda *a, **options: right(*a, **options) / 0)
    assert data("run", plain, "--layer", 3, "--json", code=1)["error"] is None  # JSON has no infinity


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layer", 4], "layer 4"),
        (["--layer", 3, "--text", "a"], "wanted the files of a tokenizer"),
        (["--layer", 3, "--hidden", "none.safetensors"], "--hidden none.safetensors: got"),
        (["--layer", 3, "--hidden", "a", "--text", "a"], "--hidden and --text: got both"),
        (["--layer", 3, "--dtype", "fp8"], "dtype: got 'fp8'; wanted float32"),
        (["--layer", 3, "--device", "abacus"], "--device: got 'abacus'"),
        (["--layer", 3, "--backend", "triton"], "Triton has no CPU target"),
        (["--layer", 3, "--backend", "abacus"], "backend: got 'abacus'"),
        (["--layer", 3, "--output", "/nowhere/at/all"], "--output /nowhere/at/all: got"),
    ],
)
def test_run_refuses_with_2_and_a_message(plain, options, message):
    result = invoke("run", plain, *options, code=2)
    assert message in result.stderr and "Traceback" not in result.output
    assert result.stdout == ""


def test_run_refuses_a_directory_that_is_no_checkpoint(tmp_path):
    assert "config.json" in invoke("run", tmp_path, code=2).stderr
    assert "wanted a directory" in invoke("run", tmp_path / "none", code=2).stderr


def test_run_refuses_hidden_states_that_do_not_fit(plain, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "hidden.safetensors"
    for tensors, message in (
        ({"x": torch.ones(2, 32)}, "got tensors ['x']"),
        ({"hidden_states": torch.ones(2, 33)}, "(2, 33); wanted floating point, (..., 32)"),
        ({"hidden_states": torch.ones(2, 32, dtype=torch.int64)}, "torch.int64"),
    ):
        save_file(tensors, path)
        assert message in invoke("run", plain, "--layer", 3, "--hidden", path, code=2).stderr
    path.write_bytes(b"not a tensor file")
    assert "wanted a safetensors file" in invoke("run", plain, "--layer", 3, "--hidden", path, code=2).stderr


def test_run_says_how_to_get_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'pip install "fusedmoe[transformers]"' in invoke("run", code=2).stderr


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens", [1, 64, 8192])
def test_explain_for_every_target(arch, tokens):
    found = data("explain", "--shape", "qwen3-30b-a3b", "--tokens", tokens, "--arch", arch, "--json")
    on_torch = arch in ("cpu", "sm_75")  # sm_75 has no bfloat16
    hopper = arch == "sm_90" and tokens > 1000
    assert found["backend"] == ("torch" if on_torch else "gluon_sm90" if hopper else "triton")
    assert set(found["others"]) == set(SUPPORTS) - {found["backend"]} and all(found["others"].values())
    kernels = [launch["kernel"] for launch in found["launches"]]
    assert kernels[-1] == ("grouped_gemv, down and router weight" if tokens == 1 else "combine") or on_torch
    assert (found["workspace_bytes"] > 0) == (not on_torch)
    assert (found["floor"] is not None) == (arch in ("cpu", "sm_90"))
    if arch == "sm_90":
        assert "nominal" in found["floor_source"]
        assert len(kernels) == {1: 2, 64: 4, 8192: 6}[tokens]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_explain_a_scheme(scheme):
    found = data("explain", "--shape", "gpt-oss-120b", "--scheme", scheme, "--arch", "sm_90", "--json")
    form = format_for(scheme, SHAPES["gpt-oss-120b"])
    for one in found["weights"].values():
        assert one["format"] == str(form) and one["bytes_per_weight"] == pytest.approx(form.bits_per_weight() / 8)
        assert one["multiplied_as"] in (form.element, "bfloat16")
    assert found["floor"]["us"] > 0
    quantising = [one["kernel"] for one in found["launches"] if "quantise" in one["kernel"]]
    assert bool(quantising) == (form.inputs is not None) and len(quantising) <= 2
    shown = invoke("explain", "--shape", "gpt-oss-120b", "--scheme", scheme, "--arch", "sm_90").output
    assert scheme in shown and "bytes each" in shown and "multiplied as" in shown


def test_explain_for_people():
    sizes = ("--experts", 64, "--top-k", 8, "--hidden", 2880, "--intermediate", 2880)
    kind = ("--activation", "swigluoai", "--weight-layout", "KN", "--dtype", "fp16")
    shown = invoke("explain", *sizes, *kind, "--arch", "sm_90").output
    for words in ("sm_90 (H200)", "swigluoai", "triton", "not torch", "workspace", "floor", "grouped_gemm", "block_m="):
        assert words in shown


def test_the_package_itself_is_the_command():
    done = subprocess.run([sys.executable, "-m", "fusedmoe", "--help"], capture_output=True, text=True, check=True)
    assert "explain" in done.stdout


def test_explain_says_what_a_batch_invariant_call_takes():
    plan = ("--shape", "qwen3-30b-a3b", "--arch", "sm_90", "--tokens", 1)
    assert "batch-invariant" not in data("explain", *plan, "--json")["why"]
    found = data("explain", *plan, "--batch-invariant", "--json")
    assert found["why"].endswith("batch-invariant: tiles that add up as for 4096 tokens")
    assert found["launches"][0]["config"]["block_m"] == 16 and found["launches"][0]["config"]["swap"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "sizes of the layer"),
        (["--experts", 8], "sizes of the layer"),
        (["--shape", "mixtral-8x7b", "--hidden", 8], "sizes of the layer"),
        (["--shape", "gpt-5"], "shape: got 'gpt-5'"),
        (["--shape", "mixtral-8x7b", "--arch", "sm_1"], "--arch: got 'sm_1'"),
        (["--shape", "mixtral-8x7b", "--activation", "tanh"], "unknown activation"),
        (["--shape", "mixtral-8x7b", "--weight-layout", "KM"], "weight_layout: got 'KM'"),
        (["--shape", "mixtral-8x7b", "--scheme", "int3"], "scheme: got 'int3'"),
        (["--shape", "mixtral-8x7b", "--scheme", "fp8_block", "--weight-layout", "KN"], "weight_layout of the quan"),
        (["--shape", "mixtral-8x7b", "--arch", "sm_75", "--backend", "triton"], "sm_75 has no bfloat16"),
    ],
)
def test_explain_refuses_with_2_and_a_message(options, message):
    assert message in invoke("explain", *options, code=2).stderr


def test_env():
    assert set(VARIABLES) == {field.name for field in dataclasses.fields(Settings)}
    found = data("env", "--json")
    assert torch.__version__.startswith(found["versions"]["torch"].partition("+")[0])
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["vendor"] == "cpu"
    assert found["settings"]["backend"]["variable"] == "FUSEDMOE_BACKEND"
    assert found["backends"]["torch"]["available"] is True
    shown = invoke("env").output
    for words in ("python", "triton", "FUSEDMOE_SHARED_MEMORY_CAP", "available"):
        assert words in shown


def test_check(monkeypatch):
    good = selftest.Result(name="one", ok=True, error=1e-3, tolerance=1e-2)
    bad = selftest.Result(name="two", ok=False, error=None, tolerance=None, detail="RuntimeError: [no] way")
    monkeypatch.setattr(selftest, "selftest", lambda device, backend, jobs: iter([good]))
    assert "1 of 1 passed on cpu" in invoke("check").stdout
    monkeypatch.setattr(selftest, "selftest", lambda device, backend, jobs: iter([good, bad]))
    shown = invoke("check", code=1).stdout
    assert "FAIL" in shown and "RuntimeError: [no] way" in shown and "1 of 2 passed" in shown
    found = data("check", "--json", code=1)
    assert found["ok"] is False and [result["ok"] for result in found["results"]] == [True, False]


def test_check_of_random_problems(monkeypatch):
    common = ("check", "--fuzz", 10, "--device", "cpu")
    shown = invoke(*common, "--seed", 3).stdout
    assert "seed 3" in shown and "10 random problems on" in shown and "0 wrong" in shown
    found = data(*common, "--seed", 3, "--json")
    assert found["problems"] == 10 and found["wrong"] == [] and 0 < found["worst"] <= 1
    monkeypatch.setattr(fuzzing, "run_poisoned", lambda *_, **__: (None, 1.0))
    assert "FAIL Outcome(case=Case(tokens=" in invoke(*common, code=1).stdout
    found = data(*common, "--json", code=1)
    assert len(found["wrong"]) == 10 and 0 <= found["seed"] < 2**32  # drawn, as none was given


def test_bench_beside_a_peer(tmp_path):
    peer = tmp_path / "peer.json"
    us = {"4,2,64,48": {"1": 1e9}}
    facts = {"name": "other", "device": "d", "dtype": "float32", "scheme": None, "source": "a run", "us": us}
    peer.write_text(json.dumps(facts))
    fp8 = tmp_path / "fp8.json"
    fp8.write_text(json.dumps({**facts, "name": "third", "scheme": "fp8_channel"}))
    common = ("bench", "--shape", "4,2,64,48", "--tokens", "1,3", "--dtype", "fp32", "--beside", peer, "--beside", fp8)
    common += ("--scheme", "none", "--scheme", "fp8_channel", "--scheme", "fp8_tensor")
    found = data(*common, "--json", "-")
    one, three, quantised, _, neither, _ = found["rows"]
    assert one["peer_us"] == 1e9 and one["faster_than_peer"] == pytest.approx(1e9 / one["us"])
    assert three["peer_us"] is None and three["faster_than_peer"] is None
    assert [row["peer"] for row in (one, quantised, neither)] == ["other", "third", None]
    assert [row["scheme"] for row in found["rows"][::2]] == [None, "fp8_channel", "fp8_tensor"]
    assert found["beside"][1] == {"name": "third", "device": "d", "scheme": "fp8_channel", "source": "a run"}
    assert found["ceilings"]["launch_us"] == 1.0
    shown = invoke(*common, "--json", tmp_path / "rows.json").output
    assert "other" in shown and "1000000000.00" in shown and "x floor" in shown
    assert "e4m3 unknown, PyTorch has none here" in " ".join(shown.split())
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 6


def test_bench_of_a_wrong_result_exits_with_1(monkeypatch):
    right = functional.fused_experts
    monkeypatch.setattr(functional, "fused_experts", lambda *a, **options: right(*a, **options) * 1.1)
    shown = invoke("bench", "--shape", "4,2,64,48", "--tokens", "2", code=1).stdout
    assert "WRONG" in shown and ">" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "x"], "shape: got 'x'"),
        (["--tokens", "1,two"], "--tokens: got '1,two'"),
        (["--beside", "none.json"], "figures of a peer"),
        (["--dtype", "int4"], "dtype: got 'int4'"),
        (["--scheme", "int3"], "scheme: got 'int3'"),
        (["--shape", "4,2,64,48", "--scheme", "mxfp4"], "scheme 'mxfp4' for shape 4,2,64,48"),
        (["--shape", "4,2,64,48", "--backend", "triton", "--tokens", "1"], "Triton has no CPU target"),
        (["--shape", "4,2,64,48", "--tokens", "1", "--json", "/nowhere/at/all"], "file /nowhere/at/all"),
    ],
)
def test_bench_refuses_with_2_and_a_message(options, message):
    assert message in invoke("bench", *options, code=2).stderr


def test_bench_knows_the_shapes_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr(benchmark, "bench", lambda shape, tokens, **options: asked.append((shape, tokens)) or [])
    invoke("bench")
    assert asked == [(shape, benchmark.TOKENS_CPU) for shape in SHAPES.values()]


def test_warmup():
    """Nothing is compiled on a CPU; what is on a GPU: tests/gpu/test_warming.py."""
    layer = ("warmup", "4,2,64,64", "--device", "cpu", "--bias", "--scheme", "fp8_channel")
    found = data(*layer, "--tokens", 40, "--json")
    assert found["variants"] == 0 and found["tokens"] >= 16
    assert "0 kernels for T = 1 to 4" in invoke(*layer, "--tokens", 4).stdout


@pytest.fixture
def clocked(monkeypatch):
    """A device with kernels to choose, on which narrow tiles are fast."""

    class Clock:
        def prepare(self, candidates):
            pass

        def time(self, tiles, *, careful):
            return float(tiles.gate_up.block_n + tiles.down.block_n)

    monkeypatch.setattr(session, "target_of", lambda device: KNOWN["sm_90"])
    monkeypatch.setattr(session, "OnDevice", lambda *arguments: Clock())


def test_tune(clocked, tmp_path):
    layer = ("tune", "16,4,512,256", "--device", "cpu", "--write", tmp_path)
    first = invoke(*layer, "--tokens", "2,512").stdout
    assert "T 2: " in first and "planned" in first and "written: " in first
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert [row["slots"] for row in found["entries"]] == [8, 2048]
    assert found["command"].startswith("fusedmoe tune")
    again = invoke(*layer, "--tokens", "2,512").stdout
    assert again.count("in the file already") == 2
    theirs = tmp_path / "theirs.json"
    tile = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4}
    theirs.write_text(json.dumps({"1": {**tile, "num_stages": 3}, "2": {**tile, "num_stages": 99}}))
    taken = invoke(*layer, "--from-vllm", theirs)
    assert "T 2: left out" in taken.stderr and "written: " in taken.stdout
    assert [row["slots"] for row in json.loads(path.read_text())["entries"]] == [4]


def test_tune_a_layer_as_gpt_oss_has_it(clocked, tmp_path):
    how = ("--interleaved", "--bias", "--activation", "swigluoai")
    invoke("tune", "16,4,512,256", "--device", "cpu", "--write", tmp_path, "--tokens", "2", *how)
    assert len(list(tmp_path.glob("*interleaved*.json"))) == 1
    explained = data("explain", "--shape", "gpt-oss-120b", "--interleaved", "--arch", "sm_90", "--json")
    assert explained["problem"]["gate_up"] == "interleaved"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "wanted a GPU with Triton"),
        (("--tokens", "0"), "positive integers"),
        (("--from-vllm", "no such file"), "a readable file"),
    ],
)
def test_tune_refuses_with_2_and_a_message(options, message):
    assert message in " ".join(invoke("tune", "4,2,64,64", "--device", "cpu", *options, code=2).stderr.split())


def test_help_and_usage():
    shown = invoke("--help").output
    for command in ("run", "explain", "env", "check", "bench"):
        assert command in shown
        assert "--json" in invoke(command, "--help").output
    invoke("run", "--tokens", "none", code=2)
    invoke("nothing", code=2)


def test_main(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fusedmoe", "env", "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code and json.loads(capsys.readouterr().out)["versions"]
    monkeypatch.setattr(sys, "argv", ["fusedmoe", "explain"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2 and capsys.readouterr().err.startswith("error: sizes")


@pytest.mark.parametrize("package", ["torch", "typer", "rich"])
def test_without_a_package_the_extra_is_named(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert f"no package {package}" in said and 'pip install "fusedmoe[cli]"' in said


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_env_needs_neither(monkeypatch, capsys, package):
    monkeypatch.setattr(sys, "argv", ["fusedmoe", "env", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    wanted = capsys.readouterr().out
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", ["fusedmoe", "env"])
    assert cli.main() == 0
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("option", ["--hidden", "--beside", "--shape"])
def test_a_pipe_that_nobody_writes_to_is_refused(option, plain, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    command = ["run", plain, "--layer", 3] if option == "--hidden" else ["bench", "--tokens", 1]
    assert "regular file" in invoke(*command, option, tmp_path / "pipe", code=2).stderr


def test_files_are_replaced_whole(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("file.json", "link.json", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    with replacing(link) as new:
        new.write_text("new")
        assert file.read_text() == "old" and new.suffix == ".json"
    assert link.is_symlink() and file.read_text() == "new"
    with contextlib.suppress(RuntimeError), replacing(file) as new:
        new.write_text("half")
        raise RuntimeError
    assert file.read_text() == "new"
    os.mkfifo(pipe)
    with replacing(pipe) as new:
        assert new == pipe
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file.json", "link.json", "pipe"]
