"""Problems to test a backend on: outputs of order one, every option, and pairwise grids of options."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fusedmoe import reference
from fusedmoe.functional import fused_experts, workspace_bytes
from fusedmoe.spec.activation import Activation
from fusedmoe.spec.layout import GateUpLayout, WeightLayout
from fusedmoe.testing.verify import relative_error

#: Every activation, with parameters that its limits bite on inputs of order one.
ACTIVATIONS = (
    Activation("silu"),
    Activation("silu", limit=0.7),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2"),
    Activation("swigluoai", limit=1.0),
    Activation("swiglustep", limit=0.5),
    Activation("situ", beta=0.8),
    Activation("situ", beta=1.5, linear_beta=0.6),
    Activation("silu_no_mul"),
    Activation("gelu_no_mul"),
    Activation("gelu_tanh_no_mul"),
    Activation("relu2_no_mul"),
)

#: Ids that name no expert, whatever their number; E and E + 1 are two more. All fit int32.
ABSENT = (-1, -7, 2**31 - 1, -(2**31))

#: Every option of a case but its sizes, for :func:`pairwise`.
OPTIONS: dict[str, Sequence[Any]] = {
    "dtype": ("float32", "float16", "bfloat16"),
    "activation": ACTIVATIONS,
    "gate_up_layout": ("concatenated", "interleaved"),
    "weight_layout": ("NK", "KN"),
    "bias": (False, True),
    "on_input": (False, True),
    "mapped": (False, True),
    "ids": ("uniform", "any", "one", "invalid", "absent"),
    "id_dtype": ("int32", "int64"),
    "router_dtype": ("float32", "float16", "bfloat16"),
    "pad": (0, 3, 8),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem. ``ids``: "uniform" (distinct), "any" (duplicates), "one" (all on one expert), "invalid" (a third
    name no expert), "absent" (none does). ``pad``: columns of NaN beside every matrix, so that strides are odd.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    dtype: str = "bfloat16"
    activation: Activation = field(default_factory=lambda: Activation("silu"))
    gate_up_layout: GateUpLayout = "concatenated"
    weight_layout: WeightLayout = "NK"
    bias: bool = False
    on_input: bool = False
    mapped: bool = False
    ids: str = "uniform"
    id_dtype: str = "int64"
    router_dtype: str = "float32"
    pad: int = 0

    @classmethod
    def of(cls, shape: tuple[int, int, int, int, int], **options: Any) -> Case:
        """A case of sizes (tokens, top_k, experts, hidden, intermediate)."""
        sizes: dict[str, Any] = dict(zip(("tokens", "top_k", "experts", "hidden", "intermediate"), shape, strict=True))
        return cls(**sizes, **options)

    def draw(self, device: str = "cpu", seed: int = 0) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Arguments and options of ``fused_experts``."""
        g = torch.Generator(device).manual_seed(seed)
        dtype = getattr(torch, self.dtype)
        n_rows = self.intermediate * (2 if self.activation.gated else 1)

        def matrix(n: int, k: int) -> torch.Tensor:
            rows, columns = (n, k) if self.weight_layout == "NK" else (k, n)
            buffer = torch.full((self.experts, rows, columns + self.pad), float("nan"), dtype=dtype, device=device)
            buffer[:, :, :columns] = torch.randn(self.experts, rows, columns, generator=g, device=device) * k**-0.5
            return buffer[:, :, :columns]

        def bias(n: int) -> torch.Tensor | None:
            return torch.randn(self.experts, n, generator=g, device=device) if self.bias else None

        x = torch.full((self.tokens, self.hidden + self.pad), float("nan"), dtype=dtype, device=device)
        x[:, self.pad :] = torch.randn(self.tokens, self.hidden, generator=g, device=device)
        n_global = self.experts + 3 if self.mapped else self.experts
        expert_map = None
        if self.mapped:
            expert_map = torch.full((n_global,), -1, dtype=torch.int32, device=device)
            here = torch.randperm(n_global, generator=g, device=device)[: self.experts]
            expert_map[here] = torch.arange(self.experts, dtype=torch.int32, device=device)
            expert_map[here[0]] = self.experts  # a map entry out of range: absent
        arguments = (
            x[:, self.pad :],
            matrix(n_rows, self.hidden),
            matrix(self.hidden, self.intermediate),
            (torch.rand(self.tokens, self.top_k, generator=g, device=device) + 0.1).to(
                getattr(torch, self.router_dtype)
            ),
            self._ids(n_global, g),
        )
        options: dict[str, Any] = {
            "activation": self.activation,
            "gate_up_layout": self.gate_up_layout,
            "weight_layout": self.weight_layout,
            "w13_bias": bias(n_rows),
            "w2_bias": bias(self.hidden),
            "apply_router_weight_on_input": self.on_input,
            "expert_map": expert_map,
        }
        return arguments, options

    def _ids(self, n_global: int, g: torch.Generator) -> torch.Tensor:
        shape, device = (self.tokens, self.top_k), g.device
        if self.ids == "uniform" and self.top_k <= n_global:
            ids = torch.rand(self.tokens, n_global, generator=g, device=device).argsort(1)[:, : self.top_k]
        elif self.ids == "one":
            ids = torch.randint(n_global, (1, 1), generator=g, device=device).expand(shape)
        else:
            ids = torch.randint(n_global, shape, generator=g, device=device)
        if self.ids in ("invalid", "absent"):
            absent = torch.tensor([n_global, n_global + 1, *ABSENT], device=device)
            replace = torch.rand(shape, generator=g, device=device) < (1 / 3 if self.ids == "invalid" else 2)
            ids = torch.where(replace, absent[torch.randint(len(absent), shape, generator=g, device=device)], ids)
        return ids.to(getattr(torch, self.id_dtype))


def run_poisoned(case: Case, device: str = "cpu", backend: str = "triton", seed: int = 0) -> tuple[torch.Tensor, float]:
    """Run a case twice with dirty output and workspace; return the output and its error against the reference.

    Raises:
        AssertionError: the two runs differ by a bit, so something that was never written was read.
    """
    arguments, options = case.draw(device, seed)
    size = workspace_bytes(*arguments, backend=backend, **options)
    outputs = []
    for poison in (0xFF, 0x7F):  # NaN; large numbers, and ids in range
        out = torch.full_like(arguments[0], float("nan"), memory_format=torch.contiguous_format)
        workspace = torch.full((size,), poison, dtype=torch.uint8, device=device)
        outputs.append(fused_experts(*arguments, out=out, workspace=workspace, backend=backend, **options))
    assert torch.equal(outputs[0], outputs[1]), "the output depends on memory that nothing wrote"
    want = reference.fused_experts(*arguments, **options)
    return outputs[0], relative_error(outputs[0], want)


def pairwise(options: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Rows such that every pair of values of every two options occurs in one: greedy, the same for the same seed."""
    names = list(options)
    chooser = random.Random(seed)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }

    def covers(row: Mapping[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        pairs: Iterable[tuple[str, str]] = itertools.combinations(names, 2)
        return {((a, row[a]), (b, row[b])) for a, b in pairs} & missing

    rows = []
    while missing:
        start = min(missing)
        candidates = []
        for _ in range(30):
            row = {name: chooser.randrange(len(options[name])) for name in names}
            row.update(dict(start))
            candidates.append(row)
        best = max(candidates, key=lambda row: len(covers(row)))
        missing -= covers(best)
        rows.append({name: options[name][index] for name, index in best.items()})
    return rows
