"""A quick self-test on one device: every capability once, on small random layers, against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedmoe.functional import fused_experts, workspace_bytes
from fusedmoe.spec.activation import REQUIRED, TABLE, Activation
from fusedmoe.target import target_of
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
class Layer:
    """A random layer on a device, to be varied with :func:`dataclasses.replace`.

    Attributes:
        ids: makes topk_ids [T, top_k] out of distinct random ids below the number of global experts.
        expert_map: local id of each global expert; its length is the number of global experts.
    """

    device: torch.device
    dtype: torch.dtype
    backend: str | None = None
    tokens: int = 33
    experts: int = 8
    top_k: int = 3
    hidden: int = 128
    intermediate: int = 96
    activation: Activation = Activation("silu")
    bias: bool = False
    interleaved: bool = False
    stored_kn: bool = False
    on_input: bool = False
    ids: Callable[[Tensor], Tensor] = field(default=lambda ids: ids)
    expert_map: tuple[int, ...] | None = None

    def draw(self, *, seed: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], dict[str, Any]]:
        """Arguments and options of :func:`fusedmoe.fused_experts`; the output is of order one."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes: int, fan_in: int = 1) -> Tensor:
            return torch.randn(*sizes, generator=generator).mul(fan_in**-0.5).to(self.device, self.dtype)

        def matrix(n: int, k: int) -> Tensor:
            return normal(*((self.experts, k, n) if self.stored_kn else (self.experts, n, k)), fan_in=k)

        rows = self.intermediate * (2 if self.activation.gated else 1)
        n_global = self.experts if self.expert_map is None else len(self.expert_map)
        distinct = torch.rand(self.tokens, n_global, generator=generator).argsort(1)[:, : self.top_k]
        weights = torch.rand(self.tokens, self.top_k, generator=generator) + 0.2
        arguments = (
            normal(self.tokens, self.hidden),
            matrix(rows, self.hidden),
            matrix(self.hidden, self.intermediate),
            weights.to(self.device),
            self.ids(distinct).to(self.device),
        )
        options: dict[str, Any] = {
            "activation": self.activation,
            "gate_up_layout": "interleaved" if self.interleaved else "concatenated",
            "weight_layout": "KN" if self.stored_kn else "NK",
            "apply_router_weight_on_input": self.on_input,
        }
        if self.bias:
            options |= {"w13_bias": normal(self.experts, rows), "w2_bias": normal(self.experts, self.hidden)}
        if self.expert_map is not None:
            options["expert_map"] = torch.tensor(self.expert_map, dtype=torch.int32, device=self.device)
        return arguments, options


def selftest(device: torch.device, backend: str | None = None) -> Iterator[Result]:
    """Test every capability on a device, one result at a time; never raises for a capability that fails."""
    target = target_of(device)
    old = target.vendor == "nvidia" and target.capability < 80
    layer = Layer(device=device, dtype=torch.float16 if old else torch.bfloat16, backend=backend)
    for name, test in _tests(layer):
        try:
            with torch.no_grad():
                yield test(name)
        except Exception as error:  # noqa: BLE001 - a kernel that does not compile is a result, and others may work
            lines = str(error).strip().splitlines() or [""]
            yield Result(name=name, ok=False, error=None, tolerance=None, detail=f"{type(error).__name__}: {lines[0]}")


def _tests(layer: Layer) -> Iterator[tuple[str, Callable[[str], Result]]]:
    few, many = (replace(layer, tokens=n_tokens) for n_tokens in (3, 300))
    for name, variant in _variants(layer):
        yield name, partial(_compare, variant)
    yield "no tokens", partial(_no_tokens, layer)
    yield "same bits again, few tokens", partial(_same_bits, few)
    yield "same bits again, many tokens", partial(_same_bits, many)
    yield "torch.compile", partial(_compiled, layer)
    if layer.device.type == "cuda" and layer.backend != "torch":
        yield "CUDA graph, few tokens", partial(_graph, few)
        yield "CUDA graph, many tokens", partial(_graph, many)


