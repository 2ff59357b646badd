"""Verify and time one layer: each backend, and other libraries, on the same arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedmoe import __version__, functional
from fusedmoe.bench.peers import PEERS, NotHereError
from fusedmoe.bench.routing import ROUTINGS, draw_routing
from fusedmoe.bench.shapes import ACTIVATION, Shape, format_for
from fusedmoe.bench.timing import host_us, time_captured, time_us
from fusedmoe.checks import check
from fusedmoe.errors import UnsupportedError
from fusedmoe.expert_matrix import ExpertMatrix
from fusedmoe.plan.config import KernelConfig, Plan
from fusedmoe.plan.floor import Ceilings, floor_of, types_of
from fusedmoe.plan.planner import choose, support
from fusedmoe.settings import settings
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.format import Format
from fusedmoe.spec.layout import GateUpLayout
from fusedmoe.spec.problem import Problem
from fusedmoe.target import Target, target_of
from fusedmoe.testing.cases import empty_matrix, random_matrix
from fusedmoe.testing.verify import Verdict, verify

#: Above so many tokens a GPU works longer than its host, whose time then does not matter.
HOST_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement. ``us``, ``tflops`` and ``times_floor`` are None when the result was wrong or there was none.

    Attributes:
        scheme, format: of both expert matrices; None when they are of type ``dtype``.
        activation, gate_up_layout, bias: of the layer.
        routing: by which law the experts were drawn.
        backend: which of ours, or the name of a peer.
        library: whose layer it is, with its version.
        graph: a CUDA graph was replayed; False: launched anew each time; None where there is none to replay.
        host_us: until a call outside of a graph returns to the host, up to :data:`HOST_TOKENS` tokens on a GPU.
        floor_us: see :mod:`fusedmoe.plan.floor`.
        times_floor: us / floor_us.
        distinct: distinct experts among the ids: their weights have to be read.
        weight_bytes: of the distinct experts.
        flops: of the two products, 2 per multiply-add.
        multiplied_as: types of the operands of the two products, which say whose rate is in the floor.
        error, tolerance: relative error against the reference, and its bound; None when there was no result.
        config: what the kernels were launched with.
        reason: why there is no figure, other than a wrong result of ours.
        batch_invariant: the option of that name, of our own backends.
    """

    shape: str
    tokens: int
    dtype: str
    scheme: str | None
    format: str | None
    activation: str
    gate_up_layout: str | None
    bias: bool
    routing: str
    backend: str
    library: str
    us: float | None
    tflops: float | None
    graph: bool | None
    host_us: float | None
    floor_us: float
    times_floor: float | None
    distinct: int
    weight_bytes: float
    flops: int
    multiplied_as: tuple[str, ...]
    error: float | None
    tolerance: float | None
    config: str
    reason: str | None
    batch_invariant: bool = False

    @property
    def ok(self) -> bool:
        """The result was right."""
        return self.us is not None

    @property
    def wrong(self) -> bool:
        """A result of ours was wrong."""
        return self.us is None and self.reason is None


class Layer(NamedTuple):
    """A random layer.

    Attributes:
        options: of :func:`fusedmoe.fused_experts`.
        generator: of its tokens, on its device.
    """

    shape: Shape
    dtype: torch.dtype
    w13: Tensor | ExpertMatrix
    w2: Tensor | ExpertMatrix
    options: dict[str, Any]
    generator: torch.Generator

    def call(self, tokens: int, routing: str = ROUTINGS[0]) -> tuple[Any, ...]:
        """Arguments of :func:`fusedmoe.fused_experts` with new random tokens."""
        shape, generator = self.shape, self.generator
        topk_weights, topk_ids = draw_routing(routing, tokens, shape.experts, shape.top_k, generator)
        x = torch.empty(tokens, shape.hidden, dtype=self.dtype, device=generator.device).normal_(generator=generator)
        return x, self.w13, self.w2, topk_weights, topk_ids


