"""A quick self-test on one device: every capability once, on small random layers, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedmoe.checks import check
from fusedmoe.functional import fused_experts, workspace_bytes
from fusedmoe.plan.planner import support
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.spec.activation import REQUIRED, TABLE, Activation
from fusedmoe.target import Target, target_of
from fusedmoe.testing.cases import Case
from fusedmoe.testing.verify import verify


@dataclass(frozen=True, kw_only=True)
class Result:
    """One capability.

    Attributes:
        ok: the error keeps the tolerance, and what else the capability promises holds.
        error: relative error against the reference; None when the call raised.
        detail: what went wrong; empty when nothing did.
    """

    name: str
    ok: bool
    error: float | None
    tolerance: float | None
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class _Machine:
    """What is tested."""

    device: torch.device
    backend: str | None


class _Test(NamedTuple):
    """``run(machine, case, name)`` is what it comes to."""

    name: str
    run: Callable[[_Machine, Case, str], Result]
    machine: _Machine
    case: Case

    @property
    def launches(self) -> tuple[str | None, Case]:
        """What decides which kernels it launches."""
        return self.machine.backend, self.case


def selftest(device: torch.device, backend: str | None = None, jobs: int | None = None) -> Iterator[Result]:
    """Test every capability on a device, one result at a time; never raises for a capability that fails.

    On a GPU ``jobs`` processes (1: this one; None: see :func:`fusedmoe.backends.elsewhere.processes`) compile what the
    tests launch, which is most of a first run's time.
    """
    target = target_of(device)
    old = target.vendor == "nvidia" and target.capability < 80
    case = Case.of((33, 3, 8, 128, 96), dtype="float16" if old else "bfloat16")
    tests = list(_tests(_Machine(device=device, backend=backend), case))
    with ExitStack() as stack:
        compiled: dict[tuple[str | None, Case], Future[None]] = {}
        if device.type == "cuda" and jobs != 1 and backend != "torch":
            from fusedmoe.backends import elsewhere

            pool = elsewhere.processes(jobs)
            stack.callback(pool.shutdown, cancel_futures=True)
            for key in dict.fromkeys(test.launches for test in tests if test.machine.backend != "torch"):
                compiled[key] = pool.submit(_compile, target, *key)
        for test in tests:
            if test.launches in compiled:
                compiled[test.launches].exception()  # what could not be compiled there says so here
            try:
                with torch.no_grad():
                    yield test.run(test.machine, test.case, test.name)
            except Exception as error:  # noqa: BLE001 - a kernel that does not compile is a result, and others may work
                what = (str(error).strip().splitlines() or [""])[0]
                detail = f"{type(error).__name__}: {what}"
                yield Result(name=test.name, ok=False, error=None, tolerance=None, detail=detail)


def _compile(target: Target, backend: str | None, case: Case) -> None:
    """Compile what a test launches into Triton's cache on disk, in a process that never touches the device."""
    from fusedmoe.backends import elsewhere
    from fusedmoe.backends.launch import only_compiling

    torch.set_num_threads(1)
    arguments, options = case.draw(torch.device("cpu"))
    with torch.no_grad(), elsewhere.compiling_for(target), only_compiling():
        fused_experts(*arguments, backend=backend, **options)


def _tests(machine: _Machine, case: Case) -> Iterator[_Test]:
    few, many = (replace(case, tokens=n_tokens) for n_tokens in (3, 300))
    for name, variant in (*_variants(case), *_quantised(case)):
        yield _Test(name, _compare, machine, variant)
    if machine.backend in (None, "auto"):
        yield from _on_every_backend(machine, replace(case, tokens=600))
    yield _Test("no tokens", _no_tokens, machine, case)
    yield _Test("same bits again, few tokens", _same_bits, machine, few)
    yield _Test("same bits again, many tokens", _same_bits, machine, many)
    yield _Test("torch.compile", _compiled, machine, case)
    if machine.device.type == "cuda" and machine.backend != "torch":
        yield _Test("CUDA graph, few tokens", _graph, machine, few)
        yield _Test("CUDA graph, many tokens", _graph, machine, many)


def _variants(case: Case) -> Iterator[tuple[str, Case]]:
    for dtype in ("float32", "float16", "bfloat16"):
        yield dtype, replace(case, dtype=dtype)
    for name, (_, parameters) in TABLE.items():
        chosen = {parameter: 1.0 for parameter, default in parameters.items() if default is REQUIRED}
        if parameters.get("limit") is not None:
            chosen["limit"] = 0.5  # values are of order one: the default limit would clamp none
        yield f"activation {name}", replace(case, activation=Activation(name, **chosen))
    yield "activation silu with a limit", replace(case, activation=Activation("silu", limit=0.5))
    yield "gate and up interleaved", replace(case, gate_up_layout="interleaved")
    yield "experts stored [E, K, N]", replace(case, weight_layout="KN")
    yield "biases", replace(case, bias=True)
    yield "router weight on the input", replace(case, on_input=True, bias=True)
    yield "expert map", replace(case, mapped=True)
    yield "ids int32", replace(case, id_dtype="int32")
    yield "ids outside the experts", replace(case, ids="invalid")
    yield "an expert twice in a token", replace(case, ids="any", experts=2)
    yield "one expert takes all", replace(case, ids="one")
    yield "no expert takes any", replace(case, ids="absent")
    yield "one token", replace(case, tokens=1)
    yield "few tokens", replace(case, tokens=3)
    yield "many tokens", replace(case, tokens=300)
    yield "many experts", replace(case, experts=256, top_k=8, hidden=64, intermediate=32)
    yield "sizes that fit no tile", replace(case, tokens=37, hidden=97, intermediate=51)