def _variants(layer: Layer) -> Iterator[tuple[str, Layer]]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield str(dtype).removeprefix("torch."), replace(layer, dtype=dtype)
    for name, (_, parameters) in TABLE.items():
        chosen = {parameter: 1.0 for parameter, default in parameters.items() if default is REQUIRED}
        if parameters.get("limit") is not None:
            chosen["limit"] = 0.5  # values are of order one: the default limit would clamp none
        yield f"activation {name}", replace(layer, activation=Activation(name, **chosen))
    yield "activation silu with a limit", replace(layer, activation=Activation("silu", limit=0.5))
    yield "gate and up interleaved", replace(layer, interleaved=True)
    yield "experts stored [E, K, N]", replace(layer, stored_kn=True)
    yield "biases", replace(layer, bias=True)
    yield "router weight on the input", replace(layer, on_input=True, bias=True)
    yield "expert map", replace(layer, expert_map=(-1, 3, 0, -1, 7, 2, 5, -1, 1, 4, 6, 99))
    yield "ids int32", replace(layer, ids=lambda ids: ids.int())
    yield "ids outside the experts", replace(layer, ids=_some_invalid)
    yield "an expert twice in a token", replace(layer, ids=lambda ids: ids[:, :1].expand_as(ids))
    yield "one expert takes all", replace(layer, ids=lambda ids: torch.full_like(ids, 5))
    yield "no expert takes any", replace(layer, ids=lambda ids: torch.full_like(ids, -1))
    yield "one token", replace(layer, tokens=1)
    yield "few tokens", replace(layer, tokens=3)
    yield "many tokens", replace(layer, tokens=300)
    yield "many experts", replace(layer, experts=256, top_k=8, hidden=64, intermediate=32)
    yield "sizes that fit no tile", replace(layer, tokens=37, hidden=97, intermediate=51)


def _some_invalid(ids: Tensor) -> Tensor:
    invalid = torch.tensor([-1, 8, 2**31 - 1, -(2**63)])
    ids = ids.clone()
    ids[::3, 0] = invalid[torch.arange(len(ids[::3])) % len(invalid)]
    ids[-1] = -1
    return ids


def _run(layer: Layer, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor:
    """The call, with NaN in the output and the workspace beforehand."""
    n_bytes = workspace_bytes(*arguments, backend=layer.backend, **options)
    workspace = torch.full((n_bytes,), 255, dtype=torch.uint8, device=layer.device)
    out = torch.full_like(arguments[0], float("nan"))
    return fused_experts(*arguments, backend=layer.backend, out=out, workspace=workspace, **options)


def _compare(layer: Layer, name: str) -> Result:
    arguments, options = layer.draw()
    verdict = verify(_run(layer, arguments, options), arguments, options)
    detail = "" if verdict.ok else f"relative error {verdict.error:.1e} exceeds {verdict.tolerance:.1e}"
    return Result(name=name, ok=verdict.ok, error=verdict.error, tolerance=verdict.tolerance, detail=detail)


def _equal(name: str, got: Tensor, want: Tensor, unlike: str) -> Result:
    same = torch.equal(got, want)
    error = 0.0 if same else float((got.double() - want.double()).norm() / want.double().norm())
    return Result(name=name, ok=same, error=error, tolerance=0.0, detail="" if same else unlike)


def _no_tokens(layer: Layer, name: str) -> Result:
    arguments, options = replace(layer, tokens=0).draw()
    out = _run(layer, arguments, options)
    return _equal(name, out, arguments[0], "the output of no tokens has another shape")


def _same_bits(layer: Layer, name: str) -> Result:
    arguments, options = layer.draw()
    first, second = (_run(layer, arguments, options) for _ in range(2))
    return _equal(name, second, first, "a second run of the same call gives other bits")


def _compiled(layer: Layer, name: str) -> Result:
    """Through the operator and its fake kernel; no compiler of the machine's is needed for that."""
    arguments, options = layer.draw()

    def forward(*tensors: Tensor) -> Tensor:
        return fused_experts(*tensors, backend=layer.backend, **options) * 2.0

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
    return _equal(name, compiled(*arguments), forward(*arguments), "the compiled call gives another result")


def _graph(layer: Layer, name: str) -> Result:
    """Captured with one routing, replayed with other ids, tokens and weights, some ids invalid."""
    arguments, options = layer.draw()
    others, _ = replace(layer, ids=_some_invalid).draw(seed=1)
    with torch.cuda.device(layer.device):
        _run(layer, arguments, options)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_experts(*arguments, backend=layer.backend, **options)
        for index in (0, 3, 4):
            arguments[index].copy_(others[index])
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
    verdict = verify(out, arguments, options)
    detail = "" if verdict.ok else f"a replay with other ids errs by {verdict.error:.1e}"
    return Result(name=name, ok=verdict.ok, error=verdict.error, tolerance=verdict.tolerance, detail=detail)
