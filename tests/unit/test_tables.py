"""Files of measured tiles: found by layer and device, used where they can run, ignored with a word otherwise."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import own_tables
import pytest
import torch

from fusedmoe import experts, settings as reading
from fusedmoe.bench import SHAPES, format_for, problem_of
from fusedmoe.cli.explanation import explain_call
from fusedmoe.plan import planner, tables
from fusedmoe.plan.config import FEW, KernelConfig
from fusedmoe.plan.planner import choose, read_files_again, support, tokens_before_breaks, untuned
from fusedmoe.plan.tables import Entry, contents, lookup, name_of
from fusedmoe.spec.problem import Adapters
from fusedmoe.target import KNOWN, version_of

H200 = KNOWN["sm_90"]
QWEN = SHAPES["qwen3-30b-a3b"]
TILE = KernelConfig(block_m=32, block_n=64, block_k=64, warps=8, stages=3)
FAST = {"backend": "triton", "gate_up": TILE, "down": replace(TILE, block_n=128), "us": 1.0, "planned_us": 2.0}

BAD = {"block_m": 16, "block_n": 16, "block_k": 16}  # with something else


def problem(tokens, scheme="none", **options):
    return replace(problem_of(QWEN, tokens, torch.bfloat16, form=format_for(scheme, QWEN)), **options)


@pytest.fixture
def folder(folder, monkeypatch):
    """Without the package's own files."""
    monkeypatch.setattr(tables, "PACKAGE", folder / "none")
    return folder


def put(folder, *entries, like=None, **changes):
    path = folder / name_of(like or problem(1), H200)
    found = json.loads(contents(entries, H200, "test")) | changes
    path.write_text(json.dumps(found))
    read_files_again()
    return path


def test_a_measurement_speaks_for_its_neighbours(folder):
    path = put(folder, Entry(slots=512, **FAST), Entry(slots=1024))
    for tokens in (32, 64, 90):  # from half of it to the middle of the next
        plan = choose(problem(tokens), H200)
        assert (plan.triton.gate_up, plan.triton.down) == (TILE, FAST["down"])
        assert plan.backend == "triton" and f"measured for 512 slots: {path}" in plan.why
    for tokens in (31, 91, 128, 2000):
        assert choose(problem(tokens), H200) == untuned(problem(tokens), H200)


def told(path, tokens):
    """What a file of the package's says, and a call that it is about."""
    found, shape, scheme = own_tables.told(path)
    return found, problem_of(shape, tokens, torch.bfloat16, form=format_for(scheme, shape))


@pytest.mark.parametrize("path", own_tables.PATHS, ids=own_tables.name)
def test_the_packages_own_files_are_found_for_their_layers(path, folder, monkeypatch, caplog):
    monkeypatch.setattr(tables, "PACKAGE", path.parent)
    found, call = told(path, 512)
    assert name_of(call, H200) == path.name
    for installed in (tuple(map(int, found["triton"].split("."))), (99, 0)):
        monkeypatch.setattr(tables, "version_of", lambda name, installed=installed: installed)
        read_files_again()
        with caplog.at_level(logging.INFO, "fusedmoe"):
            entry = lookup(call, H200)
        assert not caplog.records  # of another Triton: nobody's business
        assert (entry is not None) == (installed != (99, 0))
        assert entry is None or entry == (next(e for e in tables.read(path, H200) if e.slots == call.slots), path)


@pytest.mark.parametrize("path", own_tables.PATHS, ids=own_tables.name)
def test_a_workspace_for_more_tokens_serves_fewer_with_the_packages_own_files(path, folder, monkeypatch):
    monkeypatch.setattr(tables, "PACKAGE", path.parent)
    found, one = told(path, 1)
    monkeypatch.setattr(tables, "version_of", lambda name: tuple(map(int, found["triton"].split("."))))
    read_files_again()

    def need(tokens):
        call = replace(one, tokens=tokens)
        return experts.bytes_for(call, choose(call, H200))

    largest, measured = 0, 0
    for tokens in sorted({max(1, 2**n + more) for n in range(15) for more in (-1, 0, 1)} | set(range(1, 4000, 37))):
        call = replace(one, tokens=tokens)
        measured += "measured for" in choose(call, H200).why
        largest = max(largest, need(tokens))
        assert max(map(need, (tokens, *tokens_before_breaks(call, H200)))) >= largest
    assert bool(measured) == any(entry["gate_up"] for entry in found["entries"])  # nothing may be faster than planned


