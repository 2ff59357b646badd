"""Time the layer at the sizes of known models, beside the floor that the device sets.

How: the whole call, from ids to output; weights, hidden states and routing random (each token's experts distinct and
uniform). On a GPU a CUDA graph is replayed, with 256 MB written between replays so that the L2 cache is cold; the
figure is the median. Before it is timed a call is verified, with NaN in the output and the workspace beforehand: what
is wrong is reported as an error and gets no figure. Weights of a scheme are random codes with random scales.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedmoe import functional
from fusedmoe.checks import check
from fusedmoe.errors import OptionError, explain
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.numerics import encode
from fusedmoe.plan.config import KernelConfig, Plan
from fusedmoe.plan.floor import Ceilings, floor_of
from fusedmoe.plan.planner import choose
from fusedmoe.schemes import SCHEMES, format_of, granularity_of
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import ELEMENTS, Format
from fusedmoe.spec.layout import WeightLayout
from fusedmoe.spec.problem import Problem
from fusedmoe.target import target_of
from fusedmoe.testing.cases import random_matrix, storage_of
from fusedmoe.testing.verify import true_float32, verify

#: Bytes written between two replays: more than any L2 cache holds.
FLUSH = 256 << 20
#: Measurements a figure is the median of, and the time in microseconds that they may take together.
REPEATS, PATIENCE_US = 25, 2e6
#: Before that, work until the clocks are up.
WARM_UP_S = 0.2

TOKENS: tuple[int, ...] = (1, 8, 32, 128, 512, 2048, 8192, 32768)
#: What a CPU can do in about as much time.
TOKENS_CPU: tuple[int, ...] = (1, 8, 32, 128)

#: What stands for no scheme.
UNQUANTISED = ("none", "bf16")

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int


#: dsv3-ep8 is one rank's share of the experts as a layer of its own, dsv3-tp8 one rank's share of each expert.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral-8x7b", 8, 2, 4096, 14336),
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
        Shape("dsv3-ep8", 32, 8, 7168, 2048),
        Shape("dsv3-tp8", 256, 8, 7168, 256),
        Shape("gpt-oss-120b", 128, 4, 2880, 2880),
    )
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. ``us``, ``tflops`` and ``times_floor`` are None when the result was wrong.

    Attributes:
        scheme, format: of both expert matrices; None when they are of type ``dtype``.
        distinct: distinct experts among the ids: their weights have to be read.
        floor_us: see :mod:`fusedmoe.plan.floor`.
        times_floor: us / floor_us.
        error, tolerance: relative error against the reference, and its bound.
        config: what the kernels were launched with.
    """

    shape: str
    tokens: int
    dtype: str
    scheme: str | None
    format: str | None
    backend: str
    us: float | None
    tflops: float | None
    floor_us: float
    times_floor: float | None
    distinct: int
    error: float
    tolerance: float
    config: str

    @property
    def ok(self) -> bool:
        """The result was right."""
        return self.us is not None


def shape_of(text: str) -> Shape:
    """A known shape by name, or sizes as "E,top_k,H,I".

    Raises:
        OptionError: neither.

    >>> shape_of("8,2,64,96")
    Shape(name='8,2,64,96', experts=8, top_k=2, hidden=64, intermediate=96)
    """
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split(",")
    if len(sizes) == 4 and all(size.strip().isdecimal() and int(size) for size in sizes):
        experts, top_k, hidden, intermediate = map(int, sizes)
        if top_k <= experts:
            return Shape(text, experts, top_k, hidden, intermediate)
    raise OptionError(
        explain(
            "shape",
            got=repr(text),
            wanted=f"{', '.join(SHAPES)}, or E,top_k,H,I with top_k <= E",
            do="Write for example 64,8,2048,1024.",
        )
    )


def dtype_of(text: str) -> torch.dtype:
    """A type of the layer by name.

    Raises:
        OptionError: no such type.
    """
    if text not in DTYPES:
        raise OptionError(explain("dtype", got=repr(text), wanted=" or ".join(DTYPES), do="Choose one of them."))
    return DTYPES[text]


