"""What warmup looks at, and what it leaves as it was."""

from __future__ import annotations

import threading

import pytest
import torch

import fusedmoe
from fusedmoe import experts
from fusedmoe.backends import launch as launches
from fusedmoe.backends.launch import launch, launching, only_compiling
from fusedmoe.errors import DTypeError, OptionError


class Kernel:
    """Compiles to a name of the power of two below n, as kernels are that depend on the number of tokens."""

    def __init__(self) -> None:
        self.variants: dict[int, object] = {}
        self.launched = self.loaded = 0

    def warmup(self, n: int, grid: tuple[int, ...]) -> object:
        kernel = self

        class Compiled:
            def __getitem__(self, grid: tuple[int, int, int]) -> None:
                kernel.loaded += 1

        return self.variants.setdefault(n.bit_length(), Compiled())

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.launched += 1
        return lambda *_, **__: None


@pytest.mark.parametrize("most", [1, 2, 15, 16, 17, 100, 4095, 4096, 5000, 100_000])
def test_every_variant_is_found_loaded_and_not_launched(most):
    kernel = Kernel()
    report = fusedmoe.warmup(lambda n: launch(kernel, (1,), n), most)
    assert report.variants == len(kernel.variants) == most.bit_length()
    assert kernel.loaded == report.tokens and not kernel.launched
    assert report.tokens < 64 * most.bit_length()
    launch(kernel, (1,), 3)
    assert kernel.launched == 1


@pytest.mark.parametrize("first", [3, 33, 700, 4097])
def test_a_variant_of_few_numbers_is_found(first):
    """From one number of tokens to twice as many at most, whatever the others do."""
    kernel = Kernel()
    seen = set()

    def call(n: int) -> None:
        seen.add(n)
        launch(kernel, (1,), 1 << 40 if first <= n < first + max(1, first // 4) else 1)

    assert fusedmoe.warmup(call, 10_000).variants == 2
    assert {first - 1, first} <= seen  # the very edge


def test_the_numbers_that_are_given_are_those():
    seen = set()
    assert fusedmoe.warmup(seen.add, [7, 300, 7]).tokens == 2
    assert seen == {7, 300}


def test_threads_are_as_the_caller_is():
    found = []

    def call(n: int) -> None:
        found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), launching()))

    with torch.no_grad():
        fusedmoe.warmup(call, 3)
    with torch.inference_mode():
        fusedmoe.warmup(call, 3)
    assert set(found[:3]) == {(False, False, False)} and set(found[3:]) == {(False, True, False)}
    assert launching()


def test_only_this_thread_compiles():
    kernel = Kernel()
    with only_compiling():
        other = threading.Thread(target=launch, args=(kernel, (1,), 3))
        other.start()
        other.join()
    assert kernel.launched == 1 and not kernel.variants


def test_a_failure_is_the_callers_and_leaves_nothing():
    with pytest.raises(ZeroDivisionError):
        fusedmoe.warmup(lambda n: 1 // 0, 10)
    with pytest.raises(ZeroDivisionError), only_compiling():
        raise ZeroDivisionError
    assert launching()


def test_calls_alike_are_neither_replayed_nor_kept(monkeypatch):
    monkeypatch.setattr(launches._LOCAL, "variants", [])
    meta = torch.zeros(3, 8, device="meta")
    assert experts.again((meta,), ()) == (None, None)


def test_a_layer_on_the_cpu_compiles_nothing():
    layer = fusedmoe.FusedExperts(4, 64, 48)
    x, topk = torch.randn(40, 64), fusedmoe.softmax_topk(torch.randn(40, 4), top_k=2, renormalize=True)
    with torch.no_grad():
        assert fusedmoe.warmup(lambda n: layer(x[:n], topk.weights[:n], topk.ids[:n]), 40).variants == 0


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ((3, 3), DTypeError, "call"),
        ((print, None), DTypeError, "tokens"),
        ((print, 2.5), DTypeError, "tokens"),
        ((print, [1, True]), DTypeError, "tokens"),
        ((print, ["1"]), DTypeError, "tokens"),
        ((print, 0), OptionError, "tokens"),
        ((print, [4, -1]), OptionError, "tokens"),
    ],
)
def test_what_is_refused(arguments, error, names):
    with pytest.raises(error, match=f"^{names}: got .*; wanted .*\\. .*"):
        fusedmoe.warmup(*arguments)


@pytest.mark.parametrize("threads", [0, -3, 1.5, "2"])
def test_threads_are_refused(threads):
    with pytest.raises(OptionError, match="^threads: got"):
        fusedmoe.warmup(print, 3, threads=threads)