def _quantised(case: Case) -> Iterator[tuple[str, Case]]:
    for scheme in SCHEMES:
        form = format_of(scheme)
        yield f"scheme {scheme}", replace(case, formats=(form, form)).fitted()
    form = next(form for form in map(format_of, SCHEMES) if form.inputs is not None)
    quantised = replace(case, formats=(form, form)).fitted()
    yield "hidden states as codes", replace(quantised, codes=True)
    yield "emulated products of codes", replace(quantised, emulate=True)


def _on_every_backend(machine: _Machine, case: Case) -> Iterator[_Test]:
    """What each backend that the planner may choose takes, since it chooses by the number of tokens."""
    quantised = [form for form in map(format_of, SCHEMES) if form.inputs is not None]
    target = target_of(machine.device)
    for variant in (case, *(replace(case, formats=(form, form)).fitted() for form in quantised)):
        arguments, options = variant.draw(machine.device)
        reasons = support(check(*arguments, **options).problem, target)
        for backend in (name for name, against in reasons.items() if not against):
            form = variant.formats[0]
            kind = variant.dtype if form is None else f"scheme {form.scheme}"
            yield _Test(f"backend {backend}, {kind}", _compare, replace(machine, backend=backend), variant)


def _run(machine: _Machine, arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """The call, with NaN in the output and the workspace beforehand."""
    n_bytes = workspace_bytes(*arguments, backend=machine.backend, **options)
    workspace = torch.full((n_bytes,), 255, dtype=torch.uint8, device=machine.device)
    x = arguments[0]
    out = torch.full(x.shape, float("nan"), dtype=options.get("dtype", x.dtype), device=machine.device)
    return fused_experts(*arguments, backend=machine.backend, out=out, workspace=workspace, **options)


def _compare(machine: _Machine, case: Case, name: str) -> Result:
    arguments, options = case.draw(machine.device)
    verdict = verify(_run(machine, arguments, options), arguments, options)
    detail = "" if verdict.ok else f"relative error {verdict.error:.1e} exceeds {verdict.tolerance:.1e}"
    return Result(name=name, ok=verdict.ok, error=verdict.error, tolerance=verdict.tolerance, detail=detail)


def _equal(name: str, got: Tensor, want: Tensor, unlike: str) -> Result:
    same = torch.equal(got, want)
    error = 0.0 if same else float((got.double() - want.double()).norm() / want.double().norm())
    return Result(name=name, ok=same, error=error, tolerance=0.0, detail="" if same else unlike)


def _no_tokens(machine: _Machine, case: Case, name: str) -> Result:
    arguments, options = replace(case, tokens=0).draw(machine.device)
    out = _run(machine, arguments, options)
    return _equal(name, out, arguments[0], "the output of no tokens has another shape")


def _same_bits(machine: _Machine, case: Case, name: str) -> Result:
    arguments, options = case.draw(machine.device)
    first, second = (_run(machine, arguments, options) for _ in range(2))
    return _equal(name, second, first, "a second run of the same call gives other bits")


def _compiled(machine: _Machine, case: Case, name: str) -> Result:
    """Through the operator and its fake kernel; no compiler of the machine's is needed for that."""
    arguments, options = case.draw(machine.device)

    def forward(*tensors: Tensor) -> Tensor:
        return fused_experts(*tensors, backend=machine.backend, **options) * 2.0

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
    return _equal(name, compiled(*arguments), forward(*arguments), "the compiled call gives another result")


def _graph(machine: _Machine, case: Case, name: str) -> Result:
    """Captured with one routing, replayed with other ids, tokens and weights, some ids invalid."""
    arguments, options = case.draw(machine.device)
    others, _ = replace(case, ids="invalid").draw(machine.device, seed=1)
    with torch.cuda.device(machine.device):
        _run(machine, arguments, options)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_experts(*arguments, backend=machine.backend, **options)
        for index in (0, 3, 4):
            arguments[index].copy_(others[index])
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    verdict = verify(out, arguments, options)
    detail = "" if verdict.ok else f"a replay with other ids errs by {verdict.error:.1e}"
    return Result(name=name, ok=verdict.ok, error=verdict.error, tolerance=verdict.tolerance, detail=detail)
