"""Time a call, and measure what the floor is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fusedmoe.numerics import encode
from fusedmoe.plan.floor import Ceilings
from fusedmoe.spec.format import ELEMENTS
from fusedmoe.testing.verify import true_float32

#: Bytes written between two replays: more than any L2 cache holds.
FLUSH = 256 << 20
#: Measurements a figure is the median of, and the time in microseconds that they may take together.
REPEATS, PATIENCE_US = 25, 2e6
#: Before that, work until the clocks are up.
WARM_UP_S = 0.2


def time_us(
    call: Callable[[], object],
    device: torch.device,
    *,
    graph: bool = True,
    repeats: int = REPEATS,
    patience_us: float = PATIENCE_US,
    warm_up_s: float = WARM_UP_S,
) -> float:
    """Median time of a call in microseconds.

    Args:
        call: does its work on the current stream; called once or more before it is timed.
        device: where it works.
        graph: on CUDA, replay a graph of the call. Without, the call's launches and synchronisations are in the figure.
        repeats, patience_us: measurements at most, and the time that they may take together.
        warm_up_s: seconds of work before them, on CUDA.
    """

    def often(us: float) -> int:
        return max(3, min(repeats, int(patience_us / max(us, 1.0))))

    if device.type == "cuda":
        with torch.cuda.device(device):
            return _time_cuda(call, often, warm_up_s, graph=graph)

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "xpu":
            torch.xpu.synchronize(device)
        return (time.perf_counter() - start) * 1e6

    once()
    return statistics.median(once() for _ in range(often(once())))


def host_us(call: Callable[[], object], device: torch.device) -> float:
    """Median time in microseconds until a call returns to an idle device: until its last launch is queued."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    once()
    return statistics.median(once() for _ in range(_repeats(once())))


def time_captured(call: Callable[[], object], device: torch.device) -> tuple[float, bool | None]:
    """Median time of a call in microseconds, and whether a CUDA graph was replayed; None where there is no CUDA."""
    if device.type != "cuda":
        return time_us(call, device), None
    try:
        return time_us(call, device), True
    except RuntimeError:
        torch.cuda.synchronize(device)
        return time_us(call, device, graph=False), False


def _repeats(us: float) -> int:
    return max(3, min(REPEATS, int(PATIENCE_US / max(us, 1.0))))


def _time_cuda(call: Callable[[], object], often: Callable[[float], int], warm_up_s: float, *, graph: bool) -> float:
    stream, flush = torch.cuda.Stream(), torch.empty(FLUSH, dtype=torch.uint8, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        stream.synchronize()
        work = call
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured, stream=stream):
                call()
            work = captured.replay

        def measure(repeats: int) -> float:
            start, end = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
            for before, after in zip(start, end, strict=True):
                flush.zero_()
                before.record(stream)
                work()
                after.record(stream)
            stream.synchronize()
            return statistics.median(1e3 * float(a.elapsed_time(b)) for a, b in zip(start, end, strict=True))

        # Clocks rise under any load, and fall again when a GPU at full power has spent its budget: streaming memory
        # warms up for the first without bringing on the second.
        warm = time.perf_counter() + warm_up_s
        while time.perf_counter() < warm:
            for _ in range(100):
                flush.zero_()
            stream.synchronize()
        return measure(often(measure(2)))


@torch.no_grad()
def measure_ceilings(device: torch.device, types: Iterable[str]) -> Ceilings:
    """Measure what the floor is made of: a large copy, large matrix products on random data, an empty launch.

    Args:
        device: where.
        types: types of operands to multiply, see :class:`fusedmoe.plan.floor.Ceilings`.
    """
    on_gpu = device.type != "cpu"
    n_bytes, side = (2 << 30, 8192) if on_gpu else (128 << 20, 1024)
    if device.type == "cuda":  # leave room for whatever else is there
        n_bytes = min(n_bytes, torch.cuda.mem_get_info(device)[0] // 8)
    copy_us = _copy_us(n_bytes, device)
    rates = {kind: _tflops(kind, side, device) for kind in sorted(set(types))}
    one = torch.zeros(1, device=device)
    return Ceilings(
        bandwidth_gbps=2 * n_bytes / copy_us / 1e3,
        tflops={kind: rate for kind, rate in rates.items() if rate is not None},
        launch_us=time_us(lambda: one.add_(1), device),
    )


def _tflops(kind: str, side: int, device: torch.device) -> float | None:
    """Rate of a product of side^3; None where PyTorch has none of this type on the device that is made for speed."""
    if device.type == "cpu" and kind.startswith("e4m3"):
        return None  # there is one: a loop, seconds for a product that takes int8 milliseconds
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    one = torch.ones(1, device=device)
    if kind in ELEMENTS:
        a, b = (encode(matrix * (ELEMENTS[kind].largest / 4), kind) for matrix in (a, b))
    else:
        a, b = a.to(getattr(torch, kind)), b.to(getattr(torch, kind))

    def product() -> Tensor:
        if kind == "int8":
            return torch._int_mm(a, b.T)
        if kind in ELEMENTS:
            return torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return torch.mm(a, b.T)

    try:
        with true_float32():
            return 2 * side**3 / time_us(product, device) / 1e6
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def _copy_us(n_bytes: int, device: torch.device) -> float:
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Without a graph: as a node of one, a copy runs on the copy engines, well below what a kernel reaches.
    return time_us(lambda: target.copy_(source), device, graph=False)