def test_there_are_files_of_the_popular_shapes():
    shapes = {(shape.experts, shape.hidden, shape.intermediate) for shape in SHAPES.values()}
    theirs = {tuple(int(part.partition("=")[2]) for part in path.name.split(",")[1:4]) for path in own_tables.PATHS}
    assert shapes <= theirs


def test_what_follows_from_tiles_is_not_in_the_file(folder):
    xw = replace(TILE, block_m=128, block_n=64, maps="xw")
    put(folder, Entry(slots=65536, **{**FAST, "gate_up": xw, "down": replace(xw, maps="w")}))
    plan = choose(problem(8192), H200).triton
    assert plan.gather and plan.overlap and not plan.few and plan.requantise == "none"
    assert plan.combine_block == untuned(problem(8192), H200).triton.combine_block


def test_a_file_goes_round(folder):
    entries = [Entry(slots=64, **FAST, few=True, date="2026-01-02"), Entry(slots=128, us=3.0, planned_us=3.0)]
    path = put(folder, *entries)
    assert tables.read(path, H200) == tuple(entries)
    assert json.loads(path.read_text())["triton"] == ".".join(map(str, version_of("triton")))


@pytest.mark.parametrize("entry", [
    {"gate_up": replace(TILE, block_m=64)},  # of two heights
    {"gate_up": replace(TILE, block_n=256, block_k=256, stages=6)},  # shared memory
    {"few": True},  # with 512 slots
    {"backend": "torch"},
    {"backend": "vanished"},
], ids=["heights", "memory", "few", "torch", "vanished"])  # fmt: skip
def test_tiles_that_cannot_run_are_not_used(folder, entry):
    put(folder, Entry(slots=512, **{**FAST, **entry}))
    assert choose(problem(64), H200) == untuned(problem(64), H200)


@pytest.mark.parametrize("cap", [65536, 101376, 166912, 232448])
def test_a_file_never_exceeds_shared_memory(folder, cap):
    put(folder, *(Entry(slots=2**n, **{**FAST, "gate_up": replace(TILE, stages=5, block_k=128)}) for n in range(3, 16)))
    used = 0
    for tokens in (1, 8, 64, 512, 4096):
        small = replace(H200, shared_bytes=cap)
        plan = choose(problem(tokens), small).triton
        used += plan.gate_up.block_k == 128 and plan.gate_up.stages == 5
        assert not planner.why_not_plan(plan, problem(tokens), small)
    assert bool(used) == (cap > 128 * (32 + 128) * 2 * 5)


@pytest.mark.parametrize("changes", [
    {"schema": 2},
    {"triton": "2.0"},
    {"device": {"arch": "sm_90", "n_sm": 78}},
    {"device": None},
    {"entries": [{"slots": "many"}]},
    {"entries": [{"slots": 512, "gate_up": {"block_m": 16}}]},
    {"entries": [{"slots": -1}]},
    {"entries": 3},
    {"entries": [{"slots": 10**400}]},
    {"entries": [{"slots": 512, "backend": []}]},
    {"entries": [{"slots": 512, "few": 1}]},
    {"entries": [{"slots": 512, "gate_up": BAD | {"maps": "x"}, "down": BAD}]},
    {"entries": [{"slots": 512, "gate_up": BAD | {"swap": []}, "down": BAD}]},
    {"entries": [{"slots": 512, "gate_up": BAD | {"programs_per_sm": -1}, "down": BAD}]},
], ids=[
    "schema", "triton", "device", "no device", "text", "half a tile", "negative", "no list", "huge", "backend", "few",
    "maps", "swap", "programs",
])  # fmt: skip
def test_stale_and_foreign_files_are_ignored_with_a_word(folder, changes, caplog):
    path = put(folder, Entry(slots=512, **FAST), **changes)
    with caplog.at_level(logging.WARNING, "fusedmoe"):
        assert choose(problem(64), H200) == untuned(problem(64), H200)
        choose(problem(65), H200)
    assert [str(path) in record.getMessage() for record in caplog.records] == [True], "once"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff", b"[" * 100000], ids=["empty", "cut", "list", "bytes", "deep"]
)
def test_what_is_no_file_of_ours_is_ignored(folder, text, caplog):
    (folder / name_of(problem(1), H200)).write_bytes(text)
    assert choose(problem(64), H200) == untuned(problem(64), H200)
    assert "is ignored" in caplog.text


