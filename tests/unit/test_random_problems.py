"""The fuzz of random problems, on the torch backend: for a bounded time, with a seed that is printed."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import torch

from fusedmoe.testing import fuzz as fuzzing
from fusedmoe.testing.fuzz import EACH, draw_layer, fuzz

SEED = int(os.environ.get("FUSEDMOE_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
CPU = torch.device("cpu")


def test_random_problems():
    outcomes = list(fuzz(100, SEED, CPU))
    wrong = [outcome for outcome in outcomes if not outcome.ok]
    assert not wrong, (SEED, wrong)
    assert len(outcomes) == 100


def test_the_same_seed_draws_the_same_problems():
    one, two, other = (list(fuzz(EACH, seed, CPU, small=True)) for seed in (5, 5, 6))
    assert one == two and one != other


def test_processes_share_the_work():
    alone = list(fuzz(4 * EACH, 8, CPU, small=True))
    assert list(fuzz(4 * EACH, 8, CPU, small=True, jobs=2)) == alone


def test_what_is_wrong_is_found(monkeypatch):
    run = fuzzing.run_poisoned

    def broken(case, *arguments, **options):
        if case.tokens == 1:
            raise RuntimeError("a kernel failed\nat length")
        out, error = run(case, *arguments, **options)
        return out, error if case.tokens < 40 else 1.0

    monkeypatch.setattr(fuzzing, "run_poisoned", broken)
    outcomes = list(fuzz(6 * EACH, 1, CPU, small=True))
    for outcome in outcomes:
        assert outcome.ok == (outcome.case.tokens not in (1, 40))
        assert (
            (outcome.error is None) == (outcome.case.tokens == 1) == (outcome.detail == "RuntimeError: a kernel failed")
        )
    assert {outcome.ok for outcome in outcomes} == {True, False}


def _die(work):
    os._exit(1)


def test_a_process_that_dies_is_an_outcome(monkeypatch):
    monkeypatch.setattr(fuzzing, "_layer", _die)
    outcomes = list(fuzz(2 * EACH, 1, CPU, small=True, jobs=2))
    assert [outcome.ok for outcome in outcomes] == [False, False]
    assert all("BrokenProcessPool" in outcome.detail for outcome in outcomes)


def test_layers_are_of_every_kind():
    chooser = random.Random(0)
    layers = [draw_layer(chooser) for _ in range(400)]
    assert len({form.scheme for layer in layers for form in layer.formats if form}) == 11
    assert {layer.dtype for layer in layers} == {"float32", "float16", "bfloat16"}
    assert any(layer.formats == (None, None) for layer in layers)
    assert all(replace(layer, tokens=1) == layer.fitted() for layer in layers)
