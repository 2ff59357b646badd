"""Compiled for a GPU that is not here, by the command and by the tuner, under the names that are looked for there."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest
import torch
import triton.language as tl

import fusedmoe
import fusedmoe.kernels
from fusedmoe import selftest, warming
from fusedmoe.backends import elsewhere
from fusedmoe.backends.launch import only_compiling
from fusedmoe.bench import format_for, problem_of, shape_of
from fusedmoe.errors import OptionError
from fusedmoe.settings import settings
from fusedmoe.target import KNOWN, known, target_of
from fusedmoe.testing.cases import Case
from fusedmoe.tune import session
from fusedmoe.tune.compilers import Compilers, Work
from fusedmoe.tune.space import starts

if settings().interpret:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)

SHAPE = shape_of("8,2,256,128")


def kernels(cache):
    """Names of what lies compiled in a cache."""
    return {(path.parent.name, path.stem) for path in cache.glob("*/*.cubin")}


def test_a_warmup_for_a_gpu_that_is_not_here_leaves_what_a_process_there_looks_for(tmp_path, monkeypatch):
    """Another process finds all of it, and compiles nothing; calls of this one, of other tensors, neither."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    layer = ("8,2,256,128", "--target", "sm_90", "--tokens", "300")
    command = [sys.executable, "-m", "fusedmoe", "warmup", *layer]
    said = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    first = kernels(tmp_path)
    assert {"grouped_gemm", "grouped_gemm_sm90", "route", "combine"} <= {name for _, name in first}
    assert f"{len(first)} kernels" in said
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert kernels(tmp_path) == first
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    w13, w2 = torch.randn(8, 256, 256).bfloat16(), torch.randn(8, 256, 128).bfloat16()
    x, weights, ids = torch.randn(300, 256).bfloat16(), torch.rand(300, 2), torch.randint(0, 8, (300, 2)).int()
    call = lambda n: fusedmoe.fused_experts(x[:n], w13, w2, weights[:n], ids[:n])  # noqa: E731
    assert fusedmoe.warmup(call, 300, target="sm_90").variants == len(first)
    assert kernels(tmp_path) == first


def test_a_self_test_finds_what_its_processes_compiled(tmp_path, monkeypatch):
    """Though it brings an output and a workspace of its own."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case.of((33, 3, 8, 128, 96))
    selftest._compile(known("sm_90"), "triton", case)
    first = kernels(tmp_path)
    assert {"grouped_gemm", "route", "combine"} <= {name for _, name in first}
    arguments, options = case.draw("cpu")
    with torch.no_grad(), elsewhere.compiling_for(known("sm_90")), only_compiling():
        selftest._run(selftest._Machine(device=torch.device("cpu"), backend="triton"), arguments, options)
    assert kernels(tmp_path) == first


def test_names_of_kernels_do_not_depend_on_what_was_compiled_before():
    """Triton's name of a function has the global constants of those that it calls only if these had one already. So
    there are none, but in a module whose functions one kernel alone reaches.
    """
    for module in pkgutil.iter_modules(fusedmoe.kernels.__path__):
        names = vars(importlib.import_module(f"fusedmoe.kernels.{module.name}"))
        constants = {name for name, value in names.items() if isinstance(value, tl.constexpr)}
        assert not constants or module.name == "grouped_gemm_sm90", (module.name, constants)


def test_the_cpu_is_the_cpu_again():
    before = target_of(torch.device("cpu"))
    with elsewhere.compiling_for(known("gfx942")):
        assert target_of(torch.device("cpu")).arch == "gfx942"
    assert target_of(torch.device("cpu")) == before and before.vendor == "cpu"


def test_targets_that_nothing_is_compiled_for(monkeypatch):
    with pytest.raises(OptionError, match="target: got 'sm_91'; wanted sm_75, .*gfx942"):
        fusedmoe.warmup(print, 1, target="sm_91")
    monkeypatch.setattr(warming, "known", lambda arch: replace(KNOWN[arch], unfit="an old Triton"))
    with pytest.raises(OptionError, match="target sm_90: got an old Triton; wanted Triton's compiler"):
        fusedmoe.warmup(print, 1, target="sm_90")
    cpu = target_of(torch.device("cpu"))
    with pytest.raises(OptionError, match="wanted one of NVIDIA's or AMD's"), elsewhere.compiling_for(cpu):
        pass


@pytest.mark.parametrize("scheme", ["none", "fp8_block"])
def test_processes_of_the_tuner(scheme, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target = known("sm_90")
    candidates = starts(problem_of(SHAPE, 300, torch.bfloat16, form=format_for(scheme, SHAPE)), target)
    broken = candidates[-1]._replace(gate_up=replace(candidates[-1].gate_up, block_k=17))
    with closing(Compilers(Work(SHAPE, torch.bfloat16, scheme, target, {}), 2)) as compilers:
        assert compilers.compile(300, [*candidates, broken]) == len(candidates)
        found = kernels(tmp_path)
        assert found and compilers.compile(300, candidates) == len(candidates)
    assert kernels(tmp_path) == found


def test_processes_that_cannot_start_are_told_of(caplog):
    work = Work(SHAPE, torch.bfloat16, "no such scheme", known("sm_90"), {})
    with closing(Compilers(work, 1)) as compilers, caplog.at_level(logging.WARNING, "fusedmoe"):
        assert compilers.compile(1, starts(problem_of(SHAPE, 1, torch.bfloat16, form=None), known("sm_90"))) == 0
    assert "this one compiles" in caplog.text


def test_a_tuner_of_a_gpu_compiles_in_processes_before_it_measures(tmp_path, monkeypatch):
    """The GPU is a clock that asks whether the kernels of what it is to run lie in the cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    device, closed = torch.device("cuda", 0), []
    monkeypatch.setattr(session, "draw_layer", lambda *a, **k: None)
    monkeypatch.setattr(Compilers, "close", lambda self: (closed.append(self), self._pool.shutdown()))

    class Clock:
        def __init__(self, layer, tokens, routing, compilers):
            self.tokens, self.compilers = tokens, compilers

        def prepare(self, candidates):
            assert self.compilers.compile(self.tokens, candidates) == len(candidates)

        def time(self, tiles, *, careful):
            names = {name for _, name in kernels(tmp_path / "cache")}
            assert {"grouped_gemv" if tiles.gate_up.block_m == 1 else "grouped_gemm"} <= names
            return 100.0 - tiles.down.stages

    monkeypatch.setattr(session, "OnDevice", Clock)
    how = {"dtype": torch.bfloat16, "device": device, "target": known("sm_90"), "keep": 2, "seconds": None, "jobs": 2}
    steps = list(session.tune(SHAPE, (1, 16), folder=tmp_path / "tuned", **how))
    assert [step.tokens for step in steps] == [1, 16] and all(step.tried > 4 for step in steps)
    assert len(closed) == 1
