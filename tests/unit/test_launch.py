"""Launches that are kept and launched again, with kernels that only say what they got."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fusedmoe.backends import launch as launches
from fusedmoe.backends.launch import Tape, launch, tape_for

pytest.importorskip("triton")


class Pair(NamedTuple):
    pointer: Any
    stride: int


class Kernel:
    """A compiled kernel reads the addresses of its tensors, as Triton's launcher does."""

    arg_names = ("x", "out", "n", "BLOCK")

    def __init__(self, compiled: bool = True) -> None:
        self.launched: list[Any] = []
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            read = lambda v: v.data_ptr() if hasattr(v, "data_ptr") else v  # noqa: E731
            values = {**dict(zip(self.arg_names, args, strict=False)), **named}
            x = values["x"]
            x = Pair(read(x.pointer), x.stride) if isinstance(x, Pair) else read(x)
            self.launched.append((grid, x, read(values["out"]), values["n"], values["BLOCK"]))
            return self if self.compiled else None

        return run

    function, packed_metadata = 77, (4, 1)

    def run(self, *launch: Any) -> None:
        """As Triton's launcher, which takes numbers as addresses without a question."""

        def plain(value: Any) -> bool:
            return all(map(plain, value)) if isinstance(value, tuple) else not hasattr(value, "data_ptr")

        assert plain(launch)
        *grid, stream, function, packed, told, enter, leave = launch[:9]
        assert (stream, function, packed, told, enter, leave) == (0, 77, (4, 1), None, None, None)
        self[tuple(grid)](*launch[9:])


def record(tape: Tape, sources: list[torch.Tensor], *tensors: torch.Tensor, kernel: Kernel | None = None) -> Kernel:
    kernel = kernel or Kernel()
    with tape.record(sources, 7):
        for tensor in tensors:
            launch(kernel, (3,), Pair(tensor, 5), sources[-1], 11, BLOCK=16, num_warps=4)
    return kernel


def test_a_replay_launches_the_same_on_other_addresses():
    a, b, c, d = (torch.zeros(64) for _ in range(4))
    tape = Tape()
    kernel = record(tape, [a, b], a[8:], a)
    assert tape.whole and tape.n_bytes == 7
    assert kernel.launched.pop(0) == ((3,), Pair(a.data_ptr() + 32, 5), b.data_ptr(), 11, 16)
    assert kernel.launched.pop(0) == ((3,), Pair(a.data_ptr(), 5), b.data_ptr(), 11, 16)
    tape.replay([c, d])
    assert kernel.launched.pop(0) == ((3, 1, 1), Pair(c.data_ptr() + 32, 5), d.data_ptr(), 11, 16)
    assert kernel.launched.pop(0) == ((3, 1, 1), Pair(c.data_ptr(), 5), d.data_ptr(), 11, 16)
    assert not kernel.launched


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launches_that_are_watched_go_the_way_that_tells_the_hooks(monkeypatch, name):
    from triton import knobs

    a, b = torch.zeros(64), torch.zeros(64)
    tape = Tape()
    kernel = record(tape, [a, b], a)
    ways = []
    monkeypatch.setattr(kernel, "run", lambda *launch: ways.append("bare"), raising=False)
    tape.replay([a, b])
    hook = getattr(knobs.runtime, name)
    hook.add(len)
    try:
        tape.replay([a, b])
    finally:
        hook.remove(len)
    tape.replay([a, b])
    assert ways == ["bare", "bare"] and len(kernel.launched) == 2  # the record, and the one that was watched


def test_a_tape_holds_no_tensor():
    import gc
    import weakref

    a, b = torch.zeros(64), torch.zeros(64)
    tape = Tape()
    record(tape, [a, b], a[8:])
    gone = weakref.ref(a)
    del a
    gc.collect()
    assert tape.whole and gone() is None


@pytest.mark.parametrize(
    ("sources", "read"),
    [
        (lambda a: [a, torch.zeros(4)], lambda a: torch.zeros(64)),  # none of the call's
        (lambda a: [a, a], lambda a: a),  # of two
        (lambda a: [a[:32], a[16:]], lambda a: a[16:24]),  # where two overlap
        (lambda a: [a[:32], torch.zeros(4)], lambda a: a[16:48]),  # out of the source
    ],
)
def test_what_no_tape_can_know_spoils_it(sources, read):
    a = torch.zeros(64)
    tape = Tape()
    record(tape, sources(a), read(a))
    assert tape.spoilt and not tape.whole


def test_a_tensor_map_is_made_of_the_address_of_the_replay():
    from triton.tools.tensor_descriptor import TensorDescriptor

    a, b, c, d = (torch.zeros(64, 64) for _ in range(4))
    kernel, tape = Kernel(), Tape()
    given = TensorDescriptor(a[16:], [48, 64], [64, 1], [16, 16])
    with tape.record([a, b], 0):
        launch(kernel, (1,), given, b, 1, BLOCK=1)
    assert tape.whole and given.base is not None
    for tensors in ((c, d), (b, a)):
        kernel.launched.clear()
        tape.replay(tensors)
        ((_, map_, out, *_),) = kernel.launched
        assert (map_.base.data_ptr(), out) == (tensors[0].data_ptr() + 16 * 64 * 4, tensors[1].data_ptr())
        assert (map_.shape, map_.strides, map_.block_shape) == (given.shape, given.strides, given.block_shape)
    assert given.base.data_ptr() == a.data_ptr() + 16 * 64 * 4  # the caller's is its own


def test_interpreted_kernels_spoil_it():
    a = torch.zeros(64)
    tape = Tape()
    record(tape, [a], a, kernel=Kernel(compiled=False))
    assert tape.spoilt


@pytest.mark.parametrize(
    ("work", "spoils"),
    [
        (lambda a: a.add_(1), True),
        (lambda a: a + 1, True),
        (lambda a: a.copy_(a.clone()), True),
        (lambda a: torch.empty(3), True),
        (lambda a: a[3:].view(torch.int32).view(61), False),
    ],
)
def test_only_views_are_made_beside_launches(work, spoils):
    a = torch.zeros(64)
    tape = Tape()
    with tape.record([a], 0):
        work(a)
    assert tape.spoilt == spoils


def test_a_call_that_fails_leaves_no_tape():
    a = torch.zeros(64)
    tape = Tape()
    with pytest.raises(ZeroDivisionError), tape.record([a], 0):
        raise ZeroDivisionError
    assert not tape.whole and launches._LOCAL.recording is None


def test_tapes_are_of_tensors_alike_in_all_but_the_address():
    base = torch.zeros(256)
    tape = tape_for("layer", [base[:64]])
    assert tape_for("layer", [torch.zeros(64)]) is tape
    for other in (base[:32], base[:128:2], base[1:65], base[:64].view(torch.int32), base[:64].view(8, 8)):
        assert tape_for("layer", [other]) is not tape
    assert tape_for("another layer", [base[:64]]) is not tape


def test_the_least_used_tape_goes(monkeypatch):
    monkeypatch.setattr(launches, "KEPT", 2)
    launches._LOCAL.tapes.clear()
    a = torch.zeros(1)
    first, second = tape_for(1, [a]), tape_for(2, [a])
    assert tape_for(1, [a]) is first
    tape_for(3, [a])
    assert tape_for(1, [a]) is first and tape_for(2, [a]) is not second


def test_threads_share_no_tape():
    import threading

    a, others = torch.zeros(1), []
    mine = tape_for("layer", [a])
    thread = threading.Thread(target=lambda: others.append(tape_for("layer", [a])))
    thread.start()
    thread.join()
    assert others[0] is not mine