def test_names_say_what_decides():
    names = {
        name_of(one, target)
        for target in (H200, replace(H200, n_sm=78), KNOWN["sm_80"])
        for one in (
            problem(1),
            problem(1, hidden=4096),
            problem(1, dtype="float16"),
            problem(1, gate_up="interleaved"),
            problem(1, "fp8_block"),
            problem(1, "fp8_channel"),
        )
    }
    assert len(names) == 18 and name_of(problem(1), H200) == name_of(problem(99, top_k=2, w13_bias=True), H200)
    assert name_of(problem(1, emulate=True), H200) is None


def test_batch_invariant_calls_do_not_read_files(folder):
    alike = {n: choose(problem(n, batch_invariant=True), H200) for n in (1, 64, 512)}
    put(folder, *(Entry(slots=2**n, **FAST) for n in range(3, 20)))
    planner._choose_alike.cache_clear()
    assert {n: choose(problem(n, batch_invariant=True), H200) for n in alike} == alike
    assert choose(problem(64), H200) != untuned(problem(64), H200)


def test_adapters_take_the_tiles_of_the_layer_without(folder):
    """Rows without an adapter then have its bits; a tile too wide for what adapters add is narrower."""
    tall = replace(TILE, block_m=64, block_n=128, block_k=64, warps=4)
    put(folder, Entry(slots=512, **FAST), Entry(slots=4096, **{**FAST, "gate_up": tall, "down": tall}))
    adapters = Adapters(slots=4, rank=24, parts=2)
    plan = choose(problem(64, adapters=adapters), H200)
    assert plan.triton.gate_up == TILE and plan.triton.shrink is not None and "measured" in plan.why
    plan = choose(problem(512, adapters=adapters), H200)
    assert plan.triton.gate_up == replace(tall, block_n=64) and choose(problem(512), H200).triton.gate_up == tall


def test_a_gemm_alone_is_planned_without_files(folder):
    put(folder, Entry(slots=512, **FAST))
    alone = problem(64, alone=True)
    assert lookup(alone, H200) is None and choose(alone, H200) == untuned(alone, H200)


def test_a_backend_that_is_asked_for_is_taken(folder):
    put(folder, Entry(slots=512, **FAST))
    assert choose(problem(64), H200, "triton").triton.gate_up == TILE
    assert choose(problem(64), H200, "torch").backend == "torch"
    assert choose(problem(64), H200, "gluon_sm90") == untuned(problem(64), H200, "gluon_sm90")
    assert set(dict(choose(problem(64), H200).refused)) == set(support(problem(64), H200)) - {"triton"}


def test_breaks_are_where_plans_change(folder):
    put(folder, Entry(slots=64, **FAST), Entry(slots=512, **FAST), Entry(slots=65536, **FAST))
    breaks = tokens_before_breaks(problem(20000), H200)
    assert FEW // QWEN.top_k in breaks
    measured = []
    for before, last in itertools.pairwise(sorted({0, *breaks, 19999})):
        between = {*range(before + 1, last + 1, 1 + (last - before) // 50), last}
        same = {choose(problem(n), H200).triton == untuned(problem(n), H200).triton for n in between}
        assert len(same) == 1, (before, last)
        measured += same
    assert set(measured) == {True, False}


def test_a_measurement_counts_the_rows_that_are_here(folder):
    """Half of all experts are elsewhere: as many rows for each as half the slots would give if all were here."""
    put(folder, Entry(slots=512, **FAST))
    mapped = problem(128, expert_map=True, known_experts=256)
    assert lookup(mapped, H200)[0].slots == 512 and lookup(replace(mapped, tokens=300), H200) is None


def test_explain_says_where_tiles_are_from(folder, monkeypatch):
    path = put(folder, Entry(slots=512, **FAST))
    assert str(path) in explain_call(QWEN, 64, dtype=torch.bfloat16, arch="sm_90")["why"]
    monkeypatch.setenv("FUSEDMOE_TUNED", "none")
    reading.settings.cache_clear()
    read_files_again()
    assert lookup(problem(64), H200) is None


def test_files_of_the_package_are_read_as_they_are():
    for path in tables.PACKAGE.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        facts = found["device"]
        (target,) = (one for one in KNOWN.values() if (one.arch, one.n_sm) == (facts["arch"], facts["n_sm"]))
        assert path.name.startswith(f"{target.arch}x{target.n_sm},") and found["command"].startswith("fusedmoe tune ")
        assert [tables._entry(row) for row in found["entries"]]
