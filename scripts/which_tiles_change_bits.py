#!/usr/bin/env python
"""Which differences between tiles change the bits of a row on this GPU: what `Arithmetic` of plan/invariance.py claims.

    scripts/which_tiles_change_bits.py [SCHEME ...]

For each scheme the layer runs with the tiles of one long prompt, then with one field of both GEMMs changed at a time,
and with the tiles of every other backend and number of tokens. A line says how many rows changed, and whether the rule
says so: `WRONG` where bits change that it holds to be the same, `strict` where they do not although it lets them.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from fusedmoe import experts
from fusedmoe.checks import check
from fusedmoe.plan.config import KernelConfig, Plan, TritonPlan
from fusedmoe.plan.heuristics import requantise
from fusedmoe.plan.invariance import anchor_tokens, arithmetic_of
from fusedmoe.plan.planner import PLANS, SUPPORTS
from fusedmoe.plan.validity import why_not
from fusedmoe.schemes import SCHEMES, format_of
from fusedmoe.target import target_of
from fusedmoe.testing.cases import Case

#: One field at a time.
CHANGES = [
    *({"block_m": size} for size in (16, 32, 64, 128)),
    *({"block_n": size} for size in (32, 64, 128, 256)),
    *({"block_k": size} for size in (32, 64, 128, 256)),
    *({"warps": count} for count in (4, 8)),
    *({"stages": count} for count in (2, 3, 4)),
    {"swap": True}, {"swap": False}, {"words": True, "maps": "none"}, {"words": False}, {"maps": "none"},
]  # fmt: skip


def main() -> None:
    """Print a line for every change."""
    device = torch.device("cuda", torch.cuda.current_device())
    for scheme in sys.argv[1:] or ["none", *SCHEMES]:
        form = None if scheme == "none" else format_of(scheme)
        case = Case.of((2048, 4, 16, 1024, 768), formats=(form, form)).fitted()
        arguments, options = case.draw(device)
        call = check(*arguments, **options)
        problem, target = call.problem, target_of(device)
        gemms = problem.gate_up_gemm, problem.down_gemm

        def facts(how: TritonPlan) -> tuple[object, ...]:
            pairs = zip((how.gate_up, how.down), gemms, strict=True)  # noqa: B023 - used in this turn alone
            return (*(arithmetic_of(c, g, problem, target) for c, g in pairs), how.requantise)  # noqa: B023

        plans: dict[str, tuple[str, TritonPlan]] = {}
        for backend, plan_of in PLANS.items():
            if SUPPORTS[backend](problem, target):
                continue
            for tokens in (1, 8, 32, 128, 512, anchor_tokens(problem)):
                how = replace(plan_of(replace(problem, tokens=tokens), target), few=False)
                plans[f"{backend}, the tiles of {tokens} tokens"] = backend, how
        anchor = plans[f"triton, the tiles of {anchor_tokens(problem)} tokens"][1]
        for change in CHANGES:
            how = changed(anchor, change)
            configs = zip((how.gate_up, how.down), gemms, strict=True)
            if not any(why_not(config, gemm, target) for config, gemm in configs):
                plans[f"{change}"] = "triton", replace(how, requantise=requantise(problem.down_gemm, how.gate_up))
        want = experts.run(call, Plan(backend="triton", triton=anchor))
        for name, (backend, how) in plans.items():
            try:
                got = experts.run(call, Plan(backend=backend, triton=how))
                rows = int((got != want).any(1).sum())
            except Exception as error:  # noqa: BLE001 - a tile that does not compile is a line too
                print(f"{scheme:12} {name:40} {type(error).__name__}")
                continue
            claimed = facts(how) == facts(anchor)
            verdict = "WRONG" if rows and claimed else "strict" if not rows and not claimed else "ok"
            print(f"{scheme:12} {name:40} {rows:5} rows of {got.shape[0]} differ  {verdict}", flush=True)


def changed(plan: TritonPlan, change: dict[str, object]) -> TritonPlan:
    """Both GEMMs with this field changed, by loads that every tile takes."""

    def one(config: KernelConfig) -> KernelConfig:
        maps = "none" if config.maps == "none" else "w"
        return replace(config, **{"maps": maps, "programs_per_sm": 0, "flatten": False, **change})  # type: ignore[arg-type]

    return replace(plan, gather=False, gate_up=one(plan.gate_up), down=one(plan.down))


if __name__ == "__main__":
    main()