def draw_layer(
    shape: Shape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    scheme: str = "none",
    activation: str = ACTIVATION,
    gate_up_layout: GateUpLayout = "concatenated",
    bias: bool = False,
    values: bool = True,
) -> Layer:
    """A random layer of a shape, the same in every run; arguments as those of :func:`bench`.

    ``values`` False: its weights are whatever is in memory that was not touched, for who does not run it.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, fan_in: int = 1) -> Tensor:
        empty = torch.empty(sizes, dtype=dtype, device=device)
        return empty.normal_(0.0, fan_in**-0.5, generator=generator) if values else empty

    def draw_matrix(form: Format, sizes: tuple[int, int, int], parts: int = 1) -> ExpertMatrix:
        if not values:
            return empty_matrix(form, sizes, parts=parts, device=device)
        return random_matrix(form, sizes, generator, parts=parts)

    e, h, i = shape.experts, shape.hidden, shape.intermediate
    form = format_for(scheme, shape)
    w13: Tensor | ExpertMatrix
    w2: Tensor | ExpertMatrix
    parts = 2 if Activation.of(activation).gated else 1
    if form is None:
        w13, w2 = draw(e, parts * i, h, fan_in=h), draw(e, h, i, fan_in=i)
    else:
        w13 = draw_matrix(form, (e, parts * i, h), parts if gate_up_layout == "concatenated" else 1)
        w2 = draw_matrix(form, (e, h, i))
    options: dict[str, Any] = {"activation": activation}
    if parts == 2:
        options["gate_up_layout"] = gate_up_layout
    if bias:
        options |= {"w13_bias": draw(e, parts * i), "w2_bias": draw(e, h)}
    return Layer(shape, dtype, w13, w2, options, generator)


class _Case(NamedTuple):
    """What all rows of one draw share."""

    shape: Shape
    routing: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    problem: Problem
    target: Target
    ceilings: Ceilings

    def row(
        self,
        backend: str,
        library: str,
        *,
        verdict: Verdict | None = None,
        timed: tuple[float, bool | None] | None = None,
        host: float | None = None,
        config: str = "",
        reason: str | None = None,
    ) -> Row:
        """The row of one backend or peer."""
        problem = self.problem
        us, graph = (None, None) if timed is None else timed
        distinct = int(self.arguments[4].unique().numel())
        floor_us = floor_of(problem, self.target, self.ceilings, distinct=distinct).us
        return Row(
            shape=self.shape.name,
            tokens=problem.tokens,
            dtype=problem.dtype,
            scheme=None if problem.w13_format is None else problem.w13_format.scheme,
            format=None if problem.w13_format is None else str(problem.w13_format),
            activation=problem.activation.name,
            gate_up_layout=problem.gate_up if problem.activation.gated else None,
            bias="w13_bias" in self.options,
            routing=self.routing,
            backend=backend,
            library=library,
            us=us,
            tflops=None if us is None else problem.flops / us / 1e6,
            graph=graph,
            host_us=host,
            floor_us=floor_us,
            times_floor=None if us is None else us / floor_us,
            distinct=distinct,
            weight_bytes=distinct * problem.expert_bytes,
            flops=problem.flops,
            multiplied_as=tuple(dict.fromkeys(types_of(problem, self.target))),
            error=None if verdict is None else verdict.error,
            tolerance=None if verdict is None else verdict.tolerance,
            config=config,
            reason=reason,
            batch_invariant=problem.batch_invariant and library.startswith("fusedmoe"),
        )


def describe(plan: Plan) -> str:
    """The kernels of a plan on one line."""
    if plan.triton is None:
        return "one product per expert"

    path = "gathered" if plan.triton.gather else path_of(few=plan.triton.few, gate_up=plan.triton.gate_up)
    return f"{path}; gate-up {describe_tile(plan.triton.gate_up)}; down {describe_tile(plan.triton.down)}"


def path_of(*, few: bool, gate_up: KernelConfig) -> str:
    """How programs find their rows."""
    return "single rows" if gate_up.block_m == 1 else "few tokens" if few else "scheduled"


def describe_tile(config: KernelConfig) -> str:
    """What a GEMM is launched with, without what is the default."""
    text = f"{config.block_m}x{config.block_n}x{config.block_k} warps={config.warps} stages={config.stages}"
    text += f" group_m={config.group_m}" if config.group_m > 1 else ""
    text += f" maps={config.maps}" if config.maps != "none" else ""
    text += f" programs_per_sm={config.programs_per_sm}" if config.programs_per_sm else ""
    flags = ("flatten", "swap", "pairs", "words", "scale_weights", "specialised")
    return " ".join([text, *(flag for flag in flags if getattr(config, flag))])


@torch.no_grad()
def bench(
    shape: Shape,
    tokens: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    scheme: str = "none",
    activation: str = ACTIVATION,
    gate_up_layout: GateUpLayout = "concatenated",
    bias: bool = False,
    backends: Sequence[str | None] = (None,),
    routings: Sequence[str] = ("uniform",),
    peers: Sequence[str] = (),
    batch_invariant: bool = False,
) -> Iterator[Row]:
    """Verify and time the layer of one shape: every routing, number of tokens and backend.

    Args:
        shape, tokens, dtype, scheme: the layer and its calls.
        activation, gate_up_layout, bias: as :func:`fusedmoe.fused_experts` has them.
        device: where.
        ceilings: of the device, for the floor.
        backends: of ours, in this order; None: as the process is set. One that does not take a call gives a row that
            says why, unless it is the only one.
        routings: laws by which experts are drawn, of :data:`fusedmoe.bench.routing.ROUTINGS`.
        peers: other libraries, of :data:`fusedmoe.bench.peers.PEERS`; one that cannot be run gives a row that says why.
            They are given no layer but the plainest.
        batch_invariant: the option of :func:`fusedmoe.fused_experts`.

    Raises:
        UnsupportedError, OptionError: the only backend does not take the call, or one does not exist.
    """
    layer = draw_layer(
        shape,
        dtype=dtype,
        device=device,
        scheme=scheme,
        activation=activation,
        gate_up_layout=gate_up_layout,
        bias=bias,
    )
    options = layer.options
    for routing, n_tokens in ((routing, n) for routing in routings for n in tokens):
        arguments = layer.call(n_tokens, routing)
        problem = check(*arguments, batch_invariant=batch_invariant or None, **options).problem
        case = _Case(shape, routing, arguments, options, problem, target_of(device), ceilings)
        for backend in backends:
            yield _measure(case, backend, alone=len(backends) == 1)
        for peer in peers:
            yield _measure_peer(case, peer)


def _measure(case: _Case, backend: str | None, *, alone: bool) -> Row:
    """One of our backends."""
    arguments, options, library = case.arguments, case.options, f"fusedmoe {__version__}"
    try:
        plan = choose(case.problem, case.target, backend)
    except UnsupportedError as cause:
        if alone:
            raise
        name = settings().backend if backend is None else backend
        reasons = support(case.problem, case.target).get(name) or (str(cause),)
        return case.row(name, library, reason="; ".join(reasons))
    how: dict[str, Any] = {**options, "backend": backend, "batch_invariant": case.problem.batch_invariant}
    n_bytes = functional.workspace_bytes(*arguments, **how)
    out, workspace = (
        torch.empty_like(arguments[0]),
        torch.empty(n_bytes, dtype=torch.uint8, device=arguments[0].device),
    )

    def call() -> Tensor:
        return functional.fused_experts(*arguments, out=out, workspace=workspace, **how)

    out.fill_(float("nan"))
    workspace.fill_(255)
    verdict, timed, host = verify(call(), arguments, options), None, None
    if verdict.ok:
        graph = plan.backend != "torch"
        timed = (
            time_us(call, out.device, graph=graph),
            graph if out.device.type == "cuda" else None,
        )
        host = _host_us(case, lambda: functional.fused_experts(*arguments, **how))
    return case.row(plan.backend, library, verdict=verdict, timed=timed, host=host, config=describe(plan))


def _host_us(case: _Case, call: Callable[[], object]) -> float | None:
    device = case.arguments[0].device
    return host_us(call, device) if device.type == "cuda" and case.problem.tokens <= HOST_TOKENS else None


def _measure_peer(case: _Case, name: str) -> Row:
    """Another library; whatever keeps it from a right result is the reason in its row."""
    peer, verdict = PEERS[name], None
    if case.problem.w13_format is not None:
        return case.row(name, peer.version, reason="it is compared on experts that are not quantised")
    if (*case.options.values(),) not in ((ACTIVATION,), (ACTIVATION, "concatenated")):
        return case.row(name, peer.version, reason=f"it is compared on {ACTIVATION} without biases")
    try:
        call = peer.prepare(*case.arguments)
        verdict = verify(call(), case.arguments, {})
        if not verdict.ok:
            reason = f"wrong: error {verdict.error:.1e} > {verdict.tolerance:.1e}"
            return case.row(name, peer.version, verdict=verdict, reason=reason)
        timed = time_captured(call, case.arguments[0].device)
        host = _host_us(case, call)
    except NotHereError as cause:
        return case.row(name, peer.version, reason=str(cause))
    except Exception as cause:  # noqa: BLE001 - how another library fails is its result, and others may work
        said = (str(cause).splitlines() or [""])[0]
        return case.row(name, peer.version, verdict=verdict, reason=f"{type(cause).__name__}: {said}")
    return case.row(name, peer.version, verdict=verdict, timed=timed, host=host)