def format_for(scheme: str, shape: Shape) -> Format | None:
    """The format of a scheme for a shape: its default, or with the largest group that divides H and I. None: "none".

    Raises:
        OptionError: no such scheme, or none of its groups divides both.
    """
    if scheme in UNQUANTISED:
        return None
    form = format_of(scheme)
    if granularity_of(form.block) == "group":
        groups = [n for n in SCHEMES[scheme].groups if shape.hidden % n == shape.intermediate % n == 0]
        if not groups:
            raise OptionError(
                explain(
                    f"scheme {scheme!r} for shape {shape.name}",
                    got=f"H {shape.hidden}, I {shape.intermediate}",
                    wanted=f"multiples of {' or '.join(map(str, SCHEMES[scheme].groups))}",
                    do="Choose another scheme.",
                )
            )
        form = format_of(scheme, group=max(groups))
    return form


def problem_of(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    weight_layout: WeightLayout = "NK",
    form: Format | None = None,
) -> Problem:
    """The problem that a call of these sizes poses; its tensors exist in name only.

    Raises:
        OptionError: unknown activation or layout.
    """
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    rows = i * (2 if Activation.of(activation).gated else 1)

    def tensor(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def matrix(n: int, k: int, parts: int = 1) -> Tensor | ExpertMatrix:
        if form is None:
            return tensor(*((e, k, n) if weight_layout == "KN" else (e, n, k)))
        storage = storage_of(form, (e, n, k), parts)
        tensors: dict[str, Any] = {name: tensor(*sizes, dtype=kind) for name, (sizes, kind) in storage.items()}
        return ExpertMatrix(form, **tensors, parts=parts)

    return check(
        tensor(tokens, h),
        matrix(rows, h, parts=rows // i),
        matrix(h, i),
        tensor(tokens, shape.top_k, dtype=torch.float32),
        tensor(tokens, shape.top_k, dtype=torch.int32),
        activation=activation,
        weight_layout=weight_layout,
    ).problem


def default_device() -> torch.device:
    """The first GPU of this machine, else its CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("xpu", torch.xpu.current_device()) if torch.xpu.is_available() else torch.device("cpu")


def time_us(call: Callable[[], object], device: torch.device, *, graph: bool = True) -> float:
    """Median time of a call in microseconds.

    Args:
        call: does its work on the current stream; called once or more before it is timed.
        device: where it works.
        graph: on CUDA, replay a graph of the call. Without, the call's launches and synchronisations are in the figure.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _time_cuda(call, graph=graph)

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "xpu":
            torch.xpu.synchronize(device)
        return (time.perf_counter() - start) * 1e6

    once()
    return statistics.median(once() for _ in range(_repeats(once())))


def _repeats(us: float) -> int:
    return max(3, min(REPEATS, int(PATIENCE_US / max(us, 1.0))))


def _time_cuda(call: Callable[[], object], *, graph: bool) -> float:
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
        warm = time.perf_counter() + WARM_UP_S
        while time.perf_counter() < warm:
            for _ in range(100):
                flush.zero_()
            stream.synchronize()
        return measure(_repeats(measure(2)))


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


def describe(plan: Plan) -> str:
    """The kernels of a plan on one line."""
    if plan.triton is None:
        return "one product per expert"

    def tile(config: KernelConfig) -> str:
        text = f"{config.block_m}x{config.block_n}x{config.block_k} warps={config.warps} stages={config.stages}"
        text += f" group_m={config.group_m}" if config.group_m > 1 else ""
        text += f" maps={config.maps}" if config.maps != "none" else ""
        text += f" programs_per_sm={config.programs_per_sm}" if config.programs_per_sm else ""
        return text + (" flatten" if config.flatten else "")

    path = "few tokens" if plan.triton.few else "gathered" if plan.triton.gather else "scheduled"
    return f"{path}; gate-up {tile(plan.triton.gate_up)}; down {tile(plan.triton.down)}"


@torch.no_grad()
def bench(
    shape: Shape,
    tokens: Iterable[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    backend: str | None = None,
    scheme: str = "none",
) -> Iterator[Row]:
    """Verify and time the layer of one shape, one row per number of tokens; activation silu.

    Raises:
        UnsupportedError, OptionError: the backend does not take the call, or does not exist.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, fan_in: int = 1) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_(0.0, fan_in**-0.5, generator=generator)

    e, h, i = shape.experts, shape.hidden, shape.intermediate
    form = format_for(scheme, shape)
    w13: Tensor | ExpertMatrix
    w2: Tensor | ExpertMatrix
    if form is None:
        w13, w2 = draw(e, 2 * i, h, fan_in=h), draw(e, h, i, fan_in=i)
    else:
        w13 = random_matrix(form, (e, 2 * i, h), generator, parts=2)
        w2 = random_matrix(form, (e, h, i), generator)
    for n_tokens in tokens:
        scores = torch.rand(n_tokens, e, device=device, generator=generator)
        topk_weights, topk_ids = torch.softmax(scores, 1).topk(shape.top_k, dim=1)
        arguments = (draw(n_tokens, h), w13, w2, topk_weights, topk_ids.int())
        yield _measure(shape, arguments, ceilings, backend)


def _measure(shape: Shape, arguments: tuple[Any, ...], ceilings: Ceilings, backend: str | None) -> Row:
    x, topk_ids = arguments[0], arguments[4]
    problem = check(*arguments).problem
    target = target_of(x.device)
    plan = choose(problem, target, backend)
    n_bytes = functional.workspace_bytes(*arguments, backend=backend)
    out, workspace = torch.empty_like(x), torch.empty(n_bytes, dtype=torch.uint8, device=x.device)

    def call() -> Tensor:
        return functional.fused_experts(*arguments, backend=backend, out=out, workspace=workspace)

    out.fill_(float("nan"))
    workspace.fill_(255)
    verdict = verify(call(), arguments, {})
    distinct = int(topk_ids.unique().numel())
    floor_us = floor_of(problem, target, ceilings, distinct=distinct).us
    us = time_us(call, x.device, graph=plan.backend != "torch") if verdict.ok else None
    return Row(
        shape=shape.name,
        tokens=problem.tokens,
        dtype=problem.dtype,
        scheme=None if problem.w13_format is None else problem.w13_format.scheme,
        format=None if problem.w13_format is None else str(problem.w13_format),
        backend=plan.backend,
        us=us,
        tflops=None if us is None else problem.flops / us / 1e6,
        floor_us=floor_us,
        times_floor=None if us is None else us / floor_us,
        distinct=distinct,
        error=verdict.error,
        tolerance=verdict.tolerance,
        config=describe(plan),
    )


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Figures of another library, to be printed beside ours: (shape, tokens) -> microseconds; scheme as in Row."""

    name: str
    device: str
    dtype: str
    scheme: str | None
    source: str
    us: dict[tuple[str, int], float]


def read_peer(path: str | os.PathLike[str]) -> Peer:
    """Read a file as in ``benchmarks/peers``.

    Raises:
        OptionError: it cannot be read, or has another form.
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        us = {(str(s), int(t)): float(v) for s, row in data["us"].items() for t, v in row.items()}
        scheme = None if data["scheme"] is None else format_of(str(data["scheme"])).scheme
        return Peer(**{key: str(data[key]) for key in ("name", "device", "dtype", "source")}, scheme=scheme, us=us)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        raise OptionError(
            explain(
                f"figures of a peer in {os.fspath(path)}",
                got=f"{type(cause).__name__}: {cause}",
                wanted='JSON with "name", "device", "dtype", "scheme" (or null), "source" and '
                '"us": {shape: {tokens: microseconds}}',
                do="See the files in benchmarks/peers.",
            )
        ) from cause
