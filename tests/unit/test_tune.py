"""The tuner with clocks of its own, and files of vLLM."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from fusedmoe.bench import SHAPES, format_for, problem_of
from fusedmoe.cli.app import app
from fusedmoe.errors import OptionError, UnsupportedError
from fusedmoe.plan import tables, vllm_json
from fusedmoe.plan.config import KernelConfig
from fusedmoe.plan.planner import choose, untuned
from fusedmoe.plan.validity import why_not_plan
from fusedmoe.target import KNOWN, Target
from fusedmoe.tune import TOKENS, export, take_over, tune
from fusedmoe.tune.search import NOISE, search
from fusedmoe.tune.space import Tiles, neighbours, starts

H200, CPU = KNOWN["sm_90"], torch.device("cpu")
QWEN = SHAPES["qwen3-30b-a3b"]
CASES = [
    (name, scheme, tokens)
    for name, scheme in (("qwen3-30b-a3b", "none"), ("mixtral-8x7b", "fp8_block"), ("dsv3-tp8", "int4_w4a16"))
    for tokens in (1, 64, 1024, 16384)
]


def problem(name="qwen3-30b-a3b", scheme="none", tokens=64):
    return problem_of(SHAPES[name], tokens, torch.bfloat16, form=format_for(scheme, SHAPES[name]))


class Clock:
    """Times that follow from the tiles; some fail, some are wrong."""

    def __init__(self, seed=0, fails=0.0):
        self.seed, self.fails, self.prepared, self.timed = seed, fails, [], []

    def prepare(self, candidates):
        self.prepared += candidates

    def time(self, tiles, *, careful):
        self.timed.append(tiles)
        chance = random.Random(f"{self.seed} {tiles}")
        return None if chance.random() < self.fails else 50.0 + 50.0 * chance.random()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_all_candidates_can_run(case, arch):
    p, target = problem(*case), KNOWN[arch]
    found = starts(p, target)
    assert found and len(set(found)) == len(found)
    for start in found:
        for gate_up in (True, False):
            some = neighbours(start, p, target, gate_up=gate_up, keep=12)
            every = neighbours(start, p, target, gate_up=gate_up)
            assert some == every[:12] and start not in every and len(set(every)) == len(every)
            for tiles in every:
                assert not why_not_plan(tiles.plan(p, target), p, target)
                assert (tiles.down if gate_up else tiles.gate_up) == (start.down if gate_up else start.gate_up)


def test_shared_memory_prunes():
    small = replace(H200, shared_bytes=65536)
    p = problem(tokens=1024)
    counts = [len(neighbours(starts(p, t)[-1], p, t, gate_up=True)) for t in (H200, small)]
    assert 0 < counts[1] < counts[0] / 2


@pytest.mark.parametrize("fails", [0.0, 0.4], ids=["all run", "some fail"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_fastest_that_was_measured_is_found(case, fails):
    p = problem(*case)
    planned = Tiles.of(untuned(p, H200).triton)
    clock = next(c for c in (Clock(seed, fails) for seed in range(99)) if c.time(planned, careful=True) is not None)
    clock.timed.clear()
    news = []
    found = search(p, H200, planned, clock, note=lambda tiles, us: news.append(us))
    times = {tiles: clock.time(tiles, careful=True) for tiles in set(clock.timed)}
    best = min((us, tiles) for tiles, us in times.items() if us is not None)
    assert news == sorted(news, reverse=True) and news[-1] == best[0]
    assert set(clock.timed) <= set(clock.prepared) and len(clock.prepared) == len(set(clock.prepared))
    assert found.planned_us == times[planned] and found.tried == len(set(clock.prepared))
    if best[0] <= (1 - NOISE) * found.planned_us:
        assert (found.us, found.tiles) == best
    else:
        assert (found.us, found.tiles) == (found.planned_us, None)


def test_both_gemms_are_chosen_apart():
    p = problem(tokens=512)
    planned = Tiles.of(untuned(p, H200).triton)
    want = {"gate_up": (128, 2, 4), "down": (64, 5, 8)}

    class Apart(Clock):
        def time(self, tiles, *, careful):
            off = 0
            for name, (block_k, stages, warps) in want.items():
                one = getattr(tiles, name)
                off += (one.block_k != block_k) + (one.stages != stages) + (one.warps != warps)
            return 50.0 + off + (tiles.gate_up.block_m != planned.gate_up.block_m)

    found = search(p, H200, planned, Apart(), keep=None)
    for name, wanted in want.items():
        one = getattr(found.tiles, name)
        assert (one.block_k, one.stages, one.warps) == wanted


def test_a_planner_that_cannot_be_measured_has_no_result():
    p = problem()
    assert search(p, H200, Tiles.of(untuned(p, H200).triton), Clock(fails=1.0)) is None


def test_time_is_kept():
    p, clock, left = problem(), Clock(), iter([True] * 7 + [False] * 999)
    found = search(p, H200, Tiles.of(untuned(p, H200).triton), clock, more=lambda: next(left))
    assert 3 <= found.tried <= 8


def session(folder, clocks, tokens=(1, 8, 64), **options):
    def measuring(n):
        clocks.append(n)
        return Clock(n)

    layer = {"dtype": torch.bfloat16, "device": CPU, "target": H200, "folder": folder}
    return list(tune(QWEN, tokens, measuring=measuring, command="fusedmoe tune test", **layer, **options))


def test_a_session_is_written_and_resumed(tmp_path):
    clocks = []
    first = session(tmp_path / "new", clocks, tokens=(8, 1))
    (path,) = (tmp_path / "new").iterdir()
    assert clocks == [1, 8] == [step.tokens for step in first] and {step.path for step in first} == {path}
    assert tables.read(path, H200) == tuple(step.entry for step in first)
    found = json.loads(path.read_text())
    assert found["command"] == "fusedmoe tune test" and found["entries"][0]["slots"] == 8
    assert {"us", "planned_us", "date"} <= set(found["entries"][0]) and "triton" in found
    again = session(tmp_path / "new", clocks)
    assert clocks == [1, 8, 64] and [step.resumed for step in again] == [True, True, False]
    assert [entry.slots for entry in tables.read(path, H200)] == [8, 64, 512]
    session(tmp_path / "new", clocks, tokens=(8,), again=True)
    assert clocks == [1, 8, 64, 8] and [entry.slots for entry in tables.read(path, H200)] == [8, 64, 512]


def test_rows_that_alternate_have_a_file_of_their_own(folder):
    """As gpt-oss has them: found for calls with such a layout, whatever their biases, and for no others."""
    (step,) = session(folder, [], tokens=(64,), gate_up_layout="interleaved", activation="swigluoai", bias=True)
    assert ",interleaved" in step.path.name
    theirs, other = (
        problem_of(QWEN, 64, torch.bfloat16, gate_up_layout=layout, activation="swigluoai")
        for layout in ("interleaved", "concatenated")
    )
    assert str(step.path) in choose(theirs, H200).why
    assert choose(other, H200) == untuned(other, H200)


def test_what_was_planned_before_is_planned_anew(folder):
    p = problem()
    before = choose(p, H200)
    (step,) = session(folder, [], tokens=(p.tokens,))
    after = choose(p, H200)
    assert (after.triton.gate_up, after.triton.down) == (step.tiles.gate_up, step.tiles.down)
    assert before == untuned(p, H200) != after and str(step.path) in after.why


def test_news_on_the_way(tmp_path):
    news = []
    done = session(tmp_path, [], tokens=(8,), note=news.append)
    assert news and all(step.entry is None for step in news) and news[-1].us == done[-1].us


def test_places_and_devices_are_checked(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="wanted a place that can be written"):
        session(tmp_path / "file", [])
    with pytest.raises(UnsupportedError, match="tuning: got .*; wanted a GPU with Triton"):
        list(tune(QWEN, TOKENS, dtype=torch.bfloat16, device=CPU, folder=tmp_path, target=Target("cpu")))
    done = CliRunner().invoke(app, ["tune", "4,2,64,48", "--device", "cpu", "--write", str(tmp_path)])
    assert done.exit_code == 2 and "tuning: got" in done.stderr


# --- vLLM -------------------------------------------------------------------------------------------------------------

ROW = {
    "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 3,
}  # fmt: skip


@pytest.mark.parametrize(("scheme", "name", "want"), [
    ("none", "NVIDIA H200", "E=128,N=768,device_name=NVIDIA_H200.json"),
    ("none", "NVIDIA H100 80GB HBM3", "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json"),
    ("fp8_block", "NVIDIA H200 NVL", "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"),
    ("fp8_channel", "NVIDIA H200", "E=128,N=768,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"),
    ("int8_w8a8", "NVIDIA H200", "E=128,N=768,device_name=NVIDIA_H200.json"),
    ("int4_w4a16", "NVIDIA H200", "E=128,N=768,device_name=NVIDIA_H200,dtype=int4_w4a16.json"),
])  # fmt: skip
def test_names_of_vllm(scheme, name, want):
    assert vllm_json.file_name(problem(scheme=scheme), name) == want


def test_a_scheme_without_a_name():
    with pytest.raises(OptionError, match="scheme for vLLM's files: got mxfp4"):
        vllm_json.file_name(problem(scheme="mxfp4"), "NVIDIA H200")


def test_tiles_of_vllm_count_rows_of_weights(tmp_path):
    text = json.dumps(
        {"triton_version": "3.6.0", "1": ROW, "64": {**ROW, "SPLIT_K": 1}, "512": {**ROW, "num_stages": 99}}
    )
    layer = {"dtype": torch.bfloat16, "device": CPU, "target": H200, "folder": tmp_path}
    path, refused = take_over(QWEN, text, **layer)
    one, other = tables.read(path, H200)
    assert (one.slots, other.slots) == (8, 512) and list(refused) == [512] and "shared memory" in refused[512][0]
    assert (one.gate_up.block_n, one.down.block_n) == (64, 128) and one.us is None
    assert (one.few, other.few) == (True, False) and one.backend == "triton"
    name = export(QWEN, device_name="NVIDIA H200", **layer)
    found = json.loads(name.read_text())
    assert found.pop("triton_version") and found == {"1": ROW, "64": ROW}
    assert name.name == "E=128,N=768,device_name=NVIDIA_H200.json"


def test_specialised_tiles_are_none_of_vllms(tmp_path):
    layer = {"dtype": torch.bfloat16, "device": CPU, "target": H200, "folder": tmp_path}
    plan = untuned(problem(tokens=2048), H200, "gluon_sm90").triton
    entry = tables.Entry(slots=16384, backend="gluon_sm90", gate_up=plan.gate_up, down=plan.down)
    (tmp_path / tables.name_of(problem(), H200)).write_text(tables.contents([entry], H200, ""))
    tables.read.cache_clear()
    found = json.loads(export(QWEN, device_name="NVIDIA H200", **layer).read_text())["2048"]
    own = untuned(problem(tokens=2048), H200, "triton").triton.gate_up
    assert (found["num_warps"], found["BLOCK_SIZE_N"]) == (own.warps, 2 * own.block_n) and not own.specialised


def test_single_rows_are_none_of_vllms(tmp_path):
    layer = {"dtype": torch.bfloat16, "device": CPU, "target": H200, "folder": tmp_path}
    plan = untuned(problem(tokens=1), H200).triton
    assert plan.single
    entry = tables.Entry(slots=8, backend="triton", few=True, gate_up=plan.gate_up, down=plan.down)
    (tmp_path / tables.name_of(problem(), H200)).write_text(tables.contents([entry], H200, ""))
    tables.read.cache_clear()
    assert choose(problem(tokens=1), H200).triton == plan, "read back as written"
    found = json.loads(export(QWEN, device_name="NVIDIA H200", **layer).read_text())["1"]
    assert (found["BLOCK_SIZE_M"], found["BLOCK_SIZE_N"]) == (16, 64)


def test_a_tuned_file_has_to_be_there(tmp_path):
    with pytest.raises(OptionError, match="wanted a tuned file"):
        export(QWEN, dtype=torch.bfloat16, device=CPU, target=H200, folder=tmp_path, device_name="NVIDIA H200")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"1": 2}',
        '{"x": {}}',
        json.dumps({"1": {"BLOCK_SIZE_M": 16}}),
        json.dumps({"1": {**ROW, "num_warps": float("inf")}}),
    ],
)
def test_what_is_no_file_of_vllms(text):
    with pytest.raises(OptionError, match="tuned file of vLLM: got"):
        vllm_json.read(text, problem(), H200)


def test_plain_tiles_read_back_as_written():
    tiles = {1: KernelConfig(block_m=16, block_n=32, block_k=128), 64: KernelConfig(block_m=64, block_n=64, block_k=64)}
    entries, refused = vllm_json.read(vllm_json.write(tiles, 2, "3.7"), problem(), H200)
    got = [(e.gate_up.block_m, e.gate_up.block_n, e.gate_up.block_k, e.gate_up.warps) for e in entries]
    assert not refused and got == [(t.block_m, t.block_n, t.block_k, t.warps) for t in tiles.values()]
